"""One folder for each class: `adapters/class_<id>/` in PEFT's format, with a card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ..cards.model_cards import adapter_card, place_of
from ..recipes.reading import MOST_BYTES, load_yaml
from ..tuner import FunLoraConfig
from ..tuner.hotswap import SAVED_PREFIX, plain_key
from ..tuner_base.offloading import is_offloaded
from ..tuner_base.wrappers import has_class, without_peft
from ..utils.checks import check_choice, check_class_label, check_class_name, listed, shortened
from ..utils.files import read_mapping, whole_folder
from ..utils.tensors import not_finite
from .base_fingerprint import FingerprintCheck, base_fingerprints
from .untrusted_base import PIPELINE, base_classes


ADAPTERS_FOLDER = "adapters"
# A LoRA of a pretrained pipeline for each task, as diffusers saves it.
LORAS_FOLDER = "loras"
_PREFIX = "class_"


def adapter_name(class_id: int) -> str:
    """Return the name of a class's adapter and of its folder."""
    return f"{_PREFIX}{class_id}"


def adapter_folders(adapters: Path) -> list[Path]:
    """Return the `class_<id>` folders below `adapters`, sorted by id; empty if there are none."""
    found = [(class_in_name(path.name), path) for path in adapters.glob(f"{_PREFIX}*")]
    return [path for _, path in sorted((number, path) for number, path in found if number is not None)]


def class_in_name(name: str) -> int | None:
    """Return the id in a name `class_<id>`; None for another name."""
    number = name.removeprefix(_PREFIX)
    return int(number) if name.startswith(_PREFIX) and number.isascii() and number.isdecimal() else None


def class_of(config: PeftConfig | Mapping[str, Any], name: str = "") -> tuple[Any, Any]:
    """Return id and name of an adapter's class; None for what is unknown.

    FunLoRA's configuration has both. For other methods, the id may be in `name`, that of the adapter or of its folder.
    """
    settings = config if isinstance(config, Mapping) else vars(config)
    label = settings.get("class_label")
    return class_in_name(name) if label is None else label, settings.get("class_name")


def known_class(config: PeftConfig, source: str, class_label: int | None, class_name: str | None) -> tuple[int, str]:
    """Return id and name of an adapter's class: those given, else those of `class_of`, else the id as its name.

    Raises:
        ValueError: no id, or an invalid id or name.
    """
    label, own_name = class_of(config)
    label = label if class_label is None else class_label
    if label is None:
        raise ValueError(f"The adapter {source!r} does not say which class it is: pass `class_label`.")
    known_name = next(one for one in (class_name, own_name, str(label)) if one is not None)
    check_class_label(label)
    check_class_name(known_name)
    return label, known_name


def adapter_class(folder: Path) -> dict[str, Any]:
    """Return the class of the adapter in a run's folder: `{"class_label": id or None, "class_name": name or None}`.

    They come from `class_of`; if the configuration has no name, the card may have it.

    Raises:
        ValueError: a damaged file, or an invalid id or name; it names the file.
    """
    file = folder / CONFIG_NAME
    label, name = class_of(read_mapping(file), folder.name)
    card = folder / "README.md"
    if name is None and card.is_file():
        file, name = card, _name_in_card(card)
    try:
        check_class_label(label)
        check_class_name(name)
    except ValueError as error:
        raise ValueError(f"{os.fspath(file)!r}: {error}") from error
    return {"class_label": label, "class_name": name}


