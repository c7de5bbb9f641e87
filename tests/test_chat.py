"""A chat on the embedded pair: a turn computes what is new, in both lanes, and answers as a cold cache does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import enabled_for_tiny_models

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.cache.sizing import DEFAULT_BLOCK_SIZE
from hf_pearl.parallel.workers.draft_workers import DraftWorker
from hf_pearl.registry import engine_for

TURNS = (
    'def read_lines(path):\n    """Return the lines of a file."""\n',
    "\n\nclass Reader:\n    def __init__(self, path):\n",
    "\n\n    def close(self):\n",
    "\n\ndef main(argv=None):\n    parser = argparse.ArgumentParser()\n",
    '\n\nif __name__ == "__main__":\n',
)
NUM_NEW = 40


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.mark.parametrize("execution", ["inline", "threads", "processes"])
def test_five_turns_prefill_what_is_new(execution: str) -> None:
    target, draft, tokenizer = hf_pearl.load_demo_pair("cpu", torch.float64)
    config = PearlConfig(execution=execution, draft_length=4)
    cold = PearlConfig(execution="inline", prefix_cache=False)
    history = torch.zeros(1, 0, dtype=torch.long)
    for number, turn in enumerate(TURNS):
        new = tokenizer(turn, return_tensors="pt").input_ids
        prompt = torch.cat([history, new], dim=1)
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": NUM_NEW}
        output = target.generate(prompt, **options, assistant_model=draft, pearl=config, return_dict_in_generate=True)
        if execution == "processes" and not number:
            worker = engine_for(target, draft).workers.worker
            assert isinstance(worker, DraftWorker)
            assert worker.wait_until_ready(60)
        assert torch.equal(output.sequences, target.generate(prompt, **options, pearl=cold))
        if number:
            num_new = new.shape[1] + 1  # and the last token of the answer, which nobody has computed
            assert output.pearl.prefilled_tokens == num_new
            assert output.pearl.cache_hit_rate == 1 - num_new / prompt.shape[1]
        if number > 1:  # In a process, the draft may have missed the first turn.
            assert num_new <= output.pearl.draft_prefilled_tokens <= num_new + DEFAULT_BLOCK_SIZE
        history = output.sequences
    hf_pearl.release(target)
