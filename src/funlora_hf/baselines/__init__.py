"""The paper's comparison methods that PEFT does not have; importing this package registers them with PEFT."""

from ..tuner_base.registration import register
from .conv_lora import ConvLoraConfig, ConvLoraConv2d, ConvLoraModel
from .scale_shift import ScaleShiftConfig, ScaleShiftConv2d, ScaleShiftModel


register("conv_lora", config_cls=ConvLoraConfig, model_cls=ConvLoraModel)
register("scale_shift", config_cls=ScaleShiftConfig, model_cls=ScaleShiftModel)

__all__ = [
    "ConvLoraConfig",
    "ConvLoraConv2d",
    "ConvLoraModel",
    "ScaleShiftConfig",
    "ScaleShiftConv2d",
    "ScaleShiftModel",
]
