"""Find the concepts in a folder or a repository, describe them, and check them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..adapters.base_fingerprint import FingerprintCheck
from ..adapters.untrusted_adapter import fetch, method
from ..adapters.untrusted_base import PIPELINE
from ..hub.concept_folders import concept_folders
from ..hub.verify import Verdict, verdict_of
from ..text_to_image.model import TextToImageModel
from ..tuner import FunLoraConfig
from ..utils.checks import listed
from ..utils.files import file_sha256
from ..utils.tensors import not_finite
from .arguments import TINY
from .concept_folder import CONCEPT_CONTENTS, CONCEPT_FILE, SavedConcept, read_concept, read_record
from .tiny import tiny_base


MODEL_FOLDER = "model"


@dataclass(frozen=True)
class FoundConcepts:
    """What was found in a source.

    Args:
        source: as it was asked for.
        revision: of a repository.
        root: the folder on this machine.
        folders: of the concepts, sorted.
    """

    source: str
    revision: str | None
    root: Path
    folders: tuple[Path, ...]

    def name(self, folder: Path) -> str:
        """Name of a folder in it, for messages."""
        return self.source if folder == self.root else folder.relative_to(self.root).as_posix()

    def saved(self) -> list[SavedConcept]:
        """Read all concepts. Raises what `read_concept` raises, and a ValueError for two of one name or token."""
        found = [read_concept(folder) for folder in self.folders]
        for field in ("name", "token"):
            values = [getattr(one.record, field) for one in found]
            if twice := sorted({value for value in values if values.count(value) > 1}):
                raise ValueError(
                    f"{self.source!r} has several concepts of the {field} {', '.join(twice)}, expected one."
                )
        return found

    def model(self) -> str | Path:
        """Return the run's own pipeline, for concepts that are learned into it.

        Raises:
            FileNotFoundError: it is not there.
        """
        if not os.path.isdir(self.source):
            return self.source
        # In the folder of a run or of one of its concepts, or laid out as in a repository.
        near = (self.root / MODEL_FOLDER, self.root, self.root.parent.parent / MODEL_FOLDER, self.root.parent)
        if found := next((place for place in near if (place / PIPELINE).is_file()), None):
            return found
        raise FileNotFoundError(
            f"{self.source!r} has no {MODEL_FOLDER}/{PIPELINE}: its concepts are learned into the run's own pipeline. Name the "
            "folder of the run, after its last concept."
        )


def find_concepts(
    source: str | os.PathLike,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> FoundConcepts:
    """Find the concepts in a source; of a repository, fetch them.

    Args:
        source: folder of a run or of a concept, or a repository with a folder for each concept.
        subfolder: where in it.
        revision, local_files_only: as for [`fetch`].

    Raises:
        FileNotFoundError: no such folder or repository, or no concept in it.
        ValueError: a name that leads out of the repository.
    """
    start = f"{subfolder}/" if subfolder else ""
    files = [f"{start}{place}{file}" for place in ("", "*/") for file in CONCEPT_CONTENTS]
    root = fetch(source, files, revision=revision, local_files_only=local_files_only) / (subfolder or "")
    folders = concept_folders(root)
    if not folders:
        raise FileNotFoundError(
            f"{os.fspath(Path(source, subfolder or ''))!r} has no {CONCEPT_FILE} in it, expected the folder of a run of `funlora personalize`, "
            "or of one of its concepts."
        )
    return FoundConcepts(os.fspath(source), revision, root, tuple(folders))


@dataclass(frozen=True)
class ConceptDescription:
    """One concept.

    Args:
        place: its folder in the source.
        name, token, noun, instance_prompt, strategy, base_model_name_or_path, revision: as of [`ConceptRecord`].
        in_model: whether it is learned into the run's own pipeline.
        method: PEFT method of its adapter, with FunLoRA's function; None: there is none.
        parameters: numbers of its rows and its adapter.
        num_bytes: size of its weight files.
    """

    place: str
    name: str
    token: str
    noun: str
    instance_prompt: str
    strategy: str
    base_model_name_or_path: str | None
    revision: str | None
    in_model: bool
    method: str | None
    parameters: int
    num_bytes: int


def describe_concepts(found: FoundConcepts) -> list[ConceptDescription]:
    """Describe concepts as plain data. Raises what `read_concept` raises; `verify_concepts` also checks the others."""
    return [
        ConceptDescription(
            place=found.name(one.folder),
            name=one.record.name,
            token=one.record.token,
            noun=one.record.noun,
            instance_prompt=one.record.instance_prompt,
            strategy=one.record.strategy,
            base_model_name_or_path=one.record.base_model_name_or_path,
            revision=one.record.revision,
            in_model=one.record.in_model,
            method=_method(one),
            parameters=one.parameters,
            num_bytes=one.num_bytes,
        )
        for one in map(read_concept, found.folders)
    ]


def verify_concepts(found: FoundConcepts, *, base: str | os.PathLike | None = None) -> list[Verdict]:
    """Check concepts: every file as such, every number, and whether they belong to a base.

    Args:
        found: the concepts.
        base: pipeline that they are compared with, folder, repository or "tiny"; None: they are only checked by themselves.

    Returns:
        One verdict on each concept and, if they are learned into the run's own pipeline, one on that.

    Raises:
        FileNotFoundError, ValueError: `base` cannot be loaded.
    """
    model = None if base is None else load_base(base)
    check = None if model is None else FingerprintCheck(model.denoiser)
    verdicts = [
        verdict_of("concept", found.name(folder), partial(_check_concept, folder, model, check))
        for folder in found.folders
    ]
    if any(folder_in_model(folder) for folder in found.folders):
        verdicts.append(verdict_of("model", MODEL_FOLDER, partial(_check_model, found)))
    return verdicts


def folder_in_model(folder: Path) -> bool:
    """Whether a concept is learned into the run's own pipeline; False for a damaged one."""
    try:
        return read_record(folder).in_model
    except (ValueError, FileNotFoundError):
        return False


