"""Measure ways of decoding beside each other, or a part of hf_pearl beside what it stands in for, in one run.

generation  transformers' ways of decoding and ours on the same prompts, in turns, each at its own best setting; what
            each part of PEARL gives; speeds are shown of methods whose output is right
cache       the paged cache beside transformers' `DynamicCache`: decode steps, prefill, memory, forks, block sizes
efficiency  PEARL's default beside what its schedule would take if nothing but the two models took time
handover    from one lane to the other and back, and the default with every execution in turns
h200        the GPU path: steps of models of real shapes beside the bandwidth bound and beside transformers, attention,
            a pair on one GPU, and what more GPUs would give, simulated; as much as --minutes allow
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..benchmark import BENCH, UNTRAINED, Workload, notes, table
from ..benchmark.cache_suite import NUM_TURNS, measure_cache
from ..benchmark.cache_table import cache_table
from ..benchmark.efficiency_suite import measure_efficiency, num_profiles
from ..benchmark.efficiency_table import efficiency_table
from ..benchmark.grid_tables import summary_table, title, titled_tables
from ..benchmark.handover_suite import MAX_STEPS, METHODS, MIN_STEPS, SAMPLED_METHODS, measure_handovers
from ..benchmark.handover_table import handover_table
from ..benchmark.heavier import heavier
from ..benchmark.plot import MISSING, is_matplotlib_available, plot
from ..benchmark.recording import describe_model, described, figures, measure_with_progress, write_json
from ..benchmark.untrained import untrained
from ..enabling import measuring
from ..option_types import at_least_one, png_file, positive_int, writable_file, writable_folder
from .command_line import (
    EMBEDDED,
    UsageError,
    add_pair_options,
    add_workload_options,
    load_pair,
    load_target,
    make_prompts,
)
from .gpu import add_gpu_options, run_gpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--suite", choices=sorted(SUITES), default="generation", help="default: generation")
    add_pair_options(parser)
    for add in OPTIONS:
        add(parser)
        parser.set_defaults(**dict.fromkeys(_defaults(add)))  # `run` fills them in: it has to know what was given.


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 where a method wrote something else than the reference, and not at a near-tie."""
    defaults: dict[str, Any] = {}
    for add, suites in OPTIONS.items():
        defaults |= _defaults(add)
        for name in _defaults(add):
            if args.suite not in suites and getattr(args, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} is an option of --suite {' and '.join(suites)}")
    given = {name: value for name, value in vars(args).items() if value is not None}
    return SUITES[args.suite](argparse.Namespace(**{**vars(args), **defaults, **given}))


def _defaults(add: Callable[[argparse.ArgumentParser], None]) -> dict[str, Any]:
    """The options of a group, and what they are where they are not given."""
    parser = argparse.ArgumentParser()
    add(parser)
    return vars(parser.parse_args([]))


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """What suites can be told that decode; every combination of the lists is a measurement of its own."""
    add_workload_options(parser, many=True)
    group = parser.add_argument_group("measurement (--suite generation, efficiency, handover)")
    group.add_argument(
        "--target-cost",
        metavar="X",
        type=at_least_one,
        nargs="+",
        default=[1.0],
        help="give the target X times its work, with the same output, to stand in for a larger one (default: 1)",
    )
    group.add_argument("--runs", metavar="N", type=positive_int, default=3, help="take medians of N runs (default: 3)")
    group.add_argument("--markdown", metavar="FILE", type=writable_file, help="write the tables to FILE, too")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """What `--suite generation` alone can be told."""
    group = parser.add_argument_group("measurement (--suite generation)")
    group.add_argument(
        "--batch-size", metavar="N", type=positive_int, nargs="+", default=[1], help="prompts per call (default: 1)"
    )
    group.add_argument(
        "--json-folder", metavar="FOLDER", type=writable_folder, help="write each measurement's figures to a file in it"
    )
    group.add_argument(
        "--untrained-draft",
        action="store_true",
        help="measure the default with a draft of random weights: what one costs that is never right",
    )
    group.add_argument("--plot", metavar="FILE", type=png_file, help="draw all speed-ups (PNG); needs matplotlib")


def run_generation(args: argparse.Namespace) -> int:
    """Measure every combination of cost, batch size and temperature."""
    if args.plot is not None and not is_matplotlib_available():
        raise UsageError(f"--plot {args.plot}: {MISSING}")
    measured = []
    for cost, workload in _workloads(args, args.batch_size):
        with measuring(workload.target):
            measurement = measure_with_progress(workload, UNTRAINED if args.untrained_draft else BENCH, args.runs)
        measured.append({**figures(measurement), "target_cost": cost, "untrained_draft": args.untrained_draft})
        print(f"\n{title(measured[-1])}\n", table(measurement), "", *notes(measurement), sep="\n", flush=True)
        if args.json_folder is not None:
            write_json(args.json_folder / f"{_file_name(measured[-1])}.json", measured[-1])
    if args.markdown is not None:
        args.markdown.write_text(_document(measured), "utf-8")
    if args.plot is not None:
        plot(measured, args.plot)
    return int(any(each["first_differences"] > each["near_ties"] for each in measured))


def _workloads(args: argparse.Namespace, batch_sizes: Sequence[int]) -> Iterator[tuple[float, Workload]]:
    for option, values in ("--target-cost", args.target_cost), ("--temperature", args.temperature):
        _refuse_repeated(option, [f"{value:g}" for value in values])
    _refuse_repeated("--batch-size", list(map(str, batch_sizes)))
    target, draft, _ = pair = load_pair(args)
    if args.untrained_draft:
        draft = untrained(draft)
    prompts = make_prompts(args, pair)
    for batch_size in batch_sizes:
        if len(prompts) % batch_size:
            raise UsageError(f"--batch-size {batch_size}: {len(prompts)} prompts (--num-prompts) fill no whole batches")
    _heavier(target, max(args.target_cost))  # What cannot be is said now, not behind other measurements.
    print(f"target: {describe_model(target)}\ndraft:  {describe_model(draft)}")
    for cost in args.target_cost:
        heavy = _heavier(target, cost)
        for temperature, batch_size in product(args.temperature, batch_sizes):
            yield cost, Workload(heavy, draft, prompts, args.max_new_tokens, temperature, args.seed, batch_size)


