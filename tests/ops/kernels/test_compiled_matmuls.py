"""A library has int8 matmuls with tiles if it can use tiles, and otherwise with dot products."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.ops.kernels.compiled_matmuls import DTYPE, CompiledInt8Matmuls, int8_matmuls

HAS, LACKS = frozenset({DTYPE}), frozenset[torch.dtype]()


@pytest.mark.parametrize(
    "matmuls, tiles, expected",
    [(HAS, HAS, True), (HAS, LACKS, False), (LACKS, HAS, None), (LACKS, LACKS, None)],
)
def test_tiles_are_used_if_they_are_permitted(matmuls: Any, tiles: Any, expected: bool | None) -> None:
    gateway: Any = SimpleNamespace(int8_matmuls=matmuls, tiles=tiles)
    found = int8_matmuls(gateway)
    assert (None if found is None else found.tiles) is expected


def test_tiles_that_are_not_permitted_are_an_error() -> None:
    gateway: Any = SimpleNamespace(int8_matmuls=HAS, tiles=LACKS)
    with pytest.raises(ValueError, match="tiles"):
        CompiledInt8Matmuls(gateway, tiles=True)
