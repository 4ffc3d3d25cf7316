"""Nothing is unpickled and nothing of a file is run: whole runs in which unpickling raises. What sources call, ruff checks."""

from __future__ import annotations

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
