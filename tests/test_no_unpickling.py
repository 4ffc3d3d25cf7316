"""Nothing is unpickled and nothing of a file is run: by what the source says, and by whole runs in which unpickling raises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image, Value
from runs import REPOSITORY

from funlora_hf.utils.files import read_json


FOLDERS = ("src", "examples", "benchmarks")
# Modules whose loading runs what is in the file.
PICKLES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "pandas",
    "multiprocess",
}
# By the last part of what is called, whatever it is called on.
FORBIDDEN = {
    "eval": "runs text",
    "exec": "runs text",
    "unsafe_load": "makes any object",
    "full_load": "makes some objects",
    "read_pickle": "unpickles",
    "load_state": "unpickles what `save_state` wrote",
    "save_state": "writes pickles",
    "gather_object": "unpickles what other processes send",
    "all_gather_object": "unpickles what other processes send",
    "broadcast_object_list": "unpickles what another process sends",
    "scatter_object_list": "unpickles what another process sends",
    "recv_object_list": "unpickles what another process sends",
    "load_from_checkpoint": "unpickles",
    "load_state_dict_from_url": "unpickles",
}
# The function by the full name, where the last part alone says too little.
FORBIDDEN_CALLS = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.save", "yaml.load", "yaml.load_all"}
# It hands jobs that we made to processes that we started, by pipes which nobody else can write to. No file is read.
EXCEPTION = {"examples/comparison/jobs.py": "multiprocessing"}


def sources() -> list[Path]:
    return sorted(file for folder in FOLDERS for file in (REPOSITORY / folder).rglob("*.py"))


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression, as far as it is made of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def real_names(tree: ast.AST) -> dict[str, str]:
    """Name in the module -> what was imported under it."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                (one.asname or one.name.split(".")[0]): one.name if one.asname else one.name.split(".")[0]
                for one in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {one.asname or one.name: f"{node.module or ''}.{one.name}" for one in node.names}
    return names


def offences(text: str) -> list[str]:
    """What a module does that could run what is in a file, each with its line."""
    tree = ast.parse(text)
    names, found = real_names(tree), []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        found += [
            f"{node.lineno}: import {name}" for name in modules if name.split(".")[0] in {*PICKLES, "multiprocessing"}
        ]
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {what}" for what in _calls(node, names)]
        if isinstance(node, (ast.Attribute, ast.Name)) and _name(node, names) in FORBIDDEN_CALLS:
            found.append(f"{node.lineno}: {_name(node, names)}")
    return sorted(set(found))


def _name(node: ast.expr, names: dict[str, str]) -> str:
    first, _, rest = dotted(node).partition(".")
    return ".".join(filter(None, (names.get(first, first), rest)))


def _calls(node: ast.Call, names: dict[str, str]) -> list[str]:
    name, found = _name(node.func, names), []
    last = name.rpartition(".")[2] or (node.func.attr if isinstance(node.func, ast.Attribute) else "")
    # `module.eval()` takes no text.
    if last in FORBIDDEN and (last not in ("eval", "exec") or isinstance(node.func, ast.Name) or node.args):
        found.append(f"{last}: {FORBIDDEN[last]}")
    for keyword in node.keywords:
        off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in ("allow_pickle", "trust_remote_code", "custom_pipeline") and not off:
            found.append(f"{keyword.arg} is not False")
        if keyword.arg in ("weights_only", "use_safetensors") and not (
            isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        ):
            found.append(f"{keyword.arg} is not True")
    return found


