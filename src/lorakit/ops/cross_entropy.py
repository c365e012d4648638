"""Fused output head and cross-entropy: the full logits are never stored, and unlabeled rows are skipped.

The labeled rows are processed in chunks. While a chunk's logits exist, the gradient of the hidden states is computed
too, so the backward pass only scales it. This takes two matmuls with the head weight, and memory for one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.ops import reference
from lorakit.ops.adapted import upcast_dtype
from lorakit.ops.autograd import Context, Replayed, alias, autocast, needs_gradient, with_replay, without_autocast
from lorakit.ops.choices import matmul, slices
from lorakit.ops.kernels import kernels_for

IGNORED = -100
"""Label of rows that are excluded from the loss, as in PyTorch."""

CPU_CHUNK, OTHER_CHUNK = (256, 48 << 20), (4096, 256 << 20)
"""Maximum number of rows per chunk, and maximum size of a chunk's logits in bytes. W is read twice per chunk, which on
a CPU takes longer than the matmuls below about 100 rows and is negligible from 256.
"""
ROWS_PER_THREAD = 4
"""Number of rows that a thread converts to gradients at a time, so that their fp32 copy fits in its cache."""
SMALLEST = {torch.float32: 1e-30, torch.float64: 1e-290}
"""Smallest probability whose logarithm is taken directly; smaller log-probabilities are computed from the logits."""


@dataclass(frozen=True)
class Head:
    """Mapping from hidden states h to logits z = scale·(W·h + bias), or softcap·tanh(z/softcap) if there is a softcap.

    W (V, d), in the dtype of h, and bias (V,) are frozen. `scale` is Cohere's `logit_scale` or 1/`logits_scaling` of
    Granite; `softcap` is Gemma 2's `final_logit_softcapping`.
    """

    W: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def linear_cross_entropy(
    h: Tensor,
    head: Head,
    labels: Tensor,
    *,
    total: float | Tensor | None = None,
    ignore_index: int = IGNORED,
    chunk: int | None = None,
) -> Tensor:
    """Compute the cross-entropy of the labels under the softmax of the head's logits. [docs/math.md (75)]

    Matmuls run in the dtype of h, or in the autocast dtype. Saved are the gradient and the indices of the labeled rows,
    and h, from which a backward pass that is differentiated again computes the logits. The loss is in fp32 or wider.

    Args:
        h: Hidden states (..., d), already shifted: row i predicts labels[i].
        head: Head that computes the logits (..., V).
        labels: Integers (...), each below V or equal to `ignore_index`, on the device of h or on the CPU.
        total: Divisor for the summed loss; None divides by the number of labeled rows (NaN if there are none).
        ignore_index: Label of rows that are excluded from the loss.
        chunk: Maximum number of rows whose logits exist at a time; None chooses one by the vocabulary size.

    Source: Hsu et al. 2024, arXiv:2410.10989, section 3.2, but with W frozen.
    """
    h, trained = _trained(h, head, labels, ignore_index, chunk)
    if needs_gradient(h):
        loss = _LinearCrossEntropy.apply(trained.h, trained)
    else:
        with without_autocast(h):
            loss = trained.run(need_dh=False)[0].sum()
    return loss / (len(trained.labels) if total is None else total)


def label_losses(h: Tensor, head: Head, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
    """Compute the losses (n,) of the n labels other than `ignore_index`, in order, without autograd."""
    h, trained = _trained(h, head, labels, ignore_index, None)
    with torch.no_grad(), without_autocast(h):
        return trained.run(need_dh=False)[0]


def _trained(h: Tensor, head: Head, labels: Tensor, ignore_index: int, chunk: int | None) -> tuple[Tensor, Trained]:
    """Check the arguments of `linear_cross_entropy`; return h in the dtype of the matmuls, and the labeled rows."""
    if torch.is_autocast_enabled(h.device.type):
        bias = None if head.bias is None else autocast(head.bias)
        h, head = autocast(h), replace(head, W=autocast(head.W), bias=bias)
    _check(h, head, labels)
    flat, targets = h.flatten(0, -2), labels.flatten().long().contiguous()  # flattening a view may keep its strides
    rows = (targets != ignore_index).nonzero().squeeze(1)  # labels on the CPU avoid a device synchronization
    count, every = len(rows), len(rows) == len(targets)
    targets = targets if every else targets[rows]
    least, most = torch.stack(targets.aminmax()).tolist() if count else (0, 0)
    if least < 0 or most >= len(head.W):
        raise ValueError(f"labels must be in 0..{len(head.W) - 1} or {ignore_index}; mask all other labels")
    targets, rows = (t.to(h.device, non_blocking=True) for t in (targets, rows))
    return h, Trained(flat, head, targets, None if every else rows, chunk or chunk_rows(head.W))


def chunk_rows(W: Tensor) -> int:
    """Return the number of rows per chunk for W (V, d): a multiple of 16 within the limits for its device."""
    rows, size = CPU_CHUNK if W.device.type == "cpu" else OTHER_CHUNK
    return min(max(size // (len(W) * W.element_size()) // 16 * 16, 16), rows)


class Trained(NamedTuple):
    """The labeled rows, and the maximum number of rows per chunk.
    Shapes: h (N, d), of all rows; labels (n,), of the labeled ones, and rows (n,), their indices, or None if all are.
    """

    h: Tensor
    head: Head
    labels: Tensor
    rows: Tensor | None
    chunk: int

    def run(self, need_dh: bool) -> tuple[Tensor, Tensor | None]:
        """Return the losses (n,), and the gradient of their sum for the labeled rows of h (n, d), without the factor
        `head.scale`.
        """
        h, (W, bias), n = self.h.detach(), (self.head.W.detach(), self.head.bias), len(self.labels)
        losses = h.new_empty(n, dtype=upcast_dtype(h.dtype))
        dh = h.new_empty(n, h.shape[1]) if need_dh else None
        logits = h.new_empty(min(self.chunk, n), len(W))
        softmax = _Softmax(self.head, logits, gradients=need_dh)
        for part in slices(n, self.chunk):
            x = h[part] if self.rows is None else h.index_select(0, self.rows[part])
            z = logits[: len(x)]
            matmul(x, W.t(), z, bias)
            softmax.to_gradient(z, self.labels[part], losses[part])
            if dh is not None:
                matmul(z, W, dh[part])
        return losses, dh


class _Softmax:
    """Computes losses from rows of logits, and replaces the logits with the gradient of the summed loss. A few rows at
    a time, in a buffer that fits in the cache, are upcast, turned into softmax − one-hot, and rounded.
    """

    def __init__(self, head: Head, logits: Tensor, *, gradients: bool) -> None:
        self.scale, self.cap, self.gradients = head.scale, head.softcap, gradients
        kernels = kernels_for(logits)
        self.kernels = kernels if kernels is not None and (head.softcap is None or kernels.caps_logits) else None
        if self.kernels is not None:
            return
        many = ROWS_PER_THREAD * torch.get_num_threads() if logits.device.type == "cpu" else len(logits)
        self.many = max(min(many, len(logits)), 1)
        dtype = upcast_dtype(logits.dtype)
        self.probabilities = logits.new_empty(self.many, logits.shape[1], dtype=dtype)
        self.widened = None if logits.dtype == dtype else torch.empty_like(self.probabilities)

    def to_gradient(self, z: Tensor, labels: Tensor, losses: Tensor) -> None:
        """Write the losses for logits z (c, V) to `losses` (c,), and replace z with its gradient."""
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
        if z.device.type != "cpu" or vanishing.any():  # on an accelerator, checking would force a synchronization
            losses.copy_(torch.where(vanishing, logits.logsumexp(1, keepdim=True) - logits.gather(1, labels), losses))
        if not self.gradients:
            return
        p.scatter_(1, labels, at_label - 1)
        if self.cap is not None:  # the derivative of cap·tanh(t/cap), computed from the value of that function
            p.mul_(logits.square_().mul_(-1 / self.cap**2).add_(1))
        z.copy_(p)


_State = tuple[Head, Tensor]
"""The head, and the labels of the labeled rows."""


def _replay(ctx: Context[_State], saved: Sequence[Tensor]) -> Replayed:
    (head, labels), h, rows = ctx.state, alias(saved[0]), saved[2]
    labeled = h if rows is None else h.index_select(0, rows)
    return (h, None), (reference.cross_entropy(labeled, head, labels, total=1.0),)


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the summed loss from h (N, d); saves h and the gradient of its labeled rows."""

    @staticmethod
    def forward(ctx: Context[_State], h: Tensor, trained: Trained) -> Tensor:
        with without_autocast(h):
            losses, dh = trained.run(need_dh=True)
        ctx.save_for_backward(h, dh, trained.rows)
        ctx.state = trained.head, trained.labels
        return losses.sum()

    @staticmethod
    @with_replay(_replay)
    def backward(ctx: Context[_State], grad: Tensor) -> tuple[Tensor, None]:
        h, dh, rows = ctx.saved_tensors
        dh = dh * (grad * ctx.state[0].scale)
        return dh if rows is None else torch.zeros_like(h).index_copy_(0, rows, dh), None


def _check(h: Tensor, head: Head, labels: Tensor) -> None:
    W, bias = head.W, head.bias
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers; got {labels.dtype}")
    if labels.shape != h.shape[:-1] or h.dim() < 2:
        raise ValueError(f"labels must have shape {tuple(h.shape[:-1])}, one per row of h; got {tuple(labels.shape)}")
    if W.dtype != h.dtype or (bias is not None and bias.dtype != h.dtype):
        raise ValueError(f"head: W is {W.dtype}, but h is {h.dtype}; cast h to the dtype of W")
    if torch.is_grad_enabled() and (W.requires_grad or (bias is not None and bias.requires_grad)):
        raise ValueError("head: W or bias requires a gradient, which is not computed; freeze both")
