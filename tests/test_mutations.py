"""The tests can fail: fourteen bugs, patched in one at a time, are each caught by a check that passes without."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import test_cache
import test_simulation
import torch
from callbacks import CountingProcessor
from models import DraftKind, assert_varied, enabled_for_tiny_models, make_draft, random_prompts, tiny_model
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper

import hf_pearl
from hf_pearl import PagedPrefixCache, PearlConfig, engine
from hf_pearl.cache import PagedSequence, sdpa
from hf_pearl.cache.paged_layer import as_numbers
from hf_pearl.cache.prefix_index import PrefixIndex
from hf_pearl.cache.step import PagedStep
from hf_pearl.decoding import lines, schedule
from hf_pearl.decoding.guesses import Guesses
from hf_pearl.decoding.lines import Line
from hf_pearl.decoding.messages import TokenTree, Window
from hf_pearl.decoding.noise import NoiseSource, gumbel_noise, request_seed
from hf_pearl.decoding.request import Request
from hf_pearl.decoding.verification import Slab, Verifier
from hf_pearl.parallel.lane import ModelLane
from hf_pearl.registry import engine_for

LOCKSTEP = PearlConfig(draft_length=4, execution="inline")
SEQUENTIAL = replace(LOCKSTEP, overlap=False)
SEED = 5


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@functools.cache
def pair(kind: DraftKind) -> tuple[PreTrainedModel, PreTrainedModel]:
    """One target, and a draft of any kind."""
    target = tiny_model("llama", 21)
    return target, make_draft(target, kind, 22)


# The checks: each is a small test of its own.


def assert_as_generate(kind: DraftKind, batch_size: int, lengths: Sequence[int], config: PearlConfig) -> None:
    """Fail unless greedy decoding gives transformers' tokens."""
    target, draft = pair(kind)
    hf_pearl.release(target)
    inputs = random_prompts(random.Random(1), batch_size, lengths)
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 30}
    expected = target.generate(**arguments)
    assert_varied(expected[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(target.generate(**arguments, assistant_model=draft, pearl=config), expected)


def check_greedy_tokens() -> None:
    assert_as_generate("noisy", 1, (9,), LOCKSTEP)


def check_greedy_tokens_with_a_rollback_in_every_step() -> None:
    assert_as_generate("unrelated", 1, (9,), SEQUENTIAL)


def check_ragged_batch() -> None:
    assert_as_generate("noisy", 4, (3, 9, 20), LOCKSTEP)


def check_what_a_processor_sees() -> None:
    target, draft = pair("noisy")
    options = {**random_prompts(random.Random(1), 1, (9,)), "do_sample": False, "max_new_tokens": 30}
    theirs, ours = CountingProcessor(0.5), CountingProcessor(0.5)
    target.generate(**options, logits_processor=[theirs])
    target.generate(**options, logits_processor=[ours], assistant_model=draft, pearl=SEQUENTIAL)
    assert ours.seen == theirs.seen


def check_end_of_text_inside_a_stretch() -> None:
    """Each of ten tokens is end-of-text once, the draft is always right."""
    target, _ = pair("same")
    inputs = random_prompts(random.Random(1), 1, (9,))
    said = target.generate(**inputs, do_sample=False, max_new_tokens=20)[0, 9:].tolist()
    for token in list(dict.fromkeys(said))[:10]:
        options = {**inputs, "do_sample": False, "max_new_tokens": 20, "eos_token_id": token, "pad_token_id": 0}
        expected = target.generate(**options)
        assert torch.equal(target.generate(**options, assistant_model=target, pearl=LOCKSTEP), expected)


def check_a_perfect_draft_is_accepted_whole() -> None:
    """By the statistics: from the second window on, each gives four draft tokens and the bonus."""
    target, draft = pair("same")
    hf_pearl.release(target)
    inputs = random_prompts(random.Random(1), 1, (9,))
    options = {"do_sample": False, "max_new_tokens": 1 + 6 * 5, "return_dict_in_generate": True}
    stats = target.generate(**inputs, **options, assistant_model=draft, pearl=SEQUENTIAL).pearl
    assert stats.acceptance_per_position == [1.0] * 4
    assert stats.mean_accepted_tokens == 5.0
    assert stats.target_forwards == 1 + 6


class AddNoise(LogitsProcessor):
    """The noise of every row and position of unpadded prompts, from its definition."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position, vocab_size = input_ids.shape[1], scores.shape[1]
        rows = [gumbel_noise(request_seed(SEED, row), position, 1, vocab_size) for row in range(len(scores))]
        return scores + torch.cat(rows)


def check_sampled_tokens_by_definition() -> None:
    """Greedy decoding of transformers' with the warper, and then the noise, as processors."""
    target, draft = pair("noisy")
    hf_pearl.release(target)
    inputs = random_prompts(random.Random(1), 2, (9,))
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.8), AddNoise()])
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=20, logits_processor=processors)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_new_tokens": 20}
    config = replace(LOCKSTEP, seed=SEED)
    assert torch.equal(target.generate(**inputs, **options, assistant_model=draft, pearl=config), expected)


