"""Model cards: what a reader of the Hub needs to use an adapter, a base or a folder of adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftConfig

from ..tuner import FunLoraConfig
from ..utils.checks import FINGERPRINT_DTYPES


_HUB = "https://huggingface.co"
_TASK = "unconditional-image-generation"  # the Hub has no name for class-conditional generation
_TAGS = ("continual-learning", "flow-matching", "class-conditional-image-generation")
# What makes Markdown out of plain text, be it in a line of its own, in a cell or in a link.
_MARKUP = str.maketrans({character: f"\\{character}" for character in "`*_[]<>|~&#$"})
# The Hub takes two backslashes before a bracket for mathematics.
_MARKUP[ord("\\")] = "&#92;"
_YAML_BREAKS = str.maketrans("\x85\u2028\u2029", "   ")  # PyYAML does not read them as it writes them
_JOINERS = "\u200c\u200d"  # not printable, yet parts of words and of emoji

# Stands in a snippet for what is not on the Hub.
_BASE = "path/to/base"
_THIS = "path/to/this/folder"
# The folder of a pipeline that holds its adapters.
_OWN = "adapters/"

_Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Place:
    """
    Where an adapter and its base are, as a reader of the card can load them.

    What is not of the form "user/repo" counts as not on the Hub, so that no path of a machine gets into a card.

    Args:
        source: repository of the adapter, "user/repo"; None: not on the Hub, and the snippet says path/to/...
        subfolder: of the adapter in it, such as "class_7"; None: at its root.
        base: repository of the base; None: not published, and the card says so.
        base_revision: branch, tag or commit of the base; None: its main branch.
        base_is_unet: the base's repository is the U-Net itself, not a pipeline with a folder unet/.
    """

    source: str | None = None
    subfolder: str | None = None
    base: str | None = None
    base_revision: str | None = None
    base_is_unet: bool = False


@dataclass(frozen=True)
class ClassRow:
    """
    One class in a card of many.

    Args:
        class_label: id of the class.
        class_name: its name.
        kind: what makes it, "base" or "adapter".
        parameters: of its adapter; None: unknown, or of the base.
        num_bytes: of its adapter's file; None: unknown, or of the base.
        accuracy: in %; None: not measured.
        link: folder in the repository ("class_7", "adapters/class_7", "./any/folder") or another repository
            ("user/repo") with the adapter; None: nowhere.
    """

    class_label: int
    class_name: str
    kind: str
    parameters: int | None
    num_bytes: int | None
    accuracy: float | None
    link: str | None

    def __post_init__(self) -> None:
        if self.kind not in ("base", "adapter"):
            raise ValueError(f"`kind` is {self.kind!r}, expected 'base' or 'adapter': what makes the class.")

    @property
    def folder(self) -> str | None:
        """The folder that `link` names, if it names one."""
        if self.link is None or (_repository(self.link) and not self.link.startswith(("./", _OWN))):
            return None
        return self.link.removeprefix("./").strip("/")

    @property
    def repository(self) -> str | None:
        """The repository that `link` names, if it names one."""
        return self.link if self.link is not None and self.folder is None else None


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
    """
    The card of one adapter; what is not known is left out.

    Args:
        config: of the adapter. A FunLoRA adapter's `base_fingerprint` is shown if it has one.
        class_label: id of the class; None: not set.
        class_name: its name, any text.
        parameters: numbers in the adapter, class vector included.
        num_bytes: of its file.
        place: where the adapter and its base are.
        results: contents of the results.json of the run that trained it.
        samples: file name of a picture of samples beside the card.
        license: identifier of a licence, as the Hub has them.

    Returns:
        `ModelCard`, its metadata that of a PEFT adapter.
    """
    results = results or {}
    source, base = _repository(place.source), _repository(place.base)
    accuracy = _class_accuracy(results, class_label)
    class_name = class_name.translate(_YAML_BREAKS)
    name = class_name if source is None else "/".join(filter(None, [source.split("/")[1], place.subfolder]))
    data = ModelCardData(
        library_name="peft",
        pipeline_tag=_TASK,
        license=license,
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        datasets=_datasets(results),
        tags=[config.peft_type.value.lower(), "diffusers", *_TAGS],
        model_name=name,
        eval_results=_eval_results(results, accuracy, class_name),
        class_label=class_label,
        class_name=class_name,
    )
    is_funlora = isinstance(config, FunLoraConfig)
    return ModelCard.from_template(
        data,
        template_str=_template("model_card_template.md"),
        name=_text(class_name),
        # A number alone says little.
        title=f"class {class_label}" if class_name == str(class_label) else _text(class_name),
        method="[FunLoRA](https://arxiv.org/abs/2510.02631)" if is_funlora else _text(config.peft_type.value),
        base=base,
        base_link=_base_link(base, place.base_revision),
        base_is_unet=place.base_is_unet,
        in_subfolder=place.subfolder is not None,
        # The comparison methods are registered with PEFT by a module of their own.
        package="funlora_hf.baselines" if type(config).__module__.startswith("funlora_hf.baselines") else "funlora_hf",
        pipeline_arguments=_arguments(base or _BASE, revision=place.base_revision),
        unet_arguments=_arguments(
            base or _BASE, subfolder=None if place.base_is_unet else "unet", revision=place.base_revision
        ),
        adapter_arguments=_arguments(source or _THIS, subfolder=source and place.subfolder),
        class_label=1000 if class_label is None else class_label,
        has_label=class_label is not None,
        passes_label=class_label is None or getattr(config, "class_label", None) != class_label,
        samples=samples and quote(samples),
        accuracies=_accuracies(results, accuracy),
        judge=_judge(results),
        facts=_adapter_facts(config, class_label, class_name, parameters, num_bytes, results),
        training=_training(results, "adapter"),
        fingerprints=_fingerprints(getattr(config, "base_fingerprint", None)),
        versions=_versions(results),
    )


def base_card(
    *,
    repo_id: str | None,
    classes: Sequence[ClassRow],
    base_fingerprints: Mapping[str, str] | None,
    revision: str | None = None,
    results: Mapping[str, Any] | None = None,
    samples: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    The card of a base, alone or with adapters in the same repository; what is not known is left out.

    Args:
        repo_id: of the base, "user/repo"; None: not on the Hub.
        classes: those that the base knows and those that adapters add.
        base_fingerprints: name of a dtype -> SHA-256 of the base in it.
        revision: branch, tag or commit that the snippet loads; None: the main branch.
        results: contents of the results.json of the run that trained it.
        samples: file name of a picture of samples beside the card.
        license: identifier of a licence, as the Hub has them.

    Returns:
        `ModelCard`, its metadata that of a diffusers pipeline.
    """
    results = results or {}
    repo_id = _repository(repo_id)
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=_TASK,
        license=license,
        datasets=_datasets(results),
        tags=["funlora", *_TAGS],
        model_name=_repository_name(repo_id, "base"),
        eval_results=_eval_results(results),
    )
    given = results.get("settings", {}).get("ModelArguments", {}).get("base_model")
    return _card_of_many(
        data,
        classes,
        repo_id=repo_id,
        revision=revision,
        results=results,
        samples=samples,
        pipeline_arguments=_arguments(repo_id or _THIS, revision=revision),
        # A run that was given its base did not train it.
        training=[] if given else _training(results, "base"),
        fingerprints=_fingerprints(base_fingerprints),
        base_labels=[row.class_label for row in classes if row.kind == "base"][:4],
        kind="base",
    )