def test_no_source_unpickles_or_runs_text():
    assert len(sources()) > 90
    found = {}
    for file in sources():
        name, listed = file.relative_to(REPOSITORY).as_posix(), offences(file.read_text(encoding="utf-8"))
        allowed = EXCEPTION.get(name)
        found[name] = [one for one in listed if allowed is None or not one.endswith(f"import {allowed}")]
    assert {name: listed for name, listed in found.items() if listed} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle as c",
        "import torch\ntorch.load('a')",
        "import torch as t\nt.load('a', weights_only=True)",
        "from torch import load\nload('a')",
        "from torch import load as read\nread('a')",
        "import torch\nread = torch.load",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml\nyaml.unsafe_load(text)",
        "import numpy as np\nnp.load('a', allow_pickle=True)",
        "self.accelerator.load_state('a')",
        "a[0].load_state('a')",
        "from accelerate.utils import gather_object\ngather_object([1])",
        "torch.distributed.all_gather_object(out, 1)",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "f(trust_remote_code=True)",
        "f(use_safetensors=False)",
        "f(use_safetensors=None)",
        "import multiprocessing",
    ],
)
def test_the_search_finds_what_it_is_for(text):
    assert offences(text)


@pytest.mark.parametrize(
    "text", ["model.eval()", "import yaml\nyaml.safe_load(text)", "f(use_safetensors=True)", "a.load(1)"]
)
def test_the_search_finds_no_more(text):
    assert not offences(text)


NAMES = [
    "../../../outside",
    "/tmp/outside-funlora",
    "<script>alert(1)</script>\n---\nlicense: x",
    "a\0b",
    "x" * 1000,
    "$x$ {y} \\frac",
]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def write_data(file: Path) -> None:
    features = Features({"image": Image(), "label": Value("string")})
    pixels = np.random.default_rng(0).integers(0, 256, (len(NAMES), 6, 8, 8), dtype=np.uint8)
    rows = [(PIL.Image.fromarray(picture), name) for name, own in zip(NAMES, pixels, strict=True) for picture in own]
    images, labels = zip(*rows, strict=True)
    Dataset.from_dict({"image": list(images), "label": list(labels)}, features=features).to_parquet(file)


@pytest.mark.parametrize(
    ("launcher", "starts"),
    [
        pytest.param((), ["1,4,12,0,sample,update"], id="one process"),
        pytest.param(TORCHRUN, ["4", "8", "0"], marks=[pytest.mark.slow, pytest.mark.soak], id="two processes"),
    ],
)
def test_a_run_that_stops_and_goes_on_unpickles_nothing_and_writes_in_its_folder_only(launcher, starts, tmp_path):
    """Its classes have the worst names, of which none becomes a path."""
    write_data(tmp_path / "data.parquet")
    inner = tmp_path / "a" / "b" / "c"
    allowed = [inner / name for name in ("out", "home", "temporary")]
    for folder in allowed[1:]:
        folder.mkdir(parents=True)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HOME": str(inner / "home"),
        "HOME": str(inner / "home"),
        "MPLCONFIGDIR": str(inner / "home"),
        "TMPDIR": str(inner / "temporary"),
        "TORCHINDUCTOR_CACHE_DIR": str(inner / "temporary"),
    }
    script = str(REPOSITORY / "tests" / "support" / "guarded_run.py")
    output = ""
    for steps in starts:
        arguments = [str(tmp_path / "data.parquet"), "out", steps, *map(str, allowed)]
        command = [sys.executable, *launcher, script, *arguments]
        done = subprocess.run(
            command, cwd=inner, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr[-20000:]
        output += done.stdout
    # In the base's steps and in a class's.
    assert re.search("stopped after step . of 4 of phase 'base'", output)
    assert re.search("stopped (after step . of 4 of|before) phase 'class_", output)
    # Files that are written by libraries in Rust or C raise no event.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "data.parquet"]
    assert sorted(path.name for path in inner.iterdir()) == ["home", "out", "temporary"]
    assert not list(Path("/tmp").glob("outside-funlora*"))
    names = [path.name for path in (inner / "out").rglob("*")]
    assert "class_5.png" in names
    assert not [name for name in names if not re.fullmatch(r"[\w.-]{1,80}", name)]
    assert set(read_json(inner / "out" / "results.json")["class_names"].values()) == set(NAMES)
