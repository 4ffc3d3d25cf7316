"""States of a text for each cross-attention layer of a U-Net, for tokens that have rows of their own for each layer.

The text encoder runs once for each layer, and returns the states of all runs side by side, which pipelines pass on as they are.
Each cross-attention layer reads those of its own run. Only hooks are added, so stock pipelines draw with such tokens, too.

Source: P+, arXiv 2303.09522: a row for each cross-attention layer [text]; their order, the way down, middle, way up, as in the public
code of Mix-of-Show [code]; hooks and states side by side are [ours].
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional


_ORDER = ("down_blocks", "mid_block", "up_blocks")


class LayerStates(nn.Module):
    """Connects a text encoder with the cross-attention layers of a U-Net, as long as both exist.

    The encoder's states have the shape `(b, length, layers * width)` afterwards. If rows of a prompt do not differ between layers, a
    layer reads the very states of an encoder without this.

    Args:
        encoder: a text encoder of transformers, whose only output that is read is its last hidden state.
        unet: a `UNet2DConditionModel`.

    Attributes:
        names: of the cross-attention layers, in the order of their rows.
        current: number of the layer that the encoder runs for.
    """

    def __init__(self, encoder: Any, unet: Any) -> None:
        super().__init__()
        self.names = cross_attentions(unet)
        self.current = 0
        self.width: int = encoder.config.hidden_size
        encoder.register_forward_hook(self._run_for_others, with_kwargs=True)
        for number, name in enumerate(self.names):
            hook = partial(self._give, number)
            unet.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    def add(self, encoder: Any, first: int, rows: torch.Tensor) -> None:
        """Put constant rows `(layers, num_vectors, width)` in the place of the embeddings of `first` and the ids after it."""
        embedding = encoder.get_input_embeddings()
        self.register_buffer(f"rows_{first}", rows.to(embedding.weight), persistent=False)
        embedding.register_forward_hook(partial(self._put_in, first))

    def own(self, number: int, states: torch.Tensor) -> torch.Tensor:
        """Return the states `(..., width)` that layer `number` reads, of those for all, `(..., layers * width)`."""
        if states.shape[-1] != (expected := len(self.names) * self.width):
            raise ValueError(
                f"The states of the text have width {states.shape[-1]}, expected {expected}, those of {len(self.names)} layers side by side: "
                "with layer-wise tokens, give prompts, and no `clip_skip`."
            )
        return states[..., number * self.width : (number + 1) * self.width].contiguous()

    def _run_for_others(self, encoder: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        if self.current:
            return out
        states = [out[0]]
        try:
            for number in range(1, len(self.names)):
                self.current = number
                states.append(encoder(*args, **kwargs)[0])
        finally:
            self.current = 0
        if isinstance(out, tuple):
            return (torch.cat(states, dim=-1), *out[1:])
        out.last_hidden_state = torch.cat(states, dim=-1)
        return out

    def _give(self, number: int, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "encoder_hidden_states": self.own(number, kwargs["encoder_hidden_states"])}

    def _put_in(self, first: int, _: nn.Module, arguments: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return put_in(out, arguments[0] - first, self.get_buffer(f"rows_{first}")[self.current])


def put_in(out: torch.Tensor, places: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return embeddings `(b, length, width)` with rows of a table `(n, width)` at its places `(b, length)`; others have none."""
    is_new = (places >= 0) & (places < len(table))
    rows = functional.embedding(places.clamp(0, len(table) - 1), table.to(out))
    return torch.where(is_new.unsqueeze(-1), rows, out)


def cross_attentions(unet: Any) -> list[str]:
    """Return the names of a U-Net's cross-attention layers: on the way down, in the middle, on the way up."""
    names = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    return sorted(names, key=lambda name: _ORDER.index(name.split(".")[0]))


def layer_states(encoder: Any, unet: Any) -> LayerStates:
    """Return what connects a text encoder and a U-Net; made at the first call, and a part of the encoder since then."""
    known = next((one for one in encoder.children() if isinstance(one, LayerStates)), None)
    if known is None:
        known = encoder.layer_states = LayerStates(encoder, unet)
    return known
