"""The kernels for CUDA, in Triton, which is imported when a device's kernels are first asked for."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch

from lorakit.ops.kernels.building import SWITCH
from lorakit.ops.kernels.protocol import Kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes for which there are kernels."""


@functools.cache
def kernels(device: torch.device) -> Kernels | None:
    """The kernels for a device, compiled when they are first used; None where `account` says why."""
    if account(device):
        return None
    from lorakit.ops.kernels.triton.launching import TritonKernels

    return TritonKernels()


@functools.cache
def account(device: torch.device) -> str:
    """Why there are no kernels for a device, or "": one is compiled and run there, once in a process."""
    if _is_off():
        return f"{SWITCH}=off"
    launching = _launching()
    return "the package triton is not installed" if launching is None else launching.failure(device)


def lacks_package() -> bool:
    """Return whether kernels are wanted and the package triton is not installed."""
    return not _is_off() and _launching() is None


def _is_off() -> bool:
    return os.environ.get(SWITCH, "").lower() == "off"


def _launching() -> ModuleType | None:
    """Return the module that launches the kernels, or None if triton is not installed."""
    try:
        from lorakit.ops.kernels.triton import launching
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "triton":
            raise
        return None
    return launching
