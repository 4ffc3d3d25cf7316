"""Import paths that other people's strategies and scripts use, though the modules have moved."""

from __future__ import annotations

from importlib import import_module

import pytest


PATHS = {
    "funlora_hf.baselines": ["ConvLoraConfig"],
    "funlora_hf.continual.config": [
        "ContinualTrainingArguments",
        "DataArguments",
        "EvaluationArguments",
        "ModelArguments",
    ],
    "funlora_hf.continual.existing_base": ["ExistingBase", "find_base"],
    "funlora_hf.continual.finetune": ["Finetune"],
    "funlora_hf.continual.funlora": ["FunLora"],
    "funlora_hf.continual.guide": ["Guide"],
    "funlora_hf.continual.joint": ["Joint"],
    "funlora_hf.continual.low_rank": ["NaiveLora"],
    "funlora_hf.continual.registry": ["STRATEGIES"],
    "funlora_hf.continual.replay": ["Replay"],
    "funlora_hf.continual.run_folder": ["RunFolder"],
    "funlora_hf.continual.sequential": ["Sequential"],
    "funlora_hf.continual.strategy": ["Strategy"],
    "funlora_hf.data": ["assign_class_ids", "load_image_data", "split_into_tasks"],
    "funlora_hf.files": ["read_json", "write_json"],
    "funlora_hf.flow_matching": [
        "flow_matching_loss",
        "interpolate",
        "sample_sigmas",
        "sigma_to_timestep",
        "training_loss",
        "velocity_target",
    ],
    "funlora_hf.hub": ["delete_class", "delete_class_from_hub", "push_all"],
    "funlora_hf.run": ["RunArguments", "run"],
    "funlora_hf.seeds": ["derive_seed"],
    "funlora_hf.tuner": ["FunLoraConfig", "FunLoraModel"],
}


@pytest.mark.parametrize(("path", "names"), PATHS.items())
def test_names_are_there(path, names):
    module = import_module(path)
    assert [name for name in names if not hasattr(module, name)] == []
