"""FunLoRA for PEFT and diffusers: learn class after class, forget nothing. Importing it registers the method."""

from .adapter_bank import AdapterBank
from .export import merge_class
from .layer_selection import conv_layers, layer_importance, parameters_per_class, select_layers
from .pipeline import FunLoraPipeline, FunLoraPipelineOutput
from .tuner import (
    FunLoraConfig,
    FunLoraModel,
    compile_functional_matrices,
    functional_matrix,
    hotswap_adapter,
    initial_alpha,
    mixed_batch,
    numerical_rank,
)


__version__ = "0.1.0.dev0"

__all__ = [
    "AdapterBank",
    "FunLoraConfig",
    "FunLoraModel",
    "FunLoraPipeline",
    "FunLoraPipelineOutput",
    "compile_functional_matrices",
    "conv_layers",
    "functional_matrix",
    "hotswap_adapter",
    "initial_alpha",
    "layer_importance",
    "merge_class",
    "mixed_batch",
    "numerical_rank",
    "parameters_per_class",
    "select_layers",
]
