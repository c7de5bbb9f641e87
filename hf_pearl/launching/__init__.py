"""A pair whose models may lie on several ranks: `launch`, and what it returns."""
