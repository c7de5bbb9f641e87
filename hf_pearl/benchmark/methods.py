"""The ways of decoding that are compared, and the settings of each that are worth a trial.

Nothing is kept between the calls of our engine, unless a method says so: transformers computes every prompt anew, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..config import PearlConfig

COLD = PearlConfig(prefix_cache=False)
# Lanes that take turns need no second thread: handing over would only cost time.
SEQUENTIAL = replace(COLD, overlap=False, execution="inline")


@dataclass(frozen=True)
class OneLine(PearlConfig):
    """The default without its tree: the draft guesses one line, as in the paper, and waits for nobody."""

    max_draft_width: ClassVar[int] = 1
    verifies_tree: ClassVar[bool] = False


@dataclass(frozen=True)
class OneLineVerified(PearlConfig):
    """The default with its tree, of which a target forward verifies one line."""

    verifies_tree: ClassVar[bool] = False


@dataclass(frozen=True)
class WithoutLookup(PearlConfig):
    """The default without the guesses that are looked up in the text so far."""

    looks_up: ClassVar[bool] = False


@dataclass(frozen=True)
class NeverWaiting(PearlConfig):
    """The default whose target takes what is there."""

    waits: ClassVar[bool] = False


@dataclass(frozen=True)
class Setting:
    """One way to run a method.

    Attributes
    ----------
    pearl : PearlConfig or None
        None: transformers' own `generate`.
    uses_draft : bool
        Whether the draft takes part.
    assistant : mapping
        Fields of the draft's generation config (assisted generation).
    arguments : mapping
        Further arguments of `generate`.
    num_threads : int or None
        Intra-op threads of this process; None leaves them as they are.
    """

    pearl: PearlConfig | None = None
    uses_draft: bool = False
    assistant: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    num_threads: int | None = None

    def describe(self) -> dict[str, Any]:
        """What differs between the settings of one method."""
        described: dict[str, Any] = {"num_threads": self.num_threads, **self.assistant, **self.arguments}
        if self.pearl is not None and self.uses_draft:
            described["draft_length"] = self.pearl.draft_length
        return described


@dataclass(frozen=True)
class Method:
    """A way of decoding.

    Attributes
    ----------
    summary : str
        What it is, in some words.
    candidates : tuple of Setting
        What is worth a trial, its default first.
    tries_threads : bool
        Whether its best number of threads is found, too; else it runs with as many as there are.
    runs_on_pair : bool
        Whether it runs on the engine of the very pair, which stays warm, and not on one of a copy of the draft.
    """

    name: str
    summary: str
    candidates: tuple[Setting, ...]
    tries_threads: bool = True
    runs_on_pair: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it runs on our engine, so that its output must be right, and all it needs is supported."""
        return self.candidates[0].pearl is not None


def _constant(lengths: tuple[int, ...]) -> tuple[Setting, ...]:
    fields = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    return tuple(Setting(uses_draft=True, assistant={"num_assistant_tokens": length, **fields}) for length in lengths)


def _ours(config: PearlConfig, *draft_lengths: int | str) -> tuple[Setting, ...]:
    return tuple(Setting(replace(config, draft_length=length), True) for length in draft_lengths)  # type: ignore[arg-type]


DYNAMIC = Setting(uses_draft=True)  # transformers' default: up to 20 tokens while the draft is confident enough
HEURISTIC = Setting(
    uses_draft=True,
    assistant={
        "num_assistant_tokens": 5,
        "num_assistant_tokens_schedule": "heuristic_transient",
        "assistant_confidence_threshold": 0.0,
    },
)
GENERATE = Method("generate", "transformers' `generate`", (Setting(),))
ENGINE = Method("engine", "our engine without a draft", (Setting(COLD),))
PEARL = Method("pearl", "PEARL's default: no barrier, a tree of guesses, all lengths automatic", _ours(COLD, "auto"))

DEMO = (
    GENERATE,
    Method("assisted", "transformers' assisted generation", (DYNAMIC, *_constant((3, 5, 8)))),
    ENGINE,
    Method("speculative", "ordinary speculative decoding on our engine", _ours(SEQUENTIAL, "auto", 2, 3, 4, 6)),
    PEARL,
)

BENCH = (
    GENERATE,
    Method("assisted, constant", "transformers' assisted generation, best fixed length", _constant((3, 5, 8))),
    Method("assisted, dynamic", "the same, its length following the draft's confidence", (DYNAMIC, HEURISTIC)),
    Method(
        "prompt lookup",
        "transformers' n-gram lookup in place of a draft",
        tuple(Setting(arguments={"prompt_lookup_num_tokens": length}) for length in (3, 10)),
    ),
    ENGINE,
    Method(
        "speculative", "ordinary speculative decoding on our engine, best fixed length", _ours(SEQUENTIAL, 2, 3, 4, 6)
    ),
    *(
        Method(f"lockstep {length}", f"the paper's schedule: a barrier after {length} draft steps", _ours(COLD, length))
        for length in (4, 8, 16)
    ),
    PEARL,
    Method("pearl, one line", "the default without the tree", _ours(OneLine(prefix_cache=False), "auto")),
    Method(
        "pearl, one line verified",
        "the default, of whose tree a forward verifies one line",
        _ours(OneLineVerified(prefix_cache=False), "auto"),
    ),
    Method("pearl, no lookup", "the default without prompt lookup", _ours(WithoutLookup(prefix_cache=False), "auto")),
    Method(
        "pearl, never waits",
        "the default whose target never waits for a draft step",
        _ours(NeverWaiting(prefix_cache=False), "auto"),
    ),
    Method("pearl, in turns", "the default without overlap", _ours(SEQUENTIAL, "auto")),
    Method(
        "pearl, in a thread",
        "the default without a process of the draft's own",
        _ours(replace(COLD, execution="threads"), "auto"),
    ),
    Method(
        "pearl, warm cache",
        "the default with its prefix cache, on prompts it has seen",
        _ours(PearlConfig(), "auto"),
    ),
)

# What matters of a draft that knows nothing.
UNTRAINED = tuple(each for each in BENCH if each.name in ("generate", "engine", "pearl", "pearl, no lookup"))
