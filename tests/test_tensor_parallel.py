"""A model cut over ranks computes what the whole one does, at any size, and a rank reads and keeps its part only.

All ranks run in this process, as threads in step.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import FAMILIES, Family, build
from models import enabled_for_tiny_models, tiny_model
from ranks import Ranks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import hf_pearl
from hf_pearl import PagedPrefixCache, PearlUnsupportedModelError
from hf_pearl.cache.sizing import CacheNeeds
from hf_pearl.decoding.messages import Branches, Window
from hf_pearl.fingerprint import fingerprint
from hf_pearl.pair import demo_pair_folder
from hf_pearl.parallel.inference import may_use_inference_mode
from hf_pearl.parallel.lane import ModelLane
from hf_pearl.parallel.tensor_parallel import checkpoint, load_shard, num_key_value_heads, part_of, shard
from hf_pearl.parallel.tensor_parallel.cuts import HeadLayout
from hf_pearl.parallel.tensor_parallel.plan import CUT_FAMILIES, make_plan

TOLERANCE = 1e-12
SIZES = (2, 3, 6, 7)
# Those of docs/models.md that transformers' plan and ours cut; the others are refused.
SHARDED = (
    "Llama",
    "Llama, yarn",
    "Qwen2",
    "Qwen2, window",
    "Qwen3",
    "Mistral",
    "Gemma",
    "Gemma-2",
    "Gemma-3",
    "Phi",
    "Phi-3",
    "GPT-NeoX",
    "OLMo",
    "StarCoder2",
    "Granite",
    "Cohere",
    "Cohere-2",
    "SmolLM3",
    "GLM-4",
    "EXAONE-4",
    "ERNIE-4.5",
)
REFUSED = {
    "GPT-2": "no tensor-parallel plan",
    "OLMo-2": "every rank needs all outputs of 'model.layers.0.self_attn'",
    "Qwen3-MoE": r"model\.layers\.0\.mlp",
    "Mixtral": r"model\.layers\.0\.mlp",
    "GPT-OSS": r"model\.layers\.0",
    "DeepSeek-V3": r"model\.layers\.[01]",
}
BLOCK_SIZE, NUM_BLOCKS = 4, 64
DOCS = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.fixture(scope="module", autouse=True)
def enabled() -> Iterator[None]:
    with enabled_for_tiny_models():
        yield


@functools.cache
def whole(name: str) -> PreTrainedModel:
    """A model of a family, or one of the embedded pair, in float64; nobody changes it."""
    if name in FAMILIES:
        return build(FAMILIES[name], 0, torch.float64)
    target, draft, _ = hf_pearl.load_demo_pair(device="cpu", dtype=torch.float64)
    return {"target": target, "draft": draft}[name]


@functools.cache
def parts(name: str, size: int) -> tuple[Ranks, list[PreTrainedModel]]:
    """All ranks' parts of it."""
    ranks = Ranks(size)
    return ranks, ranks.parts(whole(name))


def assert_equal(got: list[list[torch.Tensor]], expected: list[torch.Tensor]) -> None:
    """Every rank has every rank's bits, and these are the whole model's logits."""
    largest = max(each.abs().max() for each in expected)
    assert largest > 0.1
    for rank in got:
        assert all(torch.equal(mine, first) for mine, first in zip(rank, got[0], strict=True))
    for mine, right in zip(got[0], expected, strict=True):
        assert mine.shape == right.shape
        assert (mine - right).abs().max() < TOLERANCE * largest
        assert torch.equal(mine.argmax(dim=-1), right.argmax(dim=-1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*SHARDED, "target", "draft"])
def test_logits_are_those_of_the_whole_model(name: str, size: int) -> None:
    """Of a forward without our cache. Sizes that divide neither heads nor feed-forward width nor vocabulary."""
    token_ids = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        expected = whole(name)(token_ids).logits
    ranks, models = parts(name, size)
    assert_equal(ranks.run(lambda rank: [models[rank](token_ids).logits]), [expected])


