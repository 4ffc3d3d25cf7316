"""The page's state by itself, and the page in a browser as users see it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageChops
import pytest
import torch
from runs import REPOSITORY, write_adapters

from funlora_hf import FunLoraPipeline, base_fingerprint, push_all
from funlora_hf.adapters.base_fingerprint import base_tensors
from funlora_hf.data import load_image_data
from funlora_hf.hub.verify import verify


SPACE = REPOSITORY / "examples" / "space"
SETTINGS = {"steps": 2, "solver": "heun", "seed": 4}


@pytest.fixture
def studio(monkeypatch):
    monkeypatch.syspath_prepend(str(SPACE))
    return importlib.import_module("studio").Studio()


@pytest.fixture
def bars(tmp_path) -> list[str]:
    """Image files, 12 x 10, each with a white bar on the left; three of different kinds of colours."""
    (tmp_path / "bars" / "bar").mkdir(parents=True)
    files = []
    for index, mode in enumerate(["L", "RGB", "RGBA"]):
        image = PIL.Image.new("L", (12, 10), 10 * index)
        image.paste(255, (0, 0, 4 + index, 10))
        files.append(str(tmp_path / "bars" / "bar" / f"{index}.png"))
        image.convert(mode).save(files[-1])
    return files


@pytest.fixture
def run(tiny_pipe, tmp_path) -> Path:
    """A run whose base knows 3 (three) and 5, with the adapters 2 and 4, and another adapter, 6, elsewhere."""
    write_adapters(tiny_pipe, tmp_path / "elsewhere", classes=[6], base=False)
    return write_adapters(tiny_pipe, tmp_path / "run", classes=[2, 4])


def tile(picture: PIL.Image.Image, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """The 8x8 image at a place of a grid of images enlarged 8 times with 2 pixels between them."""
    left, top = picture.width - columns * 66 + column * 66 + 1, picture.height - rows * 66 + row * 66 + 1
    enlarged = np.asarray(picture)[top : top + 64, left : left + 64]
    small = enlarged[::8, ::8]
    np.testing.assert_array_equal(enlarged, small.repeat(8, 0).repeat(8, 1))
    return small[..., 0]


@pytest.mark.parametrize("given", ["run", "parts", "base with adapters of a run"])
def test_it_loads_a_run_or_its_parts(studio, run, given):
    base, adapters = {
        "run": (run, ""),
        "parts": (run / "base", run / "adapters"),
        "base with adapters of a run": (run / "base", run),
    }[given]
    studio.load(str(base), str(adapters))
    assert studio.classes == {3: "three", 5: "5", 2: "2", 4: "4"}
    assert studio.added_classes == {2: "2", 4: "4"}


def test_a_grid_has_a_row_for_each_class(studio, run):
    studio.load(str(run))
    picture = studio.sample([4, 3], images=3, **SETTINGS)
    assert (picture.images, picture.nfe) == (6, 4)
    assert picture.seconds > 0
    pipe = FunLoraPipeline.from_pretrained(run / "base")
    pipe.load_adapter(run / "adapters" / "class_4", class_label=4)
    expected = pipe([4, 4, 4, 3, 3, 3], 2, "heun", generator=torch.Generator().manual_seed(4)).images
    for index, image in enumerate(expected):
        np.testing.assert_array_equal(tile(picture.image, index // 3, index % 3, 2, 3), np.asarray(image))


def test_it_goes_from_one_class_to_another(studio, run):
    studio.load(str(run))
    picture = studio.interpolate(2, 5, images=3, **SETTINGS)
    assert (picture.images, picture.nfe) == (3, 4)
    pipe = FunLoraPipeline.from_pretrained(run / "base")
    pipe.load_adapter(run / "adapters" / "class_2", class_label=2)
    expected = pipe.interpolate(2, 5, 3, 2, "heun", generator=torch.Generator().manual_seed(4)).images
    for index, image in enumerate(expected):
        np.testing.assert_array_equal(tile(picture.image, 0, index, 1, 3), np.asarray(image))


def test_classes_come_and_go(studio, run, tmp_path):
    studio.load(str(run))
    source = str(tmp_path / "elsewhere")
    assert studio.add_class(source, subfolder="adapters/class_6") == 6
    assert studio.add_class(f" {source}/adapters/class_6 ", class_label=7, class_name="seven") == 7
    assert studio.added_classes == {2: "2", 4: "4", 6: "6", 7: "seven"}
    assert studio.remove_class(7) == "seven"
    assert studio.added_classes == {2: "2", 4: "4", 6: "6"}
    assert studio.sample([6], images=1, **SETTINGS).images == 1


def test_a_class_is_taught_and_taken_away(studio, run, bars, tmp_path):
    """The archive makes the same images on the base by itself; what was there before stays as it was, to the bit."""
    studio.load(str(run))
    before = studio.sample([3, 2], images=2, **SETTINGS).image
    fingerprint = base_fingerprint(studio._pipe.unet)
    seen = []
    taught = studio.teach(bars, " bar ", steps=40, seed=4, on_step=seen.append)
    assert (taught.class_label, studio.classes[6], taught.steps) == (6, "bar", 40)
    assert seen == list(range(1, 41))
    assert base_fingerprint(studio._pipe.unet) == fingerprint
    assert PIL.ImageChops.difference(studio.sample([3, 2], images=2, **SETTINGS).image, before).getbbox() is None

    assert taught.archive.name == "class_6.zip"
    shutil.unpack_archive(taught.archive, tmp_path / "taken")
    pipe = FunLoraPipeline.from_pretrained(run / "base")
    assert pipe.load_adapter(tmp_path / "taken" / "class_6") == 6
    assert pipe.classes[6] == "bar"
    assert {verdict.ok for verdict in verify(tmp_path / "taken" / "class_6", base=run / "base")} == {True}
    samples = pipe(["bar"] * 10, generator=torch.Generator().manual_seed(4)).images
    for column, image in enumerate(samples):
        np.testing.assert_array_equal(tile(taught.picture, 1, column, 2, 10), np.asarray(image))
    # It has learned something: the left is white, the right is not.
    pixels = np.stack([np.asarray(image) for image in samples]).astype(float)
    untaught = np.stack([np.asarray(image) for image in pipe([3] * 10).images]).astype(float)

    def contrast(images):
        return images[:, :, :2].mean() - images[:, :, -2:].mean()

    assert contrast(pixels) > contrast(untaught) + 50

    studio.remove_class(6)
    assert not taught.archive.exists()
    again = studio.teach(bars, "bar", steps=40, seed=4)
    assert PIL.ImageChops.difference(again.picture, taught.picture).getbbox() is None


def test_images_are_those_of_a_run_s_training_data(studio, run, bars, tmp_path):
    studio.load(str(run))
    data = load_image_data(str(tmp_path / "bars"), image_size=8, channels=1, test_fraction=0.34)
    expected = torch.cat([data.images(0), data.images(0, split="test")])
    shown = studio.preview(bars)
    found = [tile(shown, 0, column, 1, 10) for column in range(3)]
    for image in expected:
        assert any(np.array_equal(image[0].numpy(), one) for one in found)
    assert (tile(shown, 0, 3, 1, 10) == 255).all()


def test_users_do_not_meet(studio, run, bars):
    """Classes are each user's own, at one cost in memory for the base."""
    studio.load(str(run))
    first, second = studio.session(), studio.session()
    before = second.sample([2, 3], images=1, **SETTINGS).image
    assert first.teach(bars, "mine", steps=2, seed=0).class_label == 6
    first.remove_class(2)
    assert second.classes == studio.classes == {3: "three", 5: "5", 2: "2", 4: "4"}
    assert second.teach(bars, "yours", steps=3, seed=0).class_label == 6
    assert (first.classes[6], second.classes[6]) == ("mine", "yours")
    assert PIL.ImageChops.difference(second.sample([2, 3], images=1, **SETTINGS).image, before).getbbox() is None
    weights = [{tensor.data_ptr() for tensor in base_tensors(user._pipe.unet).values()} for user in (first, second)]
    assert weights[0] == weights[1]


