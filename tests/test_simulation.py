"""The schedules under a virtual clock: cases worked out by hand, closed forms, and the cost model against chance."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import enabled_for_tiny_models

from hf_pearl.decoding import simulation
from hf_pearl.decoding.calibration import NUM_BINS, Calibration
from hf_pearl.decoding.policy import ForwardTimes, Pace
from hf_pearl.decoding.recorded import TracedGuess
from hf_pearl.decoding.schedule import Choices, FreeRunning
from hf_pearl.decoding.simulation import Costs, KeptBetweenRuns, VirtualDraft, simulate_run
from hf_pearl.decoding.stats import Interval, overlap

FORWARD, STEP = 5.0, 1.0
CONSTANT = Costs(lambda num_guesses: STEP, lambda num_tokens: FORWARD)


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def trace_of(stands: Sequence[bool], probability: float = 0.9) -> list[TracedGuess]:
    """A trace whose draft is always equally sure."""
    return [TracedGuess(each, probability) for each in stands]


def independent_trace(length: int, chance: float, seed: int) -> list[TracedGuess]:
    """Guesses that stand with one chance, independently, and a draft that knows it."""
    dice = random.Random(seed)
    return trace_of([dice.random() < chance for _ in range(length)], chance)


def frequency(trace: Sequence[TracedGuess]) -> float:
    """Share of the guesses that stand."""
    return sum(guess.stands for guess in trace) / len(trace)


def drifting_trace(length: int, seed: int) -> list[TracedGuess]:
    """Stretches of easy, middling and hard text; the draft is as sure of itself as it is right."""
    dice, trace = random.Random(seed), list[TracedGuess]()
    while len(trace) < length:
        level = dice.choice((0.3, 0.6, 0.95))
        for _ in range(dice.randint(5, 60)):
            probability = min(0.99, max(0.02, dice.gauss(level, 0.15)))
            trace.append(TracedGuess(dice.random() < probability, probability))
    return trace[:length]


def costs_of(ratio: float, per_token: float) -> Costs:
    """A draft step takes 1 s, a target forward `ratio` s, and the share `per_token` of that more per further token."""
    return Costs(lambda num_guesses: 1.0, lambda num_tokens: ratio * (1.0 + per_token * (num_tokens - 1)))


def test_plain_decoding_takes_one_forward_per_token() -> None:
    by_size = Costs(lambda num_guesses: STEP, lambda num_tokens: 3.0 + num_tokens)
    run = simulate_run([trace_of([True] * 7)], by_size, draft_length=None)
    assert (run.seconds, run.stats.target_forwards, run.stats.generated_tokens) == (7 * 4.0, 7, 7)
    three_rows = simulate_run([trace_of([True] * 7)] * 3, by_size, draft_length=None)
    assert (three_rows.seconds, three_rows.stats.target_forwards) == (7 * 6.0, 7)


def test_sequential_with_a_perfect_draft() -> None:
    """Three cycles of 3 steps and a forward give 4 tokens each; for the 13th there is no room to guess."""
    run = simulate_run([trace_of([True] * 13)], CONSTANT, draft_length=3, overlap=False)
    assert run.seconds == 3 * (3 * STEP + FORWARD) + FORWARD
    assert (run.stats.target_forwards, run.stats.accepted_tokens, run.stats.verified_draft_tokens) == (4, 9, 9)


def test_sequential_with_a_useless_draft() -> None:
    """A token per cycle; guesses that no verdict could confirm, beyond the 6th token's predecessor, are not made."""
    run = simulate_run([trace_of([False] * 6)], CONSTANT, draft_length=3, overlap=False)
    num_steps = 3 + 3 + 3 + 2 + 1 + 0
    assert run.seconds == 6 * FORWARD + num_steps * STEP
    assert (run.stats.target_forwards, run.stats.accepted_tokens, run.stats.verified_draft_tokens) == (6, 0, num_steps)


def test_lockstep_with_a_perfect_draft() -> None:
    """The first forward has nothing to verify; each further one verifies 2 tokens, the third guess was its bonus."""
    run = simulate_run([trace_of([True] * 13)], CONSTANT, draft_length=3)
    assert run.stats.target_forwards == 1 + 12 / 3
    assert run.seconds == run.stats.target_forwards * FORWARD
    assert run.stats.judged_at == run.stats.stood_at == [4, 4]


