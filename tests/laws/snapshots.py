"""Snapshots of what must not change: bytes, modules, flags and registry of a model, and the files of a directory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core import adapters, fingerprint


def bits(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes, shape and dtype."""
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + data).hexdigest()


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are equal in dtype, shape and every bit (0.0 and -0.0 differ)."""
    return bits(first) == bits(second)


class BaseBits:
    """The tensors of a base before any adapter was attached: the objects themselves and their bytes."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = [(n, t) for n, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]]
        self.before = {name: bits(tensor) for name, tensor in self.tensors}

    def changed(self) -> list[str]:
        """Return the names of the tensors whose bytes changed."""
        return [name for name, tensor in self.tensors if bits(tensor) != self.before[name]]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return everything that a failed call must not change; two snapshots compare with ==."""
    return {
        "tensors": {name: (id(t), bits(t)) for name, t in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: (id(t), bits(t)) for name, t in model.named_buffers(remove_duplicate=False)},
        "modules": [(name, id(m), type(m).__name__) for name, m in model.named_modules(remove_duplicate=False)],
        "modes": {name: module.training for name, module in model.named_modules()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "adapters": {name: config.to_dict() for name, config in adapters(model).items()},
        "keys": list(model.state_dict()),
        "base": fingerprint(model),
    }


def files(folder: Path) -> dict[str, bytes]:
    """Return every file in a directory tree, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
