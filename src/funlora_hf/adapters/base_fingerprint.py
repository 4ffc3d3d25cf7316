"""The fingerprint of a base, which is a hash of its tensors, and a check that an adapter was trained for it."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Mapping
from copy import copy
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from torch import nn

from ..tuner.targets import FUSED_PROJECTIONS
from ..tuner_base.offloading import is_offloaded
from ..tuner_base.wrappers import base_module, is_wrapper, uncompiled, without_peft
from ..utils.checks import CONFIG_FINGERPRINT, FINGERPRINT_DTYPES


_Config = TypeVar("_Config", bound=PeftConfig)
# Settings of a model that do not change its outputs in evaluation mode, given the same tensors and inputs.
_WITHOUT_EFFECT = ("sample_size", "dropout", "num_class_embeds")


class BaseMismatchError(ValueError):
    """An adapter was trained for another base than the one onto which it is loaded."""


def base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model without its adapters, by the names that they have without adapters.

    Args:
        model (`torch.nn.Module`): with or without adapters of PEFT; it may be a PeftModel.

    Returns:
        `dict[str, torch.Tensor]`: the `state_dict` of the plain model; the tensors share its memory.

    Raises:
        ValueError: adapters are merged into the weights.
    """
    return _collect(without_peft(model), "", {})


def base_fingerprint(model: nn.Module, *, dtype: torch.dtype | None = None) -> str:
    """Compute the SHA-256 over names, shapes, dtypes and bytes of a base's tensors, in the order of their names.

    It does not depend on the files of the base, the device, the memory format, any adapters in the model, or whether
    diffusers has fused its projections (`fuse_qkv_projections`).

    Args:
        model (`torch.nn.Module`): the base, such as a `UNet2DModel`, with or without adapters of PEFT.
        dtype (`torch.dtype`, *optional*): Cast floating-point tensors to it first, which gives the fingerprint of the base
            loaded in this dtype. None: do not cast.

    Returns:
        `str`: 64 hexadecimal digits.

    Raises:
        ValueError: adapters are merged into the weights, or the weights are offloaded.

    Source: [ours].
    """
    tensors = base_tensors(model)
    if is_offloaded(model, tensors.values()):
        raise ValueError("The base's weights are offloaded, so it has no fingerprint: take it before you offload.")
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if _is_fused(name, tensors):
            continue
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # As uint8, since NumPy has no bfloat16; reshaped, since a scalar has no last dimension to view.
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_fingerprints(model: nn.Module) -> dict[str, str]:
    """Compute the fingerprints of a base in each precision in which it may be loaded, as an adapter's config stores them.

    Args:
        model (`torch.nn.Module`): the base, in the precision in which the adapter is trained.

    Returns:
        `dict[str, str]`: for "float32", "bfloat16" and "float16"; for a diffusers model, also for "config": that of the settings
        which change the outputs of the same tensors, such as `act_fn`.

    Raises:
        ValueError: adapters are merged into the weights.
    """
    of_tensors = {name: base_fingerprint(model, dtype=getattr(torch, name)) for name in FINGERPRINT_DTYPES}
    return {**of_tensors, **config_fingerprint(model)}


def config_fingerprint(model: nn.Module) -> dict[str, str]:
    """Return `{"config": SHA-256}` of a diffusers model, over settings that differ from their defaults, so that arguments which a later
    diffusers adds do not change it. Empty for another model."""
    model = uncompiled(without_peft(model))
    config = getattr(model, "config", None)
    if not isinstance(config, Mapping):
        return {}
    defaults = {name: one.default for name, one in inspect.signature(type(model)).parameters.items()}
    # In JSON, lists and tuples are the same.
    own, usual = (json.loads(json.dumps(dict(values), default=str)) for values in (config, defaults))
    kept = {
        name: value
        for name, value in own.items()
        if not (name.startswith("_") or name in _WITHOUT_EFFECT or value == usual.get(name))
    }
    return {CONFIG_FINGERPRINT: hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()}