@pytest.mark.parametrize("draft_length", [16, 17, 24, 32])
def test_lockstep_with_a_perfect_draft_fills_long_windows_too(draft_length: int) -> None:
    """A line has room for a window and for all that is drafted while that is verified: as many tokens per forward."""
    run = simulate_run([trace_of([True] * (1 + 5 * draft_length))], CONSTANT, draft_length)
    assert run.stats.target_forwards == 1 + 5
    assert run.stats.judged_at == run.stats.stood_at == [5] * (draft_length - 1)


def test_lockstep_waits_at_the_barrier_for_the_slower_lane() -> None:
    """7 steps beside the first forward, 5 beside the second (there is no room for more), none beside the third."""
    run = simulate_run([trace_of([True] * 13)], CONSTANT, draft_length=7)
    assert run.stats.target_forwards == 3
    assert run.seconds == 7 * STEP + FORWARD + FORWARD


@pytest.mark.parametrize("draft_length", [1, 3, 5])
def test_lockstep_with_a_useless_draft_costs_what_plain_decoding_costs(draft_length: int) -> None:
    """After a rejection the paper's pre-verify: whatever was drafted before it is never looked at."""
    run = simulate_run([trace_of([False] * 6)], CONSTANT, draft_length)
    assert run.seconds == 6 * FORWARD
    assert (run.stats.target_forwards, run.stats.verified_draft_tokens) == (6, 0)


def test_lockstep_on_a_mixed_trace() -> None:
    """Windows of draft length 2, guesses in brackets, a miss before `/`: 0 | [1] 2 / 3 | [4] 5 | [6] 7 | [8] / 9."""
    stands = [True, True, False, True, True, True, True, True, False, True]
    run = simulate_run([trace_of(stands)], CONSTANT, draft_length=2)
    assert (run.seconds, run.stats.target_forwards) == (7 * FORWARD, 7)
    assert (run.stats.judged_at, run.stats.stood_at) == ([4], [3])


@pytest.mark.parametrize("chance", [0.5, 0.7, 0.85])
@pytest.mark.parametrize("draft_length", [2, 4])
def test_sequential_follows_leviathans_equation(chance: float, draft_length: int) -> None:
    """4,000 independent positions, within 2%: tokens per forward (their equation 1), speed-up (their theorem 3.8)."""
    trace = independent_trace(4000, chance, 1)
    chance = frequency(trace)
    run = simulate_run([trace], CONSTANT, draft_length, overlap=False)
    tokens = (1 - chance ** (draft_length + 1)) / (1 - chance)
    assert run.stats.generated_tokens / run.stats.target_forwards == pytest.approx(tokens, rel=0.02)
    speedup = 4000 * FORWARD / run.seconds
    assert speedup == pytest.approx(tokens / (draft_length * STEP / FORWARD + 1), rel=0.02)


@pytest.mark.parametrize("chance", [0.5, 0.7, 0.85])
@pytest.mark.parametrize("draft_length", [2, 4])
def test_lockstep_follows_the_papers_closed_form(chance: float, draft_length: int) -> None:
    """4,000 independent positions, within 2%.

    A stretch from miss to miss has 1 / (1 - a) tokens, however short the draft: its length adapts (PEARL, section 4).
    It takes one forward without guesses, and with chance `a` it goes on; then every forward verifies `gamma - 1`
    guesses, whose successor is foreseen too with chance `a ** gamma`.
    """
    trace = independent_trace(4000, chance, 2)
    chance = frequency(trace)
    run = simulate_run([trace], CONSTANT, draft_length)
    tokens = 1 / (1 - chance)
    forwards = 1 + chance / (1 - chance**draft_length)
    assert run.stats.generated_tokens / run.stats.target_forwards == pytest.approx(tokens / forwards, rel=0.02)
    assert run.seconds == run.stats.target_forwards * FORWARD


FREE_RUNNING_CASES = [
    pytest.param(independent_trace(600, 0.5, 1), 8.0, 0.01, id="independent, 0.5"),
    pytest.param(independent_trace(600, 0.7, 2), 2.5, 0.06, id="independent, 0.7, a draft of the same speed"),
    pytest.param(independent_trace(600, 0.9, 3), 5.0, 0.01, id="independent, 0.9"),
    pytest.param(drifting_trace(600, 4), 5.0, 0.06, id="drifting"),
    pytest.param(drifting_trace(600, 5), 12.0, 0.01, id="drifting, a fast draft"),
]


