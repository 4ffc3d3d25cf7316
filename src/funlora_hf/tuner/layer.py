"""Layers that put FunLoRA adapters around a Conv2d, a Linear or a class embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import nn

from ..tuner_base.layer import AdapterLayer, AdapterParameters, BaseCall, blend
from .config import FunLoraConfig
from .functional import default_omega, expand, functional_matrix, initial_alpha, reduced_size


# From this many entries of a weight on, the plain product trains faster as `a * layer(b * x)` (benchmarks/training_step.py);
# in smaller layers neither form is always faster.
SMALLEST_SIZE = 128 * 128
_FACTORS = ("A", "B", "alpha", "omega")


class FunLoraLayer(AdapterLayer):
    """The common base of all FunLoRA layers."""

    def __repr__(self) -> str:
        return "funlora." + super().__repr__()


class FunLoraFactorLayer(FunLoraLayer):
    """A layer whose weight `(C_out, C_in, ...)` functional matrices change.

    Source: arXiv 2510.02631, the operations mul, add and mul-add [text]; several adapters at once (factors multiply, terms
    sum) are [ours].
    """

    funlora_A: AdapterParameters
    funlora_B: AdapterParameters
    compiled = False
    """Whether `torch.compile` compiles the kernels of F; see `compile_functional_matrices`."""

    adapter_layer_names = tuple(f"funlora_{part}{name}" for part in ("", "add_") for name in _FACTORS)

    def initial_parameters(self, config: FunLoraConfig) -> dict[str, torch.Tensor]:
        """Return A, B and, if the function has them, alpha and omega; for "mul-add" also a second set.

        They have the shapes of `functional_matrix` at the reduced size, in float32, or float64 for a float64 base.
        """
        first = self._initial_factors(config, "add" if config.operation == "add" else "mul")
        parameters = {f"funlora_{name}": value for name, value in first.items()}
        if config.operation == "mul-add":
            second = self._initial_factors(config, "add")
            parameters |= {f"funlora_add_{name}": value for name, value in second.items()}
        return parameters

    def functional_matrix(self, adapter_name: str, part: str = "") -> torch.Tensor:
        """Compute F of an adapter, or with `part="add_"` G of "mul-add": `(C_out, C_in, 1, ...)`, at least float32."""
        config = self.settings[adapter_name]
        factors = [getattr(self, f"funlora_{part}{name}")(adapter_name) for name in _FACTORS]
        compute = _compiled(functional_matrix) if self.compiled else functional_matrix
        return expand(compute(*factors, function=config.function), config.ratio, self.weight_shape)

    def adapted_weight(self, adapter_names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """Compute `weight * F`, `weight + F` or `weight * F + G` in at least float32, and return it in the dtype of `weight`.

        At scale s, F as a factor is 1 + s (F - 1), and a term is multiplied by s. Source: [ours].
        """
        # torch cannot compute in the one-byte types in which layerwise casting stores weights. A view, since hooks change the
        # weight's values or type before the backward pass needs it (layerwise casting, group offloading).
        adapted = weight.float() if weight.dtype.itemsize == 1 else weight.view_as(weight)
        operations = [(name, self.settings[name].operation) for name in adapter_names]
        # An adapter that was added to an offloaded layer is not on the device where the layer runs.
        for name, operation in operations:
            if operation != "add":
                adapted = adapted * blend(1.0, self.functional_matrix(name), self.scaling[name]).to(weight.device)
        for name, operation in operations:
            if operation != "mul":
                term = self.functional_matrix(name, "add_" if operation == "mul-add" else "")
                adapted = adapted + blend(0.0, term, self.scaling[name]).to(weight.device)
        return adapted.to(weight.dtype)

    def adapted_call(self, adapter_names: Sequence[str], call: BaseCall) -> torch.Tensor:
        """Compute a layer of weight `W * a b^T` as `a * layer(b * x)` if this trains faster; otherwise with that weight."""
        if len(adapter_names) != 1 or not self._separates(adapter_names[0]):
            return super().adapted_call(adapter_names, call)
        (name,) = adapter_names
        factors = zip((self.funlora_A, self.funlora_B), self.weight_shape[:2], strict=True)
        shape = (-1, *(1 for _ in self.weight_shape[2:]))
        ratio = self.settings[name].ratio
        # On the device of the weight, as in `adapted_weight`.
        a, b = (_widened(factor(name).to(call.weight.device), ratio, size).reshape(shape) for factor, size in factors)
        output = call.run((b * call.x).to(call.x.dtype), call.weight, None)
        adapted = a * output if call.rest[0] is None else a * output + call.rest[0].reshape(shape)
        return adapted.to(output.dtype)

    def _separates(self, name: str) -> bool:
        """Whether to train an adapter as `a * layer(b * x)`: only the plain product, which needs no weight gradient then."""
        config = self.settings[name]
        plain = (config.function, config.operation, config.r, self.scaling[name]) == ("identity", "mul", 1, 1)
        rows, columns = self.weight_shape[:2]
        # In a convolution with groups, an entry of b belongs to several channels.
        worth_it = rows * columns >= SMALLEST_SIZE and columns == self.in_features
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.tensors_of(name))
        return plain and worth_it and trains

    def _initial_factors(self, config: FunLoraConfig, operation: str) -> dict[str, torch.Tensor]:
        rows, columns = (reduced_size(size, config.ratio) for size in self.weight_shape[:2])
        A, B = torch.ones(rows, config.r), torch.full((config.r, columns), 1 / config.r)
        if config.function == "identity" and operation == "add":
            # Vanilla LoRA: one factor random, the other zero.
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B)
        factors = {"A": A, "B": B}
        alpha = initial_alpha(config.function, config.num_functions, operation)
        if alpha is not None:
            factors["alpha"] = alpha
        if config.learns_omega:
            factors["omega"] = default_omega(config.num_functions)
        if not config.init_weights:
            # Large enough to change an output visibly, small enough to keep the layer's scale, also in A B to the power 10.
            scale = {"A": 0.1, "B": 0.1 / config.r, "alpha": 0.1 if operation == "add" else 0.5, "omega": 0.0}
            factors = {name: value + scale[name] * torch.randn_like(value) for name, value in factors.items()}
        # Under PEFT's low_cpu_mem_usage the weight may be on the meta device, but its dtype is known.
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return {name: value.to(dtype) for name, value in factors.items()}


class FunLoraConv2d(FunLoraFactorLayer):
    """A Conv2d with FunLoRA adapters; supports any kernel, stride, padding mode, dilation and groups."""

    base_function = staticmethod(nn.functional.conv2d)


class FunLoraLinear(FunLoraFactorLayer):
    """A Linear with FunLoRA adapters."""

    base_function = staticmethod(nn.functional.linear)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return True, for PEFT's `convert_to_lora`, which calls `get_delta_weight` of Linear layers."""
        return True


