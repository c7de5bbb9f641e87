"""The draft takes part as long as that is faster: under a virtual clock, where "faster" is exact."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import enabled_for_tiny_models, expected_warnings, make_draft, noisy_copy, random_prompts, tiny_model
from transformers import LogitsProcessorList

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.decoding import loop
from hf_pearl.decoding.benefit import (
    MAX_COST,
    MIN_PATIENCE,
    NUM_BLOCK,
    NUM_PLAIN,
    Benefit,
    Benefits,
)
from hf_pearl.decoding.messages import Verdict
from hf_pearl.decoding.recorded import TracedGuess
from hf_pearl.decoding.simulation import Costs, VirtualDraft, simulate_run
from hf_pearl.parallel.cores import available_cores
from hf_pearl.registry import engine_for

STEP, FORWARD = 1.0, 8.0


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def costs(contention: float) -> Costs:
    return Costs(lambda num_guesses: STEP, lambda num_tokens: FORWARD, contention)


def trace(length: int, chance: float, seed: int = 0) -> list[TracedGuess]:
    dice = random.Random(seed)
    return [TracedGuess(dice.random() < chance, chance) for _ in range(length)]


def record(benefit: Benefit, num_cycles: int, plain: float, drafted: float) -> list[str]:
    """Modes of `num_cycles` cycles of one token that take so many seconds without and with a draft."""
    modes = []
    for _ in range(num_cycles):
        modes.append(benefit.mode)
        benefit.record(1.0, plain if benefit.mode == "plain" else drafted)
    return modes


@pytest.mark.parametrize(("fastest", "plain", "drafted"), [("plain", 1.0, 1.2), ("drafted", 1.0, 0.9)])
def test_the_faster_mode_is_used_and_the_other_one_tried_ever_less(fastest: str, plain: float, drafted: float) -> None:
    modes = record(Benefit(), 100_000, plain, drafted)
    assert modes[: NUM_PLAIN + NUM_BLOCK] == ["plain"] * NUM_PLAIN + ["drafted"] * NUM_BLOCK
    assert set(modes[8 * NUM_BLOCK : MIN_PATIENCE]) == {fastest}
    later = modes[10_000:]
    assert set(later) == {"plain", "drafted"}, "one is never tried again"
    assert later.count(fastest) > 0.99 * len(later)


@pytest.mark.parametrize("slower", [1.05, 1.4, 3.0])
@pytest.mark.parametrize("fastest", ["plain", "drafted"])
def test_trying_the_slower_mode_again_costs_little(fastest: str, slower: float) -> None:
    seconds = {"plain": slower, "drafted": slower, fastest: 1.0}
    modes = record(Benefit(), 6000, **seconds)[300:]  # after the first contest
    num_tries = sum(mode != fastest for mode in modes)
    assert num_tries * (slower - 1.0) < MAX_COST * len(modes)


@pytest.mark.parametrize("pace", [1.0, 30.0])
def test_no_draft_for_a_while_is_a_short_trial_where_that_is_far_behind(pace: float) -> None:
    modes = record(Benefit(), MIN_PATIENCE, plain=2 * pace, drafted=pace)
    assert modes == ["plain"] * NUM_PLAIN + ["drafted"] * (MIN_PATIENCE - NUM_PLAIN)


def test_a_change_of_the_draft_is_noticed_both_ways() -> None:
    benefit = Benefit()
    assert record(benefit, 2000, plain=1.0, drafted=0.5)[-1] == "drafted"
    assert record(benefit, 2 * MIN_PATIENCE, plain=1.0, drafted=1.5)[-1] == "plain"
    assert record(benefit, 20 * MIN_PATIENCE, plain=1.0, drafted=0.5)[-1] == "drafted"


def test_longer_contexts_do_not_count_against_the_draft() -> None:
    """Everything becomes four times slower while the draft is at work: a new look at plain decoding says so."""
    benefit = Benefit()
    record(benefit, 1000, plain=1.0, drafted=0.5)
    modes = record(benefit, 1000, plain=4.0, drafted=2.0)
    assert 0 < modes.count("plain") <= 4 * NUM_PLAIN


def test_one_slow_cycle_without_a_draft_decides_nothing() -> None:
    benefit = Benefit()
    benefit.record(1.0, 100.0)
    record(benefit, 20 * NUM_BLOCK, plain=1.0, drafted=1.2)
    assert benefit.rests


def test_a_lucky_stretch_without_a_draft_decides_nothing() -> None:
    """What is looked up may stand for a few cycles: plain decoding is not as fast as that."""
    benefit, seconds = Benefit(), {"plain": 1.0, "drafted": 0.5}
    record(benefit, 1000, **seconds)
    modes = []
    while len(modes) < 4000:
        modes.append(benefit.mode)
        is_lucky = benefit.mode == "plain" and modes.count("plain") % 60 == 3
        benefit.record(12.0 if is_lucky else 1.0, seconds[benefit.mode])
    assert modes.count("drafted") > 0.9 * len(modes)


@pytest.mark.parametrize(("fastest", "seconds"), [("plain", 1.25), ("drafted", 0.8)])
def test_what_is_easy_to_guess_decides_nothing(fastest: str, seconds: float) -> None:
    """Stretches of text in which four times as many tokens stand, with a draft as without one."""
    benefit, dice = Benefit(), random.Random(0)
    modes = []
    while len(modes) < 20_000:
        is_easy = len(modes) // 100 % 3 == 0
        modes.append(benefit.mode)
        num_tokens = dice.choice((1.0, 2.0, 3.0)) * (4.0 if is_easy else 1.0)
        benefit.record(num_tokens, 1.0 if benefit.mode == "plain" else seconds)
    assert modes.count(fastest) > 0.9 * len(modes)


def test_chance_does_not_keep_a_draft_that_costs_a_little() -> None:
    """Cycles with a draft yield 1.1 tokens and take 1.2 times as long: 8% slower, and single ones vary by far more.

    Of 200 fixed seeds 178 must have found it out after 300 cycles: 190 do; 154 did when 24 unclear cycles were enough.
    """
    num_found = 0
    for seed in range(200):
        benefit, dice = Benefit(), random.Random(seed)
        for _ in range(300):
            is_plain = benefit.mode == "plain"
            num_tokens = 1.0 if is_plain else sum(dice.choice((1.0,) * 9 + (2.0,)) for _ in range(4)) / 4
            benefit.record(num_tokens, (1.0 if is_plain else 1.2) * dice.uniform(0.5, 1.6))
        num_found += benefit.rests
    assert num_found >= 178, num_found


@pytest.mark.parametrize("num_cycles", [60, 1000, 1476, 1500])
def test_what_was_found_is_known_also_while_it_is_found_out_anew(num_cycles: int) -> None:
    """A warning is given once, at the end of a call, which may be the beginning of a contest."""
    benefit = Benefit()
    record(benefit, num_cycles, plain=1.0, drafted=1.25)
    assert benefit.rests
    assert benefit.found == {"plain": pytest.approx(1.0), "drafted": pytest.approx(0.8)}


def test_a_lucky_dozen_cycles_decides_nothing() -> None:
    """A draft that makes decoding 15% slower, cycles that vary by 80%, and now and then one of three times the length.

    Of 200 fixed seeds 180 must have found it out after 300 cycles: 187 do; 172 did when the first few cycles could end
    a contest without being clear.
    """
    num_found = 0
    for seed in range(200):
        benefit, dice = Benefit(), random.Random(seed)
        for _ in range(300):
            seconds = dice.uniform(0.2, 1.8) * (3.0 if dice.random() < 0.03 else 1.0)
            benefit.record(1.0, seconds if benefit.mode == "plain" else 1.15 * seconds)
        num_found += benefit.rests
    assert num_found >= 180, num_found


@pytest.mark.parametrize(("chance", "contention"), [(0.0, 1.3), (0.05, 1.5), (0.3, 1.8)])
def test_the_whole_is_not_slower_than_plain_decoding(chance: float, contention: float) -> None:
    length = 6000
    benefits = Benefits()
    run = simulate_run([trace(length, chance)], costs(contention), benefits=benefits)
    assert run.seconds < 1.03 * simulate_run([trace(length, chance)], costs(contention), None).seconds
    assert run.stats.undrafted_forwards > 0.9 * run.stats.target_forwards


@pytest.mark.parametrize(("length", "rests"), [(40, True), (400, False)])
def test_what_a_call_takes_to_begin_counts(length: int, rests: bool) -> None:
    """The draft saves 5% of decoding, and makes reading the prompt a quarter slower: too much for a short answer."""
    benefits, prompts = Benefits(), [list(range(1000, 1020))]
    slow = Costs(lambda num: STEP, lambda num: FORWARD * (1.0 + 0.02 * num), 1.25, 25.0, 200.0)
    for seed in range(1600 // length):
        simulate_run([trace(length, 0.5, seed)], slow, benefits=benefits, prompts=prompts)
    assert benefits.of(1).rests == rests
    late = [trace(length, 0.5, seed) for seed in range(100, 100 + 400 // length)]
    default = sum(simulate_run([each], slow, benefits=benefits, prompts=prompts).seconds for each in late)
    without = sum(simulate_run([each], slow, None, prompts=prompts).seconds for each in late)
    assert default < 1.01 * without


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(("chance", "contention"), [(0.8, 1.0), (0.8, 1.3), (0.5, 1.1)])
def test_a_draft_that_pays_is_at_work(chance: float, contention: float, num_rows: int) -> None:
    traces = [trace(2000, chance, seed) for seed in range(num_rows)]
    free = simulate_run(traces, costs(contention))
    run = simulate_run(traces, costs(contention), benefits=Benefits())
    assert run.seconds < 1.03 * free.seconds
    assert run.stats.undrafted_forwards < 0.05 * run.stats.target_forwards


def test_a_number_of_rows_begins_with_what_is_known_of_the_nearest() -> None:
    benefits = Benefits()
    record(benefits.of(8), 1000, plain=1.0, drafted=0.5)
    record(benefits.of(1), 1000, plain=0.5, drafted=1.0)
    assert [benefits.of(num_rows).mode for num_rows in (2, 5, 40)] == ["plain", "drafted", "drafted"]
    modes = record(benefits.of(2), 4 * MIN_PATIENCE, plain=1.0, drafted=0.5)
    assert "drafted" not in modes[:MIN_PATIENCE]
    assert set(modes[-MIN_PATIENCE:]) == {"drafted"}, "nobody looked whether it holds for this number"


def test_what_is_not_decided_is_not_handed_on() -> None:
    benefits = Benefits()
    record(benefits.of(8), NUM_PLAIN, plain=1.0, drafted=1.0)
    assert benefits.of(1).mode == "plain" and not benefits.of(1).rests
    assert record(benefits.of(1), NUM_PLAIN + 1, plain=1.0, drafted=1.0)[-1] == "drafted"


def test_a_contest_that_has_few_cycles_ends_with_the_one_next_to_it() -> None:
    """The last row of a batch decodes alone for a few cycles: its own contest would last for many calls."""
    benefits = Benefits()
    record(benefits.of(8), NUM_PLAIN, plain=1.0, drafted=2.0)
    record(benefits.of(1), NUM_PLAIN + 2, plain=1.0, drafted=2.0)
    assert not benefits.of(1).is_decided
    record(benefits.of(8), 100, plain=1.0, drafted=2.0)
    assert benefits.of(8).rests and benefits.of(1).rests
    assert benefits.of(1).found == benefits.of(8).found


def test_catching_up_is_a_cost_of_the_contest() -> None:
    """The draft is a little slower, and has much to read whenever it is its turn."""

    def num_tries(reading: float) -> int:
        benefit, last, tries = Benefit(), "plain", 0
        for _ in range(20_000):
            mode = benefit.mode
            if (last, mode) == ("plain", "drafted"):
                tries += 1
                benefit.record_catching_up(1.0, 1.0 + reading)
            last = mode
            benefit.record(1.0, 1.0 if mode == "plain" else 1.02)
        return tries

    assert 0 < num_tries(reading=20.0) < num_tries(reading=0.0)


def test_a_draft_that_is_not_wanted_does_not_read_the_prompts() -> None:
    """Beside the target that would take it a core, and for nothing."""
    benefits, text = Benefits(), trace(30, 0.1)
    record(benefits.of(1), 200, plain=1.0, drafted=2.0)
    steps = []
    run = simulate_run([text], Costs(lambda num: steps.append(num) or STEP, lambda num: FORWARD), benefits=benefits)
    assert run.stats.undrafted_forwards == run.stats.target_forwards
    assert not steps


def test_rows_that_wait_for_each_other_count_as_rows() -> None:
    """A user's processor sees slabs of equal length: rows that are ahead do not take part in every forward."""
    target = tiny_model("llama", seed=0)
    draft = noisy_copy(target, 0.05, seed=1)
    prompts = random_prompts(random.Random(0), 4, [5, 9])
    processors = LogitsProcessorList([lambda input_ids, scores: scores])
    target.generate(**prompts, max_new_tokens=60, assistant_model=draft, pearl=True, logits_processor=processors)
    benefits = engine_for(target, draft).learnt.benefits[False]
    assert set(benefits._by_rows) == {(4).bit_length()}
    hf_pearl.release(target)


