"""`hf_pearl.simulate` and `record_traces`: by hand, by what must hold of any trace, and against real calls."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import enabled_for_tiny_models, noisy_copy, tiny_model

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.commands.command_line import PROMPTS, read_prompts
from hf_pearl.decoding.draft_tree import MAX_DRAFT_LENGTH
from hf_pearl.decoding.recorded import TracedGuess
from hf_pearl.decoding.simulation import Costs, KeptBetweenRuns, simulate_run
from hf_pearl.simulate import _bound
from hf_pearl.traces import Trace


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
@pytest.mark.parametrize("vocab_size", [pytest.param(64, id="same"), pytest.param(48, id="smaller")])
def test_a_recorded_trace_takes_as_many_forwards_as_the_call_itself(
    vocab_size: int, temperature: float, draft_length: int
) -> None:
    """Also where the target says tokens that the draft does not know."""
    target = tiny_model("qwen3", 1)
    draft = noisy_copy(target, 0.05, 1, vocab_size)
    trace = hf_pearl.record_traces(target, draft, [[5]], 60, temperature, seed=3)[0]
    assert 5 < sum(guess.stands for guess in trace.guesses) < 58
    assert any((guess.token_id or 0) >= vocab_size for guess in trace.guesses) == (vocab_size < 64)
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


def test_a_draft_in_training_is_recorded_as_it_drafts() -> None:
    """Without dropout, as in a call."""
    target = tiny_model("gpt2", 1)
    expected = hf_pearl.record_traces(target, target, [[5, 6, 7]], 20)
    trained = copy.deepcopy(target).train()
    for module in trained.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    assert hf_pearl.record_traces(target, trained, [[5, 6, 7]], 20) == expected
    assert all(module.training for module in trained.modules())


def test_a_model_that_returns_a_dict_by_default_is_recorded_like_others() -> None:
    target = copy.deepcopy(tiny_model("llama", 1))
    expected = hf_pearl.record_traces(target, target, [[5, 6, 7]], 8)
    target.generation_config.return_dict_in_generate = True
    assert hf_pearl.record_traces(target, target, [[5, 6, 7]], 8) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_draft_guesses_under_the_processors_of_the_call(temperature: float) -> None:
    """The model's own defaults among them: a draft that is the target is always right."""
    target = copy.deepcopy(tiny_model("llama", 1))
    target.generation_config.repetition_penalty = 1.3
    (trace,) = hf_pearl.record_traces(target, target, [[5, 6, 7]], 30, temperature, seed=3)
    assert all(guess.stands for guess in trace.guesses)


@pytest.fixture(scope="module")
def recorded() -> dict[float, list[Trace]]:
    """Of the embedded pair, on prompts that its draft was not trained on."""
    target, draft, tokenizer = hf_pearl.load_demo_pair()
    prompts = [tokenizer(text).input_ids for text in read_prompts(PROMPTS)[:4]]
    return {temperature: hf_pearl.record_traces(target, draft, prompts, 80, temperature) for temperature in (0.0, 1.0)}


def seconds(traces: list[Trace], costs: Costs, *options: Any, **more: Any) -> float:
    learnt = KeptBetweenRuns()
    runs = (
        simulate_run([each.guesses], costs, *options, prompts=[each.prompt_ids], learnt=learnt, **more)
        for each in traces
    )
    return sum(run.seconds for run in runs)


@pytest.mark.parametrize(("temperature", "over_one_line"), [(0.0, 1.1), (1.0, 1.2)])
def test_what_the_tree_is_worth(recorded: dict[float, list[Trace]], temperature: float, over_one_line: float) -> None:
    """A target forward of 8 draft steps, 3% more of a draft step per guess: over lockstep, one line, and the bound."""
    traces, costs = recorded[temperature], Costs(lambda guesses: 1.0 + 0.03 * (guesses - 1), lambda tokens: 8.0)
    pearl = seconds(traces, costs)
    assert min(seconds(traces, costs, length) for length in (2, 4, 5, 6, 7, 8, 10)) / pearl >= 1.25
    assert sum(_bound(each, costs.target_forward) for each in traces) / pearl >= 0.7
    assert seconds(traces, costs, max_width=1) / pearl >= over_one_line


