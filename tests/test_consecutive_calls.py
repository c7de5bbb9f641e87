"""What one call leaves to the next: cached prefixes, and nothing else; neither stale weights nor broken state."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from callbacks import CountingProcessor, Deliberate, Raising, RecordingStreamer, SumCriterion
from models import (
    EXECUTIONS,
    IN_PROCESS,
    VOCAB_SIZE,
    assert_equal,
    assert_nothing_held,
    enabled_for_tiny_models,
    expected_warnings,
    left_padded,
    noisy_copy,
    random_prompts,
    tiny_model,
)
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import hf_pearl
from hf_pearl import PearlConfig, PearlOutOfBlocksError, registry, turns
from hf_pearl.cache.prefix_index import num_shared
from hf_pearl.engine import PearlEngine

TIMEOUT = 60.0  # seconds


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture
def target() -> Iterator[PreTrainedModel]:
    model = tiny_model("llama", 1)
    yield model
    assert_nothing_held(model)
    hf_pearl.release(model)


@pytest.fixture
def draft(target: PreTrainedModel) -> PreTrainedModel:
    """Right about three times in four."""
    return noisy_copy(target, 0.03, 2)


def test_a_pair_s_engine_is_made_once(
    target: PreTrainedModel, draft: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on every call, to be thrown away."""
    made: list[PearlEngine] = []

    def make() -> PearlEngine:
        made.append(PearlEngine())
        return made[-1]

    monkeypatch.setattr(registry, "PearlEngine", make)
    for partner in (None, draft):
        assert registry.engine_for(target, partner) is registry.engine_for(target, partner) is made[-1]
    assert len(made) == 2


# Cached prefixes.


@pytest.mark.parametrize("execution", IN_PROCESS)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gpt2"])
def test_a_prompt_that_is_fully_cached(architecture: str, execution: str) -> None:
    """Around multiples of the block size: the last token is computed again, and nothing else."""
    target = tiny_model(architecture, 23)
    draft = noisy_copy(target, 0.03, 2)
    chance = random.Random(23)
    for length in (31, 32, 33, 64, 65, 97):
        inputs = random_prompts(chance, 1, (length,))
        config = PearlConfig(draft_length=3, execution=execution)
        cold = assert_equal(target, draft, inputs, config, max_new_tokens=20)[1].pearl
        warm = assert_equal(target, draft, inputs, config, max_new_tokens=20)[1].pearl
        assert cold.prefilled_tokens == cold.draft_prefilled_tokens == length
        assert warm.prefilled_tokens == warm.draft_prefilled_tokens == 1
        assert warm.judged_at[:1] != [0]
    assert_nothing_held(target)
    hf_pearl.release(target)


@pytest.mark.parametrize("execution", IN_PROCESS)
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_a_conversation_computes_only_what_is_new(architecture: str, execution: str) -> None:
    target = tiny_model(architecture, 24)
    draft = noisy_copy(target, 0.03, 2)
    chance = random.Random(24)
    text: list[int] = []
    for turn in range(4):
        text += [chance.randrange(1, VOCAB_SIZE) for _ in range(30)]
        inputs = left_padded([text])
        for config in (PearlConfig(execution=execution), PearlConfig(execution=execution, prefix_cache=False)):
            expected, output = assert_equal(target, draft, inputs, config, max_new_tokens=40)
            num_new = output.pearl.prefilled_tokens
            assert num_new == len(text) if not config.prefix_cache else num_new == 31 or not turn
        text += expected[0].tolist()
    assert_nothing_held(target)
    hf_pearl.release(target)


@pytest.mark.parametrize("execution", IN_PROCESS)
def test_a_text_that_the_draft_had_wrongly_guessed_is_not_found_in_the_cache(
    execution: str, target: PreTrainedModel
) -> None:
    """The guesses stood in a full block of the target's cache while they were verified, and other tokens do now."""
    draft = tiny_model("llama", 25)
    for length in (23, 26, 29):
        inputs = random_prompts(random.Random(length), 1, (length,))
        config = PearlConfig(execution=execution, draft_length=9, overlap=False)
        said, _ = assert_equal(target, draft, inputs, config, max_new_tokens=20)
        text = torch.cat([inputs["input_ids"], said[:, :1]], dim=1)
        guessed = draft.generate(text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=30)
        _, output = assert_equal(target, draft, left_padded(guessed.tolist()), config, max_new_tokens=20)
        verified = torch.cat([inputs["input_ids"], said], dim=1)[0].tolist()
        assert output.pearl.prefilled_tokens == guessed.shape[1] - num_shared(verified, guessed[0].tolist())


# Weights that change.


def train(model: PreTrainedModel) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(3))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def load(model: PreTrainedModel) -> None:
    model.load_state_dict(tiny_model("llama", 4).state_dict())


