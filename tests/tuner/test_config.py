"""The configuration: checks, defaults, and files that depend on nothing but its values."""

import copy
import json

import pytest

from funlora_hf import FunLoraConfig


def test_defaults_are_the_papers():
    # arXiv 2510.02631: r = 1, ten functions; cosine with learned frequencies and multiplication are its best.
    config = FunLoraConfig()
    assert (config.r, config.num_functions, config.ratio) == (1, 10, 1)
    assert (config.function, config.operation, config.train_omega) == ("cosine", "mul", True)
    assert config.init_weights is True
    assert config.target_modules is None
    assert config.peft_type == "FUNLORA"


@pytest.mark.parametrize("field", ["r", "num_functions", "ratio"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", None, True])
def test_counts_are_positive_integers(field, value):
    with pytest.raises(ValueError, match=field) as error:
        FunLoraConfig(**{field: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("field", "choice"), [("function", "identity"), ("operation", "mul-add")])
@pytest.mark.parametrize("value", ["sine", "MUL", "", None, 1])
def test_choices(field, choice, value):
    with pytest.raises(ValueError, match=f"`{field}`") as error:
        FunLoraConfig(**{field: value})
    assert repr(value) in str(error.value)
    assert repr(choice) in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"target_modules": "all-conv", "layers_to_transform": [0]}, ["layers_to_transform", "target_modules"]),
        ({"target_modules": "all-conv", "layers_pattern": "resnets"}, ["layers_pattern", "target_modules"]),
        ({"target_modules": ["conv1"], "layers_pattern": "resnets"}, ["layers_pattern", "layers_to_transform"]),
    ],
)
def test_layer_indexes_need_a_list_of_modules(kwargs, words):
    with pytest.raises(ValueError, match=words[0]) as error:
        FunLoraConfig(**kwargs)
    assert words[1] in str(error.value)


@pytest.mark.parametrize(
    ("function", "train_omega", "expected"),
    [
        ("cosine", True, True),
        ("power", True, True),
        ("shift", True, False),
        ("identity", True, False),
        ("cosine", False, False),
        ("power", False, False),
    ],
)
def test_learns_omega(function, train_omega, expected):
    assert FunLoraConfig(function=function, train_omega=train_omega).learns_omega is expected


def test_save_and_load(tmp_path):
    config = FunLoraConfig(
        r=2,
        function="power",
        num_functions=3,
        train_omega=False,
        operation="mul-add",
        ratio=4,
        target_modules=["conv2", "conv1"],
        exclude_modules=["conv_out", "conv_in"],
        modules_to_save=["conv_norm_out"],
        layers_to_transform=[1, 0],
        layers_pattern="resnets",
        class_embedding="class_embedding",
        class_label=7,
        class_name="horse",
        inference_mode=True,  # what a loaded configuration says
    )
    config.save_pretrained(tmp_path)
    loaded = FunLoraConfig.from_pretrained(tmp_path)
    assert loaded == config
    assert loaded.target_modules == {"conv1", "conv2"}
    assert loaded.class_label == 7
    assert loaded.class_name == "horse"


def test_module_names_are_written_in_one_order(tmp_path):
    names = [f"up_blocks.{i}.conv{j}" for i in range(8) for j in range(2)]
    files = []
    for index, order in enumerate((names, names[::-1])):
        config = FunLoraConfig(target_modules=order, exclude_modules=order)
        config.save_pretrained(tmp_path / str(index))
        files.append((tmp_path / str(index) / "adapter_config.json").read_bytes())
    assert files[0] == files[1]
    assert json.loads(files[0])["target_modules"] == sorted(names)
    assert json.loads(files[0])["exclude_modules"] == sorted(names)


def test_to_dict_leaves_the_configuration_alone():
    config = FunLoraConfig(target_modules=["b", "a"])
    before = copy.deepcopy(config)
    config.to_dict()["target_modules"].append("c")
    assert config == before
