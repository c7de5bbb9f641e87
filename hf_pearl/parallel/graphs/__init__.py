"""Captured forwards of a lane: CUDA graphs, of which sizes, and several draft steps in one."""
