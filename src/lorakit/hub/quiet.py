"""While a model is being loaded, silence transformers and the quantization packages that it imports."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that emit messages when transformers imports an installed quantization package."""


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Limit the quantization packages that transformers imports to errors within a block, then restore the settings.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as restore:
        for logger in map(logging.getLogger, _CHATTY):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


@contextlib.contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Limit transformers' logging to errors and hide its progress bars within a block, then restore the settings.

    Args:
        bars: Whether to keep the progress bars, for example for a long download.

    Yields:
        Nothing.
    """
    with quiet_imports(), contextlib.ExitStack() as restore:
        from transformers.utils import logging as own

        restore.callback(own.set_verbosity, own.get_verbosity())
        own.set_verbosity_error()
        if not bars and own.is_progress_bar_enabled():
            restore.callback(own.enable_progress_bar)
            own.disable_progress_bar()
        yield
