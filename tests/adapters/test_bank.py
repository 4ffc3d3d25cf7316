"""Many classes, one of them live: outputs are those of the adapters themselves, to the bit."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import PLAIN, UNET, adapter_state, assert_equal, base_weights, funlora_layers, kinds
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from funlora_hf import AdapterBank, FunLoraConfig, mixed_batch


LABELS = (3, 7, 5)


def save_classes(kind, folder, **config):
    """Three adapters as PEFT saves them, and what the model gives with each."""
    outputs = {}
    for label in LABELS:
        model = kind.model(seed=label, class_label=label, class_name=f"name {label}", **config)
        outputs[label] = kind.run(model)
        model.save_pretrained(folder / f"class_{label}")
    return outputs


@pytest.fixture
def filled(tmp_path):
    """A bank of three classes on a kind of model, and the outputs expected."""

    def make(kind, **config):
        outputs = save_classes(kind, tmp_path, **config)
        bank = AdapterBank(kind.base(), FunLoraConfig.from_pretrained(tmp_path / "class_3"))
        for label in LABELS:
            assert bank.add(tmp_path / f"class_{label}") == label
        return bank, outputs

    return make


@kinds
@pytest.mark.parametrize(
    "config", [{}, {"function": "shift", "operation": "mul-add", "ratio": 2}], ids=["", "mul-add"]
)
def test_a_live_class_is_its_adapter_to_the_bit(kind, config, filled):
    bank, outputs = filled(kind, **config)
    base = kind.run(kind.base())
    assert bank.active is None
    assert torch.equal(kind.run(bank.model), base)
    for label in (5, 3, 3, 7, None, 5):
        bank.activate(label)
        assert bank.active == label
        assert torch.equal(kind.run(bank.model), base if label is None else outputs[label])


@kinds
def test_a_file_brings_all_classes_back(kind, filled, tmp_path):
    bank, outputs = filled(kind)
    bank.save(tmp_path / "bank.safetensors")
    other = AdapterBank.load(tmp_path / "bank.safetensors", kind.base())
    assert other.classes == bank.classes == {label: f"name {label}" for label in LABELS}
    for label in LABELS:
        other.activate(label)
        assert torch.equal(kind.run(other.model), outputs[label])
    other.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "bank.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["name 7", "caf\u00e9"])
def test_two_classes_of_one_name_are_refused_before_a_file_has_them(name, filled, tmp_path):
    bank, _ = filled(UNET)
    bank.add(tmp_path / "class_3", class_label=11, class_name="cafe\u0301")
    with pytest.raises(ValueError, match=r"`class_name` '.*' is used for two classes: pass another name"):
        bank.add_tensors(bank.state_dict(3), class_label=9, class_name=name)
    with pytest.raises(ValueError, match="is used for two classes"):
        bank.add(tmp_path / "class_3", class_label=9, class_name=name)
    assert set(bank.classes) == {*LABELS, 11}
    bank.remove(7)
    bank.remove(11)
    assert bank.add(tmp_path / "class_3", class_label=9, class_name=name) == 9


def test_the_file_takes_the_bytes_of_the_numbers(filled, tmp_path):
    bank, _ = filled(UNET)
    bank.save(tmp_path / "bank.safetensors")
    numbers = sum(t.numel() for t in bank.state_dict(3).values())
    assert (tmp_path / "bank.safetensors").stat().st_size < len(LABELS) * numbers * 4 + 10_000


@kinds
def test_classes_come_out_as_they_went_in(kind, filled, tmp_path):
    bank, _ = filled(kind)
    for label in LABELS:
        assert_equal(
            dict(sorted(bank.state_dict(label).items())),
            dict(sorted(load_file(tmp_path / f"class_{label}" / "adapter_model.safetensors").items())),
        )


def test_stock_peft_sees_the_live_class(filled, tmp_path):
    bank, outputs = filled(UNET)
    model = PeftModel(UNET.base(), FunLoraConfig.from_pretrained(tmp_path / "class_3"))
    other = AdapterBank(model, FunLoraConfig.from_pretrained(tmp_path / "class_3"), adapter_name="default")
    for label in LABELS:
        other.add_tensors(bank.state_dict(label), class_label=label)
    other.activate(7)
    assert torch.equal(UNET.run(model), outputs[7])
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(UNET.run(PeftModel.from_pretrained(UNET.base(), tmp_path / "saved")), outputs[7])
    assert_equal(adapter_state(model), {name: bank.state_dict(7)[name] for name in adapter_state(model)})


def test_nothing_of_the_base_changes(filled):
    bank, _ = filled(UNET)
    expected = base_weights(UNET.base())
    for label in (*LABELS, None):
        bank.activate(label)
    assert_equal({n.replace("base_layer.", ""): p for n, p in base_weights(bank.model).items()}, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_was_cast_takes_the_next_class(dtype, filled):
    """`model.to` gives every parameter storage of its own."""
    bank, outputs = filled(PLAIN)
    bank.activate(3)
    bank.model.to(dtype)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in PLAIN.batch().items()}
    results = {}
    for label in LABELS:
        bank.activate(label)
        results[label] = PLAIN.run(bank.model, inputs)
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(results[label].float(), outputs[label], rtol=tolerance, atol=tolerance)
    assert not torch.equal(results[3], results[7])


def test_a_compiled_model_stays_compiled(filled):
    bank, outputs = filled(PLAIN)
    torch._dynamo.reset()
    counter = CompileCounter()
    bank.activate(3)
    fast = torch.compile(bank.model, fullgraph=True, backend=counter)
    for label in (*LABELS, *LABELS):
        bank.activate(label)
        torch.testing.assert_close(PLAIN.run(fast), outputs[label], rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_training_after_a_change_of_class_gets_that_classes_gradient(filled, tmp_path):
    bank, _ = filled(PLAIN)
    alone = PeftModel.from_pretrained(PLAIN.base(), tmp_path / "class_7", is_trainable=True)
    alone(**PLAIN.batch()).sum().backward()
    bank.activate(3)
    bank.activate(7)
    live = [layer for layer in funlora_layers(bank.model) if hasattr(layer, "funlora_A")]
    for layer in live:
        layer.funlora_A["live"].requires_grad_(True)
    bank.model(**PLAIN.batch()).sum().backward()
    expected = [layer for layer in funlora_layers(alone) if hasattr(layer, "funlora_A")]
    for own, other in zip(live, expected, strict=True):
        torch.testing.assert_close(own.funlora_A["live"].grad, other.funlora_A["default"].grad)


def test_autograd_notices_a_change_between_forward_and_backward(filled):
    bank, _ = filled(PLAIN)
    bank.activate(3)
    for layer in funlora_layers(bank.model):
        layer.requires_grad_(True)
    result = bank.model(**PLAIN.batch()).sum()
    bank.activate(7)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "activate", "base"]), st.integers(0, 4)), max_size=25))
def test_any_history(steps):
    """Against a plain dictionary."""
    states = [adapter_state(PLAIN.model(seed=label)) for label in range(5)]
    outputs = [PLAIN.run(PLAIN.model(seed=label)) for label in range(5)]
    base = PLAIN.run(PLAIN.base())
    bank, known, live = AdapterBank(PLAIN.base(), PLAIN.config()), {}, None
    for step, label in steps:
        if step == "base":
            bank.activate(None)
            live = None
        elif step == "add":
            if label in known:
                with pytest.raises(ValueError, match="in the bank already"):
                    bank.add_tensors(states[label], class_label=label)
            else:
                bank.add_tensors(states[label], class_label=label, class_name=f"n{label}")
                known[label] = f"n{label}"
        elif label not in known:
            with pytest.raises(ValueError, match="expected a class of the bank"):
                (bank.remove if step == "remove" else bank.activate)(label)
        elif step == "remove":
            bank.remove(label)
            del known[label]
            live = None if live == label else live
        else:
            bank.activate(label)
            live = label
        assert bank.classes == known
        assert len(bank) == len(known)
        assert (label in bank) == (label in known)
        assert bank.active == live
        assert torch.equal(PLAIN.run(bank.model), base if live is None else outputs[live])


@kinds
def test_a_mixed_batch_is_that_of_as_many_adapters_in_the_model(kind, filled, tmp_path):
    bank, outputs = filled(kind)
    samples = len(next(iter(kind.batch().values())))
    classes = [[7, None, 3, 5, 7, 3][index % 6] for index in range(samples)]
    model = PeftModel.from_pretrained(kind.base(), tmp_path / "class_3", adapter_name="class_3")
    for label in (5, 7):
        model.load_adapter(tmp_path / f"class_{label}", f"class_{label}")
    names = ["__base__" if label is None else f"class_{label}" for label in classes]
    with mixed_batch(model.eval(), names):
        expected = kind.run(model)
    bank.activate(5)
    random_numbers = torch.get_rng_state()
    for _ in range(2):
        with bank.mixed_batch(classes):
            assert torch.equal(kind.run(bank.model), expected)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert bank.active == 5
    assert torch.equal(kind.run(bank.model), outputs[5])
    bank.activate(None)
    with bank.mixed_batch(classes):
        assert torch.equal(kind.run(bank.model), expected)
    assert torch.equal(kind.run(bank.model), kind.run(kind.base()))


def test_a_mixed_batch_takes_as_many_adapters_as_it_has_classes(filled):
    bank, _ = filled(PLAIN)
    assert bank.adapter_names == ["live"]
    first = bank.place([3, 7, 3])
    assert set(first) == {3, 7}
    second = bank.place([5, 7])
    assert second[7] == first[7]
    assert second[5] == first[3]
    assert sorted(bank.adapter_names) == sorted(["live", *first.values()])
    with pytest.raises(ValueError, match="`class_label` is 4, expected a class of the bank"):
        bank.place([3, 4])
    assert bank.place([5, 7]) == second


def test_adapters_stay_in_float32_in_a_model_of_lower_precision(filled, tmp_path):
    bank, _ = filled(PLAIN)
    bank.model.to(torch.bfloat16)
    bank.activate(3)
    expected = load_file(tmp_path / "class_3" / "adapter_model.safetensors")
    for key, tensor in bank.live_tensors.items():
        assert torch.equal(tensor.detach(), expected[f"base_model.model.{key}"])
    bank.remove(5)
    bank.add(tmp_path / "class_5")
    saved = load_file(tmp_path / "class_5" / "adapter_model.safetensors")
    assert_equal(dict(sorted(bank.state_dict(5).items())), dict(sorted(saved.items())))


def test_nothing_of_a_removed_class_stays_in_the_model(filled):
    bank, _ = filled(PLAIN)
    bank.activate(7)
    name = bank.place([7])[7]
    bank.remove(7)
    assert all(not tensor.any() for tensor in bank.live_tensors.values())
    for layer in funlora_layers(bank.model):
        assert not any(tensor.any() for key, tensor in layer.adapter_tensors().items() if key.endswith(f".{name}"))


def test_an_empty_bank_is_saved_and_loaded(tmp_path):
    AdapterBank(PLAIN.base(), PLAIN.config()).save(tmp_path / "empty.safetensors")
    assert AdapterBank.load(tmp_path / "empty.safetensors", PLAIN.base()).classes == {}


# What does not fit


def test_adapters_of_another_configuration_are_named(filled, tmp_path):
    bank, _ = filled(PLAIN)
    PLAIN.model(function="power", class_label=8).save_pretrained(tmp_path / "class_8")
    with pytest.raises(ValueError, match="`function` is 'power', not 'cosine'"):
        bank.add(tmp_path / "class_8")
    assert 8 not in bank


def test_adapters_of_other_layers_are_named(filled, tmp_path):
    bank, _ = filled(PLAIN)
    PLAIN.model(target_modules=["blocks.0"], class_label=8).save_pretrained(tmp_path / "class_8")
    with pytest.raises(ValueError, match=r"nothing was added:\n- .*missing"):
        bank.add(tmp_path / "class_8")
    assert 8 not in bank


def test_adapters_of_another_method_are_named(filled, tmp_path):
    bank, _ = filled(PLAIN)
    get_peft_model(PLAIN.base(), LoraConfig(target_modules=["mlp.0"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="of type LORA, expected FUNLORA"):
        bank.add(tmp_path / "lora", class_label=8)


def test_adapters_that_are_not_finite_are_named(filled, tmp_path):
    bank, outputs = filled(PLAIN)
    state = bank.state_dict(3)
    next(iter(state.values())).view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        bank.add_tensors(state, class_label=8)
    bank.save(tmp_path / "bank.safetensors")
    rows = load_file(tmp_path / "bank.safetensors")["adapters"].clone()
    rows[1, 0] = float("inf")
    rewrite(tmp_path / "bank.safetensors", rows)
    spoiled = AdapterBank.load(tmp_path / "bank.safetensors", PLAIN.base())
    spoiled.activate(3)
    with pytest.raises(ValueError, match="Class 7 has numbers that are not finite"):
        spoiled.activate(7)
    assert spoiled.active == 3
    assert torch.equal(PLAIN.run(spoiled.model), outputs[3])


def about(file):
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()["adapter_bank"])


def rewrite(file, rows, **changes):
    metadata = {key: value for key, value in {**about(file), **changes}.items() if value is not None}
    save_file({"adapters": rows}, file, metadata={"adapter_bank": json.dumps(metadata)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"classes": None}, "has no classes: it was not written by AdapterBank.save"),
        ({"config": {"peft_type": "LORA"}}, "adapters of type LORA, expected FUNLORA"),
        (
            {"layout": [["elsewhere.funlora_A", [3, 1]]]},
            r"does not fit this model: .* not found in the base model:\n- elsewhere",
        ),
        ({"classes": [[1, "one"]]}, r"of shape \(3, \d+\), expected a row for every class, \(1, "),
    ],
)
def test_files_that_are_no_banks_of_this_model_are_named(change, text, filled, tmp_path):
    bank, _ = filled(PLAIN)
    bank.save(tmp_path / "bank.safetensors")
    rewrite(tmp_path / "bank.safetensors", load_file(tmp_path / "bank.safetensors")["adapters"].clone(), **change)
    with pytest.raises(ValueError, match=text):
        AdapterBank.load(tmp_path / "bank.safetensors", PLAIN.base())


def test_a_bank_of_another_model_is_named(filled, tmp_path):
    bank, _ = filled(UNET)
    bank.save(tmp_path / "bank.safetensors")
    with pytest.raises(ValueError, match="not found in the base model"):
        AdapterBank.load(tmp_path / "bank.safetensors", PLAIN.base())
    wider = UNET.base(block_out_channels=(32, 96))
    with pytest.raises(ValueError, match=r"does not fit this model: .*\n- .*found shape"):
        AdapterBank.load(tmp_path / "bank.safetensors", wider)
    assert not funlora_layers(wider)


def test_rows_in_another_order_are_sorted(filled, tmp_path):
    """Another version of a model may list its modules in another order."""
    bank, outputs = filled(PLAIN)
    bank.save(tmp_path / "bank.safetensors")
    file = tmp_path / "bank.safetensors"
    layout = about(file)["layout"]
    sizes = [torch.Size(shape).numel() for _, shape in layout]
    parts = load_file(file)["adapters"].clone().split(sizes, dim=1)
    rewrite(file, torch.cat(parts[::-1], dim=1), layout=layout[::-1])
    other = AdapterBank.load(file, PLAIN.base())
    other.activate(7)
    assert torch.equal(PLAIN.run(other.model), outputs[7])


def test_files_that_are_not_there_are_named(filled, tmp_path):
    bank, _ = filled(PLAIN)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        AdapterBank.load(tmp_path / "nowhere.safetensors", PLAIN.base())
    (tmp_path / "class_3" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"class_3' has no adapter_model\.safetensors"):
        bank.add(tmp_path / "class_3", class_label=9)


def test_a_class_without_a_number_is_named(filled, tmp_path):
    bank, _ = filled(PLAIN)
    PLAIN.model().save_pretrained(tmp_path / "unknown")
    with pytest.raises(ValueError, match="does not say which class it is: pass `class_label`"):
        bank.add(tmp_path / "unknown")
    assert bank.add(tmp_path / "unknown", class_label=9, class_name="nine") == 9
    assert bank.classes[9] == "nine"


def test_models_with_other_adapters_and_modules_to_save_are_refused():
    with pytest.raises(ValueError, match="`model` has the adapters x, y, expected none besides 'live'"):
        AdapterBank(PLAIN.model("x", "y"), PLAIN.config())
    with pytest.raises(ValueError, match=r"`modules_to_save` is \['head'\]"):
        AdapterBank(PLAIN.base(), PLAIN.config(modules_to_save=["head"]))
    with pytest.raises(ValueError, match="`r` is 2, not 1"):
        AdapterBank(PLAIN.model(), PLAIN.config(r=2), adapter_name="default")


def test_a_merged_class_is_not_exchanged(filled):
    bank, _ = filled(PLAIN)
    bank.activate(3)
    for layer in funlora_layers(bank.model):
        layer.merge()
    with pytest.raises(ValueError, match="merged into the base's weights: unmerge it first"):
        bank.activate(7)
    assert bank.active == 3
