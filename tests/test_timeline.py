"""`PearlStats.save_timeline`: what its file says is what happened."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import enabled_for_tiny_models, noisy_copy, random_prompts, tiny_model

from hf_pearl import PearlConfig
from hf_pearl.decoding.messages import DraftStep, Window
from hf_pearl.decoding.stats import PearlStats, TargetForward
from hf_pearl.parallel.streams import LaneStream, nvtx_range, on_lane_stream

WINDOW = Window(0, (1, 2), 1)


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    """`pearl=` for tiny models."""
    with enabled_for_tiny_models():
        yield


def saved(stats: PearlStats, folder: Path) -> list[dict[str, Any]]:
    """The events of the file that `stats` saves."""
    stats.save_timeline(folder / "timeline.json")
    content = json.loads((folder / "timeline.json").read_text("utf-8"))
    assert content["displayTimeUnit"] == "ms"
    return content["traceEvents"]


def test_times_are_microseconds_from_the_first_event_of_either_lane(tmp_path: Path) -> None:
    stats = PearlStats(
        target_timeline=[TargetForward(10.5, 10.75, 9, 4)],
        draft_timeline=[DraftStep(10.25, 10.5, 2), DraftStep(10.5, 10.625, 3)],
    )
    *names, forward, first, second = saved(stats, tmp_path)
    assert {each["ph"] for each in names} == {"M"}
    threads = {each["args"]["name"]: each["tid"] for each in names if each["name"] == "thread_name"}
    assert [forward["tid"], first["tid"], second["tid"]] == [
        threads["target lane"],
        threads["draft lane"],
        threads["draft lane"],
    ]
    assert forward == {
        "ph": "X",
        "cat": "target",
        "name": "9 tokens",
        "pid": 1,
        "tid": 1,
        "ts": 250_000.0,
        "dur": 250_000.0,
        "args": {"tokens": 9, "accepted draft tokens": 4},
    }
    assert (first["ts"], first["dur"], first["args"]) == (0.0, 250_000.0, {"guesses": 2})
    assert (second["ts"], second["dur"], second["name"]) == (250_000.0, 125_000.0, "3 guesses")


def test_what_profilers_call_a_trace_is_the_timeline(tmp_path: Path) -> None:
    stats = PearlStats(target_timeline=[TargetForward(10.5, 10.75, 9, 4)])
    stats.save_trace(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text("utf-8"))["traceEvents"] == saved(stats, tmp_path)


def test_a_call_without_any_forward_has_a_timeline_too(tmp_path: Path) -> None:
    assert {each["ph"] for each in saved(PearlStats(), tmp_path)} == {"M"}


@pytest.mark.parametrize("execution", ["inline", "threads", "processes"])
def test_the_timeline_of_a_call_holds_every_forward_of_both_lanes(execution: Any, seed: int, tmp_path: Path) -> None:
    target = tiny_model("llama", seed)
    draft = noisy_copy(target, 0.02, seed)
    inputs = random_prompts(random.Random(seed), 2, (5, 9))
    config = PearlConfig(execution=execution, draft_length=4)
    options = {"do_sample": False, "max_new_tokens": 24, "assistant_model": draft, "return_dict_in_generate": True}
    stats = target.generate(**inputs, **options, pearl=config).pearl
    events = [each for each in saved(stats, tmp_path) if each["ph"] == "X"]
    lanes = {lane: [each for each in events if each["cat"] == lane] for lane in ("target", "draft")}
    assert len(lanes["target"]) == stats.target_forwards > 0
    assert len(lanes["draft"]) == stats.draft_steps > 0
    accepted = [each["args"]["accepted draft tokens"] for each in lanes["target"]]
    assert sum(accepted) == stats.accepted_tokens > 0
    tokens = [each["args"]["tokens"] for each in lanes["target"]]
    assert sum(tokens) == stats.prefilled_tokens + stats.verified_draft_tokens + stats.decode_windows
    for lane in lanes.values():
        ends = [each["ts"] + each["dur"] for each in lane]
        assert all(each["dur"] > 0 for each in lane)
        assert all(end <= each["ts"] + 1e-2 for end, each in zip(ends, lane[1:], strict=False))
    seconds = sum(each["dur"] for each in lanes["target"]) / 1e6
    assert seconds == pytest.approx(stats.target_seconds, rel=1e-3)
    assert "timeline" not in repr(stats)


def test_elsewhere_than_on_cuda_streams_and_ranges_do_nothing() -> None:
    device = torch.device("cpu")
    stream = LaneStream(device, is_urgent=True)
    with stream.running(), on_lane_stream(device), nvtx_range(device, "target", [WINDOW]):
        assert torch.ones(2).sum() == 2
    stream.join()
    assert nvtx_range(device, "target", [WINDOW]) is nvtx_range(device, "draft", [])


@pytest.mark.cuda
def test_on_cuda_lanes_have_streams_that_wait_for_the_caller_and_it_for_them() -> None:
    device = torch.device("cuda", 0)
    outer, numbers = torch.cuda.current_stream(device), torch.zeros(1 << 24, device=device)
    numbers += 1
    draft = LaneStream(device, is_urgent=True)
    with on_lane_stream(device), nvtx_range(device, "target", [WINDOW]):
        inner = torch.cuda.current_stream(device)
        numbers *= 3
    assert inner != outer and torch.cuda.current_stream(device) == outer
    assert numbers.sum().item() == 3 << 24
    with draft.running():
        assert torch.cuda.current_stream(device).priority < inner.priority
    draft.join()
    with on_lane_stream(device):
        assert torch.cuda.current_stream(device) == inner  # one for all calls: freed memory is kept by stream
