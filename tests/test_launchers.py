"""`launch` under `torchrun`, `accelerate launch` and MPI, on one host and as on two: the same tokens on all ranks."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from models import enabled_for_tiny_models, noisy_copy, random_prompts, tiny_model, tiny_tokenizer
from test_launch import NEW_TOKENS, ROOT, RUN_SECONDS, Saved, expected_results, save, script
from transformers import pipeline

import hf_pearl
from hf_pearl.parallel.ranks import shared_collectives

TORCHRUN = "torch.distributed.run"
ACCELERATE = "accelerate.commands.launch"
QUIET = ["--mixed_precision", "no", "--dynamo_backend", "no"]  # What is not said, it warns of.

pytestmark = pytest.mark.skipif(not shared_collectives.HAS_EVENTS, reason="ranks need Linux (memfd, eventfd)")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    target = tiny_model("llama", 3)
    draft = noisy_copy(target, 0.03, 4)
    folders = save(target, draft, tmp_path_factory.mktemp("llama"))
    yield Saved(target, draft, folders, random_prompts(random.Random(5), 4, (5, 20)))
    hf_pearl.release(target)


def run_together(
    commands: Sequence[Sequence[str]], folder: Path, environments: Sequence[Mapping[str, str]] = ({},)
) -> dict[str, Any]:
    """Run Python with each of some arguments, all at the same time; what their ranks write into a folder, by rank."""
    usual = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=usual | environments[place % len(environments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place, command in enumerate(commands)
    ]
    try:
        for process in processes:
            errors = process.communicate(timeout=RUN_SECONDS)[1]
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in processes:
            if process.poll() is None:  # Only after an error; its ranks hold its pipes.
                for each in (*psutil.Process(process.pid).children(recursive=True), process):
                    each.kill()
            process.communicate()
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def write_script(folder: Path, text: str) -> str:
    (folder / "script.py").write_text(text)
    return str(folder / "script.py")


@pytest.mark.slow
def test_accelerate_launch_starts_the_ranks(saved: Saved, tmp_path: Path) -> None:
    options = ["--multi_gpu", "--num_processes", "3", "--num_machines", "1", "--main_process_port", "0", *QUIET]
    command = ["-m", ACCELERATE, *options, write_script(tmp_path, script(saved, tmp_path, 1, 2))]
    assert run_together([command], tmp_path) == dict.fromkeys("012", expected_results(saved))


@pytest.mark.slow
def test_accelerate_launch_for_cpus_starts_one_process_which_starts_the_ranks(saved: Saved, tmp_path: Path) -> None:
    options = ["--cpu", "--num_processes", "3", "--num_machines", "1", *QUIET]
    command = ["-m", ACCELERATE, *options, write_script(tmp_path, script(saved, tmp_path, 1, 2))]
    assert run_together([command], tmp_path) == {"0": expected_results(saved)}


@pytest.mark.slow
def test_processes_of_mpi_are_ranks_once_accelerate_has_joined_them(saved: Saved, tmp_path: Path) -> None:
    """As `mpirun`, which `accelerate launch` starts where it is given a host file, would start them."""
    text = "from accelerate import Accelerator\nAccelerator(cpu=True)\n" + script(saved, tmp_path, 1, 2)
    usual = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}
    usual |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    own = [{"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)} for rank in range(3)]
    commands = [[write_script(tmp_path, text)]] * 3
    results = run_together(commands, tmp_path, [usual | each for each in own])
    assert results == dict.fromkeys("012", expected_results(saved))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE])
@pytest.mark.parametrize("sizes", [(1, 3), (2, 2)])
def test_two_hosts_share_the_ranks(launcher: str, sizes: tuple[int, int], saved: Saved, tmp_path: Path) -> None:
    """Two launchers with two ranks each, which meet on a port: with sizes (1, 3) the target lies on both hosts."""
    path, port = write_script(tmp_path, script(saved, tmp_path, *sizes)), free_port()
    commands = []
    for host in "01":
        if launcher == TORCHRUN:
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
            options = ["--nnodes", "2", "--node-rank", host, "--nproc-per-node", "2", *meeting]
        else:
            meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--same_network"]
            options = ["--multi_gpu", "--num_machines", "2", "--machine_rank", host, "--num_processes", "4", *QUIET]
            options += meeting
        commands.append(["-m", launcher, *options, path])
    assert run_together(commands, tmp_path) == dict.fromkeys("0123", expected_results(saved))


AGAIN = """
import json, os
import hf_pearl, torch
import torch.distributed as dist

def launch(target_tp, draft_tp):
    sizes = dict(target_tp=target_tp, draft_tp=draft_tp, dtype=torch.float64)
    return hf_pearl.launch({target!r}, {draft!r}, **sizes)

def tokens(pair):
    return pair.generate(torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens={new}).tolist()

outputs = []
for sizes in ((1, 2), (2, 1), (2, 1)):
    with launch(*sizes) as pair:
        outputs.append(tokens(pair))
