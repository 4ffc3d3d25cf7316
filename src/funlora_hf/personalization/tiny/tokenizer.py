"""The tokenizer of the tiny base: CLIP's, with the words of the captions.

Source: [ours].
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from transformers import CLIPTokenizer

from ...utils.files import read_json


_MAX_LENGTH = 20


def make_tokenizer(words: Sequence[str]) -> CLIPTokenizer:
    """Return a CLIP tokenizer in which each of the words, which are lower-case, is one token."""
    merges = _merges(words)
    # Each character inside a word and at its end, so that other words, too, have tokens.
    characters = [chr(code) for code in range(33, 127)]
    tokens = [*characters, *(f"{one}</w>" for one in characters), *("".join(merge) for merge in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        files = _write_vocabulary(Path(folder), {token: number for number, token in enumerate(tokens)}, merges)
        return CLIPTokenizer(*files, model_max_length=_MAX_LENGTH)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merge the most frequent pair until each word is one token. The trainer of `tokenizers` breaks ties by chance."""
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for parts in split for pair in pairwise(parts)):
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        for parts in split:
            for place in reversed(range(len(parts) - 1)):
                if tuple(parts[place : place + 2]) == merges[-1]:
                    parts[place : place + 2] = ["".join(merges[-1])]
    return merges


def _write_vocabulary(folder: Path, vocabulary: dict[str, int], merges: Sequence[Sequence[str]]) -> tuple[str, str]:
    files = folder / "vocab.json", folder / "merges.txt"
    files[0].write_text(json.dumps(vocabulary), encoding="utf-8")
    files[1].write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    return str(files[0]), str(files[1])


def add_vocabulary(folder: Path) -> None:
    """Write the two files from which transformers 4 reads a tokenizer; transformers 5 writes another one only."""
    if (folder / "tokenizer.json").exists():
        model = read_json(folder / "tokenizer.json")["model"]
        _write_vocabulary(folder, model["vocab"], model["merges"])