def test_steps_are_narrower_where_width_costs_more(recorded: dict[float, list[Trace]]) -> None:
    means = []
    for per_guess in (0.01, 0.5):
        widths: list[int] = []

        def step(guesses: int, per_guess: float = per_guess, widths: list[int] = widths) -> float:
            widths.append(guesses)
            return 1.0 + per_guess * (guesses - 1)

        seconds(recorded[1.0], Costs(step, lambda tokens: 8.0))
        means.append(sum(widths) / len(widths))
    assert means[0] > 1.5 * means[1]


LONG_FORWARDS = (lambda guesses: 1.0), (lambda tokens: 60.0)
DEAR_SECOND_TOKEN = (lambda guesses: 0.05), (lambda tokens: 1.0 if tokens == 1 else 3.0)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "costs", [pytest.param(LONG_FORWARDS, id="long"), pytest.param(DEAR_SECOND_TOKEN, id="dear second token")]
)
def test_the_best_fixed_length_is_the_best_of_all(
    costs: tuple[Callable[[int], float], Callable[[int], float]], overlap: bool
) -> None:
    """Also where it is long, and where lengths before it gain nothing, or lose."""
    trace = trace_of([True] * 60)
    times = hf_pearl.simulate([trace], *costs)
    lengths = range(1, MAX_DRAFT_LENGTH + 1)
    runs = [simulate_run([trace.guesses], Costs(*costs), length, overlap).seconds for length in lengths]
    assert (times.lockstep if overlap else times.sequential) <= 1.05 * min(runs)


def test_where_tokens_together_take_longer_the_bound_is_none() -> None:
    """As `SimulatedTimes.bound` says: one forward over two tokens, or two over one each."""
    times = hf_pearl.simulate([trace_of([True, False] * 5)], *DEAR_SECOND_TOKEN)
    assert (times.plain, times.bound) == (10 * 1.0, 5 * 3.0)


def test_a_draft_that_takes_no_time_is_waited_for_like_one_that_takes_hardly_any() -> None:
    """Nothing is not an unknown time, in which case nobody would wait."""
    trace = trace_of([place % 4 != 2 for place in range(200)])
    free, fast = (
        hf_pearl.simulate([trace], lambda _, seconds=seconds: seconds, lambda _: 8.0) for seconds in (0.0, 1e-9)
    )
    assert free.bound <= free.pearl < 1.1 * free.bound
    assert free.pearl == pytest.approx(fast.pearl, rel=1e-3)


BAD_TRACES = [
    pytest.param({"temperature": -1.0}, r"`temperature` .* got -1", id="cold"),
    pytest.param({"temperature": math.nan}, r"`temperature` .* got nan", id="nan"),
    pytest.param({"prompts": "abc"}, "`prompts` must be a sequence of prompts, got str", id="text"),
    pytest.param({"prompts": [5, 6]}, r"`prompts\[0\]` must be token ids, got int", id="flat"),
    pytest.param({"prompts": []}, "`prompts` must hold at least one", id="none"),
    pytest.param({"draft": None}, "`draft` must be a causal language model", id="no draft"),
    pytest.param({"max_new_tokens": 10**9}, "`prompts` must leave room", id="long"),
    pytest.param({"seed": 0.5}, "`seed` must be an int", id="seed"),
]


@pytest.mark.parametrize(("wrong", "said"), BAD_TRACES)
def test_what_cannot_be_recorded_is_refused_by_name(wrong: dict[str, object], said: str) -> None:
    target = tiny_model("llama", 1)
    arguments: dict[str, Any] = {"target": target, "draft": target, "prompts": [[5]], "max_new_tokens": 4, **wrong}
    with pytest.raises((TypeError, ValueError), match=said):
        hf_pearl.record_traces(**arguments)


def test_what_cannot_be_simulated_is_refused_by_name() -> None:
    for wrong in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match=f"`draft_step` must return seconds.* for 1 it returned {wrong}"):
            hf_pearl.simulate([trace_of([True])], lambda n, wrong=wrong: wrong, lambda n: 1.0)
    for no_number in (None, "1", torch.zeros(2)):
        with pytest.raises(TypeError, match=r"`target_forward` must return a number of seconds; for \d+ it returned"):
            hf_pearl.simulate([trace_of([True])], lambda n: 1.0, lambda n, returned=no_number: returned)
    with pytest.raises(TypeError, match=r"`target_forward` must be a function .* got a float"):
        hf_pearl.simulate([trace_of([True])], lambda n: 1.0, 8.0)  # type: ignore[arg-type]
    times = hf_pearl.simulate((trace_of([True]) for _ in range(2)), lambda n: 1.0, lambda n: 4.0)  # type: ignore[arg-type]
    assert times.plain == 8.0, "an iterator is read once"
    assert times.efficiency(torch.tensor(2 * times.pearl)) == 0.5  # type: ignore[arg-type]
    for seconds in (0.0, -1, math.nan, math.inf, 10**400):
        with pytest.raises(ValueError, match="`measured_seconds` must be positive and finite, got"):
            times.efficiency(seconds)
    for no_number in (None, "1", True, [1.0]):
        with pytest.raises(TypeError, match="`measured_seconds` must be a number of seconds, got"):
            times.efficiency(no_number)  # type: ignore[arg-type]