def load_base(name: str | os.PathLike, **how: object) -> TextToImageModel:
    """Load a pipeline by folder, repository or "tiny"; `how` are arguments of `TextToImageModel.from_pretrained`."""
    return TextToImageModel.from_pretrained(tiny_base() if name == TINY else name, **how)  # type: ignore[arg-type]


def check_weights(concept: SavedConcept) -> None:
    """Raise a ValueError if a weight file is not the one that was written, or has numbers that are not finite."""
    for name, digest in concept.record.weights.items():
        if file_sha256(concept.folder / name) != digest:
            raise ValueError(
                f"{name} is not the file that was written: its SHA-256 differs from that in {CONCEPT_FILE}."
            )
    if concept.adapter is not None:
        concept.adapter.tensors()


def _check_concept(folder: Path, model: TextToImageModel | None, check: FingerprintCheck | None) -> str:
    concept = read_concept(folder)
    check_weights(concept)
    said = f"token {concept.record.token}"
    if model is None or check is None or concept.record.in_model:
        return f"{said}, base not checked"
    _check_rows(concept, model)
    if (adapter := concept.adapter) is None:
        return f"{said}, its rows have the base's width"
    is_known = getattr(adapter.config, "base_fingerprint", None) is not None
    if is_known:
        check.check(adapter.config, folder.name)
    adapter.check_fits(model.denoiser)
    return f"{said}, " + (
        "made for this base" if is_known else "its shapes fit, base not checked: its config has no fingerprint of it"
    )


def _check_rows(concept: SavedConcept, model: TextToImageModel) -> None:
    encoders: dict[str, Any] = {key: model.text_encoders[key] for key in model.row_tokenizers}
    for key, encoder in encoders.items():
        width = encoder.get_input_embeddings().weight.shape[1]
        there = concept.rows[key].shape[-1] if key in concept.rows else "no rows"
        if there != width:
            raise ValueError(f"its rows of `{key}` have the width {there}, but those of the base {width}.")
    if more := sorted(concept.rows.keys() - encoders.keys()):
        raise ValueError(f"it has rows of {', '.join(more)}, which the base does not have.")


def _check_model(found: FoundConcepts) -> str:
    model = load_base(found.model(), revision=found.revision)
    tensors: dict[str, torch.Tensor] = {name: one.detach() for name, one in model.named_parameters()}
    if problems := not_finite(tensors):
        raise ValueError(f"it is damaged: {listed(problems)}")
    tokens = [one.record.token for one in found.saved() if one.record.in_model]
    for key, tokenizer in model.row_tokenizers.items():
        if missing := sorted(set(tokens) - tokenizer.get_vocab().keys()):
            raise ValueError(f"its tokenizer of `{key}` does not know {', '.join(missing)}.")
    return f"it knows {', '.join(tokens)}"


def _method(concept: SavedConcept) -> str | None:
    if concept.adapter is None:
        return None
    config = concept.adapter.config
    parts: Sequence[str] = (
        method(config),
        *((config.function, config.operation) if isinstance(config, FunLoraConfig) else ()),
    )
    return " ".join(parts)
