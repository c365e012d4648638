"""Keeps transformers from drawing bars and logging over our own output while it loads something."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Errors only, and no progress bars, for the length of a block; the settings that were there come back.

    Args:
        bars: True leaves the bars alone (a download takes long and should be seen).

    Yields:
        Nothing.
    """
    from transformers.utils import logging

    verbosity, drew_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if drew_bars and not bars:
            logging.enable_progress_bar()
