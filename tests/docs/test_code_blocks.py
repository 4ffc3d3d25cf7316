"""The Python of README and docs runs, page by page, with few steps; commands name scripts and arguments that exist."""

from __future__ import annotations

import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache

import pytest
from runs import REPOSITORY, short_run
from text_to_image import make_pipeline

from funlora_hf.personalization.arguments import (
    ConceptArguments,
    ConceptEvaluationArguments,
    ConceptTrainingArguments,
)
from funlora_hf.personalization.run import ConceptRunArguments, personalize
from funlora_hf.run import run


# docs/guides/sharing.md needs a Hub (test_readme.py), docs/guides/dreambooth.md scripts of diffusers (test_dreambooth.py), and
# docs/strategies/writing_your_own.md the registry (test_strategies_docs.py).
PYTHON_PAGES = [
    "README.md",
    "docs/getting_started.md",
    "docs/guides/many_classes.md",
    "docs/guides/own_loop.md",
    "docs/guides/personalization.md",
    "docs/guides/text_to_image.md",
    "docs/method.md",
    "docs/tuner.md",
    "docs/strategies/README.md",
]
PAGES = sorted(
    path.relative_to(REPOSITORY).as_posix() for path in [REPOSITORY / "README.md", *REPOSITORY.glob("docs/**/*.md")]
)


def blocks(page: str, language: str) -> list[str]:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_page_with_python_is_run():
    found = {page for page in PAGES if blocks(page, "python")}
    elsewhere = {"docs/guides/sharing.md", "docs/guides/dreambooth.md", "docs/strategies/writing_your_own.md"}
    assert found == {*PYTHON_PAGES} | elsewhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pages assume: the repository's root after `make demo` and runs of other strategies, and Stable Diffusion."""
    folder = tmp_path_factory.mktemp("pages")
    make_pipeline("SD").save_pretrained(folder / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    for output, strategy in (("digits", "funlora"), ("finetune", "finetune")):
        arguments = {
            "classes_per_task": 2,
            "image_quality": "none",
            "base_train_steps": 2,
            "adapter_train_steps": 2,
            "unet_config": None,
        }
        run(short_run(output_dir=str(folder / "outputs" / output), strategy=strategy, **arguments))
    for output, strategy in (("concepts", "funlora"), ("naive_lora", "naive_lora")):
        training = ConceptTrainingArguments(
            output_dir=str(folder / "outputs" / output), strategy=strategy, max_train_steps=2
        )
        evaluation = ConceptEvaluationArguments(evaluation=False)
        personalize(ConceptRunArguments(ConceptArguments(concept_order=["toy1"]), training, evaluation))
    return folder


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_python_blocks_run_in_order(page, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    code = "\n".join(blocks(page, "python")).replace("in range(200)", "in range(2)")  # steps of training
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


COMMANDS = [
    (page, line)
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_commands_name_what_exists(page, line):
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if not re.match(r"\w+=", word)} <= set(targets)
    elif words[0] == "funlora":
        text = usage("-m", "funlora_hf", words[1])
        assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--\w+", text))
    elif "-m" in words:
        assert words[0] in ("accelerate", "torchrun"), line
        given = words[words.index("-m") + 1 :]
        assert {word for word in given if word.startswith("--")} <= set(re.findall(r"--\w+", usage("-m", given[0])))
    elif scripts := [word for word in words if word.startswith("examples/")]:
        text = usage(scripts[0])
        given = words[words.index(scripts[0]) :]
        assert {word for word in given if word.startswith("--")} <= set(re.findall(r"--\w+", text))
    else:
        assert words[0] in ("pip", "python3", "source", "git", "bash"), line


@cache
def usage(*command: str) -> str:
    """What `--help` prints."""
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(text), pytest.raises(SystemExit) as ended:
        if command[0] == "-m":
            patch.setattr(sys, "argv", [*command[1:], "--help"])
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            patch.setattr(sys, "argv", [*command, "--help"])
            runpy.run_path(str(REPOSITORY / command[0]), run_name="__main__")
    assert ended.value.code in (0, None)
    return text.getvalue()
