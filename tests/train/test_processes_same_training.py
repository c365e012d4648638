"""Two processes train like one: the same rows per step, the same losses and the same adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .processes import start

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture
def made(tmp_path: Path, tiny_model_directory: Path) -> dict[int, list[Any]]:
    """Number of processes -> what each of them has written."""
    found = {}
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        start("process_steps", tiny_model_directory, folder, count=count)
        found[count] = [torch.load(folder / f"{rank}.pt") for rank in range(count)]
    return found


def test_fifty_steps_in_float64_with_accumulation_and_packing(made: dict[int, list[Any]]) -> None:
    [alone], (first, second) = made[1], made[2]
    assert first["losses"] == second["losses"]
    assert first["tokens"] == alone["tokens"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-9, abs=0)
    assert alone["losses"][-1] < alone["losses"][0]
    for name, tensor in alone["tensors"].items():
        assert torch.equal(first["tensors"][name], second["tensors"][name])
        assert float((first["tensors"][name] - tensor).norm() / tensor.norm()) <= 1e-9
    assert first["fused"] == second["fused"] == alone["fused"] > 0
    assert first["packs"] == alone["packs"] is True
