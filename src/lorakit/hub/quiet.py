"""While a model is being loaded, silence transformers and the quantization packages that it imports."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that emit messages when transformers imports an installed quantization package."""


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Limit the quantization packages that transformers imports to errors in a context, then restore the settings."""
    with contextlib.ExitStack() as restore:
        for logger in map(logging.getLogger, _CHATTY):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


@contextlib.contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Limit transformers' logging to errors in a context, and hide its progress bars unless `bars` is true."""
    with quiet_imports(), contextlib.ExitStack() as restore:
        from transformers.utils import logging as own

        restore.callback(own.set_verbosity, own.get_verbosity())
        own.set_verbosity_error()
        if not bars and own.is_progress_bar_enabled():
            restore.callback(own.enable_progress_bar)
            own.disable_progress_bar()
        yield
