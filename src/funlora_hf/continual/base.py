"""The base generator: build it, write it as a pipeline folder, load it again; or find one that exists already."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from torch import nn

from ..adapters.class_folder import ADAPTERS_FOLDER, adapter_class, adapter_folders, class_in_name
from ..adapters.untrusted_adapter import fetch
from ..adapters.untrusted_base import GENERATOR_FOLDERS, PIPELINE, base_classes, check_velocity_base
from ..hub.classes_json import known_contents
from ..hub.find import BASE_CONTENTS, find_contents
from ..hub.repository import NO_ANSWER, HubRepository
from ..sampling.pipeline import FunLoraPipeline
from ..utils.checks import check_at_least_one
from ..utils.files import read_mapping, whole_folder
from ..utils.quiet import quiet_loading
from ..utils.seeds import derive_seed
from .compilation import compile_blocks
from .config import ContinualTrainingArguments
from .strategy import Setting, Trainable


logger = logging.getLogger(__name__)

# The phase of task 1, the same for all strategies that start from a base.
BASE_PHASE = "base"


def trainable_unet(setting: Setting, num_classes: int) -> Trainable:
    """Build a new U-Net with a class embedding, in training mode, of which everything is trained; equal seeds give equal weights.

    Raises:
        ValueError: arguments that UNet2DModel does not accept.
    """
    training = setting.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(training.seed, "unet"))
        unet = _unet(setting.model.unet, num_classes).to(setting.device).train()
    arrange(unet, training, compiled=training.torch_compile)
    return Trainable(unet, dict(unet.named_parameters()))


def set_class_vectors(unet: UNet2DModel, vectors: torch.Tensor, num_classes: int) -> None:
    """Replace the class embedding of a U-Net, in place: rows of further classes are the mean of the vectors, where FunLoRA's
    class vector also starts.

    Args:
        unet: a U-Net with a class embedding.
        vectors: the first rows, `(n, dim)`, n <= num_classes.
        num_classes: number of rows of the new embedding.
    """
    embedding = nn.Embedding(num_classes, vectors.shape[1])
    with torch.no_grad():
        embedding.weight.copy_(torch.cat([vectors, vectors.mean(dim=0).expand(num_classes - len(vectors), -1)]))
    unet.class_embedding = embedding.to(unet.device)
    unet.register_to_config(num_class_embeds=num_classes)


def arrange(unet: UNet2DModel, training: ContinualTrainingArguments, *, compiled: bool) -> None:
    """Give a U-Net the run's memory format and, if `compiled`, compile its blocks; values stay."""
    if training.channels_last:
        unet.to(memory_format=torch.channels_last)
    if compiled:
        compile_blocks(unet)


def unet_shape(unet_config: Mapping, num_classes: int) -> UNet2DModel:
    """Build the U-Net without values, on the meta device: for checks and counts.

    Raises:
        ValueError: arguments that UNet2DModel does not accept, or more parameters than fit into memory.
    """
    with torch.device("meta"):
        unet = _unet(unet_config, num_classes)
    numbers = sum(parameter.numel() for parameter in unet.parameters())
    if 4 * numbers > (memory := psutil.virtual_memory().total):
        raise ValueError(
            f"`unet_config` makes a UNet2DModel of {numbers} parameters, {4 * numbers} bytes, expected less than the memory of "
            f"this machine, {memory}: choose fewer `block_out_channels`."
        )
    return unet


def base_shape(setting: Setting) -> UNet2DModel:
    """Build a run's base without values: the one that exists, or the one that task 1 will train."""
    if not setting.has_base:
        return unet_shape(setting.model.unet, len(setting.tasks[0].class_ids))
    config, *_ = UNet2DModel.extract_init_dict(UNet2DModel.load_config(setting.base_dir, subfolder="unet"))
    return unet_shape(config, config["num_class_embeds"])


def _unet(unet_config: Mapping, num_classes: int) -> UNet2DModel:
    try:
        return UNet2DModel(**{**unet_config, "num_class_embeds": num_classes})
    # The constructor raises many types of errors for wrong arguments.
    except Exception as error:
        raise ValueError(f"`unet_config` does not make a UNet2DModel: {error}") from error


def save_base(unet: UNet2DModel, folder: Path, class_ids: Sequence[int], class_names: Mapping[int, str]) -> None:
    """Write a pipeline folder, whole or not at all; row i of the class embedding is for `class_ids[i]`."""
    with whole_folder(folder) as temporary:
        make_pipeline(unet, class_ids, class_names).save_pretrained(temporary)


