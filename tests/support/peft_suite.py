"""PEFT's own tests, for the version that is installed: fetches them and puts other configurations into their tables.

Knows pip, pytest's marks and how PEFT's test modules are laid out; knows nothing of FunLoRA.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Literal

import peft
import pytest
from filelock import FileLock


PACKAGE = "peft_own_tests"

Table = Sequence[Any] | Callable[[Sequence[Any]], Sequence[Any]]


class SuiteUnavailable(Exception):
    """PEFT's tests cannot be had here; the message says why."""


def fetch_suite() -> Path:
    """The folder that holds the tests of the installed peft as the package `peft_own_tests`.

    A wheel has no tests, so pip downloads the source distribution of the same version, once for all runs: into
    `$XDG_CACHE_HOME/funlora_hf_tests`, or `~/.cache/funlora_hf_tests`.

    Raises:
        SuiteUnavailable: pip has no such distribution (no network, a development version), or it has no tests.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "funlora_hf_tests"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"peft-{peft.__version__}"
    # The workers of one pytest-xdist run have to agree on what they collect, so a failure holds for all of them.
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    failure = Path(tempfile.gettempdir()) / f"{PACKAGE}-{run}.failure"
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        if run and failure.exists():
            raise SuiteUnavailable(failure.read_text(encoding="utf-8"))
        try:
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                unpacked = _unpack(_download(Path(scratch)), Path(scratch) / "unpacked")
                unpacked.replace(folder)
        except SuiteUnavailable as error:
            if run:
                failure.write_text(str(error), encoding="utf-8")
            raise
    return folder


def import_suite(*names: str) -> list[ModuleType]:
    """Modules of PEFT's tests, by name, such as "test_custom_models"; what their `assert` compares is reported.

    Raises:
        SuiteUnavailable: see `fetch_suite`; or a module is not there, or needs a package that is not installed.
    """
    folder = str(fetch_suite())
    if folder not in sys.path:
        sys.path.append(folder)
    pytest.register_assert_rewrite(PACKAGE)
    try:
        return [importlib.import_module(f"{PACKAGE}.{name}") for name in names]
    except ImportError as error:
        raise SuiteUnavailable(f"the tests of peft {peft.__version__} cannot be imported: {error}") from error


def adopt(
    module: ModuleType,
    name: str,
    tables: Mapping[str, Table],
    *,
    tables_of: Mapping[str, Mapping[str, Table]] | None = None,
    stand_in: Iterable[str] | Literal["all"] = (),
    leave_out: Iterable[str] = (),
) -> type:
    """A subclass of one of PEFT's test classes that runs its tests with other configurations.

    Args:
        module: one of PEFT's.
        name: of the class; if this version of PEFT lacks it, the subclass has no tests. The parameters of its tests are
            replaced in place: this process must not run it as it is.
        tables: rows, or a function from PEFT's rows to ours, by the names of the parameters as the tests give them,
            such as "config_cls". Every test that has one of these tables is run with it, unless no row is left; what
            else a test is parametrised over stays as it is.
        tables_of: by the name of a test, tables for it that come before the others.
        stand_in: names of tests that make their own LoraConfig, or are not about a method at all, and are run, too.
            They end up in the class's `stand_in`, for a fixture that puts another configuration in LoRA's place.
        leave_out: names of tests not to run.
    """
    cls = getattr(module, name, object)
    tests = [test for test in dir(cls) if test.startswith("test")]
    stand_in = frozenset(tests if stand_in == "all" else stand_in)
    attributes: dict[str, Any] = {"stand_in": stand_in}
    for test in tests:
        replaced = _replace_tables(getattr(cls, test), {**tables, **(tables_of or {}).get(test, {})})
        if test in leave_out or not (replaced or test in stand_in):
            attributes[test] = None  # pytest passes over it
    return type(name, (cls,), attributes)


def _replace_tables(function: Callable, tables: Mapping[str, Table]) -> bool:
    """Put rows of ours into the `parametrize` marks of a test; whether it now has any."""
    marks = list(getattr(function, "pytestmark", []))
    replaced = False
    for index, mark in enumerate(marks):
        if mark.name != "parametrize" or mark.args[0] not in tables:
            continue
        names, rows = mark.args
        table = tables[names]
        rows = table(rows) if callable(table) else table
        if not rows:
            return False
        marks[index] = pytest.mark.parametrize(names, rows).mark
        replaced = True
    if replaced:
        function.pytestmark = marks
    return replaced


def _download(folder: Path) -> Path:
    # Without build isolation pip needs no more than this one file; torch brings the setuptools that reads its name.
    options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--retries", "1", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", *options, f"peft=={peft.__version__}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired as error:
        raise SuiteUnavailable(f"pip did not download the sources of peft {peft.__version__} in time") from error
    found = sorted(folder.glob("*.tar.gz"))
    if done.returncode != 0 or not found:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise SuiteUnavailable(f"pip could not download the sources of peft {peft.__version__}: {reason}")
    return found[0]


def _unpack(archive_path: Path, folder: Path) -> Path:
    package = folder / PACKAGE
    package.mkdir(parents=True)
    with tarfile.open(archive_path) as archive:
        for member in archive:
            # <distribution>/tests/<name>.py and nothing else, written under our own path: no name can lead elsewhere.
            parts = PurePosixPath(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                (package / parts[2]).write_bytes(archive.extractfile(member).read())
    if not any(package.iterdir()):
        raise SuiteUnavailable(f"the source distribution {archive_path.name} has no tests")
    (package / "__init__.py").touch()
    return folder