@pytest.mark.parametrize(("trace", "ratio", "per_token"), FREE_RUNNING_CASES)
def test_free_running_is_hardly_ever_worse_than_the_best_lockstep(
    trace: list[TracedGuess], ratio: float, per_token: float
) -> None:
    """3% at most: lockstep's barrier puts both lanes in phase, and the best draft length is known in hindsight only."""
    costs = costs_of(ratio, per_token)
    best = min(simulate_run([trace], costs, draft_length).seconds for draft_length in (1, 2, 3, 5, 8, 12))
    assert simulate_run([trace], costs).seconds <= 1.035 * best


@pytest.mark.parametrize(("trace", "ratio", "per_token"), FREE_RUNNING_CASES)
def test_free_running_is_better_than_sequential(trace: list[TracedGuess], ratio: float, per_token: float) -> None:
    costs = costs_of(ratio, per_token)
    fixed = min(simulate_run([trace], costs, length, overlap=False).seconds for length in (1, 2, 3, 5, 8))
    adaptive = simulate_run([trace], costs, overlap=False).seconds
    assert adaptive <= 1.08 * fixed  # it has to learn the chance first
    assert simulate_run([trace], costs).seconds < min(fixed, adaptive)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=25), min_size=1, max_size=3),
    st.sampled_from([None, 1, 2, 5, "auto"]),
    st.booleans(),
    st.floats(1.0, 12.0),
)
def test_the_counts_of_a_run_add_up(
    rows: list[list[bool]], draft_length: int | str | None, overlaps: bool, ratio: float
) -> None:
    num_tokens = max(map(len, rows))
    traces = [trace_of((row * num_tokens)[:num_tokens], 0.7) for row in rows]
    seconds, stats = simulate_run(traces, costs_of(ratio, 0.02), draft_length, overlaps)
    assert stats.generated_tokens == len(rows) * num_tokens
    assert sum(stats.stood_at) == stats.accepted_tokens <= sum(stats.judged_at) <= stats.verified_draft_tokens
    assert all(a >= b for a, b in zip(stats.stood_at, stats.judged_at[1:], strict=False))
    assert all(a >= b for a, b in zip(stats.judged_at, stats.stood_at, strict=True))
    assert num_tokens >= stats.target_forwards > 0
    if len(rows) == 1:  # Every forward gives its accepted tokens and one of the target's own.
        assert stats.generated_tokens == stats.accepted_tokens + stats.target_forwards
        assert 1.0 <= stats.mean_accepted_tokens <= num_tokens or stats.decode_windows == 0
    assert seconds >= stats.target_forwards * ratio * (1 - 1e-9)
    if draft_length is None:
        assert stats.accepted_tokens == stats.verified_draft_tokens == 0


def test_reading_the_prompts_takes_what_it_is_said_to_take() -> None:
    """Plain decoding by hand; the draft cannot be of use before it has read the prompt, which takes as long as all."""
    trace = trace_of([True] * 20)
    costs = Costs(lambda _: 1.0, lambda _: 4.0, target_prefill=10.0, draft_prefill=1000.0)
    assert simulate_run([trace], costs, None).seconds == 10.0 + 19 * 4.0
    drafted = simulate_run([trace], costs)
    assert (drafted.seconds, drafted.stats.accepted_tokens) == (10.0 + 19 * 4.0, 0)
    assert simulate_run([trace], replace(costs, draft_prefill=2.0)).seconds < 10.0 + 10 * 4.0
    assert drafted.stats.target_seconds == drafted.seconds


def test_the_forward_that_reads_a_prompt_verifies_nothing() -> None:
    """A text that repeats itself could be looked up from the start, as it is where the prompt is cached."""
    prompt, text = [1, 2, 3] * 4, [TracedGuess(True, 0.9, token_id=token_id) for token_id in [1, 2, 3] * 8]
    cached = Costs(lambda _: 1.0, lambda _: 4.0)
    first = simulate_run([text], cached, prompts=[prompt]).stats.target_timeline[0]
    assert first.num_tokens > 1 and first.num_accepted > 0
    read = replace(cached, target_prefill=10.0, draft_prefill=2.0)
    first, second, *_ = simulate_run([text], read, prompts=[prompt]).stats.target_timeline
    assert (first.num_tokens, first.num_accepted) == (len(prompt), 0)
    assert second.num_accepted > 0


