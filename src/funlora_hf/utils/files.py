"""Write files that appear whole or not at all, read JSON and tensors, and hash folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .checks import shortened


_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"
# Our largest file, results.json, has a few numbers for each pair of a class and a task.
MOST_JSON = 2**27


class WriteError(OSError):
    """A file or folder could not be written: the disk is full, read-only or gone. What was there before is unchanged."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; rename it to `path` if the block succeeds, remove it if the block raises.

    Raises:
        WriteError: the file cannot be written.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            # If the disk is read-only now, it stays; `recover_folder` removes it later.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; let it replace `path` if the block succeeds, remove it if the block raises.

    A folder at `path` has another name during the exchange; `recover_folder` restores it if the process is killed then.

    Raises:
        WriteError: the folder cannot be written.
    """
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(path)
        temporary.mkdir()
        try:
            yield temporary
            for entry in [*temporary.rglob("*"), temporary]:
                _sync(entry)
            replaced = path.with_name(f"{_REPLACED}{path.name}")
            if path.exists():
                shutil.rmtree(replaced, ignore_errors=True)  # from a process that was killed after the exchange
                os.replace(path, replaced)
            os.replace(temporary, path)
            _sync(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder that exists; a kill leaves the whole folder, or a part that `recover_folder` removes."""
    leaving = _temporary(path)
    with contextlib.suppress(OSError):
        os.replace(path, leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def delete(paths: Iterable[Path]) -> None:
    """Delete files and folders with all that is in them; those that are gone already are ignored."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def refuse_links(paths: Collection[Path]) -> None:
    """Raise a ValueError if one of the paths that are about to be deleted, or the folder of one, is a link."""
    for path in (*paths, *{path.parent for path in paths}):
        if path.is_symlink():
            raise ValueError(
                f"{os.fspath(path)!r} is a link, and its target may be needed elsewhere: delete it yourself."
            )


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:8]}-{path.name}")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raise a WriteError that names the file for any error that prevents writing it."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        # safetensors raises its own error if the disk is full, without the number.
        code = error.errno if isinstance(error, OSError) else None
        raise WriteError(
            code,
            f"{path} could not be written ({error}); what was there before is unchanged. Make room, or make the folder "
            "writable, and continue.",
        ) from error


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, before anything that depends on it is written."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return  # Windows cannot open folders, and saves names itself
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def recover_folder(folder: Path) -> None:
    """Clean up below `folder` after a killed process: remove half-written entries, restore a replaced folder."""
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
    """Write `value` as indented JSON. Refuse NaN and infinities, which JSON does not have."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, *, most_bytes: int = MOST_JSON) -> Any:
    """Return the value of a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: invalid JSON, such as NaN and infinities, more than `most_bytes`, or an unreadable file; it names the file.
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
    """Return the value of standard JSON. Raise a ValueError for anything else, also for NaN and infinities."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it contains {name}")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"the number {shortened(number, 50)} is too large")
    return value


def read_mapping(path: Path, *, keys: Iterable[str] = (), most_bytes: int = MOST_JSON) -> dict[str, Any]:
    """Read a JSON file like `read_json`; also raise a ValueError unless it contains a mapping with these `keys`."""
    value = read_json(path, most_bytes=most_bytes)
    if not isinstance(value, dict):
        raise ValueError(f"{os.fspath(path)!r} holds a {type(value).__name__}, expected a mapping.")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(
            f"{os.fspath(path)!r} has no {', '.join(map(repr, missing))}: it is damaged, or it is the wrong file."
        )
    return value


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all."""
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_tensors(path: Path, *, remedy: str, keys: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """Return all tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or some of `keys` are missing; the error names the file and ends with `remedy`.
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
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        # hashlib.file_digest needs Python 3.11.
        digest = hashlib.sha256()
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def folder_sha256(folder: Path, *, leave_out: Iterable[str] = ()) -> str:
    """Return the SHA-256 over names and bytes of all files below a folder, 64 hexadecimal digits.

    Hidden files are left out, and so are subfolders and files directly in the folder that `leave_out` names.
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
