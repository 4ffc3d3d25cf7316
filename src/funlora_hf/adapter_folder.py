"""One class, one folder: `adapters/class_<id>/` as PEFT reads it, with a card. Knows no pipeline and no training."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from .files import whole_folder


ADAPTERS_FOLDER = "adapters"
_PREFIX = "class_"


def adapter_name(class_id: int) -> str:
    """Name of the adapter, and of the folder, of a class."""
    return f"{_PREFIX}{class_id}"


def adapter_folders(adapters: Path) -> list[Path]:
    """The `class_<id>` folders below `adapters` by rising id; empty if there are none."""
    folders = [path for path in adapters.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def save_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """
    Write one adapter of a model: `adapter_config.json`, `adapter_model.safetensors` and `README.md`.

    The folder appears whole or not at all, and takes the place of one that is there. Equal adapters give equal bytes.

    Args:
        model (`PeftModel`): holds the adapter.
        name (`str`): of the adapter in the model.
        folder (`Path`): to write.
    """
    with whole_folder(folder) as temporary:
        # The U-Net has no token embedding that PEFT would have to look for on the Hub.
        model.save_pretrained(os.fspath(temporary), selected_adapters=[name], save_embedding_layers=False)
        written = temporary / name
        if name != "default":
            for file in written.iterdir():
                os.replace(file, temporary / file.name)
            written.rmdir()
        _card(model, name).save(temporary / "README.md")


def _card(model: PeftModel, name: str) -> ModelCard:
    config = model.peft_config[name]
    numbers = sum(parameter.numel() for key, parameter in model.named_parameters() if key.endswith(f".{name}"))
    class_name = config.class_name or name
    return ModelCard.from_template(
        ModelCardData(library_name="peft", tags=["funlora", "continual-learning", "flow-matching", "diffusers"]),
        template_str=_template(),
        class_name=class_name,
        class_label="not set" if config.class_label is None else config.class_label,
        function=config.function,
        operation=config.operation,
        num_functions=config.num_functions,
        rank=config.r,
        ratio=config.ratio,
        parameters=numbers,
    )


def _template() -> str:
    packaged = files("funlora_hf").joinpath("model_card_template.md")
    # In an editable install the template is not inside the package but at the top of the repository.
    source = packaged if packaged.is_file() else Path(__file__).parents[2] / "model_card_template.md"
    return source.read_text(encoding="utf-8")