def adapters_card(
    *,
    repo_id: str | None,
    base: str | None,
    base_revision: str | None,
    classes: Sequence[ClassRow],
    results: Mapping[str, Any] | None = None,
    samples: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """
    The card at the root of a repository that holds adapters only, in subfolders, of a base elsewhere.

    Args:
        repo_id: of the adapters, "user/repo"; None: not on the Hub.
        base: repository of the base; None: not published, and the card says so.
        base_revision: branch, tag or commit of the base; None: its main branch.
        classes: those of the adapters, and those of the base, if they should be named.
        results: contents of the results.json of the run that trained them.
        samples: file name of a picture of samples beside the card.
        license: identifier of a licence, as the Hub has them.

    Returns:
        `ModelCard`, its metadata that of PEFT adapters.
    """
    results = results or {}
    repo_id, base = _repository(repo_id), _repository(base)
    data = ModelCardData(
        library_name="peft",
        pipeline_tag=_TASK,
        license=license,
        base_model=base,
        base_model_relation=None if base is None else "adapter",
        datasets=_datasets(results),
        tags=["funlora", "diffusers", *_TAGS],
        model_name=_repository_name(repo_id, "adapters"),
        eval_results=_eval_results(results),
    )
    return _card_of_many(
        data,
        classes,
        repo_id=repo_id,
        revision=None,
        results=results,
        samples=samples,
        pipeline_arguments=_arguments(base or _BASE, revision=base_revision),
        unet_arguments=_arguments(base or _BASE, subfolder="unet", revision=base_revision),
        training=_training(results, "adapter"),
        base_link=_base_link(base, base_revision),
        kind="adapter",
    )


def _card_of_many(
    data: ModelCardData,
    classes: Sequence[ClassRow],
    *,
    repo_id: str | None,
    revision: str | None,
    results: Mapping[str, Any],
    samples: str | None,
    kind: str,
    **parts: Any,
) -> ModelCard:
    example = next((row for row in classes if row.kind == "adapter" and row.link), None)
    # A pipeline loads the adapters in its own folder by itself.
    is_loaded = kind == "base" and repo_id is None and example is not None and (example.folder or "").startswith(_OWN)
    return ModelCard.from_template(
        data,
        template_str=_template("base_card_template.md"),
        kind=kind,
        title=_text(data.model_name),
        num_classes=sum(row.kind == kind for row in classes),
        adapter_label=None if example is None else example.class_label,
        is_loaded=is_loaded,
        adapter_arguments=None if example is None else _example_arguments(example, repo_id, revision),
        samples=samples and quote(samples),
        table=_class_table(classes, repo_id, revision),
        is_measured=any(row.accuracy is not None for row in classes),
        accuracies=_accuracies(results),
        judge=_judge(results),
        versions=_versions(results),
        **parts,
    )


def _template(name: str) -> str:
    packaged = files("funlora_hf.cards").joinpath(name)
    # In an editable install a template may not be inside the package but at the top of the repository.
    source = packaged if packaged.is_file() else Path(__file__).parents[3] / name
    return source.read_text(encoding="utf-8")


def _text(text: str) -> str:
    """Any text as one line of Markdown that shows it and nothing else, in a table, too."""
    printable = "".join(c if c.isprintable() or c in _JOINERS else " " for c in text)
    return " ".join(printable.split()).translate(_MARKUP) or "(no name)"


def _arguments(place: str, **others: str | None) -> str:
    """Arguments of a call in the card's Python; those that are None are left out."""
    # A JSON string is one of Python's, too.
    named = [f"{key}={json.dumps(value)}" for key, value in others.items() if value is not None]
    return ", ".join([json.dumps(place), *named])


def _example_arguments(row: ClassRow, repo_id: str | None, revision: str | None) -> str:
    if row.repository is not None:
        return _arguments(row.repository)
    return _arguments(repo_id or _THIS, subfolder=row.folder, revision=revision)


def _repository(name: str | None) -> str | None:
    """The name if it is that of a repository with an owner, else None."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name is not None and "/" in name else None


def _repository_name(repo_id: str | None, otherwise: str) -> str:
    return f"FunLoRA {otherwise}" if repo_id is None else repo_id.split("/")[1]


def _base_link(base: str | None, revision: str | None) -> str | None:
    if base is None:
        return None
    # A commit that is named is linked to, so that the reader sees the base that was meant.
    place = f"{_HUB}/{base}" if revision is None else f"{_HUB}/{base}/tree/{quote(revision, safe='')}"
    return f"[{_text(base)}]({place})" + ("" if revision is None else f", revision {_text(revision)}")


def _dataset(results: Mapping[str, Any]) -> str | None:
    """Name of the run's data set: an id of the Hub, or the last component of a path."""
    name = results.get("dataset")
    if not name:
        return None
    return _repository(name) or Path(name.replace("\\", "/")).name or None


def _datasets(results: Mapping[str, Any]) -> list[str] | None:
    # results.json has local data sets by their last component, so what has an owner is on the Hub.
    name = _repository(_dataset(results))
    return None if name is None else [name]


def _class_accuracy(results: Mapping[str, Any], class_label: int | None) -> float | None:
    return (results.get("class_accuracy") or {}).get(str(class_label))


def _judged_by_synthetic_images(results: Mapping[str, Any]) -> bool:
    """Whether the last classifier of the run was trained on generated images; after the first task it is on real ones."""
    return len(results.get("tasks", ())) > 1


def _eval_results(
    results: Mapping[str, Any], accuracy: float | None = None, class_name: str = ""
) -> list[EvalResult] | None:
    dataset = _dataset(results)
    if dataset is None or not _judged_by_synthetic_images(results):
        return None
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
        if value is not None
    ]
    return found or None


