"""Prompts for regions of an image, each with its own adapters, in a call of a stock pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..tuner_base.wrappers import adapter_names_in
from .load_concept import activate, denoiser_of


@dataclass(frozen=True)
class Region:
    """A box of an image and its prompt.

    Args:
        box: `(left, top, right, bottom)`, fractions of width and height from 0 to 1; (0, 0, 0.5, 1) is the left half.
        prompt: what to draw there.

    Raises:
        ValueError: an empty box, one that leaves the image, or an empty prompt.
    """

    box: tuple[float, float, float, float]
    prompt: str

    def __post_init__(self) -> None:
        shown = ",".join(map(str, self.box))
        if not self.prompt.strip():
            raise ValueError(f"The region {shown} has an empty prompt, expected what to draw there.")
        # In this form it also refuses NaN.
        if len(self.box) != 4 or not all(0 <= self.box[axis] < self.box[axis + 2] <= 1 for axis in (0, 1)):
            raise ValueError(
                f"The region {shown} of {self.prompt!r} is no box in the image, expected left,top,right,bottom from 0 to 1, left below "
                "right and top below bottom, such as 0,0,0.5,1."
            )

    @classmethod
    def parse(cls, text: str) -> Region:
        """Read "left,top,right,bottom: prompt". Raises a ValueError for another text."""
        numbers, _, prompt = text.partition(":")
        try:
            left, top, right, bottom = map(float, numbers.split(","))
        except ValueError as error:
            raise ValueError(
                f"`--region` is {text!r}, expected 'left,top,right,bottom: prompt' with four numbers from 0 to 1, such as "
                "'0,0,0.5,1: a photo of a <new1> toy'."
            ) from error
        return cls((left, top, right, bottom), prompt.strip())

    def mask(self, height: int, width: int) -> torch.Tensor:
        """Return which latents belong to the box, bool `(height, width)`: those whose centre is in it, so boxes side by side do not overlap.

        Raises:
            ValueError: the box has no centre of a latent.
        """
        left, top, right, bottom = self.box
        ys, xs = ((torch.arange(size, dtype=torch.float64) + 0.5) / size for size in (height, width))
        mask = ((ys >= top) & (ys < bottom))[:, None] & ((xs >= left) & (xs < right))
        if not mask.any():
            raise ValueError(
                f"The region {','.join(map(str, self.box))} of {self.prompt!r} has the centre of none of the {width} x {height} latents of the "
                "image: make it larger."
            )
        return mask


@contextmanager
def prompts_in_regions(
    pipe: Any, regions: Sequence[Region], adapter_names: Sequence[Sequence[str]] = ()
) -> Iterator[None]:
    """Draw each region of a pipeline's images by its own prompt and adapters.

    In each step, the denoiser runs for the call's prompt, with the adapters that are active, and once more for each region. Inside a
    box, its prediction replaces the others, before guidance and with it: in both halves of the batch. Where boxes overlap, the later
    region wins. Every pass reads the whole image. Negative prompt, scheduler and all else are those of the call.

    Args:
        pipe: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.
        regions: boxes and prompts.
        adapter_names: for each region, the adapters of the denoiser that act together in it; (): the base in all.

    Raises:
        ValueError: another pipeline, one inside such a context, another number of `adapter_names`, or an adapter that is not there; inside, a call without a prompt,
            or a box that is too small for a latent.

    Source: [ours]; after MultiDiffusion, arXiv 2302.08113, which draws by prompts with masks or boxes.

    Example:
        ```py
        >>> left, right = Region((0, 0, 0.5, 1), "a photo of a <a> toy"), Region((0.5, 0, 1, 1), "a photo of a <b> badge")
        >>> with prompts_in_regions(pipe, [left, right], [["a"], ["b"]]):
        ...     image = pipe("a photo on a black background").images[0]
        ```
    """
    if not isinstance(pipe, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
        raise ValueError(
            f"`pipe` is a {type(pipe).__name__}, expected a StableDiffusionPipeline or a StableDiffusionXLPipeline: for other families, draw "
            "without regions."
        )
    if "encode_prompt" in vars(pipe):
        raise ValueError("`pipe` has regions already, expected none: give all in one context.")
    denoiser = denoiser_of(pipe)
    names = list(adapter_names) or [()] * len(regions)
    if len(names) != len(regions):
        raise ValueError(f"`adapter_names` has {len(names)} entries, expected one for each of {len(regions)} regions.")
    known = adapter_names_in(denoiser)
    if unknown := sorted({name for some in names for name in some} - known):
        raise ValueError(
            f"`adapter_names` has {', '.join(unknown)}, expected adapters of the denoiser: {', '.join(sorted(known)) or 'none'}."
        )
    passes = _Passes(regions, names, pipe.encode_prompt)
    handle = denoiser.register_forward_hook(passes.combine, with_kwargs=True)
    pipe.encode_prompt = passes.encode_prompt
    try:
        yield
    finally:
        del pipe.encode_prompt
        handle.remove()


class _Passes:
    """The passes of a denoiser for regions."""

    def __init__(self, regions: Sequence[Region], adapter_names: Sequence[Sequence[str]], encode_prompt: Any) -> None:
        self.regions, self.adapter_names, self._encode = regions, adapter_names, encode_prompt
        self._encoded: list[tuple[torch.Tensor, ...]] = []
        self._inside = False

    def encode_prompt(self, prompt: Any = None, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """As the pipeline's; with its arguments, also encode the regions' prompts, once for each prompt of the call."""
        if prompt is None:
            raise ValueError(
                "`prompt` is None, expected text: with regions, the call's prompt is for what is outside of them."
            )
        second = {"prompt_2": None} if "prompt_2" in kwargs else {}
        self._encoded = []
        for region in self.regions:
            # The pipelines compare its type with that of the negative prompt.
            others = region.prompt if isinstance(prompt, str) else [region.prompt] * len(prompt)
            self._encoded.append(self._encode(others, *args, **{**kwargs, **second}))
        return self._encode(prompt, *args, **kwargs)

    def combine(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any], out: tuple) -> tuple:
        """Hook after the denoiser: put the regions' predictions into that of the call's prompt, `(b, c, h, w)`."""
        if self._inside:
            return out
        combined, self._inside = out[0], True
        try:
            with _adapters_restored(denoiser):
                for region, names, encoded in zip(self.regions, self.adapter_names, self._encoded, strict=True):
                    activate(denoiser, names)
                    prediction = denoiser(*args, **{**kwargs, **_conditions(kwargs, encoded)})[0]
                    mask = region.mask(*combined.shape[-2:]).to(combined.device)
                    combined = torch.where(mask, prediction, combined)
        finally:
            self._inside = False
        return (combined, *out[1:])


def _conditions(kwargs: dict[str, Any], encoded: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Return the denoiser's arguments that depend on the prompt, with another one: what `encode_prompt` has returned."""

    def replaced(given: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        # With guidance, the states without the prompt come first.
        return torch.cat([given[: len(given) - len(states)], states.to(given)])

    conditions: dict[str, Any] = {"encoder_hidden_states": replaced(kwargs["encoder_hidden_states"], encoded[0])}
    if (added := kwargs.get("added_cond_kwargs")) and "text_embeds" in added:
        # Of SDXL, the pooled states come third.
        conditions["added_cond_kwargs"] = {**added, "text_embeds": replaced(added["text_embeds"], encoded[2])}
    return conditions


@contextmanager
def _adapters_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards, the adapters that are active, and what is trained, are as before."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    states = [(layer, layer.active_adapters, layer.disable_adapters) for layer in layers]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for layer, active, disabled in states:
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
