"""Tables that are kept from step to step, against those made anew, over random histories of sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import random_tree
from transformers import LlamaConfig

from hf_pearl.cache import PagedPrefixCache, PagedSequence
from hf_pearl.cache.sdpa import TreeMask
from hf_pearl.cache.step_tables import Bounds, Limits, StepTables
from hf_pearl.cache.tree_tables import WORD_BITS, describe_trees, num_words

BLOCK_SIZE, NUM_ROWS, MAX_TOKENS = 4, 3, 24
LIMITS = Limits(NUM_ROWS, 64, 40, 4000)
BOUNDS = Bounds(NUM_ROWS, 64, 64, 160, True)


class CopiedTables(StepTables):
    """Keeps what lies "on the device" in memory of its own, and counts what is copied there."""

    def __init__(self) -> None:
        super().__init__(LIMITS, BLOCK_SIZE, "cpu", BOUNDS)
        self.copied = torch.zeros_like(self._on_host)
        self.num_copied: list[int] = []

    def _copy(self, num_numbers: int) -> None:
        self.copied[:num_numbers] = self._on_host[:num_numbers]
        self.num_copied.append(num_numbers)

    def on_other_side(self, name: str) -> torch.Tensor:
        """One of the tables, from what was copied."""
        here = getattr(self.on_device, name)
        return self.copied[here.storage_offset() :][: here.numel()].view(here.shape)


def assert_same(
    kept: CopiedTables, sequences: Sequence[PagedSequence], num_tree_numbers: int, anew: StepTables
) -> None:
    """Fail unless kernels would read the same."""
    for name in ("query_starts", "lengths", "bases", "tree_words", "slots"):
        got, expected = kept.on_other_side(name), getattr(anew.on_device, name)
        count = len(sequences) if name in ("lengths", "bases") else len(expected)
        assert got[:count].tolist() == expected[:count].tolist(), name
    has_tree = anew.on_device.tree_words > 0
    assert kept.on_other_side("tree_starts")[has_tree].tolist() == anew.on_device.tree_starts[has_tree].tolist()
    assert torch.equal(kept.on_other_side("trees")[:num_tree_numbers], anew.on_device.trees[:num_tree_numbers])
    for row, sequence in enumerate(sequences):
        held = kept.on_other_side("block_tables")[row, : len(sequence.block_table)]
        assert held.tolist() == sequence.block_table
        assert anew.on_device.block_tables[row, : len(held)].tolist() == sequence.block_table


class History:
    """Sequences of a cache, to which everything happens that may."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.cache = PagedPrefixCache(LlamaConfig(num_hidden_layers=1, num_attention_heads=2), 200, BLOCK_SIZE)
        self.sequences: list[PagedSequence] = []
        self.token_ids: dict[PagedSequence, list[int]] = {}
        self.kept = CopiedTables()
        self.happened: list[str] = []

    def change(self) -> None:
        """Something that lanes do between two steps."""
        what = self.chance.choice(["rollback", "fork", "keep", "end", "begin", "nothing", "nothing"])
        if not self.sequences or (what == "begin" and len(self.sequences) < 5):
            prompt = [1, 2, 3, *self.chance.choices(range(2), k=self.chance.randrange(9))]
            self._begin(self.cache.allocate(prompt, expected_length=self.chance.choice([0, 40])), prompt)
            return
        sequence = self.chance.choice(self.sequences)
        if what == "rollback":
            self._rollback(sequence, self.chance.randint(0, sequence.length))
        elif what == "fork" and len(self.sequences) < 5:
            self._begin(self.cache.fork(sequence), self.token_ids[sequence])
        elif what == "keep":
            num_first = self.chance.randint(self._num_not_own(sequence), sequence.length)
            places = [place for place in range(num_first, sequence.length) if self.chance.random() < 0.5]
            self.cache.keep(sequence, num_first, places)
            token_ids = self.token_ids[sequence]
            self.token_ids[sequence] = [*token_ids[:num_first], *(token_ids[place] for place in places)]
        elif what == "end":
            self.cache.insert_prefix(sequence, self.token_ids.pop(sequence))
            self.cache.free(sequence)
            self.sequences.remove(sequence)
        self.happened.append(what)

    def _begin(self, sequence: PagedSequence, token_ids: Sequence[int]) -> None:
        self.sequences.append(sequence)
        self.token_ids[sequence] = list(token_ids[: sequence.length])

    def _num_not_own(self, sequence: PagedSequence) -> int:
        """Tokens of a sequence up to its last block that is forked or indexed: `keep` may not write there."""
        pool, index = self.cache.pool, self.cache.index
        others = [place for place, block in enumerate(sequence.block_table) if pool.count(block) > 1 or block in index]
        return min(sequence.length, (others[-1] + 1) * BLOCK_SIZE) if others else 0

    def _rollback(self, sequence: PagedSequence, length: int) -> None:
        self.cache.rollback(sequence, length)
        del self.token_ids[sequence][length:]

    def _append(self, sequence: PagedSequence, num_tokens: int) -> None:
        self.cache.append(sequence, num_tokens)
        known = [1, 2, 3][len(self.token_ids[sequence]) :]
        self.token_ids[sequence] += [*known, *self.chance.choices(range(2), k=num_tokens)][:num_tokens]

    def step(self) -> None:
        """Fill the tables for some sequences, and others anew."""
        chance = self.chance
        chosen = chance.sample(self.sequences, min(len(self.sequences), chance.randint(1, NUM_ROWS)))
        num_later = chance.choice([0, 0, 1, 3])
        num_new, trees = [], []
        for sequence in chosen:
            if sequence.length > MAX_TOKENS:
                self._rollback(sequence, chance.randrange(MAX_TOKENS))
            num, earlier = chance.choice([1, 1, 2, 9]), chance.choice([0, 2, 30]) if chance.random() < 0.5 else None
            trees.append(None if earlier is None else random_tree(chance, sequence.length, earlier, num))
            for _ in range(1 + num_later):
                self._append(sequence, num + (earlier or 0))
                earlier = 0
            num_new.append(num)
        anew = StepTables(LIMITS, BLOCK_SIZE, "cpu", BOUNDS)
        for tables in (self.kept, anew):
            tables.fill(chosen, num_new, trees, num_later)
        present = [tree for tree in trees if tree is not None]
        num_tree_numbers = sum(map(len, describe_trees(present))) if present else 0
        assert_same(self.kept, chosen, num_tree_numbers, anew)
        for row, (sequence, num) in enumerate(zip(chosen, num_new, strict=True)):
            length = sequence.length - num_later * num
            assert self.kept.on_other_side("lengths")[row] == length
            start = int(self.kept.on_other_side("query_starts")[row])
            slots = self.kept.on_other_side("slots")[start : start + num].tolist()
            places = range(length - num, length)
            assert slots == [
                sequence.block_table[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE for place in places
            ]


@settings(max_examples=40)
@given(st.randoms(use_true_random=False))
def test_tables_that_are_kept_are_those_made_anew(chance: random.Random) -> None:
    history = History(chance)
    for _ in range(15):
        history.change()
        if history.sequences:
            history.step()


def test_block_tables_are_copied_only_when_one_has_changed(seed: int) -> None:
    history = History(random.Random(seed))
    sequences = [history.cache.allocate() for _ in range(2)]
    for sequence in sequences:
        history.cache.append(sequence, 5)
    tables, sizes = history.kept, []
    for _ in range(3):
        tables.fill(sequences, [1, 1], [None, None])
        sizes.append(tables.num_copied[-1] - tables._num_before_blocks)
        for sequence in sequences:
            history.cache.append(sequence, 1)
    assert sizes == [2 * LIMITS.num_blocks, 0, 0]
    tables.fill(sequences[::-1], [1, 1], [None, None])
    assert tables.num_copied[-1] > tables._num_before_blocks
    history.cache.append(sequences[0], 1)  # its third block
    tables.fill(sequences[:1], [1], [None])
    tables.fill(sequences[1:], [1], [None])
    assert tables.on_other_side("block_tables")[0, :2].tolist() == sequences[1].block_table


def test_rows_whose_copy_failed_are_written_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt may come anywhere, and a later step reads what is on the device."""
    history = History(random.Random(seed))
    before, other = (history.cache.allocate() for _ in range(2))
    for sequence in (before, other):
        history.cache.append(sequence, 5)
    tables = history.kept

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    tables.fill([before], [1], [None])
    for sequence in (before, other):
        with monkeypatch.context() as patch:
            patch.setattr(tables, "_copy", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tables.fill([other], [1], [None])
        tables.fill([sequence, before], [1, 1], [None, None])
        held = tables.on_other_side("block_tables")[:2, :2]
        assert held.tolist() == [sequence.block_table, before.block_table]


def test_a_fork_and_what_is_left_of_its_origin_are_told_apart(seed: int) -> None:
    history = History(random.Random(seed))
    sequence = history.cache.allocate()
    history.cache.append(sequence, 9)
    fork = history.cache.fork(sequence)
    history.cache.rollback(sequence, 3)
    for each in (sequence, fork):
        history.kept.fill([each], [1], [None])
        held = history.kept.on_other_side("block_tables")[0, : len(each.block_table)]
        assert held.tolist() == each.block_table


@given(st.randoms(use_true_random=False))
def test_trees_are_described_as_their_paths_say(chance: random.Random) -> None:
    """Trees of many sizes side by side, read as kernels do, query by query and place by place."""
    sizes = [(chance.randint(0, 30), chance.choice([0, 3, 40, 100]), chance.choice([1, 2, 20])) for _ in range(4)]
    trees = [random_tree(chance, *size) for size in sizes]
    for tree, (num_common, earlier, num_new), numbers in zip(trees, sizes, describe_trees(trees), strict=True):
        words = num_words(tree)
        assert words == -(-(earlier + num_new) // WORD_BITS) and numbers.dtype == np.int32
        rows, positions = numbers[: num_new * (1 + words)].reshape(num_new, -1), numbers[num_new * (1 + words) :]
        assert len(positions) == words * WORD_BITS
        for row, path in zip(rows.tolist(), tree.paths, strict=True):
            seen = [
                num_common + WORD_BITS * word + bit
                for word, mask in enumerate(row[1:])
                for bit in range(WORD_BITS)
                if mask >> bit & 1
            ]
            assert seen == list(path) and row[0] == num_common + len(path) - 1
            assert positions[np.array(path) - num_common].tolist() == list(range(num_common, row[0] + 1))


def test_the_tree_of_the_docstring() -> None:
    (numbers,) = describe_trees([TreeMask(5, ((5, 6), (5, 7)))])
    assert numbers.tolist() == [6, 0b011, 6, 0b101, 5, 6, 6, *[0] * 29]
