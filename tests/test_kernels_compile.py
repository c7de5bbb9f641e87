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
import contextlib, io, re, sys
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class AbsentDevice:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", int(sys.argv[1]), 32))

def compile_only(kernel, grid):
    def launch(*arguments, **options):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
        spilled = re.findall(r"(\\d+) bytes spill stores", log.getvalue())  # none where it has been compiled before
        print(kernel.__name__, len(compiled.asm["cubin"]) > 0, compiled.metadata.shared, *spilled)
    return launch

driver.set_active(AbsentDevice())
JITFunction.__getitem__ = compile_only
knobs.nvidia.dump_ptxas_log = True

from kernel_cases import Shape, random_case
from hf_pearl.cache import kernels
from hf_pearl.decoding import noise_kernels

def compile_step(case, *numbers_of_parts):
    kernels.store(*case.new, case.pools, case.tables)
    kernels.move(case.pools, [5, 9], [4, 5])
    for num_parts in numbers_of_parts:
        kernels.paged_attention(case.query, case.pools, case.tables, case.attention, None, num_parts)

for seed, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32)):
    compile_step(random_case(seed, dtype), 1, 3)
for group in (2, 4, 8):  # Qwen3's, of 0.6B, 8B and 32B
    compile_step(random_case(group, torch.bfloat16, shape=Shape(1, 8, group, 128)), 3)
    compile_step(random_case(group, torch.bfloat16, shape=Shape(64, 8, group, 128)), 1)
compile_step(random_case(2, torch.float32, shape=Shape(64, 8, 4, 128)), 1)

scores, rows = torch.zeros(3, 151_936), torch.zeros(3, 4, dtype=torch.int64)
noise_kernels.noisy_scores(scores, rows)
noise_kernels.noisy_max(scores, rows)
"""
MAX_SHARED_BYTES = {80: 163 * 2**10, 90: 227 * 2**10}  # of a program, by compute capability
MAX_SPILLED_BYTES = 256  # of a thread: what does not fit in its registers costs trips to memory in every round


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
        "noisy_scores_kernel",
    }
    assert all(has_code == "True" for _, has_code, *_ in compiled)
    assert max(int(shared) for _, _, shared, *_ in compiled) <= MAX_SHARED_BYTES[capability]
    spilled = [(name, int(num_bytes)) for name, _, _, *known in compiled for num_bytes in known]
    assert len(spilled) >= 20, "ptxas no longer says what it spills, or elsewhere"
    assert [each for each in spilled if each[1] > MAX_SPILLED_BYTES] == []
