"""Base classes of layers with adapters: which adapters act and how strongly, mixed batches, exact merging."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from torch.overrides import TorchFunctionMode

from ..utils.tensors import check_before_loading
from .offloading import group_hook, group_of, keep_in_memory, read_from
from .places import around
from .weights import cached, forget
from .wrappers import evaluation_mode, has_class


BASE = "__base__"


class AdapterGroups:
    """The adapters of a batch's samples; the batch is sorted by adapter once for all layers of a forward.

    Args:
        names: adapter of each sample; `"__base__"`: no adapter. A batch that is sorted already is only split.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.sizes = dict(Counter(self.names))  # in the order of first occurrence
        groups = list(self.sizes)
        order = torch.tensor([groups.index(name) for name in self.names], dtype=torch.long).argsort(stable=True)
        self._is_sorted = order.tolist() == list(range(len(order)))
        self._orders = {order.device: (order, order.argsort())}

    def map(self, run: Callable[[str, torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Call `run(name, part)` for the samples of each adapter; return the outputs in the order of `x`, `(batch, ...)`."""
        if len(self.sizes) == 1:
            return run(self.names[0], x)
        if x.device not in self._orders:
            order, back = next(iter(self._orders.values()))
            self._orders[x.device] = order.to(x.device), back.to(x.device)
        order, back = self._orders[x.device]
        parts = (x if self._is_sorted else x[order]).split(list(self.sizes.values()))
        output = torch.cat([run(name, part) for name, part in zip(self.sizes, parts, strict=True)])
        return output if self._is_sorted else output[back]


class AdapterParameters(nn.ParameterDict):
    """One parameter of a layer for each adapter. Layers call it, so that hooks that move its parameters run (offloading)."""

    _diffusers_hook: Any

    def __call__(self, adapter_name: str) -> Any:
        kept = self.get(adapter_name)
        value = nn.Module.__call__(self, adapter_name)  # a ParameterDict refuses to be called
        if kept is not None and kept.is_meta and value.requires_grad:
            value.register_hook(_refuse_gradient)
        return value

    def forward(self, adapter_name: str) -> torch.Tensor | None:
        parameter = self.get(adapter_name)
        # A view, since a hook may change the parameter's values as soon as it is returned (group offloading).
        return None if parameter is None else parameter.view_as(parameter)

    def stop_offloading(self) -> None:
        """Keep the parameters on their device from now on: writes to offloaded ones are lost."""
        if hasattr(self, "_hf_hook"):
            remove_hook_from_module(self)
        hook = group_hook(self)
        if hook is not None:
            hook.group.onload_()
            self._diffusers_hook.remove_hook("group_offloading", recurse=False)


def _refuse_gradient(gradient: torch.Tensor) -> None:
    raise RuntimeError(
        "The adapter is offloaded, and its gradient would be lost. Add the adapter after the model is offloaded, or train "
        "without offloading."
    )


def _refuse_gradient_on_disk(gradient: torch.Tensor) -> None:
    raise RuntimeError(
        "The base is offloaded to disk, and diffusers puts other values into its weights before the backward pass needs them. "
        "Train without `offload_to_disk_path`."
    )


class InsteadOf(TorchFunctionMode):
    """While a base layer runs, replace the torch function that computes it by `replacement(*args)`.

    The base layer is still called as a module, so the hooks and parametrizations that provide its weight run: offloading,
    casting, sharding, weight_norm. Inside the replacement, torch functions are not replaced.
    """

    def __init__(self, function: Callable[..., torch.Tensor], replacement: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._function, self._replacement = function, replacement

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return (self._replacement if func is self._function else func)(*args, **(kwargs or {}))


class BaseCall(NamedTuple):
    """The computation of a base layer: `function(x, weight, *rest, **kwargs)`; `rest[0]` is the bias of a convolution or Linear.

    `is_own_weight` says whether the weight is the base's parameter, not computed or loaded by a hook for this call.
    """

    function: Callable[..., torch.Tensor]
    x: torch.Tensor
    weight: torch.Tensor
    rest: tuple
    kwargs: dict[str, Any]
    is_own_weight: bool

    def run(self, x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Call the function with these first arguments instead of its original ones."""
        return self.function(x, weight, *rest, *self.rest[len(rest) :], **self.kwargs)


def blend(identity: torch.Tensor | float, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute `identity + scale * (value - identity)`; at scale 1, return exactly `value` and do not read `identity`."""
    return value if scale == 1 else identity + scale * (value - identity)


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A module around a base layer that calls a torch function, `base_function(x, weight, ...)`; adapters change this call.

    Each adapter acts at its `scaling`: 0 is the base, 1 the adapter as trained (see `blend`).
    """

    other_param_names = ("settings", "scaling", "r")
    base_function: ClassVar[Callable[..., torch.Tensor]] = staticmethod(nn.functional.conv2d)
    in_features: int | None
    out_features: int | None
    weight_shape: torch.Size

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        # Stored, since a parametrized layer computes its weight at each access.
        self.weight_shape = self.weight.shape
        self.settings: dict[str, Any] = {}
        self.scaling: dict[str, float] = {}
        self.r: dict[str, int] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, AdapterParameters())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.path = ""  # name in the model
        self.shared_with: list[str] = []  # names of other modules that have the base's weight
        self._shapes: dict[str, torch.Size] = {}
        # The base's original parameter while adapters are merged; in a list, since the module would register it otherwise.
        self._parameter_before_merge: list[nn.Parameter] = []
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    # Parameters that are created in inference mode could not be changed or trained outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add the parameters of an adapter, or reset them, on the device of the base's weight."""
        forget(self)
        self.stop_offloading_adapters()
        initial = self.initial_parameters(config)
        self.settings[adapter_name], self.scaling[adapter_name] = config, 1.0
        self.r[adapter_name] = getattr(config, "r", 1)
        for name, parameters in self._dictionaries().items():
            if name in initial:
                parameters[adapter_name] = nn.Parameter(initial[name])
                self._shapes[f"{name}.{adapter_name}"] = initial[name].shape
            elif adapter_name in parameters:
                del parameters[adapter_name]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def stop_offloading_adapters(self) -> None:
        """Keep the parameters of adapters on their device from now on; the base stays offloaded."""
        for parameters in self._dictionaries().values():
            parameters.stop_offloading()
        if self._is_on_disk():
            keep_in_memory(self._group(), self.adapter_tensors().values())

    @abstractmethod
    def initial_parameters(self, config: Any) -> dict[str, torch.Tensor]:
        """Return the tensors of a new adapter, by the name of their dictionary."""

    @abstractmethod
    def adapted_weight(self, adapter_names: Sequence[str], weight: torch.Tensor) -> torch.Tensor:
        """Return the base's `weight` with the changes of all these adapters, in its dtype."""

    def adapted_call(self, adapter_names: Sequence[str], call: BaseCall) -> torch.Tensor:
        """Return the output of `call` with these adapters on all of its input."""
        return call.run(call.x, self.effective_weight(adapter_names, call))

    def effective_weight(self, adapter_names: Sequence[str], call: BaseCall) -> torch.Tensor:
        """Return `adapted_weight`, computed once inside `cached_weights`. Do not change it in place."""
        tensors = [call.weight, *(p for name in adapter_names for p in self.tensors_of(name))]
        # With reentrant checkpoints, the forward pass of training runs without gradients.
        may_train = torch.is_grad_enabled() or self.get_base_layer().training
        if not call.is_own_weight or (may_train and any(tensor.requires_grad for tensor in tensors)):
            return self.adapted_weight(adapter_names, call.weight)
        return cached(self, tuple(adapter_names), tensors, lambda: self.adapted_weight(adapter_names, call.weight))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set how strongly an adapter acts: 0 is the base, 1 the adapter as trained. Not saved with the adapter.

        The weight with this adapter alone is `base + scale * (adapted - base)`; a merged weight is updated. A layer without the
        adapter ignores the call. Raises a ValueError for a scale that is not finite. Source: [ours]; PEFT's LoRA layers have the
        same method.
        """
        if adapter not in self.scaling:
            return
        if not math.isfinite(scale):
            raise ValueError(f"`scale` is {scale}, expected a finite number.")
        forget(self)
        merged = self.merged_adapters if adapter in self.merged_adapters else []
        if merged:
            self.unmerge()
        self.scaling[adapter] = scale
        if merged:
            self.merge(adapter_names=merged)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of every active adapter by `scale`."""
        for name in self.active_adapters:
            self.set_scale(name, self.scaling.get(name, 1.0) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scale of every active adapter by `scale`; None sets it back to 1."""
        for name in self.active_adapters:
            self.set_scale(name, 1.0 if scale is None else self.scaling.get(name, 1.0) / scale)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return effective minus base weight at the adapter's scale, in the weight's shape and dtype; differentiable."""
        self._check_whole()
        if self._is_on_disk():
            self.stop_offloading_adapters()
        weight = self._base_weight()
        return self.adapted_weight([adapter], weight) - weight

    @torch.inference_mode(False)
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base's weight. Until `unmerge`, the base has a new parameter.

        Args:
            safe_merge (`bool`, *optional*): whether to refuse, and change nothing, if the merged weight is not finite.
            adapter_names (`list[str]`, *optional*): the adapters to merge; None: the active ones.

        Raises:
            ValueError: a weight that is not finite, is computed from other tensors (such as by weight_norm), or is offloaded.
            RuntimeError: an adapter of another method around this layer is already merged.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.settings]
        if not adapter_names:
            return
        self._check_not_fused_around()
        base = self.get_base_layer()
        self._check_whole()
        parameter = self._own_weight(base)
        together = [*self.merged_adapters, *adapter_names]
        with torch.no_grad():
            weight = self._base_weight().detach().to(parameter.device)
            merged = self.adapted_weight(together, weight).to(parameter.dtype)
        if safe_merge and not torch.isfinite(merged.float()).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {','.join(adapter_names)} seems to be broken"
            )
        forget(self)
        if not self.merged:
            self._parameter_before_merge = [parameter]
            if self.shared_with:
                warnings.warn(
                    f"The weight of {self.path or base} is shared with {', '.join(self.shared_with)}. After the merge, this layer has a "
                    "separate weight; the others keep the shared one.",
                    stacklevel=2,
                )
            else:
                parameter.data = parameter.data.to("cpu")
        # Not in place: other modules may share the parameter.
        base.weight = nn.Parameter(merged, requires_grad=parameter.requires_grad)
        self.merged_adapters = together

    @torch.inference_mode(False)
    def unmerge(self) -> None:
        """Restore the base's original parameter, with exactly the values from before the merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        forget(self)
        parameter, merged = self._parameter_before_merge.pop(), self.weight
        parameter.data = parameter.data.to(merged)
        self.get_base_layer().weight = parameter.requires_grad_(merged.requires_grad)
        self.merged_adapters = []

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from the layer, as PEFT does, after `check_deletes`."""
        self.check_deletes(adapter_name)
        self.drop_adapter(adapter_name)

    def check_deletes(self, adapter_name: str) -> None:
        """Raise a ValueError if diffusers has offloaded the base to disk: its `delete_adapters` would lose weights."""
        if adapter_name in self.settings and self._is_on_disk():
            raise ValueError(
                f"Cannot delete the adapter {adapter_name!r} of {self.path or self.base_layer}: its weight is offloaded to disk. Disable "
                "the adapter instead, or delete it before you offload the model."
            )

    def drop_adapter(self, adapter_name: str) -> None:
        """Delete an adapter from the layer, also if the base is offloaded."""
        forget(self)
        super().delete_adapter(adapter_name)

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: AdapterGroups | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.settings]
        if self.disable_adapters or (adapter_names is None and (self.merged or not active)):
            return self.base_layer(x, *args, **kwargs)
        if not torch.compiler.is_compiling():
            self._check_not_fused_around()
        if adapter_names is not None and len(x) != len(adapter_names.names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names.names)} and {len(x)} respectively."
            )
        if adapter_names is not None and self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        own_weight = self.get_base_layer()._parameters.get("weight")
        calls: list[None] = []

        def run(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
            if weight.shape != self.weight_shape:
                return self.base_function(x, weight, *rest, **kwargs)  # a hook or a parametrization calls it
            calls.append(None)
            call = BaseCall(self.base_function, x, weight, rest, kwargs, is_own_weight=weight is own_weight)
            if adapter_names is None:
                return self.adapted_call(active, call)

            def run_one(name: str, part: torch.Tensor) -> torch.Tensor:
                known = name in self.settings
                return self.adapted_call([name], call._replace(x=part)) if known else call.run(part, weight)

            return adapter_names.map(run_one, x)

        with InsteadOf(self.base_function, run):
            output = self.base_layer(x, *args, **kwargs)
        if not torch.compiler.is_compiling() and output.requires_grad and self._is_on_disk():
            output.register_hook(_refuse_gradient_on_disk)
        if len(calls) != 1:
            raise RuntimeError(
                f"{self.path or self.base_layer} called {self.base_function.__name__} with a weight of its shape {len(calls)} times, "
                "expected once: an adapter cannot act in it. Target other modules."
            )
        return output

    def adapter_tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Return the parameters of all adapters, by `prefix` and their key in the layer's `state_dict`."""
        return {
            f"{prefix}{part}.{name}": parameter
            for part, parameters in self._dictionaries().items()
            for name, parameter in parameters.items()
        }

    def tensors_of(self, adapter_name: str) -> list[torch.Tensor]:
        """Return the parameters of one adapter."""
        return [entries[adapter_name] for entries in self._dictionaries().values() if adapter_name in entries]

    def _dictionaries(self) -> dict[str, AdapterParameters]:
        return {name: getattr(self, name) for name in self.adapter_layer_names}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The tuner checks all layers before it loads any; this check is for a model without a tuner around it.
        own = (key for key in state_dict if key.startswith(prefix))
        adapters = [key for key in own if key.removeprefix(prefix).partition(".")[0] in self.adapter_layer_names]
        check_before_loading(self.adapter_tensors(prefix), {key: state_dict[key] for key in adapters})
        forget(self)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _base_weight(self) -> torch.Tensor:
        """Return the weight that the base uses now, without merged adapters."""
        if self.merged:
            return self._parameter_before_merge[0]
        base = self.get_base_layer()
        found: list[torch.Tensor] = []
        parameter = base._parameters.get("weight")
        if parameter is not None and self._is_on_disk() and group_hook(base) is None:
            return read_from(self._group(), parameter)
        # accelerate, FSDP and diffusers load, unshard or cast a weight only during a call.
        hooked = base._forward_pre_hooks or hasattr(base, "_diffusers_hook")
        if parameter is not None and not parameter.is_meta and not hooked:
            return parameter

        def keep(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
            if weight.shape != self.weight_shape:
                return self.base_function(x, weight, *rest, **kwargs)
            found.append(weight.clone())  # its memory is freed after the call
            return x

        unpadded = InsteadOf(nn.functional.pad, lambda x, *rest, **kwargs: x)
        # In training mode, spectral_norm would change its buffers.
        with evaluation_mode(base), unpadded, InsteadOf(self.base_function, keep):
            base(torch.empty(0))
        return found[0]

    def _check_whole(self) -> None:
        """Raise a ValueError if a layer has only parts of parameters, as under FSDP outside of a forward."""
        base = self.get_base_layer()
        weight = base._parameters.get("weight")
        shapes = {"weight": self.weight_shape, **self._shapes}
        tensors = self.adapter_tensors() | ({} if weight is None else {"weight": weight})
        parts = [
            hasattr(tensor, "placements") or tensor.shape != shapes.get(key, tensor.shape)
            for key, tensor in tensors.items()
            if not tensor.is_meta
        ]
        if any(parts) or has_class(base, "FullyShardedDataParallel"):
            raise ValueError(f"{self.path or base} is sharded by FSDP: gather its parameters first.")

    def _own_weight(self, base: nn.Module) -> nn.Parameter:
        """Return the parameter that a merged weight replaces."""
        parameter, group = base._parameters.get("weight"), self._group()
        if has_class(base, "FSDPModule") or hasattr(parameter, "placements"):
            problem = "it is sharded by FSDP. Merge before sharding."
        elif parameter is None:
            problem = (
                "its weight is computed from other tensors (a parametrization, weight_norm or pruning). Remove this first, for "
                "example by `torch.nn.utils.parametrize.remove_parametrizations`."
            )
        elif parameter.is_meta:
            problem = (
                "its weight is offloaded. Remove the hooks first, for example by "
                "`accelerate.hooks.remove_hook_from_module(model, recurse=True)`."
            )
        elif self._is_on_disk():
            problem = "its weight is offloaded to disk. Merge before offloading."
        elif group is not None and group.stream is not None:
            problem = "its weight is offloaded with a stream. Merge before offloading."
        else:
            return parameter
        raise ValueError(f"Cannot merge into {self.path or base}: {problem}")

    def _check_not_fused_around(self) -> None:
        """Raise a RuntimeError if an adapter of another method around this layer is merged, and this layer's are not.

        PEFT has then added the other adapter to the weight that this layer's adapters multiply.
        """
        for layer in around(self.get_base_layer()):
            if isinstance(layer, BaseTunerLayer) and layer is not self and layer.merged:
                raise RuntimeError(
                    f"{', '.join(layer.merged_adapters)} was fused into {self.path or self.base_layer} before the adapters of "
                    f"{type(self).__name__} in it: call `unfuse_lora()`, and fuse all at once by `fuse_lora()`."
                )

    def _group(self) -> Any:
        """Return the group in which diffusers offloads the base's weight; None if it does not."""
        return group_of(self.get_base_layer())

    def _is_on_disk(self) -> bool:
        group = self._group()
        return group is not None and group.offload_to_disk_path is not None

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Unlike PEFT's method, this does not change the dtype: if alpha were rounded to bfloat16, F would not start as the identity.
        device = self.weight.device if device is None else device
        for parameters in self._dictionaries().values():
            if adapter_name in parameters and "meta" not in (device.type, parameters[adapter_name].device.type):
                parameters[adapter_name] = parameters[adapter_name].to(device)


def adapter_layers(model: nn.Module) -> list[AdapterLayer]:
    """Return the adapter layers in a model, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]
