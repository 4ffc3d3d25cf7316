"""An adapter as it lies in a folder or in a repository of the Hub, read with suspicion.

Only JSON and safetensors are read, and nothing in them is run.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from ..tuner import FunLoraConfig
from ..tuner.hotswap import plain_key
from ..tuners_utils.meta_shapes import adapter_tensor_shapes
from ..tuners_utils.wrappers import plain_modules, without_peft
from ..utils.checks import listed, shortened
from ..utils.tensors import misnamed, misshapen, not_finite


ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
# What a config and the header of a weight file may take; those of a sound adapter take some kilobytes.
MOST_CONFIG_BYTES = 2**20
MOST_HEADER_BYTES = 2**23
# An adapter with more numbers than this many bases is no adapter.
MOST_BASES = 4
# No U-Net has as many parameters, nor any method as large a rank or count.
MOST_TENSORS = 20_000
MOST_COUNT = 2**20
# An empty tensor takes no byte, whatever its shape is.
_MOST_SIZE = 2**40
_MOST_TEXT = 1000
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CLASS_VECTOR = "funlora_class_vector"
_TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_HARMLESS_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.)*(?:\.[*+](?:[\w-]|\\?\.)*)?\$?")
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
        return _numel(self.shapes)

    @property
    def exact_config(self) -> PeftConfig:
        """The config with just the layers that the tensors show for its targets: a regex of a file is not run."""
        return exact_targets(self.config, self.shapes)

    def check_fits(self, model: nn.Module) -> None:
        """Raise a ValueError unless the tensors are just those that the config makes on a model, of which no memory is taken."""
        check_tensors(self.config, self.shapes, model)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The numbers. Raises a ValueError for a damaged file, and for any that is not finite."""
        file = self.folder / SAFETENSORS_WEIGHTS_NAME
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            unsound(file, error)
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
    patterns = [file if "*" in file else glob.escape(file) for file in files]
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
        )
    except HFValidationError:
        raise FileNotFoundError(
            f"{name!r} is neither a folder that is there nor the name of a repository, 'user/repo'."
        ) from None
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
    Compare a file in the Hub's own cache with its hash, under which the cache stores it. Other files are left alone.

    Raises:
        ValueError: the file was damaged during the download.
    """
    blob, cache = file.resolve(), Path(constants.HF_HUB_CACHE).resolve()
    if not file.is_symlink() or blob.parent.name != "blobs" or cache not in blob.parents:
        return
    content = blob.read_bytes()
    # Large files go by SHA-256, others by git's own hash.
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if blob.name not in (git, hashlib.sha256(content).hexdigest()):
        raise ValueError(
            f"{file.name} was damaged on its way from the Hub: its hash is not {blob.name}. Delete {os.fspath(blob)!r} "
            "and load it again."
        )


def read_config(folder: Path) -> PeftConfig:
    """The configuration in a folder. Raises a ValueError that names the file for one that PEFT cannot take."""
    file = folder / CONFIG_NAME
    try:
        with open(file, "rb") as stream:
            content = stream.read(MOST_CONFIG_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{os.fspath(file)!r} cannot be read ({brief(error)}).") from error
    if len(content) > MOST_CONFIG_BYTES:
        raise ValueError(f"{os.fspath(file)!r} has {file.stat().st_size} bytes, expected {MOST_CONFIG_BYTES} at most.")
    attributes = parse_json(content, os.fspath(file))
    return config_from(attributes, os.fspath(file))


def config_from(attributes: Any, source: str) -> PeftConfig:
    """The configuration that parsed JSON is. Raises a ValueError that names its source for one that PEFT cannot take."""
    if not isinstance(attributes, dict) or not isinstance(attributes.get("peft_type"), str):
        raise ValueError(f"{source!r} has no `peft_type`, expected the configuration of an adapter.")
    attributes = {key: value for key, value in attributes.items() if key != "runtime_config"}  # as PEFT does
    try:
        config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**attributes))
    except Exception as error:  # a config class may stumble over anything where its fields have other types
        raise ValueError(
            f"{source!r} is not a configuration that PEFT knows: {shortened(repr(error), _MOST_TEXT)}."
        ) from error
    _check_harmless(config, source)
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
        odd = sorted({dtype for _, dtype in kinds.values()} - DTYPES.keys())
        if odd:
            raise ValueError(f"it has tensors of type {', '.join(odd)}, expected {', '.join(DTYPES)}")
        large = [shape for shape, _ in kinds.values() if max(shape, default=0) > _MOST_SIZE]
        if large:
            raise ValueError(f"it has a tensor of shape {large[0]}")
        if len(kinds) > MOST_TENSORS:
            raise ValueError(f"it has {len(kinds)} tensors, expected {MOST_TENSORS} at most")
        return {key: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for key, (shape, dtype) in kinds.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        unsound(file, error)


def parse_json(content: str | bytes, source: str) -> Any:
    """JSON as the standard has it: no NaN and no infinity. Raises a ValueError that names the source for anything else."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source!r} is no JSON: {brief(error)}.") from error


