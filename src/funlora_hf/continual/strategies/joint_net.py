"""A U-Net that also classifies: a head reads the pooled features of its encoder and its middle block.

Source: JDCL (arXiv 2411.08224), `adjusted_unet.py` and `joint_diffusion.py` of its code [code]; its U-Net has no class vectors, so
    here the head reads the features without one [ours].
"""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn


def encode(unet: UNet2DModel, images: Tensor) -> Tensor:
    """Return the pooled features of a U-Net's encoder and middle block at sigma 0, with a zero class vector, `(batch, features)`.

    They are the mean over height and width of the output of the first convolution, of every residual block (with its attention)
    and downsampler, and of the middle block, as `UNet2DModel.forward` computes them.

    Args:
        unet: one that `check_readable` accepts.
        images: without noise, `(batch, channels, height, width)` in [-1, 1].
    """
    time = unet.time_proj(torch.zeros(len(images), device=images.device))
    embedding = unet.time_embedding(time.to(unet.dtype))
    hidden = unet.conv_in(images)
    outputs = [hidden]
    for block in unet.down_blocks:
        hidden, of_block = block(hidden_states=hidden, temb=embedding)
        outputs += of_block
    outputs.append(unet.mid_block(hidden, embedding))
    return torch.cat([output.mean(dim=(2, 3)) for output in outputs], dim=1)


def check_readable(unet: UNet2DModel) -> None:
    """Raise a ValueError that names the setting unless `encode` calls this U-Net's modules as its own forward does."""
    skips = any(hasattr(block, "skip_conv") for block in unet.down_blocks)
    found = {
        "mid_block_type": (unet.mid_block is None, "a middle block, such as 'UNetMidBlock2D'"),
        "down_block_types": (skips, "blocks without skip convolutions, such as 'DownBlock2D' or 'AttnDownBlock2D'"),
        "center_input_sample": (unet.config["center_input_sample"], "False, since images are in [-1, 1]"),
    }
    for name, (wrong, expected) in found.items():
        if wrong:
            raise ValueError(
                f"`unet_config.{name}` is {unet.config[name]!r}, with which a U-Net cannot classify for `strategy` 'jdcl', expected "
                f"{expected}: change it, or take 'replay', whose classifier is another network."
            )


def build_head(num_features: int, num_classes: int, *, hidden: int, dropout: float) -> nn.Sequential:
    """Return a new head, from features `(batch, num_features)` to logits `(batch, num_classes)`.

    Source: two linear layers, LeakyReLU(0.2) and dropout between them [code].
    """
    return nn.Sequential(
        nn.Linear(num_features, hidden), nn.LeakyReLU(0.2), nn.Dropout(dropout), nn.Linear(hidden, num_classes)
    )


class JointNet(nn.Module):
    """A U-Net and a head on its encoder.

    Args:
        unet: predicts velocities.
        head: from `encode` to logits.
        joint: False: the head learns, but the U-Net does not learn from it.
    """

    def __init__(self, unet: UNet2DModel, head: nn.Module, *, joint: bool = True) -> None:
        super().__init__()
        self.unet, self.head, self.joint = unet, head, joint

    def classify(self, images: Tensor) -> Tensor:
        """Return logits `(batch, classes)`, float32, of images without noise, `(batch, channels, height, width)`."""
        features = encode(self.unet, images)
        return self.head(features if self.joint else features.detach()).float()

    def forward(self, noisy: Tensor, timestep: Tensor, rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return velocities of the shape of `noisy`, and logits `(batch, classes)`: in one call, which several processes can share.

        Args:
            noisy: `(batch, channels, height, width)`.
            timestep: `1000 * sigma`, `(batch,)`.
            rows: rows of the class embedding, `(batch,)`.
            images: the same images without noise.
        """
        # The U-Net first: its dropout is then the same as in a U-Net without a head.
        velocity = self.unet(noisy, timestep, rows, return_dict=False)[0]
        return velocity, self.classify(images)


class JointClassifier(nn.Module):
    """The classifier in a joint model, from images `(batch, channels, height, width)` in [-1, 1] to logits."""

    def __init__(self, net: JointNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net.classify(images)
