"""Whatever bytes an adapter or a bank has, it is refused in plain words, or loaded with just the numbers of its file."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import shutil
import signal
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hostile import ABSURD, HANG, HOSTILE, JSON, MOST_MEMORY, examples, guarded, pack, unpack
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from runs import make_tiny_unet, write_adapters

from funlora_hf import AdapterBank, FunLoraConfig, FunLoraPipeline, merge_class
from funlora_hf.adapters.base_fingerprint import base_fingerprints


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LABEL = 7
LAYERS = ["conv_in", "up_blocks.0.resnets.1.conv1"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:Unexpected keyword arguments", "ignore:Already found a", "ignore:The following rank_pattern"
)
OUT_OF_MEMORY = re.compile(
    r"(can.?t|cannot|unable to|tried to) allocate|Allocator|out of memory|not enough memory", re.IGNORECASE
)
LONG = [pytest.mark.slow, pytest.mark.soak]
TIMES = pytest.mark.parametrize("times", [1, pytest.param(30, marks=LONG, id="thirty-times-as-many")])


def numbers(content):
    """Every tensor of a file as float32."""
    header, body = unpack(content)
    header.pop("__metadata__", None)
    arrays = {}
    for key, entry in header.items():
        raw = body[slice(*entry["data_offsets"])]
        if entry["dtype"] == "BF16":
            array = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            array = np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[entry["dtype"]])
        arrays[key] = array.astype(np.float32).reshape(entry["shape"])
    return arrays


class Subject:
    """A pipeline, a bank, and sound files for them; tells what a spoiled file does to both."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pipe = FunLoraPipeline(make_tiny_unet(), FlowMatchEulerDiscreteScheduler(), [3, 5], {3: "three"})
        # Few layers, since most of the time goes into putting them in.
        config = {"target_modules": LAYERS, "base_fingerprint": base_fingerprints(self.pipe.unet), "class_name": "n"}
        write_adapters(self.pipe, folder, classes=[LABEL], base=False, class_label=LABEL, **config)
        self.good = folder / "adapters" / f"class_{LABEL}"
        lora = LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False, rank_pattern={"conv_in": 1})
        get_peft_model(make_tiny_unet(), lora).save_pretrained(folder / "lora", save_embedding_layers=False)
        self.lora = folder / "lora"
        self.bank = AdapterBank(make_tiny_unet(), FunLoraConfig.from_pretrained(self.good))
        self.bank.add(self.good)
        self.bank.add_tensors(
            {k: v + 1 for k, v in self.bank.state_dict(LABEL).items()}, class_label=2**62, class_name="m"
        )
        self.bank_file = folder / "bank.safetensors"
        self.bank.save(self.bank_file)
        self.bank.remove(LABEL)
        self.unet = make_tiny_unet()
        self.keys = set(self.pipe.unet.state_dict())
        self.base = self.outputs([3, 5])
        self.pipe.load_adapter(self.good)
        self.expected = self.outputs([LABEL, LABEL])
        self.pipe.unload_adapter(LABEL)
        self.refused = self.loaded = 0
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def outputs(self, classes):
        sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            return self.pipe.predict_velocity(sample, torch.tensor(0.5), classes)

    def spoiled(self, config: bytes | None = None, weights: bytes | None = None, good: Path | None = None) -> Path:
        good = self.good if good is None else good
        folder = self.folder / "spoiled"
        folder.mkdir(exist_ok=True)
        (folder / CONFIG).write_bytes((good / CONFIG).read_bytes() if config is None else config)
        (folder / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes() if weights is None else weights)
        return folder

    def attempt(self, load, *arguments, **keywords):
        """What `load` returns, or None if it refused in plain words."""
        signal.alarm(HANG)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return load(*arguments, **keywords)
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
            assert str(self.folder) in text or "`" in text or text.startswith("Class "), text
            assert len(text) < 5000, text[:5000]
            assert not OUT_OF_MEMORY.search(text), text
            assert "MemoryError" not in text, text
            return None
        finally:
            signal.alarm(0)
            taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory)
            assert taken < MOST_MEMORY

    def check_untouched(self):
        assert self.pipe.classes == {3: "three", 5: "5"}
        assert set(self.pipe.unet.state_dict()) == self.keys
        assert not hasattr(self.pipe.unet, "peft_config")
        assert torch.equal(self.outputs([3, 5]), self.base)

    def check_loads(self):
        assert self.pipe.load_adapter(self.good) == LABEL
        assert torch.equal(self.outputs([LABEL, LABEL]), self.expected)
        self.pipe.unload_adapter(LABEL)
        self.check_untouched()

    def check_adapter(self, folder: Path, **keywords) -> bool:
        """Whether the pipeline loads an adapter. The bank takes it then, too, if it can; both have the numbers of the file."""
        try:
            return self._check_adapter(folder, **keywords)
        finally:
            self.unload_all()
            for label in self.bank.classes.keys() - {2**62}:
                self.bank.remove(label)

    def unload_all(self):
        for label in self.pipe.classes.keys() - {3, 5}:
            self.pipe.unload_adapter(label)

    def _check_adapter(self, folder: Path, **keywords) -> bool:
        label = self.attempt(self.pipe.load_adapter, folder, **keywords)
        taken = self.attempt(self.bank.add, folder, **keywords)
        if taken is not None:
            stored = numbers((folder / WEIGHTS).read_bytes())
            state = self.bank.state_dict(taken)
            assert {key.removeprefix("base_model.model.") for key in stored} == {
                key.removeprefix("base_model.model.") for key in state
            }
            for key, array in stored.items():
                assert np.array_equal(
                    state["base_model.model." + key.removeprefix("base_model.model.")].numpy(), array
                )
        if label is not None:
            assert torch.equal(self.outputs([3, 5]), self.base)
            found = self.outputs([label, label])
            if taken is not None:
                self.bank.activate(taken)
                # Large numbers may well give NaN.
                assert np.array_equal(velocity(self.bank.model).numpy(), found.numpy(), equal_nan=True)
                self.bank.activate(None)
            self.pipe.unload_adapter(label)
        if taken is not None:
            self.bank.remove(taken)
        self.check_untouched()
        self.loaded += label is not None
        self.refused += label is None
        if (self.loaded + self.refused) % 20 == 0:
            self.check_loads()
        return label is not None


