"""Comparison of a fused forward: per row, without the residual, with rounding in low precision, and named exceptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.speed import admission
from lorakit.speed.admission import Verdict, compare_branches
from lorakit.speed.probe import Call, Calls, Pairs


class Branch(nn.Module):
    """Return x plus a small branch."""

    def __init__(self, size: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(32, 32) * size, requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + hidden_states @ self.weight


@dataclass(frozen=True)
class Bound(admission.Bound):
    """A fused forward that calls a function of the module and hidden states, for its branches too."""

    function: Callable[..., Any]

    def run(self, x: Tensor, options: dict[str, Any]) -> Any:
        return self.function(self.module, x)

    def branches(self, x: Tensor, options: dict[str, Any], inside: Calls) -> Pairs:
        pairs: Pairs = self.function(self.module, x)
        return pairs


def compare(module: nn.Module, function: Callable[..., Any], call: Call, residual: bool = False) -> Verdict:
    return admission.compare(Bound(module, function), call, residual=residual)


def called(module: nn.Module, dtype: torch.dtype = torch.float32) -> Call:
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    return Call((x,), {}, module.to(dtype)(x))


def off_by(share: float) -> Callable[..., Tensor]:
    """Return a fused forward whose branch is wrong by a fraction."""
    return lambda module, x: x + (x @ module.weight) * (1 + share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_does_not_hide_a_wrong_branch(dtype: torch.dtype) -> None:
    module = Branch(3e-3)  # a branch of 2% of the output
    call = called(module, dtype)
    wrong = off_by(0.6 if dtype == torch.bfloat16 else 4e-3)
    assert not compare(module, wrong, call).differs  # within the tolerance of the output
    assert compare(module, wrong, call, residual=True).differs
    assert not compare(module, off_by(0.0), call, residual=True).differs


def test_by_keyword_too() -> None:
    module = Branch(1e-2)
    (x,), output = called(module).args, called(module).output
    call = Call((), {"hidden_states": x}, output)

    assert compare(module, off_by(5e-3), call, residual=True).differs


def test_one_wrong_row_is_not_hidden_by_large_ones() -> None:
    module = nn.Identity()
    x = torch.randn(2, 9, 32)
    x[0] *= 1e4
    call = Call((x,), {}, x)
    x[1] *= 1e3  # not below SMALLEST_ROW

    def wrong(module: nn.Module, x: Tensor) -> Tensor:
        made = x.clone()
        made[1, 4] *= 1.01
        return made

    assert float((wrong(module, x) - x).norm() / x.norm()) < 1e-3
    assert compare(module, wrong, call).differs
    assert compare(module, lambda _, x: x.clone(), call) == ("", False)


class Sharp(nn.Module):
    """A module that amplifies each rounding of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(16 * x.float()).to(x.dtype)


def test_a_narrow_module_that_amplifies_roundings_is_allowed_as_much() -> None:
    module = Sharp()
    call = called(module, torch.bfloat16)

    def one_rounding_more(module: nn.Module, x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(5)) * 2 - 1
        return module((x.float() * (1 + signs * torch.finfo(torch.bfloat16).eps / 2)).to(x.dtype))

    moved = one_rounding_more(module, call.args[0])
    assert float((moved - call.output).float().norm() / call.output.float().norm()) > 2e-2
    assert not compare(module, one_rounding_more, call).differs
    assert compare(module, lambda module, x: module(x * 0.8), call).differs


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AssertionError, NotImplementedError, RecursionError])
def test_an_exception_is_named(error: type[Exception]) -> None:
    def failing(*_: Any) -> Tensor:
        raise error

    verdict = compare(Branch(1.0), failing, called(Branch(1.0)))
    assert verdict.differs and error.__name__ in verdict.why
    branches = compare_branches(Bound(Branch(1.0), failing), called(Branch(1.0)), {})
    assert branches.differs and error.__name__ in branches.why


def test_an_interrupt_passes() -> None:
    def stopped(*_: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(Branch(1.0), stopped, called(Branch(1.0)))


def test_other_shapes_and_no_numbers_differ() -> None:
    module = Branch(1.0)
    call = called(module)
    assert compare(module, lambda *_: call.output[0], call).differs
    assert compare(module, lambda *_: (call.output,), call).differs
    assert compare(module, lambda *_: call.output * torch.nan, call).differs
    declined = compare(module, lambda *_: None, call)
    assert declined.why and not declined.differs
    assert compare_branches(Bound(module, lambda *_: [(None, call.output)]), call, {}).differs
    assert not compare_branches(Bound(module, lambda *_: [(call.output, call.output)]), call, {}).differs
