"""Adapted weights of a layer, kept for as long as nothing changes that they were made from.

Knows tensors; knows nothing of adapters, of layers or models.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch


class WeightCache:
    """Keeps what `compute` returned, and computes again when a source has changed.

    Of a source that is compared by value (small ones) any change is seen. Of others those are seen that torch counts,
    and another storage, dtype, device or shape; `tensor.data.mul_(2)` is not, which is why layers also empty their
    cache whenever they change between training and evaluation.

    Nothing is kept where gradients may be wanted, while torch compiles, or of tensors made in inference mode. Copies and
    pickles are empty.

    Args:
        capacity: weights kept at a time, >= 0; the one not used for longest goes first.
    """

    def __init__(self, capacity: int = 1) -> None:
        self._capacity = capacity
        self._kept: OrderedDict[Hashable, tuple[_Sources, torch.Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: dict) -> WeightCache:
        return WeightCache(self._capacity)

    def __reduce__(self) -> tuple:
        return WeightCache, (self._capacity,)

    @property
    def capacity(self) -> int:
        """Weights kept at a time."""
        return self._capacity

    @capacity.setter
    def capacity(self, capacity: int) -> None:
        self._capacity = capacity
        self._trim()

    def clear(self) -> None:
        """Forget all weights."""
        self._kept.clear()

    def get(
        self,
        key: Hashable,
        compute: Callable[[], torch.Tensor],
        *,
        by_value: Sequence[torch.Tensor],
        by_version: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """
        What `compute` returns, or returned when key and sources were the same.

        Args:
            key: names and settings that the result depends on.
            compute: makes the result.
            by_value: tensors that it depends on, compared entry by entry; on the CPU only, since elsewhere that would wait
                for the device, they are treated as those of `by_version`.
            by_version: tensors that it depends on, compared by storage and by torch's count of changes.

        Returns:
            The result; it must not be changed.
        """
        sources = [*by_value, *by_version]
        if torch.compiler.is_compiling() or not _can_be_kept(sources):
            return compute()
        # A tensor made in inference mode cannot take part in autograd, even if only the input needs a gradient.
        key = (key, torch.is_inference_mode_enabled())
        found = self._kept.get(key)
        if found is not None and found[0].are_still(by_value, by_version):
            self._kept.move_to_end(key)
            return found[1]
        self._kept.pop(key, None)
        self._trim(room_for=1)
        result = compute()
        if self._capacity > 0:
            self._kept[key] = _Sources(by_value, by_version), result
        return result

    def _trim(self, room_for: int = 0) -> None:
        while self._kept and len(self._kept) + room_for > self._capacity:
            self._kept.popitem(last=False)


class _Sources:
    """Tensors as they were."""

    def __init__(self, by_value: Sequence[torch.Tensor], by_version: Sequence[torch.Tensor]) -> None:
        self._values = [
            tensor.detach().clone() if tensor.device.type == "cpu" else _Version(tensor) for tensor in by_value
        ]
        self._versions = [_Version(tensor) for tensor in by_version]

    def are_still(self, by_value: Sequence[torch.Tensor], by_version: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors with the same entries."""
        if len(by_value) != len(self._values) or len(by_version) != len(self._versions):
            return False
        return all(
            before.is_still(now) if isinstance(before, _Version) else _equal(before, now)
            for before, now in zip([*self._versions, *self._values], [*by_version, *by_value], strict=True)
        )


class _Version:
    """A tensor's storage and how often torch has seen it change."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._object = weakref.ref(tensor)
        # The alias keeps the storage, so that no other tensor can come to lie at its address.
        self._alias, self._version = tensor.detach(), tensor._version

    def is_still(self, tensor: torch.Tensor) -> bool:
        return (
            self._object() is tensor
            and tensor.data_ptr() == self._alias.data_ptr()
            and tensor._version == self._version
            and tensor.dtype == self._alias.dtype
            and tensor.device == self._alias.device
            and tensor.shape == self._alias.shape
            and tensor.stride() == self._alias.stride()
        )


def _equal(before: torch.Tensor, now: torch.Tensor) -> bool:
    return before.dtype == now.dtype and before.device == now.device and torch.equal(before, now)


def _can_be_kept(sources: Sequence[torch.Tensor]) -> bool:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in sources):
        return False
    return not any(tensor.is_meta or tensor.is_inference() or not _has_storage(tensor) for tensor in sources)


def _has_storage(tensor: torch.Tensor) -> bool:
    """Not so of what stands for a tensor while torch traces or vectorises."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
