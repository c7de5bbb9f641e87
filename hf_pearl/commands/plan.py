"""Say which devices target and draft would go to, how much memory they take there, and why; nothing is loaded.

Models are folders or names on the Hub, of which only the configuration and the sizes of the files are fetched. With
--devices, plan for a machine that you are not on.
"""

from __future__ import annotations

import argparse

import torch

from ..option_types import positive_int
from ..parallel.placement import MIN_TOKENS
from ..planning.plan import plan
from .command_line import DTYPES, UsageError, check_both_named, model_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--target", metavar="MODEL", help="name or folder of the target (default: the embedded one)")
    parser.add_argument("--draft", metavar="MODEL", help="name or folder of the draft (default: the embedded one)")
    parser.add_argument(
        "--devices",
        metavar="MACHINE",
        help='such as 8x80GiB, "2x24GiB,1x80GiB", 8x80GiB@3.35TB/s (bytes read per second) or "cpu 64GiB" '
        "(default: what there is)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they were saved)")
    parser.add_argument(
        "--num-tokens",
        metavar="N",
        type=positive_int,
        default=MIN_TOKENS,
        help=f"for which the caches must have room (default: {MIN_TOKENS})",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_both_named(args)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    try:
        print(
            plan(
                model_source(args.target, "target"),
                model_source(args.draft, "draft"),
                args.devices,
                dtype,
                args.num_tokens,
            )
        )
    except (ValueError, NotImplementedError) as error:
        raise UsageError(str(error)) from error
    return 0
