"""Several processes train like one: the same rows per step, the same losses and the same adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakit.train.processes.processes import ALONE

from . import process_steps
from .process_steps import STEPS
from .processes import start

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

DTYPES = ("float64", "float32")


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """Results of training in one process, by dtype."""
    return {name: process_steps.trained(name, ALONE, Counter()) for name in DTYPES}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, dict[str, Any]]]]:
    """Function that trains in some processes, once per number, and returns what each has trained, by dtype."""
    found = dict[int, list[dict[str, dict[str, Any]]]]()

    def make(count: int) -> list[dict[str, dict[str, Any]]]:
        if count not in found:
            folder = tmp_path_factory.mktemp("steps")
            start("process_steps", folder, *DTYPES, count=count)
            found[count] = [torch.load(folder / f"{rank}.pt") for rank in range(count)]
        return found[count]

    return make


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of two sets of tensors, relative to the first set."""
    apart = sum(float((first[name] - second[name]).square().sum()) for name in first)
    return (apart / sum(float(tensor.square().sum()) for tensor in first.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "losses", "deltas"), [("float64", 1e-9, 1e-9), ("float32", 1e-5, 1e-3)])
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_fifty_steps_with_accumulation_and_packing(
    alone: dict[str, dict[str, Any]],
    trained: Callable[[int], list[dict[str, dict[str, Any]]]],
    count: int,
    dtype: str,
    losses: float,
    deltas: float,
) -> None:
    expected, made = alone[dtype], [one[dtype] for one in trained(count)]
    assert len(expected["losses"]) == STEPS
    assert expected["losses"][-1] < expected["losses"][0]
    for one in made:
        assert one["tokens"] == expected["tokens"]
        assert one["losses"] == pytest.approx(expected["losses"], rel=losses, abs=0)
        assert difference(expected["deltas"], one["deltas"]) <= deltas
        assert one["losses"] == made[0]["losses"]
        assert all(torch.equal(tensor, made[0]["tensors"][name]) for name, tensor in one["tensors"].items())
        assert one["fused"] == expected["fused"] > 0
        assert one["packs"] == expected["packs"] is True


@pytest.mark.costly(cases=0)
def test_a_step_exchanges_values_twice_and_sums_one_bucket(
    trained: Callable[[int], list[dict[str, dict[str, Any]]]],
) -> None:
    for one in trained(2):
        assert one["float32"]["operations"] == {"all_gather_object": 2 * STEPS, "all_reduce": STEPS}
