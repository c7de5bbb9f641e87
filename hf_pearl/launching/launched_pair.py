"""`LaunchedPair`: what `launch` returns."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NoReturn

from transformers import Pipeline, PreTrainedModel, PreTrainedTokenizerBase, pipeline

from ..enabling import disable, enable_pair
from ..errors import PearlWorkerError
from ..parallel.ranks.models import close_ranks, is_whole
from ..registry import release


class LaunchedPair:
    """A target and a draft, each on its ranks; a context manager that ends them. Made by `launch`.

    Attributes
    ----------
    target : PreTrainedModel
        What `generate` and pipelines are called on; PEARL with this draft is its default. Where it lies on several
        ranks this is the first one's part, and cannot be called by itself.
    draft : PreTrainedModel or None
        The draft; where it lies on several ranks, its configuration without weights.
    """

    def __init__(self, target: PreTrainedModel, draft: PreTrainedModel | None) -> None:
        self.target = target
        self.draft = draft
        self._is_closed = False
        enable_pair(target, draft)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`target.generate` with `assistant_model` and `pearl` filled in; both may be given.

        Raises
        ------
        PearlWorkerError
            A rank of the target has ended or hangs; the next call starts its ranks anew. Or the pair has been closed.
        """
        self._check_open()
        return self.target.generate(*args, **kwargs)

    def _check_open(self) -> None:
        if self._is_closed:
            raise PearlWorkerError("this pair has been closed: `launch` it again.")

    def pipeline(self, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Pipeline:
        """transformers' "text-generation" pipeline over the target, whose calls run with PEARL and the draft."""
        self._check_open()
        return pipeline("text-generation", model=self.target, tokenizer=tokenizer, **options)

    def close(self) -> None:
        """End all ranks and workers; harmless to repeat. Garbage collection does the same.

        A callback of a running call cannot (`RuntimeError`).

        A target in one piece is an ordinary model then, without PEARL.
        """
        models = [model for model in (self.target, self.draft) if model is not None]
        for model in models:  # Refused inside a call: nothing has changed then.
            release(model)
        if not self._is_closed:
            self._is_closed = True
            if is_whole(self.target):
                disable(self.target)
        for model in models:
            close_ranks(model)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a launched pair is not copied or pickled: its processes serve one owner. Where another one is needed, "
            "call `launch` there, with the same arguments."
        )

    def __enter__(self) -> LaunchedPair:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
