"""Read an untrusted base: the one that an adapter's config names, or the one in a folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from diffusers.models import UNet2DModel
from peft import PeftConfig
from safetensors import SafetensorError, safe_open

from ..utils.checks import check_class_label, check_class_name, one_form, shortened
from ..utils.files import read_mapping
from .untrusted_adapter import fetch_repository


UNET_FOLDER = "unet"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
PIPELINE = "model_index.json"
# The generator of a run: `model` if the strategy trains it after task 1, else the base.
GENERATOR_FOLDERS = ("model", "base")
# Ids and names of a thousand classes take about 50 kB.
MOST_CONFIG = 2**24
# Files of a pipeline's repository, or of one that is the U-Net itself.
_UNET_FILES = [f"{place}{name}" for place in ("", f"{UNET_FOLDER}/") for name in ("*.json", "*.safetensors")]
# Modules are built one by one, also on the meta device: for a large count, time runs out before memory.
MOST_LAYERS = 64
# The limit for numbers such as channels, and those for some others; diffusers' largest U-Nets have images of 256 x 256.
_MOST_NUMBER = 2**16
_LIMITS = {
    "sample_size": 4096,
    "layers_per_block": MOST_LAYERS,
    "mid_block_layers": MOST_LAYERS,
    "num_class_embeds": 2**24,
}
# What the solvers assume about the scheduler, whose own steps are not used.
_SCHEDULE = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}
_COMPONENTS = {"unet": ("diffusers", "UNet2DModel"), "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler")}


def check_base_folder(folder: Path) -> None:
    """Raise a ValueError that names the file, unless the JSON of a pipeline, U-Net or scheduler names only the classes of such a
    base and sizes within limits, and the U-Net's tensors are those of a U-Net without adapters. Without this check, diffusers would
    import any library that a file names, build models of any size, and only warn about missing tensors.
    """
    if (folder / PIPELINE).is_file():
        index = read_mapping(folder / PIPELINE, most_bytes=MOST_CONFIG)
        for name, component in _COMPONENTS.items():
            if name in index and index[name] != list(component):
                _refuse(folder, index, name, f"{list(component)}: no other library is loaded")
        if not isinstance(index.get("_class_name"), str):
            _refuse(folder, index, "_class_name", "the name of a pipeline: no code of a folder is run")
        for name, kind in (("class_ids", list), ("id2label", dict)):
            if not isinstance(index.get(name), (kind, type(None))):
                _refuse(folder, index, name, f"a {kind.__name__}")
    for place in (folder / UNET_FOLDER / "config.json", folder / "config.json", folder / SCHEDULER_CONFIG):
        if place.is_file():
            check_unet_config(read_mapping(place, most_bytes=MOST_CONFIG), field=os.fspath(place))
    for place in (folder / UNET_FOLDER, folder):
        for path in sorted(place.glob("*.safetensors")) if (place / "config.json").is_file() else []:
            try:
                with safe_open(path, framework="pt") as file:
                    _check_names(file.keys(), os.fspath(path))
            except SafetensorError as error:
                raise ValueError(f"{os.fspath(path)!r} is not a valid safetensors file: {error}.") from error
        for path in sorted(place.glob("*.index*.json")):
            check_shards(path)


def _refuse(folder: Path, index: Mapping[str, Any], name: str, expected: str) -> NoReturn:
    found = shortened(repr(index.get(name)), 100)
    raise ValueError(f"{os.fspath(folder / PIPELINE)!r} has `{name}` {found}, expected {expected}.")


def check_velocity_unet(config: Mapping[str, Any], *, field: str) -> None:
    """Raise a ValueError that names the field unless a U-Net of this config can give velocities: its time is 1000 * sigma, which has
    fractions and falls to 0, and its output has the shape of the image.
    """
    kind = config.get("time_embedding_type") or "positional"
    if kind != "positional":
        why = "takes its logarithm" if kind == "fourier" else "takes whole numbers only"
        raise ValueError(
            f"`{field}.time_embedding_type` is {kind!r}, expected 'positional': the time falls to 0 in fractions, and {kind!r} {why}."
        )
    if config.get("class_embed_type") is not None:
        raise ValueError(
            f"`{field}.class_embed_type` is {config['class_embed_type']!r}, expected None: each class has a row of an embedding "
            "(`num_class_embeds`)."
        )
    channels = [config.get(name, 3) for name in ("in_channels", "out_channels")]
    if channels[0] != channels[1]:
        raise ValueError(
            f"`{field}.out_channels` is {channels[1]}, expected {channels[0]}, its `in_channels`: a velocity has the shape of the "
            "image."
        )


def check_velocity_scheduler(config: Mapping[str, Any], *, field: str) -> None:
    """Raise a ValueError that names the field if the solvers do not support a setting in a scheduler's config."""
    for name, expected in _SCHEDULE.items():
        if config.get(name, expected) != expected:
            raise ValueError(
                f"`{field}.{name}` is {config[name]}, expected {expected}: the solvers take even steps from sigma 1 to 0 and call the "
                "U-Net with 1000 * sigma."
            )


