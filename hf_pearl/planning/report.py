"""A `Plan` in words."""

from __future__ import annotations

from ..parallel.cores import available_cores, cores_for_worker
from ..parallel.placement import MIN_TOKENS
from .plan import Plan, PlannedModel
from .planner import ALL_REDUCE_SECONDS, ASSUMED_BANDWIDTH, CORES, LAYER_SECONDS, gib

TURNS = "the only device: it has one core, on which target and draft take turns"
HEADINGS = ("", "device", "weights", "cache", "forwards", "graphs", "together", "of")


def report(plan: Plan) -> str:
    """What goes where, how much memory it takes, why, and the code that does it."""
    parts = [_models(plan), _table(plan), _why(plan), "\n".join(f"    {line}" for line in _code(plan))]
    parallel = _tensor_parallel(plan)
    return "\n\n".join([*parts, *([parallel] if parallel else []), _assumed(plan)])


def _lanes(plan: Plan) -> tuple[tuple[str, PlannedModel], tuple[str, PlannedModel]]:
    return ("target", plan.target), ("draft", plan.draft)


def _models(plan: Plan) -> str:
    return "\n".join(
        f"{part + ':':8}{model.name}, {str(model.dtype).removeprefix('torch.')}: {gib(model.footprint.weights)} of "
        f"weights, {gib(model.footprint.cache_per_token)} of cache a token"
        for part, model in _lanes(plan)
    )


def _table(plan: Plan) -> str:
    memory = {device.name: device.memory for device in plan.devices}
    rows: list[tuple[str, ...]] = [HEADINGS]
    for part, model in _lanes(plan):
        for share in model.lane.shares:
            sizes = (share.weights, share.cache, share.working, share.graphs, share.total, memory[share.device])
            rows.append((part, share.device, *map(gib, sizes)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        figures = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*names, *figures]))
    return "\n".join(lines)


def _why(plan: Plan) -> str:
    used = {*plan.target.lane.devices, *plan.draft.lane.devices}
    own, lines = cores_for_worker(1), []
    for part, model in _lanes(plan):
        why = TURNS if plan.is_here and model.lane.why == CORES and not own else model.lane.why
        lines.append(f"The {part} goes to {', '.join(model.lane.devices)}: {why}.")
    if used == {"cpu"} and plan.is_here and own:
        rest = [core for core in available_cores() if core not in own]
        lines.append(f"Cores of the target: {_numbers(rest)}; of the draft: {_numbers(own)}.")
    unused = [device.name for device in plan.devices if device.name not in used and device.kind != "cpu"]
    if unused:
        lines.append(f"Without anything: {', '.join(unused)}.")
    lines.append(
        f"The caches have room for {plan.num_tokens} tokens. A forward of the target takes about "
        f"{_milliseconds(plan.target.lane.seconds)}, a step of the draft {_milliseconds(plan.draft.lane.seconds)}."
    )
    return "\n".join(lines)


def _code(plan: Plan) -> list[str]:
    """The lines that place them so; models that are loaded are called `target` and `draft` in them."""
    named = [part for part, model in _lanes(plan) if model.source is not None]
    arguments = [part if model.source is None else repr(model.source) for part, model in _lanes(plan)]
    if plan.dtype is not None:
        arguments.append(f"dtype={plan.dtype}")
    if plan.min_tokens != MIN_TOKENS:
        arguments.append(f"num_tokens={plan.min_tokens}")
    same_plan, config = f"hf_pearl.plan({', '.join(arguments)})", plan.config
    if len(named) == 2:
        return [f"target, draft = {same_plan}.load()"]
    return [
        *(f"{part} = {same_plan}.{part}.load()" for part in named),
        "target.generate(**inputs, assistant_model=draft, pearl=hf_pearl.PearlConfig("
        f"target_devices={config.target_devices!r}, draft_devices={config.draft_devices!r}))",
    ]


def _tensor_parallel(plan: Plan) -> str:
    found = plan.tensor_parallel
    if found is None:
        return ""
    target, draft = (f"{part}_folder" if model.source is None else repr(model.source) for part, model in _lanes(plan))
    num_ranks = found.target_tp + found.draft_tp
    return (
        f"Tensor-parallel, {found.target_tp} devices for the target and {found.draft_tp} for the draft yield the most "
        f"tokens per second: forwards of {_milliseconds(found.target_seconds)} and steps of "
        f"{_milliseconds(found.draft_seconds)}, about {found.tokens_per_second:.0f} tokens per second. Weights and "
        f"forwards take {gib(found.target_bytes)} of each of the target's, {gib(found.draft_bytes)} of each of the "
        f"draft's; the caches have room for {found.num_tokens} tokens. In a script that is started by `torchrun "
        f"--nproc-per-node {num_ranks} script.py`:\n\n"
        f"    pair = hf_pearl.launch({target}, {draft}, target_tp={found.target_tp}, draft_tp={found.draft_tp}, "
        f"dtype={plan.target.dtype})"
    )


def _assumed(plan: Plan) -> str:
    bandwidths = {device.bandwidth for device in plan.devices}
    assumed = f"{ASSUMED_BANDWIDTH / 1e12:g} TB/s read per device where its speed is not known, " * (None in bandwidths)
    return (
        f"Estimates: {assumed}{LAYER_SECONDS * 1e6:.0f} microseconds a layer beside what it reads, "
        f"{2 * ALL_REDUCE_SECONDS * 1e6:.0f} more between tensor-parallel devices; forwards and graphs by the sizes of "
        "their vectors."
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds < 0.1 else f"{1e3 * seconds:.0f} ms"


def _numbers(cores: list[int]) -> str:
    return ", ".join(map(str, cores))
