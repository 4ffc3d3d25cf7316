"""Read an untrusted adapter from a folder or from a repository on the Hub.

Only JSON and safetensors are read, and nothing in them is run.
"""

from __future__ import annotations

import copy
import glob
import hashlib
import os
import re
import struct
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open
from torch import nn

from ..tuner import FunLoraConfig
from ..tuner.hotswap import plain_key
from ..tuner_base.meta_shapes import adapted_shape
from ..tuner_base.wrappers import plain_modules, without_peft
from ..utils.checks import check_not_mistyped, is_repository_name, listed, shortened
from ..utils.files import parse_json, read_json, read_tensors
from ..utils.tensors import misnamed, misshapen, not_finite


ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
# Limits for a config and the header of a weight file, which usually take a few kilobytes.
MOST_CONFIG_BYTES = 2**20
MOST_HEADER_BYTES = 2**23
# An adapter may have this many times the numbers of its base.
MOST_BASES = 4
# No U-Net has so many parameters, and no method has such a large rank or count.
MOST_TENSORS = 20_000
MOST_COUNT = 2**20
# An empty tensor takes no bytes, so a file may claim any shape for it.
_MOST_SIZE = 2**40
_MOST_TEXT = 1000
REMEDY = "download or train the adapter again"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CLASS_VECTOR = "funlora_class_vector"
_TARGET_FIELDS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_HARMLESS_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.)*(?:\.[*+](?:[\w-]|\\?\.)*)?\$?")
# Initializations of LoRA that do not change the base; PEFT's others change its weights or read files.
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal")
# Parts of pipelines whose adapters `save_lora_weights` writes, in the order in which one is chosen.
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_Config = TypeVar("_Config", bound=PeftConfig)
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class SavedAdapter:
    """The contents of an adapter's files, before any of its numbers is read.

    Args:
        source: folder or repository as the caller named it.
        folder: local folder of the files.
        config: config of the adapter.
        shapes: its tensors by the keys under which PEFT saves them, on the meta device.
        weights: name of the file that has them.
        prefix: prefix of its keys in that file, which may have other tensors.
    """

    source: str
    folder: Path
    config: PeftConfig
    shapes: dict[str, torch.Tensor]
    weights: str = SAFETENSORS_WEIGHTS_NAME
    prefix: str = ""

    @property
    def numel(self) -> int:
        """The number of its parameters."""
        return sum(tensor.numel() for tensor in self.shapes.values())

    def check_fits(self, model: nn.Module) -> None:
        """Raise a ValueError unless the config makes exactly these tensors on a model; takes no memory for them."""
        check_tensors(self.config, self.shapes, model)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Read the numbers. Raises a ValueError for a damaged file or for numbers that are not finite."""
        file = self.folder / self.weights
        tensors = _without_prefix(read_tensors(file, remedy=REMEDY), self.prefix)
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
    config: PeftConfig | None = None,
    weight_name: str | None = None,
    prefix: str | None = None,
) -> SavedAdapter:
    """Find the adapter in a `subfolder` of a source, as for `fetch`, and read all but its numbers; a repository's files come from one commit.

    Args:
        source (`str` or `os.PathLike`): A folder written by PEFT's `save_pretrained`, or by `save_lora_adapter` or
            `save_lora_weights` of diffusers, or a repository on the Hub.
        subfolder, revision, local_files_only: as for `fetch`.
        config (`PeftConfig`, *optional*): config of the adapter, if the files have none, as those of `save_lora_weights`.
        weight_name, prefix (`str`, *optional*): for a file that diffusers wrote: its name, and the part of the pipeline to read.

    Raises:
        FileNotFoundError: no such folder, repository, revision or file in it.
        ValueError: a config or a weight file that is damaged, on disk or in the download, or is not an adapter's.
    """
    of_diffusers = weight_name or LORA_WEIGHT_NAME_SAFE
    root = fetch(
        source,
        [f"{subfolder}/{name}" if subfolder else name for name in (*ADAPTER_FILES, of_diffusers)],
        revision=revision,
        local_files_only=local_files_only,
    )
    folder = root / (subfolder or "")
    place = f"{os.fspath(source)!r}" + (f", subfolder {subfolder!r}," if subfolder else "")
    if (weight_name or not (folder / CONFIG_NAME).is_file()) and (folder / of_diffusers).is_file():
        return _read_diffusers_adapter(os.fspath(source), folder / of_diffusers, config, prefix)
    if weight_name is not None:
        raise FileNotFoundError(f"{place} has no {weight_name}, which `weight_name` names.")
    for field, value in (("config", config), ("prefix", prefix)):
        if value is not None and (folder / CONFIG_NAME).is_file():
            raise ValueError(
                f"`{field}` is given, but {os.fspath(source)!r} has {'its own' if field == 'config' else 'one adapter'}: leave it out."
            )
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            others = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in ADAPTER_FILES)
            remedy = f" If diffusers wrote it, pass `weight_name`, such as {others[0]!r}." if others else ""
            raise FileNotFoundError(f"{place} has no {name}, expected an adapter as PEFT saves it.{remedy}")
        check_download(folder / name)
    return SavedAdapter(
        os.fspath(source), folder, read_config(folder), read_header(folder / SAFETENSORS_WEIGHTS_NAME)[0]
    )


def _read_diffusers_adapter(source: str, file: Path, config: PeftConfig | None, part: str | None) -> SavedAdapter:
    """Read the adapter of one part of a pipeline, as `read_adapter` does, from a file that diffusers wrote."""
    check_download(file)
    tensors, metadata = read_header(file)
    # `save_lora_weights` of a pipeline puts the name of the part before each key and each field of its config.
    names = {key.partition(".")[0] for key in tensors}
    known = [name for name in _COMPONENTS if name in names]
    if part is not None and part not in known:
        raise ValueError(
            f"`prefix` is {part!r}, expected a part of the pipeline that {os.fspath(file)!r} has: {', '.join(known) or 'none'}."
        )
    part = part or next(iter(known), None)
    prefix = "" if part is None else f"{part}."
    shapes = _without_prefix(tensors, prefix)
    others = sorted(names - {part}) if part else []
    if others:
        readable = "".join(f" Load that of pipe.{name} by `prefix={name!r}`." for name in others if name in known)
        warnings.warn(
            f"{os.fspath(file)!r} also has tensors of {', '.join(others)}, left out.{readable}", stacklevel=4
        )
    try:
        settings = parse_json(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(file)!r} has metadata that is not valid JSON: {brief(error)}.") from error
    settings = _without_prefix(settings, prefix) if isinstance(settings, dict) else {}
    if bool(settings) == (config is not None):
        raise ValueError(
            f"`config` is given, but {os.fspath(file)!r} has its own: leave it out."
            if settings
            else f"{os.fspath(file)!r} has no configuration of the adapter in it: pass `config`."
        )
    fields = {**(settings if config is None else config.to_dict()), "inference_mode": True}
    return SavedAdapter(source, file.parent, config_from(fields, os.fspath(file)), shapes, file.name, prefix)


def _without_prefix(entries: Mapping[str, _Value], prefix: str) -> dict[str, _Value]:
    """Return the entries whose key starts with a prefix, by the rest of the key."""
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def fetch(
    source: str | os.PathLike, files: Sequence[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Return the folder that `source` names, or a local copy of those `files` that a repository has.

    Args:
        source (`str` or `os.PathLike`): a folder, or a repository on the Hub.
        files (sequence of `str`): names in a repository; `*` matches anything.
        revision (`str`, *optional*): branch, tag or commit of a repository.
        local_files_only (`bool`, *optional*, defaults to `False`): use the cached repository, without asking the Hub.

    Raises:
        FileNotFoundError: no such folder, repository or revision, or it is not in the cache; or almost the name of a folder.
        ValueError: a name that leads out of the repository, or a revision of a folder.
    """
    name = os.fspath(source)
    if os.path.isdir(name):
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, but {name!r} is a folder, which has none: leave it out.")
        return Path(name)
    if not local_files_only:
        check_not_mistyped(repr(name), name, revision=revision)
    return fetch_repository(name, files, revision=revision, local_files_only=local_files_only)


