"""Features of images: a classifier's last but one layer, Inception by torch-fidelity, and what is refused."""

from __future__ import annotations

import sys
from types import ModuleType
from urllib.error import URLError

import pytest
import torch
from torch import nn

from funlora_hf.classifier import build_classifier
from funlora_hf.data.pixels import to_model_range
from funlora_hf.evaluation.features import ClassifierFeatures, FeatureExtractor, InceptionFeatures, extract_features


def images(count: int, *, channels: int = 1, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(("architecture", "width"), [("cnn", 256), ("resnet18", 512)])
def test_the_head_on_the_features_gives_the_classifier_s_logits(architecture, width):
    torch.manual_seed(0)
    classifier = build_classifier(3, channels=3, image_size=16, architecture=architecture).eval()
    batch = images(4, channels=3, size=16)
    features = extract_features(ClassifierFeatures(classifier), batch)
    assert features.shape == (4, width)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    head = [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        torch.testing.assert_close(head(features), classifier(to_model_range(batch)))


def test_a_classifier_in_training_is_copied_for_evaluation_and_left_as_it_is():
    classifier = build_classifier(3, channels=1, image_size=8)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    extract_features(ClassifierFeatures(classifier), images(4))
    assert classifier.training
    assert isinstance(classifier[-1], nn.Linear)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


def test_features_do_not_depend_on_the_batches():
    extractor = ClassifierFeatures(build_classifier(3, channels=1, image_size=8))
    whole = extract_features(extractor, images(7), batch_size=7)
    torch.testing.assert_close(extract_features(extractor, images(7), batch_size=3), whole)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (torch.zeros(2, 1, 8, 8), r"`images` is torch\.float32, expected a torch.uint8"),
        ([[0]], "`images` is list, expected a torch.uint8"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"`images` has shape \(1, 8, 8\), expected \(N, C, H, W\)"),
        (torch.zeros(0, 1, 8, 8, dtype=torch.uint8), r"`images` has shape \(0, 1, 8, 8\)"),
    ],
)
def test_what_is_no_image_is_refused(bad, text):
    with pytest.raises(ValueError, match=text):
        extract_features(FeatureExtractor(), bad)


class FakeInception(nn.Module):
    """Stands for torch-fidelity's network: the same arguments and result, the mean colour as features."""

    def __init__(self, name, features_list):
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        assert not self.training
        return (self.scale * x.float().mean(dim=(2, 3)),)


@pytest.fixture
def torch_fidelity(monkeypatch):
    """A stand-in for the package, which needs torchvision; returns the module of its Inception."""
    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("channels", [1, 3])
def test_inception_is_given_three_channels(torch_fidelity, channels):
    batch = images(5, channels=channels)
    features = extract_features(InceptionFeatures(), batch, batch_size=2)
    torch.testing.assert_close(features, batch.float().mean(dim=(2, 3)).expand(-1, 3))
    assert InceptionFeatures.name == "inception"


def test_without_torch_fidelity_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r'pip install "funlora-hf\[fid\]"'):
        InceptionFeatures()


def test_without_its_weights_the_extra_and_their_place_are_named(torch_fidelity, monkeypatch):
    def fail(name, features_list):
        raise URLError("no route")

    monkeypatch.setattr(torch_fidelity, "FeatureExtractorInceptionV3", fail)
    with pytest.raises(OSError, match=r'funlora-hf\[fid\]".* no route.*checkpoints'):
        InceptionFeatures()