@pytest.mark.parametrize("execution", IN_PROCESS)
@pytest.mark.parametrize("changed", ["target", "draft"])
@pytest.mark.parametrize("change", [train, load])
def test_weights_that_change_between_two_calls_are_seen(
    change: Callable[[PreTrainedModel], None],
    changed: str,
    execution: str,
    target: PreTrainedModel,
    draft: PreTrainedModel,
) -> None:
    """Nothing stale is served by the cache of the model that changed, and the other's forgets nothing."""
    inputs = random_prompts(random.Random(5), 1, (70,))
    config = PearlConfig(execution=execution, draft_length=4)
    before, _ = assert_equal(target, draft, inputs, config, max_new_tokens=20)
    change(target if changed == "target" else draft)
    after, output = assert_equal(target, draft, inputs, config, max_new_tokens=20)
    if changed == "target":
        assert after.tolist() != before.tolist()
    assert output.pearl.prefilled_tokens == (70 if changed == "target" else 1)
    assert output.pearl.draft_prefilled_tokens == (70 if changed == "draft" else 1)
    # What a draft without its cache would guess is what it guesses.
    cold = assert_equal(target, draft, inputs, replace(config, prefix_cache=False), max_new_tokens=20)[1].pearl
    assert output.pearl.stood_at == cold.stood_at


def test_a_draft_that_is_also_the_target_is_seen_to_change_on_both_lanes(target: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(6), 1, (70,))
    config = PearlConfig(execution="inline", draft_length=4)
    assert_equal(target, target, inputs, config, max_new_tokens=20)
    train(target)
    stats = assert_equal(target, target, inputs, config, max_new_tokens=20)[1].pearl
    assert stats.prefilled_tokens == stats.draft_prefilled_tokens == 70
    assert stats.acceptance_rate == 1


def test_release_and_clear_cache_make_the_next_call_begin_cold(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(7), 1, (70,))
    config = PearlConfig(execution="inline")
    for forget in (hf_pearl.release, hf_pearl.clear_cache):
        for model in (target, draft):
            assert_equal(target, draft, inputs, config, max_new_tokens=10)
            assert assert_equal(target, draft, inputs, config, max_new_tokens=10)[1].pearl.prefilled_tokens == 1
            forget(model)
            stats = assert_equal(target, draft, inputs, config, max_new_tokens=10)[1].pearl
            assert stats.prefilled_tokens == stats.draft_prefilled_tokens == 70


# Calls that fail.


class RaisingStreamer(RecordingStreamer):
    """Raises at its `num_calls`-th `put`, or at its end where that is negative."""

    def __init__(self, num_calls: int) -> None:
        super().__init__()
        self.put = Raising(super().put, num_calls)
        self.end = Raising(super().end, 1 if num_calls < 0 else 0)


def failing_callbacks(num_calls: int) -> dict[str, dict[str, Any]]:
    return {
        "processor": {"logits_processor": [Raising(CountingProcessor(), num_calls)]},
        "criterion": {"stopping_criteria": [Raising(SumCriterion(97), num_calls)]},
        "streamer": {"streamer": RaisingStreamer(num_calls)},
        "allowed tokens": {"prefix_allowed_tokens_fn": Raising(lambda row, ids: [1, 2, 3, 4], num_calls)},
    }


@pytest.mark.parametrize("num_calls", [1, 2, 7])
@pytest.mark.parametrize("where", ["processor", "criterion", "streamer", "allowed tokens"])
@pytest.mark.parametrize("execution", IN_PROCESS)
def test_an_exception_in_a_callback_reaches_the_caller_and_leaves_the_next_call_working(
    execution: str, where: str, num_calls: int, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    inputs = random_prompts(random.Random(8), 3, (3, 40))
    config = PearlConfig(execution=execution, draft_length=4)
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 20, "assistant_model": draft, "pearl": config}
    implementations = [model.config._attn_implementation for model in (target, draft)]
    with pytest.raises(Deliberate, match=f"call {num_calls}"):
        target.generate(**arguments, **failing_callbacks(num_calls)[where])
    assert_nothing_held(target)
    assert [model.config._attn_implementation for model in (target, draft)] == implementations
    assert not [thread for thread in threading.enumerate() if "draft lane" in thread.name]
    for auto in (config, replace(config, draft_length="auto")):
        assert_equal(target, draft, inputs, auto, max_new_tokens=20)


