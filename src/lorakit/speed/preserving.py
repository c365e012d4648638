"""Preserve a model while probes run it: flags, attributes, children, hooks, buffers, forward records, random state.

A forward may change more than its output: some models build rotary caches or masks on their first call, or exchange
their attention when the input is short. After the block the modules hold the same objects as before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.routes.forwards import Forwards

COPIED = 1 << 20
"""Largest number of elements of a buffer that is copied before the block, to undo writes in place."""


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore a model and torch's random generators after a block.

    Inside the block modules have empty forward records, so a later backward does not see the block's forwards.

    Args:
        model: Any model; its parameters are not copied.

    Yields:
        Nothing.
    """
    held = [_Held(module) for module in model.modules()]
    written = [_Written(buffer) for buffer in model.buffers() if buffer.numel() <= COPIED]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    try:
        with torch.random.fork_rng(sorted(devices)):
            yield
    finally:
        for module in held:
            module.restore()
        for buffer in written:
            buffer.restore()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters of a model during a block.

    Args:
        model: Any model.

    Yields:
        Nothing.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


class _Held:
    """The attributes of one module, and the contents of its tables of parameters, buffers, children and hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.now: dict[str, Any] = module.__dict__
        self.attributes = dict(self.now)
        tables = [value for name, value in self.now.items() if name[0] == "_" and isinstance(value, (dict, set))]
        self.full = [(table, table.copy()) for table in tables if table]
        self.empty = [table for table in tables if not table]
        for name, value in self.attributes.items():
            if isinstance(value, Forwards):
                self.now[name] = Forwards()

    def restore(self) -> None:
        """Put everything back, also if only the contents of a table changed."""
        for name in self.now.keys() - self.attributes.keys():
            del self.now[name]
        self.now.update(self.attributes)
        for table in self.empty:
            if table:
                table.clear()
        for table, before in self.full:
            table.clear()
            table.update(before)


class _Written:
    """The numbers of one buffer, put back if it was written to in place."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.before = buffer.detach().clone()
        self.version = _version(buffer)

    def restore(self) -> None:
        """Copy the numbers back if there was a write."""
        if _version(self.buffer) != self.version:
            with torch.no_grad():
                self.buffer.copy_(self.before)


def _version(buffer: Tensor) -> int:
    return -1 if buffer.is_inference() else buffer._version
