"""Finding blocks again by the tokens they hold and all that came before them."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple


class IndexedBlock(NamedTuple):
    """A full block of verified tokens: where it lies, what it holds, its number, and that of the block before it.

    Numbers are never used again: a block whose predecessor was evicted is not found behind another one.
    """

    block: int
    token_ids: tuple[int, ...]
    number: int
    parent: int


class PrefixIndex:
    """Digest of a token prefix -> the block that holds its last `block_size` tokens.

    Digests are chained (parent digest + token ids), keyed per process, and every hit is compared token by token, so
    that a collision can never serve another prefix's keys and values.
    """

    def __init__(self, salt: str = "") -> None:
        self._key = os.urandom(32)
        self._root = self._digest(b"", salt.encode())
        self._blocks: dict[bytes, IndexedBlock] = {}
        self._digests: dict[int, bytes] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: object) -> bool:
        return block in self._digests

    def _digest(self, parent: bytes, payload: bytes) -> bytes:
        return hashlib.blake2b(parent + payload, key=self._key, digest_size=16).digest()

    def _child(self, parent: bytes, token_ids: tuple[int, ...]) -> bytes:
        return self._digest(parent, b"".join(token.to_bytes(8, "little") for token in token_ids))

    def find(self, token_ids: Sequence[int], block_size: int) -> list[int]:
        """The blocks of the longest indexed prefix of `token_ids`, in order, always short of the last token.

        The last token is left out because its logits are needed, and computing them writes into its block.
        """
        blocks, digest, parent = [], self._root, 0
        for start in range(0, (len(token_ids) - 1) // block_size * block_size, block_size):
            wanted = tuple(token_ids[start : start + block_size])
            digest = self._child(digest, wanted)
            found = self._blocks.get(digest)
            if found is None or found.token_ids != wanted or found.parent != parent:
                break
            blocks.append(found.block)
            parent = found.number
        return blocks

    def insert(self, token_ids: Sequence[int], block_table: Sequence[int], block_size: int) -> None:
        """Index every full block of a sequence whose `token_ids` are all verified.

        Where another block already holds the same prefix, that one stays: two requests with one prompt in one step
        must not overwrite each other's entry.
        """
        digest, parent = self._root, 0
        for index in range(len(token_ids) // block_size):
            block = block_table[index]
            held = tuple(token_ids[index * block_size : (index + 1) * block_size])
            digest = self._child(digest, held)
            found = self._blocks.get(digest)
            if found is None and block not in self._digests:
                found = self._blocks[digest] = IndexedBlock(block, held, next(self._numbers), parent)
                self._digests[block] = digest
            if found is None or found.token_ids != held or found.parent != parent:
                return  # A collision, or a predecessor is gone: whatever follows would hang on the wrong parent.
            parent = found.number

    def forget(self, block: int) -> None:
        """Remove the entry of an evicted block."""
        digest = self._digests.pop(block, None)
        if digest is not None:
            del self._blocks[digest]

    def clear(self) -> None:
        """Forget every block."""
        self._blocks.clear()
        self._digests.clear()
