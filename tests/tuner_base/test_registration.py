"""PEFT finds the method by its name, once, in this process and in others."""

import importlib
import pickle
import subprocess
import sys

import pytest
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import funlora_hf
import funlora_hf.tuner
from funlora_hf import FunLoraConfig, FunLoraModel
from funlora_hf.tuner_base.registration import extend_peft_type, register


def registry():
    return (
        list(PeftType),
        dict(PEFT_TYPE_TO_CONFIG_MAPPING),
        dict(PEFT_TYPE_TO_TUNER_MAPPING),
        dict(PEFT_TYPE_TO_PREFIX_MAPPING),
    )


def test_enum_member_behaves_like_pefts_own():
    member = PeftType.FUNLORA
    assert PeftType("FUNLORA") is member
    assert PeftType["FUNLORA"] is member
    assert list(PeftType).count(member) == 1
    assert (member.name, member.value, member == "FUNLORA") == ("FUNLORA", "FUNLORA", True)
    assert pickle.loads(pickle.dumps(member)) is member
    assert isinstance(member, PeftType)
    assert PeftType("LORA") is PeftType.LORA  # PEFT's members are as before
    with pytest.raises(ValueError, match="NO_SUCH_METHOD"):
        PeftType("NO_SUCH_METHOD")


def test_mappings():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.FUNLORA] is FunLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.FUNLORA] is FunLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.FUNLORA] == "funlora_"


def test_registering_again_changes_nothing():
    before = registry()
    assert extend_peft_type("FUNLORA") is PeftType.FUNLORA
    register("funlora", config_cls=FunLoraConfig, model_cls=FunLoraModel)
    importlib.reload(funlora_hf.tuner)
    importlib.reload(funlora_hf)
    assert registry() == before


@pytest.mark.parametrize(("name", "config_cls"), [("funlora", LoraConfig), ("lora", FunLoraConfig)])
def test_a_foreign_method_of_the_same_name_is_an_error(name, config_cls):
    before = registry()
    with pytest.raises(RuntimeError, match=name) as error:
        register(name, config_cls=config_cls, model_cls=FunLoraModel)
    present = FunLoraConfig if name == "funlora" else LoraConfig
    assert present.__qualname__ in str(error.value)
    assert registry() == before


def test_peft_config_finds_the_class(tmp_path):
    FunLoraConfig(function="shift", class_label=3).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is FunLoraConfig
    assert (config.function, config.class_label) == ("shift", 3)


def test_pickle():
    config = FunLoraConfig(function="power", target_modules=["conv1"], class_name="horse")
    loaded = pickle.loads(pickle.dumps(config))
    assert loaded == config
    assert loaded.peft_type is PeftType.FUNLORA


def test_pickle_in_a_process_that_did_not_import_the_package(tmp_path):
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(FunLoraConfig(function="power", class_name="horse")))
    script = (
        "import pickle, sys; config = pickle.load(open(sys.argv[1], 'rb')); "
        "print(type(config).__name__, config.function, config.class_name, config.peft_type.value)"
    )
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["FunLoraConfig", "power", "horse", "FUNLORA"]


def test_public_names():
    for name in funlora_hf.__all__:
        assert getattr(funlora_hf, name) is not None
