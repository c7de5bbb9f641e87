"""What SECURITY.md promises: no listener, no pickle after start-up, no name for others to open, and junk is refused."""

from __future__ import annotations

import ast
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from models import EXECUTIONS, enabled_for_tiny_models, expected_warnings, left_padded, noisy_copy, tiny_model
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import hf_pearl
from hf_pearl import PearlConfig
from hf_pearl.decoding.messages import MAX_TREE_TOKENS, Admission, TokenTree, Verdict
from hf_pearl.parallel.ranks.shared_collectives import Table
from hf_pearl.parallel.workers import descriptors, records, shared_memory
from hf_pearl.parallel.workers.draft_workers import DraftWorker
from hf_pearl.parallel.workers.processor_specs import decode_processors
from hf_pearl.parallel.workers.records import MalformedRecordError
from hf_pearl.parallel.workers.shared_distributions import SharedDistributions
from hf_pearl.parallel.workers.shared_memory import NUM_SLOTS, Channel, RingReader, RingWriter
from hf_pearl.parallel.workers.shipping import can_ship
from hf_pearl.registry import engine_for

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 120.0
OPTIONS = {"do_sample": False, "max_new_tokens": 60}
ACCEPTS = 0x10000  # the flag of a Unix socket that others may connect to, in /proc/net/unix

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="worker processes need Linux")


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@pytest.fixture(scope="module")
def target() -> Iterator[PreTrainedModel]:
    model = tiny_model("llama", 1)
    yield model
    hf_pearl.release(model)


@pytest.fixture(scope="module")
def draft(target: PreTrainedModel) -> PreTrainedModel:
    return noisy_copy(target, 0.03, 2)


INPUTS = left_padded([list(range(1, 41))])


def call(target: PreTrainedModel, draft: PreTrainedModel, execution: str, **options: Any) -> Any:
    pearl = PearlConfig(execution=execution, draft_length=options.pop("draft_length", 4))
    options = {**INPUTS, **OPTIONS, **options, "assistant_model": draft, "return_dict_in_generate": True}
    return target.generate(**options, pearl=pearl)


def worker_of(target: PreTrainedModel, draft: PreTrainedModel) -> DraftWorker:
    """The worker of a pair, ready."""
    call(target, draft, "processes")
    worker = engine_for(target, draft).workers.worker
    assert worker is not None and worker.wait_until_ready(START_SECONDS)
    return worker


class Once(StoppingCriteria):
    """Does something in the midst of a call."""

    def __init__(self, do: Callable[[], Any]) -> None:
        self.do: Callable[[], Any] | None = do

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.do is not None and input_ids.shape[1] > 60:
            do, self.do = self.do, None
            do()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


# -- who can reach a lane -----------------------------------------------------------------------------------------


def descriptors_of(process_id: int) -> dict[int, str]:
    """What the descriptors of a process refer to."""
    folder = Path(f"/proc/{process_id}/fd")
    return {int(name): os.readlink(folder / name) for name in os.listdir(folder) if os.path.lexists(folder / name)}


