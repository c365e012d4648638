"""LoRA as most tutorials show it, in thirty lines: it runs, it is short, and it is wrong in five ways.

docs/math.md, "The naive version", names them, and tests/docs/test_naive.py shows each one. Do not use it.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


class LoRA(nn.Module):
    """Two matrices added to a layer."""

    def __init__(self, in_features, out_features, r, alpha):
        super().__init__()
        self.A = nn.Parameter(torch.randn(r, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, r))
        self.scale = alpha / r

    def forward(self, x):  # noqa: D102
        return x @ self.A.T @ self.B.T * self.scale


def get_peft_model(model, r, alpha, target_modules):
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and any(target in name for target in target_modules):
            for parameter in module.parameters():
                parameter.requires_grad = False
            out_features, in_features = module.weight.shape
            lora = LoRA(in_features, out_features, r, alpha)
            module.add_module("lora", lora)
            original = module.forward
            module.forward = lambda x: original(x) + lora(x)  # noqa: B023
    return model