def fetch_repository(
    name: str, files: Sequence[str], *, revision: str | None = None, local_files_only: bool = False
) -> Path:
    """Do as `fetch` for the name of a repository, even if a local folder has this name."""
    if not is_repository_name(name):
        raise FileNotFoundError(
            f"{name!r} is neither a folder that is there nor the name of a repository, 'user/repo'."
        )
    for file in files:
        if ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
            raise ValueError(f"`subfolder` leads to {file!r}, expected a place inside the repository.")
    patterns = [file if "*" in file else glob.escape(file) for file in files]
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
        )
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"`revision` is {revision!r}, which repository {name!r} does not have.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder that is there nor a repository that you may read: check its name, 'user/repo', "
            f"and, for a private one, your token ({_first_line(error)})."
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is neither a folder that is there nor a repository, 'user/repo', in the cache"
            f"{'' if local_files_only else ', and the Hub cannot be reached'}: correct the path, or load the repository once "
            f"while online ({_first_line(error)})."
        ) from error


def check_download(file: Path) -> None:
    """Compare a file in the Hub's own cache with its hash, which is its name there. Other files are not checked.

    Raises:
        ValueError: the file was damaged during the download.
    """
    blob, cache = file.resolve(), Path(constants.HF_HUB_CACHE).resolve()
    if not file.is_symlink() or blob.parent.name != "blobs" or cache not in blob.parents:
        return
    content = blob.read_bytes()
    # Large files have their SHA-256 as name, others the hash of git.
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if blob.name not in (git, hashlib.sha256(content).hexdigest()):
        raise ValueError(
            f"{file.name} was damaged on its way from the Hub: its hash is not {blob.name}. Delete {os.fspath(blob)!r} "
            "and load it again."
        )


