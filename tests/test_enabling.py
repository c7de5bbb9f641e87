"""`pearl` is there where it was enabled, and nowhere else; an enabled model is still a model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import make_draft, tiny_model
from transformers import GenerationConfig, GenerationMixin, LlamaForCausalLM

import hf_pearl
from hf_pearl import PearlConfig, PearlGenerationMixin
from hf_pearl.enabling import enabled

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
INLINE = PearlConfig(execution="inline")


@pytest.fixture
def target() -> Iterator[LlamaForCausalLM]:
    """A tiny model, given back at the end."""
    model = tiny_model("llama", 0)
    yield model
    hf_pearl.disable()
    hf_pearl.disable(model)
    hf_pearl.release(model)


def decode(model: LlamaForCausalLM, **options: object) -> torch.Tensor:
    """A few greedy tokens."""
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=8, do_sample=False, **options)


def test_importing_changes_nothing(target: LlamaForCausalLM) -> None:
    assert not hasattr(GenerationMixin.generate, "hf_pearl_original")
    with pytest.raises(ValueError, match="pearl"):
        decode(target, pearl=True)


def test_one_model_is_enabled_and_no_other(target: LlamaForCausalLM) -> None:
    expected, other = decode(target), tiny_model("llama", 1)
    hf_pearl.enable(target)
    hf_pearl.enable(target)
    assert torch.equal(decode(target, pearl=INLINE), expected)
    assert torch.equal(decode(target, pearl=False), expected)
    with pytest.raises(ValueError, match="pearl"):
        decode(other, pearl=True)
    hf_pearl.disable(target)
    assert "generate" not in vars(target)


def test_a_scope_leaves_a_generate_that_was_there_before(target: LlamaForCausalLM) -> None:
    """Of whomever: it was replaced, and then deleted."""
    expected = decode(target)

    def own(*args: object, **kwargs: object) -> str:
        return "own"

    target.generate = own
    with enabled(target):
        assert torch.equal(decode(target, pearl=INLINE), expected)
    assert target.generate is own
    del target.generate
    hf_pearl.enable(target)
    before = target.generate
    with enabled(target), enabled(target):
        assert torch.equal(decode(target, pearl=INLINE), expected)
    assert target.generate is before
    hf_pearl.disable(target)
    with enabled(target):
        pass
    assert "generate" not in vars(target)


@pytest.mark.parametrize("one", [False, True], ids=["all", "one"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_an_enabled_model_can_be_copied_and_saved(
    target: LlamaForCausalLM, tmp_path: Path, how: str, one: bool
) -> None:
    """A bound method among the model's attributes once could not be pickled."""
    hf_pearl.enable(target if one else None)
    expected = decode(target, pearl=INLINE)
    if how == "save":
        target.save_pretrained(tmp_path)
        copied = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
        assert torch.equal(decode(copied), expected)
        return
    copied = copy.deepcopy(target) if how == "deepcopy" else pickle.loads(pickle.dumps(target))
    assert torch.equal(decode(copied, pearl=INLINE), expected)
    with torch.no_grad():
        copied.lm_head.weight.neg_()
    assert not torch.equal(decode(copied, pearl=INLINE), expected), "the copy's generate runs the original"
    hf_pearl.release(copied)


def test_all_and_one_enabled_with_pearl_in_the_generation_config(target: LlamaForCausalLM) -> None:
    """The inner call saw the config's `pearl` again."""
    expected = decode(target)
    hf_pearl.enable()
    hf_pearl.enable(target)
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pearl=INLINE)
    output = target.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), generation_config=config)
    assert torch.equal(output, expected)


def test_the_mixin_where_every_model_is_enabled_too(target: LlamaForCausalLM) -> None:
    class Mixed(PearlGenerationMixin, LlamaForCausalLM):
        pass

    model = Mixed(target.config).to(target.dtype).eval()
    model.load_state_dict(target.state_dict())
    expected = decode(target)
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pearl=INLINE)
    for is_enabled in (False, True):
        (hf_pearl.enable if is_enabled else hf_pearl.disable)()
        output = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), generation_config=config)
        assert torch.equal(output, expected)


def test_the_mixin_must_stand_before_the_model_class() -> None:
    class Right(PearlGenerationMixin, LlamaForCausalLM):
        pass

    model = Right(tiny_model("llama", 0).config).double().eval()
    assert torch.equal(decode(model, pearl=INLINE), decode(model))
    hf_pearl.release(model)
    with pytest.raises(TypeError, match="before its transformers model class"):

        class Wrong(LlamaForCausalLM, PearlGenerationMixin):
            pass


@pytest.mark.parametrize(
    "function", [hf_pearl.enable, hf_pearl.disable, hf_pearl.release, hf_pearl.clear_cache], ids=lambda f: f.__name__
)
def test_what_is_no_model_is_refused(function: object) -> None:
    with pytest.raises(TypeError, match="`model` must be a transformers model that can generate, got str"):
        function("x")  # type: ignore[operator]


def test_a_forward_hook_is_seen(target: LlamaForCausalLM) -> None:
    """Keys and values cached before a hook was there were served after."""
    prompt = torch.arange(78)[None] % 60 + 2
    hf_pearl.enable(target)
    draft = make_draft(target, "noisy", 0)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    before = target.generate(prompt, **options, assistant_model=draft, pearl=INLINE)
    shift = torch.randn(target.config.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hook = target.model.layers[0].register_forward_hook(lambda module, inputs, output: output + shift)
    hooked = target.generate(prompt, **options, assistant_model=draft, pearl=INLINE)
    assert torch.equal(hooked, target.generate(prompt, **options))
    assert not torch.equal(hooked, before)
    hook.remove()
    assert torch.equal(target.generate(prompt, **options, assistant_model=draft, pearl=INLINE), before)


def test_an_argument_given_twice_or_one_too_many_is_refused(target: LlamaForCausalLM) -> None:
    """As Python does where the signature is `generate`'s own."""
    with pytest.raises(TypeError, match="multiple values for argument 'inputs'"):
        target.generate(PROMPT, inputs=PROMPT)
    with pytest.raises(TypeError, match="positional arguments"):
        target.generate(PROMPT, *[None] * 20)
    hf_pearl.enable(target)
    with pytest.raises(TypeError, match=r"multiple values for argument 'inputs'.*once"):
        target.generate(PROMPT, inputs=PROMPT, pearl=True)
    with pytest.raises(TypeError, match=r"positional arguments \(inputs, generation_config, .*got 21"):
        target.generate(PROMPT, *[None] * 20, pearl=True)
