"""DoRA and LoRA: a task that changes row norms, and one that does not.

    python examples/dora.py

A dense layer is trained towards a teacher that differs by (a) scaled rows, (b) a low-rank update. DoRA trains one
magnitude per output in addition to A and B, so it fits (a) immediately; on (b) it has no advantage over LoRA.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit import LoraConfig
from lorakit.core import attach, merge, trainable_parameters, use

IN, OUT, RANK, STEPS = 32, 24, 2, 300


def teacher(W: Tensor, task: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if task == "lengths":
        return (0.5 + torch.rand(OUT, 1, generator=generator)) * W
    return W + 0.1 * torch.randn(OUT, RANK, generator=generator) @ torch.randn(RANK, IN, generator=generator)


def train(model: nn.Module, name: str, target: Tensor) -> float:
    """Return the mean squared error after a fixed number of steps with one adapter."""
    parameters = [parameter for _, parameter in trainable_parameters(model, name)]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    torch.manual_seed(2)
    with use(model, name):
        for _ in range(STEPS):
            x = torch.randn(64, IN)
            loss = (model(x) - x @ target.T).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return loss.item()


def main() -> None:
    for task in ("lengths", "low-rank"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
        target = teacher(model[0].weight.detach().clone(), task)
        for name, dora in (("lora", False), ("dora", True)):
            attach(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], use_dora=dora), name, seed=3)
            numbers = sum(parameter.numel() for _, parameter in trainable_parameters(model, name))
            print(f"{task}: {name} with {numbers} parameters: final loss {train(model, name, target):.2e}")
        with use(model, "dora"):
            before = model(torch.ones(1, IN))
        merge(model, "dora")
        print(
            f"{task}: merging changes the output by {(model[0].base_layer(torch.ones(1, IN)) - before).abs().max():.0e}"
        )


if __name__ == "__main__":
    main()