def check_only_verified_tokens_are_indexed() -> None:
    """Of every prefix that may be found again, both lanes', the answer is the witness."""
    target, draft = pair("noisy")
    for length in (29, 31):
        hf_pearl.release(target)
        inputs = random_prompts(random.Random(length), 1, (length,))
        options = {"do_sample": False, "max_new_tokens": 40, "assistant_model": draft}
        verified = target.generate(**inputs, **options, pearl=LOCKSTEP)[0].tolist()
        for cache in engine_for(target, draft).caches.values():
            entries = {entry.number: entry for entry in cache.index._by_block.values()}
            assert len(entries) > len(verified) // cache.block_size  # and a partly filled one
            for entry in entries.values():
                tokens = list(entry.token_ids)
                while entry.parent:
                    entry = entries[entry.parent]
                    tokens = [*entry.token_ids, *tokens]
                assert tokens == verified[: len(tokens)]


def check_a_shared_block_outlives_a_rollback() -> None:
    cache = PagedPrefixCache(tiny_model("llama", 1).config, 8, block_size=2)
    first = cache.allocate()
    cache.append(first, 4)
    cache.insert_prefix(first, [1, 2, 3, 4])
    second = cache.allocate([1, 2, 3, 4, 5])
    assert second.block_table == first.block_table
    cache.rollback(second, 0)
    assert [cache.pool.count(block) for block in first.block_table] == [1, 1]
    assert (cache.pool.num_referenced, cache.pool.num_free) == (2, 6)


# The bugs.


def patch_take(patch: pytest.MonkeyPatch, replacement: Callable[[Request, int], int]) -> None:
    """At the first draft token of a window that does not stand, take another token than the target's choice."""
    take = Request.take

    def buggy_take(request: Request, token_id: int) -> None:
        choice = request.pending[0]
        if choice.guess is None or choice.guess == token_id:
            take(request, token_id)
        else:
            take(request, replacement(request, choice.guess))
            request.pending.clear()

    patch.setattr(Request, "take", buggy_take)


def accept_one_too_many(patch: pytest.MonkeyPatch) -> None:
    patch_take(patch, lambda request, guess: guess)


def accept_one_too_few(patch: pytest.MonkeyPatch) -> None:
    queue = Request.queue

    def buggy_queue(request: Request, logits: torch.Tensor, guesses: Guesses) -> None:
        queue(request, logits, replace(guesses, token_ids=(*guesses.token_ids[:-1], -1)) if guesses else guesses)

    patch.setattr(Request, "queue", buggy_queue)


def give_no_bonus(patch: pytest.MonkeyPatch) -> None:
    queue = Request.queue
    patch.setattr(
        Request, "queue", lambda request, logits, guesses: queue(request, logits[: len(guesses) or None], guesses)
    )


def correct_from_the_wrong_position(patch: pytest.MonkeyPatch) -> None:
    patch_take(patch, lambda request, guess: int(request.pending[-1].logits.argmax()))


def hide_draft_tokens_from_processors(patch: pytest.MonkeyPatch) -> None:
    judge, advance = Slab.judge, Slab._advance

    def buggy_judge(slab: Any) -> None:
        slab.start = slab.length
        judge(slab)

    def buggy_advance(slab: Any) -> None:
        rules, start = slab.rules, slab.start
        slab.rules = replace(rules, processors=lambda ids, scores: rules.processors(ids[:, :start], scores))
        advance(slab)
        slab.rules = rules

    patch.setattr(Slab, "judge", buggy_judge)
    patch.setattr(Slab, "_advance", buggy_advance)


