"""hf_pearl: parallel speculative decoding (PEARL, arXiv 2408.11850) for Hugging Face transformers.

    import hf_pearl

    hf_pearl.enable()
    target.generate(**inputs, assistant_model=draft, pearl=True)

The way in is `generation.py`; `engine.py` runs a call; `decoding/` is the algorithm, `parallel/` runs the two lanes,
`cache/` holds their keys and values.
"""

from .cache import PagedPrefixCache
from .config import PearlConfig
from .decoding.stats import PearlStats
from .enabling import disable, enable
from .errors import PearlError, PearlOutOfBlocksError, PearlUnsupportedModelError, PearlWorkerError
from .generation import PearlGenerationMixin
from .launching.launch import launch
from .launching.launched_pair import LaunchedPair
from .outputs import PearlGenerateOutput
from .pair import load_demo_pair
from .planning.plan import Plan, plan
from .registry import clear_cache, release
from .simulate import SimulatedTimes, simulate
from .smollm2 import load_smollm2_pair
from .traces import Trace, record_traces
from .tuning import Tuning, tune

__version__ = "0.1.0"

__all__ = [
    "LaunchedPair",
    "PagedPrefixCache",
    "PearlConfig",
    "PearlError",
    "PearlGenerateOutput",
    "PearlGenerationMixin",
    "PearlOutOfBlocksError",
    "PearlStats",
    "PearlUnsupportedModelError",
    "PearlWorkerError",
    "Plan",
    "SimulatedTimes",
    "Trace",
    "Tuning",
    "clear_cache",
    "disable",
    "enable",
    "launch",
    "load_demo_pair",
    "load_smollm2_pair",
    "plan",
    "record_traces",
    "release",
    "simulate",
    "tune",
]
