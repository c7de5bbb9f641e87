"""Two devices that this machine has not got, for processes of their own: `python tests/pretend_devices.py CHECK...`.

Tensors on "pretend:0" and "pretend:1" lie in main memory and say that they lie elsewhere. What would fail on two GPUs
fails here: arithmetic on tensors of two devices. That a device is registered cannot be undone, so that checks run in a
process of their own; `test_placement.py` starts it.
"""

from __future__ import annotations

import copy
import json
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from models import assert_varied, enabled_for_tiny_models, noisy_copy, random_prompts, tiny_model
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.cache.sizing import CacheNeeds
from hf_pearl.model_devices import devices_of, layer_devices
from hf_pearl.parallel import placement
from hf_pearl.parallel.ranks.shared_collectives import SharedCollectives, Table
from hf_pearl.planning.footprint import Footprint
from hf_pearl.planning.plan import PlannedModel
from hf_pearl.planning.planner import split
from hf_pearl.planning.topology import Device
from hf_pearl.registry import engines_of

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
copied_to_host: list[str] = []  # what made the host wait for a device


class Elsewhere(torch.Tensor):
    """A tensor in main memory that says that it lies on another device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        """Wrap `held`; without a device, make a parameter of what is wrapped, as accelerate makes them."""
        if device is None:
            return torch.nn.Parameter(held, requires_grad)
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        wrapped.held = held
        return wrapped

    def tolist(self) -> Any:
        """As of the tensor that it holds; torch refuses it for subclasses."""
        copied_to_host.append("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with what is held, if all of it lies on one device; numbers may lie in main memory."""
        kwargs = kwargs or {}
        devices, in_memory = set(), []

        def held(value: Any) -> Any:
            if isinstance(value, Elsewhere):
                devices.add(value.device)
                return value.held
            if isinstance(value, torch.Tensor) and value.ndim:
                in_memory.append(value)
            return value

        own, own_kwargs = tree_map(held, args), tree_map(held, kwargs)
        # Indices may lie in main memory, as on a GPU.
        is_index = func is torch.ops.aten.index.Tensor and isinstance(args[0], Elsewhere)
        if func not in COPIES and (len(devices) > 1 or (in_memory and not is_index)):
            raise RuntimeError(f"{func} of tensors on {sorted(map(str, devices))} and {len(in_memory)} in main memory")
        device = args[0].device if func is torch.ops.aten.copy_.default else next(iter(devices))
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            own_kwargs["device"] = torch.device("cpu")
        if devices and (device.type == "cpu" or func is torch.ops.aten._local_scalar_dense.default):
            copied_to_host.append(str(func))
        output = func(*own, **own_kwargs)
        known = {id(each.held): each for each in args if isinstance(each, Elsewhere)}  # what is written in place

        def wrapped(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or device.type != "pretend":
                return value
            return known[id(value)] if id(value) in known else Elsewhere(value, device)

        return tree_map(wrapped, output)


class Guard(torch._C._acc.DeviceGuard):
    """What torch asks of a kind of device."""

    def type_(self) -> Any:
        """Its kind."""
        return torch._C._autograd.DeviceType.PrivateUse1


class Hooks(torch._C._acc.PrivateUse1Hooks):
    """What torch asks of a kind of device."""

    def is_available(self) -> bool:
        """Whether there is one."""
        return True

    def has_primary_context(self, device_index: int) -> bool:
        """Whether it is in use."""
        return True

    def is_built(self) -> bool:
        """Whether torch knows it."""
        return True


class Pretend:
    """`torch.pretend`."""

    @staticmethod
    def is_available() -> bool:
        """Whether there is one."""
        return True

    @staticmethod
    def is_initialized() -> bool:
        """Whether it is in use."""
        return True

    @staticmethod
    def device_count() -> int:
        """How many there are."""
        return 2

    @staticmethod
    def current_device() -> int:
        """The one that "pretend" means."""
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        """Nothing is drawn there."""

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        """For autocast."""
        return [torch.bfloat16]


def _empty(size: Any, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    return Elsewhere(torch.empty(size, dtype=dtype), torch.device(device))


def _empty_strided(
    size: Any, stride: Any, dtype: Any = None, layout: Any = None, device: Any = None, **_: Any
) -> torch.Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype), torch.device(device))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    source, held = (each.held if isinstance(each, Elsewhere) else each for each in (source, target))
    held.copy_(source)
    return target


