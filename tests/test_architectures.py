"""Logits through the paged cache against those through `DynamicCache`, for every family of docs/models.md."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures import FAMILIES, REFUSED, Family, build
from models import enabled_for_tiny_models
from transformers import DynamicCache, PreTrainedModel

from hf_pearl import PagedPrefixCache, PearlUnsupportedModelError
from hf_pearl.cache import step as cache_step
from hf_pearl.cache.sizing import CacheNeeds
from hf_pearl.cache.support import TESTED_FAMILIES, check_supported
from hf_pearl.compat import cache_argument, supports_attention_interface
from hf_pearl.decoding.messages import Branches, Window
from hf_pearl.parallel.lane import ModelLane
from hf_pearl.parallel.probe import check_computed

BLOCK_SIZE, NUM_BLOCKS = 4, 256
TOLERANCE = 1e-5
DOCS = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


def fragmented_cache(model: PreTrainedModel, chance: random.Random) -> PagedPrefixCache:
    """A cache whose free blocks lie about in no order."""
    cache = PagedPrefixCache(model.config, NUM_BLOCKS, BLOCK_SIZE)
    sequences = [cache.allocate() for _ in range(NUM_BLOCKS)]
    for sequence in sequences:
        cache.append(sequence, 1)
    for sequence in chance.sample(sequences, NUM_BLOCKS * 3 // 4):
        cache.free(sequence)
    return cache


class Comparison:
    """Sequences on a lane, and their tokens; every forward is compared with one through `DynamicCache`."""

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.chance = random.Random(seed)
        self.model = model
        self.lane = ModelLane(model, fragmented_cache(model, self.chance))
        self.tokens: dict[int, list[int]] = {}
        self.num_steps = 0

    def forward(self, num_new: dict[int, int]) -> None:
        """Compute new random tokens of some sequences in one ragged step."""
        windows = []
        for number, num in num_new.items():
            if number not in self.tokens:
                self.tokens[number] = []
                self.lane.admit(number, (), 0)
            new = [self.chance.randrange(1, 64) for _ in range(num)]
            self.tokens[number] += new
            windows.append(Window(number, tuple(new), num))
        logits, row = self.lane.forward(windows), 0
        for window in windows:
            expected = self.expected(self.tokens[window.request_id])[-window.num_logits :]
            got = logits[row : row + window.num_logits]
            assert (got - expected).abs().max() < TOLERANCE, (self.num_steps, window.request_id)
            row += window.num_logits
        self.num_steps += 1

    def expected(self, tokens: list[int]) -> torch.Tensor:
        """The model's own logits: a prompt, then the rest."""
        kept = {cache_argument(self.model): DynamicCache(config=self.model.config)}
        half = max(1, len(tokens) - 7)
        parts = [torch.tensor([part]) for part in (tokens[:half], tokens[half:]) if part]
        return torch.cat([self.model(part, **kept).logits[0] for part in parts])

    def rollback(self, number: int, num_tokens: int) -> None:
        """Drop the last tokens of a sequence."""
        del self.tokens[number][-num_tokens:]
        self.lane.rollback(number, len(self.tokens[number]))

    def grow_trees(self, shapes: dict[int, list[int]], num_steps: int) -> dict[int, list[list[int]]]:
        """Guesses behind some sequences; `shapes` says behind which node (-1: the sequence) each hangs, step by step.

        Returns the paths: for every node the nodes up to it, itself included.
        """
        nodes: dict[int, list[list[int]]] = {number: [] for number in shapes}  # tokens up to each node
        paths: dict[int, list[list[int]]] = {number: [] for number in shapes}
        for step in range(num_steps):
            windows = []
            for number, parents in shapes.items():
                first, last = (len(parents) * each // num_steps for each in (step, step + 1))
                num_common, due = len(self.tokens[number]), parents[first:last]
                before = len(nodes[number])
                for parent in [min(each, before - 1) for each in due]:
                    above = nodes[number][parent] if parent >= 0 else self.tokens[number]
                    nodes[number].append([*above, self.chance.randrange(1, 64)])
                    paths[number].append([*(paths[number][parent] if parent >= 0 else []), len(nodes[number]) - 1])
                new = range(before, len(nodes[number]))
                places = tuple(tuple(num_common + place for place in paths[number][node]) for node in new)
                tokens = tuple(nodes[number][node][-1] for node in new)
                windows.append(Window(number, tokens, len(tokens), Branches(num_common, places)))
            logits = self.lane.forward(windows).split([window.num_logits for window in windows])
            for window, rows in zip(windows, logits, strict=True):
                for node, row in zip(nodes[window.request_id][-window.num_logits :], rows, strict=True):
                    assert (row - self.expected(node)[-1]).abs().max() < TOLERANCE, (step, window.request_id)
        for number, path in paths.items():
            deepest = max(path, key=len)
            num_common = len(self.tokens[number])
            self.lane.keep(number, num_common, [num_common + place for place in deepest])
            self.tokens[number] = nodes[number][deepest[-1]]
        return paths

    def fork(self, number: int, new: int) -> None:
        """Begin a sequence with the tokens of another."""
        self.tokens[new] = list(self.tokens[number])
        self.lane.fork(number, new, len(self.tokens[number]))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_a_dynamic_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, decode, ragged windows, rollback, fork, trees, on scattered blocks, beyond every window."""
    monkeypatch.setattr(cache_step, "MIN_SAVED_KEYS", 64)
    model = build(FAMILIES[name])
    if name == "GPT-J" and not supports_attention_interface(model):
        pytest.skip("this transformers computes GPT-J's attention by itself; 5.24 and later do not")
    check_supported(model)
    compare = Comparison(model, 1)
    with compare.lane.ready():
        compare.forward({0: 200, 1: 11})
        for _ in range(3):
            compare.forward({0: 1, 1: 1})
        compare.forward({0: 5, 1: 9, 2: 30})
        compare.rollback(0, 7)
        compare.rollback(1, 2)
        compare.forward({1: 3, 0: 6})
        compare.fork(0, 3)
        compare.fork(1, 4)
        compare.forward({0: 2, 3: 4, 1: 1, 4: 1})
        compare.rollback(3, 3)
        compare.forward({3: 1, 4: 3})
        compare.fork(0, 5)
        for num_new in ({0: 1, 5: 1}, {0: 2, 3: 1, 5: 4}, {0: 1, 3: 1, 5: 1}):  # one prefix, read once for all
            compare.forward(num_new)
        paths = compare.grow_trees({0: [-1, 0, -1, 1, 2, 0, 3], 1: [-1, -1, 0, 1, 0, 2]}, 3)
        assert [max(map(len, each)) for each in paths.values()] == [3, 3]
        compare.grow_trees({4: [-1, 0, -1, 1]}, 2)
        compare.forward({0: 1, 1: 2, 4: 1})
        cache = compare.lane.cache
        assert cache.num_bytes == NUM_BLOCKS * CacheNeeds.of(model).bytes_per_block(BLOCK_SIZE)
        assert not any(
            isinstance(compare.lane._sequences[number].slots(BLOCK_SIZE, 0, len(tokens)), slice)
            for number, tokens in compare.tokens.items()
        )


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_by_name(name: str) -> None:
    model = build(REFUSED[name])
    with pytest.raises(PearlUnsupportedModelError, match=re.escape(REFUSED[name].particular)) as error:
        check_supported(model)
    assert type(model).__name__ in str(error.value)


@pytest.mark.parametrize("model_type", ["diffllama", "bart"])
def test_a_family_that_no_test_knows_is_tried_and_refused_if_it_differs(model_type: str) -> None:
    options = {"bart": {"d_model": 32, "is_decoder": True}, "diffllama": {"num_key_value_heads": 2}}[model_type]
    model = build(Family(model_type, options))
    with pytest.raises(PearlUnsupportedModelError, match=f"trial.*{model_type}"):
        check_computed(model)


def test_a_family_that_no_test_knows_runs_if_it_does_not_differ() -> None:
    model = build(Family("seed_oss", {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}))
    assert model.config.model_type not in TESTED_FAMILIES
    check_computed(model)
    check_computed(model)


def test_windows_of_a_family_that_no_test_knows_are_refused() -> None:
    model = build(FAMILIES["Mistral"])
    model.config.model_type = "unknown"
    with pytest.raises(PearlUnsupportedModelError, match="windows"):
        check_computed(model)


def test_the_tested_families_are_those_that_need_no_trial() -> None:
    assert {family.model_type for family in FAMILIES.values()} == TESTED_FAMILIES


def test_the_table_in_the_docs_names_what_runs_here() -> None:
    rows = [line.split("|")[1:-1] for line in DOCS.read_text().splitlines() if line.startswith("| ")]
    runs = {cells[0].strip(): (cells[1].strip(), cells[2].strip()) for cells in rows if len(cells) == 3}
    expected = {name: (f"`{each.model_type}`", each.particular) for name, each in FAMILIES.items()}
    expected |= {name: (f"`{each.model_type}`", f"refused: {each.particular}") for name, each in REFUSED.items()}
    del runs["model"]
    assert {name: cells for name, cells in runs.items() if "---" not in name} == expected
