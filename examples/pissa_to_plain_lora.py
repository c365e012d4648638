"""PiSSA, and the same adapter saved as plain LoRA, which any program can read.

    python examples/pissa_to_plain_lora.py

PiSSA moves the principal directions of each weight into the adapter and keeps the residual as base. A and B alone fit
only that residual base; saved as plain LoRA of twice the rank, they fit the original one, without any loss.
"""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import nn

from lorakit import LoraConfig
from lorakit.core import attach, detach, inspect_adapter, load_adapter, save_adapter, sites, trainable_parameters


def train(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> None:
    optimizer = torch.optim.Adam([parameter for _, parameter in trainable_parameters(model)], lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()


def main() -> None:
    """Attach, train, save, and load the adapter in two ways."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16))
    x, target = torch.randn(64, 32), torch.randn(64, 16)
    model = copy.deepcopy(base)
    report = attach(model, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights="pissa"))
    print(*report.notes, sep="\n")
    print(f"new adapter: the output changed by {(model(x) - base(x)).abs().max():.4f}")
    train(model, x, target)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_adapter(model, folder)
        config = inspect_adapter(folder).config
        print(f"on disk: r {config.r}, alpha {config.lora_alpha}, init_lora_weights {config.init_lora_weights}")
        plain, on = copy.deepcopy(base), copy.deepcopy(base)
        load_adapter(plain, folder)
        gap = (plain(x) - model(x)).abs().max()
        print(f"plain LoRA on the original base: same output within {gap:.4f}")
        load_adapter(on, folder, trainable=True)
        rank = sites(on)[0].layer.r["default"]
        print(f"restored for training: r {rank}, bit-identical: {torch.equal(on(x), model(x))}")
    detach(model)
    same = all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), base.parameters(), strict=True))
    print(f"detached: base restored bit for bit: {same}")


if __name__ == "__main__":
    main()