def _accuracies(results: Mapping[str, Any], accuracy: float | None = None) -> _Facts:
    values = {
        "this class": accuracy,
        "LA: mean over the tasks of the run, after the last one": results.get("LA"),
        "AIA: mean of that average after each task": results.get("AIA"),
    }
    return [(name, f"{value:.2f}") for name, value in values.items() if value is not None]


def _judge(results: Mapping[str, Any]) -> str | None:
    """How the accuracies came about, in a sentence; None if the results do not say so."""
    if not results.get("tasks"):
        return None
    is_synthetic = _judged_by_synthetic_images(results)
    trained_on = "synthetic images (after the first task, on real ones)" if is_synthetic else "real images"
    dataset, classes = _dataset(results), results.get("class_order")
    tested_on = "real images" + ("" if dataset is None else f" of {_text(dataset)}")
    which = f"the {len(classes)} classes of the run" if classes else "the classes of the run"
    judge = f"All in %: a classifier of {which}, trained on {trained_on}, is tested on {tested_on} that nothing was trained on."
    settings = results.get("settings", {}).get("EvaluationArguments", {})
    count, solver = settings.get("num_samples_per_class"), settings.get("solver")
    if is_synthetic and count and solver:
        steps = settings.get("num_inference_steps")
        in_steps = "" if solver == "dopri5" or steps is None else f" in {steps} steps"
        judge += f" There were {count:,} synthetic images of every class, sampled by {_text(solver)}{in_steps}."
    return judge


