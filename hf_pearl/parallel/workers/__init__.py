"""A draft lane in a process of its own: the process, what it shares, and what travels."""
