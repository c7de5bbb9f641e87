"""`python -m hf_pearl bench --suite h200`: its options, and from them to a measurement, its file and its tables."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from ..benchmark.gpu import FULL, QUICK, gpu_tables, measure_gpu
from ..benchmark.recording import described
from .command_line import EMBEDDED, UsageError, named_device, write_json
from .option_types import at_least_one


def add_gpu_options(parser: argparse.ArgumentParser) -> None:
    """What `--suite h200` alone can be told."""
    group = parser.add_argument_group("measurement (--suite h200)")
    group.add_argument(
        "--minutes",
        metavar="M",
        type=at_least_one,
        default=7.0,
        help="begin nothing that would take longer (default: 7)",
    )
    group.add_argument(
        "--quick", action="store_true", help="tiny models and few tokens: whether it runs, on any device"
    )


def run_gpu(args: argparse.Namespace) -> int:
    """Measure the GPU path; 1 where a part failed."""
    if args.target is not None or args.draft is not None or args.pair != EMBEDDED:
        raise UsageError("--target, --draft and --pair are no options of --suite h200: it makes its own models")
    device = named_device(args.device)
    if device.type == "cpu" and not args.quick:
        raise UsageError("--suite h200 takes hours on a CPU; add --quick to see whether it runs, or --device cuda")
    dtype = getattr(torch, args.dtype or "bfloat16")
    about = {"dtype": str(dtype).removeprefix("torch."), "is_quick": args.quick, "minutes": args.minutes}
    about |= described(device)

    def save(found: dict[str, Any]) -> None:
        if args.json is not None:
            write_json(args.json, {**about, **found})

    found = measure_gpu(QUICK if args.quick else FULL, device, dtype, args.minutes, save, partial(print, flush=True))
    print(f"\n{gpu_tables({**about, **found})}")
    return int(bool(found["failed"]))
