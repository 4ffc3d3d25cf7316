"""Names that `--peft_method` takes: what a class's adapter is made of, FunLoRA or one of the paper's comparison methods.

Makes configurations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from peft import LoraConfig, PeftConfig

from ...baselines import ConvLoraConfig, ScaleShiftConfig
from ...layer_selection import resolve_targets
from ...tuner import FunLoraConfig
from ...tuner.targets import decoder, decoder_middle
from ..config import ModelArguments


CLASS_EMBEDDING = "class_embedding"
# FunLoRA's own vector replaces the embedding's output; other methods replace this row of the embedding.
VECTOR_ROW = 0

FUNLORA_ARGUMENTS = ("function", "num_functions", "train_omega", "operation", "ratio")


@dataclass(frozen=True)
class PeftMethod:
    """
    Args:
        name: that `--peft_method` takes.
        make: (U-Net, model arguments, rank) -> configuration, class vector included.
        default_rank: if the arguments name none.
        takes: which of the arguments that make up a functional matrix it heeds; others must keep their defaults.
        chooses_targets: the method is defined for certain layers, so `target_modules` must be None.
        prepare: changes a base in memory, its outputs unchanged to the bit, before adapters are put on it.
    """

    name: str
    make: Callable[[UNet2DModel, ModelArguments, int], PeftConfig]
    default_rank: int = 1
    takes: tuple[str, ...] = ()
    chooses_targets: bool = False
    prepare: Callable[[UNet2DModel], None] = lambda unet: None

    def config(self, unet: UNet2DModel, model: ModelArguments) -> PeftConfig:
        """The configuration of an adapter for `unet`, which may be on the meta device.

        Raises:
            ValueError: an argument that this method has no use for, or layers that the U-Net has not.
        """
        for field in fields(model):
            given, default = getattr(model, field.name), field.default
            if field.name in FUNLORA_ARGUMENTS and field.name not in self.takes and given != default:
                raise ValueError(
                    f"`{field.name}` is {given!r}, but `peft_method` {self.name!r} has no use for it: leave it "
                    "out, or take the method 'funlora'."
                )
        if self.chooses_targets and model.target_modules is not None:
            raise ValueError(
                f"`target_modules` is {model.target_modules!r}, but `peft_method` {self.name!r} says itself "
                "which layers it adapts: leave it out."
            )
        return self.make(unet, model, self.default_rank if model.rank is None else model.rank)


def peft_method(name: str) -> PeftMethod:
    """The method of a name. Raises a ValueError that lists the known ones."""
    if name not in PEFT_METHODS:
        raise ValueError(f"`peft_method` is {name!r}, expected one of: {', '.join(map(repr, PEFT_METHODS))}.")
    return PEFT_METHODS[name]


def fuse_attention(unet: UNet2DModel) -> None:
    """Make query, key and value of every attention one layer, `to_qkv`; outputs stay the same to the bit."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fuse_projections()
            module.set_processor(FusedAttnProcessor2_0())


def _funlora(unet: UNet2DModel, model: ModelArguments, rank: int, **fixed: object) -> PeftConfig:
    return model.funlora_config(r=rank, target_modules=resolve_targets(unet, _single(model.target_modules)), **fixed)


def _single(targets: list[str] | None) -> list[str] | str | None:
    # One entry may be a preset, a regex or "all-conv"; a module's name is a regex for itself.
    return targets[0] if targets is not None and len(targets) == 1 else targets


def _class_vector(unet: UNet2DModel, model: ModelArguments, rank: int) -> PeftConfig:
    return FunLoraConfig(target_modules=[], class_embedding=CLASS_EMBEDDING)


def _scale_shift(unet: UNet2DModel, model: ModelArguments, rank: int) -> PeftConfig:
    targets = resolve_targets(unet, _single(model.target_modules) or "decoder-middle")
    return ScaleShiftConfig(target_modules=targets, trainable_token_indices=_vector_row())


def _conv_lora(
    unet: UNet2DModel, model: ModelArguments, rank: int, *, bottleneck: str, num_resnets: int, with_upsampler: bool
) -> PeftConfig:
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in decoder_middle(unet) if ".resnets." in name))
    prefixes = [f"{block}." for block in blocks[:num_resnets]]
    if with_upsampler:
        prefixes += [f"{block.partition('.resnets.')[0]}.upsamplers." for block in blocks[:num_resnets]]
    return ConvLoraConfig(
        r=rank,
        lora_alpha=rank,
        bottleneck=bottleneck,
        target_modules=[name for name in decoder(unet) if name.startswith(tuple(prefixes))],
        trainable_token_indices=_vector_row(),
    )


def _attention_lora(unet: UNet2DModel, model: ModelArguments, rank: int, *, projections: list[str]) -> PeftConfig:
    if not any(isinstance(module, Attention) for module in unet.modules()):
        raise ValueError(
            f"`peft_method` {model.peft_method!r} adapts attention, and the U-Net has none: choose another method, or a "
            "U-Net with attention blocks."
        )
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=[*projections, "to_out.0"], trainable_token_indices=_vector_row()
    )


def _vector_row() -> dict[str, list[int]]:
    return {CLASS_EMBEDDING: [VECTOR_ROW]}


_METHODS = (
    PeftMethod("funlora", _funlora, takes=FUNLORA_ARGUMENTS),
    PeftMethod("class_vector", _class_vector, chooses_targets=True),
    PeftMethod("vanilla_add", partial(_funlora, function="identity", operation="add")),
    PeftMethod("vanilla_mul", partial(_funlora, function="identity", operation="mul")),
    PeftMethod("scale_shift", _scale_shift),
    PeftMethod(
        "lora_attention",
        partial(_attention_lora, projections=["to_q", "to_k", "to_v"]),
        default_rank=2,
        chooses_targets=True,
    ),
    PeftMethod(
        "lora_attention_fused",
        partial(_attention_lora, projections=["to_qkv"]),
        default_rank=2,
        chooses_targets=True,
        prepare=fuse_attention,
    ),
    # Which blocks these two take is [ours]; the counts on the paper's backbone are its own [exact].
    PeftMethod(
        "lora_conv_v1",
        partial(_conv_lora, bottleneck="kernel", num_resnets=1, with_upsampler=False),
        chooses_targets=True,
    ),
    PeftMethod(
        "lora_conv_v2",
        partial(_conv_lora, bottleneck="rank", num_resnets=2, with_upsampler=True),
        chooses_targets=True,
    ),
)
PEFT_METHODS: dict[str, PeftMethod] = {method.name: method for method in _METHODS}