def make_pipeline(unet: UNet2DModel, class_ids: Sequence[int], class_names: Mapping[int, str]) -> FunLoraPipeline:
    """Make a pipeline without progress bars; row i of the U-Net's class embedding is for `class_ids[i]`."""
    names = {class_id: class_names[class_id] for class_id in class_ids}
    pipe = FunLoraPipeline(unet, FlowMatchEulerDiscreteScheduler(), list(class_ids), names)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(folder: Path, setting: Setting) -> FunLoraPipeline:
    """Load the pipeline in a folder for sampling on the run's device, without progress bars."""
    with quiet_loading():
        pipe = FunLoraPipeline.from_pretrained(folder).to(setting.device)
    # Not compiled, since sampling keeps effective weights between calls.
    arrange(pipe.unet, setting.training, compiled=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def label_rows(class_ids: Sequence[int], batch_class_ids: torch.Tensor) -> torch.Tensor:
    """Return the rows of a class embedding for a batch, `(batch,)`, int64.

    Args:
        class_ids: row i belongs to `class_ids[i]`.
        batch_class_ids: `(batch,)`, int64, each of them in `class_ids`.
    """
    known = torch.tensor(list(class_ids), device=batch_class_ids.device)
    return (batch_class_ids[:, None] == known[None, :]).int().argmax(dim=1)


@dataclass(frozen=True)
class ExistingBase:
    """A base that the run does not train.

    Args:
        folder: its pipeline folder on this machine.
        source: where others find its U-Net: the folder's `unet/`, or the repository.
        classes: id -> name of every known class, of the base's rows and of adapters.
        image_size: edge of its images in pixels.
        channels: channels of its images.
        taken: id -> name of the classes of adapters and banks next to it: those of the run whose folder has it, or those in its
            repository.
    """

    folder: Path
    source: str
    classes: dict[int, str]
    image_size: int
    channels: int
    taken: Mapping[int, str] = field(default_factory=dict)

    def with_adapters(self, adapters: Path) -> ExistingBase:
        """Return this base, which also knows the classes of the adapters below a folder."""
        found = [adapter_class(folder) for folder in adapter_folders(adapters)]
        names = {one["class_label"]: one["class_name"] or str(one["class_label"]) for one in found}
        return replace(self, classes={**self.classes, **names})


def local_source(folder: Path) -> str:
    """Return the name that adapters give the U-Net of a local base: it starts with "/" or "./", unlike a repository's name."""
    return os.path.join(os.curdir, folder / "unet")


def _in_repository(name: str, revision: str | None) -> dict[int, str]:
    """Return id -> name of a repository's folders `class_<id>`, on its main branch and in a revision; empty without the Hub."""
    try:
        repository = HubRepository(name, create=False)
        now = repository.files()
        files = now if revision is None else now | repository.files(revision)
        rows = known_contents(name, now).classes.values()
    except (OSError, NO_ANSWER) as error:
        logger.warning(
            "The files of the repository %r could not be listed, so new classes may get ids of adapters in it: %s",
            name,
            str(error).partition("\n")[0],
        )
        return {}
    found = [class_in_name(Path(file).parent.name) for file in files]
    ids = {number: str(number) for number in found if number is not None}
    return ids | {row.class_label: row.class_name for row in rows}


def find_base(name: str, *, revision: str | None = None, unet_config: Mapping[str, Any] | None = None) -> ExistingBase:
    """Find and check the base that `base_model` names.

    Args:
        name: a pipeline folder, the folder of a run, or a repository on the Hub, which is downloaded.
        revision: branch, tag or commit of a repository.
        unet_config: the `unet_config` of the run's arguments; None: not given.

    Raises:
        FileNotFoundError: the folder does not exist, or has no pipeline.
        ValueError: its U-Net has no class embedding, or differs from `unet_config`; a revision of a folder.
    """
    local = Path(name)
    if local.is_dir():
        if revision is not None:
            raise ValueError(
                f"`base_model_revision` is {revision!r}, but `base_model` {name!r} is a folder, which has none: leave it out."
            )
        # In the folder of a run, its generator.
        places = (local, *(local / place for place in GENERATOR_FOLDERS))
        folder = next((place for place in places if (place / PIPELINE).is_file()), local)
        source = local_source(folder)
    else:
        try:
            folder, source = fetch(name, BASE_CONTENTS, revision=revision), name
        except FileNotFoundError as error:
            raise FileNotFoundError(f"`base_model` {error}") from error
    if not (folder / PIPELINE).is_file():
        raise FileNotFoundError(
            f"`base_model` is {name!r}, expected a pipeline folder with a {PIPELINE}, such as the base/ folder of a run, or "
            "the run itself."
        )
    if "text_encoder" in (index := read_mapping(folder / PIPELINE)):
        raise ValueError(
            f"`base_model` is {name!r}, a {index.get('_class_name')}, which reads prompts, expected a generator of classes: train one, "
            "teach this one concepts by `funlora personalize`, or learn classes on it by --strategy diffclass --strategy_options "
            f"pretrained={name}."
        )
    check_velocity_base(folder, field="base_model")
    config = UNet2DModel.load_config(folder, subfolder="unet")
    for number in ("sample_size", "in_channels"):
        check_at_least_one(number, config.get(number))
    if not config.get("num_class_embeds"):
        raise ValueError(
            f"`base_model` {name!r} has a U-Net without a class embedding (`num_class_embeds`), which class vectors "
            "replace: train a class-conditional base."
        )
    for argument, given in (unet_config or {}).items():
        if argument in config and config[argument] != given:
            raise ValueError(
                f"`unet_config.{argument}` is {given!r}, but the U-Net of `base_model` {name!r} has {config[argument]!r}: leave "
                "`unet_config` out, or name another base."
            )
    if local.is_dir():
        # The adapters of a run are next to its base.
        run = folder.absolute().parent if folder.name in GENERATOR_FOLDERS else None
        taken = {} if run is None else find_contents(run).classes()
    else:
        taken = _in_repository(name, revision)
    base = ExistingBase(folder, source, base_classes(folder), config["sample_size"], config["in_channels"], taken)
    return base.with_adapters(folder / ADAPTERS_FOLDER)
