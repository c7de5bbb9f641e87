"""A heavier target: more work, and not one other bit of output."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from models import ARCHITECTURES, own_random_state, tiny_model

from hf_pearl.benchmark import heavier as module
from hf_pearl.benchmark.heavier import heavier, heavier_to
from hf_pearl.benchmark.measurement import sharing_copy

PADDED = ("llama", "qwen2", "qwen3", "mistral", "gemma2")
REFUSED = ("phi3", "gpt_neox", "gpt2")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Several would get in each other's way."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def num_multiplications(model: torch.nn.Module) -> int:
    """Per token, in linear layers, the output's included."""
    return sum(each.weight.numel() for each in model.modules() if isinstance(each, torch.nn.Linear))


def random_ids(seed: int, batch_size: int, length: int) -> torch.Tensor:
    with own_random_state(seed):
        return torch.randint(1, 60, (batch_size, length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("architecture", PADDED)
def test_logits_are_the_same_bit_for_bit(architecture: str, dtype: torch.dtype, seed: int) -> None:
    model = tiny_model(architecture, 1, dtype=dtype)
    twin = heavier(model, 3.3)
    assert twin.config.num_hidden_layers > model.config.num_hidden_layers
    for batch_size, length in ((1, 1), (1, 37), (3, 9)):
        ids = random_ids(seed, batch_size, length)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, twin(ids).logits)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_generated_tokens_are_the_same(architecture: str, seed: int) -> None:
    """With a cache for every layer; mistral's tiny window makes it a sliding one."""
    model, ids = tiny_model(architecture, 2), random_ids(seed, 2, 21)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    assert heavier(model, 2.5).generate(ids, **options).tolist() == model.generate(ids, **options).tolist()


@pytest.mark.parametrize("times", [1.7, 3.0, 13.3])
def test_it_takes_so_many_times_the_work(times: float) -> None:
    """In whole layers, and what is left in columns of the last MLP."""
    model = tiny_model("llama", 3)
    twin = heavier(model, times)
    assert num_multiplications(twin) / num_multiplications(model) == pytest.approx(times, abs=0.02)
    widths = [layer.mlp.down_proj.in_features for layer in twin.model.layers]
    assert set(widths[:-1]) == {model.config.intermediate_size} < {*widths}
    assert len(widths) == twin.config.num_hidden_layers


@pytest.mark.parametrize(("num_layers", "num_weights"), [(3, 40_000), (9, 200_000)])
def test_it_has_another_models_layers_and_weights(num_layers: int, num_weights: int, seed: int) -> None:
    """Spread evenly over the layers that are added; its logits are the same, bit for bit."""
    model, ids = tiny_model("llama", 3), random_ids(seed, 2, 9)
    twin = heavier_to(model, num_layers, num_weights)
    assert len(twin.model.layers) == twin.config.num_hidden_layers == num_layers
    assert num_multiplications(twin) == pytest.approx(num_weights, rel=0.02)
    assert len({layer.mlp.down_proj.in_features for layer in twin.model.layers[2:]}) == 1
    with torch.no_grad():
        assert torch.equal(model(ids).logits, twin(ids).logits)


@pytest.mark.parametrize(("num_layers", "num_weights"), [(2, 40_000), (4, 20_000)])
def test_a_smaller_model_to_resemble_is_refused(num_layers: int, num_weights: int) -> None:
    with pytest.raises(ValueError, match=f"cannot be made heavier to {num_layers} layers with {num_weights} weights"):
        heavier_to(tiny_model("llama", 8), num_layers, num_weights)


def test_added_work_is_no_multiplication_by_zero_alone() -> None:
    """Only the two projections into the residual stream are zero."""
    model = tiny_model("qwen2", 4)
    for layer in heavier(model, 3.0).model.layers[2:]:
        zero = {name for name, parameter in layer.named_parameters() if not parameter.any()}
        assert zero == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_the_model_itself_stays_as_it_is() -> None:
    model = tiny_model("llama", 5)
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config.to_dict())
    heavier(model, 2.0)
    assert heavier(model, 1.0) is model
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_model_of_other_parts_is_refused(architecture: str) -> None:
    assert {*PADDED, *REFUSED} == ARCHITECTURES.keys()
    with pytest.raises(NotImplementedError, match=r"cannot be made heavier: its layers have no linear .*_proj"):
        heavier(tiny_model(architecture, 6), 2.0)


def test_a_model_that_zeros_would_change_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that scales what its layers write would be."""
    widen = module._widen

    def spoil(layer: torch.nn.Module, num_columns: int) -> None:
        widen(layer, num_columns)
        layer.register_forward_hook(lambda _, inputs, output: 1.0001 * output)

    monkeypatch.setattr(module, "_widen", spoil)
    with pytest.raises(NotImplementedError, match="layers that write zeros change its output"):
        heavier(tiny_model("llama", 7), 2.0)


@pytest.mark.parametrize("times", [0.5, float("nan"), float("inf")])
def test_a_lighter_model_is_refused(times: float) -> None:
    with pytest.raises(ValueError, match="`times` must be a number from 1"):
        heavier(tiny_model("llama", 8), times)


def test_a_sharing_copy_is_another_model_in_the_same_memory() -> None:
    model = tiny_model("llama", 9)
    twin = sharing_copy(model)
    assert twin is not model and twin.model.layers[0] is not model.model.layers[0]
    assert twin.config is not model.config
    assert [each.data_ptr() for each in twin.parameters()] == [each.data_ptr() for each in model.parameters()]
