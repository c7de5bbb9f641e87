"""A stand-in for captures as strict as a graph: a replay fails where it reads other addresses than the capture did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_pearl.cache import kernels, torch_kernels
from hf_pearl.parallel.graphs import cuda_graphs
from hf_pearl.parallel.graphs.capture import Captured, RerunCapture, Run


class OutsideAddresses(TorchDispatchMode):
    """Collects where the memory lies that operations use and that none of them has made."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: set[int] = set()
        self._made: list[torch.Tensor] = []  # kept, so that no address is used twice
        self._own: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.numel():
                address = tensor.untyped_storage().data_ptr()
                if address not in self._own:
                    self.addresses.add(address)
        output = func(*args, **kwargs)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.addresses:
                self._made.append(tensor)
                self._own.add(tensor.untyped_storage().data_ptr())
        return output


class StrictCapture(RerunCapture):
    """The stand-in that knows addresses; it can fail at a capture, and calls `before_replay` before each replay."""

    def __init__(self, fails_at: int | None = None, before_replay: Callable[[], None] = lambda: None) -> None:
        self.num_captures = self.num_held = self.num_releases = 0
        self.fails_at, self.before_replay = fails_at, before_replay

    def capture(self, run: Run) -> Captured:
        """Keep `run`, and where it reads and writes."""
        self.num_captures += 1
        if self.num_captures == self.fails_at:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.num_held += 1
        return StrictReplay(self, run)

    def release(self) -> None:
        """All must have been reset."""
        assert self.num_held == 0
        self.num_releases += 1


class StrictReplay:
    """A call, to be made again on the same memory."""

    def __init__(self, owner: StrictCapture, run: Run) -> None:
        self._owner, self._run = owner, run
        self._addresses = self._addresses_of_run()

    def _addresses_of_run(self) -> set[int]:
        with OutsideAddresses() as outside:
            self._run()
        return outside.addresses

    def replay(self) -> None:
        """Make it."""
        self._owner.before_replay()
        assert self._addresses_of_run() == self._addresses

    def reset(self) -> None:
        """Forget it."""
        self._owner.num_held -= 1


def use_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `attention="triton"` served by the kernels' twins in torch, and capture what comes for the first time."""
    monkeypatch.setattr(kernels, "store", torch_kernels.store)
    monkeypatch.setattr(kernels, "move", torch_kernels.move)
    monkeypatch.setattr(kernels, "paged_attention", torch_kernels.paged_attention)
    monkeypatch.setattr(cuda_graphs, "CAPTURED_FROM", 1)


def capture_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[StrictCapture]:
    """Have engines capture on the CPU, and collect what captures."""
    made: list[StrictCapture] = []

    def capture_for(device: torch.device) -> StrictCapture:
        made.append(StrictCapture())
        return made[-1]

    monkeypatch.setattr(cuda_graphs, "capture_for", capture_for)
    return made
