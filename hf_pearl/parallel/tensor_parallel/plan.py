"""Which parts of a model are cut and how, from transformers' own tensor-parallel plan (`model.tp_plan`).

The plan names linear layers: of those that are "colwise" a rank has some outputs, of the "rowwise" ones behind them the
inputs that go with these. It does not say where heads begin, so that it is read layer by layer (`layers.py`). Whatever
is not understood is refused, and so is a model of which the plan leaves matrices whole, or that no test compares.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from ...errors import PearlUnsupportedModelError
from ...models import is_quantised
from .cuts import Cut, HeadLayout, Piece, even_piece
from .layers import PACKED, cut_layer

# Families whose parts tests compare with the whole (docs/models.md).
CUT_FAMILIES = frozenset(
    {
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt_neox",
        "granite",
        "llama",
        "mistral",
        "olmo",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
        "starcoder2",
    }
)
# Packed projections and what follows them are whole in transformers' plan, since cutting them in two would mix what is
# packed. Here every one of what is packed is cut by itself.
_STYLES_OF_PACKED = frozenset({"colwise_gather_output", "rowwise_split_input"})
_ROWWISE = frozenset({"rowwise", "rowwise_split_input"})
_WHOLE = "replicated_with_grad_allreduce"


@dataclass
class Plan:
    """What of a model a rank holds.

    Attributes
    ----------
    embeddings, head : str
        Names of the modules.
    vocabulary : Piece
        This rank's tokens.
    cuts : dict of str to Cut
        By the names of parameters; all others are whole on every rank.
    rows : list of str
        Linear layers whose outputs are summed over the ranks.
    layouts : dict of str to HeadLayout
        By the names of attention layers.
    """

    embeddings: str
    head: str
    vocabulary: Piece
    cuts: dict[str, Cut] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    layouts: dict[str, HeadLayout] = field(default_factory=dict)

    def cut(self, name: str, module: nn.Module, dim: int, pieces: tuple[Piece, ...]) -> None:
        """Cut a module's weight, and its bias, if any, where outputs are cut."""
        self.cuts[f"{name}.weight"] = Cut(dim, pieces)
        if dim == 0 and getattr(module, "bias", None) is not None:
            self.cuts[f"{name}.bias"] = Cut(0, pieces)


def make_plan(model: PreTrainedModel, rank: int, size: int) -> Plan:
    """How `model` is cut for one of `size` ranks.

    Raises
    ------
    PearlUnsupportedModelError
        The model is quantised or has no plan, or there is something in it that would not be cut rightly, or not at all.
    """
    if is_quantised(model):
        raise unsupported(model, "its weights are quantised")
    plan = _cut_vocabulary(model, rank, size)
    for name, styles in _planned_layers(model, plan).items():
        layer = model.get_submodule(name)
        linears = {child: getattr(layer, child) for child in styles}
        rows = [child for child, style in styles.items() if style in _ROWWISE]
        if len(rows) != 1:
            raise unsupported(model, f"the plan of {name!r} has {len(rows)} rowwise projections, not one")
        row = linears.pop(rows[0])
        try:
            cut = cut_layer(linears, row, _head_dim(layer), rank, size)
        except ValueError as error:
            raise unsupported(model, f"{name!r} {error}") from None
        for child, pieces in cut.columns.items():
            plan.cut(f"{name}.{child}", linears[child], 0, pieces)
        plan.cut(f"{name}.{rows[0]}", row, 1, cut.row)
        plan.rows.append(f"{name}.{rows[0]}")
        if cut.layout is not None:
            plan.layouts[name] = cut.layout
    _check_nothing_is_left(model, plan)
    if model.config.model_type not in CUT_FAMILIES:
        raise unsupported(model, "no test has compared parts of such models with the whole")
    return plan


def unsupported(model: PreTrainedModel, reason: str) -> PearlUnsupportedModelError:
    """The error that says why, and what to do."""
    kind = f"{type(model).__name__} (model_type {model.config.model_type!r})"
    return PearlUnsupportedModelError(
        f"{kind} cannot be cut over several ranks: {reason}. Run it on one rank (size 1)."
    )


def _cut_vocabulary(model: PreTrainedModel, rank: int, size: int) -> Plan:
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embeddings, nn.Embedding) or type(head) is not nn.Linear:
        kinds = f"{type(embeddings).__name__} and {type(head).__name__}"
        raise unsupported(model, f"its embeddings and output layer are {kinds}, not Embedding and Linear")
    if embeddings.num_embeddings != head.out_features:
        raise unsupported(model, f"it has {embeddings.num_embeddings} embeddings and {head.out_features} logits")
    names = {id(module): name for name, module in model.named_modules()}
    plan = Plan(names[id(embeddings)], names[id(head)], even_piece(head.out_features, rank, size))
    plan.cut(plan.embeddings, embeddings, 0, (plan.vocabulary,))
    plan.cut(plan.head, head, 0, (plan.vocabulary,))
    return plan


def _planned_layers(model: PreTrainedModel, plan: Plan) -> dict[str, dict[str, str]]:
    """By the name of a layer: its projections, with their styles in transformers' plan."""
    if not model.tp_plan:
        raise unsupported(model, "transformers has no tensor-parallel plan for it")
    layers: dict[str, dict[str, str]] = {}
    for name, module in model.named_modules():
        style = model.tp_plan.get(re.sub(r"\.\d+\.", ".*.", name), _WHOLE)
        if style == _WHOLE or name in (plan.embeddings, plan.head):
            continue
        parent, _, child = name.rpartition(".")
        is_mixed = child in PACKED and style == "colwise"  # CodeGen packs in an order of its own
        if is_mixed or style not in {"colwise", "rowwise", *_STYLES_OF_PACKED}:
            raise unsupported(model, f"{name!r} is {style!r} in its plan")
        if type(module) is not nn.Linear:
            raise unsupported(model, f"{name!r} is a {type(module).__name__}, not a plain Linear")
        layers.setdefault(parent, {})[child] = style
    for name, styles in layers.items():
        if not PACKED & styles.keys() and _STYLES_OF_PACKED & set(styles.values()):
            raise unsupported(model, f"every rank needs all outputs of {name!r}")
    return layers


def _check_nothing_is_left(model: PreTrainedModel, plan: Plan) -> None:
    """Every matrix is cut, and what is whole in a layer that is cut would not notice."""
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if name in plan.cuts or owner in plan.rows:
            continue
        if parameter.ndim > 1:
            raise unsupported(model, f"its plan leaves {name!r} {tuple(parameter.shape)} whole on every rank")
        layer = next((layer for layer in plan.layouts if name.startswith(f"{layer}.")), None)
        if layer is not None and parameter.shape[0] != _head_dim(model.get_submodule(layer)):
            raise unsupported(model, f"{name!r} {tuple(parameter.shape)} is not one vector for all heads")


def _head_dim(layer: nn.Module) -> int | None:
    """The head dimension of an attention layer; None of another layer."""
    return getattr(layer, "head_dim", getattr(layer, "head_size", None))
