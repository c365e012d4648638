"""Inits that use a decomposition of W: PiSSA, OLoRA, and MiCA.

PiSSA and OLoRA start at the best rank-r approximation and the QR decomposition of W; the base becomes the residual.
MiCA freezes B at the left singular vectors of W with the smallest singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lorakit.core.inits.init import Init, InitContext, InitResult, balanced, zeros
from lorakit.core.linalg import SPARE, sketched_spectrum

FAST = "pissa_niter_"


def _pissa(context: InitContext) -> InitResult:
    """With W = U·S·Vᵀ, set A = √(S_r/s)·V_rᵀ and B = U_r·√(S_r/s); the base becomes W − s·B·A.   [docs/math.md (60)]

    Source:
        Meng et al. 2024, arXiv:2404.02948, eqs. (2) to (4); "pissa_niter_N" uses the fast SVD of Halko et al. 2011.
    """
    W = context.matrices()
    name = str(context.config.init_lora_weights).lower()
    iterations = int(name.removeprefix(FAST)) if name.startswith(FAST) else None
    found = torch.linalg.svd(W, full_matrices=False) if iterations is None else sketched(context, W, iterations)
    return InitResult(*context.in_layout(*balanced(context, *found)))


def sketched(context: InitContext, W: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return about r leading singular directions of W (g, out, n) by a random sketch: U (g, out, k), S (g, k), Vh
    (g, k, n).

    Source:
        Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    width = min(context.r + SPARE, *W.shape[1:])
    probe = torch.empty(W.shape[0], W.shape[2], width, dtype=W.dtype, device=W.device)
    found = sketched_spectrum(W, probe.normal_(generator=context.generator), iterations)
    return found.U, found.S, found.Vh


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
