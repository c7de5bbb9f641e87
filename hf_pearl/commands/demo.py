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
import os
import sys
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from ..benchmark import DEMO, PEARL, Measurement, Workload, complete, notes, table, warm_up
from ..benchmark.recording import describe_model, figures, measure_with_progress, write_json
from ..enabling import measuring
from ..option_types import positive_int, writable_file
from ..streaming import DRAFTED, PLAIN, VerifiedStreamer
from .command_line import add_pair_options, add_workload_options, load_pair, make_workload

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
    print(f"target: {describe_model(target)}\ndraft:  {describe_model(draft)}\n")
    with measuring(target):
        stream_completion(workload, tokenizer)
        measurement = measure_with_progress(workload, DEMO, args.runs)
    print(table(measurement), "", *notes(measurement), sep="\n")
    if args.json is not None:
        write_json(args.json, figures(measurement) | speedups(measurement))
    return int(measurement.num_first_differences > measurement.num_near_ties)


def stream_completion(workload: Workload, tokenizer: PreTrainedTokenizerBase, file: TextIO | None = None) -> None:
    """Continue the first prompt with PEARL, on `file` (default: standard output), once the draft has started."""
    file = file or sys.stdout
    marks = file.isatty() and not os.environ.get("NO_COLOR")
    setting = PEARL.candidates[0]
    warm_up(workload, setting)
    prompts = workload.batches[0]
    text = tokenizer.decode(prompts[0][0], skip_special_tokens=True)
    print(f"{DIM}{text}{PLAIN}" if marks else text, end="", file=file, flush=True)
    streamer = VerifiedStreamer(tokenizer, file, marks)
    complete(workload, setting, prompts, streamer)
    colour = f" ({DRAFTED}green{PLAIN})" if marks else ""
    print(f"\n{streamer.num_drafted} of {streamer.num_tokens} tokens are the draft's{colour}.\n", file=file)


def speedups(measurement: Measurement) -> dict[str, float | None]:
    """PEARL's tokens per second over those of transformers' methods; None where one of them could not run."""
    pearl = measurement.result("pearl")
    rate = pearl.tokens_per_second
    rates = {name: measurement.result(name).tokens_per_second for name in ("generate", "assisted")}
    return {
        **{f"speedup_over_{name}": rate / other if rate and other else None for name, other in rates.items()},
        "mean_accepted_tokens": pearl.mean_accepted_tokens,
    }
