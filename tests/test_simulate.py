"""`hf_pearl.simulate` and `record_traces`: by hand, by what must hold of any trace, and against real calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import enabled_for_tiny_models, noisy_copy, tiny_model

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.decoding.recorded import TracedGuess
from hf_pearl.decoding.simulation import Costs, simulate_run
from hf_pearl.simulate import Trace


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def trace_of(stands: list[bool]) -> Trace:
    guesses = (TracedGuess(each, 0.9 if each else 0.4, 0 if each else None) for each in stands)
    return Trace((0,), tuple(guesses))


def test_a_short_trace_by_hand() -> None:
    """Sequential with 2 guesses: two stand, the third token is a correction; then one guess, there is no room."""
    times = hf_pearl.simulate([trace_of([True, True, False, True, False])], lambda _: 1.0, lambda _: 4.0)
    assert times.plain == 5 * 4.0
    assert (times.sequential, times.sequential_length) == ((2 + 4.0) + (1 + 4.0), 2)
    assert times.bound == 4.0 + 4.0
    assert times.efficiency(2 * times.pearl) == 0.5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=60), min_size=1, max_size=3), st.floats(0.5, 12.0))
def test_nothing_is_faster_than_the_bound(stands: list[list[bool]], ratio: float) -> None:
    times = hf_pearl.simulate([trace_of(each) for each in stands], lambda n: 1.0, lambda n: ratio * (1 + 0.05 * n))
    assert times.plain == pytest.approx(sum(map(len, stands)) * ratio * 1.05)
    assert times.bound <= min(times.plain, times.sequential, times.lockstep, times.pearl) * (1 + 1e-9)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_is_the_target_is_always_right(temperature: float) -> None:
    target = tiny_model("llama", 1)
    traces = hf_pearl.record_traces(target, target, [[5, 6], [7]], 20, temperature, seed=3)
    assert [(trace.prompt_ids, len(trace.guesses)) for trace in traces] == [((5, 6), 20), ((7,), 20)]
    assert all(guess.stands and guess.rank == 0 for trace in traces for guess in trace.guesses)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft_length", [1, 3])
def test_a_recorded_trace_takes_as_many_forwards_as_the_call_itself(temperature: float, draft_length: int) -> None:
    target = tiny_model("qwen3", 1)
    draft = noisy_copy(target, 0.05, 1)
    trace = hf_pearl.record_traces(target, draft, [[5]], 60, temperature, seed=3)[0]
    assert 5 < sum(guess.stands for guess in trace.guesses) < 58
    costs = Costs(lambda _: 1.0, lambda _: 4.0)
    simulated = simulate_run([trace.guesses], costs, draft_length, overlap=False, prompts=[trace.prompt_ids]).stats
    config = PearlConfig(draft_length=draft_length, overlap=False, execution="inline", seed=3)
    options = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    output = target.generate(
        torch.tensor([[5]]),
        max_new_tokens=60,
        assistant_model=draft,
        pearl=config,
        return_dict_in_generate=True,
        **options,
    )
    for name in ("target_forwards", "accepted_tokens", "verified_draft_tokens", "generated_tokens"):
        assert getattr(simulated, name) == getattr(output.pearl, name), name


def test_recording_needs_no_enabled_model() -> None:
    target = tiny_model("llama", 1)
    hf_pearl.disable()
    try:
        with pytest.raises(ValueError, match="pearl"):
            target.generate(torch.tensor([[5]]), max_new_tokens=4, pearl=True)
        assert len(hf_pearl.record_traces(target, target, [[5]], 4)[0].guesses) == 4
    finally:
        hf_pearl.enable()


def test_bad_arguments_are_refused_by_name() -> None:
    target = tiny_model("llama", 1)
    with pytest.raises(ValueError, match=r"`temperature` .* got -1"):
        hf_pearl.record_traces(target, target, [[5]], 4, temperature=-1.0)
    for traces in ([], [Trace((5,), ())]):
        with pytest.raises(ValueError, match="`traces`"):
            hf_pearl.simulate(traces, lambda n: 1.0, lambda n: 1.0)