assert not dist.is_initialized()
first, second = launch(1, 2), launch(2, 1)
outputs += [tokens(first), tokens(second)]
first.close()
outputs.append(tokens(second))
second.close()
assert not dist.is_initialized()
dist.init_process_group("gloo")  # The script's own may come behind, and stays when a pair ends.
with launch(2, 1) as pair:
    outputs.append(tokens(pair))
dist.barrier()
with open(f"{folder}/{{os.environ['RANK']}}.json", "w") as file:
    json.dump(outputs, file)
"""


def test_a_script_may_launch_one_pair_after_the_other_and_two_at_once(saved: Saved, tmp_path: Path) -> None:
    text = AGAIN.format(target=str(saved.folders[0]), draft=str(saved.folders[1]), new=NEW_TOKENS, folder=tmp_path)
    command = ["-m", TORCHRUN, "--standalone", "--nproc-per-node", "3", write_script(tmp_path, text)]
    expected = saved.target.generate(torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=NEW_TOKENS).tolist()
    assert run_together([command], tmp_path) == dict.fromkeys("012", [expected] * 7)


LISTENERS = """
import json, os
import hf_pearl, psutil, torch
pair = hf_pearl.launch({target!r}, {draft!r}, target_tp=2, dtype=torch.float64)
prompt = torch.tensor([[1, 2, 3]])
pair.generate(prompt, do_sample=False, max_new_tokens=4)

def addresses(processes):
    found = [each for process in processes for each in process.net_connections(kind="inet")]
    return [each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN or each.type == 2]

if os.environ["RANK"] == "0":
    launcher = psutil.Process(os.getppid())
    with open("{folder}/0.json", "w") as file:
        json.dump([addresses([launcher]), addresses(launcher.children(recursive=True))], file)
pair.generate(prompt, do_sample=False, max_new_tokens=4)  # The others are still there.
pair.close()
"""


@pytest.mark.slow
def test_what_listens_under_torchrun_is_what_is_said(saved: Saved, tmp_path: Path) -> None:
    text = LISTENERS.format(target=str(saved.folders[0]), draft=str(saved.folders[1]), folder=tmp_path)
    command = ["-m", TORCHRUN, "--standalone", "--nproc-per-node", "3", write_script(tmp_path, text)]
    of_launcher, of_ranks = run_together([command], tmp_path)["0"]
    assert of_ranks and all(ip_address(each).is_loopback for each in of_ranks)
    assert of_launcher and all(ip_address(each).is_unspecified for each in of_launcher)
    rows = (ROOT / "SECURITY.md").read_text("utf-8").splitlines()
    assert any(row.startswith("| gloo, NCCL | every rank | the interfaces that") for row in rows)
    assert any(row.startswith("| TCPStore | the launcher | all interfaces, ") for row in rows)


STOPPED = """
import json, os, signal
import hf_pearl, torch
from hf_pearl.parallel.ranks import world
from transformers import LogitsProcessorList
world.ANSWER_SECONDS = 3.0
pair = hf_pearl.launch({target!r}, target_tp=2, dtype=torch.float64)
with open(f"{folder}/pid.{{os.environ['RANK']}}", "w") as file:
    file.write(str(os.getpid()))
pair.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)

def tell_the_other(number):
    with open("{folder}/pid.1") as file:
        os.kill(int(file.read()), number)

def stop(input_ids, scores):
    tell_the_other(signal.SIGSTOP)
    return scores

try:
    pair.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, logits_processor=LogitsProcessorList([stop]))
    message = "no error"
except hf_pearl.PearlWorkerError as error:
    message = str(error)
if os.environ["RANK"] == "0":
    tell_the_other(signal.SIGCONT)
with open(f"{folder}/{{os.environ['RANK']}}.json", "w") as file:
    json.dump(message, file)
os._exit(0)
"""


@pytest.mark.slow
def test_a_rank_that_stands_still_is_given_up(saved: Saved, tmp_path: Path) -> None:
    path = write_script(tmp_path, STOPPED.format(target=str(saved.folders[0]), folder=tmp_path))
    found = run_together([["-m", TORCHRUN, "--standalone", "--nproc-per-node", "2", path]], tmp_path)
    assert set(found) == {"0", "1"}
    assert found["0"].startswith("target lane, forward ") and "imed out" in found["0"]
    assert "of the target lane" in found["1"]


STOPPED_DRAFT = """
import json, os, signal
import hf_pearl, torch
from hf_pearl.parallel.ranks import world
from transformers import LogitsProcessorList
world.ANSWER_SECONDS = 3.0
pair = hf_pearl.launch({target!r}, {draft!r}, target_tp={target_tp}, dtype=torch.float64)
rank, num_ranks = int(os.environ["RANK"]), {target_tp} + 1
with open(f"{folder}/pid.{{rank}}", "w") as file:
    file.write(str(os.getpid()))
options = dict(max_new_tokens={new}, do_sample=False, pearl=hf_pearl.PearlConfig(draft_length=4))
prompt = torch.tensor([[1, 2, 3]])
pair.generate(prompt, **options)  # All files are there then.

