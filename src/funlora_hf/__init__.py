"""FunLoRA for PEFT and diffusers: learn class after class, forget nothing. Importing it registers the method."""

from .adapters.bank import AdapterBank
from .adapters.base_fingerprint import BaseMismatchError, base_fingerprint, base_fingerprints
from .adapters.class_folder import save_adapter
from .adapters.mean_start import start_from
from .adapters.put_into_model import load_adapter
from .hub.delete import delete_class, delete_class_from_hub
from .hub.push import push_adapter, push_all, push_base
from .layer_selection import conv_layers, layer_importance, parameters_per_class, select_layers
from .sampling.guidance import Guidance
from .sampling.merging import merge_class
from .sampling.mixed_prompts import expand_adapter_names, mixed_prompts
from .sampling.pipeline import FunLoraPipeline, FunLoraPipelineOutput
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
    parameter_groups,
    set_block_weights,
)


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
    "mixed_prompts",
    "numerical_rank",
    "parameter_groups",
    "parameters_per_class",
    "push_adapter",
    "push_all",
    "push_base",
    "save_adapter",
    "select_layers",
    "set_block_weights",
    "start_from",
]