def test_a_long_rest_is_told_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "MAX_TOKENS_PER_VERDICT", 3)
    benefits = Benefits()
    told = []
    deliver = VirtualDraft.send

    def send(draft: VirtualDraft, message: Any) -> None:
        told.extend(message.token_ids if isinstance(message, Verdict) else ())
        assert not isinstance(message, Verdict) or len(message.token_ids) <= 3
        deliver(draft, message)

    monkeypatch.setattr(VirtualDraft, "send", send)
    text = [TracedGuess(True, 0.9, token_id=place) for place in range(60)]
    simulate_run([text], costs(1.0), benefits=benefits)
    assert told == list(range(60))


def test_generate_says_once_that_it_goes_on_without_the_draft() -> None:
    """Whatever the clock says of tiny models: the engine's own measurement is replaced by one that is lost."""
    target = tiny_model("llama", seed=0)
    draft = make_draft(target, "unrelated", seed=1)
    prompt = random_prompts(random.Random(0), 1, [8])
    expected = target.generate(**prompt, max_new_tokens=40)
    engine = engine_for(target, draft)
    record(engine.learnt.benefits[False].of(1), 200, plain=1.0, drafted=2.0)
    with expected_warnings() as warnings:
        for _ in range(2):
            output = target.generate(
                **prompt, max_new_tokens=40, assistant_model=draft, pearl=True, return_dict_in_generate=True
            )
            assert torch.equal(output.sequences, expected)
            assert output.pearl.undrafted_forwards == output.pearl.target_forwards
            assert output.pearl.draft_steps == 0
    assert len([text for text in warnings if "`assistant_model` does not make this model faster" in text]) == 1
    worker = engine.workers.worker
    if worker is None:
        assert len(available_cores()) == 1, "lanes of one core take turns in one process"
        return
    assert worker.wait_until_ready(60.0)
    for _ in range(8):  # It is awake now, and would begin at once.
        output = target.generate(
            **prompt, max_new_tokens=40, assistant_model=draft, pearl=True, return_dict_in_generate=True
        )
        assert output.pearl.draft_steps == 0
    forced = PearlConfig(execution="inline", seed=0)
    output = target.generate(
        **prompt, max_new_tokens=40, assistant_model=draft, pearl=forced, return_dict_in_generate=True
    )
    assert output.pearl.draft_steps > 0
    with torch.no_grad():
        next(draft.parameters()).mul_(1.01)  # Another draft: what was known of the old one does not count.
    target.generate(**prompt, max_new_tokens=2, assistant_model=draft, pearl=True)
    assert not engine.learnt.benefits[False].of(1).rests
    hf_pearl.release(target)
