"""Inits from a decomposition of the base weight: PiSSA, OLoRA, MiCA and LoftQ.

PiSSA and OLoRA start at the best rank-r approximation and the QR decomposition of W; the base becomes the residual.
MiCA freezes B at the left singular vectors of W with the smallest singular values. LoftQ rounds the base to QLoRA's NF4
grid, or to int8 with one scale per row, and starts as an approximation of the rounding error; the base stays dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorakit.core.inits.init import Init, InitContext, InitResult, balanced, zeros
from lorakit.core.linalg import SPARE, sketched_spectrum
from lorakit.errors import ConfigError

FAST = "pissa_niter_"


def _pissa(context: InitContext) -> InitResult:
    """With W = U·S·Vᵀ, set A = √(S_r/s)·V_rᵀ and B = U_r·√(S_r/s); the base becomes W − s·B·A.   [docs/math.md (60)]

    Source:
        Meng et al. 2024, arXiv:2404.02948, eqs. (2) to (4); "pissa_niter_N" uses the fast SVD of Halko et al. 2011.
    """
    W = context.matrices()
    name = str(context.config.init_lora_weights).lower()
    iterations = int(name.removeprefix(FAST)) if name.startswith(FAST) else None
    decomposition = torch.linalg.svd(W, full_matrices=False) if iterations is None else sketched(context, W, iterations)
    return InitResult(*context.in_layout(*balanced(context, *decomposition)))


def sketched(context: InitContext, W: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return about r leading singular directions of W (g, out, n) by a random sketch: U (g, out, k), S (g, k), Vh
    (g, k, n).

    Source:
        Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    width = min(context.r + SPARE, *W.shape[1:])
    probe = torch.empty(W.shape[0], W.shape[2], width, dtype=W.dtype, device=W.device)
    spectrum = sketched_spectrum(W, probe.normal_(generator=context.generator), iterations)
    return spectrum.U, spectrum.S, spectrum.Vh


PISSA = Init("pissa", _pissa, changes_base=True, is_exact=False, family=r"pissa_niter_\d{1,3}")


def _olora(context: InitContext) -> InitResult:
    """With W = Q·R, set A to the first r rows of R and B to the first r columns of Q.   [docs/math.md (61)]

    The base becomes W − s·B·A.

    Source:
        Büyükakyüz 2024, arXiv:2406.01775, algorithm 1.
    """
    W = context.matrices()
    Q, R = torch.linalg.qr(W)
    return InitResult(*context.in_layout(R[:, : context.r], Q[..., : context.r]))


OLORA = Init("olora", _olora, changes_base=True, is_exact=False, requantizes=True)


def _mica(context: InitContext) -> InitResult:
    """With W = U·S·Vᵀ, set A to zero and B to the last r columns of U.   [docs/math.md (68)]

    Source:
        arXiv:2604.01694 (MiCA), as in PEFT: the adapter updates only the output directions that the base uses least.
    """
    W = context.matrices("MiCA requires `r` <= min(in_features, out_features)")
    U = torch.linalg.svd(W, full_matrices=False).U
    A, B = zeros(context, context.A_shape), U[..., -context.r :]
    return InitResult(A, context.in_layout(A.reshape(W.shape[0], context.r, -1), B)[1])


MICA = Init("mica", _mica, trains=frozenset({"A"}))


BLOCK = 64
"""Number of values that share one scale on the NF4 grid."""

OFFSET = 0.9677083
"""The largest quantile of the grid: the mean of 1 − 1/32 and 1 − 1/30, the outermost quantiles for 16 and 15 levels."""


def normal_float(device: torch.device | None = None) -> Tensor:
    """Return the 16 NF4 levels (16,): ascending normal quantiles scaled to [−1, 1], including 0.   [docs/math.md (66)]

    Source:
        Dettmers et al. 2023, arXiv:2305.14314, eq. (4) and appendix E: 8 levels above zero, 7 below.
    """
    above = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (levels / levels.max()).to(device, torch.float32)


def on_normal_float(W: Tensor) -> Tensor:
    """Round W (…, n) to the NF4 grid; each 64 values, in row-major order, are scaled by their largest magnitude."""
    flat = W.flatten()
    lack = -len(flat) % BLOCK
    blocks = torch.nn.functional.pad(flat, (0, lack)).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    levels = normal_float(W.device).to(W.dtype)
    between = (levels[1:] + levels[:-1]) / 2
    nearest = torch.bucketize(blocks / scales.clamp_min(torch.finfo(W.dtype).tiny), between)
    return (levels[nearest] * scales).flatten()[: len(flat)].view_as(W)


def on_int8(W: Tensor) -> Tensor:
    """Round W (…, n) to int8; each row is scaled by its largest magnitude and rounded to 255 evenly spaced levels."""
    scales = W.abs().amax(-1, keepdim=True)
    return (W * (127 / scales.clamp_min(torch.finfo(W.dtype).tiny))).round() * scales / 127


ROUNDED: Mapping[int, Callable[[Tensor], Tensor]] = {4: on_normal_float, 8: on_int8}
"""Dict from numbers of bits to functions that round a weight to the grid with that many bits."""


def _loftq(context: InitContext) -> InitResult:
    """Repeat Q ← q(W − s·B·A), then s·B·A ← the best rank-r approximation of W − Q.   [docs/math.md (66)]

    The base becomes Q, stored as a dense weight; a quantizer with the same grid can store Q without further loss.

    Source:
        Li et al. 2023, arXiv:2310.08659, algorithm 1.
    """
    bits, steps = _loftq_settings(context)
    W = context.matrices()
    Q = ROUNDED[bits](W)
    A, B = residual_factors(context, W - Q)
    for _ in range(steps - 1):
        Q = ROUNDED[bits](W - context.scale * (B @ A))
        A, B = residual_factors(context, W - Q)
    return InitResult(*context.in_layout(A, B), W=(Q.mT if context.spec.in_first else Q).reshape(context.read().shape))


def residual_factors(context: InitContext, lost: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (g, r, n) and B (g, out, r) such that s·B·A best approximates a quantization error (g, out, n)."""
    return balanced(context, *torch.linalg.svd(lost, full_matrices=False))


def _loftq_settings(context: InitContext) -> tuple[int, int]:
    """Return the number of bits and the number of iterations from `loftq_config`."""
    config = context.config.loftq_config
    settings = config if isinstance(config, dict) else vars(config)
    bits, steps = settings.get("loftq_bits", 4), settings.get("loftq_iter", 1)
    if bits not in ROUNDED:
        text = f"loftq_config: loftq_bits is {bits!r}. Only nf4 and int8 quantization is supported: use 4 or 8."
        raise ConfigError(text, what=bits, field="loftq_config.loftq_bits", allowed=("4", "8"))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError.of("loftq_config.loftq_iter", steps, "an integer >= 1")
    return bits, steps


LOFTQ = Init("loftq", _loftq, changes_base=True, is_identity=False, is_exact=False)
