"""The table BASES: a weight is read as (out, in) in at least fp32 and written back in its own layout and dtype."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.core.bases import at_least_fp32, base_of

MODULES = {"dense": nn.Linear(5, 3), "transposed": Conv1D(3, 5), "embedding": nn.Embedding(5, 3)}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_written_is_what_was_read(name: str, dtype: torch.dtype) -> None:
    stored = MODULES[name].weight.detach().to(dtype)
    base = base_of(MODULES[name])
    read = base.read(stored)
    assert tuple(read.shape) == (3, 5)
    assert read.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    written = base.write(read, stored)
    assert written.dtype == dtype and written.is_contiguous() and torch.equal(written, stored)


def test_which_row_it_is() -> None:
    assert [base_of(module).name for module in MODULES.values()] == ["dense", "transposed", "transposed"]
    assert [base_of(module).transposed for module in MODULES.values()] == [False, True, True]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_at_least_fp32(given: torch.dtype, wanted: torch.dtype) -> None:
    assert at_least_fp32(torch.ones(2, dtype=given)).dtype == wanted
