"""A base sharded over processes trains like a whole one: the same losses, tensors and fused forwards, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .process_sharding import CASES, STEPS
from .processes import start

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


FAMILIES = ("bert", "t5", "gpt2", "gemma2", "mixtral", "neox", "opt", "phi3", "qwen3")


def trained(folder: Path, count: int, *cases: str) -> list[dict[str, Any]]:
    """Return what each of several processes has written."""
    start("process_sharding", folder, *cases, count=count)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Return the largest relative difference of losses and tensors."""
    losses = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    pairs = [(ours["tensors"][name], tensor) for name, tensor in theirs["tensors"].items()]
    return max(losses, *(float((a - b).norm() / b.norm()) for a, b in pairs))


def check(made: list[dict[str, Any]], mesh: tuple[int, ...]) -> None:
    """Check runs with a sharded base against those of the same processes with the whole base, and of one process."""
    for name, ways in made[0].items():
        whole, sharded, alone = ways["whole"], ways["sharded"], ways["alone"]
        assert len(sharded["losses"]) == 2 * (1 + STEPS)
        assert (sharded["losses"], sharded["tokens"]) == (whole["losses"], whole["tokens"]), name
        if CASES[name].dtype == torch.float64:
            assert difference(sharded, alone) < 1e-9, name
        for tensor, value in whole["tensors"].items():
            for process in made:
                assert torch.equal(process[name]["sharded"]["tensors"][tensor], value), (name, tensor)
        assert all(sharded["calls"].get(kind, 0) >= calls for kind, calls in whole["calls"].items()), name
        base = sharded["sharded"]
        assert (base["blocks"], base["mesh"]) == (3, mesh)
        assert abs(base["local_bytes"] * mesh[-1] / base["whole_bytes"] - 1) < 0.05  # the largest part is rounded up
        assert whole["whole"] > sharded["whole"] == 0, name


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    made = trained(tmp_path, 2, "uneven", "dora")
    assert made[0]["uneven"]["sharded"]["calls"]
    check(made, (2,))


@pytest.mark.slow
def test_other_models_adapters_and_dtypes(tmp_path: Path) -> None:
    check(trained(tmp_path, 2, *(name for name in CASES if name not in ("uneven", "dora"))), (2,))


@pytest.mark.slow
def test_gradients_of_other_families(tmp_path: Path) -> None:
    start("process_families", tmp_path, *FAMILIES)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.pop("t5") < 1e-5  # gradients of the encoder's output are added in another order
        assert set(found.values()) == {0.0}


@pytest.mark.slow
def test_two_machines_with_two_processes(tmp_path: Path) -> None:
    made = trained(tmp_path, 4, "packed", "uneven")
    check(made, (2, 2))
    assert made[0]["packed"]["sharded"]["sharded"]["method"] == "hsdp"
