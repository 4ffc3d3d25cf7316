"""Files that appear whole or not at all, and hashes of folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .checks import shortened


_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"
# The largest of ours, results.json, has a few numbers for each pair of a class and a task.
MOST_JSON = 2**27


class WriteError(OSError):
    """A file or folder could not be written: the disk is full, read-only or gone. What was there before is as it was."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` when the block ends well, removed when it does not.

    Raises:
        WriteError: it cannot be written.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            # A disk that cannot be written to can leave it there; `recover_folder` takes it away.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; takes the place of `path` when the block ends well, vanishes when it does not.

    A folder that stood at `path` is set aside under another name for the moment of the exchange; `recover_folder`
    brings it back if the process is killed just then.

    Raises:
        WriteError: it cannot be written.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
        temporary.mkdir()
        try:
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                _sync(entry)
            replaced = path.with_name(f"{_REPLACED}{path.name}")
            if path.exists():
                os.replace(path, replaced)
            os.replace(temporary, path)
            _sync(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder that is there; a kill leaves all of it, or what `recover_folder` takes away."""
    leaving = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")
    with contextlib.suppress(OSError):
        os.replace(path, leaving)
        shutil.rmtree(leaving, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says of whatever keeps a file from being written which file it is."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        # safetensors has an error of its own for a full disk, without the number.
        code = error.errno if isinstance(error, OSError) else None
        raise WriteError(
            code,
            f"{path} could not be written ({error}), and what was there before is as it was. Make room, or see that the "
            "folder can be written to, and go on.",
        ) from error


def _sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a folder, before anything that counts on it is written."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return  # folders cannot be opened on Windows, which keeps names by itself
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recover_folder(folder: Path) -> None:
    """Clean up below `folder` after a killed process: half-written entries go, a folder set aside comes back."""
    for leftover in list(folder.rglob(f"{_TEMPORARY}*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    for replaced in list(folder.rglob(f"{_REPLACED}*")):
        original = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if original.exists():
            shutil.rmtree(replaced)
        else:
            os.replace(replaced, original)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON. NaN and infinities are refused: JSON has none."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, *, most_bytes: int = MOST_JSON) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, cut short for instance, more than `most_bytes`, or unreadable; it names the file.
    """
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise ValueError(f"it has {size} bytes, expected {most_bytes} at most")
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not a valid JSON file: {error}.") from error


def parse_json(text: str) -> Any:
    """The value of JSON as the standard has it. Raises a ValueError for anything else, NaN and infinities too."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it contains {name}")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{shortened(number, 50)} is too large a number")
    return value


def read_mapping(path: Path, *, keys: Iterable[str] = (), most_bytes: int = MOST_JSON) -> dict[str, Any]:
    """As `read_json`, of a file that holds a mapping.

    Args:
        path: of the file.
        keys: those that it must have.
        most_bytes: that the file may have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, no mapping or one that lacks a key, or more than `most_bytes`; it names the file.
    """
    value = read_json(path, most_bytes=most_bytes)
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)!r} holds a {type(value).__name__}, expected a mapping.")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(
            f"{os.fspath(path)!r} has no {', '.join(map(repr, missing))}: it is damaged, or another file."
        )
    return value


def read_tensors(path: Path, *, remedy: str, keys: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Args:
        path: of the file.
        remedy: what to do if it is damaged, a clause.
        keys: names of tensors that it must have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged; it names the file and the remedy.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(path)!r} is not a valid safetensors file ({error}): {remedy}.") from error
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise ValueError(f"{os.fspath(path)!r} has no tensor {', '.join(map(repr, missing))}: {remedy}.")
    return tensors


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        # hashlib.file_digest is of Python 3.11.
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def folder_sha256(folder: Path, *, leave_out: Iterable[str] = ()) -> str:
    """SHA-256 over names and bytes of all files below a folder, hidden ones apart.

    Args:
        folder: to hash.
        leave_out: names of subfolders or files directly in it that do not count.

    Returns:
        64 hexadecimal digits.
    """
    leave_out = set(leave_out)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if not path.is_file() or parts[0] in leave_out or any(part.startswith(".") for part in parts):
            continue
        digest.update("/".join(parts).encode() + b"\0")
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()
