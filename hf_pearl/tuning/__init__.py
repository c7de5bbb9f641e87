"""`hf_pearl.tune`: what PEARL gives a pair of models on this machine, and which settings are the fastest."""

from .run import tune
from .tuning import Tuning, Way

__all__ = ["Tuning", "Way", "tune"]