def register() -> torch.library.Library:
    """Make torch know the two devices, for as long as what is returned lives."""
    backend_registration._setup_privateuseone_for_python_backend(
        "pretend", backend_module=Pretend, hook=Hooks(), device_guard=Guard()
    )
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "PrivateUse1")
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)  # A parameter's class changes with its device.
    return library


def _device_names(devices: Any) -> list[str]:
    return [str(device) for device in devices]


OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "repetition_penalty": 1.1, "bad_words_ids": [[5], [6, 7]]}


def check_same_tokens(architecture: str, num_placements: int) -> None:
    """Tokens equal transformers' wherever the models are moved to; `release` puts them back as they were."""
    target = tiny_model(architecture, 1, num_hidden_layers=3)
    draft = noisy_copy(target, 0.05, 2)
    inputs = random_prompts(random.Random(3), 3, (4, 9, 30))
    expected = target.generate(**inputs, do_sample=False, **OPTIONS)
    assert_varied(expected[:, inputs["input_ids"].shape[1] :])
    attributes = {name: set(vars(module)) for name, module in target.named_modules()}
    both, first, second = ["pretend:0", "pretend:1"], "pretend:0", "pretend:1"
    placements: list[tuple[Any, Any, Any]] = [
        (both, second, "inline"),
        (first, second, "threads"),
        (second, [first], "inline"),
        (second, both[1:], "threads"),
        ("auto", both, "threads"),
    ]
    for target_devices, draft_devices, execution in placements[:num_placements]:
        config = PearlConfig(
            target_devices=target_devices, draft_devices=draft_devices, execution=execution, draft_length=3
        )
        for _ in range(2 if target_devices == both else 1):
            output = target.generate(
                **inputs, do_sample=False, **OPTIONS, assistant_model=draft, pearl=config, return_dict_in_generate=True
            )
            assert output.sequences.device.type == "cpu" and output.sequences.tolist() == expected.tolist()
            assert 0 < output.pearl.accepted_tokens < output.pearl.verified_draft_tokens, output.pearl
        if target_devices == both:
            assert output.pearl.prefilled_tokens == len(inputs["input_ids"]), "no prefix was found again"
        for model, asked in ((target, target_devices), (draft, draft_devices)):
            wanted = [second] if asked == "auto" else asked if isinstance(asked, list) else [asked]
            assert set(_device_names(devices_of(model))) == set(wanted), (asked, devices_of(model))
        for name, model in (("target", target), ("draft", draft)):
            (engine,) = engines_of(target)
            pages = [layer.device for layer in engine.caches[name].layers]
            assert pages == layer_devices(model), (name, pages)
        assert sum(needs.num_layers or 3 for needs in CacheNeeds.by_device(target)) == 3
    free_running = PearlConfig(target_devices=both, draft_devices=second, execution="threads")  # It grows trees.
    output = target.generate(**inputs, do_sample=False, **OPTIONS, assistant_model=draft, pearl=free_running)
    assert output.tolist() == expected.tolist()
    hf_pearl.release(target)
    assert _device_names([*devices_of(target), *devices_of(draft)]) == ["cpu", "cpu"]
    assert {name: set(vars(module)) for name, module in target.named_modules()} == attributes
    assert target.generate(**inputs, do_sample=False, **OPTIONS).tolist() == expected.tolist()


def check_sampled_tokens() -> None:
    """A seed gives the same sampled tokens wherever the models lie, with coupled and with rejection sampling."""
    target = tiny_model("llama", 5)
    draft = noisy_copy(target, 0.05, 6)
    inputs = random_prompts(random.Random(7), 2, (5, 8))
    for settings in ({}, {"verification": "rejection"}):
        outputs = []
        for placed in ({}, {"target_devices": ["pretend:0", "pretend:1"], "draft_devices": "pretend:1"}):
            config = PearlConfig(execution="inline", draft_length=3, seed=8, **settings, **placed)
            tokens = target.generate(**inputs, do_sample=True, **OPTIONS, assistant_model=draft, pearl=config)
            outputs.append(tokens.tolist())
        assert_varied(tokens[:, inputs["input_ids"].shape[1] :])
        assert outputs[0] == outputs[1], settings
        hf_pearl.release(target)


