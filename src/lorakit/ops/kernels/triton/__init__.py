"""CUDA kernels in Triton; the `triton` package is imported when kernels for a device are first requested."""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from lorakit.ops.kernels.building import SWITCH

if TYPE_CHECKING:
    from lorakit.ops.kernels.triton.launching import TritonKernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes for which there are kernels."""


@functools.cache
def kernels(device: torch.device) -> TritonKernels | None:
    """Return the kernels for a device, or None if `failure_on` returns a reason. Kernels are compiled on first use."""
    if failure_on(device):
        return None
    from lorakit.ops.kernels.triton.launching import TritonKernels

    return TritonKernels()


@functools.cache
def failure_on(device: torch.device) -> str:
    """Return why a device has no kernels, or "" if it has kernels. The first call compiles and runs a test kernel."""
    if _is_off():
        return f"{SWITCH}=off"
    launching = _launching()
    return "the triton package is not installed" if launching is None else launching.failure(device)


def lacks_package() -> bool:
    """Return whether kernels are enabled but the `triton` package is not installed."""
    return not _is_off() and _launching() is None


def _is_off() -> bool:
    return os.environ.get(SWITCH, "").lower() == "off"


def _launching() -> ModuleType | None:
    """Return the module that launches the kernels, or None if `triton` is not installed."""
    try:
        from lorakit.ops.kernels.triton import launching
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "triton":
            raise
        return None
    return launching
