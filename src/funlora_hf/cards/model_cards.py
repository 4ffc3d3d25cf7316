"""Model cards: what a reader of the Hub needs to use an adapter, a base or a folder of adapters."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import diffusers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig, PeftType

from ..tuner import FunLoraConfig
from ..tuner.learning_rates import alpha_rate
from ..utils.checks import FINGERPRINT_DTYPES


_HUB = "https://huggingface.co"
_TASK = "unconditional-image-generation"  # the Hub has no name for class-conditional generation
# Strategies of concepts whose authors have published no code: ours are written from the paper.
RECONSTRUCTED = ("cns",)
_TAGS = ("continual-learning", "flow-matching", "class-conditional-image-generation")
# Characters with a meaning in Markdown, whether in a line, in a table cell or in a link.
_MARKUP = str.maketrans({character: f"\\{character}" for character in "`*_[]<>|~&#$"})
# The Hub reads two backslashes before a bracket as mathematics.
_MARKUP[ord("\\")] = "&#92;"
# Parts of diffusers' pipelines, by a word in the names of their classes.
_PARTS = {"UNet": "unet", "Transformer": "transformer", "Autoencoder": "vae", "Text": "text_encoder"}
_PARTS |= {"EncoderModel": "text_encoder"}
_YAML_BREAKS = str.maketrans("\x85\u2028\u2029", "   ")  # PyYAML does not read them as it writes them
_JOINERS = "\u200c\u200d"  # not printable, yet parts of words and of emoji


@dataclass(frozen=True)
class Place:
    """Where a reader of the card can load an adapter and its base from.

    A name that does not have the form "user/repo" counts as not on the Hub, so that no local path gets into a card.

    Args:
        source: repository of the adapter, "user/repo"; None: not on the Hub, and the snippet says path/to/...
        subfolder: folder of the adapter in it, such as "class_7"; None: at its root.
        base: repository of the base; None: not published, and the card says so.
        base_revision: branch, tag or commit of the base; None: its main branch.
        base_is_unet: the base's repository is the U-Net itself, not a pipeline with a folder unet/.
    """

    source: str | None = None
    subfolder: str | None = None
    base: str | None = None
    base_revision: str | None = None
    base_is_unet: bool = False


def place_of(base: str | None, revision: str | None) -> Place:
    """Return a base, if it is a repository; a local path does not help others."""
    named = repository(base)
    # A folder may have the form of a repository's name.
    if named is None or os.path.exists(named):
        return Place()
    return Place(base=named, base_revision=revision)


@dataclass(frozen=True)
class ClassRow:
    """One class in a card of many.

    Args:
        class_label: id of the class.
        class_name: its name.
        kind: what generates it, "base" or "adapter".
        parameters: number of parameters of its adapter; None: unknown, or a class of the base.
        num_bytes: size of its adapter's file; None: unknown, or a class of the base.
        accuracy: in %; None: not measured.
        link: folder of the adapter in the repository, such as "class_7"; None: not in the repository.
    """

    class_label: int
    class_name: str
    kind: str
    parameters: int | None = None
    num_bytes: int | None = None
    accuracy: float | None = None
    link: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("base", "adapter"):
            raise ValueError(f"`kind` is {self.kind!r}, expected 'base' or 'adapter': what generates the class.")


def adapter_card(
    config: PeftConfig,
    *,
    class_label: int | None,
    class_name: str,
    parameters: int,
    num_bytes: int | None = None,
    place: Place = Place(),
    results: Mapping[str, Any] | None = None,
    samples: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of one adapter, with the metadata of one of PEFT; what is not known is left out.

    Args:
        config: of the adapter. A FunLoRA adapter's `base_fingerprint` is shown if it has one. What the card says of use depends on
            the class of the base in its `auto_mapping`.
        class_label: id of the class; None: not set.
        class_name: its name, any text; empty: that of the repository, or of the method.
        parameters: numbers in the adapter, class vector included.
        num_bytes: of its file.
        place: where the adapter and its base are.
        results: contents of the results.json of the run that trained it.
        samples: file name of a picture of samples beside the card.
        license: identifier of a licence, as the Hub has them.
    """
    source = repository(place.source)
    method = PeftType(config.peft_type).value
    class_name = class_name.translate(_YAML_BREAKS) or (source or method).split("/")[-1]
    base_class = component_class(config)
    of_class = {"class_label": class_label, "class_name": class_name}
    return _card(
        "model_card_template.md",
        results,
        kind="adapter",
        base=place.base,
        base_revision=place.base_revision,
        accuracy=((results or {}).get("class_accuracy") or {}).get(str(class_label)),
        base_fingerprints=getattr(config, "base_fingerprint", None),
        metadata={
            "library_name": "peft",
            "license": license,
            "tags": [method.lower(), "diffusers", *(() if base_class else _TAGS)],
            "model_name": class_name
            if source is None
            else "/".join([source.split("/")[1], place.subfolder or ""]).rstrip("/"),
            "pipeline_tag": _task(base_class),
            **({} if base_class and class_label is None else of_class),
        },
        base_class=base_class,
        pipeline_class=_pipeline_class(config),
        takes_labels=_task(base_class) == _TASK,
        config=config,
        is_funlora=isinstance(config, FunLoraConfig),
        method=method,
        # A separate module registers the comparison methods with PEFT.
        package="funlora_hf.baselines" if type(config).__module__.startswith("funlora_hf.baselines") else "funlora_hf",
        source=source,
        place=place,
        class_label=class_label,
        class_name=class_name,
        parameters=parameters,
        num_bytes=num_bytes,
        samples=samples,
    )


