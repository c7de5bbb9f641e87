"""How an attention or a feed-forward layer is cut, once it is known which of its projections do what.

Shapes: `H` query heads, `K` key-value heads, `D` the head dimension, `I` the width between the two halves of a layer.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .cuts import HeadLayout, Piece, even_piece

PACKED = frozenset({"qkv_proj", "gate_up_proj"})  # several projections in one, one behind the other
_SEPARATE = frozenset({"q_proj", "k_proj", "v_proj"})
_PACKED_BY_HEAD = "query_key_value"  # of each head in turn its query, key and value: `(H, 3, D)`


class LayerCut(NamedTuple):
    """A rank's part of a layer.

    Attributes
    ----------
    columns : dict of str to tuple of Piece
        Outputs of the projections that come first, by name.
    row : tuple of Piece
        Inputs of the projection behind them.
    layout : HeadLayout or None
        Of an attention layer.
    """

    columns: dict[str, tuple[Piece, ...]]
    row: tuple[Piece, ...]
    layout: HeadLayout | None = None


def cut_layer(columns: dict[str, nn.Linear], row: nn.Linear, head_dim: int | None, rank: int, size: int) -> LayerCut:
    """Cut a layer with the projections `columns` and behind them `row`; `head_dim` is `D` of an attention layer.

    Raises
    ------
    ValueError
        Names and shapes are not those of a layer that is known; the message says in which way.
    """
    if head_dim is None:
        return _cut_feed_forward(columns, row, rank, size)
    num_heads, rest = divmod(row.in_features, head_dim)
    names = frozenset(columns)
    rows = {name: linear.out_features // head_dim for name, linear in columns.items()}  # in heads
    if names == _SEPARATE:
        num_kv_heads = rows["k_proj"]
        expected = {"q_proj": num_heads, "k_proj": num_kv_heads, "v_proj": num_kv_heads}
    elif names == {"qkv_proj"}:
        num_kv_heads = (rows["qkv_proj"] - num_heads) // 2
        expected = {"qkv_proj": num_heads + 2 * num_kv_heads}
    elif names == {_PACKED_BY_HEAD}:
        num_kv_heads = num_heads
        expected = {_PACKED_BY_HEAD: 3 * num_heads}
    else:
        raise ValueError(f"has the projections {', '.join(sorted(columns))}, which are not known")
    fits = all(columns[name].out_features == heads * head_dim for name, heads in expected.items())
    if rest or not fits or num_kv_heads < 1 or num_heads % num_kv_heads:
        shapes = ", ".join(f"{name} {linear.out_features}" for name, linear in columns.items())
        raise ValueError(f"has {shapes} outputs and {row.in_features} inputs, which are no heads of {head_dim}")
    layout = HeadLayout.of(num_heads, num_kv_heads, size)
    queries, keys = layout.queries(rank, head_dim), layout.keys(rank, head_dim)
    if names == _SEPARATE:
        return LayerCut({"q_proj": queries, "k_proj": keys, "v_proj": keys}, queries, layout)
    if names == {_PACKED_BY_HEAD}:
        return LayerCut({_PACKED_BY_HEAD: layout.queries(rank, 3 * head_dim)}, queries, layout)
    starts = (num_heads * head_dim, (num_heads + num_kv_heads) * head_dim)
    behind = tuple(key.behind(start) for start in starts for key in keys)
    return LayerCut({"qkv_proj": queries + behind}, queries, layout)


def _cut_feed_forward(columns: dict[str, nn.Linear], row: nn.Linear, rank: int, size: int) -> LayerCut:
    width = row.in_features
    piece = even_piece(width, rank, size)
    pieces = {}
    for name, linear in columns.items():
        num_packed = 2 if name in PACKED else 1
        if linear.out_features != num_packed * width:
            raise ValueError(f"has {name} with {linear.out_features} outputs before a projection of {width} inputs")
        pieces[name] = tuple(piece.behind(place * width) for place in range(num_packed))
    return LayerCut(pieces, (piece,))
