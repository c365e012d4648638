"""Fused decoder layers: one function for norm, attention and residual, and one for norm, feed-forward and residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorakit.architectures.families import BLOCKS
from lorakit.architectures.layouts import Block, Sublayer
from lorakit.ops.dropout import dropout
from lorakit.ops.norm import Norm, normalize
from lorakit.speed import attention, feed_forward
from lorakit.speed.admission import Bound
from lorakit.speed.attention import BoundAttention
from lorakit.speed.feed_forward import BoundFeedForward
from lorakit.speed.last_layer import KEYWORD, rows_to_compute, scatter_rows, select_rows
from lorakit.speed.norm import BoundNorm, bound_norms, dropout_p, operands_of
from lorakit.speed.patching import Options, children_of, is_watched, modules_at
from lorakit.speed.submodules import knows_all, unknown_attributes

LAYERS: tuple[Block, ...] = tuple(block for block in BLOCKS if not (block.is_split or block.is_post_norm))
"""Supported layouts. The children of a layer must be exactly those named in one of them."""

PARALLEL, FIRST = "use_parallel_residual", "do_layer_norm_before"
ATTRIBUTES = frozenset(
    {"config", "hidden_size", "embed_dim", "layer_idx", "attention_type", "layer_type", "gradient_checkpointing"}
    | {PARALLEL, FIRST, "dropout"}
)


class Around(NamedTuple):
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
    """One sublayer of a decoder layer: the names of its children, and the norms before and after the inner module."""

    layout: Sublayer
    norms: tuple[BoundNorm | None, ...]

    def around(self, layer: nn.Module, *, frozen: bool = True) -> Around | None:
        """Return the current norms and dropout, or None if any of them cannot be fused now; `frozen` as for a norm."""
        norms = operands_of(self.norms, frozen=frozen)
        p = dropout_p(layer._modules.get(self.layout.dropout))
        if self.layout.dropout_p and layer.training:
            p = getattr(layer, self.layout.dropout_p)
        return None if norms is None or p is None else Around(norms[0], norms[1], p)


@dataclass(frozen=True)
class BoundLayer(Bound):
    """A fused decoder layer, bound to one module, with its attention and feed-forward sublayers. `block` is None if the
    layer calls its feed-forward modules; `is_parallel` says that both sublayers read its input.
    """

    layout: Block
    sublayers: tuple[BoundSublayer, BoundSublayer]
    attention: BoundAttention
    block: BoundFeedForward | None
    is_parallel: bool

    @property
    def called(self) -> tuple[str, ...]:
        """Return the names of the children that are called as modules."""
        return (self.layout.feed_forward.inner,) if self.block is None else ()

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
        prepared = attention.prepare(self.attention, x, first.before, options, first.inside)
        if prepared is None:
            return None
        # without a norm after attention, the function for attention adds the residual
        attended = prepared.run(x, residual=first.after is None, wanted=rows)
        if first.after is not None:
            attended = _with_residual(select_rows(x, rows), attended, first)
        read = select_rows(x, rows) if self.is_parallel else attended
        fed = _fed(self, second, read, residual=second.after is None and not self.is_parallel)
        if fed is None:
            attended = scatter_rows(attended, rows, x)
            fed = self._fed_by_modules(second, x if self.is_parallel else attended)
            return _with_residual(attended, fed, second)
        if second.after is not None:
            fed = _with_residual(attended, fed, second)
        elif self.is_parallel:
            fed = attended + fed
        return scatter_rows(fed, rows, x)

    def _fed_by_modules(self, around: Around, x: Tensor) -> Tensor:
        """Return the output of the layer's own feed-forward modules for x (B, T, d), without dropout and residual."""
        output: Any = x if around.before is None else normalize(x, around.before)
        for child in modules_at(self.module, self.layout.called):
            output = child(output)
        fed: Tensor = output[0] if isinstance(output, tuple) else output  # experts may return the router's scores, too
        return fed


def match(module: nn.Module) -> BoundLayer | str:
    """Return the fused `forward` of a decoder layer, or why the module is not a supported decoder layer."""
    children = children_of(module)
    layout = next((one for one in LAYERS if children.keys() == one.children), None)
    if layout is None:
        return "unknown children for a decoder layer"
    pair = (layout.attention, layout.feed_forward)
    norms = [bound_norms(module, sublayer.before, sublayer.after) for sublayer in pair]
    if norms[0] is None or norms[1] is None or any(dropout_p(children.get(one.dropout)) is None for one in pair):
        return "its norms are unknown"
    if getattr(module, FIRST, True) is not True:
        return "its norms come after the residuals"
    inner = layout.feed_forward.inner
    block = feed_forward.match(children[inner]) if inner else feed_forward.match_children(module)
    if isinstance(block, str) and not inner:
        return block
    attended = attention.match(children[layout.attention.inner])
    if isinstance(attended, str):
        return attended
    sublayers = BoundSublayer(pair[0], tuple(norms[0])), BoundSublayer(pair[1], tuple(norms[1]))
    fused_block = None if isinstance(block, str) else block
    bound = BoundLayer(module, layout, sublayers, attended, fused_block, bool(getattr(module, PARALLEL, False)))
    return unknown_attributes(module, ATTRIBUTES, tuple(module._modules)) or bound


def _fed(layer: BoundLayer, around: Around, x: Tensor, *, residual: bool) -> Tensor | None:
    """Compute the feed-forward sublayer for x (…, d) with one function, or return None if that is not possible."""
    block = layer.block
    if block is None or (layer.layout.feed_forward.inner and is_watched(block.module)):
        return None
    prepared = feed_forward.prepare(block, x, around.before, around.inside)
    return None if prepared is None else prepared.run(x, residual=residual)


def _with_residual(x: Tensor, y: Tensor, around: Around) -> Tensor:
    """Apply the norm and dropout to the inner module's output y, add x, and return the output of the sublayer."""
    return x + dropout(y if around.after is None else normalize(y, around.after), around.p)
