"""New words for text encoders: the rows of their embeddings are parameters, trained, saved and loaded by themselves.

Saved rows are what `load_textual_inversion` of diffusers reads: `learned_embeds.safetensors` for the first text encoder,
`learned_embeds_2.safetensors` for the second, each with one tensor `(num_vectors, width)` under the token's name.

Layer-wise rows have the shape `(layers, num_vectors, width)`, a matrix for each cross-attention layer of the U-Net (see
`layer_states`); diffusers does not read these, `load_token_rows` does.

CLIP text encoders whose config has `eos_token_id` 2, as those of SDXL, SD3 and Flux, take the pooled states at the highest id of a
prompt: at a new token, if it has one. The stock pipelines do the same, so a row is trained as it is used.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import nn

from ..utils.checks import check_at_least_one
from ..utils.files import read_tensors, write_tensors
from ..utils.tensors import not_finite
from .families import FAMILIES, Family
from .layer_states import LayerStates, cross_attentions, layer_states, put_in


# In the order of a pipeline. T5 gets rows in PixArt and Flux; as the third of SD3 it gets none: it reads prompts without the tokens.
ROW_ENCODERS = ("text_encoder", "text_encoder_2")
ROW_FILES = {"text_encoder": "learned_embeds.safetensors", "text_encoder_2": "learned_embeds_2.safetensors"}
_REMEDY = "save the rows again, or take them from another folder"


class TokenRows(nn.Module):
    """Rows of new tokens in the embeddings of text encoders, all frozen at first.

    Adds the tokens to the tokenizers, which read a token with several vectors as `<v1> <v1>_1 ...` (see `with_vectors`), and
    enlarges the embeddings. A forward hook on each embedding puts the rows in; a saved text encoder has their present values.

    Args:
        encoders: text encoders by name, in the order of the pipeline.
        tokenizers: their tokenizers, by the same names.
        tokens: token -> initializer, a word whose embedding each vector of the token is a copy of; of a word of several pieces the
            mean.
        num_vectors: vectors of each token.
        layers: for layer-wise rows, what connects the only text encoder with the U-Net; None: rows are the same for all layers.

    Raises:
        ValueError: a token that a tokenizer has already or would not read as one, or an initializer that it does not know.
            Nothing is changed then.

    Source: textual inversion, arXiv 2208.01618; files and names of vectors as in diffusers [exact].
    """

    def __init__(
        self,
        encoders: Mapping[str, Any],
        tokenizers: Mapping[str, Any],
        tokens: Mapping[str, str],
        *,
        num_vectors: int = 1,
        layers: LayerStates | None = None,
    ) -> None:
        super().__init__()
        check_at_least_one("num_vectors", num_vectors)
        self.layers = layers
        of_layers = () if layers is None else (len(layers.names),)
        self.tokens, self.num_vectors = tuple(tokens), num_vectors
        starts = {
            key: [_start(tokenizers[key], encoder, word).expand(num_vectors, -1) for word in tokens.values()]
            for key, encoder in encoders.items()
        }
        for key in encoders:
            _check_new(tokenizers[key], self.tokens, num_vectors)
        self.rows = nn.ModuleDict()
        self._embeddings: dict[str, tuple[Any, int]] = {}
        for key, encoder in encoders.items():
            self.rows[key] = nn.ParameterList(
                nn.Parameter(start.expand(*of_layers, *start.shape).clone(), requires_grad=False)
                for start in starts[key]
            )
            first = _add(tokenizers[key], encoder, self.tokens, torch.cat(starts[key]))
            embedding = encoder.get_input_embeddings()
            self._embeddings[key] = embedding, first
            embedding.register_forward_hook(partial(self._put_in, key))
            embedding.register_state_dict_pre_hook(partial(self._write, key))

    def parameters_of(self, token: str) -> dict[str, nn.Parameter]:
        """Return the rows of a token, `(num_vectors, width)`, float32, by text encoder; layer-wise `(layers, num_vectors, width)`."""
        if token not in self.tokens:
            raise ValueError(f"`token` is {token!r}, expected one of: {', '.join(map(repr, self.tokens))}.")
        index = self.tokens.index(token)
        return {key: rows[index] for key, rows in self._lists()}

    def train_only(self, tokens: Iterable[str]) -> None:
        """Train the rows of these tokens, freeze all others."""
        trained = {id(parameter) for token in tokens for parameter in self.parameters_of(token).values()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in trained)

    def read_by(self, key: str, ids: torch.Tensor) -> torch.Tensor:
        """Whether prompts, given by their ids `(n, length)` for the text encoder `key`, have a new token: `(n,)`, bool."""
        places = ids - self._embeddings[key][1]
        return ((places >= 0) & (places < len(self.tokens) * self.num_vectors)).any(dim=1)

    def save(self, token: str, folder: str | os.PathLike) -> None:
        """Write the rows of a token for `load_textual_inversion` and `load`.

        Raises:
            ValueError: unknown token, or numbers that are not finite; nothing is written then.
        """
        rows = {key: row.detach().cpu().clone() for key, row in self.parameters_of(token).items()}
        if problems := not_finite(rows):
            raise ValueError(f"The rows of {token!r} are not saved: {'; '.join(problems)}.")
        for key, row in rows.items():
            write_tensors(Path(folder) / ROW_FILES[key], {token: row})

    @torch.no_grad()
    def load(self, token: str, folder: str | os.PathLike) -> None:
        """Read the rows of a token from a folder, whichever token they were saved for.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: unknown token, or files that do not fit these text encoders; the rows are unchanged then.
        """
        rows = self.parameters_of(token)
        _, loaded = read_rows(Path(folder), rows)
        for key, row in rows.items():
            if loaded[key].shape != row.shape:
                raise ValueError(
                    f"{os.fspath(Path(folder) / ROW_FILES[key])!r} has rows of the shape {tuple(loaded[key].shape)}, expected "
                    f"{tuple(row.shape)}: {_REMEDY}."
                )
        for key, row in rows.items():
            row.copy_(loaded[key])

    def _lists(self) -> list[tuple[str, Any]]:
        return list(self.rows.items())

    def _table(self, key: str) -> torch.Tensor:
        return torch.cat(list(self.rows[key].parameters()), dim=-2)

    def _put_in(self, key: str, _: nn.Module, arguments: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        table = self._table(key)
        if self.layers is not None:
            table = table[self.layers.current]
        return put_in(out, arguments[0] - self._embeddings[key][1], table)

    @torch.no_grad()
    def _write(self, key: str, *_: Any) -> None:
        (embedding, first), table = self._embeddings[key], _plain(self._table(key))
        embedding.weight[first : first + len(table)] = table.to(embedding.weight)


def load_token_rows(pipe: Any, folder: str | os.PathLike, *, is_known: bool = False) -> str:
    """Put the rows of a folder into a stock pipeline, and return their token.

    As `load_textual_inversion`, which the pipelines of SD3 and PixArt have not. Call it before the text encoders are offloaded. For prompts, see `prompt_arguments`.

    Args:
        pipe: a pipeline of Stable Diffusion, SDXL, SD3, PixArt or Flux.
        folder: as from `TokenRows.save`.
        is_known: the pipeline has the token already, but not its layer-wise rows, as one that a run has saved.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: files that do not fit this pipeline, or a token that it has already. It is unchanged then.
    """
    encoders = {key: encoder for key in ROW_ENCODERS if (encoder := getattr(pipe, key, None)) is not None}
    token, rows = read_rows(Path(folder), encoders)
    tokenizers = {key: getattr(pipe, key.replace("text_encoder", "tokenizer")) for key in encoders}
    for key, encoder in encoders.items():
        weight = encoder.get_input_embeddings().weight
        name = os.fspath(Path(folder) / ROW_FILES[key])
        if rows[key].shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{name!r} has rows of width {rows[key].shape[-1]}, expected {weight.shape[1]}, that of `{key}`: {_REMEDY}."
            )
        if weight.is_meta:
            raise ValueError(f"`{key}` is offloaded: load the token before `enable_sequential_cpu_offload`.")
        if problems := not_finite({token: rows[key].to(weight.dtype)}):
            raise ValueError(f"{name!r} does not fit {weight.dtype}: {'; '.join(problems)}.")
        if rows[key].dim() == 3:
            _check_layers(pipe, name, len(rows[key]))
        if not is_known:
            _check_new(tokenizers[key], [token], rows[key].shape[-2])
        elif token not in tokenizers[key].get_vocab():
            raise ValueError(f"`{key}` does not know {token!r}: load the pipeline that its run has saved.")
    for key, encoder in encoders.items():
        if is_known:
            first = tokenizers[key].convert_tokens_to_ids(token)
        else:
            first = _add(tokenizers[key], encoder, [token], _plain(rows[key]))
        if rows[key].dim() == 3:
            layer_states(encoder, pipe.unet).add(encoder, first, rows[key])
    return token


def read_rows(folder: Path, encoders: Iterable[str]) -> tuple[str, dict[str, torch.Tensor]]:
    """Return the token of a folder and its rows, as of `TokenRows.parameters_of`, by the name of each of these text encoders.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a damaged file, or one of another text encoder.
    """
    encoders = list(encoders)
    if more := [name for key, name in ROW_FILES.items() if key not in encoders and (folder / name).exists()]:
        raise ValueError(
            f"{os.fspath(folder)!r} has {', '.join(more)}, for which there is no text encoder: {_REMEDY}."
        )
    rows: dict[str, torch.Tensor] = {}
    tokens: set[str] = set()
    for key in encoders:
        path = folder / ROW_FILES[key]
        tensors = read_tensors(path, remedy=_REMEDY)
        tokens |= tensors.keys()
        row = next(iter(tensors.values()), torch.empty(0))
        rows[key] = row.float() if row.dim() != 1 else row.float().unsqueeze(0)
        if len(tensors) != 1 or len(tokens) != 1 or rows[key].dim() not in (2, 3) or not rows[key].numel():
            raise ValueError(
                f"{os.fspath(path)!r} has {', '.join(sorted(tensors)) or 'nothing'}, expected one matrix, or one of each layer, and under the same token in each "
                f"file: {_REMEDY}."
            )
        if problems := not_finite(rows):
            raise ValueError(f"{os.fspath(path)!r} is damaged: {'; '.join(problems)}: {_REMEDY}.")
    return tokens.pop(), rows


def prompt_arguments(pipe: Any, prompt: str | Sequence[str]) -> dict[str, Any]:
    """Return the arguments under which a stock pipeline reads prompts with new tokens as they were trained.

    The pipelines of SD3 and PixArt know nothing of tokens with several vectors, and SD3's T5 nothing of new tokens. PixArt's would take
    a token for a tag and remove it, and draw in the nearest of its own sizes.

    Args:
        pipe: a pipeline of Stable Diffusion, SDXL, SD3, PixArt or Flux, with the tokens in its tokenizers.
        prompt: one or several.

    Returns:
        `prompt`; for SD3 also `prompt_3`, for PixArt `clean_caption` and `use_resolution_binning`, both False.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    family = next((one for one in FAMILIES if isinstance(pipe, one.pipeline)), Family)
    arguments = {"prompt": prompts, **family.arguments}
    if not isinstance(pipe, TextualInversionLoaderMixin):  # which does so itself
        # T5 distinguishes upper and lower case, but the pipeline of PixArt gives it lower case only.
        arguments["prompt"] = with_vectors([family.cleaned(text) for text in prompts], pipe.tokenizer)
    if hasattr(pipe, "tokenizer_3"):
        added = [str(token) for token in pipe.tokenizer.added_tokens_decoder.values() if not token.special]
        arguments["prompt_3"] = [without_tokens(text, added) for text in prompts]
    return arguments


