"""MiCA: B is frozen at the weakest left singular directions of W, and A alone learns."""

from __future__ import annotations

import torch

from lorakit.core.inits.init import MATRICES, Blank, Filled, Init, zeros


def _mica(blank: Blank) -> Filled:
    """W = U·S·Vᵀ: B is the last r columns of U, A = 0.   [docs/math.md (68)]

    Source:
        arXiv:2604.01694 (MiCA), as PEFT has it: the adapter writes only where the base writes least.
    """
    W = blank.matrices()
    blank.check_rank(min(W.shape[1:]), "MiCA requires `r` <= min(in_features, out_features)")
    U = torch.linalg.svd(W, full_matrices=False).U
    A, B = zeros(blank, blank.A_shape), U[..., -blank.r :]
    return Filled(A, blank.laid(A.reshape(W.shape[0], blank.r, -1), B)[1])


MICA = Init(
    name="mica",
    kinds=MATRICES,
    changes_base=False,
    is_identity=True,
    needs="",
    fill=_mica,
    trains=frozenset({"A"}),
)
