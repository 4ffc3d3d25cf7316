"""`funlora personalize`: a short run of the package's own base, and errors of one line."""

from __future__ import annotations

import json

import pytest

from funlora_hf.personalization.command import main


pytestmark = pytest.mark.usefixtures("fresh_accelerator")
SHORT = [
    "--max_train_steps",
    "2",
    "--num_samples_per_prompt",
    "1",
    "--num_inference_steps",
    "1",
    "--concept_order",
    "toy1",
    "badge1",
]


def test_the_tiny_base(tmp_path, capsys):
    main([*SHORT, "--output_dir", str(tmp_path / "run")])
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {"attr", "sim", "clip_i", "clip_t", "leak"} <= results["scores"].keys()
    assert results["ceiling"]["attr"] == 1.0
    assert results["base_drift"]["before"].keys() >= {"shape", "colour", "size", "background"}
    assert "| attr | " in out
    assert "first samples at the end: identical to the bit" in out


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["--concept_ordr", "toy1"], "--concept_order"),
        (["--concepts", "nowhere.json"], "there is no such file or folder"),
        (["--strategy", "cns", "--strategy_options", "overlap=excluded"], "overlap=excluded, since earlier concepts"),
        (["--rank", "0"], "`rank` should be a positive integer value but the value passed is 0"),
    ],
)
def test_errors(given, error, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*given, "--output_dir", str(tmp_path / "run")])
    text = f"{exit.value.code}{capsys.readouterr().err}"
    assert error in text
    assert not (tmp_path / "run").exists()
