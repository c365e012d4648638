"""Fused decoder layers: one function for norm, attention and residual, and one for norm, feed-forward and residual."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from lorakit.ops.dropout import dropout
from lorakit.ops.norm import Norm, normalize
from lorakit.speed import attention, feed_forward
from lorakit.speed.last_layer import KEYWORD, rows_to_compute, scatter_rows, select_rows
from lorakit.speed.norm import dropout_p, norms_at
from lorakit.speed.patching import children_of, is_replacement, is_watched, modules_at
from lorakit.speed.submodules import Options, unknown_activation, unknown_attributes


class Sublayer(NamedTuple):
    """Names of the children that form one sublayer of a decoder layer: x + dropout(after(inner(before(x)))).

    Attributes:
        before: Norm that is applied to the input, or "".
        inner: Attention module or feed-forward block; "" if the modules of a feed-forward block are children of the
            layer.
        after: Norm that is applied to the output of `inner`, or "".
        dropout: Dropout module before the residual, or "".
        share: Attribute that contains the dropout probability if the layer calls a dropout function before the
            residual, or "".
    """

    before: str
    inner: str
    after: str = ""
    dropout: str = ""
    share: str = ""

    @property
    def children(self) -> set[str]:
        """Return the names of all the layer's children that belong to the sublayer."""
        return {self.before, self.after, self.dropout, *([self.inner] if self.inner else LOOSE)} - {""}


LOOSE = ("fc1", "activation_fn", "fc2")
LAYERS: tuple[tuple[Sublayer, Sublayer], ...] = (
    (Sublayer("input_layernorm", "self_attn"), Sublayer("post_attention_layernorm", "mlp")),
    (Sublayer("ln_1", "attn"), Sublayer("ln_2", "mlp")),
    (
        Sublayer("input_layernorm", "self_attn", "post_attention_layernorm"),
        Sublayer("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
    ),
    (Sublayer("", "self_attn", "post_attention_layernorm"), Sublayer("", "mlp", "post_feedforward_layernorm")),
    (
        Sublayer("input_layernorm", "self_attn", dropout="resid_attn_dropout"),
        Sublayer("post_attention_layernorm", "mlp", dropout="resid_mlp_dropout"),
    ),
    (
        Sublayer("input_layernorm", "attention", dropout="post_attention_dropout"),
        Sublayer("post_attention_layernorm", "mlp", dropout="post_mlp_dropout"),
    ),
    (Sublayer("self_attn_layer_norm", "self_attn", share="dropout"), Sublayer("final_layer_norm", "", share="dropout")),
)
"""Supported structures. The children of a layer must be exactly those named in one of the structures."""

PARALLEL, FIRST = "use_parallel_residual", "do_layer_norm_before"
ATTRIBUTES = frozenset(
    {"config", "hidden_size", "embed_dim", "layer_idx", "attention_type", "layer_type", "gradient_checkpointing"}
    | {PARALLEL, FIRST, "dropout"}
)


class _Around(NamedTuple):
    """Norms and dropout around the inner module of a sublayer."""

    before: Norm | None
    after: Norm | None
    p: float

    @property
    def inside(self) -> float:
        """Return the probability of the dropout that directly follows the inner module."""
        return self.p if self.after is None else 0.0


def fits(module: nn.Module) -> str | None:
    """Return why a module is not a supported decoder layer, or None if it is one."""
    sublayers = _sublayers(module)
    if sublayers is None:
        return "unknown children for a decoder layer"
    if any(_around(module, sublayer) is None for sublayer in sublayers):
        return "its norms are unknown"
    if getattr(module, FIRST, True) is not True:
        return "its norms come after the residuals"
    if not sublayers[1].inner and (reason := unknown_activation(module._modules[LOOSE[1]])):
        return reason
    reason = attention.fits(getattr(module, sublayers[0].inner))
    return reason or unknown_attributes(module, ATTRIBUTES, tuple(module._modules))


def called(module: nn.Module) -> tuple[str, ...]:
    """Return the names of those children of a supported layer that its fused `forward` calls as modules."""
    sublayers = _sublayers(module)
    inner = "" if sublayers is None else sublayers[1].inner
    return (inner,) if inner and feed_forward.fits(getattr(module, inner)) is not None else ()


def run(module: nn.Module, x: Tensor, options: Options) -> Tensor | None:
    """Return the output (B, T, d) for x (B, T, d), or None if the layer's own `forward` must run."""
    sublayers = _sublayers(module)
    if sublayers is None:
        return None
    first, second = (_around(module, sublayer) for sublayer in sublayers)
    attn = module._modules[sublayers[0].inner]
    if first is None or second is None or attn is None or is_watched(attn, captures=False):
        return None
    rows = rows_to_compute(module, options.get(KEYWORD), x)
    is_bare = first.after is None  # without a norm after attention, `attention` adds the residual
    attended = attention.attention(attn, x, first.before, options, residual=is_bare, dropout=first.inside, wanted=rows)
    if attended is None:
        return None
    if not is_bare:
        attended = _with_residual(select_rows(x, rows), attended, first)
    parallel = getattr(module, PARALLEL, False)  # both sublayers read the same input
    given = select_rows(x, rows) if parallel else attended
    made = _fed(module, sublayers[1], second, given, residual=second.after is None and not parallel)
    if made is None:
        attended = scatter_rows(attended, rows, x)
        made = _fed_by_modules(module, sublayers[1], second, x if parallel else attended)
        return _with_residual(attended, made, second)
    if second.after is not None:
        made = _with_residual(attended, made, second)
    elif parallel:
        made = attended + made
    return scatter_rows(made, rows, x)


def _fed(module: nn.Module, sublayer: Sublayer, around: _Around, x: Tensor, *, residual: bool) -> Tensor | None:
    """Compute the feed-forward sublayer for x (…, d) with one function, or return None if that is not possible."""
    mlp = module._modules[sublayer.inner] if sublayer.inner else module
    if mlp is None or (sublayer.inner and is_watched(mlp)):
        return None
    # a replacement has already been checked
    if sublayer.inner and not is_replacement(mlp) and feed_forward.fits(mlp) is not None:
        return None
    return feed_forward.feed_forward(mlp, x, around.before, residual=residual, dropout=around.inside)


def _fed_by_modules(module: nn.Module, sublayer: Sublayer, around: _Around, x: Tensor) -> Tensor:
    """Return the output of the layer's own feed-forward modules for x (B, T, d), before the dropout and residual."""
    made = x if around.before is None else normalize(x, around.before)
    for child in modules_at(module, (sublayer.inner,) if sublayer.inner else LOOSE):
        made = child(made)
    return made


def _with_residual(x: Tensor, y: Tensor, around: _Around) -> Tensor:
    """Apply the norm and dropout to the inner module's output y, add x, and return the output of the sublayer."""
    return x + dropout(y if around.after is None else normalize(y, around.after), around.p)


def _sublayers(module: nn.Module) -> tuple[Sublayer, Sublayer] | None:
    held = children_of(module).keys()
    return next((sublayers for sublayers in LAYERS if held == sublayers[0].children | sublayers[1].children), None)


def _around(module: nn.Module, sublayer: Sublayer) -> _Around | None:
    """Return the current norms and dropout of a sublayer, or None if any of them is unknown."""
    norms = norms_at(module, sublayer.before, sublayer.after)
    p = dropout_p(module._modules.get(sublayer.dropout))
    if sublayer.share and module.training:
        p = getattr(module, sublayer.share)
    return None if norms is None or p is None else _Around(norms[0], norms[1], p)