class Calling(StoppingCriteria):
    """Ends nothing, but calls a function when it is asked for the third time; keeps what that returned or raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function, self.num_asked, self.got = function, 0, None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.num_asked += 1
        if self.num_asked == 3:
            try:
                self.got = self.function()
            except Exception as error:
                self.got = error
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_callback_may_call_generate_on_the_same_pair(
    execution: str, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    inputs, others = (random_prompts(random.Random(seed), 2, (3, 40)) for seed in (11, 12))
    expected, of_others = (target.generate(**each, max_new_tokens=20, do_sample=False) for each in (inputs, others))
    arguments = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True, "assistant_model": draft}
    arguments["pearl"] = PearlConfig(execution=execution, draft_length=3)
    inside = Calling(lambda: target.generate(**others, **arguments))
    for calling in (inside, None):  # The second call has the draft to itself.
        criteria = StoppingCriteriaList([calling] if calling else [])
        output = target.generate(**inputs, **arguments, stopping_criteria=criteria)
        assert torch.equal(output.sequences, expected)
        assert output.pearl.execution == execution and output.pearl.draft_steps > 0
    assert torch.equal(inside.got.sequences, of_others)
    assert inside.got.pearl.execution == "none", "the draft is busy with the call outside"
    assert_nothing_held(target)


def test_a_call_that_waits_long_for_one_of_another_thread_says_so(
    target: PreTrainedModel, draft: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may wait for one whose callback waits for it."""
    monkeypatch.setattr(turns, "SAID_AFTER_SECONDS", 0.05)
    arguments = {**random_prompts(random.Random(15), 1, (5,)), "max_new_tokens": 9, "do_sample": False}
    expected, outputs = target.generate(**arguments), []
    arguments |= {"assistant_model": draft, "pearl": PearlConfig(execution="inline")}

    def call_elsewhere() -> None:
        thread = threading.Thread(target=lambda: outputs.append(target.generate(**arguments)))
        thread.start()
        deadline = time.monotonic() + TIMEOUT
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        threads.append(thread)

    threads: list[threading.Thread] = []
    with expected_warnings() as said:
        criteria = StoppingCriteriaList([Calling(call_elsewhere)])
        outputs.append(target.generate(**arguments, stopping_criteria=criteria))
    threads[0].join(TIMEOUT)
    assert said and all("has waited for 0.05 s for one of another thread" in each for each in said)
    assert [each.tolist() for each in outputs] == [expected.tolist()] * 2


