"""A target with a larger one's cost and not one other output: real work that adds nothing.

Added layers compute as all do, and write zeros into the residual stream: the projections that write there, the
attention's `o_proj` and the MLP's `down_proj`, are zero. What is left of the asked work once no whole layer fits goes
into further columns of the last layer's MLP. That is an added layer: in one of the model's own they would change the
order in which its sums are taken, and with it their rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from .measurement import sharing_copy

MLP = ("gate_proj", "up_proj", "down_proj")
PROJECTIONS = ("self_attn.o_proj", *(f"mlp.{name}" for name in MLP))
NUM_TRIAL_TOKENS = 16
MAX_TIMES = 100.0  # What is added is real weights: they need memory.


def heavier(model: PreTrainedModel, times: float) -> PreTrainedModel:
    """A model whose forward takes `times` the work, and whose logits are the same, bit for bit.

    Parameters
    ----------
    model : PreTrainedModel
        Built like Llama or Qwen. It is left as it is; the heavier one shares its weights.
    times : float
        1.0 or more: multiplications of a token's forward, but for attention over its context, which grows with the
        number of layers. At least one layer is added where it is above 1.

    Raises
    ------
    ValueError
        `times` is below 1, or above `MAX_TIMES`.
    NotImplementedError
        The model's layers have other parts, or zeros change its output.
    """
    if not 1.0 <= times <= MAX_TIMES:
        raise ValueError(f"`times` must be a number from 1 to {MAX_TIMES:g}, got {times}.")
    if times == 1.0:
        return model
    layers = _layers(model)
    of_layer, added = _work(layers[0]), (times - 1.0) * _step_work(model)
    num_layers = max(1, int(added // of_layer))
    columns = max(0, round((added - num_layers * of_layer) / _column_work(layers[0])))
    return _with_layers(model, [0] * (num_layers - 1) + [columns])


def heavier_to(model: PreTrainedModel, num_layers: int, num_weights: int) -> PreTrainedModel:
    """The same with as many layers as another model, and as many weights that a step reads (the head's included).

    A step then takes about as many launches and as much memory traffic as the other model's; what a layer does not
    have of its work is in the MLPs of those that are added, evenly.

    Raises
    ------
    ValueError
        The other model is not larger.
    NotImplementedError
        As `heavier`.
    """
    layers = _layers(model)
    num_added = num_layers - len(layers)
    left = num_weights - _step_work(model) - num_added * _work(layers[0])
    if num_added < 1 or left < 0:
        raise ValueError(
            f"{len(layers)} layers with {_step_work(model)} weights cannot be made heavier to {num_layers} layers with "
            f"{num_weights} weights."
        )
    return _with_layers(model, [round(left / num_added / _column_work(layers[0]))] * num_added)


def _with_layers(model: PreTrainedModel, columns: Sequence[int]) -> PreTrainedModel:
    """A sharing copy with a layer more for each of `columns`, its MLP so many columns wider."""
    layers, twin = _layers(model), sharing_copy(model)
    for index, num_columns in enumerate(columns):
        _append_layer(twin, index % len(layers))
        _widen(_layers(twin)[-1], num_columns)
    _check_same(model, twin)
    return twin


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = getattr(model.get_decoder(), "layers", None)
    found = dict(layers[0].named_modules()) if isinstance(layers, nn.ModuleList) and len(layers) else {}
    missing = [name for name in PROJECTIONS if not isinstance(found.get(name), nn.Linear)]
    if missing or not isinstance(layers, nn.ModuleList):
        raise NotImplementedError(
            f"{type(model).__name__} cannot be made heavier: its layers have no linear {', '.join(missing)}. Models "
            "built like Llama and Qwen can."
        )
    return layers


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _work(module: nn.Module) -> int:
    """Multiplications per token in a module's linear layers."""
    return sum(each.weight.numel() for each in module.modules() if isinstance(each, nn.Linear))


def _step_work(model: PreTrainedModel) -> int:
    """Multiplications per token in all layers and the head."""
    return sum(map(_work, _layers(model))) + model.get_output_embeddings().weight.numel()


def _column_work(layer: nn.Module) -> int:
    """Multiplications per token that one column of a layer's MLP takes."""
    work = sum(_work(_linear(layer, f"mlp.{name}")) for name in MLP)
    return work // _linear(layer, "mlp.down_proj").in_features


def _append_layer(model: PreTrainedModel, index: int) -> None:
    """Add a layer that computes as the one at `index` does, and nothing comes of it."""
    layers, config = _layers(model), model.config.get_text_config()
    layer = copy.deepcopy(layers[index], {id(config): config})
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = len(layers)  # type: ignore[assignment]
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types, config.layer_types[index]]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        for parameter in layer.get_submodule(name).parameters():
            parameter.data = torch.zeros_like(parameter)
    layers.append(layer)
    config.num_hidden_layers = len(layers)


def _widen(layer: nn.Module, num_columns: int) -> None:
    """Give the MLP of a layer whose down-projection is zero more columns."""
    if not num_columns:
        return
    gate, up, down = (_linear(layer, f"mlp.{name}") for name in MLP)
    for linear in (gate, up):
        rows = torch.arange(linear.out_features + num_columns, device=linear.weight.device) % linear.out_features
        for parameter in linear.parameters():
            parameter.data = parameter[rows].detach()
        linear.out_features += num_columns
    down.in_features += num_columns
    down.weight.data = down.weight.new_zeros(down.out_features, down.in_features)


@torch.no_grad()
def _check_same(model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Refuse a model of which this is not true: it may scale what layers write, or share keys between them."""
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, NUM_TRIAL_TOKENS), generator=generator).to(model.device)
    if not torch.equal(model(ids).logits, twin(ids).logits):
        raise NotImplementedError(
            f"{type(model).__name__} cannot be made heavier: layers that write zeros change its output."
        )
