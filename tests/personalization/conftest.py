"""Inputs of runs, written once."""

from __future__ import annotations

import pytest
from concept_runs import run, write_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory):
    """A run of funlora, and its results. Do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(inputs, folder)
