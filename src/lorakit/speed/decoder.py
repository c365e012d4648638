"""Fused decoder layers: one function for norm, attention and residual, and one for norm, feed-forward and residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from lorakit.ops.dropout import dropout
from lorakit.ops.norm import Norm, normalize
from lorakit.speed import attention, feed_forward
from lorakit.speed.attention import BoundAttention
from lorakit.speed.feed_forward import BoundFeedForward
from lorakit.speed.last_layer import KEYWORD, rows_to_compute, scatter_rows, select_rows
from lorakit.speed.norm import BoundNorm, bound_norms, dropout_p, operands_of
from lorakit.speed.patching import Options, children_of, is_watched, modules_at
from lorakit.speed.submodules import knows_all, unknown_attributes


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
    """Current norms and dropout around the inner module of a sublayer."""

    before: Norm | None
    after: Norm | None
    p: float

    @property
    def inside(self) -> float:
        """Return the probability of the dropout that directly follows the inner module."""
        return self.p if self.after is None else 0.0


@dataclass(frozen=True)
class BoundSublayer:
    """One sublayer of a decoder layer, bound to the layer's children.

    Attributes:
        names: Names of the children.
        norms: Norms before and after the inner module.
    """

    names: Sublayer
    norms: tuple[BoundNorm | None, ...]

    def around(self, layer: nn.Module) -> _Around | None:
        """Return the current norms and dropout, or None if any of them cannot be fused now."""
        norms = operands_of(self.norms)
        p = dropout_p(layer._modules.get(self.names.dropout))
        if self.names.share and layer.training:
            p = getattr(layer, self.names.share)
        return None if norms is None or p is None else _Around(norms[0], norms[1], p)


@dataclass(frozen=True)
class BoundLayer:
    """A fused decoder layer, bound to one module.

    Attributes:
        module: The layer.
        sublayers: The attention sublayer and the feed-forward sublayer.
        attention: The attention module.
        block: The feed-forward block, or None if the layer calls its modules.
        is_parallel: Whether both sublayers read the same input.
    """

    module: nn.Module
    sublayers: tuple[BoundSublayer, BoundSublayer]
    attention: BoundAttention
    block: BoundFeedForward | None
    is_parallel: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Return the names of the children that are called as modules."""
        return (self.sublayers[1].names.inner,) if self.block is None else ()

    def accepts(self, options: Options) -> bool:
        """Return whether all arguments of a call, besides the hidden states, are known."""
        return knows_all(self.attention.module, options, attention.READ)

    def run(self, x: Tensor, options: Options) -> Tensor | None:
        """Return the output (B, T, d) for x (B, T, d), or None if the layer's own `forward` must run."""
        module = self.module
        first, second = (sublayer.around(module) for sublayer in self.sublayers)
        if first is None or second is None or is_watched(self.attention.module, captures=False):
            return None
        rows = rows_to_compute(module, options.get(KEYWORD), x)
        is_bare = first.after is None  # without a norm after attention, `attention` adds the residual
        attended = attention.attention(
            self.attention, x, first.before, options, residual=is_bare, dropout=first.inside, wanted=rows
        )
        if attended is None:
            return None
        if not is_bare:
            attended = _with_residual(select_rows(x, rows), attended, first)
        given = select_rows(x, rows) if self.is_parallel else attended
        made = _fed(self, second, given, residual=second.after is None and not self.is_parallel)
        if made is None:
            attended = scatter_rows(attended, rows, x)
            made = self._fed_by_modules(second, x if self.is_parallel else attended)
            return _with_residual(attended, made, second)
        if second.after is not None:
            made = _with_residual(attended, made, second)
        elif self.is_parallel:
            made = attended + made
        return scatter_rows(made, rows, x)

    def _fed_by_modules(self, around: _Around, x: Tensor) -> Tensor:
        """Return the output of the layer's own feed-forward modules for x (B, T, d), without dropout and residual."""
        made = x if around.before is None else normalize(x, around.before)
        inner = self.sublayers[1].names.inner
        for child in modules_at(self.module, (inner,) if inner else LOOSE):
            made = child(made)
        return made


def match(module: nn.Module) -> BoundLayer | str:
    """Return the fused `forward` of a decoder layer, or why the module is not a supported decoder layer."""
    held = children_of(module)
    names = next((pair for pair in LAYERS if held.keys() == pair[0].children | pair[1].children), None)
    if names is None:
        return "unknown children for a decoder layer"
    norms = [bound_norms(module, sublayer.before, sublayer.after) for sublayer in names]
    if norms[0] is None or norms[1] is None or any(dropout_p(held.get(one.dropout)) is None for one in names):
        return "its norms are unknown"
    if getattr(module, FIRST, True) is not True:
        return "its norms come after the residuals"
    inner = names[1].inner
    block = feed_forward.match(held[inner]) if inner else feed_forward.match_children(module)
    if isinstance(block, str) and not inner:
        return block
    attended = attention.match(held[names[0].inner])
    if isinstance(attended, str):
        return attended
    sublayers = BoundSublayer(names[0], tuple(norms[0])), BoundSublayer(names[1], tuple(norms[1]))
    made = BoundLayer(module, sublayers, attended, None if isinstance(block, str) else block, _is_parallel(module))
    return unknown_attributes(module, ATTRIBUTES, tuple(module._modules)) or made


def _is_parallel(module: nn.Module) -> bool:
    return bool(getattr(module, PARALLEL, False))


def _fed(layer: BoundLayer, around: _Around, x: Tensor, *, residual: bool) -> Tensor | None:
    """Compute the feed-forward sublayer for x (…, d) with one function, or return None if that is not possible."""
    block = layer.block
    if block is None or (layer.sublayers[1].names.inner and is_watched(block.module)):
        return None
    return feed_forward.feed_forward(block, x, around.before, residual=residual, dropout=around.inside)


def _with_residual(x: Tensor, y: Tensor, around: _Around) -> Tensor:
    """Apply the norm and dropout to the inner module's output y, add x, and return the output of the sublayer."""
    return x + dropout(y if around.after is None else normalize(y, around.after), around.p)
