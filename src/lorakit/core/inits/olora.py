"""OLoRA: the adapter begins as a part of the QR decomposition of W, and what is left becomes the base."""

from __future__ import annotations

import torch

from lorakit.core.inits.init import MATRICES, Blank, Filled, Init


def _olora(blank: Blank) -> Filled:
    """W = Q·R: B is the first r columns of Q, A the first r rows of R, the base W − s·B·A.   [docs/math.md (61)]

    Source:
        Büyükakyüz 2024, arXiv:2406.01775, algorithm 1.
    """
    W = blank.matrices()
    blank.check_rank(min(W.shape[1:]))
    Q, R = torch.linalg.qr(W)
    return Filled(*blank.laid(R[:, : blank.r], Q[..., : blank.r]))


OLORA = Init(
    name="olora",
    kinds=MATRICES,
    changes_base=True,
    is_identity=True,
    needs="",
    fill=_olora,
    is_exact=False,
    requantises=True,
)
