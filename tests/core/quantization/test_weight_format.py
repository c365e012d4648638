"""The registry WEIGHT_FORMATS: a weight is read as (out, in) in at least fp32 and written back in its own layout and dtype."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorakit.core.quantization import at_least_fp32, weight_format_of

MODULES = {"dense": nn.Linear(5, 3), "transposed": Conv1D(3, 5), "embedding": nn.Embedding(5, 3)}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_written_is_what_was_read(name: str, dtype: torch.dtype) -> None:
    module = MODULES[name]
    stored = module.weight.detach().to(dtype)
    base = weight_format_of(module)
    read = base.read(module, stored)
    assert tuple(read.shape) == (3, 5)
    assert read.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    written = base.write(module, stored, read)
    assert written.dtype == dtype and written.is_contiguous() and torch.equal(written, stored)


def test_only_the_first_two_axes_of_a_transposed_weight_are_exchanged() -> None:
    """A weight stored as (in, out, k), such as that of a transposed convolution in a user-defined kind."""
    module = MODULES["transposed"]
    stored = torch.randn(5, 3, 4)
    base = weight_format_of(module)
    read = base.read(module, stored)
    assert torch.equal(read, stored.permute(1, 0, 2)) and torch.equal(base.write(module, stored, read), stored)


@pytest.mark.parametrize("name", MODULES)
def test_placed_is_stored_and_a_clone_leaves_the_module_alone(name: str) -> None:
    module = copy.deepcopy(MODULES[name])
    base, before, parameter = weight_format_of(module), module.weight.detach().clone(), module.weight
    other = base.write(module, before, base.read(module, before) + 1)
    clone = base.clone(module, "weight", other)
    assert torch.equal(module.weight, before) and torch.equal(clone.weight, other)
    base.put_stored(module, "weight", other)
    assert module.weight is parameter and torch.equal(base.stored(module, "weight"), other)
    assert base.device(module, "weight") == other.device


def test_which_row_it_is() -> None:
    assert [weight_format_of(module).name for module in MODULES.values()] == ["dense", "transposed", "transposed"]
    assert [weight_format_of(module).transposed for module in MODULES.values()] == [False, True, True]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_at_least_fp32(given: torch.dtype, wanted: torch.dtype) -> None:
    assert at_least_fp32(torch.ones(2, dtype=given)).dtype == wanted
