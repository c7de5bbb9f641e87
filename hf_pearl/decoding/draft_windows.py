"""What the draft computes of one request in a step."""

from __future__ import annotations

from collections.abc import Sequence

from .draft_tree import DraftTree, Node
from .messages import Branches, Window

MAX_PREFILL_TOKENS = 1024


def draft_window(request_id: int, tree: DraftTree, nodes: Sequence[Node], length: int) -> Window:
    """The window of some leaves of a tree, of which `length` tokens are in the cache.

    The root alone stands for all that is verified and not computed, or for as much of it as a step takes: no logits are
    wanted then.
    """
    if nodes[0].parent is None:
        tokens = tree.verified[length:]
        is_cut = len(tokens) > MAX_PREFILL_TOKENS
        return Window(request_id, tuple(tokens[:MAX_PREFILL_TOKENS]), int(not is_cut))
    paths = [(*tree.path(node), length + place) for place, node in enumerate(nodes)]
    is_line = len(nodes) == 1 and len(paths[0]) == length + 1 - tree.num_verified
    branches = None if is_line else Branches(tree.num_verified, tuple(paths))
    return Window(request_id, tuple(node.token_id for node in nodes), len(nodes), branches)
