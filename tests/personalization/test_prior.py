"""Pictures of a class are drawn once, where they are missing, by any number of processes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from text_to_image import make_pipeline

from funlora_hf.personalization.concepts import Concept
from funlora_hf.personalization.prior import class_images, draw_missing


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline("SD")


def concept(name: str, folder: Path | None = None, prompts: tuple[str, ...] = ()) -> Concept:
    return Concept(name, f"<{name}>", "cat", "cat", f"a <{name}> cat", prompts, (), class_data_dir=folder)


def draw(pipe, folder, concepts, *, count=3, **options):
    settings = {"sample_batch_size": 2, "seed": 0, "origin": {"base": "x"}, "num_inference_steps": 2, **options}
    return class_images(
        pipe, concepts, folder, num_class_images=count, resolution=8, accelerator=Accelerator(cpu=True), **settings
    )


def test_drawn_once(pipe, tmp_path):
    found = draw(pipe, tmp_path, {1: concept("a"), 2: concept("b")})
    files = [tmp_path / "a_cat" / f"drawn_000{index}.png" for index in range(3)]
    assert found == {1: dict.fromkeys(files, "a cat"), 2: dict.fromkeys(files, "a cat")}
    contents = [file.read_bytes() for file in files]
    assert len({*contents}) == 3
    files[1].unlink()
    assert draw(pipe, tmp_path, {1: concept("a")}, sample_batch_size=1) == {1: dict.fromkeys(files, "a cat")}
    assert [file.read_bytes() for file in files] == contents
    for other in ({"origin": {"base": "y"}}, {"seed": 1}, {"num_inference_steps": 3}):
        with pytest.raises(ValueError, match=r"a_cat' has images drawn otherwise .*pass another one"):
            draw(pipe, tmp_path, {1: concept("a")}, **other)


def test_several_processes_draw_what_one_does(tmp_path):
    def noise(prompts, generators):
        return [Image.fromarray(torch.randint(256, (4, 4), generator=one).byte().numpy()) for one in generators]

    def process(index: int, number: int) -> None:
        accelerator = SimpleNamespace(
            process_index=index,
            num_processes=number,
            is_main_process=index == 0,
            wait_for_everyone=barriers[number].wait,
        )
        options = {"prompts": ["a cat"], "origin": {}, "sample_batch_size": 2, "seed": 0, "accelerator": accelerator}
        draw_missing(tmp_path / str(number), 5, noise, **options)

    barriers = {number: threading.Barrier(number, timeout=30) for number in (1, 2, 3)}
    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(process, index, number) for number in barriers for index in range(number)]:
            done.result()
    one, *others = [{file.name: file.read_bytes() for file in (tmp_path / str(n)).iterdir()} for n in barriers]
    assert len(one) == len({*one.values()}) == 6
    assert others == [one, one]


def test_several_prompts_are_taken_in_turn_and_written_beside_what_they_drew(pipe, tmp_path, caplog):
    prompts = ("a cat", "a blue dog")
    caplog.set_level("INFO")
    found = draw(pipe, tmp_path, {1: concept("a", prompts=prompts), 2: concept("b")}, sample_batch_size=3)
    assert "prompts of its class" not in caplog.text
    assert [*found[1].values()] == ["a cat", "a blue dog", "a cat"]
    assert [path.with_suffix(".txt").read_text() for path in found[1]] == [*found[1].values()]
    # The same name gives the same noise: only the prompts differ.
    one, other = ([path.read_bytes() for path in found[number]] for number in (1, 2))
    assert [mine == plain for mine, plain in zip(one, other, strict=True)] == [True, False, True]
    assert {*found[1]}.isdisjoint(found[2])
    (folder,) = {path.parent for path in found[1]}
    with pytest.raises(ValueError, match="class_prompt was"):
        draw(pipe, tmp_path, {1: concept("a", folder, ("a cat", "a red dog"))})
    draw(pipe, tmp_path, {1: concept("a", prompts=prompts)}, count=1)
    assert "a has 2 prompts of its class, of which the first 1 are used" in caplog.text


def test_a_text_beside_a_given_picture_is_its_caption(pipe, tmp_path):
    for name in ("x.png", "y.png"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "y.txt").write_text("a cat asleep\n")
    found = draw(pipe, tmp_path, {1: concept("a", tmp_path, ("the cat",))}, count=2)
    assert {path.name: caption for path, caption in found[1].items()} == {"x.png": "the cat", "y.png": "a cat asleep"}


def test_given_pictures_are_taken_first(pipe, tmp_path, caplog):
    caplog.set_level("INFO")
    given = tmp_path / "cats"
    given.mkdir()
    for name in ("x.png", "y.png"):
        Image.new("RGB", (9, 9)).save(given / name)
    found = draw(pipe, tmp_path, {1: concept("a", given)})
    assert [file.name for file in found[1]] == ["drawn_0000.png", "x.png", "y.png"]
    assert [file.name for file in draw(pipe, tmp_path, {1: concept("a", given)}, count=2)[1]] == [
        "drawn_0000.png",
        "x.png",
    ]
    assert "has 3 pictures, of which the first 2 are used" in caplog.text


def test_a_given_picture_that_does_not_decode_stops_before_anything_is_drawn(pipe, tmp_path):
    given = tmp_path / "cats"
    given.mkdir()
    (given / "x.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"x\.png' cannot be read"):
        draw(pipe, tmp_path, {1: concept("b"), 2: concept("a", given)})
    assert [file.name for file in tmp_path.iterdir()] == ["cats"]
