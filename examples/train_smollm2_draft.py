"""Distil the draft of the pair `smollm2`: two layers on SmolLM2's own embeddings, trained on SmolLM2's own answers.

    python examples/train_smollm2_draft.py sample --minutes 25    # answers and distributions, into ./smollm2/samples
    python examples/train_smollm2_draft.py train --minutes 30     # the draft, into ./smollm2/draft

Both go on where they stopped (`train` with --resume), and may run at the same time. The questions are templates
(`chat_questions.py`); the loop, the optimizer and the clock are those of `train_pair.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from chat_samples import ChatSamples, load_samples, sample_chats, save_samples
from train_pair import clocked, train_draft

from hf_pearl.borrowed_embeddings import BorrowingLlama, first_draft, save_draft
from hf_pearl.smollm2 import load_smollm2

LAYERS = (0, -1)  # the first and the last of the target's
NUM_GUESSED_TOKENS = 8192  # of 49152; 89% of the tokens of the target's answers are among them
BATCH_SIZE = 16
SHARE = 0.5  # of an answer's tokens are learnt from in one step: the others' logits are not worth their time
LEARNING_RATE = 1.5e-3


def sample(args: argparse.Namespace) -> None:
    """Write a file of samples after the other until the time is up."""
    target, tokenizer = load_smollm2(args.device, torch.bfloat16)
    folder = args.output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    seeds = (seed for seed in itertools.count() if not (folder / f"{seed:04d}.pt").exists())
    for _ in clocked(args.minutes, 0.0, "samples"):
        seed = next(seeds)
        save_samples(sample_chats(target, tokenizer, seed), folder / f"{seed:04d}.pt")


def batch_loss(draft: BorrowingLlama, samples: ChatSamples, rows: torch.Tensor) -> torch.Tensor:
    """KL divergence per token of the answers `rows` to the target's likeliest tokens that the draft can guess."""
    token_ids, is_answer = samples.token_ids[rows].long(), samples.is_answer[rows]
    length = int(is_answer.any(0).nonzero()[-1]) + 1
    is_answer = is_answer[:, :length] & (torch.rand(len(rows), length) < SHARE)
    with torch.autocast(draft.device.type, torch.bfloat16):
        hidden = draft.model(token_ids[:, :length].to(draft.device), use_cache=False).last_hidden_state
        logits = draft.lm_head.short(hidden[:, :-1][is_answer[:, 1:]])  # (N, K)
    likely = samples.likely_ids[rows][:, :length][is_answer].long()  # (N, 32)
    log_probs = samples.likely_log_probs[rows][:, :length][is_answer].float()
    log_probs = log_probs.masked_fill(likely >= draft.lm_head.num_guessed_tokens, -torch.inf)
    can_guess = log_probs.isfinite().any(-1)
    expected = log_probs[can_guess].softmax(-1).to(draft.device)
    logits, likely = logits[can_guess].float(), likely[can_guess].to(draft.device)
    found = logits.gather(1, likely.clamp_max(logits.shape[1] - 1)) - logits.logsumexp(-1, keepdim=True)
    return -(expected * (found - expected.clamp_min(1e-9).log())).sum(-1).mean()


@torch.no_grad()
def agreement(draft: BorrowingLlama, samples: ChatSamples) -> float:
    """How often the draft's likeliest token is the target's likeliest, over all tokens of the answers."""
    num_agreed = 0
    for rows in torch.arange(len(samples.token_ids)).split(BATCH_SIZE):
        with torch.autocast(draft.device.type, torch.bfloat16):
            logits = draft(samples.token_ids[rows].long().to(draft.device), use_cache=False).logits
        guesses = logits[:, :-1].argmax(-1).cpu()
        agreed = guesses == samples.likely_ids[rows][:, 1:, 0]
        num_agreed += int(agreed[samples.is_answer[rows][:, 1:]].sum())
    return num_agreed / int(samples.is_answer.sum())


def train(args: argparse.Namespace) -> None:
    """Distil on all samples but the first file of them, and report on that one."""
    target, _ = load_smollm2(args.device, torch.float32)
    draft = first_draft(target, [layer % len(target.model.layers) for layer in LAYERS], NUM_GUESSED_TOKENS)
    draft.get_input_embeddings().weight.requires_grad_(False)
    held_out, *pool = load_samples(args.output / "samples")
    last_look = 0.0

    def next_loss(progress: float) -> torch.Tensor:
        nonlocal last_look
        if progress - last_look > 0.02:  # More may have been written meanwhile.
            pool[:] = load_samples(args.output / "samples")[1:]
            last_look = progress
        samples = pool[int(torch.randint(len(pool), ()))]
        return batch_loss(draft, samples, torch.randint(len(samples.token_ids), (BATCH_SIZE,)))

    args.draft_minutes = args.minutes
    draft.train()
    train_draft(draft, next_loss, args, [], LEARNING_RATE)
    draft.eval()
    save_draft(draft, args.output / "draft")
    report = {
        "minutes": args.minutes,
        "layers": LAYERS,
        "num_guessed_tokens": NUM_GUESSED_TOKENS,
        "num_training_tokens": sum(int(samples.is_answer.sum()) for samples in pool),
        "agreement_held_out": agreement(draft, held_out),
    }
    (args.output / "draft" / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


def main() -> None:
    """Sample or train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("sample", "train"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="train: go on from the last checkpoint")
    parser.add_argument("--output", type=Path, default=Path("smollm2"))
    args = parser.parse_args()
    torch.manual_seed(0)
    {"sample": sample, "train": train}[args.step](args)


if __name__ == "__main__":
    main()
