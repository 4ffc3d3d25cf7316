"""Load models without what diffusers and transformers say about it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers.utils import logging as transformers_logging


# Loggers of transformers 5 and 4 that say that torchvision would be faster than Pillow; filters are not inherited.
_OF_IMAGES = ("transformers.utils.import_utils", "transformers.models.auto.image_processing_auto")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide bars of files that are read, and known messages, while models are imported or loaded; bars of downloads stay.

    Other messages are shown, and all are after the context.
    """
    with warnings.catch_warnings(), ExitStack() as after:
        # `dtype`, which diffusers now wants instead, is ignored by earlier versions.
        warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
        for logger in map(logging.getLogger, _OF_IMAGES):
            logger.addFilter(_is_news)
            after.callback(logger.removeFilter, _is_news)
        if diffusers_logging.is_progress_bar_enabled():
            diffusers_logging.disable_progress_bar()
            after.callback(diffusers_logging.enable_progress_bar)
        if transformers_logging.is_progress_bar_enabled():
            # transformers switches the bars of downloads, too.
            downloads = disable_progress_bars if are_progress_bars_disabled() else enable_progress_bars
            after.callback(downloads)
            after.callback(transformers_logging.enable_progress_bar)
            transformers_logging.disable_progress_bar()
            downloads()
        yield


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return "torchvision" not in text and "slow image processor" not in text
