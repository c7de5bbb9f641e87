"""Coupled beside rejection sampling on the embedded pair: same prompts, in turns, each at its best draft length.

    python -m hf_pearl.benchmark.sampling_suite --json docs/results/sampling.json

Shapes: `N` positions of an answer, `V` vocabulary.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..config import PearlConfig
from ..decoding.noise import ACCEPT_STREAM, DRAFT_STREAM, RESIDUAL_STREAM, SHARED_STREAM, gumbel_noise, request_seed
from ..decoding.rejection import correct, stands
from ..enabling import measuring
from ..option_types import writable_file
from ..pair import PROMPTS, load_demo_pair
from .machine import describe_machine, describe_versions
from .recording import write_json
from .sampling_table import FORESEEN, sampling_table

TEMPERATURES = (0.3, 0.7, 1.0)
DRAFT_LENGTHS = (2, 3, 4, 6, 8)
NUM_RUNS, NUM_PROMPTS, MAX_NEW_TOKENS = 3, 6, 96
NUM_TRIAL_PROMPTS = 2


class Answer(NamedTuple):
    """One timed call: all its tokens, how long it took, and its counts."""

    token_ids: list[int]
    num_new: int
    seconds: float
    decode_tokens: int
    decode_windows: int
    num_judged: int
    num_stood: int
    seed: int


class Foreseen(NamedTuple):
    """Of one answer: whether the guess at each position stands, and after which of the draft's others a correction is.

    `ranks` are those of the corrections, from 1.
    """

    stood: list[bool]
    ranks: list[int]


def answer(
    pair: Sequence[PreTrainedModel], prompt: torch.Tensor, temperature: float, config: PearlConfig, seed: int = 0
) -> Answer:
    """Continue a prompt `(1, length)`, timed."""
    target, draft = pair
    started = time.perf_counter()
    output = target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        assistant_model=draft,
        pearl=replace(config, seed=seed, prefix_cache=False),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - started
    token_ids, stats = output.sequences[0].tolist(), output.pearl
    return Answer(
        token_ids,
        len(token_ids) - prompt.shape[1],
        seconds,
        stats.decode_tokens,
        stats.decode_windows,
        sum(stats.judged_at),
        sum(stats.stood_at),
        seed,
    )


def _rate(answers: Sequence[Answer]) -> float:
    return sum(each.num_new for each in answers) / sum(each.seconds for each in answers)


def best_length(
    pair: Sequence[PreTrainedModel], prompts: Sequence[torch.Tensor], temperature: float, config: PearlConfig
) -> PearlConfig:
    """The fastest of `DRAFT_LENGTHS` on some prompts, two tries of each in turns."""
    candidates = [replace(config, draft_length=length) for length in DRAFT_LENGTHS]
    rates = [0.0] * len(candidates)
    for _ in range(2):
        for index, each in enumerate(candidates):
            rate = _rate([answer(pair, prompt, temperature, each) for prompt in prompts[:NUM_TRIAL_PROMPTS]])
            rates[index] = max(rates[index], rate)
    return candidates[rates.index(max(rates))]


@torch.no_grad()
def foresee(
    pair: Sequence[PreTrainedModel], token_ids: Sequence[int], num_prompt_tokens: int, temperature: float, seed: int
) -> dict[str, Foreseen]:
    """What the draft would have guessed at each position of an answer, with either verification.

    The answer is one that was sampled from the target with the coupled noise of `seed`. For rejection sampling guess,
    test and correction are drawn at each of its positions; that is the law they have there.
    """
    ids = torch.tensor([list(token_ids)])
    logits = [model(ids).logits[0, num_prompt_tokens - 1 : -1].float() / temperature for model in pair]
    log_p, log_q = (each.log_softmax(dim=-1) for each in logits)  # (N, V)
    said = torch.tensor(token_ids[num_prompt_tokens:])

    def noise(stream: int, size: int) -> torch.Tensor:  # (N, size)
        return gumbel_noise(request_seed(seed, 0), num_prompt_tokens, len(said), size, stream=stream)

    vocab_size = log_p.shape[1]
    noisy = log_q + noise(SHARED_STREAM, vocab_size)
    coupled = Foreseen((noisy.argmax(dim=-1) == said).tolist(), _ranks(noisy, noisy.argmax(dim=-1), said))

    p, q = log_p.exp(), log_q.exp()
    drawn = (log_q + noise(DRAFT_STREAM, vocab_size)).argmax(dim=-1)
    uniforms = (-(-noise(ACCEPT_STREAM, 1)[:, 0].double()).exp()).exp()
    stood = stands(p, q, drawn, uniforms)
    instead = correct(p, q, noise(RESIDUAL_STREAM, vocab_size))
    missed = ~stood
    rejection = Foreseen(stood.tolist(), _ranks(q[missed], drawn[missed], instead[missed]))
    return {"coupled": coupled, "rejection": rejection}


def _ranks(preference: torch.Tensor, guesses: torch.Tensor, tokens: torch.Tensor) -> list[int]:
    """Place of each token that is not the guess among the draft's others, the best of which is 1."""
    better = preference > preference.gather(1, tokens[:, None])
    better.scatter_(1, guesses[:, None], False)
    return (1 + better.sum(dim=-1))[guesses != tokens].tolist()


