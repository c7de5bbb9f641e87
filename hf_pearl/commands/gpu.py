"""`python -m hf_pearl bench --suite h200`: its options, and from them to a measurement, its file and its tables."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..benchmark.gpu import FULL, QUICK, Extent, failures, gpu_tables, measure_gpu, part_names
from ..benchmark.recording import described, write_json
from ..option_types import at_least_one
from .command_line import EMBEDDED, UsageError, named_device

MADE_WITH = ("dtype", "is_quick", "versions", "machine")  # the same for all figures of a file


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
    group.add_argument(
        "--only",
        metavar="PART",
        nargs="+",
        default=[],
        help=f"measure these parts alone, and leave all else in --json FILE as it is: {quoted(part_names(FULL))}",
    )


def run_gpu(args: argparse.Namespace) -> int:
    """Measure the GPU path; 1 where anything failed, or one of our methods wrote something wrong."""
    if args.target is not None or args.draft is not None or args.pair != EMBEDDED:
        raise UsageError("--target, --draft and --pair are no options of --suite h200: it makes its own models")
    device = named_device(args.device)
    if device.type == "cpu" and not args.quick:
        raise UsageError("--suite h200 takes hours on a CPU; add --quick to see whether it runs, or --device cuda")
    dtype = getattr(torch, args.dtype or "bfloat16")
    extent = QUICK if args.quick else FULL
    _check_names(args.only, extent)
    about = {"dtype": str(dtype).removeprefix("torch."), "is_quick": args.quick, "minutes": args.minutes}
    about |= described(device)
    known = _filled(args.json, about) if args.only and args.json is not None and args.json.exists() else None
    if known is not None:
        about = {**known, "filled_in_by": [*known.get("filled_in_by", []), about["command"]]}

    def save(found: dict[str, Any]) -> None:
        if args.json is not None:
            write_json(args.json, {**about, **found})

    found = measure_gpu(extent, device, dtype, args.minutes, save, partial(print, flush=True), args.only, known)
    print(f"\n{gpu_tables({**about, **found})}")
    return int(any(failures(found)))


def quoted(names: list[str]) -> str:
    """Names as they are typed in a shell."""
    return ", ".join(f'"{name}"' for name in names)


def _check_names(only: list[str], extent: Extent) -> None:
    names = part_names(extent)
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UsageError(f"--only {quoted(unknown)}: the parts are {quoted(names)}")


def _filled(file: Path, about: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, to which figures of this run may be added."""
    try:
        known: dict[str, Any] = json.loads(file.read_text("utf-8"))
        was = {name: known[name] for name in (*MADE_WITH, "parts", "failed", "left_out")}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--only: {file} holds no figures of --suite h200; leave --only out to begin it") from error
    differing = [name for name in MADE_WITH if was[name] != about[name]]
    if differing:
        what = "; ".join(f"{name} was {was[name]}, is {about[name]}" for name in differing)
        raise UsageError(f"--only: the figures of {file} were made otherwise ({what}); name another --json FILE")
    return known
