"""Starting a module of ours as a child process, which finds what this one finds, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence


def start_module(
    name: str, arguments: Sequence[object], descriptors: Sequence[int], log: int, num_threads: int
) -> subprocess.Popen[bytes]:
    """Run `python -m name *arguments` in a session of its own, where Ctrl-C does not reach it.

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
    paths = [os.path.abspath(path) for path in sys.path if isinstance(path, str) and os.pathsep not in path]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), PYTHONSAFEPATH="1")
    environment.update(OMP_NUM_THREADS=str(num_threads), TOKENIZERS_PARALLELISM="false")
    return subprocess.Popen(
        [sys.executable, "-m", name, *map(str, arguments)],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        start_new_session=True,
        env=environment,
        cwd="/",
    )
