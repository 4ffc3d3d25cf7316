"""The classifier: real digits, determinism, augmentation, and what it refuses."""

import random
import sys

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from funlora_hf import classifier as module
from funlora_hf.classifier import MOMENTUM, ClassifierConfig, build_classifier, percentage, predict, train_classifier


@pytest.fixture(scope="module")
def digits():
    """Real digits: train images, train labels, test images, test labels."""
    data = load_digits()
    images = torch.tensor(np.round(data.images / 16 * 255)).to(torch.uint8)[:, None]
    labels = torch.tensor(data.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=data.target, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def small_config(**changes):
    return ClassifierConfig(**{"epochs": 1, "batch_size": 8, "crop_padding": 1, **changes})


def small_set(count=20, *, channels=1, size=8, num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % num_classes


def train_small(images, labels, *, num_classes=3, seed=0, **changes):
    return train_classifier(images, labels, num_classes=num_classes, config=small_config(**changes), seed=seed)


def parameters(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_real_digits(digits):
    train_images, train_labels, test_images, test_labels = digits
    model = train_classifier(
        train_images,
        train_labels,
        num_classes=10,
        config=ClassifierConfig(epochs=20, crop_padding=0, horizontal_flip=False),
        seed=0,
    )
    assert accuracy(model, test_images, test_labels) >= 97.0
    assert not model.training


def accuracy(model, images, labels):
    return percentage(predict(model, images) == labels)


def test_accuracy_is_chance_with_shuffled_labels(digits):
    # Guards against a leak of the labels or a count of the wrong thing.
    images, labels, test_images, test_labels = digits
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    config = ClassifierConfig(epochs=3, crop_padding=0, horizontal_flip=False)
    model = train_classifier(images, shuffled, num_classes=10, config=config, seed=0)
    assert accuracy(model, test_images, test_labels) < 30.0


def test_equal_seeds_give_equal_bits_and_others_do_not():
    images, labels = small_set()
    first = parameters(train_small(images, labels, seed=3, epochs=2))
    assert same(first, parameters(train_small(images, labels, seed=3, epochs=2)))
    assert not same(first, parameters(train_small(images, labels, seed=4, epochs=2)))


def test_resnet_depends_on_the_seed_alone():
    images, labels = small_set(4, channels=3, size=32)
    torch.manual_seed(1)
    first = parameters(train_small(images, labels, max_train_steps=1, batch_size=4))
    torch.manual_seed(2)
    assert same(first, parameters(train_small(images, labels, max_train_steps=1, batch_size=4)))


def test_global_random_states_are_neither_changed_nor_read():
    images, labels = small_set()
    torch.manual_seed(11)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first = parameters(train_small(images, labels))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    torch.manual_seed(12)
    assert same(first, parameters(train_small(images, labels)))


def test_resnet18_has_the_size_of_resnet18():
    model = build_classifier(10, channels=3, image_size=32, architecture="resnet18")
    # 11.69M of ImageNet's ResNet-18, with 10 instead of 1000 classes and a 3x3 stem.
    expected = 11_689_512 - 1000 * 513 + 10 * 513 - 3 * 64 * (49 - 9)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert expected == pytest.approx(11.18e6, rel=0.01)


@pytest.mark.parametrize(
    ("image_size", "last_map"),
    [(32, 4), (64, 8), (127, 16), (128, 4)],
)
def test_the_stem_follows_the_image_size(image_size, last_map):
    model = build_classifier(2, channels=3, image_size=image_size).eval()
    with torch.no_grad():
        features = model.model.resnet(torch.zeros(1, 3, image_size, image_size)).last_hidden_state
    assert features.shape == (1, 512, last_map, last_map)


def test_the_replaced_stem_is_initialised_like_the_others():
    weight = build_classifier(2, channels=3, image_size=32).model.resnet.embedder.embedder.convolution.weight
    # Kaiming, fan-out: variance 2 / (64 * 9).
    assert float(weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("image_size", "architecture", "is_resnet"),
    [(8, "auto", False), (31, "auto", False), (32, "auto", True), (8, "resnet18", True), (32, "cnn", False)],
)
def test_architecture_and_shape_of_the_logits(image_size, architecture, is_resnet):
    model = build_classifier(7, channels=1, image_size=image_size, architecture=architecture).eval()
    assert isinstance(model, module._ResNet18) is is_resnet
    logits = model(torch.zeros(2, 1, image_size, image_size))
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_tiny_step_limits_train(steps, monkeypatch):
    taken = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *args, **kwargs: (taken.append(self.param_groups[0]["lr"]), step(self, *args, **kwargs))[1],
    )
    images, labels = small_set()
    train_small(images, labels, epochs=10, max_train_steps=steps, learning_rate=0.05)
    assert len(taken) == steps
    # Every run has at least one step at a useful rate.
    assert 0.01 < max(taken) <= 0.05


@pytest.mark.parametrize(
    ("count", "batch_size", "epochs", "expected"),
    [(20, 8, 3, 9), (16, 8, 3, 6), (17, 8, 3, 6), (5, 100, 2, 2), (2, 2, 2, 2), (3, 2, 2, 2), (1, 8, 2, 2)],
)
def test_number_of_steps_and_no_batch_of_one(count, batch_size, epochs, expected, monkeypatch):
    sizes = []
    augment = module._augment
    monkeypatch.setattr(
        module, "_augment", lambda batch, **rest: (sizes.append(len(batch)), augment(batch, **rest))[1]
    )
    images, labels = small_set(count)
    model = train_small(images, labels, batch_size=batch_size, epochs=epochs)
    assert len(sizes) == expected
    assert min(sizes) >= 2
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_the_momentum_is_constant(monkeypatch):
    seen = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *args, **kwargs: (seen.append(self.param_groups[0]["momentum"]), step(self, *args, **kwargs))[1],
    )
    train_small(*small_set(), epochs=3)
    assert set(seen) == {MOMENTUM}


def test_one_class_and_absent_classes_are_allowed():
    images, _ = small_set(6)
    model = train_small(images, torch.zeros(6, dtype=torch.int64), num_classes=1)
    assert accuracy(model, images, torch.zeros(6, dtype=torch.int64)) == 100.0
    assert predict(train_small(images, torch.full((6,), 2), num_classes=5), images).shape == (6,)


def test_inputs_are_left_as_they_were():
    images, labels = small_set()
    copies = images.clone(), labels.clone()
    train_small(images, labels)
    assert torch.equal(images, copies[0])
    assert torch.equal(labels, copies[1])


def test_a_diverging_run_names_phase_and_step():
    images, labels = small_set()
    with pytest.raises(RuntimeError, match=r"phase classifier: the loss is .* at step \d+ of \d+; lower"):
        train_small(images, labels, learning_rate=1e18, epochs=5, batch_size=4)


def test_crops_are_windows_of_the_padded_image():
    images, _ = small_set(50, channels=3, size=6)
    config = small_config(crop_padding=2, horizontal_flip=False)
    cropped = module._augment(images, config=config, generator=torch.Generator().manual_seed(0))
    assert cropped.dtype == torch.uint8
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    found = set()
    for before, after in zip(padded, cropped.numpy(), strict=True):
        places = [(i, j) for i in range(5) for j in range(5) if (before[:, i : i + 6, j : j + 6] == after).all()]
        assert len(places) == 1
        found.update(places)
    # The window moves in both directions, to both borders.
    assert {i for i, _ in found} == {j for _, j in found} == set(range(5))


def test_flips_mirror_about_half_of_the_images():
    images, _ = small_set(400)
    config = small_config(crop_padding=0, horizontal_flip=True)
    flipped = module._augment(images, config=config, generator=torch.Generator().manual_seed(0)).numpy()
    original = images.numpy()
    kept = (flipped == original).all(axis=(1, 2, 3))
    mirrored = (flipped == original[..., ::-1]).all(axis=(1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_without_augmentation_images_pass_unchanged():
    images, _ = small_set()
    config = small_config(crop_padding=0, horizontal_flip=False)
    assert torch.equal(module._augment(images, config=config, generator=torch.Generator()), images)


class FirstPixel(nn.Module):
    """Predicts class 1 where the first pixel is above the middle, and records what it sees."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.modes = []

    def forward(self, images):
        self.seen.append(images)
        self.modes.append(self.training)
        return torch.stack([-images[:, 0, 0, 0], images[:, 0, 0, 0]], dim=1)


def test_predict_and_accuracy_by_hand():
    model = FirstPixel()
    images = torch.zeros(5, 1, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([0, 255, 127, 128, 200])
    assert predict(model, images, batch_size=2).tolist() == [0, 1, 0, 1, 1]
    assert [len(batch) for batch in model.seen] == [2, 2, 1]
    assert model.modes == [False] * 3
    assert model.training
    assert accuracy(model, images, torch.tensor([0, 1, 1, 1, 0])) == pytest.approx(60.0)
    # 0 becomes -1 and 255 becomes 1.
    assert [float(model.seen[-1].min()), float(model.seen[-1].max())] == [-1.0, 1.0]


def test_predictions_do_not_depend_on_the_batch_size():
    images, labels = small_set()
    model = train_small(images, labels)
    assert predict(model, images, batch_size=3).tolist() == predict(model, images).tolist()
    assert predict(model, images).dtype == torch.int64


def test_progress_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    images, labels = small_set()
    common = {"num_classes": 3, "config": small_config(), "seed": 0}
    train_classifier(images, labels, description="classifier, task 2", **common)
    assert "classifier, task 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("epochs", True),
        ("batch_size", 1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", "0.1"),
        ("crop_padding", -1),
        ("crop_padding", True),
        ("horizontal_flip", 1),
        ("max_train_steps", 0),
        ("architecture", "resnet50"),
    ],
)
def test_wrong_configuration_is_named(field, value):
    with pytest.raises(ValueError, match=f"^`{field}` (is|should be) .*{value!r}"):
        ClassifierConfig(**{field: value})