def check_copies_to_host() -> None:
    """A lane's step waits for its device once, when it asks for the tokens; each sequence's end once more."""
    target = tiny_model("llama", 12)
    draft = noisy_copy(target, 0.05, 13)
    inputs = random_prompts(random.Random(14), 2, (5, 8))
    placed = {"target_devices": "pretend:0", "draft_devices": "pretend:1"}
    for sampling in (False, True):
        for draft_length in (4, "auto"):
            execution = "inline" if draft_length == 4 else "threads"
            config = PearlConfig(execution=execution, draft_length=draft_length, seed=3, **placed)
            options = {"do_sample": sampling, "max_new_tokens": 30, "return_dict_in_generate": True}
            copied_to_host.clear()
            stats = target.generate(**inputs, **options, assistant_model=draft, pearl=config).pearl
            num_steps = stats.target_forwards + stats.draft_steps
            assert stats.target_forwards > 4 and stats.draft_steps > 4, stats
            num_others = 2 * len(inputs["input_ids"]) + 6  # ends; and what `generate` asks before and behind
            num_copies = len(copied_to_host)
            said = f"{num_copies} copies in {num_steps} steps, {config}: {Counter(copied_to_host)}"
            assert num_steps // 2 < num_copies <= num_steps + num_others, said
    hf_pearl.release(target)


class Silent:
    """A streamer that does nothing with what it gets."""

    def put(self, value: torch.Tensor) -> None:
        """Nothing; it lies in main memory, as in `generate`."""
        assert value.device.type == "cpu"

    def end(self) -> None:
        """Nothing."""


def check_copies_to_host_of_other_calls() -> None:
    """A streamer sees one token after the other: a copy each. Rejection sampling takes two a step of either lane."""
    target = tiny_model("llama", 12)
    draft = noisy_copy(target, 0.05, 13)
    inputs = random_prompts(random.Random(14), 1, (5,))
    placed = {"target_devices": "pretend:0", "draft_devices": "pretend:1"}
    options = {"max_new_tokens": 30, "return_dict_in_generate": True, "assistant_model": draft}
    for arguments, settings in (
        ({"do_sample": False, "streamer": Silent()}, {}),
        ({"do_sample": True, "streamer": Silent()}, {}),
        ({"do_sample": True}, {"verification": "rejection"}),
    ):
        config = PearlConfig(execution="inline", draft_length=4, seed=3, **settings, **placed)
        copied_to_host.clear()
        stats = target.generate(**inputs, **options, **arguments, pearl=config).pearl
        num_steps = stats.target_forwards + stats.draft_steps
        most = 2 * num_steps if settings else 30 + stats.draft_steps
        said = f"{len(copied_to_host)} copies in {num_steps} steps, {config}: {Counter(copied_to_host)}"
        assert stats.target_forwards > 4 and num_steps // 2 < len(copied_to_host) <= most + 10, said
    hf_pearl.release(target)


def check_failed_move() -> None:
    """A model that cannot be moved as a whole is where it was, and the next call works."""
    target = tiny_model("llama", 9, num_hidden_layers=3)
    prompt = torch.tensor([[1, 2, 3]])
    expected = target.generate(prompt, do_sample=False, max_new_tokens=8).tolist()

    def no_room(*_: Any, **__: Any) -> None:
        target.model.layers[0].to("pretend:1")
        raise torch.OutOfMemoryError("no room")

    dispatch, placement.dispatch_model = placement.dispatch_model, no_room
    config = PearlConfig(target_devices=["pretend:0", "pretend:1"])
    try:
        target.generate(prompt, do_sample=False, max_new_tokens=8, pearl=config)
        raise AssertionError("the error was swallowed")
    except torch.OutOfMemoryError:
        assert _device_names(devices_of(target)) == ["cpu"]
    finally:
        placement.dispatch_model = dispatch
    assert target.generate(prompt, do_sample=False, max_new_tokens=8, pearl=True).tolist() == expected
    hf_pearl.release(target)


