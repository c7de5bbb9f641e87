"""The captured forwards of an engine's lanes, from call to call."""

from __future__ import annotations

from transformers import PreTrainedModel

from ...cache import PagedPrefixCache
from .cuda_graphs import GraphRunner, make_runner


class LaneGraphs:
    """A runner for each of an engine's lanes."""

    def __init__(self) -> None:
        self._runners: dict[str, GraphRunner] = {}
        self._num_forgotten = 0

    @property
    def num_warm_ups(self) -> int:
        """Of every runner that there was."""
        return self._num_forgotten + sum(runner.num_warm_ups for runner in self._runners.values())

    def runner(
        self, name: str, model: PreTrainedModel, cache: PagedPrefixCache, compiles: bool = False
    ) -> GraphRunner | None:
        """The runner of the lane `name`; None where nothing can be captured."""
        runner = self._runners.get(name)
        if runner is not None and runner.cache is cache and runner.compiles == compiles:
            return runner
        self.forget(name)
        runner = make_runner(model, cache, compiles)
        if runner is not None:
            self._runners[name] = runner
        return runner

    def forget(self, name: str) -> None:
        """Keep no runner of the lane `name`: its memory goes with its last user, a thread that was left behind."""
        runner = self._runners.pop(name, None)
        self._num_forgotten += 0 if runner is None else runner.num_warm_ups

    def release(self) -> None:
        """Give everything back."""
        for name, runner in list(self._runners.items()):
            runner.release()
            self.forget(name)
