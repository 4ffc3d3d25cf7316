"""Whatever bytes the files of a base have, it is refused in plain words or loaded: no hang, no import, memory within the cap."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hostile import ABSURD, JSON, bounded, examples, guarded, pack, unpack
from hypothesis import given
from hypothesis import strategies as st
from runs import make_tiny_unet, write_adapters

from funlora_hf import FunLoraConfig, FunLoraPipeline
from funlora_hf.adapters.untrusted_base import base_classes, load_base, read_unet
from funlora_hf.continual.base import find_base


INDEX, UNET, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
CONFIG, CARD = "adapters/class_7/adapter_config.json", "adapters/class_7/README.md"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NAMES = ["../../x", "/etc/passwd", "a\0b", "a\nb", "x" * 10**6, "\ud800", "<b>", ""]
VALUES = JSON | st.sampled_from(
    [*ABSURD, *NAMES, float("nan"), ["os", "system"], ["diffusers", "x"], [3, 3], {"3": "5", "5": "5"}]
)
LOADERS = [FunLoraPipeline.from_pretrained, find_base, read_unet, base_classes]
TIMES = pytest.mark.parametrize("times", [1, pytest.param(60, marks=pytest.mark.soak, id="sixty-times-as-many")])
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_guard")]


@pytest.fixture(scope="module")
def _guard():
    with guarded():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "base"
    pipe = FunLoraPipeline(make_tiny_unet(), FlowMatchEulerDiscreteScheduler(), [3, 5], {3: "three"})
    pipe.save_pretrained(folder)
    write_adapters(pipe, folder, classes=[7], base=False, class_label=7, target_modules=["conv_in"], class_name="n")
    contents = {name: (folder / name).read_bytes() for name in (INDEX, UNET, SCHEDULER, CONFIG, CARD, WEIGHTS)}
    return folder, contents


def attempt(folder: Path, loader) -> str | None:
    """The message that a base is refused with; None if it is loaded."""
    try:
        with bounded():
            found = loader(str(folder) if loader is find_base else folder)
    except (ValueError, OSError) as error:
        text = str(error)
    else:
        if isinstance(found, FunLoraPipeline):
            assert all(isinstance(label, int) and 0 <= label < 2**63 for label in found.classes)
            assert all(len(name) <= 1000 for name in found.classes.values())
        return None
    assert str(folder) in text or "`" in text, text
    assert len(text) < 20_000
    return text


def spoil(base, name: str, content: bytes) -> Path:
    folder, contents = base
    for other, sound in contents.items():
        (folder / other).write_bytes(content if other == name else sound)
    return folder


def test_the_sound_base_loads(base):
    folder = spoil(base, "", b"")
    assert [attempt(folder, loader) for loader in LOADERS] == [None] * 4


@TIMES
@pytest.mark.parametrize("name", [INDEX, UNET, SCHEDULER, CONFIG])
def test_other_values_in_the_json(name, times, base):
    sound = json.loads(base[1][name])
    modules = {*sys.modules}
    loaded = refused = 0

    @examples(40 * times)
    @given(
        st.sampled_from([*sound, "x", "quantization_config", "auto_map", "_name_or_path"]),
        VALUES,
        st.sampled_from(LOADERS),
    )
    def check(key, value, loader):
        nonlocal loaded, refused
        folder = spoil(base, name, json.dumps({**copy.deepcopy(sound), key: value}).encode())
        text = attempt(folder, loader)
        loaded, refused = loaded + (text is None), refused + (text is not None)

    check()
    assert loaded
    assert refused or name == SCHEDULER
    assert not {"antigravity", "this", "turtle"} & ({*sys.modules} - modules)


@TIMES
@pytest.mark.parametrize("name", [INDEX, UNET, SCHEDULER, CONFIG, CARD, WEIGHTS])
def test_other_bytes(name, times, base):
    sound = base[1][name]
    spoiled = st.one_of(
        st.binary(max_size=64),
        st.integers(0, len(sound) - 1).map(lambda end: sound[:end]),
        st.tuples(st.integers(0, min(len(sound), 3000)), st.binary(min_size=1, max_size=4)).map(
            lambda pair: sound[: pair[0]] + pair[1] + sound[pair[0] + len(pair[1]) :]
        ),
        st.sampled_from(
            [
                b"[" * 10**5,
                b'{"a":' * 10**5,
                b"[]",
                b"null",
                b"1" * 5000,
                b"\xff\xfe",
                b"---\n" + b"[" * 10**4 + b"\n---\n",
            ]
        ),
    )

    @examples(15 * times)
    @given(spoiled, st.sampled_from(LOADERS))
    def check(content, loader):
        attempt(spoil(base, name, content), loader)

    check()


@TIMES
def test_other_tensors(times, base):
    header, body = unpack(base[1][WEIGHTS])
    keys = [key for key in header if key != "__metadata__"]

    @examples(30 * times)
    @given(st.sampled_from(keys), st.sampled_from(["dtype", "shape", "data_offsets", "none", "more"]), VALUES)
    def check(key, part, value):
        spoiled = copy.deepcopy(header)
        if part == "none":
            del spoiled[key]
        elif part == "more":
            spoiled[key + "2"] = spoiled[key]
        else:
            spoiled[key][part] = value
        assert attempt(spoil(base, WEIGHTS, pack(spoiled, body)), read_unet) or part == "dtype"

    check()


FOUND = {
    "another library": (INDEX, {"unet": ["os", "system"]}, "no other library is loaded"),
    "a library that does something": (INDEX, {"unet": ["antigravity", "fly"]}, "no other library is loaded"),
    "another class": (INDEX, {"scheduler": ["diffusers", "DDPMScheduler"]}, "no other library is loaded"),
    "no pair": (INDEX, {"unet": "UNet2DModel"}, "no other library is loaded"),
    "code beside it": (INDEX, {"_class_name": ["pipeline", "Evil"]}, "no code of a folder is run"),
    "code in a component": (INDEX, {"unet": ["evil", "UNet2DModel"]}, "no other library is loaded"),
    "a name too long": (INDEX, {"id2label": {"3": "x" * 10**6}}, "of 1000000 characters"),
    "half a surrogate pair": (INDEX, {"id2label": {"3": "\ud800"}}, "half a surrogate pair"),
    "ids that are none": (INDEX, {"class_ids": ["a", None]}, "`class_ids`"),
    "names that are none": (INDEX, {"id2label": [1, 2]}, "`id2label`"),
    "negative ids": (INDEX, {"class_ids": [-1, 5]}, "`class_label` is -1"),
    "huge ids": (INDEX, {"class_ids": [2**63, 5]}, "`class_label` is 9223372036854775808"),
    "channels": (UNET, {"block_out_channels": [10**9, 16]}, "has 1000000000, expected numbers of 65536"),
    "layers": (UNET, {"layers_per_block": 10**9}, "has 1000000000, expected numbers of 64"),
    "classes": (UNET, {"num_class_embeds": 10**12}, "has 1000000000000"),
    "pixels": (UNET, {"sample_size": 10**6}, "has 1000000, expected numbers of 4096"),
}


@pytest.mark.parametrize("name", FOUND)
def test_bases_that_are_refused(name, base):
    """By the pipeline, before anything is imported, made or run."""
    file, changes, expected = FOUND[name]
    folder = spoil(base, file, json.dumps({**json.loads(base[1][file]), **changes}).encode())
    code = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    for place in (folder / "pipeline.py", folder / "unet" / "evil.py"):
        place.write_text(code)
    text = attempt(folder, FunLoraPipeline.from_pretrained)
    assert text is not None
    assert expected in text
    assert not list(folder.rglob("ran"))
    assert "antigravity" not in sys.modules


def test_names_become_no_paths(base, tmp_path):
    """Those of the base go into its JSON as they are, and into no name of a file."""
    index = {**json.loads(base[1][INDEX]), "id2label": {"3": NAMES[0], "5": NAMES[2]}}
    folder = spoil(base, INDEX, json.dumps(index).encode())
    pipe = FunLoraPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    again = FunLoraPipeline.from_pretrained(tmp_path / "a" / "b")
    assert again.classes == pipe.classes == {3: NAMES[0], 5: NAMES[2], 7: "n"}
    sample = torch.zeros(2, 1, 8, 8)
    found = [one.predict_velocity(sample, torch.tensor(0.5), [NAMES[0], "n"]) for one in (pipe, again)]
    assert torch.equal(*found)


def test_pickles_are_not_read(base, tmp_path):
    folder = Path(shutil.copytree(spoil(base, "", b""), tmp_path / "copy"))
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "unet" / "diffusion_pytorch_model.bin")
    assert attempt(folder, FunLoraPipeline.from_pretrained)


@pytest.mark.parametrize(
    "shard", ["evil.bin", "../unet/evil.safetensors", "/etc/evil.safetensors", "evil.safetensors.bin", 3, None, ["x"]]
)
def test_an_index_names_safetensors_in_its_folder_only(shard, base, tmp_path):
    """Also under a variant's name, and for a U-Net that an adapter's config names."""
    folder = Path(shutil.copytree(spoil(base, "", b""), tmp_path / "copy"))
    for variant in ("", ".fp16"):
        index = folder / "unet" / f"diffusion_pytorch_model.safetensors.index{variant}.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"conv_in.weight": shard}}))
        for loader in LOADERS:
            assert "expected safetensors files in the same folder" in attempt(folder, loader)
        with pytest.raises(ValueError, match="expected safetensors files in the same folder"):
            load_base(FunLoraConfig(base_model_name_or_path=str(folder / "unet")))
        index.unlink()
    for loader in LOADERS:
        assert attempt(folder, loader) is None


def test_a_base_in_shards(base, tmp_path):
    folder = Path(shutil.copytree(spoil(base, "", b""), tmp_path / "copy"))
    unet = read_unet(folder)
    (folder / WEIGHTS).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="50kB")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 1
    again = read_unet(folder).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in unet.state_dict().items())