def test_teaching_ends_in_time(studio, run, bars, monkeypatch):
    studio.load(str(run))
    monkeypatch.setattr("teaching.MOST_SECONDS", 1e-9)
    assert studio.teach(bars, "bar", steps=500, seed=0).steps == 1


def test_what_cannot_be_taught_is_refused(studio, run, bars, tmp_path, monkeypatch):
    studio.load(str(run))
    classes = studio.classes
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    PIL.Image.new("L", (13, 10)).save(tmp_path / "huge.png")
    monkeypatch.setattr("funlora_hf.data.untrusted_images.MOST_PIXELS", 120)
    monkeypatch.setattr("teaching.MOST_IMAGES", 4)
    for files, name, text in (
        ([], "bar", "There are 0 images, expected 1 to 4"),
        (bars * 2, "bar", "There are 6 images"),
        ([*bars, str(tmp_path / "notes.txt")], "bar", "'notes.txt' .* can be read: its format is not known. Leave"),
        ([str(tmp_path / "empty.png")], "bar", "'empty.png' is not an image that can be read"),
        ([str(tmp_path / "huge.png")], "bar", "'huge.png' .* it has 13 x 10 pixels"),
        (bars, "  ", "The name of the class is empty"),
        (bars, "x" * 41, "The name has 41 characters, expected at most 40"),
        (bars, "three", "A class with the name 'three' is here already"),
    ):
        with pytest.raises(ValueError, match=text):
            studio.teach(files, name, steps=1, seed=0)
    monkeypatch.setattr("studio.MOST_CLASSES", 0)
    with pytest.raises(ValueError, match="You have added 0 classes, at most 0 are kept"):
        studio.teach(bars, "bar", steps=1, seed=0)
    monkeypatch.setattr("studio.MOST_CLASSES", 1)

    def fail(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("shutil.make_archive", fail)
    with pytest.raises(OSError, match="disk full"):
        studio.teach(bars, "bar", steps=1, seed=0)
    assert studio.classes == classes
    assert list(Path(studio._archives.name).iterdir()) == []


def test_base_and_classes_come_from_the_hub(studio, run, hub):
    push_all(run, "user/digits")
    studio.load("user/digits", "user/digits")
    assert studio.added_classes.keys() == {2, 4}
    studio.remove_class(4)
    assert studio.add_class("user/digits", subfolder="class_4", class_label=9, class_name="nine") == 9
    assert studio.sample([9, 3], images=1, **SETTINGS).images == 2
    with pytest.raises(FileNotFoundError, match="'user/other' is neither a folder that is there nor a repository"):
        studio.add_class("user/other", subfolder="class_4")
    assert studio.classes[9] == "nine"


def test_what_fails_changes_nothing(studio, run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for action in (
        lambda: studio.sample([3], images=1, **SETTINGS),
        lambda: studio.add_class(str(tmp_path / "elsewhere"), subfolder="adapters/class_6"),
        lambda: studio.remove_class(3),
    ):
        with pytest.raises(ValueError, match="No base is loaded yet"):
            action()
    studio.load(str(run))
    classes = studio.classes
    (tmp_path / "empty").mkdir()
    for action, text in (
        (lambda: studio.load(" "), "`base` is empty"),
        (lambda: studio.load(str(run / "base"), str(tmp_path / "empty")), "`adapters` is .*empty"),
        (lambda: studio.add_class(""), "`source` is empty"),
        (lambda: studio.add_class(str(run / "adapters" / "class_2")), "`class_label` is 2"),
        (lambda: studio.remove_class(3), "`class_label` is 3"),
        (lambda: studio.remove_class(None), "`class_label` is None"),
        (lambda: studio.sample([], images=1, **SETTINGS), "`class_labels` is empty"),
        (lambda: studio.sample([3], images=0, **SETTINGS), "`images` is 0"),
        (lambda: studio.sample([3] * 33, images=16, **SETTINGS), "33 x 16 images are more than 512"),
        (lambda: studio.interpolate(3, None, images=3, **SETTINGS), "expected two classes"),
    ):
        with pytest.raises(ValueError, match=text):
            action()
    with pytest.raises(FileNotFoundError, match="nowhere' is neither a folder that is there"):
        studio.add_class(str(tmp_path / "nowhere"))
    with pytest.raises((OSError, ValueError), match="nowhere"):
        studio.load(str(tmp_path / "nowhere"))
    with pytest.raises((OSError, ValueError), match="nobody/nothing"):
        studio.load("nobody/nothing")
    assert studio.classes == classes
    assert studio.sample(list(classes), images=1, **SETTINGS).images == 4


def _missing() -> list[str]:
    packages = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
    return packages + [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


class Page:
    """The page in a browser. What it waits for has five minutes to come."""

    def __init__(self, driver, address: str) -> None:
        self.driver = driver
        self.address = address

    def wait(self, condition):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, 300, 0.1, ignored_exceptions=[StaleElementReferenceException])
        return waiting.until(lambda driver: condition())

    def element(self, selector: str):
        """The first element of a selector that can be seen."""
        found = self.driver.find_elements("css selector", selector)
        return next((element for element in found if element.is_displayed()), None)

    def open(self) -> None:
        self.driver.get(self.address)
        # Until then the choices are empty.
        self.expect("overview", "of adapters.")

    def tab(self, name: str) -> None:
        tab = f"//button[@role='tab'][normalize-space()='{name}']"
        # A narrow window has some of them in a menu.
        entry = f"//*[contains(@class, 'overflow-menu')]//button[normalize-space()='{name}']"
        menu = ".overflow-menu > button"
        self.wait(lambda: self.driver.find_elements("xpath", tab) or self.element(menu))
        if not self.driver.find_elements("xpath", tab):
            self.element(menu).click()
        self.wait(lambda: self.driver.find_elements("xpath", f"{tab} | {entry}"))[0].click()

    def upload(self, name: str, files: list[str]) -> None:
        # The field for files is hidden behind what users see.
        self.wait(lambda: self.driver.find_elements("css selector", f"#{name} input[type=file]"))[0].send_keys(
            "\n".join(files)
        )

    def press(self, name: str) -> None:
        self.wait(lambda: self.element(f"#{name}")).click()

    def type(self, name: str, text: str) -> None:
        field = self.wait(lambda: self.element(f"#{name} input:not([type=range]), #{name} textarea"))
        field.clear()
        field.send_keys(text)

    def expect(self, name: str, text: str) -> str:
        self.wait(lambda: text in getattr(self.element(f"#{name}"), "text", ""))
        return self.element(f"#{name}").text

    def picture(self, name: str) -> tuple[int, int]:
        """Width and height of a picture that has been loaded."""
        image = self.wait(lambda: self.element(f"#{name} img"))
        return self.wait(lambda: self._size(image))

    def _size(self, image) -> tuple[int, int] | None:
        size = tuple(
            self.driver.execute_script("return [arguments[0].naturalWidth, arguments[0].naturalHeight]", image)
        )
        return size if all(size) else None


@pytest.fixture
def page(run, tmp_path):
    missing = _missing()
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: `make test-space` installs the packages, the system has the others")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1,localhost"}
    arguments = ["--base", str(run), "--server_name", "127.0.0.1", "--server_port", str(port)]
    with log.open("w") as output:
        command = [sys.executable, str(SPACE / "app.py"), *arguments]
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)
    driver = None
    try:
        _wait_for(server, port, log)
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-proxy-server",
            "--window-size=1280,900",
            # No name but the loopback's is looked up, so nothing can come from elsewhere.
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
            f"--user-data-dir={tmp_path / 'browser'}",
        ):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
        driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
        try:
            yield Page(driver, f"http://127.0.0.1:{port}/")
        finally:
            # pytest shows these where the test fails.
            print(driver.find_element("tag name", "body").text)
            print(driver.page_source[-2000:])
            print(log.read_text()[-4000:])
    finally:
        if driver is not None:
            driver.quit()
        server.terminate()
        server.wait(timeout=60)