def check_user_moves_it() -> None:
    """A model that its user has moved since is left there by `release`."""
    target = tiny_model("llama", 10)
    prompt = torch.tensor([[1, 2, 3]])
    target.generate(prompt, do_sample=False, max_new_tokens=4, pearl=PearlConfig(target_devices="pretend:0"))
    for engine in engines_of(target):
        engine.close()  # It looks at parameters, which these devices exchange for others; GPUs need not.
    target.to("pretend:1")
    hf_pearl.release(target)
    assert _device_names(devices_of(target)) == ["pretend:1"]


def check_shared_weights() -> None:
    """Models that share weights are not torn apart."""
    target = tiny_model("llama", 11)
    draft = copy.deepcopy(target)
    draft.set_input_embeddings(target.get_input_embeddings())
    config = PearlConfig(draft_devices="pretend:0")
    try:
        target.generate(torch.tensor([[1, 2, 3]]), do_sample=False, assistant_model=draft, pearl=config)
        raise AssertionError("it was moved")
    except ValueError as error:
        assert "share weights" in str(error), error
    assert _device_names([*devices_of(target), *devices_of(draft)]) == ["cpu", "cpu"]


def check_sums_of_ranks() -> None:
    """Two ranks on a device each, here threads, add up through shared memory; each has the sum where it computes."""
    table = Table(2)
    given = torch.arange(12.0).view(3, 4)

    def both(rank: int) -> list[torch.Tensor]:
        collectives = SharedCollectives("target", rank, table.seat(rank))
        own = (given + 100 * rank).to(f"pretend:{rank}")
        found = [collectives.all_reduce(own), collectives.all_gather(own)]
        collectives.close()
        return found

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(both, range(2)))
    table.close()
    for rank, (total, gathered) in enumerate(results):
        assert _device_names([total.device, gathered.device]) == [f"pretend:{rank}"] * 2
        assert total.cpu().tolist() == (2 * given + 100).tolist()
        assert gathered.cpu().tolist() == torch.cat([given, given + 100], dim=-1).tolist()


def check_plan() -> None:
    """A plan of models on devices that are not CUDA's says where they lie."""
    target, draft = tiny_model("llama", 15), tiny_model("llama", 16)
    target.to("pretend:1")
    found = hf_pearl.plan(target, draft)
    assert (found.target.lane.devices, found.draft.lane.devices) == (("pretend:1",), ("cpu",))
    assert "The target goes to pretend:1" in str(found)
    assert _device_names(found.config.target_devices) == ["pretend:1"]


def check_plans_load() -> None:
    """What a plan spreads over two devices is loaded onto them, part by part, and computes the same."""
    model = tiny_model("llama", 17, num_hidden_layers=5)
    footprint = Footprint.of(model)
    memory = footprint.weights * 3 // 4 + footprint.working + footprint.graphs
    devices = [Device("pretend:0", memory), Device("pretend:1", memory), Device("pretend:2", 2 * memory)]
    lane = split(devices, footprint, footprint, 1, draft_on=["pretend:2"]).target
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PlannedModel("model", folder, model.dtype, footprint, lane).load()
    sizes: Counter[str] = Counter()
    for parameter in loaded.parameters():
        sizes[str(parameter.device)] += parameter.nbytes
    assert sizes == {share.device: share.weights for share in lane.shares} and len(sizes) == 2
    prompt = torch.tensor([[1, 2, 3]])
    results = [each.generate(prompt, max_new_tokens=8, do_sample=False).tolist() for each in (model, loaded)]
    assert results[0] == results[1]


CHECKS: dict[str, Callable[[], None]] = {
    "same tokens, llama": lambda: check_same_tokens("llama", 5),
    "same tokens, gpt2": lambda: check_same_tokens("gpt2", 2),
    "sampled tokens": check_sampled_tokens,
    "copies to the host": check_copies_to_host,
    "copies to the host of other calls": check_copies_to_host_of_other_calls,
    "a failed move": check_failed_move,
    "moved by its user": check_user_moves_it,
    "shared weights": check_shared_weights,
    "sums of ranks": check_sums_of_ranks,
    "a plan": check_plan,
    "a plan's load": check_plans_load,
}


def main() -> None:
    """Run all checks; write what went wrong, by check, as JSON."""
    library = register()

    failures = {}
    with enabled_for_tiny_models():
        for name, check in CHECKS.items():
            try:
                check()
                failures[name] = ""
            except Exception:
                failures[name] = traceback.format_exc()
    library._destroy()
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
