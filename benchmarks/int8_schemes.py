"""Shared by the benchmark of int8 parity: linear modules that compute in int8 by a scheme, and their calibration.

The modules are plain: they use the arithmetic of `lorakit.ops.int8`, and keep the original weight, so that one
model can change its scheme. Nothing here trains or measures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.choices import KEPT_CHANNELS
from lorakit.data import Batch
from lorakit.ops import int8, int8_weight
from lorakit.ops.autograd import rows
from lorakit.ops.int8_weight import Int8Weight

BLOCK = 64
"""Channels of a block of the Hadamard rotation."""

SHARED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Last name of a module -> name of the modules of its block that share its input."""


class Scheme(NamedTuple):
    """Settings of the linear modules of the blocks.

    Attributes:
        smoothing: Exponent of the input scales; None for scales of 1.
        kept: Input channels that stay in bf16.
        rotated: Whether blocks of 64 input channels are rotated before they are quantized.
        int8_backward: Whether the gradient of the input is an int8 matmul too; bf16 otherwise.
        outputs: Output channels of the gradient, those with the largest values of each call, that stay in bf16 in the
            backward pass.
        worst: Number of sites, those with the largest outliers, that stay in bf16.
    """

    smoothing: float | None = None
    kept: int = 0
    rotated: bool = False
    int8_backward: bool = True
    outputs: int = 0
    worst: int = 0


BF16, DEFAULT = "bf16", "smooth+split"

SCHEMES: dict[str, Scheme | None] = {
    BF16: None,
    "naive": Scheme(),
    "smooth": Scheme(int8_weight.SMOOTHING),
    "split": Scheme(kept=KEPT_CHANNELS),
    DEFAULT: Scheme(int8_weight.SMOOTHING, KEPT_CHANNELS),
    "hadamard": Scheme(rotated=True),
    "hadamard+split": Scheme(kept=KEPT_CHANNELS, rotated=True),
    "smooth+split, forward only": Scheme(int8_weight.SMOOTHING, KEPT_CHANNELS, int8_backward=False),
    "smooth+split, 16 outputs": Scheme(int8_weight.SMOOTHING, KEPT_CHANNELS, outputs=16),
    "naive, 2 sites in bf16": Scheme(worst=2),
    "smooth, 2 sites in bf16": Scheme(int8_weight.SMOOTHING, worst=2),
    "smooth+split, 2 sites in bf16": Scheme(int8_weight.SMOOTHING, KEPT_CHANNELS, worst=2),
    "smooth+split, kept 32": Scheme(int8_weight.SMOOTHING, 32),
    "smooth+split, kept 64": Scheme(int8_weight.SMOOTHING, 64),
    "smooth+split, smoothing 0.35": Scheme(0.35, KEPT_CHANNELS),
    "smooth+split, smoothing 0.65": Scheme(0.65, KEPT_CHANNELS),
}
"""Name -> scheme; None is the original matmul."""


class Site(nn.Linear):
    """A linear module that computes by its scheme, and as nn.Linear without one."""

    scheme: Scheme | None = None
    quantized: Int8Weight | None = None
    absmax: dict[bool, Tensor]
    """Largest |x| of each input channel (in,), not rotated (False) and rotated (True)."""

    @classmethod
    def like(cls, linear: nn.Linear) -> Site:
        """Return a site with the weight and the bias of a linear module."""
        site = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        site.weight, site.bias = linear.weight, linear.bias
        site.absmax = {rotated: torch.zeros(linear.in_features) for rotated in (False, True)}
        return site

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (…, out) for x (…, in)."""
        if self.scheme is None or self.quantized is None:
            return super().forward(x)
        x = rotate(x) if self.scheme.rotated else x
        if self.scheme.int8_backward and not self.scheme.outputs:
            return int8.int8_linear(x, self.quantized, self.bias)
        y: Tensor = _OtherBackward.apply(x, self.quantized, self.weight, self.bias, self.scheme)
        return y


class _OtherBackward(torch.autograd.Function):
    """The forward pass in int8; the backward pass in bf16, or in int8 with some output channels in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Int8Weight, W: Tensor, bias: Tensor | None, scheme: Scheme) -> Any:
        ctx.state = quantized, W, scheme
        return int8.int8_linear(x.detach(), quantized, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        quantized, W, scheme = ctx.state
        if not scheme.int8_backward:
            return dy @ W, None, None, None, None
        flat = rows(dy)
        left_out = torch.topk(flat.abs().amax(0).float() * quantized.scale, scheme.outputs).indices
        exact = flat[:, left_out].float() @ W[left_out].float()
        rest = flat.clone()
        rest[:, left_out] = 0
        return int8.reference_backward(rest, quantized, exact).view(*dy.shape[:-1], -1), None, None, None, None


def rotate(x: Tensor) -> Tensor:
    """Multiply blocks of 64 channels of x (…, d) by an orthogonal Hadamard matrix, which is its own inverse."""
    H = torch.ones(1, 1)
    while len(H) < BLOCK:
        H = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1)))
    return (x.float().unflatten(-1, (-1, BLOCK)) @ (H / math.sqrt(BLOCK))).flatten(-2).to(x.dtype)


def replace_linears(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Site]:
    """Replace the linear modules of a model, except the head, by sites without a scheme, calibrated on batches."""
    sites = dict[str, Site]()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not path.endswith("lm_head"):
            sites[path] = Site.like(module)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, sites[path])
    with torch.no_grad(), _recording(sites.values()):
        for batch in batches:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return sites


@contextmanager
def _recording(sites: Iterable[Site]) -> Iterator[None]:
    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for rotated, absmax in module.absmax.items():  # type: ignore[union-attr, operator]
            x = rotate(inputs[0]) if rotated else inputs[0]
            torch.maximum(absmax, rows(x).abs().amax(0).float(), out=absmax)

    handles = [site.register_forward_pre_hook(record) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outliers(sites: dict[str, Site]) -> dict[str, float]:
    """Return the largest input of each site, divided by that of its median channel; the largest first."""
    found = {path: float(site.absmax[False].max() / site.absmax[False].median()) for path, site in sites.items()}
    return dict(sorted(found.items(), key=lambda one: -one[1]))


def use(sites: dict[str, Site], scheme: Scheme | None) -> None:
    """Let all sites compute by a scheme; sites that share an input share g and K."""
    groups = dict[tuple[str, str], list[Site]]()
    worst = list(outliers(sites))[: scheme.worst] if scheme else []
    for path, site in sites.items():
        site.scheme, site.quantized = (None if path in worst else scheme), None
        parent, _, name = path.rpartition(".")
        groups.setdefault((parent, SHARED.get(name, name)), []).append(site)
    for group in groups.values() if scheme else ():
        _quantize(group, scheme)


def _quantize(group: list[Site], scheme: Scheme | None) -> None:
    if scheme is None:
        return
    weights = [rotate(site.weight) if scheme.rotated else site.weight for site in group]
    gain, kept = int8_weight.input_scales(
        group[0].absmax[scheme.rotated],
        weights,
        scheme.kept,
        int8_weight.SMOOTHING if scheme.smoothing is None else scheme.smoothing,
    )
    gain = torch.ones_like(gain) if scheme.smoothing is None else gain
    for site, W in zip(group, weights, strict=True):
        site.quantized = int8_weight.quantize_weight(W, gain, kept)