def check_velocity_base(folder: Path, *, field: str) -> None:
    """Raise a ValueError that names the field unless FunLoraPipeline accepts the U-Net in a folder and, in a pipeline, its scheduler.

    Args:
        folder: folder of a pipeline, or of its U-Net alone.
        field: its name in an error.
    """
    check_base_folder(folder)
    check_velocity_unet(UNet2DModel.load_config(folder, subfolder=_unet_subfolder(folder)), field=f"{field}.unet")
    if (folder / PIPELINE).is_file():
        check_velocity_scheduler(
            read_mapping(folder / SCHEDULER_CONFIG, most_bytes=MOST_CONFIG), field=f"{field}.scheduler"
        )


def load_base(config: PeftConfig, *, local_files_only: bool = False) -> UNet2DModel:
    """Load the U-Net that an adapter was trained for, from the folder or repository of a pipeline or of the U-Net itself.

    Raises:
        ValueError: the config names no base, or one that cannot be loaded.
    """
    name = config.base_model_name_or_path
    if not name:
        raise ValueError(
            "`base_model_name_or_path` is None: the adapter's config names no base. Pass `model`, its U-Net."
        )
    try:
        if os.path.isdir(name):
            return read_unet(Path(name))
        how: dict[str, Any] = {"revision": config.revision, "local_files_only": local_files_only}
        return read_unet(fetch_repository(name, _UNET_FILES, **how))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`base_model_name_or_path` is {name!r}, from which no UNet2DModel could be loaded: {error} Pass `model`, the base's "
            "U-Net."
        ) from error


def base_classes(folder: Path) -> dict[int, str]:
    """Return id -> name of the classes that a pipeline's U-Net knows without adapters, in the order of its class embedding's rows.

    Raises:
        OSError: no U-Net in the folder.
        ValueError: a file that is not the JSON of a pipeline.
    """
    check_base_folder(folder)
    try:
        index = read_mapping(folder / PIPELINE, most_bytes=MOST_CONFIG) if (folder / PIPELINE).is_file() else {}
        rows = UNet2DModel.load_config(folder, subfolder=_unet_subfolder(folder)).get("num_class_embeds") or 0
        classes = class_names(index.get("class_ids") or range(rows), index.get("id2label") or {})
        if len(classes) != rows:
            raise ValueError(
                f"`class_ids` has {len(classes)} different ids, expected {rows}, one for each row (`num_class_embeds`)."
            )
        return classes
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The classes of the base {os.fspath(folder)!r} cannot be read: {shortened(str(error), 1000)}"
        ) from error


