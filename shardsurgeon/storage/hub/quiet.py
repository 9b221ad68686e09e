"""huggingface_hub's own words on stderr: bars where they are wanted, nothing else."""

from __future__ import annotations

import logging as levels
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
    tqdm,
)


@contextmanager
def quietly(bars: bool) -> Iterator[list[str]]:
    """For the time of a `with`, let huggingface_hub show its upload bars or nothing.

    What it warns of meanwhile is in the list, a line each. Holds for the whole process.
    """
    # Made once and for all: uploads on several threads would make and delete it in turns.
    bar: Any = tqdm
    bar.get_lock()
    level = logging.get_verbosity()
    said: list[str] = []
    with ExitStack() as stack:
        warned = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always", UserWarning)
        logging.set_verbosity(levels.CRITICAL)
        stack.callback(logging.set_verbosity, level)
        if not (bars or are_progress_bars_disabled()):
            stack.callback(enable_progress_bars)
            disable_progress_bars()
        try:
            yield said
        finally:
            texts = (" ".join(str(found.message).split()) for found in warned)
            said += [text for text in dict.fromkeys(texts) if "progress bars" not in text]
