"""The three modules of a rank that speak with the others; all other linear layers are plain ones with fewer rows.

Shapes: `I` local inputs, `O` outputs, `V` the vocabulary, `L` local tokens of it, `H` the width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Collective = Callable[[torch.Tensor], torch.Tensor]


class RowParallelLinear(nn.Module):
    """A linear layer of which this rank has some of the inputs; outputs are summed over the ranks.

    Parameters
    ----------
    linear : torch.nn.Linear
        With this rank's weight `(O, I)` and, if any, the whole bias, which is added once.
    all_reduce : callable
        Sums a tensor over the ranks.
    """

    def __init__(self, linear: nn.Linear, all_reduce: Collective) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.all_reduce = all_reduce

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`(..., I)` to `(..., O)`, the same on every rank."""
        outputs = self.all_reduce(F.linear(inputs, self.weight))
        return outputs if self.bias is None else outputs + self.bias


class VocabParallelEmbedding(nn.Module):
    """Embeddings of which this rank has the tokens from `first` on; what others have, they add.

    Parameters
    ----------
    embedding : torch.nn.Embedding
        With this rank's weight `(L, H)`; it may do more than look up (Gemma's scale).
    num_embeddings : int
        `V`.
    """

    def __init__(self, embedding: nn.Embedding, first: int, num_embeddings: int, all_reduce: Collective) -> None:
        super().__init__()
        self.embedding = embedding
        self.first = first
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding.embedding_dim
        self.all_reduce = all_reduce

    @property
    def weight(self) -> torch.Tensor:
        """`(L, H)`."""
        return self.embedding.weight

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`(...)` to `(..., H)`, the same on every rank."""
        places = token_ids - self.first
        is_elsewhere = (places < 0) | (places >= self.weight.shape[0])
        embedded = self.embedding(places.masked_fill(is_elsewhere, 0))
        return self.all_reduce(embedded.masked_fill(is_elsewhere.unsqueeze(-1), 0))


class VocabParallelHead(nn.Module):
    """The output layer, of which this rank has some tokens; every rank gets the logits of all.

    Parameters
    ----------
    linear : torch.nn.Linear
        With this rank's weight `(L, H)` and, if any, bias `(L,)`.
    out_features : int
        `V`; the rows of zeros behind the last token are left out.
    all_gather : callable
        Joins the ranks' tensors along the last dimension.
    """

    def __init__(self, linear: nn.Linear, out_features: int, all_gather: Collective) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, out_features
        self.all_gather = all_gather

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., H)` to `(..., V)`."""
        return self.all_gather(F.linear(hidden, self.weight, self.bias))[..., : self.out_features]
