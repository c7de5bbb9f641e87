"""Calls that are interrupted at random moments: `python interrupted.py NUMBER SEED`, prints what came of them as JSON.

In a process of its own: an interrupt that comes a moment too late would end pytest.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from typing import Any

import torch
from conftest import take_stock
from models import EXECUTIONS, assert_nothing_held, enabled_for_tiny_models, noisy_copy, random_prompts, tiny_model

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.registry import engine_for

KINDS = ("once", "twice", "group")
DEADLINE = 60.0  # seconds


class Interrupts:
    """Raises KeyboardInterrupt, as Python does, while it may: in a call."""

    may_raise = False

    def __call__(self, *args: Any) -> None:
        if self.may_raise:
            raise KeyboardInterrupt


def send(kind: str, delay: float, pause: float, sent: list[float]) -> None:
    """Send this process, or its whole group, interrupts; note when the first was sent."""
    time.sleep(delay)
    sent.append(time.perf_counter())
    if kind == "group":
        os.killpg(0, signal.SIGINT)
        return
    os.kill(os.getpid(), signal.SIGINT)
    if kind == "twice":
        time.sleep(pause)
        os.kill(os.getpid(), signal.SIGINT)


def main(number: int, seed: int) -> None:
    """Interrupt `number` calls, and compare the call behind each with what is right."""
    chance, interrupts = random.Random(seed), Interrupts()
    signal.signal(signal.SIGINT, interrupts)
    target = tiny_model("llama", 1, num_hidden_layers=3)
    draft = noisy_copy(target, 0.03, 2)
    inputs = random_prompts(chance, 2, (20, 33))
    expected = target.generate(**inputs, do_sample=False, max_new_tokens=40).tolist()
    latencies, num_drafted = [], 0
    before = take_stock()
    for index in range(number):
        execution, kind = EXECUTIONS[index % 3], KINDS[index // 3 % 3]
        config = PearlConfig(execution=execution, draft_length=chance.choice(("auto", 3)))
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40, "assistant_model": draft, "pearl": config}
        sent: list[float] = []
        arguments = kind, chance.uniform(0.0, 0.3), chance.choice((0.0, 0.0001, 0.01)), sent
        sender = threading.Thread(target=send, args=arguments)
        deadline = time.monotonic() + DEADLINE
        try:
            interrupts.may_raise = True
            sender.start()
            while time.monotonic() < deadline:
                target.generate(**inputs, **options)
            raise AssertionError(f"interrupt {index} ({execution}, {kind}) was lost")
        except KeyboardInterrupt:
            interrupts.may_raise = False
            latencies.append(time.perf_counter() - sent[0])
        sender.join()
        output = target.generate(**inputs, **options, return_dict_in_generate=True)
        assert output.sequences.tolist() == expected, f"the call behind interrupt {index} ({execution}, {kind})"
        assert output.pearl.execution == execution
        num_drafted += output.pearl.draft_steps > 0
        assert_nothing_held(target, draft)
        worker = engine_for(target, draft).workers.worker
        if worker is not None and worker.has_served:
            worker_id = worker.process_id
    hf_pearl.release(draft)
    left = take_stock().beyond(before)
    print(json.dumps({"latencies": latencies, "drafted": num_drafted, "worker": worker_id, "left": left}))


if __name__ == "__main__":
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    with enabled_for_tiny_models():
        main(int(sys.argv[1]), int(sys.argv[2]))
