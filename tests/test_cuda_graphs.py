"""Captured forwards, on a CPU: everything but the capture itself, whose stand-in calls again what was captured."""

from __future__ import annotations

import gc
import logging
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import interpreter  # noqa: F401  (skips where there is no Triton)
import pytest
import torch
from models import (
    assert_equal,
    assert_nothing_held,
    assert_varied,
    enabled_for_tiny_models,
    noisy_copy,
    random_prompts,
    tiny_model,
)
from strict_capture import StrictCapture, capture_on_cpu, use_twins
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessorList

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.cache import PagedPrefixCache
from hf_pearl.cache.block_pool import BlockPool
from hf_pearl.cache.step_tables import Bounds, Limits
from hf_pearl.decoding.calibration import Calibration
from hf_pearl.decoding.drafting import Drafter
from hf_pearl.decoding.messages import Admission, Branches, Verdict, Window
from hf_pearl.decoding.proposal import Proposer
from hf_pearl.parallel.graphs import cuda_graphs
from hf_pearl.parallel.graphs.buckets import NUM_TOKENS, bucket_of, largest_like, limits_of
from hf_pearl.parallel.graphs.capture import CudaCapture, capture_for
from hf_pearl.parallel.graphs.cuda_graphs import GraphRunner
from hf_pearl.parallel.graphs.obstacles import obstacle_to_capture
from hf_pearl.parallel.lane import ModelLane
from hf_pearl.parallel.tensor_parallel import shard
from hf_pearl.registry import engines_of


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    """`pearl=` for tiny models."""
    with enabled_for_tiny_models():
        yield


