"""Output head and cross-entropy in one: no logits are kept, and rows without a trained label are not multiplied.

`reference` says what is computed. The fast path goes through the trained rows chunk by chunk; while a chunk's logits
are there, it also makes the gradient for h from them, so that the backward has nothing left to do but to scale it. Head
and loss cost two products of the trained rows with W, and the memory of one chunk of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lorakit.ops.adapted import as_written, autocast, wide
from lorakit.ops.choices import product, slices
from lorakit.ops.kernels.choosing import kernels_for

IGNORED = -100
"""The label of rows that are not trained, as everywhere in the field."""

CPU_CHUNK, OTHER_CHUNK = (256, 48 << 20), (4096, 256 << 20)
"""Most rows of a chunk, and most bytes that its logits take. W is read twice for each chunk: below about 100 rows that
costs a CPU more than the products, and above 256 it gains little. An accelerator wants more rows at once."""
ROWS_PER_THREAD = 4
"""Rows of a chunk that a thread turns into gradients at a time, so that their fp32 image stays in its cache."""
SMALLEST = {torch.float32: 1e-30, torch.float64: 1e-290}
"""Probabilities from which a logarithm is taken; that of a smaller one comes from the logits."""


@dataclass(frozen=True)
class Head:
    """Map from hidden states to logits: z = W·h + bias, then scale·z, then softcap·tanh(z/softcap).

    Attributes:
        W: (V, d), in the dtype of the hidden states.
        bias: (V,), frozen, or None.
        scale: Factor of the logits (Cohere's `logit_scale`, 1/`logits_scaling` of Granite).
        softcap: Bound of the logits (Gemma-2's `final_logit_softcapping`), or None.
    """

    W: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


class Needs(NamedTuple):
    """Which gradients are asked for."""

    h: bool
    W: bool


def reference(
    h: Tensor, head: Head, labels: Tensor, *, total: float | Tensor | None = None, ignore_index: int = IGNORED
) -> Tensor:
    """What `linear_cross_entropy` computes (scalar) of h (..., d) and labels (...), in plain PyTorch."""
    z = F.linear(h, head.W, head.bias).to(wide(h.dtype)) * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    loss = F.cross_entropy(z.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="sum")
    return loss / ((labels != ignore_index).sum() if total is None else total)


def linear_cross_entropy(
    h: Tensor,
    head: Head,
    labels: Tensor,
    *,
    total: float | Tensor | None = None,
    ignore_index: int = IGNORED,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of the labels under softmax of the head's logits, [docs/math.md (75)].

    Products run in the dtype of h, or autocast's. Saved for the backward: the gradient of the trained rows, and which
    rows these are.

    Args:
        h: Hidden states (..., d), already shifted: the row i predicts labels[i].
        head: What makes logits (V) of them. A gradient for W is made only where W requires one.
        labels: (...) integers below V, on the device of h or on the CPU; rows with `ignore_index` cost nothing.
        total: What the sum of the losses is divided by; None for the number of trained labels, where none gives NaN.
        ignore_index: The label of rows that are not trained.
        chunk: Rows whose logits exist at a time; None for a number by the vocabulary's size.

    Returns:
        The loss, a scalar in fp32, or in float64 where h is.

    Raises:
        ValueError: Shapes, dtypes or labels do not fit, or something other than h and W is to be trained.

    Source: the chunks and the gradient in the forward are those of Liger's fused linear cross-entropy, Hsu et al. 2024,
    arXiv:2410.10989, section 3.2, here for a frozen W.
    """
    if torch.is_autocast_enabled(h.device.type):
        bias = None if head.bias is None else autocast(head.bias)
        h, head = autocast(h), replace(head, W=autocast(head.W), bias=bias)
    _check(h, head, labels, ignore_index, chunk)
    flat, targets = h.flatten(0, -2), labels.flatten().long().contiguous()  # a view may have kept its strides
    rows = (targets != ignore_index).nonzero().squeeze(1)  # labels that lie on the CPU let no device be waited for
    count, every = len(rows), len(rows) == len(targets)
    targets = targets if every else targets[rows]
    least, most = torch.stack(targets.aminmax()).tolist() if count else (0, 0)
    if least < 0 or most >= len(head.W):
        raise ValueError(f"labels: they are to lie in 0..{len(head.W) - 1} or be {ignore_index}; mask the others.")
    targets, rows = (t.to(h.device, non_blocking=True) for t in (targets, rows))
    trained = Trained(flat, head, targets, None if every else rows, chunk or chunk_rows(head.W))
    if torch.is_grad_enabled() and (h.requires_grad or head.W.requires_grad):
        loss = _LinearCrossEntropy.apply(flat, head.W, trained)
    else:
        with as_written(h):
            loss = trained.run(Needs(h=False, W=False))[0]
    return loss / (count if total is None else total)


def chunk_rows(W: Tensor) -> int:
    """Rows whose logits are made at a time for W (V, d): a multiple of 16 within the device's bounds."""
    rows, size = CPU_CHUNK if W.device.type == "cpu" else OTHER_CHUNK
    return min(max(size // (len(W) * W.element_size()) // 16 * 16, 16), rows)


class Trained(NamedTuple):
    """The rows that have a label, and how they are gone through.

    Attributes:
        h: Hidden states of all rows, (N, d).
        head: What makes logits of them.
        labels: Labels of the trained rows, (n,).
        rows: Which rows of h these are, (n,); None for all of them.
        chunk: Rows at a time, at most.
    """

    h: Tensor
    head: Head
    labels: Tensor
    rows: Tensor | None
    chunk: int

    def run(self, needs: Needs) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sum of the losses (scalar), and its gradients: for the trained rows of h (n, d) over scale, for W (V, d).

        Both gradients lack the factor `head.scale`; that of W is in fp32 or wider.
        """
        h, (W, bias), n = self.h.detach(), (self.head.W.detach(), self.head.bias), len(self.labels)
        losses = h.new_empty(n, dtype=wide(h.dtype))
        dh = h.new_empty(n, h.shape[1]) if needs.h else None
        dW = W.new_zeros(W.shape, dtype=wide(W.dtype)) if needs.W else None
        of_chunk = torch.empty_like(W) if needs.W else None
        logits = h.new_empty(min(self.chunk, n), len(W))
        softmax = _Softmax(self.head, logits, gradients=needs.h or needs.W)
        for part in self._parts():
            x = h[part] if self.rows is None else h.index_select(0, self.rows[part])
            z = logits[: len(x)]
            product(x, W.t(), z, bias)
            softmax.turn(z, self.labels[part], losses[part])
            if dh is not None:
                product(z, W, dh[part])
            if dW is not None:
                dW += torch.mm(z.t(), x, out=of_chunk)
        return losses.sum(), dh, dW

    def _parts(self) -> Iterator[slice]:
        """Chunks of about equal size: a last one of few rows would read W for them alone."""
        if len(self.labels):
            yield from slices(len(self.labels), self.chunk)


class _Softmax:
    """Losses of rows of logits, which become the gradient of the sum of the losses in place.

    A few rows at a time go through scratch that stays in the cache: to fp32, softmax, minus one at the label, back.
    """

    def __init__(self, head: Head, logits: Tensor, *, gradients: bool) -> None:
        self.scale, self.cap, self.gradients = head.scale, head.softcap, gradients
        self.kernels = kernels_for(logits)
        if self.kernels is not None and head.softcap is not None and not self.kernels.caps_logits:
            self.kernels = None
        if self.kernels is not None:
            return
        many = ROWS_PER_THREAD * torch.get_num_threads() if logits.device.type == "cpu" else len(logits)
        self.many = max(min(many, len(logits)), 1)
        dtype = wide(logits.dtype)
        self.probabilities = logits.new_empty(self.many, logits.shape[1], dtype=dtype)
        self.widened = None if logits.dtype == dtype else torch.empty_like(self.probabilities)

    def turn(self, z: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Fill the losses (c,) of logits z (c, V) and put the gradient in the place of z."""
        if self.kernels is not None:
            self.kernels.cross_entropy(z, labels, self.scale, self.gradients, losses, self.cap)
            return
        for begin in range(0, len(z), self.many):
            few = slice(begin, begin + self.many)
            self._turn(z[few], labels[few].unsqueeze(1), losses[few].unsqueeze(1))

    def _turn(self, z: Tensor, labels: Tensor, losses: Tensor) -> None:
        logits = z if self.widened is None else self.widened[: len(z)].copy_(z)
        if self.cap is not None:
            logits.mul_(self.scale / self.cap).tanh_().mul_(self.cap)
        elif self.scale != 1.0:
            logits.mul_(self.scale)
        p = torch.softmax(logits, -1, out=self.probabilities[: len(z)])
        at_label = p.gather(1, labels)
        torch.log(at_label, out=losses).neg_()
        vanishing = at_label < SMALLEST[p.dtype]
        if z.device.type != "cpu" or vanishing.any():  # to ask another device is to wait for it
            losses.copy_(torch.where(vanishing, logits.logsumexp(1, keepdim=True) - logits.gather(1, labels), losses))
        if not self.gradients:
            return
        p.scatter_(1, labels, at_label - 1)
        if self.cap is not None:  # the derivative of cap·tanh(t/cap), from its value
            p.mul_(logits.square_().mul_(-1 / self.cap**2).add_(1))
        z.copy_(p)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the losses as a function of h (N, d) and W (V, d); saves its own gradient for h, of the trained rows."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, trained: Trained) -> Tensor:
        with as_written(h):
            loss, dh, dW = trained.run(Needs(*ctx.needs_input_grad[:2]))
        ctx.save_for_backward(dh, dW, trained.rows)
        ctx.scale, ctx.rows_of_h, ctx.dtype_of_W = trained.head.scale, len(h), W.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dh, dW, rows = ctx.saved_tensors
        factor = grad * ctx.scale
        if dh is not None:
            dh = dh * factor
            if rows is not None:
                dh = dh.new_zeros(ctx.rows_of_h, dh.shape[1]).index_copy_(0, rows, dh)
        return dh, None if dW is None else (dW * factor).to(ctx.dtype_of_W), None


def _check(h: Tensor, head: Head, labels: Tensor, ignore_index: int, chunk: int | None) -> None:
    W, bias = head.W, head.bias
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels: integers are needed, one for each row of h; got {labels.dtype}.")
    if labels.shape != h.shape[:-1] or h.dim() < 2:
        raise ValueError(f"labels: one for each row of h is needed, {tuple(h.shape[:-1])}; got {tuple(labels.shape)}.")
    if W.dim() != 2 or W.shape[1] != h.shape[-1] or (bias is not None and bias.shape != W.shape[:1]):
        raise ValueError(f"head: W (V, {h.shape[-1]}) and a bias (V,) fit h; W is {tuple(W.shape)}.")
    if W.dtype != h.dtype or (bias is not None and bias.dtype != h.dtype):
        raise ValueError(f"head: W is {W.dtype} and h {h.dtype}; cast h to the dtype of the weights.")
    if bias is not None and bias.requires_grad:
        raise ValueError("head: no gradient is made for its bias; freeze it or use `reference`.")
    if head.softcap is not None and not head.softcap > 0:
        raise ValueError(f"head: softcap bounds the logits and is to be above 0, not {head.softcap}; None is no cap.")
    if 0 <= ignore_index < len(W):
        raise ValueError(f"ignore_index: {ignore_index} is also a label; take one outside 0..{len(W) - 1}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk: {chunk} rows at a time cannot be; leave it None or give 1 or more.")
