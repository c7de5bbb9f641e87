"""Starting a module of ours as a child process, which finds what this one finds, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

_PR_SET_PDEATHSIG = 1
_RUN = "import runpy, sys\nrunpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"


class Parent(NamedTuple):
    """Who starts a child process, and the signal that the system then sends to it.

    The system means the *thread* that has started the child. The first thread ends with its process, and its end may
    kill the child, even one that is stopped, or whose interpreter is held by one endless call. Another thread may end
    before: its end only wakes a child that is stopped, so that the child can see for itself.

    Attributes
    ----------
    process_id, death_signal : int
        The operating system's numbers.
    """

    process_id: int
    death_signal: int

    @classmethod
    def here(cls) -> Parent:
        """This thread of this process."""
        is_first = threading.get_native_id() == os.getpid()
        return cls(os.getpid(), int(signal.SIGKILL if is_first else signal.SIGCONT))

    @property
    def binding(self) -> str:
        """Python that asks for the signal, in the child, and ends it where the parent has ended before."""
        return (
            "import ctypes, os\n"
            f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {self.death_signal}, 0, 0, 0)\n"
            f"if os.getppid() != {self.process_id}: os._exit(0)\n"
        )


def why_no_child() -> str | None:
    """Why `start_module` would not start a module here; None if it would."""
    if not sys.executable:
        return "the path of the Python interpreter is unknown (embedded Python?)"
    if getattr(sys, "frozen", False):
        return "this program is a frozen app (PyInstaller?): a new process would run the app again, not Python"
    return None


def start_module(
    name: str, arguments: Sequence[object], descriptors: Sequence[int], log: int, num_threads: int
) -> subprocess.Popen[bytes]:
    """Run what `python -m name *arguments` runs, in a session of its own, where Ctrl-C does not reach it.

    It is bound to this process before it imports anything: torch and transformers take seconds.

    Parameters
    ----------
    descriptors : sequence of int
        What it inherits, under the same numbers.
    log : int
        Where its standard error goes.
    num_threads : int
        Threads of its arithmetic.
    """
    # It finds modules in the order in which this process does, and nothing because of where it was started.
    paths = [path for path in map(_absolute, sys.path) if path and os.pathsep not in path]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), PYTHONSAFEPATH="1")
    environment.update(OMP_NUM_THREADS=str(num_threads), TOKENIZERS_PARALLELISM="false")
    return subprocess.Popen(
        [sys.executable, "-c", Parent.here().binding + _RUN, name, *map(str, arguments)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        start_new_session=True,
        env=environment,
        cwd="/",
    )


def _absolute(path: object) -> str | None:
    """An entry of `sys.path` from the root on; None of what is no path, or leads from a folder that was deleted."""
    try:
        return os.path.abspath(path) if isinstance(path, str) else None
    except OSError:
        return None