def with_vectors(prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """Return prompts with every name of a token with several vectors: `<v1>` becomes `<v1> <v1>_1 ...`, as in diffusers."""
    return TextualInversionLoaderMixin().maybe_convert_prompt(list(prompts), tokenizer)


def prompt_length(prompt: str, tokenizer: Any) -> int:
    """Count the tokens of a prompt, with its start, its end, and every vector of new tokens that the tokenizer has."""
    return len(tokenizer(with_vectors([prompt], tokenizer)[0], verbose=False).input_ids)


def without_tokens(text: str, tokens: Iterable[str]) -> str:
    """Return a text without these tokens; "a <v1> toy" becomes "a toy"."""
    longest_first = sorted(tokens, key=len, reverse=True)
    if not longest_first:
        return text
    # CLIP's tokenizer does not distinguish upper and lower case.
    return " ".join(re.sub("|".join(map(re.escape, longest_first)), "", text, flags=re.IGNORECASE).split())


def _plain(rows: torch.Tensor) -> torch.Tensor:
    """Rows `(n, width)`; of layer-wise ones the mean, for those who cannot read them."""
    return rows if rows.dim() == 2 else rows.mean(dim=0)


def _check_layers(pipe: Any, name: str, layers: int) -> None:
    """Raise a ValueError unless a pipeline has one text encoder, and as many cross-attention layers as a file has rows for."""
    there = len(cross_attentions(pipe.unet)) if getattr(pipe, "unet", None) is not None else 0
    if there != layers or getattr(pipe, "text_encoder_2", None) is not None:
        raise ValueError(
            f"{name!r} has layer-wise rows for {layers} layers, expected a StableDiffusionPipeline with as many cross-attention layers, but "
            f"this {type(pipe).__name__} has {there}: take the pipeline that they were learned on."
        )


def _names(token: str, num_vectors: int) -> list[str]:
    return [token, *(f"{token}_{index}" for index in range(1, num_vectors))]


def _start(tokenizer: Any, encoder: Any, word: str) -> torch.Tensor:
    """The embedding of a word, `(1, width)`, float32."""
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        raise ValueError(f"The initializer is {word!r}, which the tokenizer does not know: take another word.")
    return encoder.get_input_embeddings().weight[ids].detach().float().mean(dim=0, keepdim=True)


def _check_new(tokenizer: Any, tokens: Sequence[str], num_vectors: int) -> None:
    """Raise a ValueError unless a tokenizer has none of these tokens, and would read each as one."""
    if num_vectors > (most := tokenizer.model_max_length - 2):
        raise ValueError(f"A token has {num_vectors} vectors, expected at most {most}, what a prompt has place for.")
    names = [name for token in tokens for name in _names(token, num_vectors)]
    known, trial = tokenizer.get_vocab(), copy.deepcopy(tokenizer)
    trial.add_tokens(names)
    for name in names:
        if name in known:
            raise ValueError(f"The token {name!r} is in the tokenizer already: take another one, such as '<new1>'.")
        # Some versions of a tokenizer distinguish upper and lower case, others do not.
        if (pieces := trial.tokenize(name)) != [name] or name != name.lower():
            raise ValueError(
                f"The token {name!r} is read as {pieces}, expected one token in lower case: take another one, such as '<new1>'."
            )


@torch.no_grad()
def _add(tokenizer: Any, encoder: Any, tokens: Sequence[str], rows: torch.Tensor) -> int:
    """Add tokens and their rows `(tokens * num_vectors, width)`, and return the first one's id."""
    names = [name for token in tokens for name in _names(token, len(rows) // len(tokens))]
    tokenizer.add_tokens(names)
    first = tokenizer.convert_tokens_to_ids(names[0])
    # Larger than the vocabulary is usual: the size is padded.
    size = max(len(tokenizer), encoder.get_input_embeddings().num_embeddings)
    trained = encoder.get_input_embeddings().weight.requires_grad
    encoder.resize_token_embeddings(size, mean_resizing=False)
    weight = encoder.get_input_embeddings().weight.requires_grad_(trained)
    weight[first : first + len(rows)] = rows.to(weight)
    return first
