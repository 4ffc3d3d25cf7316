"""Write concepts into a stock pipeline, for tools that know neither adapters nor this package: the command `funlora export`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..text_to_image.token_rows import load_token_rows
from ..utils.checks import expanded
from ..utils.files import whole_folder
from .concept_folder import SavedConcept
from .found_concepts import FoundConcepts, check_weights, find_concepts
from .load_concept import denoiser_of, load_concept
from .sampling import base_pipeline


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        pipeline: name of its class, such as "StableDiffusionPipeline".
        tokens: of the concepts.
        adapter: name of the concept whose adapter is in the weights; None: there is none.
    """

    pipeline: str
    tokens: list[str]
    adapter: str | None


def export_concepts(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    concepts: Sequence[str] | None = None,
    adapter: str | None = None,
    base: str | os.PathLike | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Exported:
    """Write a pipeline's folder for `from_pretrained` of diffusers, with concepts in its tokenizers, text encoders and weights.

    Its images of a concept equal those of [`load_concept`] up to rounding. With `adapter`, prompts without that concept's token are
    drawn with its adapter, too.

    Args:
        source: folder of a run or of a concept, or a repository with concepts.
        output_dir: where to write it; there must be nothing yet.
        concepts: names of the concepts whose tokens it gets; None: all.
        adapter: name of the one among them whose adapter is merged into the denoiser; None: the only one that has an adapter.
        base: the base's folder or repository, or "tiny"; None: the one that the concepts name.
        revision: branch, tag or commit of the repository of `source`.
        local_files_only: use the cached repository, without asking the Hub.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: no such folder or repository, no concept in it, or no base.
        FileExistsError: there is something at `output_dir`.
        ValueError: unknown names, several adapters, damaged concepts, or those of a strategy with one model. Nothing is written.

    Example:
        ```py
        >>> export_concepts("outputs/concepts", "toy", concepts=["toy1"])
        >>> pipe = StableDiffusionPipeline.from_pretrained("toy")
        ```
    """
    folder = Path(expanded("output_dir", os.fspath(output_dir)))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"`output_dir` {os.fspath(folder)!r} is there already, expected a new folder.")
    found = find_concepts(source, revision=revision, local_files_only=local_files_only)
    chosen = _chosen(found, concepts)
    merged = _merged(chosen, adapter)
    for one in chosen:
        check_weights(one)
    pipe = base_pipeline(found, [one.record for one in chosen], base=base)
    for one in chosen:
        if one is not merged:
            load_token_rows(pipe, one.folder)
    if merged is not None:
        load_concept(pipe, merged.folder)
        denoiser = denoiser_of(pipe)
        denoiser.fuse_lora(safe_fusing=True)
        denoiser.unload_lora()
    with whole_folder(folder) as temporary:
        pipe.save_pretrained(temporary)
    name = None if merged is None else merged.record.name
    return Exported(type(pipe).__name__, [one.record.token for one in chosen], name)


def _chosen(found: FoundConcepts, names: Sequence[str] | None) -> list[SavedConcept]:
    """The concepts of these names, in this order."""
    there = {one.record.name: one for one in found.saved()}
    for name in names or ():
        if name not in there:
            raise ValueError(f"`concepts` has {name!r}, expected some of: {', '.join(there)}.")
    chosen = [there[name] for name in dict.fromkeys(names or there)]
    if layerwise := [one.record.name for one in chosen if one.record.layerwise]:
        raise ValueError(
            f"{layerwise[0]!r} has a token with rows for each cross-attention layer, which no folder of a pipeline can hold: load it in Python "
            "by `load_concept`."
        )
    if in_model := [one.record for one in chosen if one.record.in_model]:
        raise ValueError(
            f"{in_model[0].name!r} is learned into the run's own pipeline by `strategy` {in_model[0].strategy!r}, which needs no export: "
            f"{os.fspath(found.model())!r} has all its concepts."
        )
    return chosen


def _merged(chosen: Sequence[SavedConcept], adapter: str | None) -> SavedConcept | None:
    """The concept whose adapter goes into the weights."""
    have = {one.record.name: one for one in chosen if one.record.has_adapter}
    if adapter is None and len(have) > 1:
        raise ValueError(
            f"{', '.join(have)} have an adapter each, but weights can hold that of one concept only: merged together, each would change "
            "the other's images. Choose one by `adapter`; of the others, the tokens are written. Or export them into a folder each."
        )
    if adapter is not None and adapter not in have:
        raise ValueError(
            f"`adapter` is {adapter!r}, expected one of the exported concepts with an adapter: {', '.join(have) or 'none'}."
        )
    return have[adapter] if adapter is not None else next(iter(have.values()), None)
