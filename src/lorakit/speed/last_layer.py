"""The last decoder layer where few tokens are trained: behind its attention, the trained rows alone go through it.

Which rows these are goes with the call, as a keyword that the model hands on to its layers; so it is the same where a
checkpointed layer runs again, and no other call and no other thread sees it. What comes out for the other rows is
meaningless, so this is for forwards of which the loss alone reads the result. A probe shows which models allow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.core.clones import is_watched
from lorakit.speed.patching import may_run
from lorakit.speed.probe import TOLERANCES

KEYWORD = "trained_rows"
"""Name of the keyword."""

SHARE = 0.9
"""Share of trained tokens from which on all rows go through: choosing them has its price too."""

ASKED_FOR = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Words of a call, or of a config, that show what the layers gave."""


class Trained(NamedTuple):
    """What the keyword says.

    Attributes:
        layer: The layer that it is for.
        rows: Which of its tokens are trained, laid flat: sorted, (n,).
        tokens: How many there are in all.
    """

    layer: nn.Module
    rows: Tensor
    tokens: int


@dataclass(frozen=True)
class LastLayer:
    """The last layer of a model whose head reads nothing else.

    Attributes:
        layer: What stands in its place.
        model: The model.
        path: Its path in the model.
        readers: Modules that hold it, and those between it and the head: somebody's hook there would see its output.
    """

    layer: nn.Module
    model: nn.Module
    path: str
    readers: tuple[nn.Module, ...]

    def words(self, targets: Tensor, ignored: int, call: Mapping[str, Any]) -> dict[str, Trained]:
        """What a call of the model gets besides its own arguments: the keyword, or nothing.   [docs/math.md (84)]

        Args:
            targets: Labels that stand where they are predicted, of any shape (…).
            ignored: The label that is not trained.
            call: The call's arguments by name.
        """
        config, kept = getattr(self.model, "config", None), call.get("logits_to_keep")
        if (
            any(call.get(word, getattr(config, word, False)) for word in ASKED_FOR)
            or not (kept is None or (isinstance(kept, int) and kept == 0))
            or any(is_watched(one, captures=False) for one in self.readers)
            or self._is_compiled()
            or not may_run(self.layer)
        ):
            return {}
        flat = targets.reshape(-1)
        rows = (flat != ignored).nonzero().squeeze(1)
        return {KEYWORD: Trained(self.layer, rows, len(flat))} if 0 < len(rows) < SHARE * len(flat) else {}

    def _is_compiled(self) -> bool:
        """Whether a compiler runs the layer or what holds it: it would make a graph for every number of rows."""
        module: Any = self.model
        for name in self.path.split("."):
            module = getattr(module, name)
            if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
                return True
        return False


def rows_for(layer: nn.Module, said: Any, x: Tensor) -> Tensor | None:
    """Which rows alone go through a layer behind its attention, (n,), or None for all.

    Args:
        layer: The layer.
        said: What the keyword said, or None.
        x: What the layer got, (B, T, d).
    """
    if not isinstance(said, Trained) or said.layer is not layer or x.ndim != 3 or said.tokens != x.shape[:2].numel():
        return None
    if any(is_watched(part, captures=False) for part in layer.modules()):  # who looks inside shall see all rows
        return None
    return said.rows.to(x.device)


def picked(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows (n, d) of x (B, T, d); x itself for None."""
    return x if rows is None else x.flatten(0, 1).index_select(0, rows)


def laid_back(y: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Rows y (n, d) at their places in the shape of `like` (B, T, d), zeros elsewhere; y itself for None."""
    if rows is None:
        return y
    return y.new_zeros(like.shape[:2].numel(), y.shape[-1]).index_copy(0, rows, y).view(like.shape)


def some(ids: Tensor, ignored: int) -> Tensor:
    """Labels for a probe, as ids (rows, tokens): of every three tokens laid flat, one is trained."""
    places = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    return ids.masked_fill(places % 3 != 1, ignored)


def agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether ours (B, T, d), which a probe gave, is what the model gives, theirs (B, T, d), within roundings."""
    if ours.shape != theirs.shape or not bool(ours.isfinite().all()):
        return False
    error = torch.linalg.vector_norm(ours.double() - theirs.double())
    wanted = torch.linalg.vector_norm(theirs.double()).clamp_min(1e-30)
    return float(error / wanted) <= TOLERANCES.get(theirs.dtype, 0.0)
