"""An adapter as it lies in a folder or in a repository of the Hub, read with suspicion.

Only JSON and safetensors are read, and nothing in them is run. Knows files, PEFT's configurations and shapes; knows no
pipeline and no bank.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from .adapter_shape import adapter_tensor_shapes
from .tuner import FunLoraConfig
from .tuner.hotswap import plain_key
from .tuner.targets import without_peft
from .tuner.tensor_checks import listed, misnamed, misshapen, not_finite


ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
# What a config and the header of a weight file may take; those of a sound adapter take some kilobytes.
MOST_CONFIG_BYTES = 2**20
MOST_HEADER_BYTES = 2**23
# An adapter with more numbers than this many bases is no adapter.
MOST_BASES = 4
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FACTOR = ".funlora_"
_CLASS_VECTOR = "funlora_class_vector"
# Starts of LoRA that leave the base as it is; the others of PEFT take something out of its weights, or read files.
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal")


@dataclass(frozen=True)
class SavedAdapter:
    """
    What an adapter's files say, before any of its numbers is read.

    Args:
        source: folder or repository as it was asked for.
        folder: where the files are on this machine.
        config: of the adapter.
        shapes: its tensors by the keys that PEFT saves them under, on the meta device.
    """

    source: str
    folder: Path
    config: PeftConfig
    shapes: dict[str, torch.Tensor]

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return sum(tensor.numel() for tensor in self.shapes.values())

    @property
    def exact_config(self) -> PeftConfig:
        """The config with the layers that the tensors show for its targets, if it is FunLoRA's.

        A regex from a file is not run: some take forever.
        """
        if not isinstance(self.config, FunLoraConfig):
            return self.config
        return exact_targets(self.config, self.shapes)

    def check_fits(self, model: nn.Module) -> None:
        """Raise a ValueError unless the tensors are just those that the config makes on a model, of which no memory is taken."""
        if isinstance(self.config, FunLoraConfig):
            _check_sizes(self.config, self.shapes)
        most = MOST_BASES * sum(parameter.numel() for parameter in without_peft(model).parameters())
        if self.numel > most:
            raise ValueError(f"it holds {self.numel} numbers, expected {most} at most: {MOST_BASES} times the base's.")
        expected = adapter_tensor_shapes(model, self.exact_config)
        problems = [*misnamed(expected, self.shapes), *misshapen(expected, self.shapes)]
        if problems:
            raise ValueError(f"its tensors are not those of its config on this model:\n{listed(problems)}")

    def tensors(self) -> dict[str, torch.Tensor]:
        """The numbers. Raises a ValueError for a damaged file, and for any that is not finite."""
        file = self.folder / SAFETENSORS_WEIGHTS_NAME
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            _unsound(file, error)
        problems = not_finite(tensors)
        if problems:
            raise ValueError(f"{os.fspath(file)!r} is damaged:\n{listed(problems)}")
        return tensors


def read_adapter(
    source: str | os.PathLike,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> SavedAdapter:
    """
    Find an adapter and read what it is; a repository's files come from one commit.

    Args:
        source (`str` or `os.PathLike`): a folder written by PEFT's `save_pretrained`, or a repository on the Hub.
        subfolder (`str`, *optional*): where in it the adapter lies.
        revision (`str`, *optional*): branch, tag or commit of a repository.
        local_files_only (`bool`, *optional*, defaults to `False`): take a repository from the cache, without asking the Hub.

    Returns:
        [`SavedAdapter`].

    Raises:
        FileNotFoundError: no such folder, repository, revision or file in it.
        ValueError: a config or a weight file that is damaged, on the disk or on its way, or not an adapter's.
    """
    root = fetch(
        source,
        [f"{subfolder}/{name}" if subfolder else name for name in ADAPTER_FILES],
        revision=revision,
        local_files_only=local_files_only,
    )
    folder = root / (subfolder or "")
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            place = f"{os.fspath(source)!r}" + (f", subfolder {subfolder!r}," if subfolder else "")
            raise FileNotFoundError(f"{place} has no {name}, expected an adapter as PEFT saves it.")
        check_download(folder / name)
    return SavedAdapter(os.fspath(source), folder, read_config(folder), read_shapes(folder))


def fetch(
    source: str | os.PathLike, files: Sequence[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """
    The folder that `source` names, or a copy of a repository with these files, as far as it has them.

    Args:
        source (`str` or `os.PathLike`): a folder, or a repository on the Hub.
        files (sequence of `str`): names in a repository; `*` stands for anything.
        revision (`str`, *optional*): branch, tag or commit of a repository.
        local_files_only (`bool`, *optional*, defaults to `False`): take it from the cache, without asking the Hub.

    Raises:
        FileNotFoundError: no such folder, repository or revision, or none in the cache.
        ValueError: a name that leads out of the repository.
    """
    name = os.fspath(source)
    if os.path.isdir(name):
        return Path(name)
    for file in files:
        if ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
            raise ValueError(f"`subfolder` leads to {file!r}, expected a place inside the repository.")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise FileNotFoundError(
            f"{name!r} is neither a folder that is there nor the name of a repository, 'user/repo'."
        ) from None
    patterns = [file if "*" in file else glob.escape(file) for file in files]
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
        )
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"`revision` is {revision!r}, which repository {name!r} has not.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder that is there nor a repository that you may read: check its name and, for a "
            f"private one, your token ({_first_line(error)})."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is not in the cache{'' if local_files_only else ', and the Hub cannot be reached'}: load it once "
            f"while online ({_first_line(error)})."
        ) from error


def check_download(file: Path) -> None:
    """
    Hold a file from the cache of the Hub against its hash; the cache keeps files under it. Others are left alone.

    Raises:
        ValueError: it was damaged on its way. It is deleted from the cache then.
    """
    blob = file.resolve()
    if not file.is_symlink() or blob.parent.name != "blobs":
        return
    content = blob.read_bytes()
    # Large files go by SHA-256, others by git's own hash.
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if blob.name not in (git, hashlib.sha256(content).hexdigest()):
        file.unlink()
        blob.unlink()
        raise ValueError(
            f"{file.name} was damaged on its way from the Hub: its hash is not {blob.name}. Load it again."
        )


def read_config(folder: Path) -> PeftConfig:
    """The configuration in a folder. Raises a ValueError that names the file for one that PEFT cannot take."""
    file = folder / CONFIG_NAME
    if file.stat().st_size > MOST_CONFIG_BYTES:
        raise ValueError(f"{os.fspath(file)!r} has {file.stat().st_size} bytes, expected {MOST_CONFIG_BYTES} at most.")
    try:
        attributes = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(file)!r} is no JSON: {_first_line(error)}.") from error
    if not isinstance(attributes, dict) or not isinstance(attributes.get("peft_type"), str):
        raise ValueError(f"{os.fspath(file)!r} has no `peft_type`, expected the configuration of an adapter.")
    attributes.pop("runtime_config", None)  # as PEFT does
    try:
        config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**attributes))
    except Exception as error:  # a config class may stumble over anything where its fields have other types
        raise ValueError(f"{os.fspath(file)!r} is not a configuration that PEFT knows: {error!r}.") from error
    _check_harmless(config, file)
    return config


def read_shapes(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the weight file in a folder, on the meta device. Raises a ValueError that names a damaged file."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        with open(file, "rb") as stream:
            start = stream.read(8)
        if len(start) < 8 or struct.unpack("<Q", start)[0] > MOST_HEADER_BYTES:
            raise ValueError("its header is cut off or too long")
        with safe_open(file, framework="pt") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
            kinds = {key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()}
        odd = sorted({dtype for _, dtype in kinds.values()} - _DTYPES.keys())
        if odd:
            raise ValueError(f"it has tensors of type {', '.join(odd)}, expected {', '.join(_DTYPES)}")
        return {key: torch.empty(shape, dtype=_DTYPES[dtype], device="meta") for key, (shape, dtype) in kinds.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError) as error:
        _unsound(file, error)


def exact_targets(config: FunLoraConfig, keys: Iterable[str]) -> FunLoraConfig:
    """The config with just those layers as targets that saved tensors, by their keys, belong to."""
    layers = {plain_key(key).rpartition(_FACTOR)[0] for key in keys if not key.endswith(_CLASS_VECTOR)} - {""}
    # A list would also take modules whose name ends so.
    targets = "|".join(map(re.escape, sorted(layers))) if layers else []
    return replace(config, target_modules=targets, exclude_modules=None, layers_to_transform=None, layers_pattern=None)


def _check_sizes(config: FunLoraConfig, shapes: Mapping[str, torch.Tensor]) -> None:
    """What the config says of sizes must show in the tensors, before anything is made of these sizes."""
    factors = [key for key in shapes if key.endswith("funlora_A") or key.endswith("funlora_add_A")]
    alphas = [key for key in shapes if key.endswith("_alpha")]
    for field, sizes in (
        ("r", {shapes[key].shape[-1] for key in factors if shapes[key].dim()}),
        ("num_functions", {shapes[key].numel() for key in alphas}),
    ):
        value = getattr(config, field)
        if sizes - {value} or (
            factors and not sizes and not (field == "num_functions" and config.function == "identity")
        ):
            raise ValueError(f"`{field}` is {value}, but its tensors are made for {sorted(sizes) or 'none'}.")


def _check_harmless(config: PeftConfig, file: Path) -> None:
    if not isinstance(config, LoraConfig):
        return
    if config.init_lora_weights not in _HARMLESS_STARTS:
        raise ValueError(
            f"{os.fspath(file)!r}: `init_lora_weights` is {config.init_lora_weights!r}, which would change the base: convert the "
            "adapter to plain LoRA before saving it (`path_initial_model_for_weight_conversion`)."
        )
    if config.megatron_config is not None:
        raise ValueError(
            f"{os.fspath(file)!r}: `megatron_config` is set, which would import a module that the file names: leave it out."
        )


def _unsound(file: Path, error: Exception) -> NoReturn:
    raise ValueError(
        f"{os.fspath(file)!r} is not a sound safetensors file ({_first_line(error)}): download or train the adapter again."
    ) from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
