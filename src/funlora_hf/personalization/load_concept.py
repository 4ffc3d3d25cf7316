"""Load a learned concept, its token and its adapter, into a stock pipeline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.put_into_model import load_adapter, with_adapter_methods
from ..adapters.untrusted_adapter import fetch
from ..text_to_image.prompt_mixture import PromptMixture
from ..text_to_image.token_rows import load_token_rows
from ..tuner_base.wrappers import remove_adapters
from .concept_folder import CONCEPT_CONTENTS, CONCEPT_FILE, read_record


def load_concept(
    pipe: Any,
    source: str | os.PathLike,
    *,
    name: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> str:
    """Load a concept that a run has learned into a stock pipeline of diffusers.

    Its adapter, if its strategy trains one, is active afterwards, as after `load_lora_weights`: `pipe.set_adapters`, `disable_lora`
    and `delete_adapters` know it. PixArt's pipeline has no such methods, but `pipe.transformer` gets them: `set_adapter`,
    `disable_adapters`, `delete_adapters`. A token with rows for each cross-attention layer stays as long as the pipeline.
    The adapters of a strategy that mixes concepts by the prompt are active together, so load all concepts of its run; hooks weight them as
    long as this very pipeline draws.

    Args:
        pipe (`DiffusionPipeline`): a pipeline of Stable Diffusion, SDXL, SD3, PixArt or Flux with the run's base; or, for a token with
            rows for each layer whose strategy changed the model, the pipeline in the run's `model/`.
        source (`str` or `os.PathLike`): folder of the concept, `concepts/<name>` in that of the run, or a repository on the Hub.
        name (`str`, *optional*): name of the adapter in the pipeline; None: the concept's.
        subfolder (`str`, *optional*): the concept's folder in the source.
        revision (`str`, *optional*): branch, tag or commit of a repository.
        local_files_only (`bool`, *optional*, defaults to `False`): use the cached repository, without asking the Hub.

    Returns:
        `str`: the token to use in prompts, before the noun.

    Raises:
        BaseMismatchError: the adapter was trained for another base.
        ValueError: the files do not fit the pipeline or are damaged, or the token or the adapter's name is taken. The pipeline is
            unchanged.
        FileNotFoundError: no such folder or repository, or no concept in it.

    Example:
        ```py
        >>> token = load_concept(pipe, "outputs/concepts/concepts/toy1")
        >>> pipe(f"a photo of a {token} toy on a black background").images[0]
        ```
    """
    files = [f"{subfolder}/{file}" if subfolder else file for file in CONCEPT_CONTENTS]
    folder = fetch(source, files, revision=revision, local_files_only=local_files_only) / (subfolder or "")
    if not (folder / CONCEPT_FILE).is_file():
        raise FileNotFoundError(
            f"{os.fspath(source)!r} has no {Path(subfolder or '') / CONCEPT_FILE}, expected the folder of a concept, such as "
            "concepts/<name> in the folder of a run."
        )
    record = read_record(folder)
    is_known = record.in_model and record.layerwise and record.token in pipe.tokenizer.get_vocab()
    if record.in_model and not is_known:
        raise ValueError(
            f"{os.fspath(source)!r} has only the token of {record.name!r}: its strategy {record.strategy!r} changed the model. Load the "
            "pipeline with all concepts by `DiffusionPipeline.from_pretrained`: `model/` in the run's folder, or the run's repository."
        )
    denoiser = denoiser_of(pipe)
    if not record.has_adapter:
        if name is not None:
            raise ValueError(f"`name` is {name!r}, expected None: {os.fspath(source)!r} has no adapter, only a token.")
        return load_token_rows(pipe, folder, is_known=is_known)
    name = record.name if name is None else name
    active = denoiser.active_adapters() if getattr(denoiser, "peft_config", None) else []
    load_adapter(denoiser, folder, adapter_name=name)
    try:
        token = load_token_rows(pipe, folder)
    except Exception:
        remove_adapters(denoiser, [name])
        if active:
            denoiser.set_adapter(active)
        raise
    if record.mixture_power is not None:
        mixture = vars(denoiser).get("prompt_mixture") or PromptMixture(pipe)
        denoiser.prompt_mixture = mixture
        mixture.add(name, f"{token} {record.noun}", record.mixture_power)
        denoiser.set_adapter(mixture.adapters)
    return token


def denoiser_of(pipe: Any) -> Any:
    """Return a pipeline's U-Net, or its transformer if it has none; it takes adapters."""
    return with_adapter_methods(pipe.transformer if getattr(pipe, "unet", None) is None else pipe.unet)


def activate(denoiser: Any, adapter_names: Sequence[str]) -> None:
    """Let exactly these adapters of a denoiser act, together; without any, the base draws."""
    if adapter_names:
        denoiser.enable_adapters()
        denoiser.set_adapter(list(adapter_names))
    elif getattr(denoiser, "peft_config", None):
        denoiser.disable_adapters()
