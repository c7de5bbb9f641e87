"""Find out whether PEARL pays for a pair of models on this machine, and with which settings.

Measures `generate`, our engine without a draft, PEARL's default and other settings on the same prompts, in turns; then
says what was found, what speed-up to expect, what to pass to `generate`, and whether to use PEARL for this pair at all.
"""

from __future__ import annotations

import argparse

from ..benchmark.recording import describe_model
from ..option_types import positive_int
from ..registry import release
from ..tuning import tune
from .command_line import UsageError, add_pair_options, add_workload_options, load_pair, make_prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_pair_options(parser)
    add_workload_options(parser)
    parser.add_argument("--batch-size", metavar="N", type=positive_int, default=1, help="prompts per call (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where a text of ours differs from the reference's, and not at a near-tie."""
    target, draft, _ = pair = load_pair(args)
    prompts = make_prompts(args, pair)
    if len(prompts) % args.batch_size:
        raise UsageError(
            f"--batch-size {args.batch_size}: {len(prompts)} prompts (--num-prompts) fill no whole batches"
        )
    print(f"target: {describe_model(target)}\ndraft:  {describe_model(draft)}\n")
    try:
        tuning = tune(target, draft, prompts, args.max_new_tokens, args.batch_size, args.temperature, args.seed)
    finally:
        release(target)
    return int(tuning.num_first_differences > tuning.num_near_ties)