@pytest.fixture(autouse=True)
def twins(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the kernels themselves compute: their twins read on the host, which no capture can."""
    if request.node.get_closest_marker("cuda"):
        monkeypatch.setattr(cuda_graphs, "CAPTURED_FROM", 1)
    else:
        use_twins(monkeypatch)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[StrictCapture]:
    return capture_on_cpu(monkeypatch)


# -- forwards ---------------------------------------------------------------------------------------------------------


class TwoLanes:
    """One model in two lanes, of which one replays: same windows, same logits."""

    def __init__(
        self, architecture: str, seed: int, max_graphs: int = 32, capture: StrictCapture | None = None
    ) -> None:
        self.model = tiny_model(architecture, seed)
        self.cache = PagedPrefixCache(self.model.config, 64, block_size=8)
        self.cache.backend.use("triton")
        self.capture = capture or StrictCapture()
        self.runner = GraphRunner(self.model, self.cache, self.capture, max_graphs)
        self.replaying = ModelLane(self.model, self.cache, prefix_cache=False, graphs=self.runner)
        self.plain = ModelLane(self.model, PagedPrefixCache(self.model.config, 64, block_size=8), prefix_cache=False)
        self.both = (self.replaying, self.plain)
        self.chance = random.Random(seed)
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def admit(self, *request_ids: int) -> None:
        """Begin sequences."""
        for lane in self.both:
            for request_id in request_ids:
                lane.admit(request_id, (), 64)

    def tokens(self, number: int) -> tuple[int, ...]:
        """Random tokens; some the model does not know."""
        return tuple(self.chance.randrange(1, self.model.config.vocab_size + 2) for _ in range(number))

    def window(self, request_id: int, number: int, is_tree: bool = False) -> Window:
        """New tokens of a sequence, behind each other or on branches behind its last token."""
        length = self.plain.length(request_id)
        num_logits = number if is_tree else self.chance.choice([0, 1, number])
        branches = None
        if is_tree:
            paths: list[tuple[int, ...]] = []
            for place in range(length, length + number):
                parent = self.chance.choice([(), *paths])
                paths.append((*parent, place))
            branches = Branches(length, tuple(paths))
        return Window(request_id, self.tokens(number), num_logits, branches)

    def forward(self, *windows: Window) -> torch.Tensor:
        """The logits, which both lanes agree on."""
        replayed, expected = (lane.forward(windows) for lane in self.both)
        if self._last is not None:  # A later forward must not write to them.
            torch.testing.assert_close(*self._last, rtol=1e-9, atol=1e-9)
        self._last = replayed, expected
        assert replayed.shape == expected.shape
        torch.testing.assert_close(replayed, expected, rtol=1e-9, atol=1e-9)
        assert replayed.argmax(dim=-1).tolist() == expected.argmax(dim=-1).tolist()
        return expected

    def poison(self) -> None:
        """Make NaN of all that no sequence holds, and of what forwards wrote to before."""
        slots = torch.ones(self.cache.num_slots, dtype=torch.bool)
        for sequence in self.replaying._sequences.values():
            for place in range(sequence.length):
                slots[sequence.block_table[place // 8] * 8 + place % 8] = False
        for layer in self.cache.layers:
            for pool in layer.pools or ():
                pool.data[:, :, slots] = torch.nan
        for static in self.runner.forwards.values():
            for output in static._step._outputs.values():
                output.fill_(torch.nan)
        if self.runner._logits is not None:
            self.runner._logits.fill_(torch.nan)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
def test_replays_give_the_logits_of_plain_forwards_whatever_lies_in_padding(architecture: str, seed: int) -> None:
    lanes = TwoLanes(architecture, seed)
    lanes.capture.before_replay = lanes.poison
    chance, choices = lanes.chance, set()
    with lanes.replaying.ready(), lanes.plain.ready():
        lanes.admit(0, 1, 2)
        lanes.forward(*(lanes.window(each, chance.choice([2, 9, 20])) for each in range(3)))  # It makes the pools.
        for step in range(1, 41):
            rows = sorted(chance.sample(range(3), chance.choice([1, 1, 2, 3])))
            before = {row: lanes.plain.length(row) for row in rows}
            sizes = [1] * 3 if chance.random() < 0.3 else [1, 2, 5, 11]
            windows = [lanes.window(row, chance.choice(sizes), chance.random() < 0.5) for row in rows]
            choices.update(lanes.forward(*windows).argmax(dim=-1).tolist())
            assert lanes.runner.num_replays == step
            for window in windows:  # As after a verdict: some stay, and those of a branch move up.
                row, num_first = window.request_id, before[window.request_id]
                stood = () if window.branches is None else chance.choice(window.branches.paths)
                for lane in lanes.both:
                    if window.branches is not None:
                        lane.keep(row, num_first, stood)
                    if lane.length(row) > 45:
                        lane.rollback(row, 25)
    captured = list(lanes.runner.forwards)
    assert {True, False} == {each.has_trees for each in captured} == {each.max_queries == 1 for each in captured}
    assert len({each.num_sequences for each in captured}) > 2 and len(choices) > 5


def test_what_is_too_large_for_a_capture_runs_as_before(seed: int) -> None:
    lanes = TwoLanes("llama", seed)
    with lanes.replaying.ready(), lanes.plain.ready():
        lanes.admit(0, 1)
        lanes.forward(lanes.window(0, 3), lanes.window(1, 2))
        lanes.forward(lanes.window(0, NUM_TOKENS[-1] + 1))
        seen = tuple(range(2, lanes.plain.length(0) + 1))
        lanes.forward(Window(0, lanes.tokens(1), 1, Branches(2, (seen,))))  # a tree of more places than tables hold
        assert lanes.runner.num_replays == 0
        lanes.forward(lanes.window(1, 3))
        assert lanes.runner.num_replays == 1


def test_graphs_are_bounded_in_number_and_the_least_recently_used_goes(seed: int) -> None:
    lanes = TwoLanes("llama", seed, max_graphs=3)
    with lanes.replaying.ready(), lanes.plain.ready():
        lanes.admit(0)
        for number in (3, 1, 2, 4, 1, 8, 1, 2):
            lanes.forward(lanes.window(0, number))
            assert lanes.capture.num_held == len(lanes.runner.forwards) <= 3
        # The first capture of all was the largest; 2 tokens came again after they had been given up.
        assert lanes.capture.num_captures == 6
        assert [each.num_tokens for each in lanes.runner.forwards] == [8, 1, 2]


def test_a_size_is_captured_when_it_comes_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "CAPTURED_FROM", 2)
    lanes = TwoLanes("llama", seed)
    with lanes.replaying.ready(), lanes.plain.ready():
        lanes.admit(0)
        replays, warm_ups = [], []
        for number in (5, 1, 1, 6, 1, 7):
            lanes.forward(lanes.window(0, number))
            replays.append(lanes.runner.num_replays)
            warm_ups.append(lanes.replaying.num_warm_ups)
    assert replays == [0, 0, 1, 1, 2, 3]  # The first makes the pools; 6 and 7 tokens are of one size.
    assert warm_ups == [0, 1, 2, 3, 3, 4]


def test_what_is_counted_of_steps_stays_bounded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every temperature is a kind of chains of its own."""
    monkeypatch.setattr(cuda_graphs, "MAX_COUNTED", 4)
    lanes = TwoLanes("llama", seed)
    for number in range(50):
        lanes.runner._comes_again(number)
        assert len(lanes.runner._num_steps) <= 4
    assert lanes.runner._comes_again(49), "the last ones are known"


def test_a_failed_capture_is_said_once_and_costs_no_token(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    lanes = TwoLanes("llama", seed, capture=StrictCapture(fails_at=3))
    with lanes.replaying.ready(), lanes.plain.ready(), heard(caplog):
        lanes.admit(0)
        for number in (3, 1, 1, 2, 1, 4):
            lanes.forward(lanes.window(0, number))
    assert lanes.runner.num_replays == 2 and not lanes.runner.forwards and not lanes.runner.can_use()
    assert lanes.capture.num_held == 0 and lanes.capture.num_releases == 1
    said = [each.getMessage() for each in caplog.records if "not captured" in each.getMessage()]
    assert len(said) == 1 and "LlamaForCausalLM" in said[0] and "stream is capturing" in said[0]


def test_a_cache_that_grows_is_captured_anew(seed: int) -> None:
    lanes = TwoLanes("llama", seed)
    lanes.cache.pool = BlockPool(2, 64)
    layouts = set()
    with lanes.replaying.ready(), lanes.plain.ready():
        lanes.admit(0)
        for _ in range(12):
            lanes.forward(lanes.window(0, 5))
            layouts.add(lanes.cache.layout)
    assert len(layouts) > 2 and lanes.runner.num_replays == 11
    assert lanes.capture.num_releases == len(layouts) - 1


class Factories(TorchDispatchMode):
    """Collects the operations that make tensors of no other."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(isinstance(each, torch.Tensor) for each in tree_leaves((args, kwargs))):
            self.made.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_fills_the_buffers_that_there_are(seed: int) -> None:
    lanes = TwoLanes("llama", seed)
    with lanes.replaying.ready(), lanes.plain.ready():
        lanes.admit(0)
        for number in (4, 4):
            lanes.forward(lanes.window(0, number))
        (static,) = [each for bucket, each in lanes.runner.forwards.items() if bucket.num_tokens == 4]
        addresses = [tensor.data_ptr() for tensor in (static.numbers, *static.tables.on_device)]
        fill, made = static.fill, []

        def counted_fill(*arguments: Any) -> None:
            with Factories() as factories:
                fill(*arguments)
            made.extend(factories.made)

        static.fill = counted_fill  # type: ignore[method-assign]
        for _ in range(3):
            lanes.forward(lanes.window(0, 3))
        assert lanes.runner.num_replays == 4 and made == []
        assert [tensor.data_ptr() for tensor in (static.numbers, *static.tables.on_device)] == addresses
        with Factories() as factories:
            torch.zeros(1)
        assert factories.made


def test_nobody_waits_for_a_capture_that_does_not_end_and_it_is_tried_again(
    seed: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cuda_graphs, "CAPTURE_TIMEOUT", 0.1)
    lanes = TwoLanes("gpt2", seed)
    with lanes.replaying.ready(), lanes.plain.ready(), heard(caplog):
        lanes.admit(0)
        with cuda_graphs._capture_lock:
            for number in (3, 1, 1):
                lanes.forward(lanes.window(0, number))
        assert lanes.runner.num_replays == lanes.capture.num_captures == 0 and lanes.runner.can_use()
        lanes.forward(lanes.window(0, 1))
        assert lanes.runner.num_replays == 1
    assert len([each for each in caplog.records if "did not end within 0.1 s" in each.getMessage()]) == 1


def test_times_of_steps_that_captured_are_not_learnt(seed: int) -> None:
    model = tiny_model("llama", seed)
    cache = PagedPrefixCache(model.config, 64, block_size=8)
    cache.backend.use("triton")
    lane = ModelLane(model, cache, prefix_cache=False, graphs=GraphRunner(model, cache, StrictCapture()))
    drafter = Drafter(lane, Proposer(model.config.vocab_size, LogitsProcessorList()), Calibration(), free_running=False)
    learnt: list[int] = []
    drafter.time_step = lambda num_guesses, seconds: learnt.append(num_guesses)  # type: ignore[method-assign]
    with lane.ready():
        drafter.handle(Admission(0, (3, 1, 4, 1, 5, 9), 60, 0, None))
        for number in range(1, 4):
            for _ in range(2):
                before = lane.num_warm_ups, len(learnt)
                drafter.step()
                is_prefill = number == 1 and not learnt and lane.length(0) == 6
                assert (len(learnt) > before[1]) == (lane.num_warm_ups == before[0] and not is_prefill)
            drafter.handle(Verdict(0, number, (7,)))
    assert lane.num_warm_ups > 0 and learnt


# -- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["inline", "threads"])
@pytest.mark.parametrize(("architecture", "batch_size"), [("llama", 3), ("mistral", 1)])
def test_calls_on_captured_forwards_give_the_tokens_of_generate(
    architecture: str, batch_size: int, execution: Any, seed: int, captures: list[StrictCapture]
) -> None:
    target = tiny_model(architecture, seed)
    draft = noisy_copy(target, 0.05, seed)
    inputs = random_prompts(random.Random(seed), batch_size, (5, 20))
    # Whether to wait for a draft that computes as slowly as its target is a matter of time: the length is fixed.
    config = PearlConfig(draft_length=4, execution=execution, attention="triton")
    for _ in range(2):
        expected, output = assert_equal(target, draft, inputs, config, max_new_tokens=20)
    assert_varied(expected)
    assert output.pearl.draft_steps > 0 and output.pearl.verified_draft_tokens > 0
    (engine,) = engines_of(target)
    assert len(captures) == 2 and all(each.num_captures > 1 for each in captures)
    replays = [runner.num_replays + runner.num_chains for runner in engine.graphs._runners.values()]
    assert len(replays) == 2 and min(replays) > 5
    assert_nothing_held(target)
    hf_pearl.release(target)
    assert [each.num_held for each in captures] == [0, 0]


def test_sampled_tokens_are_the_same_with_captured_forwards(seed: int, captures: list[StrictCapture]) -> None:
    target = tiny_model("llama", seed)
    draft = noisy_copy(target, 0.05, seed)
    inputs = random_prompts(random.Random(seed), 2, (5, 9))

    class Uncaptured(PearlConfig):
        captures = False

    options = {"do_sample": True, "max_new_tokens": 20, "assistant_model": draft}
    settings = {"execution": "threads", "attention": "triton", "seed": 3}
    outputs = [
        target.generate(**inputs, **options, pearl=kind(**settings)).tolist() for kind in (Uncaptured, PearlConfig)
    ]
    assert outputs[0] == outputs[1] and captures[0].num_captures > 0


def test_weights_that_change_are_seen_and_their_graphs_released(seed: int, captures: list[StrictCapture]) -> None:
    target = tiny_model("llama", seed)
    inputs = random_prompts(random.Random(seed), 1, (6,))
    config = PearlConfig(execution="inline", attention="triton")
    first, _ = assert_equal(target, None, inputs, config, max_new_tokens=12)
    changed = noisy_copy(target, 1.0, seed)
    target.load_state_dict(changed.state_dict())
    second, _ = assert_equal(target, None, inputs, config, max_new_tokens=12)
    assert captures[0].num_releases == 1
    with torch.no_grad():
        target.lm_head.weight = torch.nn.Parameter(target.lm_head.weight.flip(0))
    third, _ = assert_equal(target, None, inputs, config, max_new_tokens=12)
    assert captures[0].num_releases == 2 and len({str(each) for each in (first, second, third)}) == 3
    num_captures = captures[0].num_captures
    hf_pearl.clear_cache(target)
    assert_equal(target, None, inputs, config, max_new_tokens=12)
    assert captures[0].num_releases == 3 and captures[0].num_captures > num_captures
    target.generate(**inputs, max_new_tokens=12, pearl=PearlConfig(execution="inline", attention="sdpa"))
    assert captures[0].num_releases == 3


def test_an_engine_keeps_no_model_alive(seed: int, captures: list[StrictCapture]) -> None:
    target = tiny_model("llama", seed)
    inputs = random_prompts(random.Random(seed), 1, (6,))
    target.generate(**inputs, max_new_tokens=8, pearl=PearlConfig(execution="inline", attention="triton"))
    assert captures[0].num_held > 0
    known = weakref.ref(target)
    del target
    gc.collect()
    assert known() is None


# -- what is not captured ---------------------------------------------------------------------------------------------


def heard(caplog: pytest.LogCaptureFixture) -> Any:
    """Collect what is said at INFO level."""
    return caplog.at_level(logging.INFO, logger="hf_pearl")


def hook(model: Any) -> None:
    model.model.layers[0].register_forward_hook(lambda *_: None)


def replace(model: Any) -> None:
    module = model.model.layers[1].mlp
    module.forward = module.forward


def compile_(model: Any) -> None:
    model.model.layers[0].compile()


def parametrize(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def exchange(model: Any) -> None:
    class Own(torch.nn.Identity):
        pass

    model.model.norm = Own()


def quantise(model: Any) -> None:
    model.hf_quantizer = object()


def cut(model: Any) -> None:
    shard(model, 0, 2, lambda tensor: tensor, lambda tensor: tensor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (hook, "model.layers.0 (LlamaDecoderLayer) has forward hooks"),
        (replace, "model.layers.1.mlp (LlamaMLP) has had its forward replaced"),
        (compile_, "is compiled"),
        (parametrize, "up_proj (ParametrizedLinear) computes its weights"),
        (exchange, "model.norm (Own) is of a class that may do anything"),
        (quantise, "it is quantised"),
        (cut, "it is one of several parts"),
    ],
)
def test_forwards_in_which_python_has_to_run_are_not_captured(change: Callable[[Any], None], words: str) -> None:
    model = tiny_model("llama", 1)
    assert obstacle_to_capture(model) is None
    change(model)
    reason = obstacle_to_capture(model)
    assert reason is not None and words in reason


def test_a_model_that_was_asked_for_hidden_states_is_captured(seed: int, captures: list[StrictCapture]) -> None:
    """transformers leaves hooks in it that record nothing any more; a user's own hook beside them still counts."""
    target = tiny_model("llama", seed)
    inputs = random_prompts(random.Random(seed), 1, (6,))
    assert target(**inputs, output_hidden_states=True).hidden_states
    assert any(module._forward_hooks for module in target.modules()), "this transformers leaves none"
    assert obstacle_to_capture(target) is None
    assert_equal(target, None, inputs, PearlConfig(execution="inline", attention="triton"), max_new_tokens=8)
    assert captures[0].num_captures > 0
    hook(target)
    assert "has forward hooks" in (obstacle_to_capture(target) or "")


def test_autocast_is_not_captured() -> None:
    model = tiny_model("llama", 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in (obstacle_to_capture(model) or "")


def test_a_hooked_model_runs_as_before_until_the_hook_goes(seed: int, captures: list[StrictCapture]) -> None:
    target = tiny_model("llama", seed)
    inputs = random_prompts(random.Random(seed), 1, (6,))
    config = PearlConfig(execution="inline", attention="triton")
    seen: list[int] = []
    handle = target.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    assert_equal(target, None, inputs, config, max_new_tokens=8)
    assert len(seen) == 16 and captures[0].num_captures == 0
    handle.remove()
    assert_equal(target, None, inputs, config, max_new_tokens=8)
    assert captures[0].num_captures > 0


def test_nothing_is_captured_without_kernels_or_without_cuda(seed: int, captures: list[StrictCapture]) -> None:
    target = tiny_model("llama", seed)
    inputs = random_prompts(random.Random(seed), 1, (6,))
    assert_equal(target, None, inputs, PearlConfig(execution="inline", attention="sdpa"), max_new_tokens=8)
    assert captures[0].num_captures == 0
    assert capture_for(torch.device("cpu")) is None
    assert isinstance(capture_for(torch.device("cuda", 0)), CudaCapture)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_a_step_runs_in_the_smallest_size_that_holds_it(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(500):
        num_sequences = chance.randint(1, 40)
        num_new = [chance.choice([1, 1, chance.randint(1, 20)]) for _ in range(num_sequences)]
        max_keys, has_trees = chance.choice([20, 1000, 1030, 5000, 100_000]), chance.random() < 0.5
        step = Bounds(num_sequences, sum(num_new), max(num_new), max_keys, has_trees)
        num_tree_numbers = chance.randint(0, sum(num_new) * 9) if has_trees else 0
        limits = Limits(num_sequences, sum(num_new), -(-max_keys // 16), num_tree_numbers)
        bucket = bucket_of(step, limits, 16)
        if bucket is None:
            assert sum(num_new) > NUM_TOKENS[-1]
            continue
        assert bucket.serve(step) and limits_of(bucket, 16).holds(limits) and bucket.max_keys >= max_keys
        assert bucket.num_tokens == min(size for size in NUM_TOKENS if size >= sum(num_new))
        assert bucket.num_sequences < 2 * num_sequences or bucket.num_sequences == bucket.num_tokens
        assert bucket.num_sequences <= bucket.num_tokens
        again = Bounds(bucket.num_sequences, bucket.num_tokens, bucket.max_queries, bucket.max_keys, has_trees)
        assert bucket_of(again, limits, 16) == bucket
        largest = largest_like(bucket, 64)
        assert largest.serve(bucket) and largest.num_tokens == max(64, bucket.num_tokens)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Bounds(3, 9, 5, 100, False), Bounds(4, 16, 16, 1024, False)),
        (Bounds(3, 3, 1, 1025, True), Bounds(4, 4, 1, 4096, True)),
        (Bounds(1, 17, 17, 16, False), Bounds(1, 24, 24, 1024, False)),
        (Bounds(5, 7, 2, 16, False), Bounds(8, 8, 8, 1024, False)),
    ],
)
def test_sizes_are_those_that_the_documents_name(step: Bounds, expected: Bounds) -> None:
    assert bucket_of(step, Limits(step.num_sequences, step.num_tokens, 1, 0), 16) == expected


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_on_a_gpu_graphs_give_the_logits_of_plain_forwards(architecture: str, seed: int) -> None:
    """As exactly as these: float32 itself is off by half of what is allowed here, in some of these models."""
    models = [tiny_model(architecture, seed, dtype=dtype).to("cuda:0") for dtype in (torch.float32, torch.float64)]
    caches = [PagedPrefixCache(model.config, 64, device="cuda:0") for model in (models[0], *models)]
    runner = GraphRunner(models[0], caches[0], CudaCapture(torch.device("cuda:0")))
    lanes = [
        ModelLane(model, cache, graphs=graphs)
        for model, cache, graphs in zip((models[0], *models), caches, (runner, None, None), strict=True)
    ]
    chance, errors = random.Random(seed), [0.0, 0.0]
    with torch.cuda.stream(torch.cuda.Stream()), lanes[0].ready(), lanes[1].ready(), lanes[2].ready():
        for lane in lanes:
            lane.admit(0, (), 200), lane.admit(1, (), 200)
        for _ in range(20):
            windows = [Window(row, tuple(chance.choices(range(60), k=chance.choice([1, 3, 5]))), 1) for row in (0, 1)]
            *found, exact = (lane.forward(windows).double() for lane in lanes)
            allowed = 1e-4 + 1e-4 * exact.abs()
            errors = [
                max(worst, float(((each - exact).abs() / allowed).max()))
                for worst, each in zip(errors, found, strict=True)
            ]
    assert errors[0] <= max(1.0, 2 * errors[1]) < 10.0, errors
    assert runner.num_replays == 19 and runner.can_use()
    runner.release()
