"""The kernels for CUDA, in Triton. Nothing here imports the package `triton` before `kernels` is called."""

from __future__ import annotations

from lorakit.ops.kernels.protocol import Kernels


def kernels() -> Kernels | None:
    """The kernels, or None where the package `triton` is not installed. They are compiled when they are first used."""
    try:
        from lorakit.ops.kernels.triton.launching import TritonKernels
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "triton":
            raise
        return None
    return TritonKernels()
