"""Lanes: one model with its devices, its cache and its own thread or process."""
