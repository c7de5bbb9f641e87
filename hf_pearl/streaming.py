"""A streamer that shows who wrote each token: the draft or the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

DRAFTED, PLAIN = "\x1b[32m", "\x1b[0m"  # green


class VerifiedStreamer(BaseStreamer):
    """Writes one row's tokens as they are verified; with `marks`, the draft's own in another colour.

    A token whose bytes do not end a character waits for the next.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, file: TextIO, marks: bool) -> None:
        self.tokenizer = tokenizer
        self.file = file
        self.marks = marks
        self.num_tokens = self.num_drafted = 0
        self._token_ids: list[int] = []
        self._begin = self._shown = 0  # Decoding begins a little before what is new: some tokenizers join tokens.

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt: it goes before the first token, and is written already."""
        self._token_ids += value.flatten().tolist()
        self._begin = self._shown = len(self._token_ids)

    def put_verified(self, token_ids: torch.Tensor, was_drafted: Sequence[bool]) -> None:
        """Write the next token of the row."""
        self._token_ids += token_ids.tolist()
        self.num_tokens += 1
        self.num_drafted += was_drafted[0]
        before = self.tokenizer.decode(self._token_ids[self._begin : self._shown])
        text = self.tokenizer.decode(self._token_ids[self._begin :])
        if not text.endswith("\ufffd"):
            self._begin, self._shown = self._shown, len(self._token_ids)
            self._write(text[len(before) :], was_drafted[0])

    def _write(self, text: str, was_drafted: bool) -> None:
        marked = self.marks and was_drafted
        print(f"{DRAFTED}{text}{PLAIN}" if marked else text, end="", file=self.file, flush=True)

    def end(self) -> None:
        """End the line."""
        print(file=self.file, flush=True)
