"""The lines of docs/guides/sharing.md run as they stand there, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import torch
from diffusers import UNet2DModel
from runs import REPOSITORY, short_run

from funlora_hf import FunLoraPipeline
from funlora_hf.run import run


def snippet(heading: str) -> str:
    """The first Python block below a heading of docs/guides/sharing.md."""
    text = (
        (REPOSITORY / "docs" / "guides" / "sharing.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    )
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_the_round_trip_over_the_hub(hub, tmp_path):
    code = snippet("Share a class")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) == 8
    run(short_run(output_dir=str(tmp_path / "outputs" / "digits"), classes_per_task=2, num_tasks=4))
    pipe = FunLoraPipeline.from_pretrained(tmp_path / "outputs" / "digits" / "base")
    pipe.load_adapter(tmp_path / "outputs" / "digits" / "adapters" / "class_7")
    check = """
assert list(bank.classes) == [2, 7]
assert len(images) == 3 and all(image.size == (8, 8) for image in images)
assert 7 not in pipe.classes
"""
    environment = {**os.environ, **hub.environment, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    done = subprocess.run(
        [sys.executable, "-c", code + check],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = hub.files("user/digits")
    assert "class_6/adapter_model.safetensors" in files
    assert not any(name.startswith("class_7") for name in files)
    assert not (tmp_path / "outputs" / "digits" / "adapters" / "class_7").exists()
    plain = UNet2DModel.from_pretrained(tmp_path / "seven")
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pipe.predict_velocity(sample, torch.tensor(0.5), [7, 7])
        torch.testing.assert_close(plain(sample, torch.tensor(500.0)).sample, expected, rtol=1e-4, atol=1e-5)