def _wait_for(server: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and server.poll() is None:
        with socket.socket() as attempt:
            attempt.settimeout(1)
            if attempt.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"the page did not start: {log.read_text()[-4000:]}")


def test_the_page_in_a_browser(page, run, tmp_path):
    page.open()
    assert page.element("#overview").text == "2 classes of the base, 2 of adapters."
    # There is a picture before anything is pressed.
    assert "32 images in " in page.expect("sample-text", "20 evaluations of the U-Net.")
    assert page.picture("sample-picture")[1] == 4 * 66
    page.type("images", "2")
    page.press("sample")
    page.expect("sample-text", "8 images in ")

    page.tab("Classes")
    page.type("source", str(tmp_path / "nowhere"))
    page.press("add")
    assert str(tmp_path / "nowhere") in page.expect("add-text", "Error: ")
    page.type("source", str(tmp_path / "elsewhere"))
    page.type("subfolder", "adapters/class_6")
    page.type("class-id", "six")
    page.press("add")
    page.expect("add-text", "'six', expected a whole number")
    page.type("class-id", "8")
    page.type("class-name", "eight")
    page.press("add")
    page.expect("add-text", "Added class 8: eight.")
    page.expect("overview", "2 classes of the base, 3 of adapters.")

    page.tab("Sample")
    page.press("sample")
    page.expect("sample-text", "10 images in ")
    page.wait(lambda: page.picture("sample-picture")[1] == 5 * 66)

    page.tab("Interpolate")
    page.press("interpolate")
    assert "8 images in " in page.expect("interpolate-text", "20 evaluations of the U-Net.")
    assert page.picture("interpolate-picture") == (8 * 66, 27 + 66)

    page.tab("Classes")
    page.press("remove")
    page.expect("remove-text", "Removed class 8: eight.")
    page.expect("overview", "2 classes of the base, 2 of adapters.")


