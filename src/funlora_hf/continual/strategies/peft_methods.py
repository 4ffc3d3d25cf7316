"""The methods that `--peft_method` names, FunLoRA and the paper's comparison methods: make a config for a class's adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from functools import partial

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from peft import LoraConfig, PeftConfig

from ...baselines import ConvLoraConfig, ScaleShiftConfig
from ...layer_selection import is_preset, select_layers
from ...tuner import FunLoraConfig
from ...tuner.targets import decoder, decoder_middle
from ...utils.checks import check_choice
from ..config import ModelArguments


CLASS_EMBEDDING = "class_embedding"
# FunLoRA's class vector replaces the output of the embedding; other methods replace this row of the embedding.
VECTOR_ROW = 0

# Arguments that describe an adapter.
ADAPTER_ARGUMENTS = ("function", "num_functions", "train_omega", "operation", "rank", "ratio", "target_modules")
# Arguments that are rates of an adapter's parameters, by their kind.
RATES = {"alpha": "adapter_alpha_rate", "omega": "adapter_omega_rate", "class_vector": "adapter_vector_rate"}


@dataclass(frozen=True)
class PeftMethod:
    """
    Args:
        name: its name for `--peft_method`.
        make: (U-Net, model arguments, rank) -> configuration, including the class vector.
        default_rank: rank if the arguments give none.
        takes: the `ADAPTER_ARGUMENTS` that it uses; the others must have their defaults.
        prepare: changes a base in memory before it gets adapters; its outputs stay the same to the bit.
    """

    name: str
    make: Callable[[UNet2DModel, ModelArguments, int], PeftConfig]
    default_rank: int = 1
    takes: tuple[str, ...] = ()
    prepare: Callable[[UNet2DModel], None] = lambda unet: None

    def config(self, unet: UNet2DModel, model: ModelArguments) -> PeftConfig:
        """Make the configuration of an adapter for `unet`, which may be on the meta device.

        Raises:
            ValueError: an argument that this method does not use, or layers that the U-Net does not have.
        """
        check_unused(model, self.takes, f"`peft_method` {self.name!r}")
        return self.make(unet, model, self.default_rank if model.rank is None else model.rank)


def check_unused(model: ModelArguments, takes: Collection[str], user: str) -> None:
    """Raise a ValueError that names the first of `ADAPTER_ARGUMENTS` that is given but not in `takes`, those that `user` uses."""
    for one in fields(model):
        given = getattr(model, one.name)
        if one.name in ADAPTER_ARGUMENTS and one.name not in takes and given != one.default:
            raise ValueError(
                f"`{one.name}` is {given!r}, but {user} does not use it: leave it out, or take 'funlora'."
            )


def peft_method(name: str) -> PeftMethod:
    """Return the method of a name. Raises a ValueError that lists the known names."""
    check_choice("peft_method", name, tuple(PEFT_METHODS))
    return PEFT_METHODS[name]


def fuse_attention(unet: UNet2DModel) -> None:
    """Fuse query, key and value of every attention into one layer, `to_qkv`; outputs stay the same to the bit."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.fuse_projections()
            # Its annotation lists only some of the processors that it accepts.
            module.set_processor(FusedAttnProcessor2_0())  # type: ignore[arg-type]


def _funlora(unet: UNet2DModel, model: ModelArguments, rank: int, **fixed: object) -> PeftConfig:
    return model.funlora_config(r=rank, target_modules=chosen_targets(unet, model), **fixed)


def chosen_targets(unet: UNet2DModel, model: ModelArguments, default: str | None = None) -> list[str] | str | None:
    """Return `target_modules` for PEFT. A single entry is a preset, "all-conv", or a regex, which may be just a name."""
    targets: list[str] | str | None = model.target_modules
    if targets is not None and len(targets) == 1:
        targets = targets[0]
    targets = default if targets is None else targets
    return select_layers(unet, targets) if isinstance(targets, str) and is_preset(targets) else targets


def _class_vector(unet: UNet2DModel, model: ModelArguments, rank: int) -> PeftConfig:
    return FunLoraConfig(target_modules=[], class_embedding=CLASS_EMBEDDING)


def _scale_shift(unet: UNet2DModel, model: ModelArguments, rank: int) -> PeftConfig:
    targets = chosen_targets(unet, model, "decoder-middle")
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
    PeftMethod("funlora", _funlora, takes=ADAPTER_ARGUMENTS),
    PeftMethod("class_vector", _class_vector),
    PeftMethod(
        "vanilla_add", partial(_funlora, function="identity", operation="add"), takes=("rank", "target_modules")
    ),
    PeftMethod(
        "vanilla_mul", partial(_funlora, function="identity", operation="mul"), takes=("rank", "target_modules")
    ),
    PeftMethod("scale_shift", _scale_shift, takes=("target_modules",)),
    PeftMethod(
        "lora_attention",
        partial(_attention_lora, projections=["to_q", "to_k", "to_v"]),
        default_rank=2,
        takes=("rank",),
    ),
    PeftMethod(
        "lora_attention_fused",
        partial(_attention_lora, projections=["to_qkv"]),
        default_rank=2,
        takes=("rank",),
        prepare=fuse_attention,
    ),
    # The choice of blocks for these two is [ours]; their parameter counts on the paper's backbone match the paper [exact].
    PeftMethod(
        "lora_conv_v1",
        partial(_conv_lora, bottleneck="kernel", num_resnets=1, with_upsampler=False),
        takes=("rank",),
    ),
    PeftMethod(
        "lora_conv_v2",
        partial(_conv_lora, bottleneck="rank", num_resnets=2, with_upsampler=True),
        takes=("rank",),
    ),
)
PEFT_METHODS: dict[str, PeftMethod] = {method.name: method for method in _METHODS}
