"""Silence for commands that show a table at the end of many short runs."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what libraries have to say about a run on a CPU, and their bars for things done in a blink."""
    level = transformers.logging.get_verbosity()
    had_no_bars = datasets.are_progress_bars_disabled()
    trl_logger = logging.getLogger("trl")
    trl_level = trl_logger.level
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    trl_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
        trl_logger.setLevel(trl_level)
        if not had_no_bars:
            datasets.enable_progress_bars()