def tell_the_draft(number):
    with open(f"{folder}/pid.{{num_ranks - 1}}") as file:
        os.kill(int(file.read()), number)

def stop(input_ids, scores):
    if input_ids.shape[1] == 6:
        tell_the_draft(signal.SIGSTOP)
    return scores

outputs = []
try:
    outputs.append(pair.generate(prompt, logits_processor=LogitsProcessorList([stop]), **options).tolist())
    outputs.append(pair.generate(prompt, **options).tolist())
except hf_pearl.PearlWorkerError as error:
    outputs.append(str(error))
if rank == 0:
    tell_the_draft(signal.SIGCONT)
with open(f"{folder}/{{rank}}.json", "w") as file:
    json.dump(outputs, file)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target_tp", [1, 2])
def test_a_draft_that_stands_still_is_given_up_and_costs_no_token(target_tp: int, saved: Saved, tmp_path: Path) -> None:
    names = {"target": str(saved.folders[0]), "draft": str(saved.folders[1]), "folder": tmp_path, "new": NEW_TOKENS}
    path = write_script(tmp_path, STOPPED_DRAFT.format(**names, target_tp=target_tp))
    found = run_together([["-m", TORCHRUN, "--standalone", "--nproc-per-node", str(target_tp + 1), path]], tmp_path)
    expected = saved.target.generate(torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=NEW_TOKENS).tolist()
    *of_target, (of_draft,) = (found[str(rank)] for rank in range(target_tp + 1))
    assert of_target == [[expected, expected]] * target_tp
    assert "has given this draft up" in of_draft


PIPELINES = """
import json, os
import hf_pearl, torch
from hf_pearl.enabling import enabled
from transformers import AutoTokenizer, pipeline
sizes = dict(target_tp={target_tp}, draft_tp={draft_tp}, dtype=torch.float64)
pair = hf_pearl.launch({target!r}, {draft!r}, **sizes)
tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})
texts, options = ["abc", "fed abc"], dict(do_sample=False, max_new_tokens={new})
both = pair.pipeline(tokenizer), pipeline("text-generation", model=pair.target, tokenizer=tokenizer)
outputs = [pipe(texts, batch_size=batch_size, **options) for pipe in both for batch_size in (1, 2)]
errors = []
try:
    rejection = hf_pearl.PearlConfig(verification="rejection", draft_length=4)
    pair.target.generate(torch.tensor([[1, 2, 3]]), pearl=rejection, do_sample=True, max_new_tokens=4)
except (NotImplementedError, hf_pearl.PearlWorkerError) as error:
    errors.append(f"{{type(error).__name__}}: {{error}}")
for work in (lambda: hf_pearl.tune(pair.target, pair.draft, [[1, 2]]), lambda: hf_pearl.plan(pair.target, pair.draft)):
    try:
        work()
    except NotImplementedError as error:
        errors.append(str(error))
before = pair.target.generate
hf_pearl.enable(pair.target)
with enabled(pair.target):
    pass
assert pair.target.generate is before
outputs.append(both[1](texts, **options))
pair.close()
try:
    closed = pair.target.generate(torch.tensor([[1, 2, 3]]), **options).tolist()
except hf_pearl.PearlWorkerError as error:
    closed = str(error)
with open(f"{folder}/{{os.environ['RANK']}}.json", "w") as file:
    json.dump([outputs, errors, closed], file)
pair.close()
"""


@pytest.mark.parametrize("sizes", [(1, 1), pytest.param((2, 2), marks=pytest.mark.slow)])
def test_pipelines_over_the_target_work_on_every_rank_and_what_cannot_is_refused(
    sizes: tuple[int, int], saved: Saved, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer(1)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = PIPELINES.format(
        target=str(saved.folders[0]),
        draft=str(saved.folders[1]),
        draft_tp=sizes[0],
        target_tp=sizes[1],
        tokenizer=str(tmp_path / "tokenizer"),
        new=NEW_TOKENS,
        folder=tmp_path,
    )
    options = ["--standalone", "--nproc-per-node", str(sum(sizes))]
    found = run_together([["-m", TORCHRUN, *options, write_script(tmp_path, textwrap.dedent(text))]], tmp_path)
    plain = pipeline("text-generation", model=saved.target, tokenizer=tokenizer)
    expected = plain(["abc", "fed abc"], do_sample=False, max_new_tokens=NEW_TOKENS)
    assert set(found) == set(map(str, range(sum(sizes))))
    ordinary = saved.target.generate(torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=NEW_TOKENS).tolist()
    for rank, (outputs, (rejection, tuned, planned), closed) in found.items():
        has_all = sizes[1] == 1 and rank == "0"
        assert closed == (ordinary if has_all else "this pair has been closed: `launch` it again.")
        assert outputs == [expected] * 5
        kind = "NotImplementedError: " if rank == "0" else "PearlWorkerError: `generate` failed on rank 0: "
        assert rejection.startswith(kind) and '`verification="rejection"` needs the draft' in rejection
        assert "from_pretrained" in tuned and "`hf_pearl.launch`" in tuned
        assert "Pass the folder or the name" in planned
