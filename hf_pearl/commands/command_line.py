"""What the commands of `python -m hf_pearl` share: options, and from options to models and prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..benchmark import Workload
from ..errors import first_line
from ..option_types import positive_int, seed, temperature
from ..pair import PACKAGED, PROMPTS, default_device, demo_pair_folder, load_model
from ..pair_checks import check_room, checked_models
from ..smollm2 import QUESTIONS, as_chat, load_smollm2_pair

Pair = tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]

DTYPES = ("float32", "bfloat16", "float16", "float64")
EMBEDDED, SMOLLM2 = PAIRS = ("embedded", "smollm2")
NUM_PROMPTS = 4


class UsageError(ValueError):
    """An option that cannot be followed; the message names it and the cure."""


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """Which models, and where."""
    group = add_model_options(parser)
    group.add_argument(
        "--pair", choices=PAIRS, default=EMBEDDED, help=f"{SMOLLM2}: a chat model; fetched once, 93 MB, in bfloat16"
    )
    group.add_argument("--draft", metavar="MODEL", help="name or folder of the draft (default: the embedded one)")


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Which target, and where."""
    group = parser.add_argument_group("models")
    group.add_argument("--target", metavar="MODEL", help="name or folder of the target (default: the embedded one)")
    group.add_argument("--device", help="such as cpu or cuda:1 (default: a CUDA device if there is one)")
    group.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    return group


def add_workload_options(parser: argparse.ArgumentParser, many: bool = False) -> None:
    """What is to be generated; with `many`, at one temperature or more."""
    group = parser.add_argument_group("text")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="continue this text")
    prompts.add_argument(
        "--prompts", metavar="FILE", type=Path, help='continue the first of the "turns" of every line of a JSONL file'
    )
    group.add_argument(
        "--num-prompts", metavar="N", type=positive_int, help=f"of these, N evenly spread (default: {NUM_PROMPTS})"
    )
    group.add_argument(
        "--max-new-tokens", metavar="N", type=positive_int, default=100, help="per prompt (default: 100)"
    )
    several: dict[str, Any] = {"nargs": "+", "default": [0.0]} if many else {"default": 0.0}
    group.add_argument(
        "--temperature", metavar="T", type=temperature, help="0, the default, is greedy decoding", **several
    )
    group.add_argument("--seed", metavar="N", type=seed, default=0, help="of sampling (default: 0)")


def load_pair(args: argparse.Namespace) -> Pair:
    """Target, draft and the tokenizer of both, as the options say.

    Raises
    ------
    UsageError
        A model, a device or a pair that cannot be used, or that PEARL cannot run.
    """
    if args.pair == SMOLLM2:
        return _load_smollm2(args)
    check_both_named(args)
    device = named_device(args.device)
    target_name, draft_name = model_source(args.target, "target"), model_source(args.draft, "draft")
    with _reporting(f"--target {target_name}"):
        tokenizer = AutoTokenizer.from_pretrained(target_name)
        target = load_model(target_name, device, args.dtype)
    with _reporting(f"--draft {draft_name}"):
        draft = load_model(draft_name, device, args.dtype)
    _check_vocabulary(tokenizer, draft_name)
    try:
        checked_models(target, draft)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"--target {target_name}, --draft {draft_name}: {first_line(error)}") from error
    return target, draft, tokenizer


def check_both_named(args: argparse.Namespace) -> None:
    """Raise `UsageError` for a target that is named without a draft."""
    if args.target is not None and args.draft is None:
        raise UsageError("--target needs --draft: the embedded draft knows the embedded target's vocabulary only")


def _load_smollm2(args: argparse.Namespace) -> Pair:
    if args.target is not None or args.draft is not None:
        raise UsageError(f"--pair {SMOLLM2}: names both models; leave out --target and --draft")
    with _reporting(f"--pair {SMOLLM2}"):
        return load_smollm2_pair(named_device(args.device), args.dtype)


def load_target(args: argparse.Namespace) -> tuple[PreTrainedModel, str]:
    """The target, and its name without what lies above the package.

    Raises
    ------
    UsageError
        A model or a device that cannot be used.
    """
    device, name = named_device(args.device), model_source(args.target, "target")
    with _reporting(f"--target {name}"):
        return load_model(name, device, args.dtype), str(name).removeprefix(f"{PACKAGED.parents[1]}/")


