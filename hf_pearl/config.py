"""`PearlConfig`: what may be set, and that the defaults are good."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from .cache.backends import BACKENDS
from .decoding.draft_tree import MAX_DRAFT_LENGTH
from .decoding.drafting import MAX_WIDTH
from .device_arguments import DeviceArgument, check_apart, named_devices

_UNITS = {
    "": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
MAX_SALT = 1024
_EXECUTIONS = ("auto", "inline", "threads", "processes")


@dataclass(frozen=True)
class PearlConfig:
    """Settings of PEARL decoding.

    None of them changes a token of the output, except `seed`, `cache_dtype`, and `verification` of sampled calls.

    Parameters
    ----------
    draft_length : int or "auto"
        An int: lockstep, exactly so many draft steps per target forward (the paper's gamma). "auto": no barrier; how
        far to draft and when to verify follows from measured times and acceptance. With `overlap`, 1 is plain decoding
        unless tokens are rejected: the verdict always says what the one token drafted beside it could have said.
    execution : {"auto", "inline", "threads", "processes"}
        How the draft lane runs: in the caller's thread, in a thread, or in a process of its own. "auto" takes what is
        fastest on the devices at hand, and with `draft_length="auto"` lets the draft rest while decoding is faster
        without it.
    overlap : bool
        Draft while the target verifies. False is ordinary (sequential) speculative decoding, for comparison.
    verification : {"coupled", "rejection"}
        Of sampled calls; greedy ones know no difference. "coupled": draft and target sample with shared noise, and a
        draft token stands iff it is the target's own. "rejection": standard rejection sampling (Leviathan et al. 2023,
        arXiv 2211.17192), where more draft tokens stand, and corrections are harder to foresee. Both follow the
        target's distribution exactly. Coupled, a seed gives the same tokens with any draft and schedule; with
        rejection they depend on the draft, on every other setting, and on the other rows of a batch. It needs an int
        `draft_length`: nothing that was drawn may be left out for its value, so that "auto" and its tree are excluded.
    cache_memory : int, str or "auto"
        Bytes (or "512MiB") that the caches of both lanes may take together.
    cache_dtype : {"auto", "float8_e4m3fn"}
        Of cached keys and values: the model's own, or 8 bits with a scale per token and head. That is half the memory
        of bfloat16, and other answers: every cached value is off by up to 1/16 of itself.
    attention : {"auto", "sdpa", "triton", "flash"}
        What reads the caches: torch's scaled dot-product attention; Triton kernels that follow block tables; or, for
        windows that are plain lines, FlashAttention (flash-attn, or torch's), and Triton kernels for all others. "auto"
        takes the fastest that works, which on CUDA are kernels, and says which at INFO level.
    compile : bool
        Compile what is captured in CUDA graphs with `torch.compile`, but for attention: fewer kernels per layer. The
        first calls take longer, and logits differ from the model's own by rounding.
    prefix_cache : bool
        Keep keys and values between calls and find them again by prefix.
    cache_salt : str
        Only calls with the same salt find each other's prefixes: how long a call takes tells nothing of other tenants.
    seed : int or None
        Noise of sampled calls; None draws one from torch's default generator, so that `torch.manual_seed` repeats.
    draft_devices, target_devices : "auto", device, list of devices, or DeviceMesh
        Where the models compute. Devices: what lies elsewhere is moved there, spread layer by layer over several
        (accelerate), until `hf_pearl.release`. "auto": the target stays where it is, as do models that are spread,
        offloaded or quantised; a draft that shares its target's GPU, or lies in main memory beside it, moves to a GPU
        of its own if there is one with room. A one-dimensional mesh names the devices of its ranks.

    Raises
    ------
    ValueError, TypeError
        A setting that is out of range, of the wrong type, or that contradicts another.
    """

    draft_length: int | Literal["auto"] = "auto"
    execution: Literal["auto", "inline", "threads", "processes"] = "auto"
    overlap: bool = True
    verification: Literal["coupled", "rejection"] = "coupled"
    cache_memory: int | str = "auto"
    cache_dtype: Literal["auto", "float8_e4m3fn"] | torch.dtype = "auto"
    attention: Literal["auto", "sdpa", "triton", "flash"] = "auto"
    compile: bool = False
    prefix_cache: bool = True
    cache_salt: str = ""
    seed: int | None = None
    draft_devices: DeviceArgument = "auto"
    target_devices: DeviceArgument = "auto"

    # No settings: guesses that a draft step computes at most, whether some are looked up in the text so far, whether a
    # target forward may verify several lines of a request, whether it waits for the draft where that pays, and whether
    # small forwards are captured in CUDA graphs. What these give is measured on subclasses.
    max_draft_width: ClassVar[int] = MAX_WIDTH
    looks_up: ClassVar[bool] = True
    verifies_tree: ClassVar[bool] = True
    waits: ClassVar[bool] = True
    captures: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not _is_auto(self.draft_length):
            _check_int("draft_length", self.draft_length, 1, MAX_DRAFT_LENGTH, 'or "auto"')
        _check_choice("execution", self.execution, _EXECUTIONS)
        _check_choice("verification", self.verification, ("coupled", "rejection"))
        _check_choice("cache_dtype", self.cache_dtype, ("auto", "float8_e4m3fn", torch.float8_e4m3fn))
        _check_choice("attention", self.attention, BACKENDS)
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > MAX_SALT:
            raise ValueError(
                f"`cache_salt` must be a string of at most {MAX_SALT} characters, got {self.cache_salt!r}."
            )
        if self.verification == "rejection" and _is_auto(self.draft_length):
            raise ValueError(
                '`draft_length` must be an int with `verification="rejection"`, got "auto", which follows how likely a '
                "draft token is: what was drawn may not be left out for its value. Set it to 4, for instance, or leave "
                'out `verification`: the default, "coupled", samples exactly from the target\'s distribution, too.'
            )
        for name in ("overlap", "compile", "prefix_cache"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**64 - 1, "or None")
        if not _is_auto(self.cache_memory):
            parse_bytes(self.cache_memory)
        asked = [named_devices(name, getattr(self, name)) for name in ("target_devices", "draft_devices")]
        check_apart(*asked)

    @property
    def cache_bytes(self) -> int | None:
        """`cache_memory` in bytes; None for "auto"."""
        return None if self.cache_memory == "auto" else parse_bytes(self.cache_memory)

    @property
    def eight_bit_cache(self) -> bool:
        """Whether keys and values are kept in 8 bits."""
        return self.cache_dtype != "auto"

    @classmethod
    def from_argument(cls, pearl: Any) -> PearlConfig | None:
        """What `generate(pearl=...)` means: False or None: no PEARL; True: the defaults; a config: itself."""
        if pearl is None or pearl is False:
            return None
        if pearl is True:
            return cls()
        if isinstance(pearl, cls):
            return pearl
        raise TypeError(f"`pearl` must be True, False or a {cls.__name__}, got {pearl!r}.")


def parse_bytes(value: int | str) -> int:
    """Bytes from an int or from a string such as "512MiB" or "2GB"."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([kmgt]i?b)?\s*", value.lower(), re.ASCII)
        if match is None:
            raise ValueError(
                f'`cache_memory` must be "auto", a number of bytes, or a size such as "512MiB" in KiB, MiB, GiB, TiB, '
                f"KB, MB, GB or TB, got {value!r}."
            )
        value = int(float(match[1]) * _UNITS[match[2] or ""])
    _check_int("cache_memory", value, 1, 2**62, 'of bytes, a size such as "512MiB", or "auto"')
    return value


def _is_auto(value: object) -> bool:
    return isinstance(value, str) and value == "auto"  # Arrays compare with a string, too, one by one.


def _check_int(name: str, value: object, low: int, high: int, also: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int {also}, got {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"`{name}` must be between {low} and {high}, {also}, got {value}.")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not isinstance(value, (str, torch.dtype)) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
