"""Tolerances between two computations of the same result, by dtype (ruling 25).

Laws 3, 4, 8, 11 and 12 mean bits and need no tolerance. The others compare `computed` with `expected`:
‖difference‖_max ≤ RELATIVE[dtype] · max(1, ‖expected‖_max).
"""

from __future__ import annotations

import torch

RELATIVE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
"""Largest deviation of an output by the dtype of the base: some tens of its machine epsilons."""


def assert_close(computed: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Compare within the table's tolerance.

    Args:
        computed: The value to check, of any shape.
        expected: The correct value, of the same shape.
        dtype: The base's dtype, which picks the row.
    """
    assert computed.shape == expected.shape
    expected = expected.double()
    scale = max(1.0, expected.abs().max().item())
    difference = (computed.double() - expected).abs().max().item()
    assert difference <= RELATIVE[dtype] * scale, f"differs by {difference:.3g}, allowed {RELATIVE[dtype] * scale:.3g}"


def assert_differs(computed: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> None:
    """Check that two values differ by a margin, so that no tolerance makes a comparison pass by accident."""
    scale = max(1.0, other.double().abs().max().item())
    difference = (computed.double() - other.double()).abs().max().item()
    assert difference > 3 * RELATIVE[dtype] * scale, f"differ by {difference:.3g} only; the test would prove nothing"