def load_prompts(args: argparse.Namespace, own: Path = PROMPTS) -> list[str]:
    """The texts to continue: `--prompt`, or those of `--prompts`, or those in `own`, which no draft was trained on.

    Raises
    ------
    UsageError
        A file that cannot be read, or has no prompts; or a number of them beside `--prompt`, which is one.
    """
    if args.prompt is not None:
        if args.num_prompts is not None:
            raise UsageError(f"--num-prompts {args.num_prompts}: --prompt is one; leave out one of them")
        return [args.prompt]
    prompts = read_prompts(own if args.prompts is None else args.prompts)
    if args.prompts is None and own == PROMPTS:
        prompts = [prompt for prompt in prompts if "def " in prompt]
    num_prompts = min(args.num_prompts or NUM_PROMPTS, len(prompts))
    return [prompts[index * len(prompts) // num_prompts] for index in range(num_prompts)]


def read_prompts(path: Path) -> list[str]:
    """The first of the "turns" of every line of a JSONL file (Spec-Bench's format).

    Raises
    ------
    UsageError
        It cannot be read, has a line of another form, or no line at all.
    """
    with _reporting(f"--prompts {path}"):
        lines = path.read_text("utf-8-sig").split("\n")  # Other line ends may stand within a string of JSON.
    prompts = []
    for number, line in enumerate(lines, start=1):
        turn = _first_turn(line) if line.strip() else None
        if turn == "":
            raise UsageError(f'--prompts {path}: line {number} is not an object with "turns": ["...", ...]')
        prompts += [] if turn is None else [turn]
    if not prompts:
        raise UsageError(f"--prompts {path}: there is no prompt in it")
    return prompts


def _first_turn(line: str) -> str:
    """The first of an object's "turns"; nothing where there is none."""
    try:
        turns = json.loads(line)["turns"]
        turn = turns[0] if isinstance(turns, list) else ""
        return turn if isinstance(turn, str) and turn.encode() else ""  # Half of a surrogate pair cannot be encoded.
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""


def make_workload(args: argparse.Namespace, pair: Pair) -> Workload:
    """The prompts, tokenized, and how to continue them; raises what `make_prompts` does."""
    target, draft, _ = pair
    return Workload(target, draft, make_prompts(args, pair), args.max_new_tokens, args.temperature, args.seed)


def make_prompts(args: argparse.Namespace, pair: Pair) -> tuple[torch.Tensor, ...]:
    """The prompts, tokenized, each `(1, length)`.

    Raises
    ------
    UsageError
        A prompt that is empty or, with what is to follow, too long for one of the models.
    """
    target, draft, tokenizer = pair
    texts = load_prompts(args, QUESTIONS if args.pair == SMOLLM2 else PROMPTS)
    if args.pair == SMOLLM2:
        prompts = tuple(as_chat(tokenizer, text).to(target.device) for text in texts)
    else:
        prompts = tuple(tokenizer(text, return_tensors="pt").input_ids.to(target.device) for text in texts)
    lengths = [prompt.shape[1] for prompt in prompts]
    if not min(lengths):
        raise UsageError("--prompt: the tokenizer makes no token of it")
    with _reporting(f"--max-new-tokens {args.max_new_tokens}"):
        check_room(max(lengths), (target, draft), args.max_new_tokens)
    return prompts


def named_device(name: str | None) -> torch.device:
    """What `--device` means, None by default.

    Raises
    ------
    UsageError
        There is no such device.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: {first_line(error)}") from error
    return device


def model_source(name: str | None, part: str) -> str | Path:
    """What a user has named, or that part ("target", "draft") of the embedded pair."""
    if name is not None:
        return name
    try:
        return demo_pair_folder() / part
    except FileNotFoundError as error:
        raise UsageError(f"{error} (--target and --draft)") from error


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, draft_name: str | Path) -> None:
    try:
        other_ids = AutoTokenizer.from_pretrained(draft_name).get_vocab()
    except (OSError, ValueError):
        return  # A draft may come without a tokenizer of its own.
    ids = tokenizer.get_vocab()
    different = [token for token in ids.keys() & other_ids.keys() if ids[token] != other_ids[token]]
    if different:
        raise UsageError(
            f"--draft {draft_name}: {len(different)} tokens have other ids than in the target's vocabulary, such as "
            f"{min(different)!r}; both models must share one vocabulary"
        )


@contextmanager
def _reporting(option: str) -> Iterator[None]:
    """Say which option it was that could not be followed."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"{option}: {first_line(error)}") from error
