"""Run each prompt of a pipeline's call through a separate adapter."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from ..tuner_base.layer import adapter_layers
from ..tuner_base.mixed_batch import check_adapter_names, give_names
from ..tuner_base.weights import cached_weights
from ..utils.checks import check_at_least_one


# Names of the models in pipelines that denoise: they get each prompt once for each of its images.
_DENOISERS = ("unet", "transformer")


@contextmanager
def mixed_prompts(
    pipe: DiffusionPipeline, adapter_names: Sequence[str], *, num_images_per_prompt: int = 1
) -> Iterator[None]:
    """Run each prompt of a pipeline's call through a separate adapter, in its U-Net or transformer and in its text encoders.

    With classifier-free guidance, most pipelines run all prompts twice in one batch, without and with the text. Such a batch is
    recognized by its samples, which are two equal halves. Effective weights are kept as in `cached_weights`.

    Other active adapters, such as a LoRA, act on all prompts. `scale` of a call (`cross_attention_kwargs={"scale": 0.5}`) reaches
    only active adapters: activate the adapters of the prompts first, by `pipe.set_adapters(["dog", "cat"])`.

    Args:
        pipe ([`DiffusionPipeline`]): a pipeline of diffusers with FunLoRA adapters in its models.
        adapter_names (`Sequence[str]`): the adapter of each prompt; `"__base__"`: no adapter.
        num_images_per_prompt (`int`, *optional*, defaults to 1): the value that the pipeline gets.

    Raises:
        ValueError: an adapter that no model of the pipeline has; inside, a call with another number of prompts or images per prompt.

    Source: [ours].

    Example:
        ```py
        >>> with mixed_prompts(pipe, ["dog", "cat"]):
        ...     images = pipe(["a photo of a dog", "a photo of a cat"]).images
        ```
    """
    check_at_least_one("num_images_per_prompt", num_images_per_prompt)
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    check_adapter_names(nn.ModuleList(models.values()), adapter_names)
    with ExitStack() as contexts:
        for name, model in models.items():
            if not adapter_layers(model):
                continue
            contexts.enter_context(cached_weights(model))
            if name.startswith(_DENOISERS):
                contexts.enter_context(_in_copies(pipe, model, adapter_names, num_images_per_prompt))
            else:
                for handle in give_names(model, adapter_names):
                    contexts.callback(handle.remove)
        yield


@contextmanager
def _in_copies(pipe: Any, model: nn.Module, adapter_names: Sequence[str], images: int) -> Iterator[None]:
    """Run a model's batches with these names, each for `images` samples, repeated as often as a batch repeats its samples."""
    names = expand_adapter_names(adapter_names, num_images_per_prompt=images, do_classifier_free_guidance=False)
    thread = threading.get_ident()
    handles: list[Any] = []
    copies = 0

    def give(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal copies
        if threading.get_ident() != thread:
            return
        batch = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        found = len(batch) // len(names) if names else 0
        first, *others = batch.split(max(len(names), 1))
        is_valid = found * len(names) == len(batch) and all(torch.equal(first, other) for other in others)
        # Some pipelines do not say whether they double the batch.
        is_guided = getattr(pipe, "do_classifier_free_guidance", found > 1 or images > 1)
        # Two equal halves mean that half as many prompts run twice.
        is_doubled = found == 1 and is_guided and len(batch) % 2 == 0 and torch.equal(*batch.chunk(2))
        if not is_valid or is_doubled or (found > 1 and not is_guided):
            raise ValueError(
                f"`adapter_names` has {len(adapter_names)} names and `num_images_per_prompt` is {images}, but {type(module).__name__} "
                f"got a batch of {len(batch)} samples, expected {len(names)}, all different, or with guidance copies of them: pass "
                "one name for each prompt, and the `num_images_per_prompt` of the call."
            )
        if found != copies:
            _remove(handles)
            handles[:] = give_names(model, names * found)
            copies = found

    own = model.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        _remove([own, *handles])


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def expand_adapter_names(
    adapter_names: Sequence[str], *, num_images_per_prompt: int = 1, do_classifier_free_guidance: bool = True
) -> list[str]:
    """Expand the adapter of each prompt to the names for `mixed_batch`, in your own sampling loop.

    For a pipeline's call, use `mixed_prompts`. Like pipelines, it repeats each prompt `num_images_per_prompt` times, and with
    classifier-free guidance the whole batch twice, without and with the prompts.

    Args:
        adapter_names: the adapter of each prompt.
        num_images_per_prompt: images for each prompt.
        do_classifier_free_guidance: whether `guidance_scale` is above 1.

    Returns:
        One name for each sample in the model's batch.
    """
    names = [name for name in adapter_names for _ in range(num_images_per_prompt)]
    return names * 2 if do_classifier_free_guidance else names
