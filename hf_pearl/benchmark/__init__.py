"""Measure ways of decoding beside each other: same models, same prompts, in turns, each at its own best setting."""

from .machine import describe_machine, describe_versions
from .measurement import Measurement, measure, num_calls, warm_up
from .methods import METHODS, OURS, Completion, Setting, Workload, complete, settings
from .near_tie import first_difference, is_near_tie
from .results import MethodResult
from .table import notes, table

__all__ = [
    "METHODS",
    "OURS",
    "Completion",
    "Measurement",
    "MethodResult",
    "Setting",
    "Workload",
    "complete",
    "describe_machine",
    "describe_versions",
    "first_difference",
    "is_near_tie",
    "measure",
    "notes",
    "num_calls",
    "settings",
    "table",
    "warm_up",
]