def _name_in_card(card: Path) -> Any:
    """`class_name` in the card's front matter, which is YAML between two lines of "---"."""
    with open(card, "rb") as file:
        start = file.read(MOST_BYTES + 1)
    lines = [line.rstrip() for line in start.lstrip().splitlines()]
    if lines[:1] != [b"---"] or (len(start) <= MOST_BYTES and b"---" not in lines[1:]):
        return None
    try:
        if b"---" not in lines[1:]:
            raise ValueError(f"it does not end in {MOST_BYTES} bytes")
        metadata = load_yaml(b"\n".join(lines[1 : lines.index(b"---", 1)]))
    except ValueError as error:
        raise ValueError(f"{os.fspath(card)!r} has no valid front matter: {error}") from error
    return metadata.get("class_name") if isinstance(metadata, dict) else None


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike,
    adapter_name: str = "default",
    *,
    class_label: int | None = None,
    class_name: str | None = None,
) -> None:
    """Write one adapter of a model: `adapter_config.json`, `adapter_model.safetensors` and a card, `README.md`.

    PEFT's `save_pretrained` writes neither the card nor the fingerprint by which `load_adapter` and `funlora verify` recognize
    the base. The folder appears whole or not at all, and replaces the folder of an adapter. Equal adapters give equal bytes.

    Args:
        model (`torch.nn.Module`): The model with the adapter: a PeftModel, or a model with adapters inside, such as
            `pipe.unet` after `add_adapter`; it may be compiled or wrapped for several processes, of which one calls this.
        folder (`str` or `os.PathLike`): the folder to write.
        adapter_name (`str`, *optional*, defaults to `"default"`): name of the adapter in the model.
        class_label (`int`, *optional*): id of the class; None: the one in the config, or in `adapter_name` as `class_<id>`.
        class_name (`str`, *optional*): its name; None: the one in the config.

    Raises:
        ValueError: a model without adapters, no such adapter, one that is merged into the base, is offloaded or has numbers that
            are not finite, an invalid id or name, the id of a class of the base (if that was loaded from a folder), or a folder with
            other content. Nothing is written.
        WriteError: the folder cannot be written (an OSError).
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    configs = adapter_configs(model)
    if not configs:
        raise ValueError(
            f"`model` is a {type(model).__name__}, expected a PeftModel, or a model with adapters inside such as `pipe.unet` "
            "after `add_adapter`: see `peft.get_peft_model`."
        )
    check_choice("adapter_name", adapter_name, tuple(configs))
    check_class_label(class_label)
    check_class_name(class_name)
    folder = Path(folder)
    check_replaceable(folder)
    parts = {key: parameter for key, parameter in model.named_parameters() if f".{adapter_name}." in f"{key}."}
    if is_offloaded(model, parts.values()):
        raise ValueError(f"The adapter {adapter_name!r} is offloaded with the model: save it before you offload.")
    if problems := not_finite(parts):
        raise ValueError(f"The adapter {adapter_name!r} cannot be saved:\n{listed(problems)}")
    label = class_of(configs[adapter_name], adapter_name)[0] if class_label is None else class_label
    base = without_peft(model)
    _check_no_class_of_the_base(label, base)
    # As in PEFT's `save_pretrained`; the order of sets differs between processes.
    config = copy(configs[adapter_name])
    for key, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, key, sorted(value))
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = vars(base).get("name_or_path") or None
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        config.auto_mapping |= _pipeline_class(base)
    if isinstance(config, FunLoraConfig):
        config.class_label = config.class_label if class_label is None else class_label
        config.class_name = class_name or config.class_name
        if config.base_fingerprint is None or FingerprintCheck(model).fits(config.base_fingerprint) is False:
            config.base_fingerprint = base_fingerprints(model)
    # A U-Net has no token embedding for which PEFT would ask the Hub.
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    saved = {f"{SAVED_PREFIX}{plain_key(key)}": tensor.clone() for key, tensor in tensors.items()}
    name = adapter_name if class_label is None else f"{_PREFIX}{class_label}"
    save_adapter_tensors(config, saved, folder, name=name, class_name=class_name)


def _pipeline_class(base: Any) -> dict[str, str]:
    """Return the class of the pipeline that a model was loaded with, for its card; nothing if that is unknown."""
    folder = Path(getattr(getattr(base, "config", None), "_name_or_path", None) or "").parent
    if has_class(base, "UNet2DModel") or not (folder / PIPELINE).is_file():
        return {}
    return {"pipeline_class": str(read_mapping(folder / PIPELINE).get("_class_name"))}


def adapter_configs(model: Any) -> dict[str, PeftConfig]:
    """Return the configurations of the adapters in a PeftModel or in a model with adapters inside, by name; may be empty."""
    configs = getattr(model, "peft_config", None) if isinstance(model, nn.Module) else None
    return configs if isinstance(configs, dict) else {}


def _check_no_class_of_the_base(label: int | None, base: Any) -> None:
    """Raise a ValueError for the id of a class of the base, if the base came from a local pipeline folder."""
    if label is None or not has_class(base, "UNet2DModel"):  # other models have no class ids
        return
    name = base.config.get("_name_or_path") or ""
    for folder in (Path(name), Path(name).parent):  # of the pipeline, or of its U-Net
        if (folder / PIPELINE).is_file() and label in (known := base_classes(folder)):
            raise ValueError(
                f"`class_label` is {label}, a class of the base in {os.fspath(folder)!r}, expected none of {shortened(str(list(known)), 300)}: "
                "pass another `class_label`; the adapter works with any id."
            )


def check_replaceable(folder: Path) -> None:
    """Raise a ValueError if the folder exists and has other files than an adapter's and hidden ones."""
    files = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "README.md"}
    entries = folder.iterdir() if folder.exists() else ()
    others = [
        entry.name
        for entry in entries
        if entry.name not in files and not (entry.name.startswith(".") and entry.is_file())
    ]
    if others:
        raise ValueError(
            f"`folder` is {os.fspath(folder)!r}, which has other contents than an adapter, which would be lost: pass a separate "
            f"folder.\n{listed(others)}"
        )


def save_adapter_tensors(
    config: PeftConfig,
    tensors: Mapping[str, torch.Tensor],
    folder: Path,
    *,
    name: str | None = None,
    class_name: str | None = None,
) -> None:
    """Write the same bytes as `save_adapter`, from tensors by the keys under which PEFT saves them. `name` is the name of the adapter,
    which may have its class as `class_<id>`; None: the name of the folder."""
    name = name or folder.name
    label, own_name = class_of(config, name)
    with whole_folder(folder) as temporary:
        config.save_pretrained(os.fspath(temporary))
        contents = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contents, temporary / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        card = adapter_card(
            config,
            class_label=label,
            class_name=class_name or own_name or (name if label is None else str(label)),
            parameters=sum(tensor.numel() for tensor in tensors.values()),
            num_bytes=(temporary / SAFETENSORS_WEIGHTS_NAME).stat().st_size,
            place=place_of(config.base_model_name_or_path, config.revision),
        )
        card.save(temporary / "README.md")
