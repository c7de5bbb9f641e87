"""What every test shares: no network, repeatable seeds, shards, and a check that no module leaves anything behind.

A machine with a GPU may have no more than torch, transformers, Triton and pytest: test modules that need other packages
are left out where these are missing, and the report's header says so.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import os
import re
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported, which reads it once

import psutil
import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # So it is in a background job of a shell.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Read when Triton is imported first, whoever does.

BASE_SEED = int(os.environ.get("HF_PEARL_SEED", "0"))
SHARD = os.environ.get("HF_PEARL_SHARD", "")
LEAK_PATIENCE = 5.0  # seconds: a worker that was told to end needs a moment

# Opened by libraries at any moment and kept: no lane opens them.
LASTING_DESCRIPTORS = ("/dev/null", "/dev/urandom", "/dev/random", "/dev/pts/", "/dev/tty", "/proc/", "/sys/")
# The driver of CUDA opens more of these as streams, events and pinned memory are made, and so does its profiler as it
# starts. Elsewhere they count: asyncio's and our own descriptors are of these kinds, too.
CUDA_DESCRIPTORS = ("/dev/nvidia", "anon_inode:", "pipe:", "socket:", "/memfd:") if torch.cuda.is_available() else ()
OWN_DESCRIPTORS = "/memfd:hf_pearl"  # Every worker process has some: where one is left behind, these tell everywhere.

OPTIONAL_PACKAGES = ("hypothesis", "jupyter_core", "nbclient", "nbformat", "peft")
MISSING = {name for name in OPTIONAL_PACKAGES if importlib.util.find_spec(name) is None}


def imported(path: Path) -> set[str]:
    """What a test module imports, by its first name."""
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def left_out() -> list[str]:
    """The test modules that need a missing package, or another module that does."""
    needs = {path.stem: imported(path) for path in sorted(Path(__file__).parent.glob("*.py"))} if MISSING else {}
    needs.pop("conftest", None)
    missing = set(MISSING)
    while more := {name for name, names in needs.items() if names & missing} - missing:
        missing |= more
    return [f"{name}.py" for name in sorted(missing & needs.keys())]


collect_ignore = left_out()

if "hypothesis" not in MISSING:
    import hypothesis

    profile = {"deadline": None, "derandomize": False, "database": None, "print_blob": True}
    hypothesis.settings.register_profile("hf_pearl", **profile)
    hypothesis.settings.load_profile("hf_pearl")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let hypothesis draw from our seed, unless it was given one of its own."""
    if config.getoption("hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(BASE_SEED)


def pytest_sessionstart() -> None:
    """Start now what starts once and then lives as long as the process, so that no module seems to have left it."""
    resource_tracker.ensure_running()
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # the driver's context
    if "jupyter_core" not in MISSING:
        from jupyter_core.utils import ensure_event_loop

        ensure_event_loop()  # nbclient's


def pytest_report_header() -> str:
    """Say what a failing run needs to be repeated."""
    shard = f" HF_PEARL_SHARD={SHARD}" if SHARD else ""
    without = f"; without {', '.join(sorted(MISSING))}: {len(collect_ignore)} modules left out" if MISSING else ""
    return f"hf_pearl: HF_PEARL_SEED={BASE_SEED}{shard}{without}"


def parse_shard(text: str) -> tuple[int, int]:
    """Read "i/n" (the i-th of n parts, from 1); an empty text is the whole."""
    match = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    index, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= index <= count:
        raise pytest.UsageError(f"HF_PEARL_SHARD must be i/n with 1 <= i <= n, for instance 2/5; got {text!r}")
    return index, count


@pytest.hookimpl(trylast=True)  # after -m and -k, so that shards of one selection are of equal size
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none, and keep every n-th test of a shard."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    index, count = parse_shard(SHARD)
    kept = items[index - 1 :: count]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != index - 1])
        items[:] = kept


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return a seed of 32 bits that depends on HF_PEARL_SEED and on the test, not on the order of the tests."""
    return zlib.crc32(f"{BASE_SEED}:{request.node.nodeid}".encode())


class Held(NamedTuple):
    """What this process holds at one moment, in words."""

    threads: set[str]
    children: set[str]
    descriptors: set[str]

    def beyond(self, before: Held) -> str:
        """Describe what is held now and was not before; empty if nothing is."""
        new = {kind: sorted(now - then) for kind, now, then in zip(self._fields, self, before, strict=True)}
        return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in new.items() if names)


def held_threads() -> set[str]:
    """List Python's threads but tqdm's monitor; native ones (OpenMP, torch's pools) are the libraries' own."""
    threads = [thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"]
    return {f"{thread.name} ({thread.ident})" for thread in threads}


def held_children() -> set[str]:
    """List child processes and theirs, zombies included: a worker that ended must have been waited for."""
    children = set()
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline()) or process.name()
        except psutil.ZombieProcess:
            command = "zombie"
        except psutil.NoSuchProcess:
            continue
        children.add(f"{command[:120]} ({process.pid})")
    return children


def held_descriptors() -> set[str]:
    """List open descriptors with what they refer to; empty where the system does not show them."""
    folder = Path("/proc/self/fd")
    descriptors = set()
    for name in os.listdir(folder) if folder.is_dir() else ():
        try:
            target = os.readlink(folder / name)
        except OSError:  # closed since, as the listing's own descriptor is
            continue
        if target.startswith(OWN_DESCRIPTORS) or not target.startswith(LASTING_DESCRIPTORS + CUDA_DESCRIPTORS):
            descriptors.add(f"{name} -> {target}")
    return descriptors


def take_stock() -> Held:
    """Return what this process holds now."""
    return Held(held_threads(), held_children(), held_descriptors())


@pytest.fixture(scope="module", autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a module that leaves threads, child processes or descriptors behind; it has a moment to let go of them."""
    before = take_stock()
    yield
    deadline = time.monotonic() + LEAK_PATIENCE
    gc.collect()
    while leaked := take_stock().beyond(before):
        if time.monotonic() > deadline:
            pytest.fail(f"left behind by this module: {leaked}", pytrace=False)
        time.sleep(0.05)
        gc.collect()
