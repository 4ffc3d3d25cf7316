"""Adapters of any configuration side by side in a pipeline, against stock PEFT with each of them alone."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from funlora_hf import AdapterBank, FunLoraConfig
from funlora_hf.tuner import FunLoraLayer


CONFIGS = {
    7: {},
    8: {},
    9: {"function": "power", "operation": "mul-add", "ratio": 2},
    10: {"target_modules": ["conv_in"]},
    11: {"function": "identity", "r": 2, "class_embedding": None},
}


@pytest.fixture
def plain_unet(tiny_unet):
    """The base's U-Net, taken before anything is done to it."""
    return copy.deepcopy(tiny_unet)


@pytest.fixture
def save(plain_unet, tmp_path):
    """Write a random adapter of a class."""

    def write(class_id, **config):
        torch.manual_seed(class_id)
        config = {
            "class_embedding": "class_embedding",
            "class_label": class_id,
            "class_name": f"c{class_id}",
            **config,
        }
        model = get_peft_model(copy.deepcopy(plain_unet), FunLoraConfig(init_weights=False, **config))
        model.save_pretrained(tmp_path / f"class_{class_id}", save_embedding_layers=False)
        return tmp_path / f"class_{class_id}"

    return write


@pytest.fixture
def folders(save):
    return {class_id: save(class_id, **config) for class_id, config in CONFIGS.items()}


