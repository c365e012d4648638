"""Is alpha a learning rate? Train one adapter with different alphas and learning rates, with Adam and SGD, and compare.

Data and initial A are equal; computed in float64. A row gives alpha and the factors of the learning rates of A and B.
"""

from __future__ import annotations

import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig

RUNS = (("8", 8, 1, 1), ("16", 16, 1, 1), ("8", 8, 2, 2), ("8", 8, 1, 2), ("8", 8, 1, 4))
RATES = {"Adam": 0.02, "SGD": 0.05}
STEPS = 30


def train(method: str, alpha: float, times_A: float, times_B: float) -> tuple[float, torch.Tensor]:
    """Fit a dense layer's adapter (r = 8, so the scale is alpha / 8) to a shifted layer; return loss and s·B·A."""
    generator = torch.Generator().manual_seed(0)
    W, shift = (torch.randn(12, 16, generator=generator, dtype=torch.float64) / 4 for _ in range(2))
    x = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(16, 12, bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(W)
    core.attach(model, LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"]), seed=0)
    factor = core.sites(model)[0].layer.factor("default")
    rate = RATES[method]
    groups = [{"params": [factor.A], "lr": rate * times_A}, {"params": [factor.B], "lr": rate * times_B}]
    # eps is the only trace of a gradient's size in Adam; a tiny value removes it
    optimizer = torch.optim.Adam(groups, eps=1e-30) if method == "Adam" else torch.optim.SGD(groups)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - x @ (W + shift).T).square().mean()
        loss.backward()
        optimizer.step()
    return loss.item(), factor.scale * (factor.B @ factor.A).detach()


def table() -> str:
    """Return the final losses as a Markdown table."""
    lines = ["| alpha | rate of A | rate of B | loss, Adam | loss, SGD |", "|---|---|---|---|---|"]
    for name, alpha, times_A, times_B in RUNS:
        losses = [f"{train(method, alpha, times_A, times_B)[0]:.6f}" for method in RATES]
        lines.append(f"| {name} | × {times_A} | × {times_B} | {losses[0]} | {losses[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
