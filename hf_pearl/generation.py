"""The way in: `generate(..., assistant_model=draft, pearl=True)`.

transformers prepares inputs, logits processors and stopping criteria, and calls our decoding through its
`custom_generate` callable protocol, so that every argument means what it means there.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from . import compat
from .arguments import check_arguments
from .config import PearlConfig
from .decoding.noise import draw_call_seed
from .decoding.request import Request
from .decoding.rules import Rules, length_limit
from .decoding.stats import PearlStats
from .engine import Prompt
from .forks import in_forked_children
from .model_devices import input_device
from .models import unwrap
from .outputs import PearlGenerateOutput
from .parallel.placement import placed_devices
from .registry import engine_for, place

GenerateOutput = torch.Tensor | PearlGenerateOutput


class PearlGenerationMixin:
    """Adds `pearl` to `generate`; to be inherited before a transformers model class.

    `pearl=True` or a `PearlConfig` decodes with parallel speculative decoding (PEARL, arXiv 2408.11850), `False` is
    transformers' own `generate`, untouched.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if GenerationMixin in order and order.index(GenerationMixin) < order.index(PearlGenerationMixin):
            raise TypeError(f"{cls.__name__} must inherit PearlGenerationMixin before its transformers model class.")

    def generate(self, *args: Any, pearl: bool | PearlConfig | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`, with `pearl`; returns the same, `PearlGenerateOutput` where it returns a dict."""
        inherited = super().generate  # type: ignore[misc]
        original = getattr(inherited, "hf_pearl_original", None)  # Where every model is enabled, too.
        generate = inherited if original is None else types.MethodType(original, self)
        return pearl_generate(generate, self, pearl, args, kwargs)


def pearl_generate(
    generate: Callable[..., Any], model: Any, pearl: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run `generate`, transformers' own and bound to `model`, with PEARL's decoding if `pearl` asks for it."""
    arguments = _by_name(args, kwargs)
    config = PearlConfig.from_argument(_asked_for(pearl, model, arguments))
    if config is None:
        return generate(*args, **kwargs)
    # An argument of None was not given; a field of the config that is None is set to None (`eos_token_id=None`).
    positional = _positional_names()
    arguments = {name: value for name, value in arguments.items() if value is not None or name not in positional}
    if not isinstance(arguments.get("generation_config", GenerationConfig()), GenerationConfig):
        kind = type(arguments["generation_config"]).__name__
        raise TypeError(f"`generation_config` must be a GenerationConfig, got a {kind}. Its fields are arguments, too.")
    extra = {name: value for name, value in arguments.items() if name not in positional}
    with _hiding:  # Another thread may be hiding the model's own stop strings.
        generation_config = compat.effective_generation_config(model, arguments.get("generation_config"), extra)
    check_arguments(model, generation_config, arguments)
    draft = unwrap(arguments.pop("assistant_model", None))
    place(unwrap(model), draft, config)
    streamer = arguments.pop("streamer", None)
    stop_strings = generation_config.stop_strings
    if stop_strings:
        criterion = StopStringCriteria(arguments["tokenizer"], stop_strings)
        arguments["stopping_criteria"] = StoppingCriteriaList([*arguments.get("stopping_criteria", ()), criterion])
    for name in ("synced_gpus", "assistant_tokenizer", "tokenizer"):
        arguments.pop(name, None)

    hidden = ExitStack()

    def decode(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateOutput:
        hidden.close()
        rules = _rules(logits_processor, stopping_criteria, generation_config, streamer)
        mask = model_kwargs.get("attention_mask")
        return _decode(model, draft, input_ids, mask, rules, generation_config, config)

    returned = _brought_to_target(unwrap(model), arguments)
    with hidden:
        hidden.enter_context(_without_stop_strings(model, arguments))
        return returned(generate(**arguments, custom_generate=decode))


def _by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of `generate` by name; raises `TypeError`, as Python does, for too many and for two of a name."""
    names = _positional_names()
    if len(args) > len(names):
        raise TypeError(f"generate() takes {len(names)} positional arguments ({', '.join(names)}), got {len(args)}.")
    arguments = dict(zip(names, args, strict=False))
    for name in arguments.keys() & kwargs.keys():
        raise TypeError(f"generate() got multiple values for argument '{name}'. Pass it once.")
    return arguments | kwargs


def _brought_to_target(target: PreTrainedModel, arguments: dict[str, Any]) -> Callable[[Any], Any]:
    """Bring the prompts to a target that was moved; return what brings the output to where they were."""
    given = next((arguments[name] for name in ("inputs", "input_ids") if name in arguments), None)
    if placed_devices(target) is None or given is None:
        return lambda output: output
    for name in ("inputs", "input_ids", "attention_mask", "position_ids"):
        if name in arguments:
            arguments[name] = arguments[name].to(input_device(target))
    return functools.partial(_with_sequences_on, given.device)


def _with_sequences_on(device: torch.device, output: GenerateOutput) -> GenerateOutput:
    if isinstance(output, torch.Tensor):
        return output.to(device)
    output.sequences = output.sequences.to(device)
    return output


@functools.cache
def _positional_names() -> tuple[str, ...]:
    parameters = inspect.signature(compat.original_generate()).parameters.values()
    return tuple(p.name for p in parameters if p.name != "self" and p.kind is p.POSITIONAL_OR_KEYWORD)


def _asked_for(pearl: Any, model: Any, arguments: dict[str, Any]) -> Any:
    """`pearl` as an argument, else as a field of a generation config (which is how servers pass settings on)."""
    for config in (arguments.get("generation_config"), getattr(model, "generation_config", None)):
        if pearl is None and config is not None:
            pearl = getattr(config, "pearl", None)
    return pearl


@contextmanager
def _without_stop_strings(model: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Hide `stop_strings` from transformers, which drops the tokenizer on its way to a callable and then misses it.

    They stand as a criterion already. The model's own default can be hidden in place only: it is put back as soon as
    transformers has prepared the call, a few milliseconds in which a plain `generate` of another thread would miss it.
    """
    arguments.pop("stop_strings", None)
    given = arguments.get("generation_config")
    if given is not None and given.stop_strings is not None:
        arguments["generation_config"] = copy.deepcopy(given)
        arguments["generation_config"].stop_strings = None
    default = model.generation_config.stop_strings
    if default is None:
        yield
        return
    with _hiding:
        _hidden.append((model.generation_config, default))
        model.generation_config.stop_strings = None
        try:
            yield
        finally:
            model.generation_config.stop_strings = default
            del _hidden[-1:]


_hiding = threading.RLock()
_hidden: list[tuple[GenerationConfig, Any]] = []


def _in_forked_child() -> None:
    """Put back what another thread, which is not here, has hidden."""
    global _hiding
    _hiding = threading.RLock()
    while _hidden:
        config, default = _hidden.pop()
        config.stop_strings = default


in_forked_children(_in_forked_child)


def _rules(
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any,
) -> Rules:
    returns_dict = bool(generation_config.return_dict_in_generate)
    return Rules(
        processors=processors,
        criteria=criteria,
        do_sample=bool(generation_config.do_sample),
        max_length=length_limit(criteria),
        pad_token_id=compat.pad_token_id(generation_config),
        output_scores=returns_dict and bool(generation_config.output_scores),
        output_logits=returns_dict and bool(generation_config.output_logits),
        streamer=streamer,
    )


def _decode(
    model: PreTrainedModel,
    draft: PreTrainedModel | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    rules: Rules,
    generation_config: GenerationConfig,
    config: PearlConfig,
) -> GenerateOutput:
    if rules.streamer is not None:
        rules.streamer.put(input_ids.cpu())
    prompts = _prompts(input_ids, attention_mask)
    call_seed = None
    if rules.do_sample:
        call_seed = draw_call_seed() if config.seed is None else config.seed
    engine = engine_for(model, draft)
    requests, stats = engine.decode(model, draft, prompts, rules, config, call_seed)
    if rules.streamer is not None:
        rules.streamer.end()
    sequences = _sequences(input_ids, requests, rules)
    if not generation_config.return_dict_in_generate:
        return sequences
    return _output(sequences, requests, rules, stats)


def _prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[Prompt]:
    rows = input_ids.tolist()
    paddings = [0] * len(rows) if attention_mask is None else (attention_mask == 0).sum(dim=1).tolist()
    return [Prompt(tuple(row[padding:]), tuple(row[:padding])) for row, padding in zip(rows, paddings, strict=True)]


def _sequences(input_ids: torch.Tensor, requests: list[Request], rules: Rules) -> torch.Tensor:
    """`(batch, length)`: prompts as they came, padding included, and what was generated, padded at the end."""
    longest = max(len(request.generated) for request in requests)
    fill = 0 if rules.pad_token_id is None else rules.pad_token_id
    rows = [request.generated + [fill] * (longest - len(request.generated)) for request in requests]
    generated = torch.tensor(rows, dtype=torch.long, device=input_ids.device).reshape(len(requests), longest)
    return torch.cat([input_ids, generated], dim=1)


def _output(sequences: torch.Tensor, requests: list[Request], rules: Rules, stats: PearlStats) -> PearlGenerateOutput:
    return PearlGenerateOutput(
        sequences=sequences,
        scores=_stacked([r.scores for r in requests], rules, -torch.inf) if rules.output_scores else None,
        logits=_stacked([r.logits for r in requests], rules, 0.0) if rules.output_logits else None,
        pearl=stats,
    )


def _stacked(rows: list[list[torch.Tensor]], rules: Rules, fill: float) -> tuple[torch.Tensor, ...]:
    """Per generated position `(batch, vocab_size)`; a finished row holds `fill`, and 0 at the pad token."""
    blank = torch.full_like(rows[0][0], fill)
    if rules.pad_token_id is not None and 0 <= rules.pad_token_id < len(blank):  # Without padding it may be anything.
        blank[rules.pad_token_id] = 0.0
    longest = max(len(row) for row in rows)
    return tuple(
        torch.stack([row[position] if position < len(row) else blank for row in rows]) for position in range(longest)
    )