def batch(size=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.linspace(0.1, 0.9, size)


def alone(unet, folder):
    """dx/dsigma with one adapter, by stock PEFT."""
    sample, sigma = batch()
    model = PeftModel.from_pretrained(copy.deepcopy(unet), folder).eval()
    with torch.no_grad():
        return model(sample, 1000 * sigma, torch.zeros(len(sample), dtype=torch.long)).sample


@torch.no_grad()
def velocity(pipe, class_id):
    sample, sigma = batch()
    return pipe.predict_velocity(sample, sigma, [class_id] * len(sample))


def test_adapters_of_any_configuration_act_as_they_do_alone(plain_unet, tiny_pipe, folders):
    base = velocity(tiny_pipe, 3)
    for class_id, folder in folders.items():
        assert tiny_pipe.load_adapter(folder) == class_id
    expected = {class_id: alone(plain_unet, folder) for class_id, folder in folders.items()} | {3: base}
    for class_id in (9, 3, 11, 7, 10, 8, 7):
        assert torch.equal(velocity(tiny_pipe, class_id), expected[class_id])
    sample, sigma = batch()
    with torch.no_grad():
        mixed = tiny_pipe.predict_velocity(sample, sigma, [11, 3, 9])
    for index, class_id in enumerate((11, 3, 9)):
        torch.testing.assert_close(mixed[index], expected[class_id][index], rtol=1e-4, atol=1e-5)
    for class_id in (7, 9, 10, 8):
        tiny_pipe.unload_adapter(class_id)
        assert torch.equal(velocity(tiny_pipe, 11), expected[11])
        assert torch.equal(velocity(tiny_pipe, 3), base)
    tiny_pipe.unload_adapter(11)
    assert not any(isinstance(module, FunLoraLayer) for module in tiny_pipe.unet.modules())
    assert set(tiny_pipe.unet.state_dict()) == set(plain_unet.state_dict())


def test_a_saved_adapter_is_the_loaded_one_byte_for_byte(tiny_pipe, folders, tmp_path):
    for folder in folders.values():
        tiny_pipe.load_adapter(folder)
    tiny_pipe.save_pretrained(tmp_path / "saved")
    for class_id, folder in folders.items():
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            written = tmp_path / "saved" / "adapters" / f"class_{class_id}" / file
            assert written.read_bytes() == (folder / file).read_bytes()


def test_an_adapter_is_saved_under_the_id_that_it_has_here(tiny_pipe, folders, tmp_path):
    tiny_pipe.load_adapter(folders[7], class_label=21, class_name="new")
    expected = velocity(tiny_pipe, 21)
    tiny_pipe.save_pretrained(tmp_path / "saved")
    again = type(tiny_pipe).from_pretrained(tmp_path / "saved")
    assert again.classes[21] == "new"
    assert 7 not in again.classes
    assert torch.equal(velocity(again, 21), expected)


def test_adapters_with_whole_modules_go_beside_others(plain_unet, tiny_pipe, folders, save, tmp_path):
    """They are held by PEFT, and so is what comes after them."""
    whole = save(12, modules_to_save=["conv_out"])
    for order in ((7, 12), (12, 7)):
        for class_id in order:
            tiny_pipe.load_adapter(whole if class_id == 12 else folders[class_id])
        assert torch.equal(velocity(tiny_pipe, 7), alone(plain_unet, folders[7]))
        assert torch.equal(velocity(tiny_pipe, 12), alone(plain_unet, whole))
        for class_id in order:
            tiny_pipe.unload_adapter(class_id)
        assert set(tiny_pipe.unet.state_dict()) == set(plain_unet.state_dict())


def test_a_file_of_many_classes(plain_unet, tiny_pipe, folders, tmp_path):
    bank = AdapterBank(copy.deepcopy(plain_unet), FunLoraConfig.from_pretrained(folders[7]))
    for class_id in (7, 8):
        bank.add(folders[class_id])
    bank.save(tmp_path / "bank.safetensors")
    tiny_pipe.load_adapter(folders[9])
    assert tiny_pipe.load_adapter_bank(tmp_path / "bank.safetensors") == [7, 8]
    assert tiny_pipe.classes == {3: "three", 5: "5", 9: "c9", 7: "c7", 8: "c8"}
    for class_id in (7, 9, 8):
        assert torch.equal(velocity(tiny_pipe, class_id), alone(plain_unet, folders[class_id]))
    tiny_pipe.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved" / "adapters" / "class_8" / "adapter_model.safetensors"
    assert saved.read_bytes() == (folders[8] / "adapter_model.safetensors").read_bytes()
    before = velocity(tiny_pipe, 8)
    with pytest.raises(ValueError, match=r"has the classes \[7, 8\], which are known already"):
        tiny_pipe.load_adapter_bank(tmp_path / "bank.safetensors")
    tiny_pipe.unload_adapter(7)
    assert torch.equal(velocity(tiny_pipe, 8), before)


def test_a_file_whose_names_are_taken_changes_nothing(plain_unet, tiny_pipe, folders, tmp_path):
    bank = AdapterBank(copy.deepcopy(plain_unet), FunLoraConfig.from_pretrained(folders[7]))
    bank.add(folders[7], class_name="three")
    bank.save(tmp_path / "bank.safetensors")
    with pytest.raises(ValueError, match="`class_name` 'three' is used for two classes"):
        tiny_pipe.load_adapter_bank(tmp_path / "bank.safetensors")
    assert tiny_pipe.classes == {3: "three", 5: "5"}
    assert not any(isinstance(module, FunLoraLayer) for module in tiny_pipe.unet.modules())


def test_the_model_has_as_many_adapters_as_classes_act_at_once(tiny_pipe, folders):
    for class_id in (7, 8):
        tiny_pipe.load_adapter(folders[class_id])
    for asked, expected in (([7], 1), ([8], 1), ([7, 8], 2), ([7], 2)):
        sample, sigma = batch(len(asked))
        tiny_pipe.predict_velocity(sample, sigma, asked)
        names = {
            name for layer in tiny_pipe.unet.modules() if isinstance(layer, FunLoraLayer) for name in layer.settings
        }
        assert len(names) == expected


def test_sampling_takes_no_random_numbers_from_its_caller(tiny_pipe, folders):
    for class_id in (7, 8):
        tiny_pipe.load_adapter(folders[class_id])
    before = torch.get_rng_state()
    tiny_pipe([7, 8], 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
