"""Layers that put FunLoRA adapters around a Conv2d, a Linear or a class embedding.

Knows PEFT's layer protocol and the maths of `functional.py`; knows nothing of models, training or files.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from .config import FunLoraConfig
from .functional import default_omega, expand, functional_matrix, initial_alpha, reduced_size


BASE = "__base__"


class AdapterGroups:
    """A mixed batch, sorted by adapter once for all layers of a forward.

    Args:
        names: adapter of every sample, `"__base__"` for none.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        by_name: dict[str, list[int]] = {}
        for index, name in enumerate(self.names):
            by_name.setdefault(name, []).append(index)
        self.sizes = {name: len(indices) for name, indices in by_name.items()}
        self.order = torch.tensor([index for indices in by_name.values() for index in indices], dtype=torch.long)
        self.inverse = torch.argsort(self.order)

    def split(self, x: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """The samples of `x`, `(batch, ...)`, as one part for every adapter."""
        parts = x[self.order.to(x.device)].split(list(self.sizes.values()))
        return list(zip(self.sizes, parts, strict=True))

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`: `(batch, ...)` in the order of `names`."""
        joined = torch.cat(list(parts))
        return joined[self.inverse.to(joined.device)]


class FunLoraLayer(nn.Module, BaseTunerLayer):
    """What all FunLoRA layers share: which adapter acts, mixed batches, merging exact to the bit.

    A subclass says how adapters change the base's weight and what the layer computes with them.
    """

    other_param_names = ("settings",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: FunLoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.settings: dict[str, FunLoraConfig] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # Merging multiplies, so it cannot be undone by arithmetic: the weight itself is kept. Not part of state_dict.
        self.register_buffer("_weight_before_merge", None, persistent=False)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: FunLoraConfig) -> None:
        """Add (or start anew) the parameters of an adapter, on the device of the base's weight."""
        self.settings[adapter_name] = config
        for name in self.adapter_layer_names:
            if adapter_name in getattr(self, name):
                del getattr(self, name)[adapter_name]
        for name, value in self.initial_parameters(config).items():
            getattr(self, name)[adapter_name] = nn.Parameter(value)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @abstractmethod
    def initial_parameters(self, config: FunLoraConfig) -> dict[str, torch.Tensor]:
        """The tensors of a new adapter, by the name of their dictionary."""

    @abstractmethod
    def adapted_weight(self, adapter_names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """The base's `weight` as the adapters change it together."""

    @abstractmethod
    def adapted_forward(
        self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The layer's output with these adapters acting on all of `x`."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Adapted minus original weight, in the weight's own shape."""
        weight = self._original_weight()
        return self.adapted_weight([adapter], weight) - weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """
        Merge the active adapters into the base's weight.

        Args:
            safe_merge (`bool`, *optional*):
                Refuse, and change nothing, if the merged weight is not finite.
            adapter_names (`list[str]`, *optional*):
                The adapters to merge; None means the active ones.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.settings]
        if not adapter_names:
            return
        original = self._original_weight()
        together = [*self.merged_adapters, *adapter_names]
        with torch.no_grad():
            merged = self.adapted_weight(together, original)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {','.join(adapter_names)} seems to be broken"
            )
        if self._weight_before_merge is None:
            self._weight_before_merge = original.clone()
        self.weight.data = merged
        self.merged_adapters = together

    def unmerge(self) -> None:
        """Put the base's weight back as it was before the merge, to the bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.weight.data = self._weight_before_merge.to(device=self.weight.device, dtype=self.weight.dtype)
        self._weight_before_merge = None
        self.merged_adapters = []

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: AdapterGroups | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_forward(adapter_names, x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._forward_with(self.active_adapters, x, *args, **kwargs)

    def _forward_with(self, adapter_names: Sequence[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        present = [name for name in adapter_names if name in self.settings]
        if not present:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted_forward(present, x, *args, **kwargs)

    def _mixed_forward(self, groups: AdapterGroups, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(x) != len(groups.names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(groups.names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(groups.sizes) == 1:
            return self._forward_with(list(groups.sizes), x, *args, **kwargs)
        return groups.join([self._forward_with([name], part, *args, **kwargs) for name, part in groups.split(x)])

    def _original_weight(self) -> torch.Tensor:
        return self.weight.data if self._weight_before_merge is None else self._weight_before_merge

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Unlike PEFT's, this leaves the dtype alone: rounded to bfloat16, alpha would no longer start as the identity.
        device = self.weight.device if device is None else device
        if device.type == "meta":
            return
        for name in self.adapter_layer_names:
            parameters = getattr(self, name)
            if adapter_name in parameters and parameters[adapter_name].device.type != "meta":
                parameters[adapter_name] = parameters[adapter_name].to(device)

    def __repr__(self) -> str:
        return "funlora." + super().__repr__()


class FunLoraFactorLayer(FunLoraLayer):
    """A layer whose weight `(C_out, C_in, ...)` is changed by functional matrices.

    Source: arXiv 2510.02631, the operations mul, add and mul-add [text]; several adapters at once (factors multiply, terms sum) are [ours].
    """

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
        return expand(functional_matrix(*factors, function=config.function), config.ratio, self.weight.shape)

    def adapted_weight(self, adapter_names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """`weight * F` , `weight + F` or `weight * F + G`, computed in float32 at least, in the dtype of `weight`."""
        factors, terms = [], []
        for name in adapter_names:
            operation = self.settings[name].operation
            (terms if operation == "add" else factors).append(self.functional_matrix(name))
            if operation == "mul-add":
                terms.append(self.functional_matrix(name, "add_"))
        adapted = weight
        for factor in factors:
            adapted = adapted * factor
        for term in terms:
            adapted = adapted + term
        return adapted.to(weight.dtype)

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
            # Large enough to be seen in an output, small enough to keep the layer's scale: F is near 1, G near 0.
            scale = {"A": 0.3, "B": 0.3 / config.r, "alpha": 0.5, "omega": 0.0}
            size = 0.1 if operation == "add" else 1.0
            factors = {name: value + size * scale[name] * torch.randn_like(value) for name, value in factors.items()}
        # Under PEFT's low_cpu_mem_usage the weight may sit on the meta device, but its dtype is known.
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return {name: value.to(dtype) for name, value in factors.items()}

    def _parameter(self, name: str, adapter_name: str) -> torch.Tensor | None:
        return getattr(self, name).get(adapter_name)


class FunLoraConv2d(FunLoraFactorLayer):
    """A Conv2d with FunLoRA adapters; any kernel, stride, padding mode, dilation and groups."""

    def adapted_forward(self, adapter_names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        """x `(batch, C_in, height, width)` -> `(batch, C_out, height', width')`."""
        base = self.get_base_layer()
        # The convolution's own method: it knows its stride, padding mode, dilation and groups.
        return base._conv_forward(x, self.adapted_weight(adapter_names, base.weight), base.bias)


class FunLoraLinear(FunLoraFactorLayer):
    """A Linear with FunLoRA adapters."""

    def adapted_forward(self, adapter_names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        """x `(..., C_in)` -> `(..., C_out)`."""
        base = self.get_base_layer()
        return nn.functional.linear(x, self.adapted_weight(adapter_names, base.weight), base.bias)


class FunLoraClassVector(FunLoraLayer):
    """An Embedding whose output an adapter replaces by its own vector, whatever the label.

    The vector starts at the mean of the base's rows. Vectors of several active adapters average. Merged, every row of
    the embedding is that vector, and labels are looked up again: they must be below the base's `num_embeddings`.

    Source: arXiv 2510.02631, the class-conditioning vector [text]; its start and the average are [ours].
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
        return self._vector(adapter_names).to(weight.dtype).expand_as(weight).clone()

    def adapted_forward(self, adapter_names: Sequence[str], x: torch.Tensor) -> torch.Tensor:
        """x: class labels `(batch,)`, which are not read -> `(batch, embedding_dim)`."""
        return self._vector(adapter_names).to(self.weight.dtype).expand(*x.shape, -1)

    def _vector(self, adapter_names: Sequence[str]) -> torch.Tensor:
        vectors = [self.funlora_class_vector[name] for name in adapter_names]
        return vectors[0] if len(vectors) == 1 else torch.stack(vectors).mean(dim=0)