def _heavier(target: PreTrainedModel, cost: float) -> PreTrainedModel:
    try:
        return heavier(target, cost)
    except (NotImplementedError, ValueError) as error:
        raise UsageError(f"--target-cost {cost:g}: {error}") from error


def _refuse_repeated(option: str, values: Sequence[str]) -> None:
    """Measurements are told apart by these."""
    repeated = [value for place, value in enumerate(values) if value in values[:place]]
    if repeated:
        raise UsageError(f"{option}: each value once, in six digits; got {repeated[0]} twice")


def _file_name(saved: dict[str, Any]) -> str:
    workload = saved["workload"]
    kind = "untrained" if saved["untrained_draft"] else "bench"
    return f"{kind}-cost{saved['target_cost']:g}-temperature{workload['temperature']:g}-batch{workload['batch_size']}"


def _document(measured: list[dict[str, Any]]) -> str:
    return "\n\n".join([*([summary_table(measured)] if len(measured) > 1 else []), titled_tables(measured)]) + "\n"


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """What `--suite cache` alone can be told."""
    group = parser.add_argument_group("measurement (--suite cache)")
    group.add_argument("--threads", metavar="N", type=positive_int, help="of the CPU (default: torch's)")


def add_steps_option(parser: argparse.ArgumentParser) -> None:
    """Of the suites that time single steps."""
    group = parser.add_argument_group("measurement (--suite cache, handover)")
    group.add_argument("--steps", metavar="N", type=positive_int, default=20, help="take medians of N (default: 20)")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Of the suites that make one file."""
    group = parser.add_argument_group("measurement (--suite cache, efficiency, handover, h200)")
    group.add_argument("--json", metavar="FILE", type=writable_file, help="write the figures to FILE, too")


def run_cache(args: argparse.Namespace) -> int:
    """Measure the paged cache."""
    if args.draft is not None:
        raise UsageError("--draft is an option of the suites that generate")
    if args.pair != EMBEDDED:
        raise UsageError(f"--pair {args.pair}: --suite cache measures a --target")
    model, name = load_target(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tqdm(total=NUM_TURNS, desc="measuring", leave=False) as bar:

        def advance(part: str) -> None:
            bar.set_postfix_str(part)
            bar.update()

        measured = measure_cache(model, args.steps, advance)
    measured |= {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "num_steps": args.steps,
        **described(model.device),
    }
    print(cache_table(measured))
    if args.json is not None:
        write_json(args.json, measured)
    return 0


def run_efficiency(args: argparse.Namespace) -> int:
    """Measure how near every combination of cost and temperature comes to its ideal, a prompt at a time."""
    measured: list[dict[str, Any]] = []
    for cost, workload in _workloads(args, [1]):
        with (
            measuring(workload.target),
            tqdm(total=num_profiles(workload, args.runs), unit="call", desc="measuring", leave=False) as bar,
        ):
            found = measure_efficiency(workload, args.runs, bar.update)
        measured.append({"target_cost": cost, "temperature": workload.temperature, **found})
    saved = {
        "efficiencies": measured,
        "num_runs": args.runs,
        "workload": workload.as_dict(),
        **described(workload.target.device),
    }
    print(efficiency_table(saved))
    if args.json is not None:
        write_json(args.json, saved)
    if args.markdown is not None:
        args.markdown.write_text(efficiency_table(saved) + "\n", "utf-8")
    return 0


def run_handover(args: argparse.Namespace) -> int:
    """Measure hand-overs, then every execution on the prompts; 1 where one wrote something else than the reference."""
    if len(args.target_cost) * len(args.temperature) > 1:
        raise UsageError("--suite handover: give one --target-cost and one --temperature")
    if not MIN_STEPS <= args.steps <= MAX_STEPS:
        raise UsageError(f"--steps {args.steps}: --suite handover takes percentiles of {MIN_STEPS} to {MAX_STEPS}")
    ((_, workload),) = _workloads(args, [1])
    handovers = measure_handovers(workload.draft, args.steps)
    methods = SAMPLED_METHODS if workload.temperature else METHODS
    with measuring(workload.target):
        measurement = measure_with_progress(workload, methods, args.runs)
    saved = {"handovers": handovers, "num_steps": args.steps, **figures(measurement)}
    print(handover_table(saved))
    if args.json is not None:
        write_json(args.json, saved)
    if args.markdown is not None:
        args.markdown.write_text(handover_table(saved) + "\n", "utf-8")
    return int(saved["first_differences"] > saved["near_ties"])


# Every group of options, and the suites that know it.
OPTIONS: dict[Callable[[argparse.ArgumentParser], None], tuple[str, ...]] = {
    add_text_options: ("generation", "efficiency", "handover"),
    add_generation_options: ("generation",),
    add_cache_options: ("cache",),
    add_steps_option: ("cache", "handover"),
    add_json_option: ("cache", "efficiency", "handover", "h200"),
    add_gpu_options: ("h200",),
}
SUITES: dict[str, Callable[[argparse.Namespace], int]] = {
    "generation": run_generation,
    "cache": run_cache,
    "efficiency": run_efficiency,
    "handover": run_handover,
    "h200": run_gpu,
}
