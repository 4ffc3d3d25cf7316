"""What `funlora` learns from: the target and the pairs of its batches. Its other tests are those of runs."""

from __future__ import annotations

import pytest
from strategies import learn, make_strategy, stop_at

from funlora_hf.continual.config import LATEST
from funlora_hf.continual.strategies.registry import STRATEGIES
from funlora_hf.data.tasks import Task
from funlora_hf.utils.files import file_sha256


TASKS = (Task(0, (5, 1)), Task(1, (0, 7)))
EXPECTED = {"tasks": TASKS, "adapter_target": "expected", "adapter_pairs": True, "checkpointing_steps": 1}


def adapters(folder):
    return {path.parent.name: file_sha256(path) for path in folder.glob("adapters/*/adapter_model.safetensors")}


@pytest.mark.parametrize(("class_batches", "phase"), [("homogeneous", "class_7"), ("mixed", "task_2")])
def test_a_stopped_run_on_the_expected_target_goes_on_to_the_same_bytes(class_batches, phase, tmp_path):
    given = {**EXPECTED, "class_batches": class_batches}
    learn(make_strategy("funlora", tmp_path / "whole", **given))
    stopped = make_strategy("funlora", tmp_path / "run", **given)
    stop_at(stopped, phase, 2)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped)
    learn(make_strategy("funlora", tmp_path / "run", resume_from_checkpoint=LATEST, **given))
    assert adapters(tmp_path / "run") == adapters(tmp_path / "whole")
    learn(make_strategy("funlora", tmp_path / "plain", tasks=TASKS, class_batches=class_batches))
    assert not adapters(tmp_path / "plain").items() & adapters(tmp_path / "whole").items()
    assert file_sha256(*(tmp_path / "plain" / "base").glob("unet/*.safetensors")) == file_sha256(
        *(tmp_path / "whole" / "base").glob("unet/*.safetensors")
    )


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"funlora", "frozen"}))
def test_strategies_without_adapters_of_classes_refuse_both(name, tmp_path):
    for given in ({"adapter_target": "expected"}, {"adapter_pairs": True}):
        (field, value), *_ = given.items()
        with pytest.raises(ValueError, match=f"`{field}` is {value!r}, which `strategy` '{name}' does not use"):
            make_strategy(name, tmp_path, **given)
