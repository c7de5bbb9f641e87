"""Random steps of a paged cache for the kernels' tests, and what attention over them is, in float64, token by token."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_pearl.cache.kernel_interface import Pools
from hf_pearl.cache.paged_sequence import PagedSequence
from hf_pearl.cache.sdpa import TreeMask
from hf_pearl.cache.step import Attention
from hf_pearl.cache.step_tables import Bounds, StepTables, needs

HEAD_DIMS = (32, 48, 64, 80, 96, 128, 192, 256)


class Shape(NamedTuple):
    """What a case may be given instead of drawing it."""

    num_queries: int  # of the first sequence
    num_kv_heads: int
    group: int
    head_dim: int


@dataclass
class Case:
    """A step: sequences and their pools, in which all is NaN but what the sequences hold."""

    description: str
    sequences: list[PagedSequence]
    num_new: list[int]
    trees: list[TreeMask | None]
    tables: StepTables
    attention: Attention
    query: torch.Tensor  # (1, H, T, D), more tokens than the step's at times
    new: tuple[torch.Tensor, torch.Tensor]  # (1, K, T, D) each
    pools: Pools  # (1, K, N, D) each, without the new tokens
    stored: tuple[torch.Tensor, torch.Tensor]  # the same, with them

    @property
    def num_tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(self.num_new)

    def expected(self) -> torch.Tensor:
        """Attention of every new token, `(T, H, D)` in float64."""
        queries = self.query[0, :, : self.num_tokens].double().cpu().split(self.num_new, dim=1)
        rows = []
        for sequence, num, tree, q in zip(self.sequences, self.num_new, self.trees, queries, strict=True):
            slots = slots_of(sequence, self.tables.block_size)
            keys, values = (pool[0, :, slots].double() for pool in self.stored)
            for row in range(num):
                seen = seen_places(sequence.length - num + row, row, tree, self.attention.sliding_window)
                rows.append(attend(q[:, row], keys[:, seen], values[:, seen], self.attention))
        return torch.stack(rows)


def slots_of(sequence: PagedSequence, block_size: int) -> torch.Tensor:
    """Where the tokens of a sequence lie."""
    slots = torch.tensor(sequence.block_table)[:, None] * block_size + torch.arange(block_size)
    return slots.flatten()[: sequence.length]


def seen_places(place: int, row: int, tree: TreeMask | None, window: int | None) -> list[int]:
    """The places that a query sees: the last `window` of those it follows."""
    followed = list(range(place + 1)) if tree is None else [*range(tree.num_common), *tree.paths[row]]
    return followed if window is None else followed[-window:]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Attention of one query `(H, D)` over `(K, L, D)`."""
    group = q.shape[0] // k.shape[0]
    scores = torch.einsum("hd,hld->hl", q, k.repeat_interleave(group, 0)) * attention.scaling
    if attention.softcap is not None:
        scores = torch.tanh(scores / attention.softcap) * attention.softcap
    if attention.sinks is not None:
        scores = torch.cat([scores, attention.sinks.double().cpu()[:, None]], dim=1)
    shares = scores.softmax(dim=1)[:, : k.shape[1]]
    return torch.einsum("hl,hld->hd", shares, v.repeat_interleave(group, 0))


