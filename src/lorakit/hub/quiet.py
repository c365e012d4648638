"""Keeps transformers, and the quantisers that it imports, from logging over our own output while it loads."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that speak when a quantiser is imported, which transformers does whenever one is installed."""


@contextlib.contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Errors only, and no progress bars, for the length of a block; the settings that were there come back.

    Args:
        bars: True leaves the bars alone (a download takes long and should be seen).

    Yields:
        Nothing.
    """
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as own

        verbosity, drew_bars = own.get_verbosity(), own.is_progress_bar_enabled()
        own.set_verbosity_error()
        if not bars:
            own.disable_progress_bar()
        try:
            yield
        finally:
            own.set_verbosity(verbosity)
            if drew_bars and not bars:
                own.enable_progress_bar()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
