"""The folder of a learned concept: `concept.json`, the rows of its token, the adapter if there is one, and a card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import torch

from ..adapters.untrusted_adapter import ADAPTER_FILES, SavedAdapter, check_download, read_adapter
from ..cards.model_cards import Place, concept_card, place_of
from ..hub.concept_folders import CONCEPT_FILE
from ..text_to_image.token_rows import ROW_FILES, read_rows
from ..utils.field_types import Count, Range, check_field_types
from ..utils.files import file_sha256, read_mapping, write_json
from .arguments import TINY, ConceptArguments
from .concepts import NAME, Concept


CARD = "README.md"
WEIGHTS = (ADAPTER_FILES[1], *ROW_FILES.values())
CONCEPT_CONTENTS = (CONCEPT_FILE, *ADAPTER_FILES, *ROW_FILES.values(), CARD)


@dataclass(frozen=True)
class ConceptRecord:
    """The contents of `concept.json`.

    Args:
        name, token, noun, instance_prompt: as of [`Concept`].
        strategy: what learned it.
        base_model_name_or_path: the pipeline that it was learned on, "tiny" for the package's own; None: not published.
        family: as of `TextToImageModel`.
        resolution: height and width of its training images, in pixels.
        in_model: whether its rows belong to the run's own pipeline, in `model/`, and not to the base.
        weights: name -> SHA-256 of its weight files.
        revision, variant, drop_t5: how the base was loaded.
        layerwise: whether its token has rows for each cross-attention layer.
        mixture_power: the power of its weight in the mixture of all concepts of a pipeline, see `PromptMixture`; None: it is not mixed.
    """

    name: str
    token: str
    noun: str
    instance_prompt: str
    strategy: str
    base_model_name_or_path: str | None
    family: str
    resolution: Count
    in_model: bool
    weights: dict
    revision: str | None = None
    variant: str | None = None
    drop_t5: bool = False
    layerwise: bool = False
    mixture_power: Annotated[float, Range(0, 100)] | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        if not NAME.fullmatch(self.name):
            raise ValueError(f"`name` is {self.name!r}, expected letters, digits, - and _, at most 64.")
        if not set(self.weights) <= set(WEIGHTS) or ROW_FILES["text_encoder"] not in self.weights:
            raise ValueError(f"`weights` names {', '.join(self.weights) or 'nothing'}, expected some of {WEIGHTS}.")
        if self.mixture_power is not None and not (self.layerwise and self.has_adapter):
            raise ValueError(
                f"`mixture_power` is {self.mixture_power}, expected None without an adapter and layer-wise rows."
            )

    @property
    def is_tiny(self) -> bool:
        """Whether the base is the package's own."""
        return self.base_model_name_or_path == TINY

    @property
    def has_adapter(self) -> bool:
        """Whether it has an adapter of the denoiser."""
        return ADAPTER_FILES[1] in self.weights

    def published(self, place: Place) -> ConceptRecord:
        """Return this record for the Hub: its base as in `place`, without a local path."""
        if self.is_tiny and place.base is None:
            return self
        return replace(self, base_model_name_or_path=place.base, revision=place.base_revision)


@dataclass(frozen=True, eq=False)
class SavedConcept:
    """A concept's folder, its adapter without the numbers.

    Args:
        folder: the folder.
        record: contents of its `concept.json`.
        rows: rows of its token by text encoder, as of `TokenRows.parameters_of`.
        adapter: None: its strategy trains none.
    """

    folder: Path
    record: ConceptRecord
    rows: Mapping[str, torch.Tensor]
    adapter: SavedAdapter | None

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(row.numel() for row in self.rows.values()) + (0 if self.adapter is None else self.adapter.numel)

    @property
    def num_bytes(self) -> int:
        """Size of its weight files."""
        return sum((self.folder / name).stat().st_size for name in self.record.weights)

    @property
    def place(self) -> Place:
        """Its base, if that is a repository."""
        return place_of(self.record.base_model_name_or_path, self.record.revision)

    def card(self, place: Place, *, license: str | None = None) -> bytes:
        """Return its card, for the place that it will be at."""
        record = self.record.published(place)
        card = concept_card(
            asdict(record),
            parameters=self.parameters,
            num_bytes=self.num_bytes,
            config=None if self.adapter is None else self.adapter.config,
            is_tiny=record.is_tiny,
            place=place,
            license=license,
        )
        return str(card).encode()


