"""Inputs of runs, written once."""

from __future__ import annotations

import pytest
from concept_runs import run, write_inputs
from learned_concepts import learn, make_strategy, save_base


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory):
    """A run of funlora, and its results. Do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(inputs, folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a pipeline with random weights."""
    return save_base(tmp_path_factory.mktemp("base") / "pipe")


@pytest.fixture(scope="module")
def learned(base, tmp_path_factory):
    """The folder of a run of funlora on that base, with random numbers in the place of learned ones."""
    return learn(make_strategy(tmp_path_factory.mktemp("run"), base=base))
