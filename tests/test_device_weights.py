"""A draft's weights on a GPU are mapped by its worker, not copied: all but CUDA IPC, which is stood in for."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mapped_weights import MappedWeights
from models import (
    assert_varied,
    enabled_for_tiny_models,
    expected_warnings,
    left_padded,
    make_draft,
    noisy_copy,
    tiny_model,
)
from transformers import PreTrainedModel

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.parallel.workers import device_weights
from hf_pearl.parallel.workers.descriptors import anonymous_memory
from hf_pearl.parallel.workers.draft_workers import DraftWorker
from hf_pearl.parallel.workers.shipping import SharedPlace, build, copy_weights, pack, share_weights
from hf_pearl.registry import engine_for

START_SECONDS = 120.0
LOCKSTEP = PearlConfig(execution="processes", draft_length=4)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes need Linux")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[MappedWeights]:
    weights = MappedWeights()
    for name in ("can_share", "share", "release"):
        monkeypatch.setattr(device_weights, name, getattr(weights, name))
    yield weights
    weights.close()


def decode(target: PreTrainedModel, draft: PreTrainedModel) -> Any:
    prompt = left_padded([list(range(1, 41))])
    options = {"do_sample": False, "max_new_tokens": 40, "return_dict_in_generate": True}
    return target.generate(**prompt, assistant_model=draft, pearl=LOCKSTEP, **options)


def warm_worker(target: PreTrainedModel, draft: PreTrainedModel) -> DraftWorker:
    decode(target, draft)
    worker = engine_for(target, draft).workers.worker
    assert worker is not None and worker.wait_until_ready(START_SECONDS), worker and worker.why_it_ended()
    return worker


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
def test_what_is_shared_is_the_memory_itself(tie_word_embeddings: bool, mapped: MappedWeights) -> None:
    """Some weights are shared and others copied; tied ones are tied again."""
    model = tiny_model("gpt2", 5, tie_word_embeddings=tie_word_embeddings)
    model.set_attn_implementation("eager")
    mapped.move(model.transformer.h)
    mapped.move(model.lm_head)
    shipment, tensors = pack(model)
    are_shared = [isinstance(place, SharedPlace) for place in shipment.places]
    assert any(are_shared) and not all(are_shared)
    descriptor = anonymous_memory("test", shipment.num_bytes)
    copy_weights(shipment, tensors, descriptor, lambda: False)
    shared = share_weights(shipment, tensors)
    assert len(shared) < sum(are_shared), "a storage of several tensors is shared once"
    built = build(shipment, descriptor, shared)
    os.close(descriptor)
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(built(ids).logits, expected)
        mine, its = model.transformer, built.transformer
        mine.h[0].mlp.c_fc.weight.mul_(2.0)
        mine.ln_f.weight.mul_(2.0)  # a copy: nobody sees it there
        assert its.h[0].mlp.c_fc.weight.equal(mine.h[0].mlp.c_fc.weight)
        assert not its.ln_f.weight.equal(mine.ln_f.weight)
    is_tied = built.get_input_embeddings().weight is built.get_output_embeddings().weight
    assert is_tied == tie_word_embeddings


def test_a_worker_drafts_on_the_weights_where_they_are(mapped: MappedWeights) -> None:
    """New values in the same memory need no copy and no other process; another memory needs another process."""
    target = tiny_model("llama", 1)
    expected = target.generate(**left_padded([list(range(1, 41))]), do_sample=False, max_new_tokens=40)
    assert_varied(expected[:, 40:])
    draft = noisy_copy(target, 3.0, 2)
    mapped.move(draft)
    worker = warm_worker(target, draft)
    assert worker._process.shipment.num_bytes == 64, "weights were copied"
    assert mapped.held
    before = decode(target, draft)
    assert before.sequences.equal(expected)
    assert before.pearl.execution == "processes" and before.pearl.acceptance_rate < 0.5

    draft.load_state_dict(target.state_dict())
    after = decode(target, draft)
    assert after.sequences.equal(expected)
    assert after.pearl.acceptance_rate == 1.0 and after.pearl.accepted_tokens > 0
    assert before.pearl.draft_prefilled_tokens == 1
    assert after.pearl.draft_prefilled_tokens == 40, "keys of old weights were found"
    assert engine_for(target, draft).workers.worker is worker

    process_id, before_moving = worker.process_id, list(mapped.held)
    draft.lm_head.weight.data = draft.lm_head.weight.data.clone()
    assert decode(target, draft).sequences.equal(expected)
    assert worker.process_id != process_id
    assert len(mapped.held) == len(before_moving) - 1
    hf_pearl.release(target)
    assert not mapped.held, "memory that no worker uses any more is kept"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_the_owner_lets_go_for_a_worker_that_was_killed(sent: signal.Signals, mapped: MappedWeights) -> None:
    target = tiny_model("llama", 1)
    draft = make_draft(target, "same", 0)
    mapped.move(draft)
    os.kill(warm_worker(target, draft).process_id, sent)
    with expected_warnings():
        assert decode(target, draft).pearl.generated_tokens == 40
    assert mapped.held, "another worker serves"
    hf_pearl.release(target)
    assert not mapped.held


def test_memory_that_cannot_be_shared_is_drafted_in_a_thread(
    mapped: MappedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [mapped.share]

    def refuse(storage: torch.UntypedStorage) -> Any:
        if not shares:
            raise OSError("memory of cuda:0 cannot be shared with another process")
        return shares.pop()(storage)

    target = tiny_model("llama", 1)
    draft = make_draft(target, "same", 0)
    mapped.move(draft)
    monkeypatch.setattr(device_weights, "share", refuse)
    with expected_warnings():
        output = decode(target, draft)
    assert output.pearl.execution == "threads" and output.pearl.acceptance_rate == 1.0
    assert not mapped.held, "the part that was shared is kept"
    hf_pearl.release(target)
