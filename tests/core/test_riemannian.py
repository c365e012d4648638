"""Preconditioned gradients: against the formula, by expert, and which factors are left alone; steps are peft's."""

from __future__ import annotations

import pytest
import torch

from lorakit import core
from lorakit.config.nested import BdLoraConfig
from lorakit.core.riemannian import Factors, precondition, preconditioned, trained_factors
from lorakit.errors import ConfigError

from ..laws.zoo import EMBEDDING, LINEARS, OF_KIND, output, randomise


def test_each_expert_has_its_own_matrices() -> None:
    torch.manual_seed(0)
    experts, r, width, out = 3, 2, 5, 4
    A, B = torch.nn.Parameter(torch.randn(experts * r, width)), torch.nn.Parameter(torch.randn(out, r * experts))
    A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
    of_A, of_B = A.grad.clone(), B.grad.clone()
    precondition(Factors(A, B, experts), 0.1)
    for e in range(experts):
        rows, columns = slice(e * r, (e + 1) * r), slice(e, None, experts)
        mine, its = A.detach()[rows], B.detach()[:, columns]
        damped = 0.1 * torch.eye(r)
        torch.testing.assert_close(A.grad[rows], torch.linalg.solve(its.T @ its + damped, of_A[rows]))
        expected = torch.linalg.solve(mine @ mine.T + damped, of_B[:, columns].T).T
        torch.testing.assert_close(B.grad[:, columns], expected)


def test_narrow_gradients_keep_their_dtype_and_missing_ones_stay_missing() -> None:
    A, B = (torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16)) for shape in ((2, 5), (4, 2)))
    A.grad = torch.randn_like(A)
    precondition(Factors(A, B), 0.1)
    assert A.grad.dtype == torch.bfloat16 and B.grad is None


def test_which_factors_are_preconditioned() -> None:
    model = LINEARS.model()
    core.attach(model, LINEARS.config(), "a")
    core.attach(model, LINEARS.config(use_bdlora=BdLoraConfig(["up"], ["square"], nblocks=2)), "b")
    assert (len(trained_factors(model, "a")), len(trained_factors(model, "b"))) == (2, 1)
    core.set_trained(model, {"a": False})
    assert len(trained_factors(model)) == 1
    table = EMBEDDING.model()
    core.attach(table, EMBEDDING.config(), "a")
    assert trained_factors(table) == []
    fused = OF_KIND["Parameter"].model()
    core.attach(fused, OF_KIND["Parameter"].config(), "a")
    assert any(pair.experts > 1 for pair in trained_factors(fused))


def test_a_model_without_adapters_has_no_pairs() -> None:
    with pytest.raises(ConfigError, match="lora_A/lora_B parameter pairs") as caught:
        preconditioned(torch.optim.SGD, LINEARS.model(), lr=0.1)
    assert caught.value.field == "model"


def test_steps_do_not_depend_on_how_b_and_a_share_their_size() -> None:
    """The update of B·A is the same for (B/c)·(c·A), which is what the preconditioner is for."""
    moved = []
    for c in (1.0, 4.0):
        model = LINEARS.model().double()
        core.attach(model, LINEARS.config(), "a")
        randomise(model, "a", seed=1)
        factors = [site.layer.factor("a") for site in core.sites(model)]
        with torch.no_grad():
            for factor in factors:
                factor.A.mul_(c)
                factor.B.div_(c)
        before = [(factor.B @ factor.A).detach() for factor in factors]
        optimizer = preconditioned(torch.optim.SGD, model, lr=1e-6, damping=0.0)
        output(model, LINEARS.given(torch.float64)).square().mean().backward()
        optimizer.step()
        moved.append([factor.B @ factor.A - old for factor, old in zip(factors, before, strict=True)])
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-14)
