"""The formulas of docs/math.md about how an adapter begins, each written out in float64 and compared with the code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import attach, collect_for, disable, save_adapter
from lorakit.core.files.adapter_folder import read_adapter

R, ALPHA, IN, OUT = 4, 6, 12, 20
SCALE = ALPHA / R


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT)).double()


def rows(n: int = 50) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(IN, IN, generator=generator, dtype=torch.float64)
    return [torch.randn(n, IN, generator=generator, dtype=torch.float64) @ mix + 0.3 for _ in range(3)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).sin().square().mean()


def began(init: str, data: bool = False, **fields: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, nn.Sequential]:
    """W (out, in), A, B, what the base became, and the model."""
    model = base()
    W = model[0].weight.detach().clone()
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=init, **fields)
    statistics = collect_for(model, config, rows(), loss) if data else None
    attach(model, config if statistics is None else statistics.config, seed=2, statistics=statistics)
    layer = model[0]
    A, B = (holder["default"].weight.detach().clone() for holder in (layer.lora_A, layer.lora_B))
    return W, A, B, layer.base_layer.weight.detach(), model


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_pissa() -> None:
    W, A, B, left, _ = began("pissa")
    U, S, Vh = torch.linalg.svd(W)
    close(SCALE * B @ A, U[:, :R] @ S[:R].diag() @ Vh[:R])
    close(left, W - SCALE * B @ A)
    close((A * A).sum(1), S[:R] / SCALE)  # both factors take the root of the singular values
    close((B * B).sum(0), S[:R] / SCALE)
    _, A, B, left, _ = began("pissa_niter_8")
    close(SCALE * B @ A, U[:, :R] @ S[:R].diag() @ Vh[:R], 1e-8)
    close(left, W - SCALE * B @ A)


def test_olora() -> None:
    W, A, B, left, _ = began("olora")
    Q, right = torch.linalg.qr(W)
    close(B @ A, Q[:, :R] @ right[:R])
    close(B.T @ B, torch.eye(R))
    close(left, W - SCALE * B @ A)


def test_plain_form(tmp_path: Any) -> None:
    W, A0, B0, left, model = began("pissa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    A, B = model[0].lora_A["default"].weight, model[0].lora_B["default"].weight
    save_adapter(model, tmp_path)
    files = read_adapter(tmp_path)
    wide_A, wide_B = (files.file.tensors[f"base_model.model.0.lora_{word}.weight"] for word in "AB")
    assert (files.config.r, files.config.lora_alpha, files.config.init_lora_weights) == (2 * R, 2 * ALPHA, True)
    close(wide_A, torch.cat([A, A0]))
    close(wide_B, torch.cat([B, -B0], 1))
    close(W + files.config.lora_alpha / files.config.r * wide_B @ wide_A, left + SCALE * B @ A)


def test_orthogonal() -> None:
    _, A, B, _, _ = began("orthogonal")
    close(B @ A, torch.zeros(OUT, IN))
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == R // 2
    assert 0.05 < float(A.norm() / math.sqrt(A.numel() / 2)) < 0.2


def test_eva() -> None:
    W, A, B, left, model = began("eva", data=True, eva_config={"rho": 1.0})
    x = torch.cat(rows())
    Vh = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:R]
    close(A @ A.T, torch.eye(R), 1e-6)
    close((A @ Vh.T).abs(), torch.eye(R), 1e-5)
    assert not B.any() and torch.equal(left, W)
    with disable(model):
        assert torch.equal(model(x), base()(x))


def test_corda() -> None:
    scaled = [x / x.max().abs() for x in rows()]
    C = sum((x.T @ x for x in scaled), torch.zeros(IN, IN)) / len(scaled)
    C = C + torch.eye(IN) * C.diagonal().mean() * 0.01
    for method, part in (("ipm", slice(0, R)), ("kpm", slice(IN - R, IN))):
        W, A, B, left, _ = began("corda", data=True, corda_config={"corda_method": method})
        U, S, Vh = torch.linalg.svd(W @ C, full_matrices=False)
        close(SCALE * B @ A, U[:, part] @ S[part].diag() @ Vh[part] @ C.inverse(), 1e-8)
        close((B * B).sum(0), S[part] / SCALE, 1e-8)
        close(left, W - SCALE * B @ A)


def test_loftq() -> None:
    normal = torch.distributions.Normal(0.0, 1.0)
    top = (1 - 1 / 32 + 1 - 1 / 30) / 2
    up = normal.icdf(torch.linspace(top, 0.5, 9, dtype=torch.float64)[:-1])
    down = -normal.icdf(torch.linspace(top, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([down, torch.zeros(1), up]) / up.max()

    def grid(W: Tensor) -> Tensor:
        flat = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % 64)).view(-1, 64)
        scale = flat.abs().amax(1, keepdim=True)
        nearest = (flat[..., None] / scale[..., None] - levels).abs().argmin(-1)
        return (levels[nearest] * scale).flatten()[: W.numel()].view_as(W)

    W, A, B, left, _ = began("loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 3})
    product = torch.zeros_like(W)
    for _ in range(3):
        Q = grid(W - product)
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        product = U[:, :R] @ S[:R].diag() @ Vh[:R]
    close(left, Q, 1e-6)
    close(SCALE * B @ A, product, 1e-6)
    assert (W - left - SCALE * B @ A).norm() < (W - grid(W)).norm()


def test_lora_ga() -> None:
    model = base()
    total = sum((loss(model, batch) for batch in rows()), torch.zeros(()).double()) / 3
    (G,) = torch.autograd.grad(total, model[0].weight)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    chosen = {
        "ArB2r": (range(R), range(R, 2 * R)),
        "A2rBr": (range(R, 2 * R), range(R)),
        "ArBr": (range(1, 2 * R, 2), range(0, 2 * R, 2)),
    }
    for direction, (to_A, to_B) in chosen.items():
        W, A, B, left, _ = began("lora_ga", data=True, lora_ga_config={"direction": direction, "stable_gamma": 9})
        close(A.abs(), Vh[list(to_A)].abs(), 1e-5)
        close(B.abs(), (U[:, list(to_B)] * S[list(to_B)]).abs() * OUT**0.25 / 3, 1e-5)
        close(left, W - SCALE * B @ A)


def test_mica() -> None:
    W, A, B, left, model = began("mica")
    U = torch.linalg.svd(W, full_matrices=False).U
    close(B.abs(), U[:, -R:].abs())
    assert not A.any() and torch.equal(left, W)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.lora_A.default.weight"]
