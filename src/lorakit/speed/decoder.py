"""The recipe of a decoder layer: norm, attention, residual; norm, feed-forward, residual; each half as one function."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from lorakit.core.clones import is_watched
from lorakit.ops.dropout import dropout
from lorakit.ops.norm import Norm, normalised
from lorakit.speed import attention, feed_forward
from lorakit.speed.last_layer import KEYWORD, laid_back, picked, rows_for
from lorakit.speed.patching import is_stand_in
from lorakit.speed.submodules import activation_of, by_name, is_usual, norm_of, share_of, unknown_words


class Half(NamedTuple):
    """Half a decoder layer, by names of children: x + dropout(after(inner(before(x)))).

    Attributes:
        before: The norm of the input, or "".
        inner: Attention or feed-forward; "" for a feed-forward block whose parts are the layer's own children.
        after: The norm of what it gives, or "".
        dropout: What comes before the residual, or "".
        share: The attribute with the share that the layer itself drops there, or "".
    """

    before: str
    inner: str
    after: str = ""
    dropout: str = ""
    share: str = ""

    @property
    def children(self) -> set[str]:
        """All that is a child of the layer."""
        return {self.before, self.after, self.dropout, *([self.inner] if self.inner else LOOSE)} - {""}


LOOSE = ("fc1", "activation_fn", "fc2")
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
    (
        Half("input_layernorm", "attention", dropout="post_attention_dropout"),
        Half("post_attention_layernorm", "mlp", dropout="post_mlp_dropout"),
    ),
    (
        Half("self_attn_layer_norm", "self_attn", share="dropout"),
        Half("final_layer_norm", "", share="dropout"),
    ),
)
"""Layers that are known: their children are these and no others."""

PARALLEL, FIRST = "use_parallel_residual", "do_layer_norm_before"
WORDS = frozenset(
    {"config", "hidden_size", "embed_dim", "layer_idx", "attention_type", "layer_type", "gradient_checkpointing"}
    | {PARALLEL, FIRST, "dropout"}
)


class _Around(NamedTuple):
    """What stands around the inner module of a half."""

    before: Norm | None
    after: Norm | None
    p: float

    @property
    def is_bare(self) -> bool:
        """Whether no norm stands between the inner module and the residual."""
        return self.after is None

    @property
    def inside(self) -> float:
        """The share that is dropped right behind the inner module."""
        return self.p if self.is_bare else 0.0


def fits(module: nn.Module) -> str | None:
    """Why a module is no decoder layer that is known, or None where it is one."""
    halves = _halves(module)
    if halves is None:
        return "not the children of a decoder layer that is known"
    if any(_around(module, half) is None for half in halves):
        return "its norms are none that are known"
    if getattr(module, FIRST, True) is not True:
        return "its norms come behind the residuals"
    if not halves[1].inner and activation_of(module._modules[LOOSE[1]]) is None:
        return f"its activation is {type(module._modules[LOOSE[1]]).__name__}"
    attn = module._modules[halves[0].inner]
    return attention.fits(attn) or unknown_words(module, WORDS, tuple(module._modules))  # type: ignore[arg-type]


def called(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the children of a layer that fits which its fast forward calls as modules."""
    halves = _halves(module)
    inner = "" if halves is None else halves[1].inner
    return (inner,) if inner and feed_forward.fits(module._modules[inner]) is not None else ()  # type: ignore[arg-type]


def run(module: nn.Module, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
    """The layer's output (B, T, d), or None where its own forward has to run."""
    halves = _halves(module)
    if halves is None or not isinstance(hidden_states, Tensor) or not is_usual(hidden_states):
        return None
    kwargs |= by_name(module, args)
    first, second = (_around(module, half) for half in halves)
    attn = module._modules[halves[0].inner]
    if first is None or second is None or attn is None or is_watched(attn, captures=False):
        return None
    rows = rows_for(module, kwargs.get(KEYWORD), hidden_states)
    words: dict[str, Any] = {"residual": first.is_bare, "dropout": first.inside, "wanted": rows}
    x = attention.attention(attn, hidden_states, first.before, kwargs, **words)
    if x is None:
        return None
    x = x if first.is_bare else _joined(picked(hidden_states, rows), x, first)
    parallel = getattr(module, PARALLEL, False)  # the feed-forward block then sees what the attention saw
    given = picked(hidden_states, rows) if parallel else x
    made = _fed(module, halves[1], second, given, residual=second.is_bare and not parallel)
    if made is None:
        x = laid_back(x, rows, hidden_states)
        return _joined(x, _fed_by_modules(module, halves[1], second, hidden_states if parallel else x), second)
    if not second.is_bare:
        made = _joined(x, made, second)
    elif parallel:
        made = x + made
    return laid_back(made, rows, hidden_states)


def _fed(module: nn.Module, half: Half, around: _Around, x: Tensor, *, residual: bool) -> Tensor | None:
    """What the feed-forward half gives of x (…, d) as one function, or None where it cannot."""
    mlp: Any = module._modules[half.inner] if half.inner else module
    fits = not half.inner or is_stand_in(mlp) or feed_forward.fits(mlp) is None  # a stand-in fitted, which takes longer
    if not fits or (half.inner and is_watched(mlp)):
        return None
    return feed_forward.feed_forward(mlp, x, around.before, residual=residual, dropout=around.inside)


def _fed_by_modules(module: nn.Module, half: Half, around: _Around, x: Tensor) -> Tensor:
    """What the layer's own modules give of x (B, T, d), before all that comes after them."""
    made: Any = x if around.before is None else normalised(x, around.before)
    for name in (half.inner,) if half.inner else LOOSE:
        made = module._modules[name](made)  # type: ignore[misc]
    return made


def _joined(x: Tensor, y: Tensor, around: _Around) -> Tensor:
    """What an inner module gave, with all that comes after it."""
    return x + dropout(y if around.after is None else normalised(y, around.after), around.p)


def _halves(module: nn.Module) -> tuple[Half, Half] | None:
    held = {name for name, child in module._modules.items() if child is not None}
    return next((halves for halves in LAYERS if held == halves[0].children | halves[1].children), None)


def _around(module: nn.Module, half: Half) -> _Around | None:
    """The norms and the dropout of a half as they are now, or None where one of them is none that is known."""
    norms = [norm_of(module._modules[name]) if name else None for name in (half.before, half.after)]
    p = share_of(module._modules[half.dropout]) if half.dropout else 0.0
    if half.share and module.training:
        p = getattr(module, half.share)
    if p is None or any(made is None for made, name in zip(norms, (half.before, half.after), strict=True) if name):
        return None
    return _Around(norms[0], norms[1], p)
