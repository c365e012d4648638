"""The sums of gradients over two processes: the same bits as a sum after the backward pass, sent while it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ..processes.processes import start

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Outcomes of `process_sums.py` in each process, by case."""
    folder = tmp_path_factory.mktemp("sums")
    start("process_sums", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def equal(first: list[Any], second: list[Any]) -> bool:
    return all(
        (one is None) == (other is None) and (one is None or torch.equal(one, other))
        for one, other in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("case", ["batches", "unseen experts", "no batch", "penalty"])
def test_sums_have_the_bits_of_gradients_added_afterwards(outcomes: list[dict[str, Any]], case: str) -> None:
    first, second = (one[case] for one in outcomes)
    assert all(first["equal"]) and all(second["equal"])
    assert equal(first["gradients"], second["gradients"])
    assert first["sizes"] == second["sizes"]
    assert len(first["sizes"]) > 3


def test_buckets_are_sent_during_the_last_backward_pass_only(outcomes: list[dict[str, Any]]) -> None:
    for one in outcomes:
        before, after = one["batches"]["early"]
        assert (before, after) == (0, len(one["batches"]["sizes"]))
    first, second = (one["penalty"]["early"] for one in outcomes)
    assert first == [0, 0, 0]
    assert second[-1] == len(outcomes[1]["penalty"]["sizes"])


def test_a_tensor_without_a_gradient_in_all_processes_keeps_none(outcomes: list[dict[str, Any]]) -> None:
    for one in outcomes:
        made = one["unseen experts"]
        absent = [name for name, gradient in zip(made["names"], made["gradients"], strict=True) if gradient is None]
        assert absent and all("experts.2" in name for name in absent)
        assert all("experts.2" in n for n, is_zero in zip(made["names"], made["zero"], strict=True) if is_zero)


def test_an_error_in_one_backward_pass_is_raised_in_both_processes(outcomes: list[dict[str, Any]]) -> None:
    first, second = (one["error"] for one in outcomes)
    assert (first["kind"], second["kind"]) == ("RunError", "ValueError")
    assert first["message"].startswith("process 1: ")
    assert equal(first["next"], second["next"])
    assert first["sizes"] == second["sizes"]


def test_nan_in_one_process_is_an_error_in_both(outcomes: list[dict[str, Any]]) -> None:
    first, second = (one["nan"] for one in outcomes)
    assert first["kind"] == second["kind"] == "NonFiniteError"
    assert first["message"] == second["message"]
    assert equal(first["next"], second["next"])
