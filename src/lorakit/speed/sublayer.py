"""Fused T5 sublayers: x + dropout(inner(norm(x))), where `inner` is a feed-forward block or self-attention.

A frozen relative position bias, which the first layer computes for all layers, is added to the attention scores (Raffel
et al. 2019, arXiv:1910.10683, section 2.1). Cross-attention runs the model's own `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.architectures.families import BLOCKS
from lorakit.architectures.layouts import AttentionLayout, Sublayer
from lorakit.ops.norm import Norm
from lorakit.speed import attention, feed_forward
from lorakit.speed.admission import Bound
from lorakit.speed.attention import BoundAttention, PreparedAttention
from lorakit.speed.feed_forward import BoundFeedForward, PreparedFeedForward
from lorakit.speed.norm import BoundNorm, bound_norm, dropout_p
from lorakit.speed.patching import Options, children_of, is_watched, modules_at
from lorakit.speed.probe import Calls, Pairs
from lorakit.speed.submodules import knows_all, unknown_attributes, unknown_implementation

SUBLAYERS: tuple[tuple[Sublayer, AttentionLayout | None], ...] = tuple(
    dict.fromkeys(
        pair
        for block in BLOCKS
        if block.is_split
        for pair in ((block.attention, block.attention_modules), (block.feed_forward, None))
    )
)
"""Supported layouts of sublayers; for attention, with the names of the modules in the attention module."""

DISTANCES, COMPUTE, BIAS = "relative_attention_bias", "compute_bias", "position_bias"

HEAD_DIM = "key_value_proj_dim"
ATTRIBUTES = frozenset(
    {"config", "d_model", HEAD_DIM, "n_heads", "inner_dim", "scaling", "layer_idx", "dropout"}
    | {"is_decoder", "is_causal", "gradient_checkpointing", "has_relative_attention_bias"}
    | {"relative_attention_num_buckets", "relative_attention_max_distance"}
)
"""Known attributes of T5 attention modules. Each is read in this package, or a probe shows its effect."""

READ = frozenset({"attention_mask", "position_ids", "num_items_in_batch", BIAS})
"""Supported call arguments, which are read or have no effect; with others, the module's own `forward` runs."""


@dataclass(frozen=True)
class BoundSublayer(Bound):
    """A fused T5 sublayer, bound to one module, with its inner module, fused too, and the norm before it."""

    layout: Sublayer
    inner: BoundAttention | BoundFeedForward
    norm: BoundNorm

    @property
    def traced(self) -> tuple[str, ...]:
        """Return the paths, relative to the sublayer, of the modules whose calls `branches` needs."""
        inner = self.inner
        return self.layout.at([inner.layout.down if isinstance(inner, BoundFeedForward) else inner.layout.output])

    def accepts(self, options: Options) -> bool:
        """Return whether all arguments of a call, besides the hidden states, are known."""
        return not options if isinstance(self.inner, BoundFeedForward) else knows_all(self.inner.module, options, READ)

    def run(self, x: Tensor, options: Options) -> Tensor | tuple[Tensor, Tensor, None] | None:
        """Return the output for x (B, T, d), or None if the sublayer's own `forward` must run."""
        norm, p = self.norm.operands(), dropout_p(self.module._modules[self.layout.dropout])
        if norm is None or p is None or is_watched(self.inner.module):
            return None
        prepared, bias = self._prepare(x, norm, options, p)
        y = None if prepared is None else prepared.run(x, residual=True)
        return y if y is None or bias is None else (y, bias, None)

    def branches(self, x: Tensor, options: Options, inside: Calls) -> Pairs:
        """Pair the recorded branch (B, T, d) with the branch that the fused `forward` adds to the residual."""
        (recorded,) = (inside[path].output for path in self.traced)
        prepared, _ = self._prepare(x, self.norm.operands(), options, 0.0)
        return [(None if prepared is None else prepared.run(x, residual=False), recorded)]

    def _prepare(
        self, x: Tensor, norm: Norm | None, options: Options, p: float
    ) -> tuple[PreparedAttention | PreparedFeedForward | None, Tensor | None]:
        """Return the operands for hidden states x (B, T, d), and the bias of the scores (1 or B, H, T, T), if any."""
        inner = self.inner
        if isinstance(inner, BoundFeedForward):
            return feed_forward.prepare(inner, x, norm, p), None
        bias = _distances(inner.module, x, options.get(BIAS)) if x.ndim == 3 else None
        prepared = None if bias is None else attention.prepare(inner, x, norm, options | {BIAS: bias}, p)
        return prepared, bias


def match(module: nn.Module) -> BoundSublayer | str:
    """Return the fused `forward` of a T5 sublayer, or why the module is not a supported sublayer."""
    children = children_of(module)
    pair_of_layouts = next((pair for pair in SUBLAYERS if children.keys() == _children(pair[0])), None)
    if pair_of_layouts is None:
        return "unknown children for a sublayer"
    layout, projections = pair_of_layouts
    inner, norm = children[layout.inner], bound_norm(children[layout.before])
    if norm is None:
        return "its norm is unknown"
    if reason := unknown_attributes(module, (), tuple(children)):
        return reason
    if projections is None:
        block = feed_forward.match(inner)
        return block if isinstance(block, str) else BoundSublayer(module, layout, block, norm)
    bound = attention.bind(inner, projections, (HEAD_DIM,))
    if len(modules_at(inner, projections.linears)) < len(projections.linears) or bound is None:
        return "unknown children for an attention module"
    known = (*projections.linears, DISTANCES)
    reason = unknown_implementation(inner) or unknown_attributes(inner, ATTRIBUTES, known)
    return reason or BoundSublayer(module, layout, bound, norm)


def _children(layout: Sublayer) -> set[str]:
    return {layout.before, layout.inner, layout.dropout}


def _distances(attention: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor | None:
    """Return the relative position bias (1 or B, H, T, T), given or newly computed; None if it is missing or trained.
    The parameters decide, because the first pass of a reentrant checkpoint runs without gradients.
    """
    tokens = x.shape[1]
    if bias is None:
        table = attention._modules.get(DISTANCES)
        if table is None or any(parameter.requires_grad for parameter in table.parameters()):
            return None
        bias = getattr(attention, COMPUTE)(tokens, tokens, device=x.device).contiguous()
    wanted = (attention.n_heads, tokens, tokens)
    return bias if tuple(bias.shape[1:]) == wanted and not bias.requires_grad else None