def exact_targets(config: PeftConfig, keys: Collection[str]) -> PeftConfig:
    """
    The config with just those layers as targets that saved tensors, by their keys, belong to.

    What names layers by a regex is replaced, since some take forever. Another method's list of names stays as it is, if it
    is not longer than what it made.
    """
    targets = getattr(config, "target_modules", None)
    is_list = isinstance(targets, (list, set, tuple)) and len(targets) <= len(keys)
    runs_regex = getattr(config, "exclude_modules", None) or getattr(config, "layers_pattern", None)
    if not isinstance(config, FunLoraConfig) and (targets is None or is_list) and not runs_regex:
        return config
    layers = _adapted_layers(config, keys)
    exact = copy.copy(config)
    # A list would also take modules whose name ends so.
    exact.target_modules = "|".join(map(re.escape, sorted(layers))) if layers else set()
    for name in _TARGET_FIELDS[1:]:
        if hasattr(exact, name):
            setattr(exact, name, None)
    return exact


def restore_targets(config: PeftConfig, original: PeftConfig) -> None:
    """Undo `exact_targets` in a config that it gave, so that it is saved as it came."""
    for name in _TARGET_FIELDS:
        if hasattr(original, name):
            setattr(config, name, getattr(original, name))


def check_tensors(config: PeftConfig, shapes: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """
    Hold tensors against those that a config makes on a model, of which no memory is taken.

    Args:
        config (`PeftConfig`): of the adapter.
        shapes (`Mapping[str, torch.Tensor]`): by the keys that PEFT saves tensors under, with its prefix or without.
        model (`torch.nn.Module`): the base, with adapters or without.

    Raises:
        ValueError: tensors, or sizes or names in the config, that do not fit the model or each other.
    """
    _check_names(config, shapes, model)
    if isinstance(config, FunLoraConfig):
        _check_sizes(config, shapes)
    else:
        _check_numbers(config)
        _check_patterns(config, shapes)
    most = MOST_BASES * sum(parameter.numel() for parameter in without_peft(model).parameters())
    if _numel(shapes) > most:
        raise ValueError(f"it holds {_numel(shapes)} numbers, expected {most} at most: {MOST_BASES} times the base's.")
    exact = exact_targets(config, shapes)
    if isinstance(config, FunLoraConfig):
        # A start as the identity takes no time on the meta device, and its shapes are those of any other.
        exact.init_weights = True
    try:
        expected = adapter_tensor_shapes(model, exact, layers=_layers(config, shapes, model))
    except Exception as error:  # PEFT may stumble over anything where a value makes no sense
        raise ValueError(f"its config makes no adapter of this model: {brief(error)}") from error
    expected = {plain_key(key): tensor for key, tensor in expected.items()}
    given = {plain_key(key): tensor for key, tensor in shapes.items()}
    problems = [*misnamed(expected, given), *misshapen(expected, given)]
    if len(given) < len(shapes):
        problems.append(f"{len(shapes) - len(given)} tensors come twice, expected each of them once")
    if problems:
        raise ValueError(f"its tensors are not those of its config on this model:\n{listed(problems)}")


def _layers(config: PeftConfig, keys: Iterable[str], model: nn.Module) -> set[str] | None:
    """All modules of a model that FunLoRA's config and tensors are about; None: they cannot be told."""
    layers = _adapted_layers(config, keys)
    inside = any(other.startswith(f"{name}.") for name in layers for other in layers)
    if not isinstance(config, FunLoraConfig) or config.modules_to_save or inside:
        return None
    vector = config.class_embedding
    if vector is None:
        return layers
    return layers | {name for name, _ in plain_modules(model) if name == vector or name.endswith(f".{vector}")}


def _numel(shapes: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in shapes.values())


def _check_names(config: PeftConfig, keys: Iterable[str], model: nn.Module) -> None:
    """Raise a ValueError unless a model has the layers that saved tensors, by their keys, and `modules_to_save` name.

    PEFT takes the latter for a regex, and any end of a name for a module, even an empty one.
    """
    known = {name for name, _ in plain_modules(model) if name}
    unknown = sorted(_adapted_layers(config, keys) - known)
    if unknown:
        raise ValueError(f"its tensors belong to layers that are not found in the base model:\n{listed(unknown)}")
    ends = {".".join(name.split(".")[start:]) for name in known for start in range(name.count(".") + 1)}
    wanted = getattr(config, "modules_to_save", None) or []
    is_listed = isinstance(wanted, (list, tuple, set)) and all(isinstance(name, str) for name in wanted)
    if not is_listed or len(set(wanted)) < len(wanted) or not ends.issuperset(wanted):
        raise ValueError(
            f"`modules_to_save` is {shortened(repr(wanted), _MOST_TEXT)}, expected different names of modules of the model."
        )


def _adapted_layers(config: PeftConfig, keys: Iterable[str]) -> set[str]:
    """Names of the layers that an adapter's tensors are in: what comes before the first part of a key that is its method's."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    layers = set()
    for key in keys:
        parts = plain_key(key).split(".")
        own = next((index for index, part in enumerate(parts) if part.startswith(prefix)), 0)
        if parts[own] != _CLASS_VECTOR:
            layers.add(".".join(parts[:own]))
    return layers - {""}


def _check_sizes(config: FunLoraConfig, shapes: Mapping[str, torch.Tensor]) -> None:
    """What the config says of sizes must show in the tensors, before anything is made of these sizes."""
    factors = [key for key in shapes if key.endswith("funlora_A") or key.endswith("funlora_add_A")]
    alphas = [key for key in shapes if key.endswith("_alpha")]
    has_layers = bool(_adapted_layers(config, shapes))
    for field, sizes in (
        ("r", {shapes[key].shape[-1] for key in factors if shapes[key].dim()}),
        ("num_functions", {shapes[key].numel() for key in alphas}),
    ):
        value = getattr(config, field)
        if sizes - {value} or (
            has_layers and not sizes and not (field == "num_functions" and config.function == "identity")
        ):
            raise ValueError(f"`{field}` is {value}, but its tensors are made for {sorted(sizes) or 'none'}.")


def _check_numbers(config: PeftConfig) -> None:
    """Sizes and counts of another method: what it makes of them is not known here, so large ones are refused."""
    for field, value in vars(config).items():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        large = [entry for entry in values if isinstance(entry, int) and abs(entry) > MOST_COUNT]
        if large and "seed" not in field and "prng" not in field:
            raise ValueError(f"`{field}` has {large[0]}, expected {MOST_COUNT} at most.")


def _check_patterns(config: PeftConfig, shapes: Mapping[str, torch.Tensor]) -> None:
    """Refuse what PEFT would run as a regex, but for names with one wildcard; some take forever."""
    for field, value in vars(config).items():
        if field == "auto_mapping" or not isinstance(value, dict):
            continue
        odd = [key for key in value if not (isinstance(key, str) and _HARMLESS_PATTERN.fullmatch(key))]
        if odd or len(value) > len(shapes):
            raise ValueError(
                f"`{field}` has {shortened(repr(odd[0]), _MOST_TEXT) if odd else f'{len(value)} entries'}, expected names of "
                "layers, with one '.*' at most, and no more of them than tensors: write the layers out."
            )
    if isinstance(getattr(config, "feedforward_modules", None), str):
        raise ValueError("`feedforward_modules` is a regex, expected a list of names: write the layers out.")


def _check_harmless(config: PeftConfig, source: str) -> None:
    if config.peft_type == PeftType.XLORA:
        raise ValueError(f"{source!r} is an adapter of type XLORA, which would load others: load them one by one.")
    if getattr(config, "bias", "none") != "none":
        raise ValueError(f"{source!r}: `bias` is {config.bias!r}, which would change the base, expected 'none'.")
    if not isinstance(config, LoraConfig):
        return
    if config.init_lora_weights not in _HARMLESS_STARTS:
        raise ValueError(
            f"{source!r}: `init_lora_weights` is {config.init_lora_weights!r}, which would change the base: convert the "
            "adapter to plain LoRA before saving it (`path_initial_model_for_weight_conversion`)."
        )
    if config.megatron_config is not None:
        raise ValueError(
            f"{source!r}: `megatron_config` is set, which would import a module that the file names: leave it out."
        )


def unsound(file: Path, error: Exception) -> NoReturn:
    raise ValueError(
        f"{os.fspath(file)!r} is not a sound safetensors file ({brief(error)}): download or train the adapter again."
    ) from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{shortened(number, 50)} is too large a number")
    return value


def brief(error: BaseException) -> str:
    """What an error says, as far as it can be read."""
    text, _, _ = str(error).partition("\nException raised from")  # what torch adds of its own code
    return shortened(text.strip() or type(error).__name__, _MOST_TEXT)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
