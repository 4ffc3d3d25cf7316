"""The PEFT method; importing it registers FunLoRA with PEFT."""

from ..tuner_base.block_weights import set_block_weights
from ..tuner_base.mixed_batch import mixed_batch
from ..tuner_base.registration import register
from ..tuner_base.weights import cached_weights
from ..utils.tensors import numerical_rank
from .config import FunLoraConfig
from .functional import functional_matrix, initial_alpha
from .hotswap import hotswap_adapter
from .layer import FunLoraClassVector, FunLoraConv2d, FunLoraLayer, FunLoraLinear, compile_functional_matrices
from .learning_rates import parameter_groups
from .model import FunLoraModel


register("funlora", config_cls=FunLoraConfig, model_cls=FunLoraModel)

__all__ = [
    "FunLoraClassVector",
    "FunLoraConfig",
    "FunLoraConv2d",
    "FunLoraLayer",
    "FunLoraLinear",
    "FunLoraModel",
    "cached_weights",
    "compile_functional_matrices",
    "functional_matrix",
    "hotswap_adapter",
    "initial_alpha",
    "mixed_batch",
    "numerical_rank",
    "parameter_groups",
    "set_block_weights",
]
