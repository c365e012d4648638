"""Silence the loggers of transformers, and of the quantization packages it imports, during loading."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that write when a quantization package is imported, as transformers does if one is installed."""


@contextlib.contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Limit transformers to errors and hide progress bars within a block; restore the settings afterwards.

    Args:
        bars: Whether to keep progress bars (for a long download).

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
