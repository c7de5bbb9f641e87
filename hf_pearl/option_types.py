"""The kinds of values that command-line options take, as argparse types."""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

from .pair_checks import LEAST_TEMPERATURE


def positive_int(text: str) -> int:
    """From 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """From 0 to 2**63 - 1."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def temperature(text: str) -> float:
    """0 or a finite number from `LEAST_TEMPERATURE`."""
    value = _number(text, least=0)
    if 0.0 < value < LEAST_TEMPERATURE:
        raise argparse.ArgumentTypeError(f"must be 0 (greedy) or at least {LEAST_TEMPERATURE:g}, got {text!r}")
    return value


def at_least_one(text: str) -> float:
    """A finite number from 1."""
    return _number(text, least=1)


def _number(text: str, least: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from {least}, got {text!r}")
    return value


def writable_folder(text: str) -> Path:
    """A folder that exists, to write files to."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder that exists, got {text!r}")
    try:
        tempfile.TemporaryFile(dir=text).close()  # Said now, not when all is measured.
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be written to, got {text!r}: {error.strerror}") from None
    return Path(text)


def writable_file(text: str) -> Path:
    """A file to write to, in a folder that exists."""
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that exists, got {text!r}")
    is_new = not path.exists()
    try:
        path.open("a").close()  # What cannot be written is said now, not when all is measured.
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be written to, got {text!r}: {error.strerror}") from None
    if is_new:
        path.unlink()
    return path


def png_file(text: str) -> Path:
    """A picture to write."""
    if Path(text).suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    return writable_file(text)