def write_concept(
    folder: Path,
    concept: Concept,
    arguments: ConceptArguments,
    *,
    strategy: str,
    family: str,
    resolution: int,
    in_model: bool,
    layerwise: bool,
    mixture_power: float | None,
) -> None:
    """Write `concept.json` and the card of a folder that has the concept's weights already.

    Args:
        strategy, family, in_model, layerwise, mixture_power: as of [`ConceptRecord`].
        resolution: the base's, in pixels.
    """
    record = ConceptRecord(
        **{name: getattr(concept, name) for name in ("name", "token", "noun", "instance_prompt")},
        strategy=strategy,
        base_model_name_or_path=arguments.pretrained_model_name_or_path,
        family=family,
        resolution=arguments.resolution or resolution,
        in_model=in_model,
        weights={name: file_sha256(folder / name) for name in WEIGHTS if (folder / name).is_file()},
        revision=arguments.revision,
        variant=arguments.variant,
        drop_t5=arguments.drop_t5,
        layerwise=layerwise,
        mixture_power=mixture_power,
    )
    write_json(folder / CONCEPT_FILE, asdict(record))
    saved = read_concept(folder)
    (folder / CARD).write_bytes(saved.card(saved.place))


def read_record(folder: Path) -> ConceptRecord:
    """Read the `concept.json` of a folder, and check that the weight files are there that it names.

    Raises:
        FileNotFoundError: no such file, or a weight file is missing.
        ValueError: a damaged one, or a weight file that it does not name.
    """
    record = parse_record(folder / CONCEPT_FILE)
    there = {name for name in (*ADAPTER_FILES, *WEIGHTS) if (folder / name).is_file()}
    expected = {*record.weights, *(ADAPTER_FILES[:1] if record.has_adapter else ())}
    if missing := sorted(expected - there):
        raise FileNotFoundError(
            f"{os.fspath(folder)!r} has no {', '.join(missing)}, which its {CONCEPT_FILE} names: get the whole folder again."
        )
    if others := sorted(there - expected):
        raise ValueError(
            f"{os.fspath(folder)!r} has {', '.join(others)}, which its {CONCEPT_FILE} does not name: get the whole folder again."
        )
    return record


def parse_record(file: Path) -> ConceptRecord:
    """Read a `concept.json` by itself. Raises a ValueError for a damaged one."""
    given = read_mapping(file, keys=[one.name for one in fields(ConceptRecord) if one.default is MISSING])
    try:
        # A field of a later version is not needed to load the concept.
        return ConceptRecord(**{one.name: given[one.name] for one in fields(ConceptRecord) if one.name in given})
    except ValueError as error:
        raise ValueError(f"{os.fspath(file)!r} is damaged: {error}") from error


def read_concept(folder: Path) -> SavedConcept:
    """Read a concept's folder, all but the numbers of its adapter.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a damaged file, or files that do not belong together.
    """
    record = read_record(folder)
    for name in CONCEPT_CONTENTS:
        if (folder / name).is_file():
            check_download(folder / name)
    token, rows = read_rows(folder, [key for key, name in ROW_FILES.items() if name in record.weights])
    if token != record.token:
        raise ValueError(f"{os.fspath(folder)!r} has rows of {token!r}, but its {CONCEPT_FILE} says {record.token!r}.")
    return SavedConcept(folder, record, rows, read_adapter(folder) if record.has_adapter else None)
