"""Layers that put FunLoRA adapters around a Conv2d, a Linear or a class embedding.

Knows PEFT's layer protocol and the maths of `functional.py` and `kernels.py`; knows nothing of models, training or files.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from .adapter_layer import AdapterGroups, AdapterLayer, blend
from .config import FunLoraConfig
from .functional import default_omega, expand, initial_alpha, reduced_size
from .kernels import SMALLEST_SIZE, functional_matrix


# Up to this many channels in times channels out, one convolution in groups beats one for every adapter of a mixed batch: 1.3 to
# 2.5 times as fast, where kernels are larger than 1x1. Measured on a CPU; see benchmarks/mixed_forms.py.
LARGEST_GROUPED = 32 * 64


class FunLoraLayer(AdapterLayer):
    """What all FunLoRA layers are."""

    settings: dict[str, FunLoraConfig]

    def __repr__(self) -> str:
        return "funlora." + super().__repr__()


class FunLoraFactorLayer(FunLoraLayer):
    """A layer whose weight `(C_out, C_in, ...)` is changed by functional matrices.

    Source: arXiv 2510.02631, the operations mul, add and mul-add [text]; several adapters at once (factors multiply, terms sum) are [ours].
    """

    compiled = False
    """Whether F is computed by kernels that `torch.compile` makes; see `compile_functional_matrices`."""

    adapter_layer_names = (
        "funlora_A",
        "funlora_B",
        "funlora_alpha",
        "funlora_omega",
        "funlora_add_A",
        "funlora_add_B",
        "funlora_add_alpha",
        "funlora_add_omega",
    )

    def initial_parameters(self, config: FunLoraConfig) -> dict[str, torch.Tensor]:
        """A, B and, where the function has them, alpha and omega; for "mul-add" a second set. Shapes as in
        `functional_matrix`, at the reduced size; float32, or float64 for a float64 base."""
        first = self._initial_factors(config, "add" if config.operation == "add" else "mul")
        parameters = {f"funlora_{name}": value for name, value in first.items()}
        if config.operation == "mul-add":
            second = self._initial_factors(config, "add")
            parameters |= {f"funlora_add_{name}": value for name, value in second.items()}
        return parameters

    def functional_matrix(self, adapter_name: str, part: str = "") -> torch.Tensor:
        """F of an adapter, or with `part="add_"` the G of "mul-add", `(C_out, C_in, 1, ...)`, float32 at least."""
        config = self.settings[adapter_name]
        factors = [self._parameter(f"funlora_{part}{name}", adapter_name) for name in ("A", "B", "alpha", "omega")]
        F = functional_matrix(*factors, function=config.function, compiled=self.compiled)
        return expand(F, config.ratio, self.weight.shape)

    def adapted_weight(self, adapter_names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """`weight * F`, `weight + F` or `weight * F + G`, computed in float32 at least, in the dtype of `weight`.

        At scale s, F as a factor is 1 + s (F - 1), and a term is multiplied by s. Source: [ours].
        """
        factors, terms = [], []
        for name in adapter_names:
            operation, scale = self.settings[name].operation, self.scaling[name]
            if operation != "add":
                factors.append(blend(1.0, self.functional_matrix(name), scale))
            if operation != "mul":
                part = "add_" if operation == "mul-add" else ""
                terms.append(blend(0.0, self.functional_matrix(name, part), scale))
        adapted = weight
        for factor in factors:
            adapted = adapted * factor
        for term in terms:
            adapted = adapted + term
        return adapted.to(weight.dtype)

    @abstractmethod
    def weighted_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the base layer computes, with this weight and bias in place of its own."""

    def adapted_forward(self, adapter_names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        """x and the output as those of the base layer."""
        base = self.get_base_layer()
        factors = self._separate_factors(adapter_names)
        if factors is None:
            return self.weighted_forward(x, self.effective_weight(adapter_names), base.bias)
        a, b, bias = (self._along_channels(vector) for vector in (*factors, base.bias))
        output = self.weighted_forward((b * x).to(x.dtype), base.weight, None)
        adapted = a * output if bias is None else a * output + bias
        return adapted.to(output.dtype)

    def _separate_factors(self, adapter_names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """a, `(C_out,)`, and b, `(C_in,)`, if training takes `a * layer(b * x)` in place of a layer of weight `W * a b^T`.

        The two are equal for one adapter that is the plain product at r = 1. The former needs no gradient of the weight,
        which is faster from 128 x 128 entries on (benchmarks/training_step.py); in smaller layers neither is throughout.

        None otherwise, and without gradients, where the weight is computed once and kept.
        """
        if len(adapter_names) != 1 or not torch.is_grad_enabled():
            return None
        name = adapter_names[0]
        config = self.settings[name]
        A, B = (self._parameter(f"funlora_{factor}", name) for factor in "AB")
        plain = (config.function, config.operation, config.r, self.scaling[name]) == ("identity", "mul", 1, 1)
        rows, columns = self.weight.shape[:2]
        # In a convolution with groups, an entry of b belongs to several channels.
        worth_it = rows * columns >= SMALLEST_SIZE and columns == self.in_features
        if not (plain and worth_it and (A.requires_grad or B.requires_grad)):
            return None
        return _widened(A, config.ratio, rows), _widened(B, config.ratio, columns)

    def _along_channels(self, vector: torch.Tensor | None) -> torch.Tensor | None:
        """A vector of channels as it multiplies an input or output."""
        return None if vector is None else vector.reshape(-1, *(1 for _ in self.weight.shape[2:]))

    def _initial_factors(self, config: FunLoraConfig, operation: str) -> dict[str, torch.Tensor]:
        rows, columns = (reduced_size(size, config.ratio) for size in self.weight.shape[:2])
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
            # Large enough to be seen in an output, small enough to keep the layer's scale, also in A B to the power 10.
            scale = {"A": 0.1, "B": 0.1 / config.r, "alpha": 0.1 if operation == "add" else 0.5, "omega": 0.0}
            factors = {name: value + scale[name] * torch.randn_like(value) for name, value in factors.items()}
        # Under PEFT's low_cpu_mem_usage the weight may sit on the meta device, but its dtype is known.
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return {name: value.to(dtype) for name, value in factors.items()}

    def _parameter(self, name: str, adapter_name: str) -> torch.Tensor | None:
        return getattr(self, name).get(adapter_name)


class FunLoraConv2d(FunLoraFactorLayer):
    """A Conv2d with FunLoRA adapters; any kernel, stride, padding mode, dilation and groups."""

    def weighted_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x `(batch, C_in, height, width)` -> `(batch, C_out, height', width')`."""
        # The convolution's own method: it knows its stride, padding mode, dilation and groups.
        return self.get_base_layer()._conv_forward(x, weight, bias)

    def _forward_groups(self, groups: AdapterGroups, x: torch.Tensor) -> torch.Tensor:
        return (
            self._forward_in_groups(groups, x) if self._groups_pay(groups, x) else super()._forward_groups(groups, x)
        )

    def _groups_pay(self, groups: AdapterGroups, x: torch.Tensor) -> bool:
        """Whether one convolution in groups is faster: small layers, as many samples of each adapter."""
        base, (rows, columns, *kernel) = self.get_base_layer(), self.weight.shape
        small = rows * columns <= LARGEST_GROUPED and math.prod(kernel) > 1
        return small and base.groups == 1 and len(set(groups.sizes.values())) == 1 and x.device.type == "cpu"

    def _forward_in_groups(self, groups: AdapterGroups, x: torch.Tensor) -> torch.Tensor:
        """The adapters' images side by side as channels, `(batch / adapters, adapters * C_in, height, width)`, and back."""
        base, count = self.get_base_layer(), len(groups.sizes)
        side_by_side = groups.sort(x).unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
        padding = base.padding
        if base.padding_mode != "zeros":
            # As the convolution itself pads.
            side_by_side = nn.functional.pad(side_by_side, base._reversed_padding_repeated_twice, base.padding_mode)
            padding = 0
        weight = torch.cat([self.effective_weight([n]) if n in self.settings else base.weight for n in groups.sizes])
        bias = None if base.bias is None else base.bias.repeat(count)
        output = nn.functional.conv2d(side_by_side, weight, bias, base.stride, padding, base.dilation, count)
        return groups.unsort(output.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1))


class FunLoraLinear(FunLoraFactorLayer):
    """A Linear with FunLoRA adapters."""

    def weighted_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x `(..., C_in)` -> `(..., C_out)`."""
        return nn.functional.linear(x, weight, bias)


class FunLoraClassVector(FunLoraLayer):
    """An Embedding whose output an adapter replaces by its own vector, whatever the label.

    The vector starts at the mean of the base's rows. Vectors of several active adapters average. Merged, every row of
    the embedding is that vector, and labels are looked up again: they must be below the base's `num_embeddings`.
    The same holds at a scale s other than 1, where the output is row + s (vector - row), `row` being the label's.

    Source: arXiv 2510.02631, the class-conditioning vector [text]; its start, average and scale are [ours].
    """

    adapter_layer_names = ("funlora_class_vector",)

    def initial_parameters(self, config: FunLoraConfig) -> dict[str, torch.Tensor]:
        """The vector, `(embedding_dim,)`, float32, or float64 for a float64 base."""
        weight = self._original_weight().detach()
        vector = weight.to(torch.promote_types(weight.dtype, torch.float32)).mean(dim=0)
        if not config.init_weights:
            vector = vector + 0.3 * torch.randn_like(vector)
        return {"funlora_class_vector": vector}

    def adapted_weight(self, adapter_names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """The vector in every row, `(num_embeddings, embedding_dim)`."""
        return self._replaced(adapter_names, weight).to(weight.dtype).expand_as(weight).clone()

    def adapted_forward(self, adapter_names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        """x: class labels `(batch,)`, which are not read at scale 1 -> `(batch, embedding_dim)`."""
        whole = all(self.scaling[name] == 1 for name in adapter_names)
        rows = self._replaced(adapter_names, None if whole else self.base_layer(x))
        return rows.to(self.weight.dtype).expand(*x.shape, -1)

    def _replaced(self, adapter_names: Sequence[str], rows: torch.Tensor | None) -> torch.Tensor:
        """The vector `(embedding_dim,)`, or what takes the place of `rows`, `(..., embedding_dim)`."""
        vectors = [blend(rows, self.funlora_class_vector[name], self.scaling[name]) for name in adapter_names]
        return vectors[0] if len(vectors) == 1 else torch.stack(torch.broadcast_tensors(*vectors)).mean(dim=0)


def compile_functional_matrices(model: nn.Module) -> None:
    """
    Have F computed by kernels that `torch.compile` makes, in all FunLoRA layers that a model has now.

    It pays on a GPU, and in long runs: the first step takes tens of seconds, needs a C++ compiler (on a GPU Triton), and
    results differ from those without it by rounding. Layers of less than 128 x 128 entries stay as they are.

    Args:
        model (`torch.nn.Module`): with FunLoRA layers in it.

    Source: [ours].
    """
    for layer in (module for module in model.modules() if isinstance(module, FunLoraFactorLayer)):
        layer.compiled = True


def _widened(factor: torch.Tensor, ratio: int, size: int) -> torch.Tensor:
    """A factor's entries, each for `ratio` neighbouring channels, `(size,)`."""
    return factor.flatten().repeat_interleave(min(ratio, size))[:size]