def class_names(class_ids: Iterable[Any], id2label: Mapping[Any, Any]) -> dict[int, str]:
    """Return id -> name, in the order of the ids, from values of a file; an id without a name has the id as its name.

    Raises:
        ValueError: invalid ids or names.
    """
    try:
        if unnamed := [
            class_id for class_id, name in id2label.items() if not (isinstance(name, str) and name.strip())
        ]:
            raise ValueError(f"{unnamed[0]!r} has no text for a name")
        names = {int(class_id): name for class_id, name in id2label.items()}
        ids = [(class_id, int(class_id)) for class_id in class_ids]
        if any(isinstance(given, bool) or (not isinstance(given, str) and given != number) for given, number in ids):
            raise ValueError("not whole numbers")
        classes = {number: names.get(number, str(number)) for _, number in ids}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"`class_ids` is {shortened(repr(class_ids), 100)} and `id2label` {shortened(repr(id2label), 100)}, expected a list "
            f"of ids and a mapping of ids to names: {error}."
        ) from error
    for class_id, name in classes.items():
        check_class_label(class_id)
        check_class_name(name)
    if unknown := sorted(names.keys() - classes.keys()):
        raise ValueError(f"`id2label` names {unknown}, expected ids of the base's classes: {list(classes)}.")
    check_names_differ(classes)
    return classes


def check_names_differ(id2label: Mapping[int, str]) -> None:
    """Raise a ValueError if two classes have the same name, in any form of Unicode."""
    twice = sorted(name for name, count in Counter(map(one_form, id2label.values())).items() if count > 1)
    if twice:
        raise ValueError(f"`class_name` {', '.join(map(repr, twice))} is used for two classes: pass another name.")


def read_unet(folder: Path) -> UNet2DModel:
    """Load the U-Net in a local folder of a pipeline or of the U-Net itself.

    Raises:
        ValueError: it cannot be loaded, or its file lacks tensors or has others, about which diffusers only warns.
    """
    check_base_folder(folder)
    source = os.fspath(folder)
    try:
        unet, found = UNet2DModel.from_pretrained(
            folder, subfolder=_unet_subfolder(folder), use_safetensors=True, output_loading_info=True
        )
    # A U-Net's constructor raises many types for invalid arguments.
    except Exception as error:
        raise ValueError(f"The U-Net in {source!r} cannot be loaded: {shortened(str(error), 1000)}") from error
    _check_names(found.get("unexpected_keys", ()), source)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: keys for kind in kinds if (keys := found.get(kind))}
    if wrong:
        listed = "; ".join(f"{kind}: {', '.join(map(str, list(keys)[:5]))}" for kind, keys in wrong.items())
        raise ValueError(f"The U-Net in {source!r} does not have the tensors that its config makes: {listed}.")
    return unet.eval()


def check_shards(index: Path) -> None:
    """Refuse an index that names other files than safetensors in its folder: diffusers would unpickle a `.bin`."""
    shards = read_mapping(index, most_bytes=MOST_CONFIG).get("weight_map")
    names = shards.values() if isinstance(shards, dict) else [shards]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ValueError(
                f"{os.fspath(index)!r} names the file {shortened(repr(name), 100)}, expected safetensors files in the same "
                "folder: nothing else is read."
            )


def _check_names(names: Iterable[str], source: str) -> None:
    wrapped = next((name for name in names if ".base_layer." in name), None)
    if wrapped is not None:
        raise ValueError(
            f"{source!r} has the tensor {wrapped!r}: it was saved with adapters inside, with names that no U-Net has. Save the "
            "base by `FunLoraPipeline.save_pretrained`, or after `unload()` of its adapters."
        )


def _unet_subfolder(folder: Path) -> str | None:
    return UNET_FOLDER if (folder / UNET_FOLDER).is_dir() else None


def check_unet_config(config: Mapping[str, Any], *, field: str) -> None:
    """Raise a ValueError unless every number of a U-Net's config, also in lists, and the length of every list are within limits."""
    if not isinstance(config, Mapping):
        raise ValueError(f"`{field}` is a {type(config).__name__}, expected a mapping of UNet2DModel arguments.")
    for name, value in config.items():
        entries = value if isinstance(value, (list, tuple)) else [value]
        if len(entries) > MOST_LAYERS:
            raise ValueError(f"`{field}.{name}` has {len(entries)} entries, expected {MOST_LAYERS} at most.")
        most = _LIMITS.get(name, _MOST_NUMBER)
        for entry in entries:
            # In this form it also refuses NaN.
            if isinstance(entry, (int, float)) and not -most <= entry <= most:
                raise ValueError(
                    f"`{field}.{name}` has {shortened(repr(entry), 100)}, expected numbers of {most} at most."
                )
