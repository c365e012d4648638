"""`peft.utils.merge_utils`: each function returns what the installed peft returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.errors import ConfigError
from lorakit.peft.utils import merge_utils as ours

theirs = pytest.importorskip("peft.utils.merge_utils")

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def tensors(dtype: torch.dtype = torch.float32, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(7, 5, generator=generator).to(dtype) for _ in range(count)]


WEIGHTS = torch.tensor([0.5, -1.25, 2.0])

CALLS: dict[str, tuple[Any, ...]] = {
    "task_arithmetic": (),
    "magnitude_prune": (0.4,),
    "ties": (0.4,),
    "ties by frequency": (0.4, "frequency"),
    "dare_linear": (0.6,),
    "dare_ties": (0.6,),
    "dare_ties by frequency": (0.6, "frequency"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_combinations(call: str, dtype: torch.dtype) -> None:
    found = []
    for library in (theirs, ours):
        torch.manual_seed(4)
        found.append(getattr(library, call.partition(" ")[0])(tensors(dtype), WEIGHTS.to(dtype), *CALLS[call]))
    assert torch.equal(*found) and found[1].dtype == found[0].dtype


@pytest.mark.parametrize("density", [0.0, 0.3, 0.999])
@pytest.mark.parametrize(("method", "rescale"), [("magnitude", False), ("random", False), ("random", True)])
def test_pruning(method: str, rescale: bool, density: float) -> None:
    (tensor,) = tensors(count=1)
    found = []
    for library in (theirs, ours):
        torch.manual_seed(4)
        found.append(library.prune(tensor, density, method, rescale=rescale))
    torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_election(method: str) -> None:
    stack = torch.stack([*tensors(), -tensors()[0]])  # with ties and zeros
    stack[0, 0] = 0
    masks = [library.calculate_majority_sign_mask(stack, method) for library in (theirs, ours)]
    assert torch.equal(*masks)
    assert torch.equal(*(library.disjoint_merge(stack, masks[0]) for library in (theirs, ours)))


def test_a_density_of_1_keeps_everything_with_a_warning() -> None:
    (tensor,) = tensors(count=1)
    for library in (theirs, ours):
        with pytest.warns(UserWarning, match="greater than or equal to 1, no pruning"):
            assert library.prune(tensor, 1.0, "magnitude") is tensor


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: ours.prune(torch.ones(3), -0.1, "magnitude"), "density"),
        (lambda: ours.prune(torch.ones(3), 0.5, "smallest"), "method"),
        (lambda: ours.calculate_majority_sign_mask(torch.ones(2, 3), "mean"), "method"),
        (lambda: ours.ties([torch.ones(3)], torch.ones(1), 0.5, "mean"), "method"),
    ],
)
def test_bad_arguments(call: Any, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.field == field and isinstance(caught.value, ValueError)
