"""A chat model's own answers, and its distributions at every token of them: what a draft for it is distilled on.

Shapes: `B` conversations, `T` tokens of the longest, `K` most likely tokens.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import torch
from chat_questions import make_question
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

NUM_LIKELY = 32
NUM_ROWS, NUM_NEW_TOKENS = 128, 160
TEMPERATURES = (0.0, 0.7, 0.0, 0.7, 1.0)


class ChatSamples(NamedTuple):
    """Conversations, padded on the right.

    Attributes
    ----------
    token_ids : torch.Tensor
        `(B, T)`, int32: question and answer.
    is_answer : torch.Tensor
        `(B, T)`, bool: which of them the model wrote.
    likely_ids, likely_log_probs : torch.Tensor
        `(B, T, K)`, int32 and bfloat16: what the model would have written at each token of an answer (before any
        temperature), most likely first; 0 elsewhere.
    """

    token_ids: torch.Tensor
    is_answer: torch.Tensor
    likely_ids: torch.Tensor
    likely_log_probs: torch.Tensor


class Recorder(LogitsProcessor):
    """Keep the likeliest tokens of every step; it runs before temperature does."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Note what there is; change nothing."""
        values, ids = scores.topk(NUM_LIKELY, dim=-1)
        self.ids.append(ids.int().cpu())
        self.log_probs.append((values - scores.logsumexp(dim=-1, keepdim=True)).bfloat16().cpu())
        return scores


@torch.no_grad()
def sample_chats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> ChatSamples:
    """Answers to `NUM_ROWS` random questions, at one of `TEMPERATURES`; `seed` decides all."""
    generator = random.Random(seed)
    chats = [[{"role": "user", "content": make_question(generator)}] for _ in range(NUM_ROWS)]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    temperature = TEMPERATURES[seed % len(TEMPERATURES)]
    options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    recorder = Recorder()
    torch.manual_seed(seed)
    rows = model.generate(
        **inputs,
        max_new_tokens=NUM_NEW_TOKENS,
        logits_processor=LogitsProcessorList([recorder]),
        **({"do_sample": False} | options),
    ).cpu()
    return _shifted(rows, inputs["attention_mask"].cpu(), recorder, tokenizer.eos_token_id)


def _shifted(rows: torch.Tensor, prompt_mask: torch.Tensor, recorder: Recorder, eos_token_id: int) -> ChatSamples:
    """Move the padding from the left to the right."""
    num_rows, length, num_prompt = *rows.shape, prompt_mask.shape[1]
    answers = rows[:, num_prompt:]
    is_over = (answers == eos_token_id).cumsum(1) - (answers == eos_token_id).int() > 0
    likely_ids = torch.zeros(num_rows, length, NUM_LIKELY, dtype=torch.int32)
    likely_log_probs = torch.zeros(num_rows, length, NUM_LIKELY, dtype=torch.bfloat16)
    likely_ids[:, num_prompt:] = torch.stack(recorder.ids, dim=1)
    likely_log_probs[:, num_prompt:] = torch.stack(recorder.log_probs, dim=1)
    is_answer = torch.cat([torch.zeros_like(prompt_mask, dtype=torch.bool), ~is_over], dim=1)
    order = torch.arange(length) + (prompt_mask == 0).sum(1, keepdim=True)  # (B, T), beyond the end: padding
    is_answer = is_answer.gather(1, order % length) & (order < length)
    order = order % length
    places = order[..., None].expand(-1, -1, NUM_LIKELY)
    return ChatSamples(
        rows.gather(1, order).int(), is_answer, likely_ids.gather(1, places), likely_log_probs.gather(1, places)
    )


def load_samples(folder: Path) -> list[ChatSamples]:
    """All batches that `save_samples` wrote, in order."""
    return [ChatSamples(**torch.load(file)) for file in sorted(folder.glob("*.pt"))]


def save_samples(samples: ChatSamples, file: Path) -> None:
    """Write beside, then rename: a kill in between leaves no half of a file."""
    temporary = file.with_suffix(".tmp")
    torch.save(samples._asdict(), temporary)
    temporary.rename(file)
