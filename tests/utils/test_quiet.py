"""What is hidden while models are loaded, and that everything is as before afterwards."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import pytest
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging

from funlora_hf.utils.quiet import quiet_loading


LOADING = (diffusers_logging.is_progress_bar_enabled, transformers_logging.is_progress_bar_enabled)


def show_bars():
    diffusers_logging.enable_progress_bar()
    transformers_logging.enable_progress_bar()


@pytest.fixture
def bars():
    """Bars that are on before and after, whatever tests of other modules left."""
    show_bars()
    yield
    show_bars()


@pytest.mark.parametrize("downloads", [True, False])
def test_bars_of_files_are_hidden_those_of_downloads_are_not(downloads, bars):
    (enable_progress_bars if downloads else disable_progress_bars)()
    with pytest.raises(OSError, match="no file"), quiet_loading():
        assert [enabled() for enabled in LOADING] == [False, False]
        assert are_progress_bars_disabled() != downloads
        raise OSError("no file")
    assert [enabled() for enabled in LOADING] == [True, True]
    assert are_progress_bars_disabled() != downloads


def test_bars_that_are_off_stay_off(bars):
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with quiet_loading():
        pass
    assert [enabled() for enabled in LOADING] == [False, False]


def test_known_messages_are_hidden_others_are_not(caplog, recwarn):
    warnings.simplefilter("always")
    logger = logging.getLogger("transformers.utils.import_utils")
    logger.addHandler(caplog.handler)
    try:
        for context in (quiet_loading, warnings.catch_warnings):
            with context():
                logger.warning("`X` requires torchvision (not installed)")
                logger.warning("%s is damaged", context.__name__)
                warnings.warn("`torch_dtype` is deprecated", FutureWarning, stacklevel=1)
                warnings.warn(f"{context.__name__} is old", FutureWarning, stacklevel=1)
    finally:
        logger.removeHandler(caplog.handler)
    hidden = ["`X` requires torchvision (not installed)"]
    # Where transformers propagates, each comes twice.
    assert list(dict.fromkeys(caplog.messages)) == ["quiet_loading is damaged", *hidden, "catch_warnings is damaged"]
    told = [str(one.message) for one in recwarn]
    assert told == ["quiet_loading is old", "`torch_dtype` is deprecated", "catch_warnings is old"]


def test_loading_a_concept_says_nothing():
    """A process of its own, since libraries say some things at their first import only."""
    code = "from funlora_hf.personalization.found_concepts import load_base; load_base('tiny')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert (done.stdout, done.stderr) == ("", "")
