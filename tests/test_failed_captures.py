"""After a capture that failed, whichever part of it did, the process is as it was before.

Without a GPU, a stand-in of torch's bookkeeping says what it would leave behind: that of torch 2.11, which stops at the
first error, and that of 2.13.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from hf_pearl.parallel.graphs import capture as capture_module
from hf_pearl.parallel.graphs.capture import CudaCapture
from hf_pearl.parallel.graphs.failed_capture import _failed

Pool = tuple[int, int]


class Bookkeeping:
    """What torch and the driver know of captures on one stream, in which one thing fails, and only once."""

    def __init__(self, is_torch_2_11: bool, fails_at: str) -> None:
        self.is_torch_2_11, self.fails_at = is_torch_2_11, fails_at
        self.num_users: Counter[Pool] = Counter()
        self.recording: set[Pool] = set()  # of the allocator of device memory
        self.pinned: set[Pool] = set()  # of that of pinned memory
        self.is_capturing = self.is_invalid = self.generator_captures = False
        self.num_pools = 0
        self.work_space: Pool | str | None = None  # in whose memory cuBLAS has one for the stream

    def reach(self, part: str) -> None:
        """Fail if it is this part's turn."""
        if self.fails_at == part:
            self.fails_at = "nothing"
            raise RuntimeError(f"{part} failed")

    def new_pool(self) -> Pool:
        self.num_pools += 1
        return (0, self.num_pools)

    def begin(self, pool: Pool) -> None:
        assert not torch.is_inference_mode_enabled(), "tensors that no capture outside of it could write to"
        self.generator_captures = self.is_torch_2_11
        self.reach("what comes before the capture")
        assert pool not in self.recording | self.pinned, "already recording to mempool_id"
        self.num_users[pool] += 1
        self.recording.add(pool), self.pinned.add(pool)
        self.reach("the beginning")
        self.is_capturing = True

    def end(self, pool: Pool) -> None:
        was_capturing, was_invalid = self.is_capturing, self.is_invalid
        self.is_capturing = self.is_invalid = False
        if not was_capturing or (was_invalid and self.is_torch_2_11):
            raise RuntimeError("cudaStreamEndCapture failed")
        self.end_allocation(0, pool), self.pinned.remove(pool)
        if was_invalid:
            raise RuntimeError("cudaStreamEndCapture failed")
        self.generator_captures = False

    def end_allocation(self, device: int, pool: Pool) -> None:
        if pool not in self.recording:
            raise RuntimeError("not currently recording to mempool_id")
        self.recording.remove(pool)

    def release(self, device: int, pool: Pool) -> None:
        assert self.num_users[pool] > 0, "a pool without users"
        self.num_users[pool] -= 1

    def multiply(self) -> Pool | str:
        """Have cuBLAS compute, in the work space that there is, or a new one; in whose memory that lies."""
        self.work_space = self.work_space or next(iter(self.recording), "everybody's")
        return self.work_space

    def clear_work_spaces(self) -> None:
        assert not self.is_capturing
        self.work_space = None

    def read_on_the_host(self) -> None:
        """Make a capture invalid, as `.item()` does."""
        self.is_invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")


class Graph:
    """`torch.cuda.CUDAGraph`, as far as it is used."""

    def __init__(self, books: Bookkeeping) -> None:
        self._books, self._pool, self._has_ended = books, (0, 0), False

    def capture_begin(self, pool: Pool | None = None, capture_error_mode: str = "global") -> None:
        self._pool = pool or self._books.new_pool()
        self._books.begin(self._pool)

    def capture_end(self) -> None:
        self._books.end(self._pool)
        self._has_ended = True
        self._books.reach("the instantiation")

    def pool(self) -> Pool:
        if not self._has_ended:
            raise RuntimeError("without a preceding successful capture")
        return self._pool

    def reset(self) -> None:
        if self._has_ended:
            self._books.release(0, self._pool)
        self._has_ended = False


@pytest.fixture(params=[True, False], ids=["2.11", "2.13"])
def books(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Bookkeeping:
    """Torch's captures, by the stand-in."""
    books = Bookkeeping(request.param, fails_at="nothing")
    stream = SimpleNamespace(priority=0, wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(books))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", books.new_pool)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(capture_module, "_capture_stream", lambda device, priority: stream)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", books.end_allocation)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", books.release)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", books.clear_work_spaces, raising=False)
    monkeypatch.setattr(capture_module, "NUM_WARM_UPS", 0)
    return books


