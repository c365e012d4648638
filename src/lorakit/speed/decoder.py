"""The recipe of a decoder layer: norm, attention, residual; norm, feed-forward, residual; each half as one function."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lorakit.core.layering.watched import is_watched
from lorakit.ops.dropout import dropout
from lorakit.ops.norm import Norm, normalised
from lorakit.speed import attention, feed_forward
from lorakit.speed.last_layer import KEYWORD, laid_back, picked, rows_for
from lorakit.speed.parts import by_name, is_usual, norm_of, share_of, unknown_words


class Half(NamedTuple):
    """Half a decoder layer, by names of children: x + dropout(after(inner(before(x)))).

    Attributes:
        before: The norm of the input, or "".
        inner: Attention or feed-forward.
        after: The norm of what it gives, or "".
        dropout: What comes before the residual, or "".
    """

    before: str
    inner: str
    after: str = ""
    dropout: str = ""


LAYERS: tuple[tuple[Half, Half], ...] = (
    (Half("input_layernorm", "self_attn"), Half("post_attention_layernorm", "mlp")),
    (Half("ln_1", "attn"), Half("ln_2", "mlp")),
    (
        Half("input_layernorm", "self_attn", "post_attention_layernorm"),
        Half("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
    (Half("", "self_attn", "post_attention_layernorm"), Half("", "mlp", "post_feedforward_layernorm")),
    (
        Half("input_layernorm", "self_attn", dropout="resid_attn_dropout"),
        Half("post_attention_layernorm", "mlp", dropout="resid_mlp_dropout"),
    ),
)
"""Layers that are known: their children are these and no others."""

WORDS = frozenset({"config", "hidden_size", "layer_idx", "attention_type", "layer_type", "gradient_checkpointing"})


class _Around(NamedTuple):
    """What stands around the inner module of a half."""

    before: Norm | None
    after: Norm | None
    p: float

    @property
    def is_bare(self) -> bool:
        """Whether nothing stands between the inner module and the residual."""
        return self.after is None and self.p == 0


def fits(module: nn.Module) -> str | None:
    """Why a module is no decoder layer that is known, or None where it is one."""
    halves = _halves(module)
    if halves is None:
        return "not the children of a decoder layer that is known"
    if any(_around(module, half) is None for half in halves):
        return "its norms are none that are known"
    attn = module._modules[halves[0].inner]
    return attention.fits(attn) or unknown_words(module, WORDS, tuple(module._modules))  # type: ignore[arg-type]


def run(module: nn.Module, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
    """The layer's output (B, T, d), or None where its own forward has to run."""
    halves = _halves(module)
    if halves is None or not isinstance(hidden_states, Tensor) or not is_usual(hidden_states):
        return None
    kwargs |= by_name(module, args)
    first, second = (_around(module, half) for half in halves)
    attn, mlp = (module._modules[half.inner] for half in halves)
    if first is None or second is None or attn is None or mlp is None or is_watched(attn):
        return None
    rows = rows_for(module, kwargs.get(KEYWORD), hidden_states)
    y = attention.attention(attn, hidden_states, first.before, kwargs, residual=first.is_bare, wanted=rows)
    if y is None:
        return None
    x = y if first.is_bare else _joined(picked(hidden_states, rows), y, first, added=False)
    made = None
    if feed_forward.fits(mlp) is None and not is_watched(mlp):
        made = feed_forward.feed_forward(mlp, x, second.before, residual=second.is_bare)
    if made is None:
        x = laid_back(x, rows, hidden_states)
        return _joined(x, mlp(x if second.before is None else normalised(x, second.before)), second, added=False)
    return laid_back(_joined(x, made, second, added=second.is_bare), rows, hidden_states)


def _joined(x: Tensor, y: Tensor, around: _Around, *, added: bool) -> Tensor:
    """What an inner module gave, with all that comes after it; as it is where that was added already."""
    if added:
        return y
    return x + dropout(y if around.after is None else normalised(y, around.after), around.p)


def _halves(module: nn.Module) -> tuple[Half, Half] | None:
    held = {name for name, child in module._modules.items() if child is not None}
    return next((halves for halves in LAYERS if held == {*halves[0], *halves[1]} - {""}), None)


def _around(module: nn.Module, half: Half) -> _Around | None:
    """The norms and the dropout of a half as they are now, or None where one of them is none that is known."""
    norms = [norm_of(module._modules[name]) if name else None for name in (half.before, half.after)]
    p = share_of(module._modules[half.dropout]) if half.dropout else 0.0
    if p is None or any(made is None for made, name in zip(norms, (half.before, half.after), strict=True) if name):
        return None
    return _Around(norms[0], norms[1], p)