def repository_card(
    repo_id: str | None,
    classes: Sequence[ClassRow],
    *,
    kind: str,
    base: str | None = None,
    base_revision: str | None = None,
    base_is_unet: bool = False,
    base_class: str | None = None,
    base_fingerprints: Mapping[str, str] | None = None,
    results: Mapping[str, Any] | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card at the root of a repository: of a base, alone or with adapters in subfolders, or of adapters of a base elsewhere.

    Its metadata are those of a diffusers pipeline or of PEFT adapters. What is not known is left out.

    Args:
        repo_id: "user/repo"; None: not on the Hub.
        classes: those that the base knows, if they should be named, and those of adapters.
        kind: "base" or "adapter": what the repository is loaded as.
        base: of adapters, the repository of their base; None: not published, and the card says so.
        base_is_unet: the base's repository is the U-Net itself, not a pipeline with a folder unet/.
        base_class: of adapters, the diffusers class of a base that is no `UNet2DModel`.
        base_fingerprints: of a base, name of a dtype -> SHA-256 of the base in it.
        base_revision, results, license: as for [`Place`] and in `adapter_card`.
    """
    repo_id = repository(repo_id)
    name = f"FunLoRA {'base' if kind == 'base' else 'adapters'}" if repo_id is None else repo_id.split("/")[1]
    tags = ["funlora", *([] if kind == "base" else ["diffusers"]), *([] if base_class else _TAGS)]
    library = "diffusers" if kind == "base" else "peft"
    return _card(
        "base_card_template.md",
        results,
        kind=kind,
        metadata={
            "library_name": library,
            "license": license,
            "tags": tags,
            "model_name": name,
            "pipeline_tag": _task(base_class),
        },
        base=base,
        base_revision=base_revision,
        base_fingerprints=base_fingerprints,
        title=_text(name),
        source=repo_id,
        base_is_unet=base_is_unet,
        base_class=base_class,
        known=[row.class_label for row in classes if row.kind == kind],
        example=next((row for row in classes if row.kind == "adapter" and row.link), None),
        table=_class_table(classes, repo_id),
        is_measured=any(row.accuracy is not None for row in classes),
    )


def concept_card(
    about: Mapping[str, Any],
    *,
    parameters: int,
    num_bytes: int,
    config: PeftConfig | None = None,
    is_tiny: bool = False,
    place: Place = Place(),
    license: str | None = None,
) -> ModelCard:
    """The card of a concept that a text-to-image pipeline has learned.

    Args:
        about: contents of its `concept.json`: name, token, noun, instance_prompt, strategy, family, resolution, in_model,
            layerwise.
        parameters: numbers of its rows and its adapter.
        num_bytes: of its weight files.
        config: of its adapter, if it has one.
        is_tiny: whether its base is the package's own.
        place: where the concept and its base are.
        license: identifier of a licence, as the Hub has them.
    """
    return _concept_card(
        about,
        parameters=parameters,
        size=_size(num_bytes),
        config=config,
        is_tiny=is_tiny,
        place=place,
        license=license,
    )


def concepts_card(
    abouts: Sequence[Mapping[str, Any]], *, is_tiny: bool = False, place: Place = Place(), license: str | None = None
) -> ModelCard:
    """The card at the root of a repository with a folder for each of some concepts.

    Args:
        abouts: contents of their `concept.json`, as for `concept_card`; the first one is the example.
        is_tiny, license: as for `concept_card`.
        place: the repository and the base.
    """
    table = [
        [
            *(_text(one[key]) for key in ("name", "token", "noun", "strategy")),
            " (reconstructed)" if one["strategy"] in RECONSTRUCTED else "",
        ]
        for one in abouts
    ]
    nothing: Mapping[str, Any] = dict.fromkeys(("name", "strategy", "instance_prompt", "family"), "")
    about = abouts[0] if abouts else {**nothing, "in_model": False, "layerwise": False}
    folder = about["name"] or None
    return _concept_card(about, table=table, folder=folder, config=None, is_tiny=is_tiny, place=place, license=license)


def _concept_card(
    about: Mapping[str, Any],
    *,
    config: PeftConfig | None,
    is_tiny: bool,
    place: Place,
    license: str | None,
    folder: str | None = None,
    **parts: Any,
) -> ModelCard:
    """The card of a concept or, with `table`, of several, of which `about` is one in the `folder`."""
    source = repository(place.source)
    name = about["name"] if source is None else "/".join([source.split("/")[1], place.subfolder or ""]).rstrip("/")
    data = ModelCardData(
        base_model=repository(place.base),
        base_model_relation=None if repository(place.base) is None else "adapter",
        library_name="diffusers" if config is None else "peft",
        license=license,
        model_name=name,
        pipeline_tag="text-to-image",
        instance_prompt=about["instance_prompt"] or None,
        tags=["text-to-image", "diffusers", "funlora"],
    )
    return ModelCard.from_template(
        data,
        template_str=_template("concept_template.md"),
        **about,
        text=_text,
        arguments=_arguments,
        in_code=json.dumps,
        source=source,
        subfolder=folder or place.subfolder,
        base=repository(place.base),
        base_revision=place.base_revision,
        base_link=_base_link(repository(place.base), place.base_revision),
        is_tiny=is_tiny,
        is_reconstructed=about["strategy"] in RECONSTRUCTED,
        method=None if config is None else PeftType(config.peft_type).value,
        config=config,
        is_funlora=isinstance(config, FunLoraConfig),
        title=name,
        **parts,
        fingerprints={
            dtype: (getattr(config, "base_fingerprint", None) or {}).get(dtype) for dtype in FINGERPRINT_DTYPES
        },
    )


def repository(name: str | None) -> str | None:
    """Return the name if it has the form of a repository on the Hub, "user/repo", else None."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name is not None and "/" in name else None


def _task(base_class: str | None) -> str:
    return _TASK if base_class is None or base_class.startswith("DiT") else "text-to-image"


def _base_mapping(config: PeftConfig) -> dict[str, Any]:
    """Return what the config says of the base's class; empty if it says nothing, or something else than a mapping."""
    return config.auto_mapping if isinstance(config.auto_mapping, dict) else {}


def component_class(config: PeftConfig) -> str | None:
    """The class of the base if it is that of a part of diffusers' pipelines, and no `UNet2DModel`."""
    base = _base_mapping(config)
    name, library = str(base.get("base_model_class")), str(base.get("parent_library"))
    is_part = re.fullmatch(f"[A-Za-z0-9]*({'|'.join(_PARTS)})[A-Za-z0-9]*", name) and name != "UNet2DModel"
    return name if is_part and library.startswith(("diffusers.", "transformers.")) else None


def _pipeline_class(config: PeftConfig) -> str | None:
    """Return the class of the pipeline that the base is a part of, if `save_adapter` knew it and diffusers has it."""
    name = _base_mapping(config).get("pipeline_class")
    return name if isinstance(name, str) and name.endswith("Pipeline") and name in dir(diffusers) else None


def _card(
    template: str,
    results: Mapping[str, Any] | None,
    *,
    kind: str,
    metadata: Mapping[str, Any],
    base: str | None = None,
    base_revision: str | None = None,
    accuracy: float | None = None,
    base_fingerprints: Mapping[str, str] | None = None,
    **parts: Any,
) -> ModelCard:
    """Return the card of a base or of adapters, depending on `kind`; the template gets `parts` and what all cards show."""
    results = results or {}
    base, dataset = repository(base), _dataset(results)
    # After its first task alone, the classifier of a run is trained on real images.
    is_synthetic = len(results.get("tasks", ())) > 1
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        # results.json names a local dataset by the last part of its path, so a name with an owner is on the Hub.
        datasets=[dataset] if dataset is not None and repository(dataset) else None,
        eval_results=_eval_results(results, dataset, accuracy, metadata.get("class_name")) if is_synthetic else None,
        **metadata,
    )
    # The end of the metadata is stripped, and a name may end with a Unicode space: so the tags come last.
    data.tags = data.pop("tags")
    return ModelCard.from_template(
        data,
        template_str=_template(template) + _template("run_template.md"),
        text=_text,
        size=_size,
        quote=quote,
        arguments=_arguments,
        results=results,
        dataset=dataset,
        kind=kind,
        base=base,
        base_revision=base_revision,
        part=next((part for word, part in _PARTS.items() if word in (parts["base_class"] or "")), None),
        base_link=_base_link(base, base_revision),
        accuracy=accuracy,
        is_synthetic=is_synthetic,
        training=_training(results, dataset, kind),
        # A file may list them in another order.
        fingerprints={dtype: (base_fingerprints or {}).get(dtype) for dtype in FINGERPRINT_DTYPES},
        **parts,
    )