def listening() -> set[str]:
    """Every socket of this process and those below it that others may connect or send to."""
    found = {}
    for name in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if not name.startswith("tcp") or fields[3] == "0A":
                found[fields[9]] = f"{name} {fields[1]}"
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & ACCEPTS or len(fields) > 7:  # one with a name
            found[fields[6]] = f"unix {fields[7:]}"
    processes = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    links = {link for process_id in processes for link in descriptors_of(process_id).values()}
    inodes = {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
    return {what for inode, what in found.items() if inode in inodes}


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_nothing_listens_while_a_call_runs(execution: str, target: PreTrainedModel, draft: PreTrainedModel) -> None:
    hf_pearl.release(target)
    before, seen = listening(), []
    if execution == "processes":
        worker_of(target, draft)
    output = call(
        target, draft, execution, stopping_criteria=StoppingCriteriaList([Once(lambda: seen.append(listening()))])
    )
    assert output.pearl.execution == execution and output.pearl.draft_steps > 0
    assert [sockets - before for sockets in seen] == [set()]


def test_what_listens_is_seen(tmp_path: Path) -> None:
    before = listening()
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp, socket.socket(socket.AF_UNIX) as unix:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", 0))
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        assert sorted(each.split()[0] for each in listening() - before) == ["tcp", "udp", "unix"]


def test_what_lanes_share_has_no_name(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Memory and sockets without one, which only a process that has a descriptor of them can reach."""
    segments = set(os.listdir("/dev/shm"))
    worker = worker_of(target, draft)
    links = {link for link in descriptors_of(worker.process_id).values() if not link.startswith("/dev/null")}
    assert {link.split(":")[0] for link in links} <= {"/memfd", "anon_inode", "socket", "pipe"}, links
    assert any(link.startswith("/memfd:hf_pearl_channel") for link in links)
    mapped = Path(f"/proc/{worker.process_id}/maps").read_text()
    assert "/dev/shm" not in mapped and "/memfd:hf_pearl_channel" in mapped
    ours = [name for name in set(os.listdir("/dev/shm")) - segments if "pearl" in name or "torch" in name]
    assert ours == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_open_what_lanes_share(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    worker = worker_of(target, draft)
    paths = [f"/proc/{process}/fd/{number}" for process in (os.getpid(), worker.process_id)
             for number, link in descriptors_of(process).items() if link.startswith("/memfd:hf_pearl")]  # fmt: skip
    assert len(paths) > 4
    script = (
        "import os, sys\n"
        "for path in sys.argv[1:]:\n"
        "    try: print(os.open(path, os.O_RDWR))\n"
        "    except PermissionError: print('refused')\n"
    )
    command = ["/usr/bin/env", "python3", "-c", script]
    own = subprocess.run([*command, *paths], capture_output=True, text=True, check=True).stdout.split()
    other = subprocess.run([*command, *paths], capture_output=True, text=True, check=True, user=65534).stdout.split()
    assert all(each.isdecimal() for each in own) and other == ["refused"] * len(paths)


# -- what is never done -------------------------------------------------------------------------------------------


def calls_in(path: Path) -> Iterator[tuple[str, str, ast.Call]]:
    """Every call of a source file: the function that it stands in, what is called, the call."""
    for function in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    yield function.name, ast.unparse(node.func), node


SOURCES = sorted((ROOT / "hf_pearl").rglob("*.py"))


def test_nothing_is_unpickled_but_the_model_at_start_up() -> None:
    unpickled = re.compile(r"\b(pickle|marshal|dill|shelve)\.(load|loads|Unpickler|open)$|\btorch\.load$|^(eval|exec)$")
    found = {(path.name, name) for path in SOURCES for name, what, _ in calls_in(path) if unpickled.search(what)}
    assert found == {("worker.py", "main"), ("shipping.py", "build")}
    text = (ROOT / "hf_pearl" / "parallel" / "workers" / "worker.py").read_text("utf-8")
    assert text.index("pickle.load(") < text.index("build(shipment") < text.index("server.serve()")


def test_remote_code_is_never_trusted_for_the_user() -> None:
    keywords = {
        (each.arg, ast.unparse(each.value)) for path in SOURCES for *_, node in calls_in(path) for each in node.keywords
    }
    assert len(keywords) > 100
    assert {value for name, value in keywords if name == "trust_remote_code"} <= {"False"}
    asked = [node for path in SOURCES for _, what, node in calls_in(path) if what == "AutoConfig.from_pretrained"]
    assert len(asked) >= 3  # Nobody is asked whether to trust what a folder says: ranks have no standard input.
    assert all("trust_remote_code" in {each.arg for each in node.keywords} for node in asked)


def test_remote_code_does_not_travel_to_a_worker() -> None:
    model = tiny_model("llama", 3)
    model.__class__ = type("Remote", (type(model),), {"__module__": "transformers_modules.org.model"})
    assert "cannot be imported" in str(can_ship(model))


# -- junk ---------------------------------------------------------------------------------------------------------


def some_word(chance: random.Random) -> int:
    """A 64-bit number, of any size."""
    return chance.choice((chance.randint(-2, 12), chance.randrange(2**16), chance.randrange(-(2**63), 2**63)))


def damaged(words: array[int], chance: random.Random) -> array[int]:
    """A copy that is changed, cut or longer."""
    words = words[:]
    for _ in range(chance.choice((1, 1, 3))):
        match chance.randrange(3) if words else 2:
            case 0:
                words[chance.randrange(len(words))] = some_word(chance)
            case 1:
                words = words[: chance.randrange(len(words))]
            case _:
                words.append(some_word(chance))
    return words


OPTION_VALUES = records.CallOptions(64, 0, True, True, "", False, "auto", 32, 8, 512, False, True, False, [])
WELL_FORMED = [
    records.encode_message(message)
    for message in (
        Admission(5, (1, 2, 3), 100, 2, 12345),
        Verdict(5, 1, (7, 8)),
        records.BeginCall(3, OPTION_VALUES),
        records.EndCall(3),
        records.Quit(),
    )
]
TREE = TokenTree(5, 1, 3, 40, (1, 2, 3), (-1, 0, 0), (0.9, 0.8, 0.1))


def junk_message(chance: random.Random) -> None:
    words = array("q", [some_word(chance) for _ in range(chance.randrange(20))])
    if chance.random() < 0.7:
        words = damaged(chance.choice(WELL_FORMED), chance)
    message = records.decode_message(words)
    assert records.decode_message(records.encode_message(message)) == message


def junk_frame(chance: random.Random) -> None:
    control, ring = memoryview(array("q", bytes(256))), memoryview(array("q", bytes(8 * 64)))
    writer, reader = RingWriter(control, ring), RingReader(control, ring)
    sent = array("q", [some_word(chance) for _ in range(chance.randrange(1, 30))])
    writer.put(sent)
    writer.flush()
    if chance.random() < 0.2:
        control[16] = some_word(chance)
    else:
        ring[chance.randrange(len(sent) + 3)] ^= 1 << chance.randrange(63)
    assert reader.get() in (sent, None)


def junk_tree(chance: random.Random) -> None:
    content = bytearray(records.encode_tree(1, TREE))
    for _ in range(chance.choice((1, 2, 8))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    _, tree = records.decode_tree(bytes(content[: chance.choice((len(content), chance.randrange(200)))]), 64)
    assert all(0 <= token < 64 for token in tree.token_ids) and all(0.0 <= each <= 1.0 for each in tree.chances)
    assert all(-1 <= parent < place for place, parent in enumerate(tree.parents)) and len(tree.token_ids) <= 64


def junk_status(chance: random.Random) -> None:
    content = bytearray(records.encode_status(records.Status(3, False, 7, 7, 9, 40, 0.001)))
    for _ in range(chance.choice((1, 2, 8))):
        content[chance.randrange(len(content))] = chance.randrange(256)
    status = records.decode_status(bytes(content[: chance.choice((len(content), chance.randrange(60)))]))
    assert min(status[:-1]) >= 0 and status.step_seconds >= 0.0


def junk_processors(chance: random.Random) -> None:
    values = {chance.choice(("top_k", "filter_value", "x")): chance.choice((None, 3, "a", [1], {"tensor": "b"}))}
    name = chance.choice(("TopKLogitsWarper", "Popen", "system", ""))
    specs = chance.choice(([{"class": name, "values": values}], [values], [{"class": name}]))
    assert {type(each).__name__ for each in decode_processors(specs)} <= {"TopKLogitsWarper"}


def junk_distribution(chance: random.Random, descriptor: int) -> None:
    shared = SharedDistributions(descriptor, 1, 8, 4)
    shared.put(0, 3, 5, torch.full((8,), 0.125))
    where = chance.randrange(3 * (40 + 32), 4 * (40 + 32))
    if chance.random() < 0.3:  # whole, and no distribution
        shared.put(
            0, 3, 5, torch.tensor([chance.choice((1.0, -1.0, float("nan"), float("inf"), 0.2)) for _ in range(8)])
        )
    else:
        os.pwrite(descriptor, bytes([chance.randrange(256)]), where)
    q = shared.get(0, 3, 5)
    assert q is None or (bool((q >= 0).all()) and abs(float(q.sum()) - 1) < 0.01)


def check_junk(number: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece is refused by name, or means something that could have been sent."""
    monkeypatch.setattr(shared_memory, "_FRAME_PATIENCE", 0.0)
    chance, refused = random.Random(seed), 0
    descriptor = descriptors.anonymous_memory("test", 0)
    kinds = [junk_message, junk_frame, junk_tree, junk_status, junk_processors]
    for index in range(number):
        try:
            if index % 20 == 0:
                junk_distribution(chance, descriptor)
            else:
                kinds[index % len(kinds)](chance)
        except MalformedRecordError:
            refused += 1
    os.close(descriptor)
    assert number / 2 < refused < number


def test_ten_thousand_pieces_of_junk_are_refused(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_junk(10_000, seed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_a_million_pieces_of_junk_are_refused(part: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_junk(250_000, seed, monkeypatch)


def scribble(channel: Channel, words: memoryview, chance: random.Random, call_number: int) -> None:
    """Write something into what a worker may write to: junk, or what is well formed and a lie."""
    count = chance.randrange(MAX_TREE_TOKENS + 1)
    token_ids = tuple(chance.randrange(64) for _ in range(count))
    parents = tuple(chance.randint(-1, place - 1) for place in range(count))
    chances = tuple(chance.random() for _ in range(count))
    wire_id = chance.randrange(2) + NUM_SLOTS * chance.randint(0, 2)
    numbers = wire_id, chance.randrange(9), chance.randrange(99), chance.randrange(30, 120)
    tree = TokenTree(*numbers, token_ids, parents, chances)
    match chance.randrange(8):
        case 0:
            words[chance.randrange(len(words))] = some_word(chance)
        case 1:
            channel.control[chance.choice((0, 1, 2))] = some_word(chance)
        case 2:
            channel.status.write(bytes(chance.randrange(256) for _ in range(chance.randrange(64))))
        case 3:
            counts = [chance.choice((0, 5, 5000, 2**40)) for _ in range(4)]
            status = records.Status(call_number, False, *counts, chance.choice((0.0, 1e-3, 1e300)))
            channel.status.write(records.encode_status(status))
        case 4:
            for place in range(300):
                channel.timeline[place] = chance.choice((0.0, float("nan"), float("inf"), 1e300, chance.random()))
        case 5:
            channel.error.write(struct.pack("<q", chance.randrange(2)) + b"\xff\x00" * chance.randrange(1000))
        case _:
            slot = wire_id % NUM_SLOTS
            channel.tree(slot).write(records.encode_tree(call_number, tree))


def check_scribbling(target: PreTrainedModel, draft: PreTrainedModel, num_calls: int, chance: random.Random) -> None:
    """A worker gone mad: calls have the right tokens, and end; afterwards another worker drafts."""
    expected = target.generate(**INPUTS, **OPTIONS).tolist()
    for _ in range(num_calls):
        worker = worker_of(target, draft)
        descriptor = worker._process._descriptors["channel"]
        channel, is_over = Channel(descriptor), threading.Event()
        words = channel._words
        first = len(words) - len(channel._tree_words)

        def run(channel: Channel = channel, words: memoryview = words[first:], worker: DraftWorker = worker) -> None:
            while not is_over.wait(0.0005):  # noqa: B023
                scribble(channel, words, chance, worker._num_calls)
            words.release()

        scribbler = threading.Thread(target=run)
        scribbler.start()
        try:
            with expected_warnings():
                for draft_length in (4, "auto", 1):
                    output = call(target, draft, "processes", draft_length=draft_length)
                    assert output.sequences.tolist() == expected
        finally:
            is_over.set()
            scribbler.join()
            channel.close()
        with expected_warnings():
            hf_pearl.release(draft)
    worker_of(target, draft)
    assert call(target, draft, "processes").pearl.draft_steps > 0


def test_a_worker_gone_mad_changes_no_token(target: PreTrainedModel, draft: PreTrainedModel, seed: int) -> None:
    check_scribbling(target, draft, 1, random.Random(seed))


@pytest.mark.slow
def test_fifty_workers_gone_mad_change_no_token(target: PreTrainedModel, draft: PreTrainedModel, seed: int) -> None:
    check_scribbling(target, draft, 50, random.Random(seed))


def test_a_worker_cannot_cut_off_memory_that_the_engine_has_mapped(
    target: PreTrainedModel, draft: PreTrainedModel
) -> None:
    """To read behind its end would end this process."""
    descriptors = worker_of(target, draft)._process._descriptors
    table = Table(2)
    sizes = {name: os.fstat(descriptors[name]).st_size for name in ("channel", "weights")}
    for descriptor in (*(descriptors[name] for name in sizes), table.seat(1).descriptors[0]):
        for num_bytes in (0, 2**30):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, num_bytes)
    table.close()
    assert all(sizes.values())


# -- the document -------------------------------------------------------------------------------------------------


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    promises = text.split("## Promises")[1].split("\n## ")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 7
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text("utf-8"), f"{file}::{name}"