def _adapter_facts(
    config: PeftConfig,
    class_label: int | None,
    class_name: str,
    parameters: int,
    num_bytes: int | None,
    results: Mapping[str, Any],
) -> _Facts:
    named = _text(class_name)
    facts = [("class", named if class_label is None or class_name == str(class_label) else f"{class_label} ({named})")]
    if isinstance(config, FunLoraConfig):
        facts.append(("function", config.function))
        if config.function != "identity":
            facts.append(("functions p", str(config.num_functions)))
        facts += [
            ("rank", str(config.r)),
            ("ratio", str(config.ratio)),
            ("operation on the weights", config.operation),
        ]
    elif getattr(config, "r", None) is not None:
        facts.append(("rank", str(config.r)))
    facts.append(("parameters, class vector included", f"{parameters:,}"))
    without = results.get("parameters_per_class")
    if without is not None and results.get("parameters_per_class_with_vector") == parameters:
        facts.append(("parameters without the class vector", f"{without:,}"))
    if num_bytes is not None:
        facts.append(("size of the file", _size(num_bytes)))
    return facts


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1000:,.1f} kB"


def _training(results: Mapping[str, Any], phase: str) -> _Facts:
    """How the run trained a base or an adapter, and on what."""
    settings = results.get("settings", {}).get("ContinualTrainingArguments", {})
    facts = []
    if _dataset(results) is not None:
        facts.append(("data set", _text(_dataset(results))))
    steps, cap = settings.get(f"{phase}_train_steps"), settings.get("max_train_steps")
    if steps is not None:
        facts.append(("steps", f"{steps if cap is None else min(steps, cap):,}"))
    elif settings.get(f"{phase}_epochs") is not None:
        facts.append(
            ("epochs", f"{settings[f'{phase}_epochs']:,}" + ("" if cap is None else f", at most {cap:,} steps"))
        )
    decay, start = settings.get(f"{phase}_ema_decay"), settings.get(f"{phase}_ema_start")
    values = {
        "batch size": settings.get(f"{phase}_batch_size"),
        "learning rate": settings.get(f"{phase}_learning_rate"),
        "warm-up steps": settings.get(f"{phase}_warmup_steps"),
        "EMA": decay and (f"decay {decay}" + (f", after {start:.0%} of the steps" if start else "")),
        "gradient accumulation": _unless(settings.get("gradient_accumulation_steps"), 1),
        "precision": _unless(settings.get("mixed_precision"), "no"),
        "seed": results.get("seed"),
    }
    return facts + [(name, str(value)) for name, value in values.items() if value is not None]


def _unless(value: Any, usual: Any) -> Any:
    return None if value == usual else value


def _fingerprints(fingerprints: Mapping[str, str] | None) -> _Facts:
    fingerprints = fingerprints or {}
    # A file may have brought them in another order.
    known = [dtype for dtype in FINGERPRINT_DTYPES if fingerprints.get(dtype)]
    return [(dtype, f"`{_text(fingerprints[dtype])}`") for dtype in known]


def _versions(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{_text(name)} {_text(version)}" for name, version in results.get("versions", {}).items())


def _class_table(classes: Sequence[ClassRow], repo_id: str | None, revision: str | None) -> list[Sequence[str]]:
    """The table of classes, its header first; a column with nothing in it is left out."""
    columns = {
        "id": [str(row.class_label) for row in classes],
        "class": [_linked_name(row, repo_id, revision) for row in classes],
        "made by": [row.kind for row in classes],
        "parameters": ["" if row.parameters is None else f"{row.parameters:,}" for row in classes],
        "size": ["" if row.num_bytes is None else _size(row.num_bytes) for row in classes],
        "accuracy (%)": ["" if row.accuracy is None else f"{row.accuracy:.2f}" for row in classes],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    return [tuple(columns), *zip(*columns.values(), strict=True)] if columns else []


def _linked_name(row: ClassRow, repo_id: str | None, revision: str | None) -> str:
    name = _text(row.class_name)
    if row.repository is not None:
        return f"[{name}]({_HUB}/{row.repository})"
    if row.folder is None:
        return name
    # A relative link on the Hub is taken for one to a file, which a folder is not.
    root = "" if repo_id is None else f"{_HUB}/{repo_id}/tree/{quote(revision or 'main', safe='')}/"
    return f"[{name}]({root}{quote(row.folder)})"