def _template(name: str) -> str:
    packaged = files("funlora_hf.cards").joinpath(name)
    # In an editable install a template may not be inside the package but at the top of the repository.
    source = packaged if packaged.is_file() else Path(__file__).parents[3] / name
    return source.read_text(encoding="utf-8")


def _text(text: str) -> str:
    """Return one line of Markdown that shows exactly this text, also in a table."""
    printable = "".join(c if c.isprintable() or c in _JOINERS else " " for c in text)
    return " ".join(printable.split()).translate(_MARKUP) or "(no name)"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1000:,.1f} kB"


def _arguments(place: str, **others: str | None) -> str:
    """Return the arguments of a call in the card's Python, without those that are None."""
    # A JSON string is also a Python string.
    named = [f"{key}={json.dumps(value)}" for key, value in others.items() if value is not None]
    return ", ".join([json.dumps(place), *named])


def _base_link(base: str | None, revision: str | None) -> str | None:
    if base is None or revision is None:
        return base and f"[{_text(base)}]({_HUB}/{base})"
    # Link to the named revision, so that the reader sees this base and not a later one.
    return f"[{_text(base)}]({_HUB}/{base}/tree/{quote(revision, safe='')}), revision {_text(revision)}"


def _dataset(results: Mapping[str, Any]) -> str | None:
    """Name of the run's dataset: an id on the Hub, or the last part of a path."""
    name = results.get("dataset") or ""
    return repository(name) or Path(name.replace("\\", "/")).name or None


