"""One test per formula of docs/math.md, (17) to (19) and (44) and (45): the formula is written out here and compared with the code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.operations.data_init import allocate
from lorakit.core.optimizers import Pair, Rates, corrected_gradient, inverse_gram, rates_by_name, trained_parts
from lorakit.core.riemannian import Factors, precondition
from lorakit.train.loop.optional_optimizers import Muon
from lorakit.train.spec import Schedule


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False))


def test_rate_of_b_is_a_multiple_of_that_of_a() -> None:
    """(17)"""
    model = two_layers()
    core.attach(model, LoraConfig(r=2, target_modules=["0", "2"]))
    rates = rates_by_name(trained_parts(model), Rates(0.01, b_ratio=16.0, patterns={"2": 0.03}))
    assert rates == pytest.approx({
        "0.lora_A.default.weight": 0.01,
        "0.lora_B.default.weight": 0.16,
        "2.lora_A.default.weight": 0.03,
        "2.lora_B.default.weight": 0.48,
    })  # fmt: skip


def test_corrected_gradient_is_the_nearest_that_a_frozen_a_allows() -> None:
    """(18)"""
    torch.manual_seed(0)
    A, gamma, s = torch.randn(3, 9), torch.randn(5, 9), 2.5
    pair = Pair(nn.Parameter(torch.zeros(5, 3)), A, s)
    X = corrected_gradient(s * gamma @ A.T, pair, inverse_gram(pair))
    torch.testing.assert_close(X, gamma @ A.T @ torch.linalg.inv(A @ A.T) / s, rtol=1e-4, atol=1e-5)
    left = (s * X @ A - gamma).norm()
    for seed in range(20):
        other = X + 0.1 * torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
        assert (s * other @ A - gamma).norm() > left


def test_ranks_follow_the_sensitivity_within_the_budget() -> None:
    """(19)"""
    model, x, r = two_layers(), torch.randn(20, 12), 4
    found = allocate(model, LoraConfig(r=r, target_modules=["0", "2"]), [x], lambda m, b: m(b).square().mean())
    model(x).square().mean().backward()
    sites = {"0": model[0], "2": model[2]}  # type: ignore[index]
    sensitivity = {path: float((m.weight * m.weight.grad).detach().abs().mean()) for path, m in sites.items()}
    assert found.evidence == pytest.approx(sensitivity, rel=1e-4)
    costs = {path: sum(m.weight.shape) for path, m in sites.items()}
    weights = {path: sensitivity[path] / math.sqrt(costs[path]) for path in sites}
    ends = {path: (math.ceil(r / 2), min(4 * r, *m.weight.shape)) for path, m in sites.items()}
    best = {}
    for step in range(20_000):  # the largest factor that the budget allows
        ranks = {p: min(max(int(step / 500 / weights["0"] * weights[p]), ends[p][0]), ends[p][1]) for p in sites}
        if sum(ranks[p] * costs[p] for p in sites) > sum(r * costs[p] for p in sites):
            break
        best = ranks
    assert found.ranks == best
    assert found.ranks["0"] != found.ranks["2"]


def test_the_rate_rises_is_constant_and_decays() -> None:
    """(44)"""
    eta, T, w, d = 0.3, 40, 4, 8
    shapes = {
        "constant": (w, lambda x: 1.0),
        "linear": (w, lambda x: 1 - x),
        "cosine": (w, lambda x: (1 + math.cos(math.pi * x)) / 2),
        "wsd": (T - d, lambda x: 1 - math.sqrt(x)),
    }
    for kind, (t0, f) in shapes.items():
        course = Schedule(eta, T, w, kind, d)  # type: ignore[arg-type]
        for t in range(T):
            expected = eta * (t + 1) / w if t < w else eta * f(max(0, t - t0) / (T - t0))
            assert course.rate(t) == pytest.approx(expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
def test_muon_orthogonalizes_the_mean_gradient() -> None:
    """(45)"""
    torch.manual_seed(0)
    start, eta, decay = torch.randn(6, 40), 0.01, 0.1
    theta = nn.Parameter(start.clone())
    optimizer = Muon([{"params": [theta], "lr": eta, "weight_decay": decay}], None, lr=eta)
    expected, M = start.clone(), torch.zeros(6, 40)
    for _ in range(3):
        theta.grad = g = torch.randn(6, 40)
        optimizer.step()
        M = 0.95 * M + 0.05 * g
        X = (0.95 * M + 0.05 * g) / (0.95 * M + 0.05 * g).norm()
        for _ in range(5):
            gram = X @ X.T
            X = 3.4445 * X - 4.775 * gram @ X + 2.0315 * gram @ gram @ X
        assert 0.6 < float(torch.linalg.svdvals(X).min()) <= float(torch.linalg.svdvals(X).max()) < 1.3
        expected = (1 - eta * decay) * expected - 0.2 * math.sqrt(40) * eta * X
        assert 0.15 < float((0.2 * math.sqrt(40) * X).square().mean().sqrt()) < 0.25
    torch.testing.assert_close(theta.detach(), expected, rtol=0.0, atol=1e-3)  # the iterations are in bf16


def test_preconditioned_gradients() -> None:
    torch.manual_seed(0)
    A, B = (nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 7), (5, 3)))
    A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
    eye = 0.25 * torch.eye(3, dtype=torch.float64)
    of_A = torch.linalg.inv(B.T @ B + eye) @ A.grad
    of_B = B.grad @ torch.linalg.inv(A @ A.T + eye)
    precondition(Factors(A, B), 0.25)
    torch.testing.assert_close(A.grad, of_A)
    torch.testing.assert_close(B.grad, of_B)
