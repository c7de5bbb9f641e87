"""A lane over several ranks of one model, and what they say to each other."""