def test_release_leaves_the_models_of_a_call_that_waits_where_they_are(
    target: PreTrainedModel, draft: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has placed them before it came to wait."""
    put_back: list[PreTrainedModel] = []
    monkeypatch.setattr(registry, "put_back", put_back.append)
    engine = registry.engine_for(target, draft)

    def wait_for_turn() -> None:
        with engine.turns.turn():
            pass

    thread = threading.Thread(target=wait_for_turn)
    with engine.turns.turn():
        thread.start()
        while not engine.turns.is_waited_for:
            time.sleep(0.01)
        hf_pearl.release(draft)
    thread.join(TIMEOUT)
    assert put_back == []
    registry.engine_for(target, draft)
    hf_pearl.release(draft)
    assert put_back == [draft, target]


@pytest.mark.parametrize("same", [True, False])
def test_calls_with_different_salts_share_nothing(same: bool, target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(16), 1, (64,))
    for salt in ("a", "a" if same else "b"):
        _, output = assert_equal(
            target, draft, inputs, PearlConfig(execution="inline", cache_salt=salt), max_new_tokens=5
        )
    assert (output.pearl.prefilled_tokens, output.pearl.draft_prefilled_tokens) == ((1, 1) if same else (64, 64))


def test_a_call_by_a_callback_leaves_the_cache_of_the_outer_one(target: PreTrainedModel) -> None:
    """Also where it finds the model changed, as it does under a hook, and would begin the cache anew."""
    inputs = random_prompts(random.Random(14), 1, (20,))
    arguments = {**inputs, "max_new_tokens": 20, "do_sample": False}
    expected = target.generate(**arguments)

    def call_under_hook() -> torch.Tensor:
        hook = target.model.layers[0].register_forward_hook(lambda module, args, output: None)
        try:
            return target.generate(**arguments, pearl=True)
        finally:
            hook.remove()

    calling = Calling(call_under_hook)
    criteria = StoppingCriteriaList([calling])
    assert torch.equal(target.generate(**arguments, pearl=True, stopping_criteria=criteria), expected)
    assert torch.equal(calling.got, expected)


@pytest.mark.parametrize("forget", [hf_pearl.release, hf_pearl.clear_cache])
def test_what_a_running_call_needs_a_callback_cannot_take_away(
    forget: Callable[[PreTrainedModel], None], target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    inputs = random_prompts(random.Random(13), 1, (5,))
    expected = target.generate(**inputs, max_new_tokens=9, do_sample=False)
    calling = Calling(lambda: forget(draft))
    arguments = {"max_new_tokens": 9, "do_sample": False, "stopping_criteria": StoppingCriteriaList([calling])}
    assert torch.equal(target.generate(**inputs, **arguments, assistant_model=draft, pearl=True), expected)
    assert isinstance(calling.got, RuntimeError) and f"`{forget.__name__}` was asked for by a callback" in str(
        calling.got
    )
    forget(draft)


@pytest.mark.parametrize("execution", IN_PROCESS)
def test_an_exception_at_a_streamer_s_end(execution: str, target: PreTrainedModel, draft: PreTrainedModel) -> None:
    inputs = random_prompts(random.Random(9), 1, (5,))
    config = PearlConfig(execution=execution)
    streamer = RaisingStreamer(-1)
    with pytest.raises(Deliberate):
        target.generate(**inputs, max_new_tokens=5, streamer=streamer, assistant_model=draft, pearl=config)
    assert_nothing_held(target)
    assert_equal(target, draft, inputs, config, max_new_tokens=20)


class FailingLayer(torch.nn.Module):
    """Raises at its `num_calls`-th forward."""

    def __init__(self, inner: torch.nn.Module, num_calls: int) -> None:
        super().__init__()
        self.inner = inner
        self.call = Raising(inner.forward, num_calls)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


@pytest.mark.parametrize("num_calls", [1, 2, 5])
def test_an_exception_in_the_target_s_forward(num_calls: int, target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """It comes in the midst of a forward, when some layers have stored their keys and values, and others have not."""
    inputs = random_prompts(random.Random(10), 3, (3, 40))
    for execution in ("inline", "threads"):
        config = PearlConfig(execution=execution, draft_length=4)
        mlp = target.model.layers[0].mlp
        target.model.layers[0].mlp = FailingLayer(mlp, num_calls)
        with pytest.raises(Deliberate):
            target.generate(**inputs, max_new_tokens=20, assistant_model=draft, pearl=config)
        target.model.layers[0].mlp = mlp
        assert_nothing_held(target)
        assert_equal(target, draft, inputs, config, max_new_tokens=20)


def test_an_exception_in_the_draft_s_forward(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Inline it reaches the caller; a thread's call goes on without its draft, gives the same tokens, and says so."""
    inputs = random_prompts(random.Random(10), 3, (3, 40))
    arguments = {**inputs, "do_sample": False, "max_new_tokens": 20, "assistant_model": draft}
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=20)
    mlp = draft.model.layers[0].mlp
    for num_calls, draft_length in ((1, 4), (5, 4), (1, "auto"), (5, "auto")):
        config = PearlConfig(execution="threads", draft_length=draft_length)
        draft.model.layers[0].mlp = FailingLayer(mlp, num_calls)
        with expected_warnings() as warnings:
            output = target.generate(**arguments, pearl=config)
        assert output.tolist() == expected.tolist()
        assert warnings or draft_length == "auto", "a target that waits for nobody may be done before the draft fails"
        assert all("Deliberate" in each for each in warnings)
        draft.model.layers[0].mlp = FailingLayer(mlp, num_calls)
        with pytest.raises(Deliberate):
            target.generate(**arguments, pearl=replace(config, execution="inline", draft_length=4))
        draft.model.layers[0].mlp = mlp
        assert_nothing_held(target)
        assert_equal(target, draft, inputs, config, max_new_tokens=20)


@pytest.mark.parametrize("execution", IN_PROCESS)
def test_a_cache_that_is_too_small_is_refused_by_name_and_a_larger_one_works(
    execution: str, target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    """Too small for a prompt: at once; for a row: when it is full; for all rows: they give way to each other."""
    inputs = random_prompts(random.Random(11), 4, (60,))
    block = 2 * 2 * 2 * 2 * 8 * 8 * 16  # lanes, layers, keys and values, heads, head size, bytes, tokens of a block
    small = PearlConfig(execution=execution, cache_memory=3 * block)
    too_small = {
        3: "60 tokens needs 4 blocks .* at most 3.*cache_memory",
        4: r"in use of at most 4.*cache_memory.*1 sequence\(s\) .* may take 5 block",
    }
    for num_blocks, said in too_small.items():
        with pytest.raises(PearlOutOfBlocksError, match=said):
            config = replace(small, cache_memory=num_blocks * block)
            target.generate(**inputs, max_new_tokens=20, assistant_model=draft, pearl=config)
        assert_nothing_held(target)
    for num_blocks in (5, 12, 24):
        config = replace(small, cache_memory=num_blocks * block)
        _, output = assert_equal(target, draft, inputs, config, max_new_tokens=20)
        assert (output.pearl.preemptions > 0) == (num_blocks < 20)
        assert_nothing_held(target)
    assert_equal(target, draft, inputs, PearlConfig(execution=execution), max_new_tokens=20)