class FingerprintCheck:
    """Checks adapters against one base, which is hashed once, and again only after a change.

    Detects in-place changes tracked by torch and new storage or dtype, but not `tensor.data.mul_(2)`.

    Args:
        model (`torch.nn.Module`): the base.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state: list[tuple[int, int, torch.dtype]] | None = None
        self._fingerprint = self._dtype = ""
        self._has_warned = False

    def check(self, config: PeftConfig, source: str) -> None:
        """Raise a [`BaseMismatchError`] if an adapter's config names another base.

        Args:
            config (`PeftConfig`): Config of the adapter. Those of other methods have no fingerprint, so there is nothing to
                check. The first FunLoRA adapter without one gives a warning.
            source (`str`): where the adapter comes from, for the message.
        """
        stored: Mapping[str, str] | None = getattr(config, "base_fingerprint", None)
        if stored is None:
            if hasattr(config, "base_fingerprint"):
                self._warn(
                    source,
                    "its `base_fingerprint` is None, as from PEFT's `save_pretrained`. `funlora_hf.save_adapter` writes it",
                )
            return
        fits = self.fits(stored)
        if fits is None:
            self._warn(source, "the base's weights are offloaded. Load an adapter before you offload")
        elif not fits:
            own = config_fingerprint(self._model)
            name, of, found = self._dtype, f"in {self._dtype}", self._fingerprint
            if _differs(own, stored):
                name, of, found = CONFIG_FINGERPRINT, "of its config (such as `act_fn`)", own[CONFIG_FINGERPRINT]
            raise BaseMismatchError(
                f"The adapter {source!r} was trained for another base: it expects the fingerprint {stored.get(name)} "
                f"{of}, this base has the fingerprint {found}. Load it onto {_base_of(config)}, or "
                "pass `ignore_base_fingerprint=True` if you know that it fits."
            )

    def accepted(self, config: _Config, source: str, *, ignore: bool) -> _Config:
        """Check the config and return it. With `ignore`, do not check: a config of another base gets the fingerprints of this one, so
        that the adapter, saved again, loads onto this base."""
        if not ignore:
            self.check(config, source)
            return config
        stored = getattr(config, "base_fingerprint", None)
        if stored is None or self.fits(stored) is not False:
            return config
        own: Any = copy(config)
        own.base_fingerprint = base_fingerprints(self._model)
        return own

    def fits(self, fingerprints: Mapping[str, str]) -> bool | None:
        """Return whether these fingerprints have that of this base in its present precision and, if they have one for "config", that
        of its config; None if the base is offloaded and was not hashed before."""
        if _differs(config_fingerprint(self._model), fingerprints):
            return False
        by_name = base_tensors(self._model)
        if is_offloaded(self._model, by_name.values()):
            return fingerprints.get(self._dtype) == self._fingerprint if self._state else None
        tensors = by_name.values()
        state = [_state(tensor) for tensor in tensors]
        if self._state != state:
            name = next((str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()), "float32")
            # In another precision (float64), compare the values in float32.
            self._dtype = name if name in FINGERPRINT_DTYPES else "float32"
            self._fingerprint = base_fingerprint(self._model, dtype=None if name == self._dtype else torch.float32)
            self._state = state
        return fingerprints.get(self._dtype) == self._fingerprint

    def _warn(self, source: str, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"It was not checked that the adapter {source!r} belongs to this base: {reason}. (Further ones are not reported.)",
                stacklevel=3,
            )


def _differs(own: Mapping[str, str], fingerprints: Mapping[str, str]) -> bool:
    """Return whether fingerprints have another "config" than this one; earlier versions did not write it."""
    return any(fingerprints.get(name, value) != value for name, value in own.items())


def _collect(module: nn.Module, prefix: str, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add the tensors of a module and its children to `found`, by their names after `prefix`."""
    module = uncompiled(module)
    while is_wrapper(module):
        if getattr(module, "merged", False) is True:
            raise ValueError("Adapters are merged into the base's weights: call `unmerge_adapter` first.")
        module = base_module(module)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}{name}"] = tensor
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", found)
    return found


def _is_fused(name: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a tensor only repeats others, as in projections that diffusers has fused."""
    path, _, kind = name.rpartition(".")
    attention, _, layer = path.rpartition(".")
    parts = [tensors.get(f"{attention}.{part}.{kind}") for part in FUSED_PROJECTIONS.get(layer, ())]
    found = [part for part in parts if part is not None]
    return bool(found) and len(found) == len(parts) and torch.equal(tensors[name], torch.cat(found))


def _state(tensor: torch.Tensor) -> tuple[int, int, torch.dtype]:
    """Return a value that changes with the tensor. Tensors made in inference mode have no version."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.dtype


def _base_of(config: PeftConfig) -> str:
    if not config.base_model_name_or_path:
        return "the base that it was trained for"
    revision = f" at revision {config.revision!r}" if config.revision else ""
    return f"{config.base_model_name_or_path!r}{revision}"
