"""FunLoRA for PEFT and diffusers: learn class after class, forget nothing. Importing it registers the method."""

from .adapter_bank import AdapterBank
from .adapter_loading import load_adapter
from .export import merge_class
from .fingerprint import BaseMismatchError, base_fingerprint, base_fingerprints
from .guidance import Guidance, expand_adapter_names
from .hub import delete_class_from_hub, push_adapter, push_all, push_base
from .layer_selection import conv_layers, layer_importance, parameters_per_class, select_layers
from .pipeline import FunLoraPipeline, FunLoraPipelineOutput
from .tuner import (
    FunLoraConfig,
    FunLoraModel,
    cached_weights,
    compile_functional_matrices,
    functional_matrix,
    hotswap_adapter,
    initial_alpha,
    mixed_batch,
    numerical_rank,
)
from .unlearning import delete_class


__version__ = "0.1.0.dev0"

__all__ = [
    "AdapterBank",
    "BaseMismatchError",
    "FunLoraConfig",
    "FunLoraModel",
    "FunLoraPipeline",
    "FunLoraPipelineOutput",
    "Guidance",
    "base_fingerprint",
    "base_fingerprints",
    "cached_weights",
    "compile_functional_matrices",
    "conv_layers",
    "delete_class",
    "delete_class_from_hub",
    "expand_adapter_names",
    "functional_matrix",
    "hotswap_adapter",
    "initial_alpha",
    "layer_importance",
    "load_adapter",
    "merge_class",
    "mixed_batch",
    "numerical_rank",
    "parameters_per_class",
    "push_adapter",
    "push_all",
    "push_base",
    "select_layers",
]
