"""While a model is being loaded, silence the packages that load it, and say every few seconds what takes long."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from lorakit.tables import format_seconds

SILENT_SECONDS = 4.0
"""Time between two messages about something that takes long, in seconds."""

_MESSAGES = "lorakit-messages"  # name of the threads that write them

_CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that emit messages when transformers imports an installed quantization package."""


@contextlib.contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Limit transformers' logging to errors and hide its progress bars within a block, then restore the settings.

    Args:
        bars: Whether to keep the progress bars, for example for a long download.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as restore:
        for logger in map(logging.getLogger, _CHATTY):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        from transformers.utils import logging as own

        restore.callback(own.set_verbosity, own.get_verbosity())
        own.set_verbosity_error()
        if not bars and own.is_progress_bar_enabled():
            restore.callback(own.enable_progress_bar)
            own.disable_progress_bar()
        yield


@contextlib.contextmanager
def hidden_stderr() -> Iterator[None]:
    """Discard what is written to stderr within a block, such as progress bars, except for messages of `saying`."""
    with contextlib.redirect_stderr(_Messages(sys.stderr)):
        yield


class _Messages(io.TextIOBase):
    """A stream that passes on what threads of `saying` write, and discards the rest."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text) if threading.current_thread().name == _MESSAGES else len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


@contextlib.contextmanager
def saying(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Say every `SILENT_SECONDS` seconds how long a block has been running.

    Args:
        say: Function that receives the messages, in another thread.
        what: What the block does.
    """
    began, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(SILENT_SECONDS):
            say(f"{what}: {format_seconds(round(time.monotonic() - began))}")

    thread = threading.Thread(target=tell, daemon=True, name=_MESSAGES)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
