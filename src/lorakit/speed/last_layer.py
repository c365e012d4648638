"""Skip unlabeled rows in the last decoder layer: after its attention, only labeled rows are computed.

The indices of the labeled rows are passed to the model as a keyword argument, which the model forwards to its layers. A
checkpointed layer therefore receives the same indices when it is recomputed, and no other call or thread sees the
indices. The output for unlabeled rows is meaningless, so rows are skipped only if nothing but the loss is used. A
probe shows which models support skipping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorakit.speed.patching import has_observers, is_watched, may_run

KEYWORD = "trained_rows"
"""Name of the keyword argument that passes the indices of labeled rows to the layers."""

SHARE = 0.9
"""If at least this fraction of the tokens is labeled, all rows are computed, because selecting rows takes time too."""

ASKED_FOR = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Call arguments and config fields that request outputs of individual layers."""


class Trained(NamedTuple):
    """Value of the keyword argument that passes the labeled rows.

    Attributes:
        layer: The layer for which the rows are intended.
        rows: Sorted flat indices (n,) of the labeled tokens.
        tokens: Total number of tokens in the batch.
    """

    layer: nn.Module
    rows: Tensor
    tokens: int


@dataclass(frozen=True)
class LastLayer:
    """The module in place of the last layer of a model whose head reads only its output, and its path. `holders`
    contain the layer but not the head; `behind` run between the layer and the head.
    """

    layer: nn.Module
    model: nn.Module
    path: str
    holders: tuple[nn.Module, ...]
    behind: tuple[nn.Module, ...]

    def keyword(self, targets: Tensor, ignored: int, call: Mapping[str, Any]) -> dict[str, Trained]:
        """Return a dict with an extra keyword argument for a call to the model, or an empty dict. [docs/math.md (84)]
        `targets` (any shape) are shifted labels; `ignored` marks tokens without loss; `call` has the rest.
        """
        config, kept = getattr(self.model, "config", None), call.get("logits_to_keep")
        if any(call.get(word, getattr(config, word, False)) for word in ASKED_FOR) or self._is_compiled():
            return {}
        if not may_run(self.layer) or not (kept is None or (isinstance(kept, int) and kept == 0)):
            return {}
        if any(map(has_observers, self.holders)) or any(is_watched(one, captures=False) for one in self.behind):
            return {}  # they see the layer's output
        flat = targets.reshape(-1)
        rows = (flat != ignored).nonzero().squeeze(1)
        return {KEYWORD: Trained(self.layer, rows, len(flat))} if 0 < len(rows) < SHARE * len(flat) else {}

    def _is_compiled(self) -> bool:
        """Return whether the layer or a module around it is compiled: each number of rows would need a graph."""
        module = self.model
        for name in self.path.split("."):
            module = getattr(module, name)
            if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
                return True
        return False


def rows_to_compute(layer: nn.Module, value: Trained | None, x: Tensor) -> Tensor | None:
    """Return the indices (n,) of the rows of x (B, T, d) that a layer computes after its attention; None for all."""
    if not isinstance(value, Trained) or value.layer is not layer or x.ndim != 3 or value.tokens != x.shape[:2].numel():
        return None
    if has_observers(layer) or any(is_watched(part, captures=False) for part in layer.modules() if part is not layer):
        return None  # hooks inside must see all rows
    return value.rows.to(x.device)


def select_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return the rows (n, d) of x (B, T, d) with the given indices, or x itself if `rows` is None."""
    return x if rows is None else x.flatten(0, 1).index_select(0, rows)


def scatter_rows(y: Tensor, rows: Tensor | None, like: Tensor) -> Tensor:
    """Scatter the rows y (n, d) into zeros with the shape of `like` (B, T, d), or return y itself if `rows` is None."""
    if rows is None:
        return y
    return y.new_zeros(like.shape[:2].numel(), y.shape[-1]).index_copy(0, rows, y).view(like.shape)