def same_noise_for_two_positions(patch: pytest.MonkeyPatch) -> None:
    rows = NoiseSource.rows

    def buggy_rows(noise: NoiseSource, first: int, num_positions: int) -> torch.Tensor:
        return torch.cat([rows(noise, position // 2 * 2, 1) for position in range(first, first + num_positions)])

    patch.setattr(NoiseSource, "rows", buggy_rows)


def same_noise_for_two_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(engine, "request_seed", lambda call_seed, row: request_seed(call_seed, 0))


def leave_a_stale_key(patch: pytest.MonkeyPatch) -> None:
    """The first key that is written after a rollback goes to a slot that nobody reads."""
    rollback, write_slots = PagedPrefixCache.rollback, PagedStep._write_slots

    def buggy_rollback(cache: PagedPrefixCache, sequence: Any, length: int) -> None:
        sequence.is_stale = length < sequence.length
        rollback(cache, sequence, length)

    def buggy_write_slots(step: Any, device: torch.device) -> torch.Tensor:
        slots, row = as_numbers(write_slots(step, device)), 0
        for sequence, num in zip(step.sequences, step.num_new, strict=True):
            if getattr(sequence, "is_stale", False):
                slots[row] = step.cache.num_slots - 1
            sequence.is_stale = False
            row += num
        return slots

    patch.setattr(PagedPrefixCache, "rollback", buggy_rollback)
    patch.setattr(PagedStep, "_write_slots", buggy_write_slots)


def free_a_shared_block(patch: pytest.MonkeyPatch) -> None:
    def buggy_rollback(cache: PagedPrefixCache, sequence: PagedSequence, length: int) -> None:
        sequence.length = length
        while len(sequence.block_table) * cache.block_size > length:
            block = sequence.pop()
            cache.pool._counts[block] = 0
            cache.pool._free.add(block, block + 1)

    patch.setattr(PagedPrefixCache, "rollback", buggy_rollback)


def keep_the_entry_of_an_evicted_block(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PrefixIndex, "forget", lambda index, block: [])


def index_draft_tokens(patch: pytest.MonkeyPatch) -> None:
    admit, forward = ModelLane.admit, ModelLane.forward
    tokens: dict[tuple[int, int], list[int]] = {}

    def buggy_admit(lane: ModelLane, request_id: int, token_ids: Sequence[int], max_length: int) -> int:
        num_cached = admit(lane, request_id, token_ids, max_length)
        tokens[id(lane), request_id] = list(token_ids[:num_cached])
        return num_cached

    def buggy_forward(lane: ModelLane, windows: Sequence[Window]) -> torch.Tensor:
        before = [lane.length(window.request_id) for window in windows]
        logits = forward(lane, windows)
        for window, length in zip(windows, before, strict=True):
            held = tokens[id(lane), window.request_id]
            held[length:] = window.token_ids
            lane.cache.insert_prefix(lane._sequences[window.request_id], held)
        return logits

    patch.setattr(ModelLane, "admit", buggy_admit)
    patch.setattr(ModelLane, "forward", buggy_forward)


def ignore_end_of_text_inside_a_stretch(patch: pytest.MonkeyPatch) -> None:
    ends = Verifier._ends
    patch.setattr(Verifier, "_ends", lambda verifier, request: not request.pending and ends(verifier, request))


def read_padding(patch: pytest.MonkeyPatch) -> None:
    padded_batch = sdpa.padded_batch

    def buggy_padded_batch(spans: Sequence[Any], *arguments: Any) -> sdpa.PaddedBatch:
        batch = padded_batch(spans, *arguments)
        for row, span in enumerate(spans):
            batch.mask[row, :, :, span.num_keys :] = 0.0
        return batch

    patch.setattr(sdpa, "padded_batch", buggy_padded_batch)


def use_lines_from_before_a_rollback(patch: pytest.MonkeyPatch) -> None:
    def buggy_line(tree: TokenTree | None, request: Request) -> Line:
        if tree is None:
            return Line()
        first = max(0, len(request.verified) - tree.root)
        last = first + request.room
        token_ids = tree.token_ids[first:last]
        return Line(token_ids, tree.chances[first:last], len(token_ids))

    for module in (lines, schedule):
        patch.setattr(module, "likeliest_line", buggy_line)


def no_pending_line_is_used() -> None:
    """Under the virtual clock: after a rejection, whatever was drafted before it is never verified."""
    test_simulation.test_lockstep_with_a_useless_draft_costs_what_plain_decoding_costs(3)


BUGS = [
    pytest.param(accept_one_too_many, check_greedy_tokens, id="1 one draft token too many is accepted"),
    pytest.param(accept_one_too_few, check_a_perfect_draft_is_accepted_whole, id="2 one too few is accepted"),
    pytest.param(give_no_bonus, check_a_perfect_draft_is_accepted_whole, id="3 no bonus token"),
    pytest.param(correct_from_the_wrong_position, check_greedy_tokens, id="4 correction from the wrong position"),
    pytest.param(
        hide_draft_tokens_from_processors,
        check_what_a_processor_sees,
        id="5 a processor sees the prefix without its draft tokens",
    ),
    pytest.param(same_noise_for_two_positions, check_sampled_tokens_by_definition, id="6 one noise for two positions"),
    pytest.param(same_noise_for_two_rows, check_sampled_tokens_by_definition, id="7 one noise for two rows"),
    pytest.param(
        leave_a_stale_key, check_greedy_tokens_with_a_rollback_in_every_step, id="8 rollback leaves a stale key"
    ),
    pytest.param(free_a_shared_block, check_a_shared_block_outlives_a_rollback, id="9 rollback frees a shared block"),
    pytest.param(
        keep_the_entry_of_an_evicted_block,
        test_cache.test_a_recycled_block_is_not_found_under_its_old_tokens,
        id="10 index entry survives eviction",
    ),
    pytest.param(index_draft_tokens, check_only_verified_tokens_are_indexed, id="11 draft tokens are indexed"),
    pytest.param(
        ignore_end_of_text_inside_a_stretch,
        check_end_of_text_inside_a_stretch,
        id="12 end of text inside a stretch is ignored",
    ),
    pytest.param(read_padding, check_ragged_batch, id="13 padding is read"),
    pytest.param(use_lines_from_before_a_rollback, no_pending_line_is_used, id="14 a line from before a rollback"),
]


@pytest.mark.parametrize(("bug", "check"), BUGS)
def test_a_seeded_bug_is_caught(
    bug: Callable[[pytest.MonkeyPatch], None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check()
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check()
    monkeypatch.undo()
    check()


def test_all_fourteen_bugs_are_there() -> None:
    assert [int(str(each.id).split()[0]) for each in BUGS] == list(range(1, 15))
