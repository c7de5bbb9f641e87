"""Train the embedded pair: a small Llama on Python's own sources, and a draft distilled from it.

    python examples/train_pair.py --minutes 90                    # both models, resumable, into ./pair
    python examples/train_pair.py --minutes 20 --only draft --teacher FOLDER   # a draft for any target

The text is the standard library of the Python that runs this script (PSF licence), without its tests. The target
grows: it starts shallow and gains layers whose output projections are zero, so that every growth step is an
identity (as in Net2Net, Chen et al. 2016, arXiv 1511.05641). Hidden matrices are trained by Muon (Jordan 2024), the
rest by AdamW. The draft is distilled on the target's distributions, half on the corpus, half on the target's own
samples (as in DistillSpec, Zhou et al. 2024, arXiv 2310.08461).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import platform
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 2048
DEPTH_SCHEDULE = ((0.0, 3), (0.07, 6), (0.2, 12), (0.4, 18))  # (share of the time, layers)
DRAFT_LAYERS = 2
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}
END_OF_TEXT, PADDING = "<|endoftext|>", "<|pad|>"


def read_corpus() -> tuple[list[str], list[str], dict[str, object]]:
    """Return training files, held-out files (one of 40, by hash of the path) and a record of what was read."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out, digest, num_bytes = [], [], hashlib.sha256(), 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS & set(relative.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        digest.update(text.encode())
        num_bytes += len(text.encode())
        is_held_out = int(hashlib.sha256(str(relative).encode()).hexdigest(), 16) % 40 == 0
        (held_out if is_held_out else train).append(text)
    record = {
        "python": platform.python_version(),
        "num_files": len(train) + len(held_out),
        "num_held_out_files": len(held_out),
        "num_bytes": num_bytes,
        "sha256": digest.hexdigest(),
    }
    return train, held_out, record


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PADDING, padding_side="left"
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of token ids `(num_tokens,)`, int64, each ended by the end-of-text token."""
    rows = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    stream = [np.asarray([*row, tokenizer.eos_token_id], dtype=np.int64) for row in rows]
    return torch.from_numpy(np.concatenate(stream))


def model_config(num_layers: int, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """Width 192; four heads of 64 (two for keys and values), so that three ranks do not divide them."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def grow(model: LlamaForCausalLM, num_layers: int, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A deeper model that computes the same function: new layers are copies whose output projections are zero."""
    old_layers = model.config.num_hidden_layers
    grown = LlamaForCausalLM(model_config(num_layers, tokenizer))
    source = model.state_dict()
    state = {k: v for k, v in source.items() if ".layers." not in k}
    seen: set[int] = set()
    for index in range(num_layers):
        origin = index * old_layers // num_layers
        for name, value in source.items():
            prefix = f"model.layers.{origin}."
            if not name.startswith(prefix):
                continue
            value = value.clone()
            if origin in seen and name.endswith(("o_proj.weight", "down_proj.weight")):
                value.zero_()
            state[f"model.layers.{index}.{name[len(prefix) :]}"] = value
        seen.add(origin)
    grown.load_state_dict(state)
    return grown


