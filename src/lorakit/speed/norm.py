"""Fused norms and dropout modules, and their current operands, which other fused `forward` methods use. A fused norm
saves its input and one or two values per row; a fused dropout samples, on a CPU, the positions to drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.identity.identities import original_class
from lorakit.ops.dropout import dropout
from lorakit.ops.norm import Norm, normalize
from lorakit.speed.admission import Bound
from lorakit.speed.patching import Options, is_watched

RMS = ("RMSNorm", "T5LayerNorm")
"""Suffixes of RMS norm class names."""

EPSILONS = ("variance_epsilon", "eps")


@dataclass(frozen=True)
class BoundNorm(Bound):
    """A fused norm over the last dimension, bound to one module; "none" is an nn.Identity in place of a norm. `eps` is
    added to the variance or to the mean square, `offset` to the weight.
    """

    kind: Literal["rms", "layer", "none"]
    eps: float
    offset: float

    @property
    def is_absent(self) -> bool:
        """Return whether there is no norm: the module is an nn.Identity without hooks."""
        return self.kind == "none" and not is_watched(self.module)

    def operands(self, *, frozen: bool = True) -> Norm | None:
        """Return the current operands, or None if the norm has hooks or, with `frozen`, is not frozen."""
        if self.kind == "none":
            return None
        parameters = self.module._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if is_watched(self.module) or type(weight) is not nn.Parameter or weight.ndim != 1:
            return None
        if frozen and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            return None
        return Norm(self.kind, weight, bias, self.eps, self.offset)

    def run(self, x: Tensor, options: Options) -> Tensor | None:
        """Return the normalized x (…, d), or None if the module's own `forward` must run."""
        norm = self.operands()
        if norm is None or (norm.weight is not None and norm.weight.dtype != x.dtype):
            return None  # if the dtypes differ, the dtype of the output depends on the model
        if norm.kind == "layer" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float32:
            return None  # a layer norm returns float32 under autocast
        return normalize(x, norm)


def match(module: nn.Module) -> BoundNorm | str:
    """Return the fused `forward` of a norm, or why the module is not a supported norm."""
    bound = _bound(module)
    return "not a frozen LayerNorm or RMSNorm" if bound is None or bound.operands() is None else bound


def _bound(module: nn.Module) -> BoundNorm | None:
    if isinstance(module, nn.LayerNorm):
        return BoundNorm(module, "layer", module.eps, 0.0)
    eps = next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    name = original_class(module).__name__
    if eps is None or module._parameters.get("bias") is not None or not name.endswith(RMS):
        return None
    return BoundNorm(module, "rms", eps, 1.0 if name.startswith("Gemma") else 0.0)


def bound_norm(module: nn.Module | None) -> BoundNorm | None:
    """Return the fused `forward` of a norm, or None if there is no module or it is not a supported norm."""
    if type(module) is nn.Identity:
        return BoundNorm(module, "none", 0.0, 0.0)
    bound = None if module is None else match(module)
    return None if isinstance(bound, str) else bound


def bound_norms(module: nn.Module, *names: str) -> list[BoundNorm | None] | None:
    """Return the fused `forward` methods of norms, None for a missing child; None if any is not supported."""
    children = [module._modules.get(name) for name in names]
    norms = [bound_norm(child) for child in children]
    is_known = all(norm is not None or child is None for norm, child in zip(norms, children, strict=True))
    return norms if is_known else None


def operands_of(norms: Sequence[BoundNorm | None], *, frozen: bool = True) -> list[Norm | None] | None:
    """Return the current operands of norms, with None for a missing norm; None if any norm cannot be fused now."""
    operands = [None if norm is None else norm.operands(frozen=frozen) for norm in norms]
    is_absent = [norm is None or norm.is_absent for norm in norms]
    return operands if all(one is not None or absent for one, absent in zip(operands, is_absent, strict=True)) else None


def dropout_p(module: nn.Module | None) -> float | None:
    """Return a module's current dropout probability: 0 if there is no module, or None if it is not supported."""
    if module is None or (isinstance(module, nn.Identity) and not is_watched(module)):
        return 0.0
    if not isinstance(module, nn.Dropout) or is_watched(module) or module.p >= 1:
        return None
    return module.p if module.training else 0.0


@dataclass(frozen=True)
class BoundDropout(Bound):
    """Fused dropout, bound to one module."""

    module: nn.Dropout

    def run(self, x: Tensor, options: Options) -> Tensor | None:
        """Return x (any shape) after dropout, or None if the module's own `forward` must run."""
        module = self.module
        return None if x.device.type != "cpu" else dropout(x, module.p, module.training)


def match_dropout(module: nn.Module) -> BoundDropout | str:
    """Return the fused `forward` of a dropout module, or why it is not supported."""
    if not isinstance(module, nn.Dropout) or original_class(module) is not nn.Dropout or module.inplace:
        return "not a plain dropout"
    return BoundDropout(module) if 0 < module.p < 1 else "not an active dropout"
