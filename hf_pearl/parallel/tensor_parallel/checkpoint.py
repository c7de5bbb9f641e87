"""The weights of a model in safetensors files, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: `name` itself, or, of a model on the Hub, where its files are after a download.

    Raises
    ------
    FileNotFoundError
        The folder holds no weights in safetensors.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    if not any((folder / file).is_file() for file in (SINGLE_FILE, INDEX_FILE)):
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}. Load the model with `from_pretrained`, save it with "
            f"`save_pretrained`, and name that folder."
        )
    return folder


class Checkpoint:
    """A folder's weights; a context manager that closes the files.

    Parameters
    ----------
    folder : Path
        With one file, or an index of several.
    base_prefix : str
        The name of the base model in the whole one: weights are found with or without it.
    """

    def __init__(self, folder: Path, base_prefix: str = "") -> None:
        self.folder, self._base_prefix = folder, f"{base_prefix}."
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        if (folder / SINGLE_FILE).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            self._file_of = json.loads((folder / INDEX_FILE).read_text("utf-8"))["weight_map"]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
        return self._files[file]

    def find(self, name: str) -> str | None:
        """What a parameter or buffer is called here; None if it is missing."""
        names = (name, name.removeprefix(self._base_prefix), self._base_prefix + name)
        return next((each for each in names if each in self._file_of), None)

    def open(self, name: str, shape: Sequence[int]) -> Any:
        """A tensor, by the name that `find` returned: what is read is what an index asks for.

        Raises
        ------
        ValueError
            It has another shape.
        """
        slices = self._open(self._file_of[name]).get_slice(name)
        if tuple(slices.get_shape()) != tuple(shape):
            there = tuple(slices.get_shape())
            raise ValueError(f"{name!r} in {self.folder} is {there}; by the configuration it must be {tuple(shape)}.")
        return slices