class Optimizer:
    """Muon for the hidden matrices, AdamW for embeddings and norms, one learning-rate factor for both."""

    def __init__(self, model: PreTrainedModel, lr: float = 3e-3) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = [p for n, p in trained.items() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        ids = {id(p) for p in hidden}
        rest = [p for p in trained.values() if id(p) not in ids]
        self.lr = lr
        self.parts = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.parameters = [*hidden, *rest]

    def step(self, factor: float) -> None:
        """One step at `factor` times the base learning rate, gradients clipped to norm 1."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        """The states of both optimizers."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        """Load what `state_dict` returned."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def learning_rate_factor(progress: float) -> float:
    """Constant, then linear to zero over the last 40% of the time."""
    return min(1.0, max(0.0, (1.0 - progress) / 0.4))


def windows(stream: torch.Tensor, batch_size: int, length: int) -> torch.Tensor:
    """Random windows `(batch_size, length)` of a token stream."""
    starts = torch.randint(0, len(stream) - length, (batch_size, 1))
    return stream[starts + torch.arange(length)]


def clocked(minutes: float, start: float, label: str) -> Iterator[tuple[float, tqdm]]:
    """Yield the share of the time used so far until it is used up; `start` is in minutes.

    A step that was suspended counts for ten seconds at most, so that a paused training loses nothing.
    """
    used, last = start, time.monotonic()
    with tqdm(total=round(minutes * 60), initial=round(start * 60), unit="s", desc=label) as bar:
        while used < minutes:
            bar.n = round(used * 60)
            yield used / minutes, bar
            now = time.monotonic()
            used, last = used + min(now - last, 10.0) / 60, now
        bar.n = bar.total


def train_target(
    tokenizer: PreTrainedTokenizerBase, stream: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace
) -> LlamaForCausalLM:
    """Next-token training with growing depth; a checkpoint every two minutes."""
    checkpoint = args.output / "target.ckpt"
    model = LlamaForCausalLM(model_config(DEPTH_SCHEDULE[0][1], tokenizer))
    used, saved_optimizer = 0.0, None
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model = LlamaForCausalLM(model_config(saved["num_layers"], tokenizer))
        model.load_state_dict(saved["model"])
        used, saved_optimizer = saved["minutes"], saved["optimizer"]
    model.to(args.device)
    optimizer = Optimizer(model)
    if saved_optimizer is not None:
        optimizer.load_state_dict(saved_optimizer)
    step, loss_average, last_save = 0, math.nan, time.monotonic()
    for progress, bar in clocked(args.minutes, used, "target"):
        depth = max(layers for share, layers in DEPTH_SCHEDULE if progress >= share)
        if depth > model.config.num_hidden_layers:
            model = grow(model, depth, tokenizer).to(args.device)
            optimizer = Optimizer(model)
        batch = windows(stream, *((4, 512) if progress > 0.8 else (8, 256))).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            logits = model(batch, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step(learning_rate_factor(progress))
        loss_average = loss.item() if math.isnan(loss_average) else 0.99 * loss_average + 0.01 * loss.item()
        step += 1
        bar.set_postfix(layers=depth, step=step, loss=f"{loss_average:.3f}", refresh=False)
        bar.refresh()
        if time.monotonic() - last_save > 120 or progress == 0.0:
            last_save = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "num_layers": depth}
            save_atomically({**state, "minutes": progress * args.minutes}, checkpoint)
            if step % 2 == 0:
                print(f" held-out loss {held_out_loss(model, held_out, 16):.3f}", flush=True)
    return model


def save_atomically(state: dict, path: Path) -> None:
    """Write beside, then rename: a kill in between leaves the old checkpoint."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, stream: torch.Tensor, num_windows: int = 64, length: int = 512) -> float:
    """Mean next-token loss (nats per token) over evenly spread windows, the first 64 tokens of each as context only."""
    starts = torch.linspace(0, len(stream) - length - 1, num_windows).long()
    losses = []
    for start in starts.tolist():
        batch = stream[None, start : start + length].to(model.device)
        logits = model(batch, use_cache=False).logits[0, 63:-1].float()
        losses.append(F.cross_entropy(logits, batch[0, 64:]).item())
    return sum(losses) / len(losses)


@torch.no_grad()
def sample_texts(teacher: PreTrainedModel, prompts: torch.Tensor, num_tokens: int, temperature: float) -> torch.Tensor:
    """The teacher's own continuations `(batch, prompt + num_tokens)` at `temperature` (0: greedy)."""
    options: dict[str, object] = {"do_sample": False}
    if temperature:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    rows = teacher.generate(
        prompts.to(teacher.device),
        attention_mask=torch.ones_like(prompts, device=teacher.device),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        **options,
    )
    return rows.cpu()


def train_draft(
    draft: PreTrainedModel,
    next_loss: Callable[[float], torch.Tensor],
    args: argparse.Namespace,
    pool: list[torch.Tensor],
    learning_rate: float = 3e-3,
) -> PreTrainedModel:
    """Minimise `next_loss(share of the time used)`; a checkpoint, with `pool` in it, every two minutes."""
    checkpoint = args.output / "draft.ckpt"
    optimizer = Optimizer(draft, learning_rate)
    used, average, step, last_save = 0.0, math.nan, 0, time.monotonic()
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        draft.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        used = saved["minutes"]
        pool.extend(saved["pool"])
    for progress, bar in clocked(args.draft_minutes, used, "draft"):
        loss = next_loss(progress)
        loss.backward()
        optimizer.step(learning_rate_factor(progress))
        average = loss.item() if math.isnan(average) else 0.99 * average + 0.01 * loss.item()
        step += 1
        bar.set_postfix(step=step, kl=f"{average:.3f}", refresh=False)
        bar.refresh()
        if time.monotonic() - last_save > 120:
            last_save = time.monotonic()
            state = {"model": draft.state_dict(), "optimizer": optimizer.state_dict(), "pool": pool}
            save_atomically({**state, "minutes": progress * args.draft_minutes}, checkpoint)
    return draft


def distill(
    teacher: PreTrainedModel,
    draft: PreTrainedModel,
    next_samples: Callable[[], torch.Tensor],
    stream: torch.Tensor,
    args: argparse.Namespace,
) -> PreTrainedModel:
    """Minimise the KL divergence to the teacher's distributions, on the corpus and on the teacher's own samples."""
    pool: list[torch.Tensor] = []
    turn, last_sample = itertools.count(), -1.0

    def next_loss(progress: float) -> torch.Tensor:
        nonlocal last_sample
        if progress - last_sample > 0.03 and progress < 0.9:
            pool.append(next_samples())
            last_sample = progress
        own = pool[torch.randint(len(pool), ()).item()] if next(turn) % 4 else None
        batch = windows(stream, 8, 256) if own is None else own[torch.randint(len(own), (8,))]
        batch = batch.to(teacher.device)
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
            expected = F.log_softmax(teacher(batch, use_cache=False).logits.float(), dim=-1)
        with torch.autocast(args.device, torch.bfloat16):
            logits = draft(batch, use_cache=False).logits
        logits = F.log_softmax(logits.float(), dim=-1)
        return F.kl_div(logits.flatten(0, 1), expected.flatten(0, 1), log_target=True, reduction="batchmean")

    return train_draft(draft, next_loss, args, pool)


def draft_from(teacher: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A draft of the teacher's own architecture: its embeddings, its first layers, its final norm."""
    config = type(teacher.config).from_dict({**teacher.config.to_dict(), "num_hidden_layers": num_layers})
    draft = type(teacher)(config)
    wanted = draft.state_dict()
    draft.load_state_dict({name: value for name, value in teacher.state_dict().items() if name in wanted})
    return draft.to(teacher.device)


@torch.no_grad()
def agreement_report(
    teacher: PreTrainedModel, draft: PreTrainedModel, prompts: torch.Tensor, draft_length: int = 8
) -> dict[str, float]:
    """Agreement on the teacher's own text, and the mean accepted tokens that speculative decoding gets from it."""
    report: dict[str, float] = {}
    for temperature in (0.0, 1.0):
        rows = sample_texts(teacher, prompts, 200, 0.0) if not temperature else None
        agreed, forwards, tokens = 0, 0, 0
        if rows is None:
            rows, matches = coupled_sample(teacher, draft, prompts, 200)
        else:
            guess = draft(rows.to(draft.device), use_cache=False).logits[:, prompts.shape[1] - 1 : -1].argmax(-1)
            matches = guess.cpu() == rows[:, prompts.shape[1] :]
        for row in matches.tolist():
            agreed += sum(row)
            position = 0
            while position < len(row):
                stands = 0
                while stands < draft_length and position + stands < len(row) and row[position + stands]:
                    stands += 1
                forwards, position = forwards + 1, position + stands + 1
            tokens += len(row)
        report[f"agreement_temperature_{temperature:g}"] = agreed / tokens
        report[f"mean_accepted_tokens_temperature_{temperature:g}"] = tokens / forwards
    return report


@torch.no_grad()
def coupled_sample(
    teacher: PreTrainedModel, draft: PreTrainedModel, prompts: torch.Tensor, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample at temperature 1 with one Gumbel noise for both models; return the rows and where the draft agreed."""
    generator = torch.Generator().manual_seed(0)
    rows, matches = prompts, []
    caches = [DynamicCache(config=model.config) for model in (teacher, draft)]
    for _ in range(num_tokens):
        noise = -torch.log(-torch.log(torch.rand(len(rows), VOCAB_SIZE, generator=generator).clamp_min(1e-20)))
        choices = []
        for index, model in enumerate((teacher, draft)):
            ids = rows[:, caches[index].get_seq_length() :]
            # By its place: the name of this argument depends on the version of transformers.
            output = model(ids.to(model.device), None, None, caches[index], use_cache=True)
            choices.append((output.logits[:, -1].float().cpu().log_softmax(-1) + noise).argmax(-1))
        matches.append(choices[0] == choices[1])
        rows = torch.cat([rows, choices[0][:, None]], dim=1)
    return rows, torch.stack(matches, dim=1)


def held_out_prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str], per_file: int = 6) -> list[str]:
    """Pieces of 32 to 64 tokens from held-out files, each beginning at a line start."""
    prompts = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        for start in np.linspace(0, max(0, len(lines) - 30), per_file).astype(int).tolist():
            ids = tokenizer("".join(lines[start : start + 30]), add_special_tokens=False)["input_ids"]
            if len(ids) >= 64:
                prompts.append(tokenizer.decode(ids[:64]))
    return list(dict.fromkeys(prompts))  # Some files begin alike.


CARD = """---
license: apache-2.0
language: [code]
library_name: transformers
tags: [speculative-decoding]
---

# The {part} of hf_pearl's embedded pair

{what} Made to show and test parallel speculative decoding; of no other use.

- Trained by `examples/train_pair.py` of hf_pearl for {minutes:.0f} minutes on one to two CPU cores.
- Data: the standard library of Python {python}, {num_files} files without tests, {megabytes:.1f} MB, under the
  [PSF licence](https://docs.python.org/3/license.html); SHA-256 of their concatenation: `{sha256}`.
- Held-out loss ({num_held_out_files} files, drawn by the hash of their paths; some resemble files that were trained on,
  as code pages do): {loss:.3f} nats per token, vocabulary of {vocab_size} (byte-level BPE).
- The draft agrees with the target on {greedy:.0%} of its greedy text and, with shared noise, on {sampled:.0%} at
  temperature 1.
"""
WHAT = {
    "target": "A Llama of 18 layers and width 192 that continues Python source code.",
    "draft": "A Llama of 2 layers, distilled on the target's distributions and on its own samples.",
}


def write_cards(folder: Path, report: dict[str, Any]) -> None:
    """A model card beside each model, with the figures of the report."""
    for part, what in WHAT.items():
        text = CARD.format(
            part=part,
            what=what,
            minutes=report["minutes"][part],
            megabytes=report["corpus"]["num_bytes"] / 1e6,
            loss=report["held_out_loss"][part],
            vocab_size=VOCAB_SIZE,
            greedy=report["agreement_temperature_0"],
            sampled=report["agreement_temperature_1"],
            **{name: report["corpus"][name] for name in ("python", "num_files", "num_held_out_files", "sha256")},
        )
        (folder / part / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Train what is asked for, save it, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="training time of the target")
    parser.add_argument("--draft-minutes", type=float, help="training time of the draft (default: a third of it)")
    parser.add_argument("--only", choices=("target", "draft"))
    parser.add_argument("--teacher", help="distil a draft for this model instead of the trained target")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--output", type=Path, default=Path("pair"))
    args = parser.parse_args()
    args.draft_minutes = args.minutes / 3 if args.draft_minutes is None else args.draft_minutes
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    train_texts, held_out_texts, record = read_corpus()
    target_folder, draft_folder = args.output / "target", args.output / "draft"
    if args.teacher or args.only == "draft" or (args.resume and (target_folder / "tokenizer.json").exists()):
        tokenizer = AutoTokenizer.from_pretrained(args.teacher or target_folder)
    else:
        tokenizer = train_tokenizer(train_texts)
        tokenizer.save_pretrained(target_folder)
    stream, held_out = encode(tokenizer, train_texts), encode(tokenizer, held_out_texts)
    prompts = held_out_prompts(tokenizer, held_out_texts)
    if args.only != "draft" and not args.teacher:
        target = train_target(tokenizer, stream, held_out, args)
        target.to(torch.bfloat16).save_pretrained(target_folder)
    if args.only == "target":
        return
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher or target_folder, dtype=torch.float32).to(args.device)
    teacher.eval()

    def next_samples() -> torch.Tensor:
        starts = windows(stream, 32, 24)
        temperature = (0.0, 0.7, 1.0)[torch.randint(3, ()).item()]
        return sample_texts(teacher, starts, 232, temperature)

    draft = distill(teacher, draft_from(teacher, DRAFT_LAYERS), next_samples, stream, args)
    draft.to(torch.bfloat16).save_pretrained(draft_folder)
    tokenizer.save_pretrained(draft_folder)
    draft.to(torch.float32).eval()
    prompt_ids = torch.tensor(tokenizer(prompts[:48], add_special_tokens=False, padding=True)["input_ids"])[:, -48:]
    report = {
        "corpus": record,
        "num_tokens": len(stream),
        "minutes": {"target": args.minutes, "draft": args.draft_minutes},
        "held_out_loss": {"target": held_out_loss(teacher, held_out), "draft": held_out_loss(draft, held_out)},
        **agreement_report(teacher, draft, prompt_ids),
    }
    if not args.teacher:
        write_cards(args.output, report)
    (args.output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    lines = (json.dumps({"question_id": i, "turns": [text]}) + "\n" for i, text in enumerate(prompts))
    (args.output / "held_out_prompts.jsonl").write_text("".join(lines))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