STOOD, MISSED = TracedGuess(True, 0.9, 0), TracedGuess(False, 0.9)


@pytest.mark.parametrize(
    ("traces", "error", "said"),
    [
        pytest.param([], ValueError, "`traces` must hold at least one trace, got none", id="none"),
        pytest.param("abc", TypeError, "`traces` must be a sequence of traces, got str", id="text"),
        pytest.param(3, TypeError, "`traces` must be a sequence of traces, got int", id="number"),
        pytest.param(Trace((5,), (STOOD,)), TypeError, "sequence of traces, got Trace", id="one trace"),
        pytest.param([1], TypeError, r"`traces\[0\]` must be a `hf_pearl.Trace`, got int", id="numbers"),
        pytest.param([((5,), (STOOD,))], TypeError, r"`traces\[0\]` must be .*, got tuple", id="tuples"),
        pytest.param([Trace((5,), ())], ValueError, r"`traces\[0\].guesses` .* one position", id="no position"),
        pytest.param([Trace((), (STOOD,))], ValueError, r"`traces\[0\].prompt_ids` .* one token", id="no prompt"),
        pytest.param([Trace((5,), None)], TypeError, r"`traces\[0\].guesses` must be a tuple", id="no guesses"),
        pytest.param([Trace((5,), (True, False))], TypeError, r"guesses\[0\]` must be .* got True", id="bools"),
        pytest.param(
            [Trace((5, True), (STOOD,))], TypeError, "prompt_ids` must hold token ids, got True", id="bool token"
        ),
        pytest.param([Trace((5, -1), (STOOD,))], ValueError, "from 0 to 1048575, got -1", id="negative token"),
        pytest.param([Trace((10**12,), (STOOD,))], ValueError, "from 0 to 1048575, got 10", id="huge token"),
        pytest.param(
            [Trace((5,), (STOOD, STOOD._replace(token_id=10**12)))],
            ValueError,
            r"`traces\[0\].guesses\[1\]` must hold token ids .* got 10",
            id="huge token of a guess",
        ),
        pytest.param(
            [Trace((5,), (STOOD._replace(probability=math.nan),))], ValueError, "from 0 to 1, got nan", id="nan"
        ),
        pytest.param([Trace((5,), (STOOD._replace(others=(2.0,)),))], ValueError, "got 2.0", id="likelier than 1"),
        pytest.param([Trace((5,), (STOOD._replace(others=None),))], TypeError, "others` must be a tuple", id="others"),
        pytest.param([Trace((5,), (STOOD._replace(rank=2),))], ValueError, "rank 0 if it stands .* got 2", id="rank"),
        pytest.param(
            [Trace((5,), (STOOD._replace(rank=False),))], TypeError, "rank` must be an int .* got False", id="no rank"
        ),
        pytest.param(
            [Trace((5,), (MISSED._replace(rank=-1),))], ValueError, "rank 0 if it stands .* got -1", id="below 0"
        ),
        pytest.param(
            [Trace((5,), (STOOD._replace(token_id=5, guess_ids=(6, 5)),))], ValueError, "`token_id` first", id="another"
        ),
        pytest.param([Trace((5,), (STOOD._replace(guess_ids=(6,)),))], ValueError, "`token_id` first", id="no token"),
        pytest.param(
            [Trace((5,), (MISSED._replace(token_id=6, guess_ids=(6,)),))], ValueError, "`token_id` first", id="right"
        ),
        pytest.param([Trace((5,), (STOOD._replace(stands=1),))], TypeError, "stands` must be True or False", id="one"),
    ],
)
def test_what_is_no_trace_is_refused_by_place(traces: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        hf_pearl.simulate(traces, lambda n: 1.0, lambda n: 1.0)