@pytest.mark.parametrize("waits", [True, False])
def test_a_target_that_never_waits_does_not(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that is always right and quick is worth a wait, unless nobody may."""
    waited, wait = [], VirtualDraft.wait

    def watch(draft: VirtualDraft, num_steps: int, timeout: float) -> bool:
        waited.append(num_steps)
        return wait(draft, num_steps, timeout)

    monkeypatch.setattr(VirtualDraft, "wait", watch)
    monkeypatch.setattr(simulation, "FreeRunning", partial(FreeRunning, choices=Choices(waits=waits)))
    simulate_run([trace_of([True] * 200)], Costs(lambda _: 1.0, lambda _: 4.0))
    assert bool(waited) == waits


def test_what_one_run_learns_the_next_one_knows() -> None:
    """The draft is always right and hardly ever sure: the first run has to find that out."""
    trace, costs = trace_of([True] * 200, 0.05), Costs(lambda _: 1.0, lambda _: 4.0)
    learnt = KeptBetweenRuns()
    first, second = (simulate_run([trace], costs, learnt=learnt).seconds for _ in range(2))
    assert second < 0.9 * first == 0.9 * simulate_run([trace], costs).seconds


def disjoint_intervals(ends: list[int]) -> list[Interval]:
    """Intervals in order from distinct ends in order."""
    return [(float(start), float(end)) for start, end in zip(ends[::2], ends[1::2], strict=False)]


sorted_ends = st.sets(st.integers(0, 30), max_size=14).map(sorted)


@settings(max_examples=200)
@given(sorted_ends, sorted_ends)
def test_overlap_is_the_time_in_which_both_lanes_run(first: list[int], second: list[int]) -> None:
    lanes = [disjoint_intervals(ends) for ends in (first, second)]
    both = [all(any(s <= at < e for s, e in lane) for lane in lanes) for at in range(31)]
    assert overlap(*lanes) == overlap(*reversed(lanes)) == sum(both)


def play_policy(wait: int, chance: float, forward: ForwardTimes, num_tokens: int, seed: int) -> float:
    """Tokens per second of "after a miss, wait for `wait` draft tokens", event by event; a draft step takes 1 s."""
    dice = random.Random(seed)
    now, total, num_drafted, step_ends, is_outdated = 0.0, 0, 0, dice.random(), True
    while total < num_tokens:
        while num_drafted < wait:
            now, step_ends = step_ends, step_ends + 1.0
            num_drafted, is_outdated = num_drafted + (not is_outdated), False
        num_verified = num_drafted
        now += forward.seconds(1 + num_verified)
        while step_ends <= now:
            step_ends += 1.0
            num_drafted, is_outdated = num_drafted + (not is_outdated), False
        num_stood = 0
        while num_stood < num_verified and dice.random() < chance:
            num_stood += 1
        total += num_stood + 1
        is_foreseen = num_stood == num_verified and not (is_outdated and num_drafted == num_verified)
        if is_foreseen and dice.random() < chance:
            num_drafted -= num_verified + 1  # -1: the step in progress guesses what is verified already
        else:
            num_drafted, is_outdated = 0, True
    return total / now


def learnt(base: float, per_token: float) -> ForwardTimes:
    """Forward times along a line."""
    times = ForwardTimes()
    for index in range(200):
        times.record(1 + index % 7, base + per_token * (1 + index % 7))
    return times


@pytest.mark.parametrize(("base", "per_token"), [(2.4, 0.1), (5.2, 0.1), (8.9, 0.2)])
@pytest.mark.parametrize("chance", [0.5, 0.7, 0.9])
def test_waiting_follows_the_best_fixed_wait(chance: float, base: float, per_token: float) -> None:
    """With one line, nothing but the wait to choose: at most 5% behind the best of 9 waits, in 8,000 tokens."""
    forward = learnt(base, per_token)
    best = max(play_policy(wait, chance, forward, 20_000, seed=1) for wait in range(9))
    trace = independent_trace(8_000, chance, seed=2)
    seconds = simulate_run([trace], Costs(lambda _: 1.0, forward.seconds), max_width=1).seconds
    assert len(trace) / seconds > 0.95 * best


@pytest.mark.parametrize("chance", [0.2, 0.5, 0.9])
def test_without_overlap_waiting_follows_the_best_draft_length(chance: float) -> None:
    """At most 5% behind the best fixed one, although each of its steps is asked for alone."""
    trace, costs = independent_trace(2_000, chance, seed=3), Costs(lambda _: 1.0, lambda num: 5.0 + 0.1 * num)
    best = min(simulate_run([trace], costs, length, overlap=False).seconds for length in (1, 2, 3, 4, 6, 9, 13))
    assert simulate_run([trace], costs, overlap=False).seconds < 1.05 * best


def test_in_a_batch_a_token_must_be_worth_the_time_of_all_rows() -> None:
    """A wide batch, and tokens that cost: verifying what would pay for one row alone takes longer."""
    traces = [independent_trace(300, 0.6, seed) for seed in range(16)]
    costs = Costs(lambda num_guesses: 1.0, lambda num_tokens: 8.0 + 0.3 * num_tokens)
    seconds = simulate_run(traces, costs).seconds
    with pytest.MonkeyPatch.context() as patch:
        rule = Pace.worth_verifying_above
        patch.setattr(Pace, "worth_verifying_above", lambda pace, num_rows: rule(pace, num_rows) / num_rows)
        patch.setattr(Pace, "best_of", lambda *_: None)  # It would see what that costs.
        assert seconds < 0.95 * simulate_run(traces, costs).seconds


def test_before_anything_is_known_nothing_is_waited_for_and_likely_guesses_are_verified() -> None:
    pace = Pace()
    assert not pace.wait_pays(8.0, 8, 1.0)
    assert 0.0 < pace.worth_verifying_above(8) < 0.5


@given(st.integers(1, 64), st.integers(1, 4), st.floats(1.0, 20.0), st.floats(0.01, 0.05))
def test_a_guess_must_be_worth_what_all_rows_yield_meanwhile(
    num_rows: int, tokens: int, base: float, per_token: float
) -> None:
    pace, total = Pace(), 0.0
    for index in range(28):
        num_tokens = num_rows + 1 + index % 7
        seconds = base + per_token * num_tokens
        pace.record_cycle(num_rows, num_tokens, tokens * num_rows, seconds + 1.0, 1.0)
        total += seconds + 1.0
    rate = 28 * tokens * num_rows / total
    assert pace.worth_verifying_above(num_rows) == pytest.approx(min(0.5, rate * per_token), rel=0.02)


def test_waits_that_gain_nothing_are_given_up_and_tried_again() -> None:
    pace = Pace()
    pace.record_cycle(1, 1, 1, 4.0, 0.0)  # a token in four steps' time
    assert pace.wait_pays(0.9, 1, 1.0)
    num_waits = 0
    while pace.wait_pays(0.9, 1, 1.0):
        pace.record_wait(0.9, 0.0, 1.0)
        num_waits += 1
    assert 1 < num_waits < 20
    for _ in range(5000):
        pace.record_cycle(1, 1, 1, 4.0, 0.0)
    assert pace.wait_pays(0.9, 1, 1.0)


def test_forward_times_recover_a_line_and_follow_when_it_moves() -> None:
    times = ForwardTimes()
    assert (times.seconds(1), times.per_token) == (0.0, 0.0)
    for base, per_token in ((0.010, 0.0005), (0.030, 0.0)):
        for index in range(2000):
            times.record(1 + index % 5, base + per_token * (1 + index % 5))
        assert times.seconds(9) == pytest.approx(base + 9 * per_token, rel=1e-3)
        assert times.per_token == pytest.approx(per_token, abs=1e-6)


def test_forward_times_guess_until_they_have_seen_two_sizes() -> None:
    times = ForwardTimes()
    for _ in range(10):
        times.record(3, 0.02)
    assert times.seconds(3) == pytest.approx(0.02)
    assert 0.02 < times.seconds(4) < 0.03


@pytest.mark.parametrize("frequency", [0.1, 0.5, 0.9])
def test_calibration_converges_to_how_often_a_guess_stands(frequency: float) -> None:
    """Of a bin whose draft is over- or underconfident: 4,000 judgements, of which about 580 count, within 4 sigma."""
    calibration, dice = Calibration(), random.Random(0)
    elsewhere = [calibration.chance((index + 0.5) / NUM_BINS) for index in range(NUM_BINS)]
    assert elsewhere == pytest.approx([(index + 0.5) / NUM_BINS for index in range(NUM_BINS)])
    for now in (1 - frequency, frequency):  # It forgets, too.
        for _ in range(4000):
            calibration.judge(0.7, dice.random() < now)
        assert calibration.chance(0.7) == pytest.approx(now, abs=4 * (now * (1 - now) / 580) ** 0.5)
    changed = [calibration.chance((index + 0.5) / NUM_BINS) for index in range(NUM_BINS)]
    assert sum(before != after for before, after in zip(elsewhere, changed, strict=True)) == 1