def read_config(folder: Path) -> PeftConfig:
    """Read the configuration in a folder. Raises a ValueError that names the file for one that PEFT does not accept."""
    file = folder / CONFIG_NAME
    return config_from(read_json(file, most_bytes=MOST_CONFIG_BYTES), os.fspath(file))


def config_from(attributes: Any, source: str) -> PeftConfig:
    """Make the configuration of parsed JSON. Raises a ValueError that names its source for one that PEFT does not accept."""
    if not isinstance(attributes, dict) or not isinstance(attributes.get("peft_type"), str):
        raise ValueError(f"{source!r} has no `peft_type`, expected the configuration of an adapter.")
    attributes = {key: value for key, value in attributes.items() if key != "runtime_config"}  # as PEFT does
    try:
        config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**attributes))
    except Exception as error:  # config classes raise many types for fields of another type
        raise ValueError(
            f"{source!r} is not a configuration that PEFT knows: {shortened(repr(error), _MOST_TEXT)}."
        ) from error
    _check_harmless(config, source)
    return config


def method(config: PeftConfig) -> str:
    """Return the name of an adapter's method, such as "LORA"."""
    return PeftType(config.peft_type).value


def bankable(config: PeftConfig, source: str) -> FunLoraConfig:
    """Return the configuration. Raises a ValueError that names its source for another method and for `modules_to_save`."""
    if not isinstance(config, FunLoraConfig):
        raise ValueError(f"{source} has adapters of type {method(config)}, expected FUNLORA.")
    if config.modules_to_save:
        raise ValueError(
            f"{source}: `modules_to_save` is {list(config.modules_to_save)}, expected None: a bank stores adapters, not modules."
        )
    return config


def read_header(file: Path, *, most_bytes: int = MOST_HEADER_BYTES) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, on the meta device, and its metadata, without reading any number.

    Raises:
        ValueError: a damaged file, a longer header, tensors of other types or too many tensors; it names the file.
    """
    try:
        with open(file, "rb") as stream:
            start = stream.read(8)
        if len(start) < 8 or struct.unpack("<Q", start)[0] > most_bytes:
            raise ValueError("its header is cut off or too long")
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
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
        shapes = {key: torch.empty(size, dtype=DTYPES[dtype], device="meta") for key, (size, dtype) in kinds.items()}
        return shapes, metadata
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{os.fspath(file)!r} is not a valid safetensors file ({brief(error)}): {REMEDY}.") from error


def differences(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> list[str]:
    """Return a line for each tensor that is missing, unexpected or of another shape; keys may have PEFT's prefix."""
    expected = {plain_key(key): tensor for key, tensor in expected.items()}
    plain = {plain_key(key): tensor for key, tensor in given.items()}
    problems = [*misnamed(expected, plain), *misshapen(expected, plain)]
    if len(plain) < len(given):
        problems.append(f"{len(given) - len(plain)} tensors occur twice, expected each of them once")
    return problems


