"""Measure ways of decoding beside each other: same models, same prompts, in turns, each at its own best setting."""

from .completion import Completion, Workload, complete
from .machine import describe_machine, describe_versions
from .measurement import Measurement, measure, num_calls, warm_up
from .methods import BENCH, DEMO, PEARL, UNTRAINED, Method, Setting
from .near_tie import first_difference, is_near_tie
from .results import MethodResult
from .table import notes, table

__all__ = [
    "BENCH",
    "DEMO",
    "PEARL",
    "UNTRAINED",
    "Completion",
    "Measurement",
    "Method",
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
    "table",
    "warm_up",
]
