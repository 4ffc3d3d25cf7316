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
import pytest
import torch
from runs import REPOSITORY, write_adapters

from funlora_hf import FunLoraPipeline, push_all


SPACE = REPOSITORY / "examples" / "space"
SETTINGS = {"steps": 2, "solver": "heun", "seed": 4}


@pytest.fixture
def studio(monkeypatch):
    monkeypatch.syspath_prepend(str(SPACE))
    return importlib.import_module("studio").Studio()


@pytest.fixture
def run(tiny_pipe, tmp_path) -> Path:
    """A run whose base knows 3 (three) and 5, with the adapters 2 and 4, and another adapter, 6, elsewhere."""
    write_adapters(tiny_pipe, tmp_path / "elsewhere", classes=[6], base=False)
    return write_adapters(tiny_pipe, tmp_path / "run", classes=[2, 4])


def tile(picture: PIL.Image.Image, row: int, column: int, rows: int, columns: int) -> np.ndarray:
    """The 8x8 image at a place of a grid of images enlarged 8 times with 4 pixels between them."""
    left, top = picture.width - columns * 68 + column * 68, picture.height - rows * 68 + row * 68
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
    assert studio.classes == {3: "three", 5: "5", 2: "class_2", 4: "class_4"}
    assert studio.added_classes == {2: "class_2", 4: "class_4"}


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
    assert studio.added_classes == {2: "class_2", 4: "class_4", 6: "class_6", 7: "seven"}
    assert studio.remove_class(7) == "seven"
    assert studio.added_classes == {2: "class_2", 4: "class_4", 6: "class_6"}
    assert studio.sample([6], images=1, **SETTINGS).images == 1


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
    """The page in a browser. What it waits for has a minute to come."""

    def __init__(self, driver, address: str) -> None:
        self.driver = driver
        self.address = address

    def wait(self, condition):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, 60, 0.1, ignored_exceptions=[StaleElementReferenceException])
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
        self.wait(lambda: self.driver.find_elements("xpath", tab))[0].click()

    def press(self, name: str) -> None:
        self.wait(lambda: self.element(f"#{name}")).click()

    def type(self, name: str, text: str) -> None:
        field = self.wait(lambda: self.element(f"#{name} input, #{name} textarea"))
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
    deadline = time.monotonic() + 120
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
    page.press("sample")
    assert "32 images in " in page.expect("sample-text", "20 evaluations of the U-Net.")
    assert page.picture("sample-picture")[1] == 4 + 4 * 68

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
    page.expect("sample-text", "40 images in ")
    page.wait(lambda: page.picture("sample-picture")[1] == 4 + 5 * 68)

    page.tab("Interpolate")
    page.press("interpolate")
    assert "8 images in " in page.expect("interpolate-text", "20 evaluations of the U-Net.")
    assert page.picture("interpolate-picture") == (4 + 8 * 68, 28 + 68)

    page.tab("Classes")
    page.press("remove")
    page.expect("remove-text", "Removed class 8: eight.")
    page.expect("overview", "2 classes of the base, 2 of adapters.")


def test_the_page_fits_a_narrow_window_and_fetches_nothing_from_elsewhere(page):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    page.open()
    page.press("sample")
    page.expect("sample-text", "evaluations")
    page.picture("sample-picture")
    for tab in ("Sample", "Interpolate", "Classes"):
        page.tab(tab)
        width = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1] == 390
    fetched = page.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert fetched
    assert [url for url in fetched if not url.startswith((page.address, "data:", "blob:"))] == []
