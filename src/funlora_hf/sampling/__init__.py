"""Sample images: pipeline, solvers, guidance, adapters by prompt, drawing in batches, merging a class into a plain U-Net."""

from .drawing import Samples, draw_samples, tensor_sha256, to_uint8


__all__ = ["Samples", "draw_samples", "tensor_sha256", "to_uint8"]
