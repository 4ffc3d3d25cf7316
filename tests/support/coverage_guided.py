"""Runs one reader on what libFuzzer makes of sound files, led by the branches that each try takes; this ends the process.

    python tests/support/coverage_guided.py READER FOLDER [options of libFuzzer, such as -runs=10000]

FOLDER gets the sound files, in `corpus`; libFuzzer adds each file there that takes a new branch, and puts beside it
the one that fails.
"""

from __future__ import annotations

import io
import json
import resource
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import atheris
import numpy as np
from hostile import HANG, MOST_MEMORY, pack


with atheris.instrument_imports(include=["funlora_hf", "yaml", "PIL"]):
    import yaml
    from PIL import Image

    from funlora_hf import FunLoraConfig
    from funlora_hf.adapters.untrusted_adapter import read_config, read_header
    from funlora_hf.adapters.untrusted_bank import read_bank
    from funlora_hf.adapters.untrusted_base import base_classes
    from funlora_hf.data.image_data import ImageClassificationData, _Part
    from funlora_hf.data.untrusted_images import FORMATS
    from funlora_hf.recipes.reading import read_recipe
    from funlora_hf.utils.files import read_tensors


CONFIG = FunLoraConfig(target_modules=["conv_in"], class_label=7, class_name="n").to_dict()
TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
}
ABOUT = {"config": CONFIG, "layout": [["a", [1, 2]], ["b", [2]]], "classes": [[7, "n"], [9, "m"]]}
BANK = {
    "__metadata__": {"adapter_bank": json.dumps(ABOUT)},
    "adapters": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
}


class _OneRow:
    """As much of a dataset as its images are read by."""

    def __init__(self, content: bytes):
        self.content = content

    def select(self, _) -> list[dict]:
        return [{"image": {"bytes": self.content, "path": None}}]


def _image(content: bytes) -> None:
    part = _Part("train", _OneRow(content), {0: np.zeros(1, dtype=np.int64)})
    data = ImageClassificationData(
        name="data", class_names={0: "n"}, image_shape=(3, 8, 8), image_column="image", parts={"train": part}
    )
    assert data.images(0).shape == (1, 3, 8, 8)


@atheris.instrument_func
def _careless(content: bytes) -> None:
    """Fails for one of four thousand million beginnings, which is only found step by step."""
    prefix = b"\x07\x80\x2a\x91"
    if content[:1] == prefix[:1]:  # noqa: SIM102 - each step has to be a branch
        if content[1:2] == prefix[1:2]:  # noqa: SIM102
            if content[2:3] == prefix[2:3]:  # noqa: SIM102
                if content[3:4] == prefix[3:4]:
                    raise KeyError(content)


def _images() -> list[bytes]:
    found = []
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        for kind in FORMATS:
            buffer = io.BytesIO()
            try:
                Image.fromarray(pixels).convert(mode).save(buffer, kind)
            except (OSError, KeyError, ValueError):  # not every format has every mode, nor every Pillow every format
                continue
            found.append(buffer.getvalue())
    return found


def _of_file(name: str, read: Callable[[Path], object]) -> Callable[[Path], Callable[[bytes], None]]:
    """A reader of the bytes of a file with this name, which lies in the folder that it is given."""

    def of_folder(folder: Path) -> Callable[[bytes], None]:
        file = folder / name
        (folder / "config.json").write_text('{"num_class_embeds": 2}')  # a base's, for its index

        def of_bytes(content: bytes) -> None:
            file.write_bytes(content)
            read(file)

        return of_bytes

    return of_folder


RECIPE = "# a comment\nseed: 3\nclass_order: [1, 2]\nunet_config: {sample_size: 8}\ntext: 'a'\nrate: 1.0e-3\n"
READERS = {
    "recipe": (
        _of_file("recipe.yaml", lambda file: read_recipe(file, known=["seed", "rate", "class_order"])),
        [RECIPE.encode(), RECIPE.encode("utf-16"), b"? [a, b]\n: !!binary aGk=\n", b"- 2001-01-01\n- .inf\n- 0x1f\n"],
    ),
    "config": (
        _of_file("adapter_config.json", lambda file: read_config(file.parent)),
        [json.dumps(CONFIG, default=sorted).encode(), b'{"peft_type": "LORA", "r": 2, "target_modules": ["a"]}'],
    ),
    "tensors": (
        _of_file("data.safetensors", lambda file: read_tensors(file, remedy="make it anew", keys=["a"])),
        [pack(TENSORS, bytes(12))],
    ),
    "shapes": (
        _of_file("adapter_model.safetensors", read_header),
        [pack(TENSORS, bytes(12))],
    ),
    "bank": (_of_file("bank.safetensors", read_bank), [pack(json.loads(json.dumps(BANK, default=sorted)), bytes(32))]),
    "base": (
        _of_file("model_index.json", lambda file: base_classes(file.parent)),
        [b'{"_class_name": "FunLoraPipeline", "class_ids": [3, 5], "id2label": {"3": "three"}}'],
    ),
    "image": (lambda folder: _image, _images()),
    "careless": (lambda folder: _careless, [b"sound"]),
}


def attempt(read: Callable[[bytes], None], content: bytes) -> None:
    """One try: it is read, or refused in plain words by what the readers say that they raise."""
    kind, text = None, ""
    try:
        read(content)
    except (ValueError, OSError) as error:
        # The error itself is not kept: its frames hold what was read, which may be a large image.
        kind, text = type(error), str(error)
    if kind is not None:
        assert 0 < len(text) < 5000, text[:5000]
        assert not issubclass(kind, yaml.YAMLError | UnicodeError | json.JSONDecodeError), (kind, text)


def main(reader: str, folder: str, *options: str) -> None:
    """Does not come back: libFuzzer ends the process, with 0 if each try was well."""
    make, sound = READERS[reader]
    read, corpus = make(Path(folder)), Path(folder) / "corpus"
    corpus.mkdir()
    for number, content in enumerate(sound):
        (corpus / f"sound-{number}").write_bytes(content)
        attempt(read, content)
    warnings.simplefilter("ignore")
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    limits = [f"-timeout={HANG}", f"-rss_limit_mb={used + MOST_MEMORY // 2**20}"]
    atheris.Setup(
        [sys.argv[0], *limits, f"-artifact_prefix={folder}/", *options, str(corpus)], lambda c: attempt(read, c)
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
