"""LoRA+, LoRA-FA, a separate learning rate for one module, and ranks by gradients, on the same small task."""

import copy

import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.operations.data_init import allocate
from lorakit.core.optimizers import LoraFA, Rates, freeze_factors, rates_by_name, trained_parts

CONFIG = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"])


def task() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a base, inputs, and the outputs of a base whose first layer was changed by a matrix of rank 6."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16))
    changed, x = copy.deepcopy(base), torch.randn(512, 64)
    with torch.no_grad():
        changed[0].weight += 0.05 * torch.randn(64, 6) @ torch.randn(6, 64)
        return base, x, changed(x)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the loss after 100 steps, as a fraction of the base's."""
    losses = []
    for _ in range(101):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[-1] / losses[0]


def main() -> None:
    """Train the same task five times and print the remaining losses."""
    runs = {"AdamW": Rates(1e-3), "LoRA+, B at 16 times the rate": Rates(1e-3, b_ratio=16)}
    runs |= {"AdamW, layer 0 at 10 times the rate": Rates(1e-3, patterns={"0": 1e-2})}
    runs |= {"LoRA-FA, A frozen": Rates(1e-3), "AdamW, ranks by gradients": Rates(1e-3)}
    for name, rates in runs.items():
        model, x, y = task()
        found = allocate(model, CONFIG, [(x, y)], lambda m, b: (m(b[0]) - b[1]).square().mean())
        core.attach(model, found.config if "ranks" in name else CONFIG, seed=0)
        pairs = freeze_factors(model) if "FA" in name else []
        parts = trained_parts(model)
        by_name = rates_by_name(parts, rates)
        groups = [{"params": [part.parameter], "lr": by_name[part.name]} for part in parts]
        left = train(model, LoraFA(groups, pairs) if pairs else torch.optim.AdamW(groups, weight_decay=0.0), x, y)
        trained, ranks = sum(p.parameter.numel() for p in parts), [s.layer.r["default"] for s in core.sites(model)]
        print(f"{name}: {left:.0%} of the loss remains; ranks {ranks}, {trained:,} trained parameters")


if __name__ == "__main__":
    main()
