"""The notebook's cells run in order and do what it says; its pictures come from one run from top to bottom."""

from __future__ import annotations

import json

import pytest
import torch
from runs import REPOSITORY

from funlora_hf.hub.verify import verify


@pytest.fixture(scope="module")
def cells():
    text = (REPOSITORY / "examples" / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8")
    return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def test_the_cells_teach_a_class_and_forget_none(cells, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    found = {}
    for number, cell in enumerate(cells, start=1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), found)
        found |= {"BASE_STEPS": 20, "CLASS_STEPS": 20}
    assert found["pipe"].classes == {0: "0", 1: "1", 2: "2", 3: "3", 10: "heart"}
    assert sum(found["losses"][-5:]) < sum(found["losses"][:5])
    assert len(found["before"]) == 4
    assert all(torch.equal(old, new) for old, new in zip(found["before"], found["after"], strict=True))
    assert not torch.equal(found["new"], found["after"][0])
    assert [str(verdict) for verdict in verify("quickstart/heart", base="quickstart/base")] == [
        "adapter quickstart/heart: ok, made for this base"
    ]


def test_its_outputs_are_those_of_one_run(cells):
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    texts = "".join("".join(output.get("text", ())) for output in outputs)
    assert "equal to the bit: True" in texts
    # The same noise gives the same picture before and after.
    pictures = [output["data"]["image/png"] for output in outputs if "data" in output]
    assert len(pictures) == 5
    assert pictures[0] == pictures[-1]