class FunLoraClassVector(FunLoraLayer):
    """An Embedding whose output an adapter replaces by one vector, for every label.

    The vector starts at the mean of the base's rows. With several active adapters, the output is the mean of their vectors.
    After a merge, every row of the embedding is this vector, and labels are looked up again: they must be below the base's
    `num_embeddings`. The same applies at a scale s other than 1, where the output for a label is row + s (vector - row).

    Source: arXiv 2510.02631, the class-conditioning vector [text]; its start, average and scale are [ours].
    """

    funlora_class_vector: AdapterParameters
    adapter_layer_names = ("funlora_class_vector",)
    base_function = staticmethod(nn.functional.embedding)

    def initial_parameters(self, config: FunLoraConfig) -> dict[str, torch.Tensor]:
        """Return the vector, `(embedding_dim,)`, in float32, or float64 for a float64 base."""
        weight = self._base_weight().detach()
        vector = (weight if weight.dtype == torch.float64 else weight.float()).mean(dim=0)
        if not config.init_weights:
            vector = vector + 0.3 * torch.randn_like(vector)
        return {"funlora_class_vector": vector}

    def adapted_weight(self, adapter_names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """Return the vector in every row, `(num_embeddings, embedding_dim)`."""
        return self._replaced(adapter_names, weight).to(weight.dtype).expand_as(weight).clone()

    def adapted_call(self, adapter_names: Sequence[str], call: BaseCall) -> torch.Tensor:
        """Return the vectors, `(batch, embedding_dim)`, for class labels `(batch,)`, which are not read at scale 1."""
        whole = all(self.scaling[name] == 1 for name in adapter_names)
        rows = self._replaced(adapter_names, 0.0 if whole else call.run(call.x, call.weight))
        return rows.to(call.weight).expand(*call.x.shape, -1)

    def _replaced(self, adapter_names: Sequence[str], rows: torch.Tensor | float) -> torch.Tensor:
        """Return the vector `(embedding_dim,)`, or the vectors that replace `rows`, `(..., embedding_dim)`."""
        vectors = [blend(rows, self.funlora_class_vector(name), self.scaling[name]) for name in adapter_names]
        return vectors[0] if len(vectors) == 1 else torch.stack(torch.broadcast_tensors(*vectors)).mean(dim=0)


def compile_functional_matrices(model: nn.Module) -> None:
    """Compile the kernels of F with `torch.compile`, in all FunLoRA layers that a model has now.

    This is for GPUs and long runs: the first step takes tens of seconds and needs a C++ compiler (on a GPU Triton). Results
    differ by rounding.

    Args:
        model (`torch.nn.Module`): a model with FunLoRA layers in it.

    Source: [ours].
    """
    for layer in (module for module in model.modules() if isinstance(module, FunLoraFactorLayer)):
        layer.compiled = True


@cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compile a function once, for tensors of any size."""
    return torch.compile(function, dynamic=True)


def _widened(factor: torch.Tensor, ratio: int, size: int) -> torch.Tensor:
    """Repeat each entry of a factor for `ratio` neighbouring channels, `(size,)`."""
    return factor.flatten().repeat_interleave(min(ratio, size))[:size]
