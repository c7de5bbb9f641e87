"""The kernels compile for GPUs, through the path that a launch takes, where there is none: nothing is run.

In a process of its own, since Triton either interprets kernels or compiles them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")

PROGRAM = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class AbsentDevice:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", int(sys.argv[1]), 32))

def compile_only(kernel, grid):
    def launch(*arguments, **options):
        compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
        print(kernel.__name__, len(compiled.asm["cubin"]) > 0, compiled.metadata.shared)
    return launch

driver.set_active(AbsentDevice())
JITFunction.__getitem__ = compile_only

from kernel_cases import random_case
from hf_pearl.cache import kernels

for seed, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
    case = random_case(seed, dtype)
    kernels.store(*case.new, case.pools, case.tables)
    kernels.move(case.pools, [5, 9], [4, 5])
    for num_parts in (1, 3):
        kernels.paged_attention(case.query, case.pools, case.tables, case.attention, None, num_parts)
"""
MAX_SHARED_BYTES = {80: 163 * 2**10, 90: 227 * 2**10}  # of a program, by compute capability


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_kernels_compile_for_a_gpu_that_is_not_here(capability: int, tmp_path: Path) -> None:
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", PROGRAM, str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    compiled = [line.split() for line in result.stdout.splitlines()]
    assert {name for name, *_ in compiled} == {
        "store_kernel",
        "move_kernel",
        "paged_attention_kernel",
        "merge_parts_kernel",
    }
    assert all(has_code == "True" for _, has_code, _ in compiled)
    assert max(int(shared) for *_, shared in compiled) <= MAX_SHARED_BYTES[capability]
