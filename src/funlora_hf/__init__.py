"""FunLoRA for PEFT and diffusers: learn class after class, forget nothing. Importing it registers the method."""

from .pipeline import FunLoraPipeline, FunLoraPipelineOutput
from .tuner import FunLoraConfig, FunLoraModel, functional_matrix, initial_alpha, mixed_batch


__version__ = "0.1.0.dev0"

__all__ = [
    "FunLoraConfig",
    "FunLoraModel",
    "FunLoraPipeline",
    "FunLoraPipelineOutput",
    "functional_matrix",
    "initial_alpha",
    "mixed_batch",
]
