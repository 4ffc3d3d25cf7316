"""The measurement of two concepts side by side: what it draws, and what it reads of known pictures."""

from __future__ import annotations

import sys

import measure_regions
import pytest
import torch
from measure_regions import images_of, main, scores

from funlora_hf.personalization.arguments import (
    ConceptArguments,
    ConceptEvaluationArguments,
    ConceptTrainingArguments,
)
from funlora_hf.personalization.concepts import load_concepts
from funlora_hf.personalization.pictures import load_images
from funlora_hf.personalization.run import ConceptRunArguments, personalize


def run_of(folder, *names):
    training = ConceptTrainingArguments(output_dir=str(folder), strategy="textual_inversion", max_train_steps=1)
    evaluation = ConceptEvaluationArguments(evaluation=False)
    personalize(ConceptRunArguments(ConceptArguments(concept_order=list(names)), training, evaluation))
    return str(folder)


def test_pairs_are_drawn_and_read(tmp_path, monkeypatch, capsys):
    run = run_of(tmp_path / "run", "badge1", "toy1")
    by_name = {concept.name: concept for concept in load_concepts("tiny")}
    pair = [by_name["toy1"], by_name["badge1"]]
    drawn = images_of(run, pair, 1)
    assert {half.shape for halves in drawn.values() for half in halves} == {(1, 3, 32, 32)}
    assert not any(torch.equal(*halves) for halves in drawn.values())

    references = [load_images(concept.references, size=32) for concept in pair]
    known = {"right": references, "swapped": references[::-1]}
    monkeypatch.setattr(measure_regions, "images_of", lambda *_: known)
    found = scores(run, 2)
    assert found["right"] == (1.0, found["swapped"][0])
    assert found["swapped"] == (found["right"][1], 1.0)
    assert found["right"][1] < 0.3

    monkeypatch.setattr(sys, "argv", ["measure_regions.py", run])
    main()
    assert "| right | 1.00 | " in capsys.readouterr().out


def test_a_single_concept_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 1 concepts of the tiny base, expected at least 2"):
        scores(run_of(tmp_path / "run", "toy1"), 1)
