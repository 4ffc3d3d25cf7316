"""The U-Net that classifies: its features are those of its own forward, and who learns from them."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from runs import TINY_UNET, make_tiny_unet
from strategies import make_strategy

from funlora_hf.continual.config import DIGITS_UNET, ModelArguments
from funlora_hf.continual.strategies.joint_net import JointNet, build_head, encode


ATTENTION = {**TINY_UNET, "layers_per_block": 2, "down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}


def hooked_features(unet, images):
    """The pooled outputs of its modules in its own forward at sigma 0, whose class vector is 0."""
    found = []
    layers = [unet.conv_in]
    for block in unet.down_blocks:
        layers += getattr(block, "attentions", block.resnets)
        layers += block.downsamplers or []
    for layer in [*layers, unet.mid_block]:
        layer.register_forward_hook(lambda _, inputs, output: found.append(output.mean(dim=(2, 3))))
    unet.class_embedding.weight.data.zero_()
    unet(images, torch.zeros(len(images)), torch.ones(len(images), dtype=torch.long))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    ("config", "features"), [(TINY_UNET, 8 * 3 + 16 * 2), (ATTENTION, 8 * 4 + 16 * 3), (DIGITS_UNET, 224)]
)
@torch.no_grad()
def test_features_are_those_of_the_unet_s_own_forward_to_the_bit(config, features):
    torch.manual_seed(0)
    unet = UNet2DModel(**config, num_class_embeds=2).eval()
    images = torch.randn(3, 1, 8, 8)
    found = encode(unet, images)
    assert found.shape == (3, features)
    assert torch.equal(found, hooked_features(unet, images))


@pytest.mark.parametrize("joint", [True, False])
def test_without_joint_learning_the_classifier_gives_the_unet_no_gradient(joint):
    unet = make_tiny_unet()
    net = JointNet(unet, build_head(56, 2, hidden=4, dropout=0.0), joint=joint)
    net.classify(torch.randn(3, 1, 8, 8)).logsumexp(dim=1).sum().backward()
    assert (unet.conv_in.weight.grad is not None) == joint
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.head.parameters())
    # What the head does not read.
    assert unet.conv_out.weight.grad is unet.class_embedding.weight.grad is None


def test_dropout_of_the_unet_is_that_of_a_unet_without_a_head():
    torch.manual_seed(0)
    unet = UNet2DModel(**TINY_UNET, num_class_embeds=2).train()
    net = JointNet(unet, build_head(56, 2, hidden=4, dropout=0.5)).train()
    images, time, rows = torch.randn(3, 1, 8, 8), torch.full((3,), 500.0), torch.tensor([0, 1, 1])
    torch.manual_seed(1)
    velocity, logits = net(images, time, rows, images)
    torch.manual_seed(1)
    assert torch.equal(velocity, unet(images, time, rows).sample)
    assert logits.shape == (3, 2)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mid_block_type": None}, r"`unet_config.mid_block_type` is None, .* expected a middle block"),
        (
            {"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]},
            r"`unet_config.down_block_types` is \['SkipDownBlock2D', 'DownBlock2D'\], .* without skip convolutions",
        ),
        ({"center_input_sample": True}, r"`unet_config.center_input_sample` is True, .* expected False"),
        # No strategy can train it.
        ({"time_embedding_type": "fourier"}, "`unet_config.time_embedding_type` is 'fourier', expected 'positional'"),
    ],
)
def test_a_unet_that_the_head_cannot_read_is_refused(changes, text, tmp_path):
    strategy = make_strategy("jdcl", tmp_path)
    with pytest.raises(ValueError, match=text):
        strategy.setting.model.unet_config = ModelArguments(unet_config={**TINY_UNET, **changes}).unet
        strategy.check()
    assert not list(tmp_path.iterdir())
