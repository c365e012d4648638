"""The preconditioned optimizer of arXiv:2402.02347, as far as it is here: a name that says that it is not built."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from lorakit.errors import NotYetSupported


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> NoReturn:
    """Say that this optimizer is not built.

    Args:
        model: Not looked at.
        optimizer_cls: Not looked at.
        lr: Not looked at.
        reg: Not looked at.
        kwargs: Not looked at.

    Raises:
        NotYetSupported: Always; the message names what there is.
    """
    raise NotYetSupported(
        "create_riemannian_optimizer: the Riemannian optimizer is not built yet. create_loraplus_optimizer and "
        "create_lorafa_optimizer are."
    )
