"""Draw images of prompts with the concepts of a run: those whose tokens a prompt has."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..text_to_image.token_rows import prompt_length
from .arguments import ConceptEvaluationArguments
from .concept_folder import ConceptRecord, SavedConcept
from .drawing import draw
from .found_concepts import FoundConcepts, find_concepts, load_base
from .load_concept import activate, denoiser_of, load_concept
from .regions import Region, prompts_in_regions


@dataclass(frozen=True)
class PromptImages:
    """What was drawn.

    Args:
        prompt: the prompt.
        concepts: names of the concepts whose tokens it or a region has, in this order.
        adapters: names of those whose adapters were active together for the prompt itself.
        images: uint8, `(n, 3, h, w)`.
    """

    prompt: str
    concepts: list[str]
    adapters: list[str]
    images: torch.Tensor


def sample_prompts(
    source: str | os.PathLike,
    prompts: Sequence[str],
    *,
    regions: Sequence[Region] = (),
    width: int | None = None,
    num_images: int = 4,
    num_inference_steps: int = ConceptEvaluationArguments.num_inference_steps,
    guidance_scale: float = ConceptEvaluationArguments.guidance_scale,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[PromptImages]:
    """Draw images of prompts on the base of a run's concepts; the adapters of those whose tokens a prompt has are active.

    Without a token, the base draws. Of a strategy that mixes concepts by the prompt, all are active for every prompt. Equal seeds give equal
    noise, whatever the prompt. In regions, their own prompts and adapters act, see `prompts_in_regions`.

    Args:
        source: folder of a run or of a concept, or a repository with concepts.
        prompts: with tokens as they were learned.
        regions: boxes with prompts, the same in the images of each prompt; later ones win.
        width: of the images, in pixels; None: that of the training pictures, which is always the height.
        num_images: images of each prompt.
        num_inference_steps: steps of the pipeline's scheduler.
        guidance_scale: of classifier-free guidance; 1: none.
        seed: of the noise.
        device: where to draw.

    Raises:
        FileNotFoundError: no such folder or repository, no concept in it, or no base.
        ValueError: a word in <> that is no token of these concepts, a prompt over the tokenizer's limit, concepts of several bases, or
            what `load_concept` and `prompts_in_regions` raise.
    """
    config = ConceptEvaluationArguments(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    found = find_concepts(source)
    concepts = found.saved()
    wanted = [_concepts_in(prompt, concepts) for prompt in prompts]
    in_regions = [_concepts_in(region.prompt, concepts) for region in regions]
    asked = [one for some in (*wanted, *in_regions) for one in some]
    record = (asked or concepts)[0].record
    mixed = [one for one in concepts if None not in (record.mixture_power, one.record.mixture_power)]
    used = {one.record.token: one for one in (*asked, *mixed)}
    pipe = base_pipeline(found, [one.record for one in used.values()] or [record], device=device)
    if record.layerwise or not record.in_model:
        for one in used.values():
            load_concept(pipe, one.folder)
    _check_length(pipe, [*prompts, *(region.prompt for region in regions)])
    drawn = []
    for prompt, some in zip(prompts, wanted, strict=True):
        adapters = _adapters_of(mixed or some)
        activate(denoiser_of(pipe), adapters)
        of_regions = [_adapters_of(mixed or some) for some in in_regions]
        with prompts_in_regions(pipe, regions, of_regions) if regions else nullcontext():
            images = draw(
                pipe,
                [prompt],
                num_images,
                purpose="funlora sample",
                seed=seed,
                resolution=record.resolution,
                width=width,
                config=config,
            )
        names = dict.fromkeys(one.record.name for part in (some, *in_regions) for one in part)
        drawn.append(PromptImages(prompt, list(names), adapters, images))
    return drawn


def _adapters_of(concepts: Sequence[SavedConcept]) -> list[str]:
    return [one.record.name for one in concepts if one.record.has_adapter]


def _concepts_in(prompt: str, concepts: Sequence[SavedConcept]) -> list[SavedConcept]:
    """The concepts whose tokens a prompt has, each once, in its order."""
    by_token = {one.record.token.lower(): one for one in concepts}
    # The tokenizer does not distinguish upper and lower case, and takes the longest token.
    longest_first = sorted(map(re.escape, by_token), key=len, reverse=True)
    tokens = re.findall("|".join(longest_first), prompt.lower())
    if others := sorted(set(re.findall(r"<[^\s<>]+>", prompt.lower())) - by_token.keys()):
        known = ", ".join(one.record.token for one in concepts)
        raise ValueError(f"The prompt {prompt!r} has {', '.join(others)}, expected tokens of these concepts: {known}.")
    return [by_token[token] for token in dict.fromkeys(tokens)]


def base_pipeline(
    found: FoundConcepts,
    records: Sequence[ConceptRecord],
    *,
    base: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Return the stock pipeline of the concepts' base, or that of their run.

    Args:
        base: another place of the base, folder, repository or "tiny", for concepts that are not learned into their run's pipeline;
            None: the one that they name.

    Raises:
        FileNotFoundError: the base is not named, or not there.
        ValueError: concepts of several bases.
    """
    record = records[0]
    if record.in_model:
        return load_base(found.model(), revision=found.revision, device=device, drop_t5=record.drop_t5).pipeline()
    how = ("base_model_name_or_path", "revision", "variant", "drop_t5", "in_model", "resolution")
    if len({tuple(getattr(one, name) for name in how) for one in records}) > 1:
        raise ValueError(
            f"{found.source!r} has concepts of several bases or sizes ({', '.join(one.name for one in records)}): name those of one."
        )
    if base is not None:
        return load_base(base, drop_t5=record.drop_t5, device=device).pipeline()
    if record.base_model_name_or_path is None:
        raise FileNotFoundError(
            f"{found.source!r} does not name the base of its concepts, which has not been published: load the base in Python and use "
            "`load_concept`, or name it by `funlora export --base`."
        )
    return load_base(
        record.base_model_name_or_path,
        revision=record.revision,
        variant=record.variant,
        drop_t5=record.drop_t5,
        device=device,
    ).pipeline()


def _check_length(pipe: Any, prompts: Sequence[str]) -> None:
    most = pipe.tokenizer.model_max_length
    for prompt in prompts:
        if (length := prompt_length(prompt, pipe.tokenizer)) > most:
            raise ValueError(f"The prompt {prompt!r} has {length} tokens, expected at most {most}: shorten it.")