def random_case(
    seed: int,
    dtype: torch.dtype,
    device: str = "cpu",
    scale: int = 1,
    in_runs: bool = False,
    shape: Shape | None = None,
) -> Case:
    """A step of up to three sequences; `scale` makes contexts longer, for a device that has the time.

    Blocks are anywhere, or a sequence's are neighbours.
    """
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    block_size = chance.choice([2, 4, 8, 16, 16])
    num_kv_heads, group = chance.choice([(1, 1), (1, 2), (1, 3), (1, 7), (1, 8), (2, 1), (2, 2), (3, 1)])
    key_dim = chance.choice(HEAD_DIMS)
    value_dim = key_dim if chance.random() < 0.8 else chance.choice(HEAD_DIMS)
    num_first = chance.choice([1, 1, 2, 4, 7, 12, 33, 64])
    if shape is not None:
        num_first, num_kv_heads, group, key_dim = shape
        value_dim = key_dim
    sequences, num_new, trees = [], [], []
    blocks = list(range(64 + 1200 * scale // block_size))
    chance.shuffle(blocks) if not in_runs else blocks.reverse()
    for _ in range(chance.choice([1, 1, 2, 3])):
        num = num_first if not sequences else chance.choice([1, 2, 5])
        before = scale * chance.choice([0, 1, 5, 40, 63, 64, 130])
        tree = None
        if chance.random() < 0.5:
            earlier = chance.choice([0, 0, 3, 30])
            tree = random_tree(chance, before, earlier, num)
            before += earlier
        sequence = PagedSequence()
        sequence.length = before + num
        for _ in range(-(-sequence.length // block_size) + chance.choice([0, 0, 1])):
            sequence.push(blocks.pop())
        sequences.append(sequence), num_new.append(num), trees.append(tree)
    num_heads = num_kv_heads * group
    attention = Attention(
        scaling=chance.choice([key_dim**-0.5, 0.1]),
        sliding_window=chance.choice([None, None, 1, 6, 50]),
        softcap=chance.choice([None, None, 5.0, 30.0]),
        sinks=torch.randn(num_heads, generator=generator).to(device, dtype) if chance.random() < 0.4 else None,
    )
    limits, bounds = needs(sequences, num_new, trees, block_size)
    is_fixed = chance.random() < 0.5
    if is_fixed:  # as for a CUDA graph: larger than the step
        limits = limits._replace(num_sequences=limits.num_sequences + 2, num_tokens=limits.num_tokens + 5)
        has_trees = bounds.has_trees or chance.random() < 0.5
        bounds = Bounds(
            limits.num_sequences, limits.num_tokens, bounds.max_queries + 3, bounds.max_keys + 99, has_trees
        )
    tables = StepTables(limits, block_size, device, bounds if is_fixed else None)
    tables.on_device.block_tables.fill_(2**30)  # Whoever read there would not come back.
    tables.fill(sequences, num_new, trees)
    num_slots = (max(max(each.block_table) for each in sequences) + 1) * block_size
    states, pools, stored = [], [], []
    for dim in (key_dim, value_dim):
        new = torch.randn(1, num_kv_heads, limits.num_tokens, dim, generator=generator).to(dtype)
        pool = torch.full((1, num_kv_heads, num_slots, dim), torch.nan, dtype=dtype)
        full = pool.clone()
        for sequence, num, own in zip(sequences, num_new, new[:, :, : sum(num_new)].split(num_new, dim=2), strict=True):
            slots = slots_of(sequence, block_size)
            old = torch.randn(1, num_kv_heads, sequence.length - num, dim, generator=generator).to(dtype)
            full[:, :, slots] = torch.cat([old, own], dim=2)
            pool[:, :, slots[: sequence.length - num]] = old
        states.append(new.to(device)), pools.append(pool.to(device)), stored.append(full)
    query = 2 * torch.randn(1, limits.num_tokens, num_heads, key_dim, generator=generator).to(dtype).transpose(1, 2)
    options = (
        f"{len(sequences)} sequences of {[each.length for each in sequences]} tokens, {num_new} new, trees "
        f"{[tree is not None for tree in trees]}, {num_heads} heads on {num_kv_heads}, {key_dim} and {value_dim} "
        f"dimensions, blocks of {block_size}, {attention}, fixed bounds: {is_fixed}"
    )
    return Case(
        options, sequences, num_new, trees, tables, attention, query.to(device), tuple(states), Pools(*pools),
        tuple(stored),
    )  # fmt: skip


def random_tree(chance: random.Random, num_common: int, num_earlier: int, num_new: int) -> TreeMask:
    """A tree whose first places were computed before, and whose last ones are new."""
    paths: list[tuple[int, ...]] = []
    for place in range(num_common, num_common + num_earlier + num_new):
        parent = chance.choice([None, *range(max(0, len(paths) - 8), len(paths))])
        paths.append((*(() if parent is None else paths[parent]), place))
    return TreeMask(num_common, tuple(paths[num_earlier:]))
