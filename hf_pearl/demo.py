"""Stream a completion, then measure five ways of decoding it.

The text that PEARL writes appears as it is verified: the draft's tokens that stood in green, the target's own plain.
Then all methods generate from the same prompts, in turns, each at its own best number of threads and draft length:

  generate     transformers' `generate`
  assisted     transformers' assisted generation
  engine       our engine without a draft
  speculative  our engine, draft and target taking turns (ordinary speculative decoding)
  pearl        our engine, both at the same time
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TextIO

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .benchmark import (
    Measurement,
    Workload,
    complete,
    describe_machine,
    describe_versions,
    measure,
    notes,
    num_calls,
    settings,
    table,
    warm_up,
)
from .command_line import add_pair_options, add_workload_options, load_pair, make_workload, positive_int, writable_file
from .enabling import disable, enable
from .pair import PACKAGED
from .registry import release
from .streaming import DRAFTED, PLAIN, VerifiedStreamer

DIM = "\x1b[2m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add_pair_options(parser)
    add_workload_options(parser)
    group = parser.add_argument_group("measurement")
    group.add_argument("--runs", metavar="N", type=positive_int, default=3, help="take medians of N runs (default: 3)")
    group.add_argument("--json", metavar="FILE", type=writable_file, help="write the figures to FILE, too")


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where a method of ours wrote something else than the reference, and not at a near-tie."""
    target, draft, tokenizer = pair = load_pair(args)
    workload = make_workload(args, pair)
    print(f"target: {describe(target)}\ndraft:  {describe(draft)}\n")
    enable(target)
    try:
        stream_completion(workload, tokenizer)
        measurement = measure_with_progress(workload, args.runs)
    finally:
        disable(target)
        release(target)
    print(table(measurement), "", *notes(measurement), sep="\n")
    if args.json is not None:
        write_json(args.json, measurement)
    return int(measurement.num_first_differences > measurement.num_near_ties)


def stream_completion(workload: Workload, tokenizer: PreTrainedTokenizerBase, file: TextIO | None = None) -> None:
    """Continue the first prompt with PEARL, on `file` (default: standard output), once the draft has started."""
    file = file or sys.stdout
    marks = file.isatty() and not os.environ.get("NO_COLOR")
    setting = settings("pearl")[0]
    warm_up(workload, setting)
    prompt = workload.prompts[0]
    text = tokenizer.decode(prompt[0], skip_special_tokens=True)
    print(f"{DIM}{text}{PLAIN}" if marks else text, end="", file=file, flush=True)
    streamer = VerifiedStreamer(tokenizer, file, marks)
    complete(workload, setting, prompt, streamer)
    colour = f" ({DRAFTED}green{PLAIN})" if marks else ""
    print(f"\n{streamer.num_drafted} of {streamer.num_tokens} tokens are the draft's{colour}.\n", file=file)


def measure_with_progress(workload: Workload, num_runs: int) -> Measurement:
    """Measure, under a progress bar (seldom renewed where it goes into a log)."""
    total, interval = num_calls(workload, num_runs), 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(total=total, unit="call", desc="measuring", leave=False, mininterval=interval) as bar:

        def advance(method: str) -> None:
            bar.set_postfix_str(method, refresh=False)
            bar.update()

        return measure(workload, num_runs, advance)


def describe(model: PreTrainedModel) -> str:
    """A model in one line."""
    num_layers = model.config.get_text_config().num_hidden_layers
    dtype = str(model.dtype).removeprefix("torch.")
    return f"{model.num_parameters() / 1e6:.1f}M parameters, {num_layers} layers, {dtype} on {model.device}"


def write_json(path: Path, measurement: Measurement) -> None:
    """Write all figures, and what they were made with."""
    workload = measurement.workload
    figures = {
        **measurement.as_dict(),
        "models": {"target": _name(workload.target), "draft": _name(workload.draft)},
        "command": " ".join(["python -m hf_pearl", *sys.argv[1:]]),
        "machine": describe_machine(workload.target.device),
        "versions": describe_versions(),
    }
    path.write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", "utf-8")


def _name(model: PreTrainedModel) -> str:
    """A model's name or folder; the embedded pair's folder without what lies above the package."""
    return str(model.name_or_path).removeprefix(f"{PACKAGED.parents[1]}/")