def velocity(unet, rows=(0, 0)):
    """What `Subject.outputs` gives, of a U-Net by itself; it takes rows of its class embedding, if it has one."""
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return unet(sample, torch.tensor(500.0), None if rows is None else torch.tensor(rows)).sample


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    """Built once: it is the point that nothing changes it."""

    subject = Subject(tmp_path_factory.mktemp("corrupted"))
    with guarded():
        yield subject
    subject.check_loads()


# The weight file


def flipped(content, positions):
    spoiled = bytearray(content)
    for position in positions:
        spoiled[position // 8 % len(spoiled)] ^= 1 << position % 8
    return bytes(spoiled)


def spoiled_bytes(content):
    start = 8 + struct.unpack("<Q", content[:8])[0]
    length = st.one_of(st.integers(0, 2 * start), st.sampled_from([0, 1, 2**23 + 1, 2**31, 2**63, 2**64 - 1]))
    return st.one_of(
        st.integers(0, len(content) - 1).map(lambda end: content[:end]),
        st.lists(st.integers(0, 8 * start - 1), min_size=1, max_size=3).map(lambda bits: flipped(content, bits)),
        st.lists(st.integers(8 * start, 8 * len(content) - 1), min_size=1, max_size=3).map(
            lambda bits: flipped(content, bits)
        ),
        length.map(lambda size: struct.pack("<Q", size) + content[8:]),
        st.binary(max_size=64),
        st.binary(min_size=1, max_size=64).map(lambda tail: content + tail),
    )


@st.composite
def spoiled_header(draw, content):
    """A file whose header is JSON, but says something else."""
    header, body = unpack(content)
    keys = [key for key in header if key != "__metadata__"]
    key = draw(st.sampled_from(keys))
    entry = header[key]
    first, last = entry["data_offsets"]
    kind = draw(st.integers(0, 12))
    if kind == 0:
        del header[key]
    elif kind == 1:
        header[draw(st.text(max_size=20) | st.sampled_from([key.upper(), key + ".", "." + key, key[17:]]))] = (
            header.pop(key)
        )
    elif kind == 2:
        other = draw(st.text(max_size=5) | st.sampled_from([key + "2", key.replace("model.", "model._orig_mod.", 1)]))
        header[other] = {**entry, "data_offsets": [len(body), len(body) + last - first]}
        body += body[first:last]
    elif kind == 3:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 4:
        size = (last - first) // 4
        entry["shape"] = draw(
            st.sampled_from([[size], [1, size], [size, 1], [1, 1, size], [size, 1, 1, 1], [2, size // 2]])
        )
    elif kind == 5:
        entry["dtype"] = draw(
            st.sampled_from(["I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "I64", "F64", "F16", "XX", ""])
        )
    elif kind == 6:
        entry["shape"] = draw(st.lists(st.sampled_from([0, 1, *ABSURD]), max_size=4))
        if draw(st.booleans()):
            # Offsets that fit a size of zero.
            entry["data_offsets"] = [first, first]
            body = body[:first] + body[last:]
            for other in header.values():
                if "data_offsets" in other and other["data_offsets"][0] >= last:
                    other["data_offsets"] = [offset - last + first for offset in other["data_offsets"]]
    elif kind == 7:
        entry["data_offsets"] = draw(st.lists(st.integers(-1, len(body) + 8) | st.sampled_from(ABSURD), max_size=3))
    elif kind == 8:
        header[key] = header[draw(st.sampled_from(keys))]
    elif kind == 9:
        header[draw(st.sampled_from([key, "__metadata__", "a"]))] = draw(JSON)
    elif kind == 10:
        entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "b"]))] = draw(JSON)
    elif kind == 11:
        text = json.dumps(header)
        return pack((text[:-1] + f', "{key}": {json.dumps(entry)}}}').encode(), body)
    else:
        header = draw(st.sampled_from([{}, [], {"__metadata__": {}}, None, 3, {"__metadata__": {"format": "tf"}}]))
        body = draw(st.sampled_from([b"", body]))
    return pack(header, body)


@st.composite
def other_values(draw, content):
    """A sound file of the same tensors with other numbers, in other types."""
    dtype = draw(st.sampled_from(["F64", "F32", "F16", "BF16", "I32", "BOOL"]))
    arrays = numbers(content)
    key = draw(st.sampled_from(sorted(arrays)))
    value = draw(st.floats(width=64) | st.sampled_from([0.0, -0.0, 1e-45, 3e38, 1e39, 65519.0]))
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    arrays[key].reshape(-1)[draw(st.integers(0, arrays[key].size - 1))] = value
    return packed(arrays, dtype)


@np.errstate(all="ignore")
def packed(arrays, dtype):
    header, body = {}, b""
    for name, array in arrays.items():
        if dtype == "BF16":
            raw = (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            raw = array.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4", "BOOL": "?"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    return pack(header, body)


def tiny_tensors(count, name="{}"):
    return pack({name.format(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}, b"")


@TIMES
@pytest.mark.parametrize("method", ["good", "lora"])
def test_spoiled_bytes_of_weights(times, method, subject):
    good = getattr(subject, method)

    @examples((80 if method == "good" else 30) * times)
    @given(spoiled_bytes((good / WEIGHTS).read_bytes()))
    def check(weights):
        subject.check_adapter(subject.spoiled(weights=weights, good=good), class_label=LABEL)

    check()


@TIMES
@pytest.mark.parametrize("method", ["good", "lora"])
def test_spoiled_headers_of_weights(times, method, subject):
    good = getattr(subject, method)

    @examples((100 if method == "good" else 50) * times)
    @given(spoiled_header((good / WEIGHTS).read_bytes()))
    def check(weights):
        subject.check_adapter(subject.spoiled(weights=weights, good=good), class_label=LABEL)

    check()


@TIMES
def test_other_values_of_weights(times, subject):
    content = (subject.good / WEIGHTS).read_bytes()
    arrays = {name: array.astype(np.float64) for name, array in numbers(content).items()}
    too_large = {name: array * 0 + 1e39 for name, array in arrays.items()}

    @examples(30 * times)
    @example(packed(too_large, "F64"))
    @given(other_values(content))
    def check(weights):
        folder = subject.spoiled(weights=weights)
        loaded = subject.check_adapter(folder)
        header, _ = unpack(weights)
        if {entry["dtype"] for entry in header.values()} <= {"F64", "F32", "F16", "BF16"}:
            with np.errstate(all="ignore"):
                assert loaded == all(np.isfinite(array).all() for array in numbers(weights).values())
        else:
            assert not loaded

    check()


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        tiny_tensors(0),
        tiny_tensors(19_000, "base_model.model.a{}.funlora_A"),
        tiny_tensors(60_000),
        tiny_tensors(3, "base_model.model.{}" + 10**6 * "a" + ".funlora_A"),
        pack(b"{}" + b" " * (2**23 - 2), b""),
        pack(b"{}" + b" " * 2**23, b""),
        pack(b"[" * 10**5, b""),
        pack(b'{"a":' * 10**5, b""),
    ],
    ids=["empty", "none", "many-layers", "many", "long-names", "spaces", "more-spaces", "brackets", "braces"],
)
@pytest.mark.parametrize("method", ["good", "lora"])
def test_huge_and_empty_weights(weights, method, subject):
    folder = subject.spoiled(weights=weights, good=getattr(subject, method))
    assert not subject.check_adapter(folder, class_label=LABEL)


# The configuration


def config_of(folder, **changes):
    return json.dumps({**json.loads((folder / CONFIG).read_text()), **changes}).encode()


@st.composite
def spoiled_config(draw, folder):
    attributes = json.loads((folder / CONFIG).read_text())
    for key in draw(st.lists(st.sampled_from([*attributes, "unknown"]), min_size=1, max_size=3, unique=True)):
        kind = draw(st.integers(0, 5))
        if kind == 0:
            attributes.pop(key, None)
        elif kind == 1:
            attributes[key] = draw(st.sampled_from(ABSURD))
        elif kind == 2:
            attributes[key] = draw(
                st.sampled_from(HOSTILE) | st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=2)
            )
        elif kind == 3:
            attributes[key] = {draw(st.sampled_from([*HOSTILE, "conv1"])): draw(st.sampled_from(ABSURD))}
        else:
            attributes[key] = draw(JSON)
    return json.dumps(attributes).encode()


FUNLORA_EXAMPLES = [
    {"ratio": 10**400},
    {"class_name": "a\x1b[2Jb"},
    {"class_name": "\ud800"},
    {"class_name": "x" * 10**6},
    {"class_label": -1},
    {"class_label": 10**30},
    {"class_label": True},
    {"base_fingerprint": {"float32": 10**63}},
    {"base_fingerprint": {"float32": "0" * 64}},
    {"modules_to_save": [""]},
    {"modules_to_save": ["conv_in.weight"]},
    {"modules_to_save": HOSTILE},
    {"modules_to_save": ["conv_in"] * 100_000},
    {"target_modules": HOSTILE[0], "exclude_modules": HOSTILE[1]},
    {"target_modules": ["conv1"], "layers_to_transform": [1], "layers_pattern": HOSTILE},
    {"layers_to_transform": {"a": "b"}},
    {"base_model_name_or_path": {"a": 1}, "revision": 5},
    {"auto_mapping": {"base_model_class": "os", "parent_library": "os"}},
    {"task_type": "CAUSAL_LM"},
]
LORA_EXAMPLES = [
    {"target_modules": HOSTILE[0]},
    {"exclude_modules": HOSTILE[0]},
    {"layers_to_transform": [1], "layers_pattern": HOSTILE[1]},
    {"rank_pattern": {HOSTILE[0]: 2}},
    {"alpha_pattern": {HOSTILE[2]: 2}},
    {"alpha_pattern": {f"conv{i}": 2 for i in range(50_000)}},
    {"modules_to_save": [HOSTILE[0]]},
    {"modules_to_save": [["a"]]},
    {"trainable_token_indices": {"class_embedding": [10**12]}},
    {"trainable_token_indices": {HOSTILE[0]: [0]}},
    {"target_modules": ["conv1"] + [f"x{i}" for i in range(50_000)]},
    {"bias": "all"},
    {"r": 10**12},
    {"r": 10**30},
    {"lora_alpha": 10**400},
    {"layer_replication": [[0, 10**9]]},
    {"target_parameters": ["conv_in.weight"]},
    {"runtime_config": {"a": 1}},
]


@TIMES
def test_spoiled_configs(times, subject):
    @examples(130 * times)
    @given(spoiled_config(subject.good))
    def check(config):
        subject.check_adapter(subject.spoiled(config=config))

    check()


@TIMES
def test_spoiled_lora_configs(times, subject):
    @examples(50 * times)
    @given(spoiled_config(subject.lora))
    def check(config):
        subject.check_adapter(subject.spoiled(config=config, good=subject.lora), class_label=LABEL)

    check()


@pytest.mark.parametrize("changes", FUNLORA_EXAMPLES, ids=lambda changes: str(changes)[:40])
def test_configs_that_were_found(changes, subject):
    subject.check_adapter(subject.spoiled(config=config_of(subject.good, **changes)))


@pytest.mark.parametrize("changes", LORA_EXAMPLES, ids=lambda changes: str(changes)[:40])
def test_lora_configs_that_were_found(changes, subject):
    config = config_of(subject.lora, **changes)
    subject.check_adapter(subject.spoiled(config=config, good=subject.lora), class_label=LABEL)


@pytest.mark.parametrize("changes", [{"target_modules": HOSTILE[0]}, {"exclude_modules": HOSTILE[1]}], ids=str)
def test_the_layers_of_lora_are_those_of_its_tensors(changes, subject, tmp_path):
    """A regex of the file is not run, not even by merging, and stays in the config that is saved."""
    subject.pipe.load_adapter(subject.lora, class_label=LABEL)
    expected = subject.outputs([LABEL, LABEL])
    subject.pipe.unload_adapter(LABEL)
    config = config_of(subject.lora, **changes)
    assert subject.pipe.load_adapter(subject.spoiled(config=config, good=subject.lora), class_label=LABEL) == LABEL
    assert torch.equal(subject.outputs([LABEL, LABEL]), expected)
    merged = merge_class(subject.pipe, LABEL)
    torch.testing.assert_close(velocity(merged, None), expected, rtol=1e-4, atol=1e-5)
    subject.pipe.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapters" / f"class_{LABEL}" / CONFIG).read_text())
    assert {name: saved[name] for name in changes} == changes
    subject.pipe.unload_adapter(LABEL)
    subject.check_untouched()


def raw_configs(content):
    text = content.decode()
    return [
        b"",
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b'{"peft_type": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
        text.replace('"r": ', '"r": 1' + "0" * 5000, 1).encode(),
        text.replace('"r": ', '"r": 1' + "0" * 900_000, 1).encode(),
        *(
            text.replace('"r": ', f'"r": {word}, "x": ', 1).encode()
            for word in ("NaN", "Infinity", "-Infinity", "1e999")
        ),
        content[:-3] + b"\xff\xfe" + content[-3:],
        b"\xef\xbb\xbf" + content,
        content.decode().encode("utf-16"),
        content + b"{}",
        content.replace(b"{", b'{"r": 5, ', 1),
        content.rstrip()[:-1] + b', "r": 10}',
        content + b" " * 2**20,
        bytes(1000),
    ]


@pytest.mark.parametrize("index", range(len(raw_configs(b'{"a": 1}'))))
@pytest.mark.parametrize("method", ["good", "lora"])
def test_configs_that_are_hardly_json(index, method, subject):
    good = getattr(subject, method)
    config = raw_configs((good / CONFIG).read_bytes())[index]
    loaded = subject.check_adapter(subject.spoiled(config=config, good=good), class_label=LABEL)
    # A key that comes twice counts as what it is last.
    assert loaded == (index == len(raw_configs(b"{}")) - 4)


@TIMES
def test_other_methods(times, subject):
    @st.composite
    def configs(draw):
        kind = draw(st.sampled_from([*PEFT_TYPE_TO_CONFIG_MAPPING, "LORA2", "lora", "", "ScaleShift"]))
        fields = [*getattr(PEFT_TYPE_TO_CONFIG_MAPPING.get(kind), "__dataclass_fields__", {"r": 1})]
        changes = draw(st.dictionaries(st.sampled_from(fields), JSON, max_size=2))
        return json.dumps(
            {"target_modules": draw(st.sampled_from([["conv1"], HOSTILE[0]])), **changes, "peft_type": kind}
        )

    @examples(50 * times)
    @given(configs(), st.sampled_from(["good", "lora"]))
    def check(config, method):
        folder = subject.spoiled(config=config.encode(), good=getattr(subject, method))
        subject.check_adapter(folder, class_label=LABEL)

    check()


@TIMES
def test_any_values_of_funlora_config(times):
    fields = [name for name, field in FunLoraConfig.__dataclass_fields__.items() if field.init]

    @examples(400 * times)
    @example({"layers_to_transform": {"a": 1}})
    @example({"base_fingerprint": {"float32": 10**63}})
    @example({"class_name": "\ud800"})
    @given(st.dictionaries(st.sampled_from(fields), JSON, min_size=1, max_size=3))
    def check(values):
        try:
            config = FunLoraConfig(**values)
        except ValueError as error:
            text = str(error)
        else:
            # What is taken can be written.
            json.dumps(config.to_dict()).encode()
            return
        # PEFT's own check names no field.
        assert any(f"`{name}`" in text for name in values) or ("task_type" in values and "task type" in text), text

    check()


# Sizes that a file claims in both of its parts


@pytest.mark.parametrize("size", [10**9, 10**18, 2**62, 2**63 - 1, 2**63, 10**30])
@pytest.mark.parametrize("field", ["r", "num_functions", "ratio"])
@pytest.mark.parametrize("part", ["omega", "A", "alpha", "B"])
def test_absurd_sizes_without_numbers(size, field, part, subject):
    """Tensors of no number may have any shape."""
    shape = [0, size] if part != "B" else [size, 0]
    key = f"base_model.model.up_blocks.0.resnets.0.conv1.funlora_{part}"
    weights = pack({key: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}, b"")
    folder = subject.spoiled(config_of(subject.good, **{field: size}), weights)
    assert not subject.check_adapter(folder)


@pytest.mark.parametrize("ratio", [16, 10**9, 10**18, 10**400])
def test_a_ratio_beyond_all_channels_is_one_entry_for_all_of_them(ratio, subject):
    """Such an adapter is sound, and takes no more memory than any."""
    arrays = {}
    for key, array in numbers((subject.good / WEIGHTS).read_bytes()).items():
        arrays[key] = array[:1, :1] if key.endswith(("_A", "_B")) else array
    # Conv2d of the tiny U-Net have 24 channels at most.
    folder = subject.spoiled(config_of(subject.good, ratio=max(ratio, 32)), packed(arrays, "F32"))
    assert subject.check_adapter(folder)


# The file of a bank


def bank_with(content, **changes):
    header, body = unpack(content)
    about = {**json.loads(header["__metadata__"]["adapter_bank"]), **changes}
    return pack({**header, "__metadata__": {"adapter_bank": json.dumps(about)}}, body)


@st.composite
def spoiled_bank(draw, content):
    header, body = unpack(content)
    about = json.loads(header["__metadata__"]["adapter_bank"])
    part = draw(st.sampled_from(["config", "config", "layout", "classes", "all", "metadata", "table"]))
    if part == "config":
        key = draw(st.sampled_from(sorted(about["config"])))
        about["config"][key] = draw(JSON | st.sampled_from([*HOSTILE, HOSTILE, *ABSURD]))
    elif part in ("layout", "classes"):
        index = draw(st.integers(0, len(about[part]) - 1))
        pair = copy.deepcopy(about[part][index])
        pair[draw(st.integers(0, 1))] = draw(
            JSON | st.sampled_from([1, -1, [10**30, 1], [0, 10**30], "name", "\ud800"])
        )
        how = draw(st.integers(0, 3))
        about[part][index : index + (how < 2)] = [pair if how % 2 else draw(JSON)]
    elif part == "all":
        about[draw(st.sampled_from(["config", "layout", "classes"]))] = draw(JSON)
    elif part == "metadata":
        text = json.dumps(about)
        metadata = draw(
            st.one_of(
                JSON.map(json.dumps),
                st.text(max_size=10),
                st.sampled_from(["[" * 10**5, '{"a":' * 10**5, text.replace("1", "NaN", 1), text[:-1], "1" * 5000]),
                st.integers(0, len(text)).map(lambda end: text[:end]),
            )
        )
        return pack({**header, "__metadata__": {"adapter_bank": metadata}}, body)
    else:
        rows, columns = header["adapters"]["shape"]
        dtype = draw(st.sampled_from(["F32", "I32", "U32", "BF16"]))
        shape = draw(
            st.sampled_from([[rows - 1, columns], [rows, columns - 1], [columns, rows], [rows * columns], []])
        )
        size = int(np.prod(shape)) * (2 if dtype == "BF16" else 4)
        header["adapters"] = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
        body = body[:size]
    return pack({**header, "__metadata__": {"adapter_bank": json.dumps(about)}}, body)


def check_bank(subject, content):
    """Whether the pipeline loads a bank; then it has the numbers of the file, if they are finite."""
    file = subject.folder / "spoiled.safetensors"
    file.write_bytes(content)
    labels = subject.attempt(subject.pipe.load_adapter_bank, file)
    if labels is None:
        subject.check_untouched()
        return False
    try:
        assert torch.equal(subject.outputs([3, 5]), subject.base)
        for label, row in zip(labels, numbers(content)["adapters"], strict=True):
            outputs = subject.attempt(subject.outputs, [label, label])
            assert (outputs is None) == (not np.isfinite(row).all())
    finally:
        subject.unload_all()
    subject.check_untouched()
    bank = AdapterBank.load(file, subject.unet)
    bank.unload()
    stored = dict(zip(labels, numbers(content)["adapters"], strict=True))
    header, _ = unpack(content)
    layout = json.loads(header["__metadata__"]["adapter_bank"])["layout"]
    ends = np.cumsum([int(np.prod(shape)) for _, shape in layout])
    for label, row in stored.items():
        state = bank.state_dict(label)
        for (key, shape), part in zip(layout, np.split(row, ends[:-1]), strict=True):
            found = state[f"base_model.model.{key}"].float().numpy()
            assert np.array_equal(found, part.reshape(shape), equal_nan=True)
    return True


@TIMES
def test_spoiled_banks(times, subject):
    content = subject.bank_file.read_bytes()
    assert check_bank(subject, content)

    @examples(80 * times)
    @given(spoiled_bank(content))
    def check(spoiled):
        check_bank(subject, spoiled)

    check()
    subject.check_loads()


@TIMES
def test_spoiled_bytes_of_banks(times, subject):
    @examples(30 * times)
    @given(spoiled_bytes(subject.bank_file.read_bytes()))
    def check(spoiled):
        check_bank(subject, spoiled)

    check()
    subject.check_loads()


BANK_EXAMPLES = {
    "twice the same id": {"classes": [[1, "a"], [1, "b"]]},
    "negative id": {"classes": [[-1, "a"], [1, "b"]]},
    "id as text": {"classes": [["1", "a"], [2, "b"]]},
    "name as number": {"classes": [[1, 1], [2, "b"]]},
    "half a surrogate pair": {"classes": [[1, "\ud800"], [2, "b"]]},
    "the same names": {"classes": [[1, "a"], [2, "a"]]},
    "a base class": {"classes": [[3, "a"], [2, "b"]]},
    "numbers": {"classes": 5},
    "no layout": {"layout": []},
    "huge layout": {"layout": [["conv_in.funlora_omega", [10**30]]]},
    "negative layout": {"layout": [["conv_in.funlora_A", [-1, 1]]]},
}


@pytest.mark.parametrize("name", BANK_EXAMPLES)
def test_banks_that_were_found(name, subject):
    assert not check_bank(subject, bank_with(subject.bank_file.read_bytes(), **BANK_EXAMPLES[name]))


@pytest.mark.parametrize(
    ("changes", "loads"),
    [
        ({"target_modules": HOSTILE[0], "exclude_modules": HOSTILE[0]}, True),
        ({"target_modules": ["conv1"], "layers_to_transform": [0], "layers_pattern": HOSTILE}, True),
        ({"modules_to_save": [HOSTILE[0]]}, False),
        ({"num_functions": 10**12}, False),
        ({"r": 10**12}, False),
        ({"ratio": 10**12}, False),
        ({"r": "1"}, False),
        ({"nothing": 1}, True),
    ],
    ids=str,
)
def test_configs_of_banks(changes, loads, subject):
    content = subject.bank_file.read_bytes()
    about = json.loads(unpack(content)[0]["__metadata__"]["adapter_bank"])
    assert check_bank(subject, bank_with(content, config={**about["config"], **changes})) == loads


# Folders


def test_folders_that_are_none(subject, tmp_path):
    def folder(name):
        return Path(shutil.copytree(subject.good, tmp_path / name))

    for file in (CONFIG, WEIGHTS):
        gone, directory, loop = folder(f"gone-{file}"), folder(f"directory-{file}"), folder(f"loop-{file}")
        for place in (gone, directory, loop):
            (place / file).unlink()
        (directory / file).mkdir()
        (loop / file).symlink_to(loop / file)
        for place in (gone, directory, loop):
            with pytest.raises(FileNotFoundError, match=f"has no {file}"):
                subject.pipe.load_adapter(place)
        subject.check_untouched()
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        subject.pipe.load_adapter_bank(tmp_path)
    subject.check_loads()


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_files_that_may_not_be_read(file, subject, tmp_path):
    folder = Path(shutil.copytree(subject.good, tmp_path / "closed"))
    (folder / file).chmod(0)
    if os.access(folder / file, os.R_OK):
        pytest.skip("this user reads everything")
    with pytest.raises(ValueError, match=f"{file}.*Permission denied"):
        subject.pipe.load_adapter(folder)
    subject.check_untouched()


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_files_whose_reading_fails(file, subject, tmp_path):
    folder = Path(shutil.copytree(subject.good, tmp_path / "failing"))
    memory = Path("/proc/self/mem")
    if not memory.is_file():
        pytest.skip("no file here fails for every user")
    (folder / file).unlink()
    (folder / file).symlink_to(memory)
    with pytest.raises(ValueError, match=f"{file}.*Input/output error"):
        subject.pipe.load_adapter(folder)
    subject.check_untouched()
