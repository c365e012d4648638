"""Make a function fail, or kill its process, at each of its file operations.

`at_every_operation` repeats the work on a fresh copy of a folder: the k-th file operation fails, or the process ends in
it as it does by SIGKILL, for every k, and the files on the disk are judged each time.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

from lorakit import durable_folders
from lorakit.errors import LorakitError

How = Literal["error", "full", "kill"]
"""One operation fails; the disk stays full from there on; the process ends without any clean-up."""

NEED_ROOM = ("open", "write", "mkdir", "link", "symlink")
WATCHED = (*NEED_ROOM, "fsync", "chmod", "fchmod", "chown", "fchown", "utime", "rename", "replace", "unlink", "rmdir")
KILLED = 77


class Operations:
    """Counts file operations; at the k-th it fails or ends the process.

    Attributes:
        count: Operations so far.
        log: Their names.
    """

    def __init__(self, at: int, how: How) -> None:
        self.at, self.how, self.count = at, how, 0
        self.log: list[str] = []

    def reach(self, name: str) -> None:
        """Note an operation that is about to happen."""
        self.count += 1
        self.log.append(name)
        if self.how == "kill" and self.count == self.at:
            os._exit(KILLED)
        if self.how == "error" and self.count == self.at:
            raise OSError(errno.EIO, "Input/output error")
        if self.how == "full" and self.count >= self.at and name in NEED_ROOM:
            raise OSError(errno.ENOSPC, "No space left on device")

    @contextlib.contextmanager
    def watched(self, exchange: bool = True) -> Iterator[None]:
        """Count within a block; without `exchange`, the file system cannot exchange two folders."""
        with pytest.MonkeyPatch.context() as patch:
            for name in WATCHED:
                patch.setattr(os, name, self._around(name, getattr(os, name)))
            opened = self._opening(io.open)
            patch.setattr(io, "open", opened)
            patch.setattr(builtins, "open", opened)
            swap = durable_folders._exchange if exchange else _no_exchange
            patch.setattr(durable_folders, "_exchange", self._around("exchange", swap))
            yield

    def _around(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "write" and self.how == "kill" and self.count + 1 == self.at:
                real(args[0], bytes(args[1])[: len(args[1]) // 2])  # torn
            reading = name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR)
            self.reach("read" if reading else name)
            return real(*args, **kwargs)

        return call

    def _opening(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+") and not isinstance(path, int):
                self.reach("open")
            return real(path, mode, *args, **kwargs)

        return call


def _no_exchange(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def at_every_operation(
    work: Callable[[Path], object],
    template: Path,
    judge: Callable[[Path], str],
    *,
    how: How,
    exchange: bool = True,
) -> list[str]:
    """Do a piece of work with a crash at each file operation.

    Args:
        work: Does it in the copy of the template.
        template: A folder; it is copied for every crash.
        judge: Inspects the copy after the crash and describes what it found.
        how: What happens at the k-th operation.
        exchange: The file system can exchange two folders.

    Returns:
        What was found after a crash at operation 1, 2, …; the last entry is the work that was not disturbed.
    """
    found = []
    for at in itertools.count(1):
        root = template.with_name(f"{template.name}-{at}")
        shutil.copytree(template, root, symlinks=True)
        done = _once(work, root, Operations(at, how), exchange)
        found.append(judge(root))
        shutil.rmtree(root)
        if done:
            return found
    raise AssertionError


def _once(work: Callable[[Path], object], root: Path, operations: Operations, exchange: bool) -> bool:
    """Return whether the work ended before the crash."""
    if operations.how != "kill":
        with contextlib.suppress(LorakitError), operations.watched(exchange):
            work(root)
        return operations.count < operations.at
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with operations.watched(exchange):
                work(root)
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == 0
