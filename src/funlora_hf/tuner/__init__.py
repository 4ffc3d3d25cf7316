"""The PEFT method; importing it registers FunLoRA with PEFT."""

from ..tuners_utils.registration import extend_peft_type, register


extend_peft_type("FUNLORA")  # before config.py, which names the member

from ..tuners_utils.mixed_batch import mixed_batch  # noqa: E402
from ..tuners_utils.weights import cached_weights  # noqa: E402
from ..utils.tensors import numerical_rank  # noqa: E402
from .config import FunLoraConfig  # noqa: E402
from .functional import functional_matrix, initial_alpha  # noqa: E402
from .hotswap import hotswap_adapter  # noqa: E402
from .layer import (  # noqa: E402
    FunLoraClassVector,
    FunLoraConv2d,
    FunLoraLayer,
    FunLoraLinear,
    compile_functional_matrices,
)
from .model import FunLoraModel  # noqa: E402


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
]
