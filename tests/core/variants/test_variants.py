"""The registry VARIANTS: additions to output and weight against the formulas of the papers."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.config import LoraConfig
from lorakit.config.variants import VARIANT_COSTS
from lorakit.core.factor import BOTH
from lorakit.core.kinds import WeightSpec, kind_named
from lorakit.core.variants import VARIANTS, At, Factor, Start, asked_for, variant_for, variant_named
from lorakit.core.variants.dora import row_norms
from lorakit.errors import ConfigError

SCALE = 0.7
MAGNITUDE = "lora_magnitude_vector"
KIND, SLOT = kind_named("Linear"), WeightSpec("weight", 3, 5)


@pytest.fixture
def numbers() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    W, A, B, bias, x = (torch.randn(*s, dtype=torch.float64) for s in ((3, 5), (2, 5), (3, 2), (3,), (4, 5)))
    return W, A, B, bias, x


def factor(A: Tensor, B: Tensor, variant: str, magnitude: Tensor | None = None) -> Factor:
    own = {} if magnitude is None else {MAGNITUDE: magnitude}
    return Factor(A, B, SCALE, nn.Identity(), variant_named(variant), own)


def output(y0: Tensor, bias: Tensor | None, z: Tensor, held: Factor, W: Tensor) -> Tensor:
    """The variant's addition to an output (…, out)."""
    give = held.variant.output
    return z if give is None else give(At(y0, bias, z, held, KIND, SLOT, lambda: W))


def test_row_norms_are_those_of_the_dense_sum(numbers: tuple[Tensor, ...]) -> None:
    W, A, B, _, _ = numbers
    torch.testing.assert_close(row_norms(W, A, B, SCALE), torch.linalg.vector_norm(W + SCALE * B @ A, dim=1))


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_output_and_update_agree_with_the_formula(name: str, numbers: tuple[Tensor, ...]) -> None:
    W, A, B, bias, x = numbers
    magnitude = torch.rand(3, dtype=torch.float64) + 0.5 if name == "dora" else None
    full = W + SCALE * B @ A
    if magnitude is not None:  # arXiv:2402.09353, eq. (5)
        full = magnitude.unsqueeze(1) * full / torch.linalg.vector_norm(full, dim=1, keepdim=True)
    row, held = variant_named(name), factor(A, B, name, magnitude)
    y0, z = F.linear(x, W, bias), SCALE * (x @ A.T) @ B.T
    torch.testing.assert_close(y0 + output(y0, bias, z, held, W), F.linear(x, full, bias))
    torch.testing.assert_close(W + row.update(KIND, SLOT, W, SCALE * B @ A, held), full)


def test_doras_magnitude_begins_as_the_norm_so_that_nothing_changes(numbers: tuple[Tensor, ...]) -> None:
    W, A, _, bias, x = numbers
    B, row = torch.zeros(3, 2, dtype=torch.float64), variant_named("dora")
    begins = row.parts.extra_tensors(Start(KIND, SLOT, A, B, SCALE, lambda: W))
    held = factor(A, B, "dora", begins[MAGNITUDE])
    y0 = F.linear(x, W, bias)
    assert not output(y0, bias, torch.zeros_like(y0), held, W).any()


def test_the_norm_is_constant_in_the_backward(numbers: tuple[Tensor, ...]) -> None:
    W, A, B, _, x = numbers
    A, magnitude = A.clone().requires_grad_(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    held = factor(A, B, "dora", magnitude)
    y0 = x @ W.T
    z = SCALE * (x @ A.T) @ B.T
    (y0 + output(y0, None, z, held, W)).sum().backward()
    gain = (magnitude / row_norms(W, A, B, SCALE)).detach()
    expected = torch.autograd.grad((gain * (SCALE * (x @ A.T) @ B.T)).sum(), A)[0]
    torch.testing.assert_close(A.grad, expected)
    assert magnitude.grad is not None and magnitude.grad.abs().min() > 0


def test_a_row_of_zeros_stays_zero_instead_of_nan(numbers: tuple[Tensor, ...]) -> None:
    W, A, B, _, x = numbers
    W, B = W.clone(), B.clone()
    W[0], B[0] = 0, 0
    held = factor(A, B, "dora", row_norms(W, A, B, SCALE))
    found = output(x @ W.T, None, SCALE * (x @ A.T) @ B.T, held, W)
    assert torch.isfinite(found).all() and not found[:, 0].any()


def test_a_kind_without_a_meaning_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"mha: MultiheadAttention does not support DoRA.*use_dora to False"
    ) as caught:
        variant_for(LoraConfig(use_dora=True), kind_named("MultiheadAttention"), "mha")
    assert caught.value.field == "use_dora" and "Linear" in caught.value.allowed
    with pytest.raises(ConfigError, match="MultiheadAttention does not support DoRA"):  # its output projection
        variant_for(LoraConfig(use_dora=True), kind_named("InnerLinear"), "mha.out_proj")
    assert variant_for(LoraConfig(), kind_named("MultiheadAttention"), "mha")[0].name == "plain"


def test_a_replaced_factor_leaves_the_first_as_it_is(numbers: tuple[Tensor, ...]) -> None:
    _, A, B, _, _ = numbers
    first = factor(A, B, "plain")
    scale = first.scale
    other = dataclasses.replace(first, scale=scale + 1)
    assert (first.scale, other.scale) == (scale, scale + 1) and other.A is A


def test_each_extra_tensor_belongs_to_one_variant() -> None:
    tensors = [tensor for variant in VARIANTS for tensor in variant.parts.extras]
    names = [name for tensor in tensors for name in (tensor.held_as, *tensor.older_names)]
    assert tensors and len(set(names)) == len(names)


def test_each_variant_has_one_row_of_costs_that_freezes_what_it_does_not_train() -> None:
    rows = {costs.field: costs for costs in VARIANT_COSTS}
    assert len(rows) == len(VARIANT_COSTS)
    assert {field: row.frozen for field, row in rows.items()} == {
        variant.field: BOTH - variant.parts.trains for variant in asked_for()
    }
