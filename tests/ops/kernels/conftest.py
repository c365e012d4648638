"""Kernels that are compiled without optimization, and Triton's: on a device if there is one, else in its interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit.ops.kernels import building


@pytest.fixture
def unoptimized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build kernels in a tenth of the time, for tests of files and errors."""
    monkeypatch.setattr(building, "FLAGS", ("-O0", *building.FLAGS[1:]))


@pytest.fixture(scope="session")
def triton_kernels(device: str) -> Any:
    """Return the kernels of `lorakit.ops.kernels.triton`; tests/conftest.py decides whether they are interpreted."""
    pytest.importorskip("triton", reason="the triton package is not installed: pip install 'lorakit[triton]'")
    from lorakit.ops.kernels.triton.launching import TritonKernels

    return TritonKernels()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(
    params=[torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=["fp32", "bf16"], scope="session"
)
def dtype(request: pytest.FixtureRequest) -> Any:
    """bf16 is wrong in Triton's interpreter."""
    return request.param