def measure_sampling(
    pair: Sequence[PreTrainedModel],
    prompts: Sequence[torch.Tensor],
    temperature: float,
    advance: Callable[[], object],
) -> dict[str, Any]:
    """The default, and both verifications at their best draft length, at one temperature."""
    coupled = PearlConfig()
    rejection = PearlConfig(verification="rejection", draft_length=DRAFT_LENGTHS[0])
    deadline = time.monotonic() + 30.0
    while not _drafts(pair, prompts[0], temperature, coupled) and time.monotonic() < deadline:
        pass  # The draft's process is starting.
    configs = [coupled, *(best_length(pair, prompts, temperature, each) for each in (coupled, rejection))]
    runs: list[list[list[Answer]]] = [[] for _ in configs]
    turns = list(range(len(configs)))
    for seed in range(NUM_RUNS):
        for index in turns:
            runs[index].append([answer(pair, prompt, temperature, configs[index], seed) for prompt in prompts])
        turns = [*turns[1:], turns[0]]  # Nobody always runs behind the same one.
        advance()
    foreseen = [
        foresee(pair, each.token_ids, len(each.token_ids) - each.num_new, temperature, each.seed)
        for run in runs[0]
        for each in run
    ]
    rows = [_row(config, answers, foreseen) for config, answers in zip(configs, runs, strict=True)]
    return {"temperature": temperature, "ways": rows}


def _drafts(pair: Sequence[PreTrainedModel], prompt: torch.Tensor, temperature: float, config: PearlConfig) -> bool:
    each = answer(pair, prompt, temperature, config)
    return each.decode_tokens > each.decode_windows


def _row(
    config: PearlConfig, runs: Sequence[Sequence[Answer]], foreseen: Sequence[dict[str, Foreseen]]
) -> dict[str, Any]:
    stood = [each for found in foreseen for each in found[config.verification].stood]
    ranks = [each for found in foreseen for each in found[config.verification].ranks]
    answers = [each for run in runs for each in run]
    rates = [_rate(run) for run in runs]
    return {
        "verification": config.verification,
        "draft_length": config.draft_length,
        "tokens_per_second": statistics.median(rates),
        "runs": rates,
        "mean_accepted_tokens": sum(a.decode_tokens for a in answers) / sum(a.decode_windows for a in answers),
        "acceptance_rate": sum(a.num_stood for a in answers) / sum(a.num_judged for a in answers),
        "stands": sum(stood) / len(stood),
        "num_positions": len(stood),
        "num_corrections": len(ranks),
        "foreseen": {str(most): sum(rank <= most for rank in ranks) / len(ranks) for most in FORESEEN},
    }


def main() -> None:
    """Measure, print the table, and write the figures where the options say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", type=writable_file, help="write the figures to FILE, too")
    args = parser.parse_args()
    target, draft, tokenizer = load_demo_pair(torch.device("cpu"))
    texts = [json.loads(line)["turns"][0] for line in PROMPTS.read_text("utf-8").splitlines()]
    chosen = [texts[index * len(texts) // NUM_PROMPTS] for index in range(NUM_PROMPTS)]
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in chosen]
    with measuring(target), tqdm(total=len(TEMPERATURES) * NUM_RUNS, unit="run", leave=False) as bar:
        measured = [measure_sampling((target, draft), prompts, each, bar.update) for each in TEMPERATURES]
    figures = {
        "temperatures": measured,
        "num_runs": NUM_RUNS,
        "workload": {
            "prompt_tokens": [prompt.shape[1] for prompt in prompts],
            "max_new_tokens": MAX_NEW_TOKENS,
            "seeds": list(range(NUM_RUNS)),
            "draft_lengths": DRAFT_LENGTHS,
            "dtype": str(target.dtype).removeprefix("torch."),
        },
        "command": " ".join(["python -m hf_pearl.benchmark.sampling_suite", *sys.argv[1:]]),
        "machine": describe_machine(target.device),
        "versions": describe_versions(),
    }
    print(sampling_table(figures))
    if args.json is not None:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
