"""Finding blocks again by the tokens they hold and all that came before them."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

MAX_CANDIDATES = 16


class IndexedBlock(NamedTuple):
    """A block of verified tokens.

    Attributes
    ----------
    block : int
        Where it lies.
    token_ids : tuple of int
        What it holds; fewer than a block's worth at the end of a sequence.
    number : int
        Its own. Numbers are never used again: what follows an evicted block is not found behind another one.
    parent : int or str
        The number of the block before it; for the first of a sequence, the salt.
    digest : bytes
        Of all tokens up to its last.
    """

    block: int
    token_ids: tuple[int, ...]
    number: int
    parent: int | str
    digest: bytes


class Found(NamedTuple):
    """What is already there of a prompt: whole blocks, and the first `num_tail_tokens` of a block to copy."""

    blocks: list[int]
    tail_block: int | None
    num_tail_tokens: int


class PrefixIndex:
    """Digest of a token prefix -> the block that holds its last tokens.

    Digests are chained (parent digest + token ids), keyed per process, and every hit is compared token by token, and
    with the block before it, so that a collision can never serve another prefix's keys and values. Prefixes under
    different salts share nothing.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._key = os.urandom(32)
        self._full: dict[bytes, IndexedBlock] = {}
        self._by_block: dict[int, IndexedBlock] = {}
        # Parent -> first token -> number -> block: what follows a block, oldest first, and may be shared in part.
        self._followers: dict[int | str, dict[int, dict[int, IndexedBlock]]] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._by_block)

    def __contains__(self, block: object) -> bool:
        return block in self._by_block

    def entry(self, block: int) -> IndexedBlock | None:
        """What is indexed of `block`."""
        return self._by_block.get(block)

    def _digest(self, parent: bytes, payload: bytes) -> bytes:
        return hashlib.blake2b(parent + payload, key=self._key, digest_size=16).digest()

    def _root(self, salt: str) -> bytes:
        return self._digest(b"", salt.encode("utf-8", "surrogatepass"))

    def _child(self, parent: bytes, token_ids: tuple[int, ...]) -> bytes:
        return self._digest(parent, b"".join(token.to_bytes(8, "little") for token in token_ids))

    def find(self, token_ids: Sequence[int], salt: str = "") -> Found:
        """The longest prefix of `token_ids` that is there, short of its last token, whose logits are needed."""
        size, end = self.block_size, len(token_ids) - 1
        blocks: list[int] = []
        parent: int | str = salt
        digest = self._root(salt)
        while (start := len(blocks) * size) + size <= end:
            held = tuple(token_ids[start : start + size])
            digest = self._child(digest, held)
            found = self._full.get(digest)
            if found is None or found.token_ids != held or found.parent != parent:
                break
            blocks.append(found.block)
            parent = found.number
        rest = token_ids[start : min(start + size, end)]
        best, longest = None, 0
        if rest:
            for follower in self._last_followers(parent, rest[0]):
                shared = num_shared(follower.token_ids, rest)
                if shared > longest:
                    best, longest = follower.block, shared
        return Found(blocks, best, longest)

    def insert(
        self, token_ids: Sequence[int], block_table: Sequence[int], salt: str = ""
    ) -> tuple[list[int], list[int]]:
        """Index the blocks of a sequence whose `token_ids` are all verified, a partly filled last one too.

        Where another block already holds the same prefix, that one stays: two requests with one prompt in one step
        must not overwrite each other's entry.

        Returns
        -------
        tuple
            The blocks that stand in the index for the first blocks of `block_table`, and blocks that left the index
            because a new one holds all that they hold.
        """
        parent: int | str = salt
        digest, standing, superseded = self._root(salt), list[int](), list[int]()
        for index in range(len(token_ids) // self.block_size):
            held = tuple(token_ids[index * self.block_size : (index + 1) * self.block_size])
            digest = self._child(digest, held)
            found = self._full.get(digest)
            if found is None:
                found = IndexedBlock(block_table[index], held, next(self._numbers), parent, digest)
                superseded += self._add(found)
                self._full[digest] = found
            elif found.token_ids != held or found.parent != parent:
                return standing, superseded  # A collision: whatever follows would hang on the wrong parent.
            standing.append(found.block)
            parent = found.number
        rest = tuple(token_ids[len(standing) * self.block_size :])
        if rest and not any(
            follower.token_ids[: len(rest)] == rest for follower in self._last_followers(parent, rest[0])
        ):
            superseded += self._add(IndexedBlock(block_table[len(standing)], rest, next(self._numbers), parent, b""))
        return standing, superseded

    def _add(self, new: IndexedBlock) -> list[int]:
        """Enter a block; name those that held a part of it and are no longer needed."""
        self.forget(new.block)
        parts = [
            each.block
            for each in self._last_followers(new.parent, new.token_ids[0])
            if len(each.token_ids) < self.block_size and each.token_ids == new.token_ids[: len(each.token_ids)]
        ]
        self._followers.setdefault(new.parent, {}).setdefault(new.token_ids[0], {})[new.number] = new
        self._by_block[new.block] = new
        for block in parts:
            self.forget(block)
        return parts

    def move(self, block: int, target: int) -> None:
        """What `block` holds is in `target` now."""
        moved = self._by_block.pop(block)._replace(block=target)
        self._by_block[target] = self._followers[moved.parent][moved.token_ids[0]][moved.number] = moved
        if moved.digest in self._full:
            self._full[moved.digest] = moved

    def _last_followers(self, parent: int | str, first: int) -> list[IndexedBlock]:
        """The latest blocks that follow a block and begin with a token: all prompts may begin with one (BOS)."""
        followers = self._followers.get(parent, {}).get(first, {})
        return list(itertools.islice(reversed(followers.values()), MAX_CANDIDATES))

    def forget(self, block: int) -> list[int]:
        """Remove the entry of a block, if it has one, and of all that follow it; name their blocks."""
        forgotten = [block] if block in self._by_block else []
        for each in forgotten:
            entry = self._by_block.pop(each)
            if self._full.get(entry.digest) is entry:
                del self._full[entry.digest]
            first = entry.token_ids[0]
            siblings = self._followers.get(entry.parent, {})  # Gone already where the parent is.
            alike = siblings.get(first, {})
            alike.pop(entry.number, None)
            if not alike:
                siblings.pop(first, None)
            if not siblings:
                self._followers.pop(entry.parent, None)
            for followers in self._followers.pop(entry.number, {}).values():
                forgotten += [follower.block for follower in followers.values()]
        return forgotten

    def clear(self) -> None:
        """Forget every block."""
        self._full.clear()
        self._by_block.clear()
        self._followers.clear()


def num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two sequences of tokens."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))
