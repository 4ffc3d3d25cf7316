from __future__ import annotations

import re

import pytest
from diffusers import UNet2DModel

from funlora_hf.continual.base import find_base


def test_a_base_without_a_class_embedding_is_named(tiny_pipe, tmp_path):
    tiny_pipe.save_pretrained(tmp_path)
    UNet2DModel.from_config(tiny_pipe.unet.config, num_class_embeds=None).save_pretrained(tmp_path / "unet")
    text = f"`base_model` '{tmp_path}' has a U-Net without a class embedding"
    with pytest.raises(ValueError, match=re.escape(text)):
        find_base(str(tmp_path))