def use_lane(model: PreTrainedModel, seed: int) -> list[torch.Tensor]:
    """Logits of prefill, decoding, ragged windows, rollback, fork, and a tree, on the paged cache."""
    chance = random.Random(seed)
    lane = ModelLane(model, PagedPrefixCache(model.config, NUM_BLOCKS, BLOCK_SIZE))
    logits: list[torch.Tensor] = []

    def forward(num_new: dict[int, int], branches: Branches | None = None) -> None:
        windows = [
            Window(row, tuple(chance.randrange(1, 64) for _ in range(num)), num, branches)
            for row, num in num_new.items()
        ]
        logits.append(lane.forward(windows))

    with lane.ready():
        for row in (0, 1):
            lane.admit(row, (), 0)
        forward({0: 30, 1: 11})
        for _ in range(8):
            chosen = logits[-1].argmax(dim=-1)[[-2, -1]].tolist()
            logits.append(lane.forward([Window(row, (token,), 1) for row, token in enumerate(chosen)]))
        forward({0: 5, 1: 9})
        lane.rollback(0, lane.length(0) - 4)
        forward({1: 3, 0: 2})
        lane.fork(0, 2, lane.length(0))
        forward({0: 1, 1: 1, 2: 4})
        num_common = lane.length(0)
        paths = tuple(tuple(num_common + place for place in path) for path in ((0,), (0, 1), (2,), (0, 3)))
        forward({0: 4}, Branches(num_common, paths))
        lane.keep(0, num_common, [num_common, num_common + 3])
        forward({0: 1})
        needs = CacheNeeds.of(model, num_heads=num_key_value_heads(model))
        assert lane.cache.num_bytes == NUM_BLOCKS * needs.bytes_per_block(BLOCK_SIZE)
    return logits


@functools.cache
def logits_of_lane(name: str) -> list[torch.Tensor]:
    """Those of the whole model."""
    return use_lane(whole(name), seed=1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*SHARDED, "target", "draft"])
def test_logits_on_the_paged_cache_are_those_of_the_whole_model(name: str, size: int) -> None:
    """Tokens that a rank decodes are its own choice, so that they are the whole model's, too."""
    ranks, models = parts(name, size)
    assert_equal(ranks.run(lambda rank: use_lane(models[rank], seed=1)), logits_of_lane(name))


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size", "group", "per_rank"),
    [
        pytest.param(14, 2, 6, 3, 1, id="groups of 7 in 3, 3 and 1"),
        pytest.param(8, 4, 2, 2, 2, id="two groups to a rank"),
        pytest.param(12, 4, 3, 3, 2, id="no groups on the last rank"),
        pytest.param(32, 8, 6, 2, 3, id="three halves of groups to a rank"),
    ],
)
def test_every_division_of_heads_gives_the_same_logits(
    num_heads: int, num_kv_heads: int, size: int, group: int, per_rank: int
) -> None:
    heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "hidden_size": 4 * num_heads}
    model = build(FAMILIES["Llama"]._replace(options={"intermediate_size": 48, **heads}), 0, torch.float64)
    ranks = Ranks(size)
    models = ranks.parts(model)
    assert [num_key_value_heads(each) for each in models] == [per_rank] * size
    assert models[0].model.layers[0].self_attn.q_proj.out_features == group * per_rank * 4
    assert_equal(ranks.run(lambda rank: use_lane(models[rank], seed=2)), use_lane(model, seed=2))
    token_ids = torch.arange(1, 40).reshape(3, 13)
    with torch.no_grad():
        expected = model(token_ids).logits
    assert_equal(ranks.run(lambda rank: [models[rank](token_ids).logits]), [expected])


