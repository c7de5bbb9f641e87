"""Measure a part of hf_pearl beside what it stands in for, in one run and in turns.

cache   the paged cache beside transformers' `DynamicCache`: decode steps, prefill, memory, forks, block sizes
"""

from __future__ import annotations

import argparse
import json
import sys

import torch
from tqdm import tqdm

from .benchmark import describe_machine, describe_versions
from .benchmark.cache_suite import NUM_TURNS, measure_cache
from .benchmark.cache_table import cache_table
from .command_line import add_model_options, load_target, positive_int, writable_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--suite", choices=["cache"], required=True, help="what to measure")
    add_model_options(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--steps", metavar="N", type=positive_int, default=20, help="take medians of N (default: 20)")
    group.add_argument("--threads", metavar="N", type=positive_int, help="of the CPU (default: torch's)")
    group.add_argument("--json", metavar="FILE", type=writable_file, help="write the figures to FILE, too")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    model, name = load_target(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tqdm(total=NUM_TURNS, desc="measuring", leave=False) as bar:

        def advance(part: str) -> None:
            bar.set_postfix_str(part)
            bar.update()

        figures = measure_cache(model, args.steps, advance)
    figures |= {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "num_steps": args.steps,
        "command": " ".join(["python -m hf_pearl", *sys.argv[1:]]),
        "machine": describe_machine(model.device),
        "versions": describe_versions(),
    }
    print(cache_table(figures))
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", "utf-8")
    return 0