def exact_targets(config: _Config, keys: Collection[str]) -> _Config:
    """Return the config with exactly the layers of saved tensors, given by their keys, as targets.

    This replaces regexes, since some of them never end. Another method's list of names stays, unless it is longer than the keys.
    """
    targets = getattr(config, "target_modules", None)
    is_list = isinstance(targets, (list, set, tuple)) and len(targets) <= len(keys)
    runs_regex = getattr(config, "exclude_modules", None) or getattr(config, "layers_pattern", None)
    if not isinstance(config, FunLoraConfig) and (targets is None or is_list) and not runs_regex:
        return config
    layers = _adapted_layers(config, keys)
    exact = copy.copy(config)
    # A list would also match modules whose name ends in the same way.
    targets = "|".join(map(re.escape, sorted(layers))) if layers else set()
    for name in _TARGET_FIELDS:
        if hasattr(exact, name):
            setattr(exact, name, targets if name == "target_modules" else None)
    return exact


def restore_targets(config: PeftConfig, original: PeftConfig) -> None:
    """Undo `exact_targets` in a config that it returned, so that the config is saved as it was read."""
    for name in _TARGET_FIELDS:
        if hasattr(original, name):
            setattr(config, name, getattr(original, name))


def check_tensors(config: PeftConfig, shapes: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Compare saved tensors with those that a config makes on a model, without memory for them.

    Raises:
        ValueError: tensors, or sizes or names in the config, that do not fit the model or each other.
    """
    _check_names(config, shapes, model)
    if isinstance(config, FunLoraConfig):
        _check_sizes(config, shapes)
    else:
        _check_fields(config, shapes)
    most = MOST_BASES * sum(parameter.numel() for parameter in without_peft(model).parameters())
    if (count := sum(tensor.numel() for tensor in shapes.values())) > most:
        raise ValueError(f"it holds {count} numbers, expected {most} at most: {MOST_BASES} times the base's.")
    exact = exact_targets(config, shapes)
    if isinstance(exact, FunLoraConfig):
        # The identity takes no time on the meta device and has the same shapes as other initializations.
        exact.init_weights = True
    try:
        expected = get_peft_model_state_dict(adapted_shape(model, exact), save_embedding_layers=False)
    except Exception as error:  # PEFT raises many types for values that make no sense
        raise ValueError(f"its config makes no adapter of this model: {brief(error)}") from error
    problems = differences(expected, shapes)
    if problems:
        raise ValueError(f"its tensors are not those of its config on this model:\n{listed(problems)}")


def _check_names(config: PeftConfig, keys: Iterable[str], model: nn.Module) -> None:
    """Raise a ValueError unless a model has the layers in the keys of saved tensors and those in `modules_to_save`.

    PEFT reads the latter as regexes, and accepts any end of a name as a module, even an empty one.
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
    """Return the names of the layers that have an adapter's tensors: the part of a key before the method's prefix."""
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(config.peft_type)]
    layers = set()
    for key in keys:
        parts = plain_key(key).split(".")
        own = next((index for index, part in enumerate(parts) if part.startswith(prefix)), 0)
        if parts[own] != _CLASS_VECTOR:
            layers.add(".".join(parts[:own]))
    return layers - {""}


def _check_sizes(config: FunLoraConfig, shapes: Mapping[str, torch.Tensor]) -> None:
    """Compare the config's sizes with the tensors, before anything of these sizes is created."""
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


def _check_fields(config: PeftConfig, shapes: Mapping[str, torch.Tensor]) -> None:
    """Refuse large sizes and counts of another method, since their effect is unknown here, and keys that PEFT would run as a regex,
    except names with one wildcard: some regexes never end.
    """
    for field, value in vars(config).items():
        values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        large = [entry for entry in values if isinstance(entry, int) and abs(entry) > MOST_COUNT]
        if large and "seed" not in field and "prng" not in field:
            raise ValueError(f"`{field}` has {large[0]}, expected {MOST_COUNT} at most.")
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
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise ValueError(f"{source!r}: `bias` is {bias!r}, which would change the base, expected 'none'.")
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


def brief(error: BaseException) -> str:
    """Return the readable part of an error's text."""
    text, _, _ = str(error).partition("\nException raised from")  # torch's own stack
    return shortened(text.strip() or type(error).__name__, _MOST_TEXT)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