def test_every_query_head_is_on_one_rank_beside_its_key_value_head() -> None:
    for num_kv_heads in (1, 2, 3, 4, 8):
        for group in (1, 2, 3, 7, 8):
            for size in (1, 2, 3, 5, 6, 7, 16):
                layout = HeadLayout.of(num_kv_heads * group, num_kv_heads, size)
                seen = []
                for rank in range(size):
                    queries, keys = layout.queries(rank, 1), layout.keys(rank, 1)
                    assert [piece.length for piece in queries] == [layout.group] * layout.per_rank
                    assert [piece.length for piece in keys] == [1] * layout.per_rank
                    for query, key in zip(queries, keys, strict=True):
                        seen += range(query.start, query.stop)
                        assert all(head // group == key.start for head in range(query.start, query.stop))
                assert seen == list(range(num_kv_heads * group))
                if size in (1, num_kv_heads) or num_kv_heads % size == 0:
                    assert (layout.group, layout.per_rank) == (group, num_kv_heads // size)


def test_one_rank_has_the_model_as_it_was() -> None:
    model = copy.deepcopy(whole("Llama"))
    before = dict(model.named_modules()), dict(model.named_parameters()), fingerprint(model)
    assert Ranks(1).part(model, 0) is model
    assert (dict(model.named_modules()), dict(model.named_parameters()), fingerprint(model)) == before
    assert part_of(model) is None


def test_a_part_is_fit_for_a_lane() -> None:
    """It runs in inference mode, its fingerprint says when it changes, and tied embeddings stay one."""
    ranks, models = parts("draft", 3)
    for model in models:
        assert may_use_inference_mode(model)
        before = fingerprint(model)
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert fingerprint(model) == before
    ranks.run(lambda rank: use_lane(models[rank], seed=3))
    assert before == fingerprint(models[-1])
    models[-1].lm_head.weight.mul_(1)
    assert before != fingerprint(models[-1])


def test_a_family_that_no_test_compares_is_refused() -> None:
    """Seed-OSS would be cut rightly, as it happens; who reads only its plan cannot know."""
    model = build(Family("seed_oss", {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}))
    with pytest.raises(PearlUnsupportedModelError, match="no test"):
        Ranks(2).part(model, 0)
    assert {FAMILIES[name].model_type for name in SHARDED} == CUT_FAMILIES


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_and_unchanged(name: str) -> None:
    model = build(FAMILIES[name])
    before = dict(model.named_modules()), fingerprint(model)
    with pytest.raises(PearlUnsupportedModelError, match=REFUSED[name]) as error:
        Ranks(2).part(model, 0)
    assert type(model).__name__ in str(error.value)
    assert "size 1" in str(error.value)
    assert (dict(model.named_modules()), fingerprint(model)) == before


def replace_projection(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)


def offload(model: PreTrainedModel) -> None:
    model.model.layers[0].to("meta")


def normalise_all_heads(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.q_norm = torch.nn.RMSNorm(32)


def mean_other_heads(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.head_dim = 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(replace_projection, "layers.1.mlp.up_proj' is a Sequential", id="another linear layer"),
        pytest.param(offload, "offloaded", id="offloaded"),
        pytest.param(normalise_all_heads, "q_norm.weight", id="a norm over all heads"),
        pytest.param(mean_other_heads, "no heads of 5", id="other heads"),
    ],
)
def test_what_would_be_cut_wrongly_is_refused(change: Callable[[PreTrainedModel], None], reason: str) -> None:
    model = copy.deepcopy(whole("Llama"))
    change(model)
    with pytest.raises(PearlUnsupportedModelError, match=reason):
        Ranks(2).part(model, 0)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_there_is_not_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"got {rank} and {size}"):
        shard(copy.deepcopy(whole("Llama")), rank, size, torch.clone, torch.clone)
    with pytest.raises(ValueError, match=f"got {rank} and {size}"):
        load_shard(demo_pair_folder() / "draft", rank, size, torch.clone, torch.clone)


def test_a_part_is_not_cut_again() -> None:
    ranks, models = parts("Llama", 2)
    with pytest.raises(ValueError, match="already a part"):
        ranks.part(models[0], 0)


class CountingFile:
    """A safetensors file that notes how many bytes are read of it; everything else is the file's own."""

    num_bytes = 0

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> CountingFile:
        self.opened = self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> Any:
        return self.opened.keys()

    def get_slice(self, name: str) -> CountingSlices:
        return CountingSlices(self.opened.get_slice(name))


class CountingSlices:
    """A tensor in such a file."""

    def __init__(self, slices: Any) -> None:
        self.slices = slices

    def get_shape(self) -> Any:
        return self.slices.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self.slices[index]
        CountingFile.num_bytes += tensor.numel() * tensor.dtype.itemsize
        return tensor


@pytest.fixture
def count_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count what is read of safetensors files; the returned function says how many bytes since it was last asked."""
    original = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", lambda *args, **kwargs: CountingFile(original(*args, **kwargs)))
    CountingFile.num_bytes = 0

    def since_last() -> int:
        count, CountingFile.num_bytes = CountingFile.num_bytes, 0
        return count

    return since_last


def tensors_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters, tied ones by every name, and buffers."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_same_part(got: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Two parts are equal bit for bit."""
    mine, right = tensors_of(got), tensors_of(expected)
    assert mine.keys() == right.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
    assert [*map(type, got.modules())] == [*map(type, expected.modules())]
    assert [*map(repr, got.modules())] == [*map(repr, expected.modules())]
    assert part_of(got) == part_of(expected)
    assert got.training is expected.training is False
    assert got.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("name", [name for name in SHARDED if name != "GPT-NeoX"])
def test_a_loaded_part_is_the_part_of_the_loaded_whole(name: str, tmp_path: Path) -> None:
    """Bit for bit, from several files with an index."""
    whole(name).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(set(json.loads((tmp_path / checkpoint.INDEX_FILE).read_text())["weight_map"].values())) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ranks = Ranks(3)
    for rank in range(3):
        got = load_shard(tmp_path, rank, 3, torch.clone, torch.clone)
        assert_same_part(got, ranks.part(copy.deepcopy(loaded), rank))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("part", ["target", "draft"])
def test_a_loaded_part_of_the_embedded_pair_is_that_of_the_whole(part: str, dtype: torch.dtype | None) -> None:
    folder = demo_pair_folder() / part
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto")
    for size, rank in ((1, 0), (2, 1), (3, 0), (7, 6)):
        ranks = Ranks(size)
        got = load_shard(folder, rank, size, torch.clone, torch.clone, dtype=dtype)
        assert_same_part(got, ranks.part(copy.deepcopy(loaded), rank))


def bytes_of_values(weight: torch.Tensor) -> int:
    """Bytes of a part's weight without the rows and columns of zeros that fill up."""
    is_there = weight != 0
    num_there = is_there.any(dim=0).sum() * is_there.any(dim=1).sum() if weight.ndim == 2 else weight.numel()
    return int(num_there) * weight.dtype.itemsize


@pytest.mark.parametrize("part", ["target", "draft"])
def test_a_rank_reads_what_it_keeps_and_nothing_else(part: str, count_bytes: Callable[[], int]) -> None:
    """Byte for byte, without what fills up; and all ranks together read the whole."""
    folder = demo_pair_folder() / part
    num_bytes = sum(weight.nbytes for weight in AutoModelForCausalLM.from_pretrained(folder).parameters())
    for size in (2, 3, 7):
        num_read = 0
        for rank in range(size):
            model = load_shard(folder, rank, size, torch.clone, torch.clone)
            expected = sum(map(bytes_of_values, model.parameters()))
            assert count_bytes() == expected < 1.5 * num_bytes / size
            num_read += expected
        assert num_bytes < num_read < 1.2 * num_bytes  # norms, and copies of key-value heads, are read more than once


LOAD_IN_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import torch
from hf_pearl.parallel.tensor_parallel import load_shard
torch.set_num_threads(1)
folder, size, dtype, room = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3]), int(sys.argv[4])
load_shard(sys.argv[5], 0, size, torch.clone, torch.clone)  # Whatever is imported and kept is there then.
status = Path("/proc/self/status").read_text()
now = 1024 * int(status.partition("VmData:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (now + room, now + room))
load_shard(folder, 0, size, torch.clone, torch.clone, dtype=dtype)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such limit")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_needs_the_memory_of_its_part_and_of_one_slice(size: int, dtype: str, tmp_path: Path) -> None:
    """A limit of the system's on private memory: with that it loads, with three quarters of its part it does not.

    The file is mapped, privately (what the limit counts), and only read: its pages are the system's to take back.
    """
    model = tiny_model("llama", 1, hidden_size=512, intermediate_size=4096, num_hidden_layers=4, vocab_size=8192)
    model = model.float()
    model.save_pretrained(tmp_path)
    part = load_shard(tmp_path, 0, size, torch.clone, torch.clone, dtype=getattr(torch, dtype))
    kept = sum(weight.nbytes for weight in part.parameters())
    one_slice = 4 * max(weight.numel() for weight in part.parameters())
    mapped, slack = (tmp_path / "model.safetensors").stat().st_size, 2 * 2**20

    def loads(room: int) -> bool:
        arguments = (str(tmp_path), str(size), dtype, str(mapped + room), str(demo_pair_folder() / "draft"))
        child = subprocess.run(
            [sys.executable, "-c", LOAD_IN_LITTLE_MEMORY, *arguments], capture_output=True, text=True, timeout=300
        )
        assert child.returncode == 0 or "memory" in child.stderr, child.stderr
        return child.returncode == 0

    assert kept > 10 * slack
    assert loads(kept + one_slice + slack)
    assert not loads(kept * 3 // 4)


def test_weights_that_are_missing_or_of_another_shape_are_named(tmp_path: Path) -> None:
    whole("Llama").save_pretrained(tmp_path)
    for change, reason in (({"attention_bias": True}, "bias"), ({"intermediate_size": 64}, r"\(48, 32\)")):
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=reason):
            load_shard(tmp_path, 0, 2, torch.clone, torch.clone)
        (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        load_shard(tmp_path, 0, 2, torch.clone, torch.clone)


def test_embeddings_that_are_tied_in_the_configuration_only_are_refused(tmp_path: Path) -> None:
    """Their file has both, and they differ: to keep one of them would change the answer."""
    whole("Llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        load_shard(tmp_path, 0, 2, torch.clone, torch.clone)


def test_the_docs_name_what_can_be_cut() -> None:
    section = DOCS.read_text("utf-8").partition("## Over several ranks")[2]
    named = section.partition("Tested are ")[2].partition(".\n")[0].replace("\n", " ").split(", ")
    assert named == [name for name in SHARDED if "," not in name]


def shapes() -> dict[str, PreTrainedConfig]:
    """Configurations whose parts docs/models.md gives the sizes of."""
    llama = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    qwen = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151936}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
    return {
        "Llama-3-8B": AutoConfig.for_model("llama", **llama, num_attention_heads=32, num_key_value_heads=8),
        "Qwen3-0.6B": AutoConfig.for_model("qwen3", **qwen, **heads),
        "embedded target": AutoConfig.from_pretrained(demo_pair_folder() / "target"),
    }


def share(model: PreTrainedModel, size: int) -> float:
    """What the first rank holds of a model's weights."""
    cuts, held = make_plan(model, 0, size).cuts, 0
    for name, weight in model.named_parameters():
        held += weight.numel() // weight.shape[cuts[name].dim] * cuts[name].length if name in cuts else weight.numel()
    return held / model.num_parameters()


def test_the_docs_say_what_a_rank_holds() -> None:
    rows = {}
    for name, config in shapes().items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        rows[name] = [f"{share(model, size):.1%}" for size in (2, 3, 4, 6, 7, 8)]
    section = DOCS.read_text("utf-8").partition("## Over several ranks")[2]
    assert all(f"| {name} | {' | '.join(cells)} |" in section for name, cells in rows.items()), rows
