"""Whether two models can have one tokenizer. They do not know theirs, so that only the sizes of vocabularies tell."""

from __future__ import annotations

from transformers import PreTrainedModel

MAX_PADDING = 1024  # entries by which vocabularies of one tokenizer differ at most: they are padded to multiples


def vocabulary_sizes(target: PreTrainedModel, draft: PreTrainedModel) -> tuple[int, int]:
    """Tokens of both vocabularies, as configured: those of an output layer that was shortened count, too."""
    target_size, draft_size = (model.config.get_text_config(decoder=True).vocab_size for model in (target, draft))
    return target_size, draft_size


def can_share_a_tokenizer(target: PreTrainedModel, draft: PreTrainedModel) -> bool:
    """Whether the sizes of both vocabularies differ by no more than padding."""
    target_size, draft_size = vocabulary_sizes(target, draft)
    return abs(target_size - draft_size) <= MAX_PADDING


def check_vocabularies(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Raise `ValueError`, naming `draft`, for models that cannot have one tokenizer."""
    if not can_share_a_tokenizer(target, draft):
        target_size, draft_size = vocabulary_sizes(target, draft)
        raise ValueError(
            f"`draft` must have the vocabulary of `target`, which has {target_size} tokens; got one of {draft_size}. "
            f"Sizes may differ by padding (up to {MAX_PADDING}). Take a draft that was made with the target's "
            "tokenizer."
        )