@pytest.mark.parametrize("when", ["first", "beside others"])
@pytest.mark.parametrize(
    "part",
    ["what comes before the capture", "the beginning", "the call", "a read on the host", "a silent read",
     "an interrupt", "the instantiation"],
)  # fmt: skip
def test_nothing_is_left_of_a_capture_that_failed(part: str, when: str, books: Bookkeeping) -> None:
    capture = CudaCapture(torch.device("cpu", 0))
    others = [capture.capture(lambda: None) for _ in range(2 * (when != "first"))]
    books.fails_at = part

    def run() -> None:
        books.reach("the call")
        if part == "an interrupt":
            raise KeyboardInterrupt
        if part in ("a read on the host", "a silent read"):
            with contextlib.suppress(RuntimeError if part == "a silent read" else ()):
                books.read_on_the_host()

    words = {"a read on the host": "not permitted", "a silent read": "EndCapture", "an interrupt": "Interrupt"}
    with pytest.raises(BaseException) as raised:
        capture.capture(run)
    assert words.get(part, part) in repr(raised.value), "not what failed first, but what followed from it"
    _failed.clear()
    assert not books.recording and not books.is_capturing and not books.generator_captures
    assert books.num_users.total() == len(others)
    others.append(capture.capture(lambda: None))
    for other in others:
        other.reset()
    assert books.num_users.total() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_work_spaces_of_graphs_lie_in_their_own_memory_and_none_is_kept(
    fails: bool, books: Bookkeeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch keeps for a stream it may free at any time: when a graph ends, or somebody compiles another model."""
    monkeypatch.setattr(capture_module, "NUM_WARM_UPS", 1)
    captures = [CudaCapture(torch.device("cpu", 0)) for _ in range(2)]
    used: list[Pool | str] = []

    def run() -> None:
        used.append(books.multiply())
        books.reach("the call")

    for capture in captures:
        capture.capture(run)
        assert used[-1] == capture._pool and books.work_space is None
    assert used[0] == used[2] == "everybody's" and used[1] != used[3]
    if fails:
        books.fails_at = "the beginning"
        with pytest.raises(RuntimeError):
            captures[0].capture(run)
        assert books.work_space is None


@pytest.mark.usefixtures("books")
def test_a_capture_in_inference_mode_leaves_nothing_of_it_to_others() -> None:
    modes: list[bool] = []
    with torch.inference_mode():
        CudaCapture(torch.device("cpu", 0)).capture(lambda: modes.append(torch.is_inference_mode_enabled()))
    assert modes == [True]


def test_a_device_is_that_which_is_current_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    capture = CudaCapture(torch.device("cuda"))
    assert capture._device == torch.device("cuda", 1)


@pytest.mark.cuda
@pytest.mark.parametrize("is_invalid", [True, False])
def test_on_a_gpu_random_numbers_and_captures_go_on_after_one_that_failed(is_invalid: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    capture, number = CudaCapture(device), torch.ones(1, device=device)
    rooms: list[torch.Tensor] = []
    reserved, num_runs = [], 0

    def fails() -> None:
        nonlocal num_runs
        num_runs += 1
        rooms[:] = [torch.ones(2**22, device=device) * number]
        if num_runs > capture_module.NUM_WARM_UPS:
            number.item() if is_invalid else [][0]

    def double() -> None:
        number.mul_(2)

    other = capture.capture(double)
    for _ in range(3):
        num_runs = 0
        with pytest.raises((RuntimeError, IndexError), match=r"captur|range"):
            capture.capture(fails)
        rooms.clear()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved(device))
        assert torch.rand(4, device=device).unique().numel() == 4
        assert torch.randn(4, device="cpu").pin_memory().to(device, non_blocking=True).isfinite().all()
    assert reserved[2] <= reserved[0], "a pool of a failed capture was not given back"
    good = capture.capture(double)
    number.fill_(1.0)
    other.replay(), good.replay(), good.replay()
    assert number.item() == 8.0
    other.reset(), good.reset()


@pytest.mark.cuda
def test_on_a_gpu_a_graph_needs_no_work_space_that_others_may_free() -> None:
    """All that torch keeps is freed, and what is free overwritten: the graph multiplies as before."""
    device = torch.device("cuda", torch.cuda.current_device())
    capture, generator = CudaCapture(device), torch.Generator(device).manual_seed(1)
    row, weights = (
        torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
        for size in ((1, 8192), (1024, 8192))  # few rows and columns, a long sum: it is split, and put together there
    )
    output = torch.zeros(1, 1024, device=device, dtype=torch.bfloat16)

    def multiply() -> None:
        output.copy_(torch.nn.functional.linear(row, weights))

    graph = capture.capture(multiply)
    graph.replay()
    expected = output.clone()
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((2**20,), 7, dtype=torch.uint8, device=device) for _ in range(64)]
    graph.replay()
    torch.cuda.synchronize(device)
    assert torch.equal(output, expected) and all((each == 7).all() for each in others)
    graph.reset()
