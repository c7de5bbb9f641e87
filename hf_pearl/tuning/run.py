"""`tune`: measure a pair, and say what is worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..benchmark import Measurement, Method, MethodResult, Setting, Workload
from ..benchmark.methods import COLD, SEQUENTIAL
from ..benchmark.recording import measure_with_progress
from ..enabling import enabled
from ..model_devices import devices_of, input_device
from ..pair_checks import check_numbers, checked_models, checked_prompts
from ..parallel.cores import available_cores
from ..simulate import simulate
from ..traces import Trace, record_traces
from .forward_times import measured_forward_times
from .tuning import DEFAULT, ENGINE, PLAIN, Tuning, Way

NUM_RUNS = 3
LOCKSTEP_LENGTHS = (2, 4, 8, 16)
SEQUENTIAL_LENGTHS = ("auto", 2, 4, 8)


def tune(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: Sequence[Sequence[int] | torch.Tensor],
    max_new_tokens: int = 100,
    batch_size: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
) -> Tuning:
    """Find out on this machine whether PEARL pays for a pair, what it gives, and with which settings; print that.

    Plain `generate`, our engine without a draft, PEARL's default and the settings that may be faster decode the prompts
    in turns, each three times, with torch's threads as they are. Nothing is kept between calls, since prompts are
    mostly new. Settings with which tokens depend on the draft (`verification="rejection"`) are not tried. Afterwards
    the pair stays warm, and goes on from what the default has learnt; `hf_pearl.release(draft)` gives it back.

    Parameters
    ----------
    target, draft : PreTrainedModel
        The pair; neither needs to be enabled.
    prompts : sequence
        Token ids of each prompt, without padding: a sequence of int, or a tensor `(length,)` or `(1, length)`, int64.
        They should be such as will be decoded: acceptance depends on the text.
    max_new_tokens : int
        Per prompt.
    batch_size : int
        Prompts per call; divides their number.
    temperature : float
        0 is greedy.
    seed : int
        Of sampling.

    Returns
    -------
    Tuning
        All figures; `print(tuning)` repeats the report.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        Before any work, for arguments that make no sense and for models that PEARL cannot run.
    """
    check_numbers(max_new_tokens, batch_size, temperature, seed)
    target, draft = checked_models(target, draft)
    token_ids = checked_prompts(prompts, (target, draft), max_new_tokens, batch_size)
    rows = tuple(torch.tensor([each], device=input_device(target)) for each in token_ids)
    workload = Workload(target, draft, rows, max_new_tokens, temperature, seed, batch_size)
    devices = {device for model in (target, draft) for device in devices_of(model)}
    gpus = [device for device in devices if device.type == "cuda"]
    with enabled(target), torch.random.fork_rng(sorted(gpus, key=str)):
        measurement = measure_with_progress(workload, _methods(draft), NUM_RUNS)
        tuning = _tuning(measurement, token_ids)
    print(tuning)
    return tuning


def _methods(draft: PreTrainedModel) -> tuple[Method, ...]:
    """What is compared: what a user can set, and that may be the fastest."""

    def method(name: str, *settings: Setting, runs_on_pair: bool = False) -> Method:
        return Method(name, name, settings, tries_threads=False, runs_on_pair=runs_on_pair)

    def ours(config: Any, *lengths: Any) -> tuple[Setting, ...]:
        return tuple(Setting(replace(config, draft_length=length), uses_draft=True) for length in lengths)

    methods = (
        method(PLAIN, Setting()),
        method(ENGINE, Setting(COLD)),
        method(DEFAULT, *ours(COLD, "auto"), runs_on_pair=True),
        method("lockstep", *ours(COLD, *LOCKSTEP_LENGTHS)),
        method("in turns", *ours(SEQUENTIAL, *SEQUENTIAL_LENGTHS)),
    )
    if input_device(draft).type != "cpu":  # There it is the default.
        return methods
    return (*methods, method("in a thread", *ours(replace(COLD, execution="threads"), "auto")))


def _tuning(measurement: Measurement, prompts: Sequence[Sequence[int]]) -> Tuning:
    workload = measurement.workload
    num_left = measurement.result(DEFAULT).draft_cores  # Lanes in two processes share the cores.
    others = len(available_cores()) - num_left if num_left else 0
    draft_times = measured_forward_times(workload.draft, prompts[0], others)
    target_times = measured_forward_times(workload.target, prompts[0], num_left)
    traces = _traces(workload, prompts)
    stood = [guess.stands for trace in traces for guess in trace.guesses]
    return Tuning(
        ways=tuple(_way(result) for result in measurement.results),
        acceptance_rate=sum(stood) / len(stood),
        draft_step_seconds=draft_times.seconds(1),
        target_forward_seconds=target_times.seconds(1),
        simulated=simulate(traces, draft_times.seconds, target_times.seconds),
        num_prompts=len(prompts),
        max_new_tokens=workload.max_new_tokens,
        batch_size=workload.batch_size,
        temperature=workload.temperature,
        num_texts=sum(len(each.rows) for result in measurement.compared for each in result.completions),
        num_first_differences=measurement.num_first_differences,
        num_near_ties=measurement.num_near_ties,
    )


def _traces(workload: Workload, prompts: Sequence[Sequence[int]]) -> list[Trace]:
    traces: list[Trace] = []
    for prompt in tqdm(prompts, desc="recording guesses", unit="prompt", leave=False):
        options = (workload.max_new_tokens, workload.temperature, workload.seed)
        traces += record_traces(workload.target, workload.draft, [prompt], *options)
    return traces


def _way(result: MethodResult) -> Way:
    setting = result.setting
    assert setting is not None, "only transformers' own other methods may be unable to run"
    num_drafted = result.total("accepted_tokens") - result.total("accepted_looked_up_tokens")
    return Way(
        name=result.name,
        pearl=None if setting.pearl is None else replace(setting.pearl, prefix_cache=True),
        uses_draft=setting.uses_draft,
        rates=tuple(result.rates),
        mean_accepted_tokens=result.mean_accepted_tokens or 0.0,
        drafted=num_drafted / result.num_tokens,
        error=result.error,
    )