def _eval_results(
    results: Mapping[str, Any], dataset: str | None, accuracy: float | None, class_name: str | None
) -> list[EvalResult] | None:
    by = "in %, by a classifier trained on synthetic images"
    values = {
        f"Accuracy of the class {class_name}, {by}": accuracy,
        f"LA, average accuracy after the last task, {by}": results.get("LA"),
        f"AIA, average incremental accuracy, {by}": results.get("AIA"),
    }
    found = [
        EvalResult(
            task_type=_TASK,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(value, 2),
        )
        for name, value in values.items()
        if value is not None and dataset is not None
    ]
    return found or None


def _training(results: Mapping[str, Any], dataset: str | None, kind: str) -> dict[str, str]:
    """Settings with which the run trained a base or an adapter, and its dataset."""
    settings = results.get("settings", {})
    model = settings.get("ModelArguments", {})
    if kind == "base" and model.get("base_model"):
        return {}  # the run was given its base
    training = settings.get("ContinualTrainingArguments", {})
    own = {name.removeprefix(f"{kind}_"): value for name, value in training.items() if name.startswith(f"{kind}_")}
    steps, epochs, most = own.get("train_steps"), own.get("epochs"), training.get("max_train_steps")
    # Runs of earlier versions had one rate for all. The strategy may have chosen another method than the arguments.
    method = results.get("peft_method", model.get("peft_method")) if kind == "adapter" else None
    multiple = alpha_rate(method, model.get("function"), own.get("alpha_rate", 1.0)) or 1
    decay, start = own.get("ema_decay"), own.get("ema_start")
    reached = results.get("ema_decay_reached", {}).get(kind, decay)
    warmed_up = "" if reached == decay else f", of which the warm-up reached {reached:.4g}"
    accumulation, precision = training.get("gradient_accumulation_steps"), training.get("mixed_precision")
    values = {
        "data set": dataset and _text(dataset),
        "steps": None if steps is None else f"{steps if most is None else min(steps, most):,}",
        "epochs": None
        if epochs is None or steps is not None
        else f"{epochs:,}" + ("" if most is None else f", at most {most:,} steps"),
        "batch size": own.get("batch_size"),
        "learning rate": own.get("learning_rate"),
        "learning rate of alpha": None if multiple == 1 else f"{multiple * own['learning_rate']:g}",
        "Adam's beta1": own.get("adam_beta1"),
        "warm-up steps": own.get("warmup_steps"),
        "EMA": decay and (f"decay {decay}{warmed_up}" + (f", after {start:.0%} of the steps" if start else "")),
        "gradient accumulation": None if accumulation == 1 else accumulation,
        "precision": None if precision == "no" else precision,
        "seed": results.get("seed"),
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _class_table(classes: Sequence[ClassRow], repo_id: str | None) -> list[Sequence[str]]:
    """The rows of the table of classes, header first, without empty columns."""
    # The Hub treats a relative link as a link to a file, which does not work for a folder.
    root = "" if repo_id is None else f"{_HUB}/{repo_id}/tree/main/"
    columns = {
        "id": [str(row.class_label) for row in classes],
        "class": [
            _text(row.class_name) if row.link is None else f"[{_text(row.class_name)}]({root}{quote(row.link)})"
            for row in classes
        ],
        "made by": [row.kind for row in classes],
        "parameters": ["" if row.parameters is None else f"{row.parameters:,}" for row in classes],
        "size": ["" if row.num_bytes is None else _size(row.num_bytes) for row in classes],
        "accuracy (%)": ["" if row.accuracy is None else f"{row.accuracy:.2f}" for row in classes],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return [tuple(columns), *zip(*columns.values(), strict=True)] if columns else []