def test_a_class_is_taught_in_a_browser(page, run, bars, tmp_path):
    page.open()
    page.tab("Teach")
    page.press("teach")
    page.expect("teach-text", "The name of the class is empty")
    page.type("name", "bar")
    page.press("teach")
    page.expect("teach-text", "There are 0 images")
    (tmp_path / "notes.txt").write_text("no image")
    page.upload("files", [*bars, str(tmp_path / "notes.txt")])
    page.expect("teach-text", "'notes.txt' is not an image that can be read")
    page.press("files [aria-label='Clear']")
    page.upload("files", bars)
    assert page.picture("teach-picture")[1] == 66
    page.press("teach")
    page.expect("teach-picture", "/150 steps")
    page.expect("teach-text", "Learned class 6: bar in ")
    page.wait(lambda: page.picture("teach-picture")[1] == 2 * 66)
    page.expect("overview", "2 classes of the base, 3 of adapters.")
    page.press("teach")
    page.expect("teach-text", "A class with the name 'bar' is here already")

    page.press("download")
    archive = tmp_path / "downloads" / "class_6.zip"
    page.wait(archive.is_file)
    shutil.unpack_archive(archive, tmp_path / "taken")
    pipe = FunLoraPipeline.from_pretrained(run / "base")
    pipe.load_adapter(tmp_path / "taken" / "class_6")
    assert pipe.classes[6] == "bar"

    page.tab("Sample")
    page.press("sample")
    page.expect("sample-text", "40 images in ")
    # Another user has not got the class, and may take its name.
    page.driver.switch_to.new_window("tab")
    page.open()
    assert page.element("#overview").text == "2 classes of the base, 2 of adapters."
    page.tab("Teach")
    page.press("hearts")
    page.wait(lambda: page.picture("teach-picture")[1] == 66)
    page.type("name", "bar")
    page.type("train-steps", "10")
    page.press("teach")
    page.expect("teach-text", "Learned class 6: bar in ")


def test_the_page_fits_a_narrow_window_and_fetches_nothing_from_elsewhere(page):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    page.open()
    page.picture("sample-picture")
    for tab in ("Sample", "Teach", "Interpolate", "Classes"):
        page.tab(tab)
        width = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1] == 390
    fetched = page.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert fetched
    assert [url for url in fetched if not url.startswith((page.address, "data:", "blob:"))] == []
