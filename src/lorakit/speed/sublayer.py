"""Fused T5 sublayers: x + dropout(inner(norm(x))), where `inner` is a feed-forward block or self-attention.

A frozen relative position bias, which the first layer computes for all layers, is added to the attention scores (Raffel
et al. 2019, arXiv:1910.10683, section 2.1). Cross-attention runs the model's own `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor, nn

from lorakit.architectures.families import BLOCKS
from lorakit.architectures.layouts import AttentionLayout, Sublayer
from lorakit.ops.attention_block import SelfAttention, attention_block
from lorakit.ops.attention_pattern import Pattern
from lorakit.speed import feed_forward
from lorakit.speed.attention import under
from lorakit.speed.feed_forward import BoundFeedForward
from lorakit.speed.linear import ActiveOperands, active_operands
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

DISTANCES, COMPUTE = "relative_attention_bias", "compute_bias"

ATTRIBUTES = frozenset(
    {"config", "d_model", "key_value_proj_dim", "n_heads", "inner_dim", "scaling", "layer_idx", "dropout"}
    | {"is_decoder", "is_causal", "gradient_checkpointing", "has_relative_attention_bias"}
    | {"relative_attention_num_buckets", "relative_attention_max_distance"}
)
"""Known attributes of T5 attention modules. Each is read in this module, or a probe shows its effect."""

READ = frozenset({"attention_mask", "position_ids", "num_items_in_batch", "position_bias"})
"""Supported call arguments, which are read or have no effect; with others, the module's own `forward` runs."""

NEEDED = {"key_value_proj_dim", "n_heads", "scaling", "is_causal", "dropout"}


@dataclass(frozen=True)
class BoundSublayer:
    """A fused T5 sublayer, bound to one module, with its inner module and the norm before it. `attention` has the names
    in the attention module, or is None if `block`, for a feed-forward block, is not.
    """

    module: nn.Module
    layout: Sublayer
    inner: nn.Module
    norm: BoundNorm
    attention: AttentionLayout | None
    block: BoundFeedForward | None

    @property
    def traced(self) -> tuple[str, ...]:
        """Return the paths, relative to the sublayer, of the modules whose calls `branches` needs."""
        last = [self.attention.output] if self.attention is not None else []
        return self.layout.at(last if self.block is None else [self.block.layout.down])

    def accepts(self, options: Options) -> bool:
        """Return whether all arguments of a call, besides the hidden states, are known."""
        return not options if self.block is not None else knows_all(self.inner, options, READ)

    def run(self, x: Tensor, options: Options) -> Tensor | tuple[Tensor, Tensor, None] | None:
        """Return the output for x (B, T, d), or None if the sublayer's own `forward` must run."""
        norm, p = self.norm.operands(), dropout_p(self.module._modules[self.layout.dropout])
        if norm is None or p is None or is_watched(self.inner):
            return None
        if self.block is not None:
            return feed_forward.feed_forward(self.block, x, norm, residual=True, dropout=p)
        ready = self._ready(x, options) if x.ndim == 3 else None
        if ready is None:
            return None
        y = attention_block(x, replace(ready.block, norm=norm, dropout=p), ready.pattern, residual=True)
        ready.acting.note(y)
        return y, ready.bias, None

    def branches(self, x: Tensor, options: Options, inside: Calls) -> Pairs:
        """Pair the recorded branch (B, T, d) with the branch that the fused `forward` adds to the residual."""
        (own,) = (inside[path].output for path in self.traced)
        norm, made = self.norm.operands(), None
        if self.block is not None:
            made = feed_forward.feed_forward(self.block, x, norm, residual=False)
        elif (ready := self._ready(x, options)) is not None:
            made = attention_block(x, replace(ready.block, norm=norm), ready.pattern, residual=False)
        return [(made, own)]

    def _ready(self, x: Tensor, options: Options) -> _Ready | None:
        """Return the operands of attention for hidden states x (B, T, d), or None if any operand is unknown."""
        inner = self.inner
        linears = () if self.attention is None else self.attention.linears
        bias = _distances(inner, x, options.get("position_bias"))
        acting = active_operands(modules_at(inner, linears), x)
        settings = vars(inner)
        dropped = settings["dropout"] if inner.training else 0.0
        if bias is None or acting is None or not 0 <= dropped < 1:
            return None
        pattern = Pattern(settings["is_causal"], settings["scaling"], dropout=dropped, bias=bias)
        masked = under(options.get("attention_mask"), x, pattern)
        if masked is None:
            return None
        *inputs, o = acting.operands
        block = SelfAttention(tuple(inputs), o, settings["key_value_proj_dim"], settings["n_heads"])
        return _Ready(block, masked, bias, acting)


def match(module: nn.Module) -> BoundSublayer | str:
    """Return the fused `forward` of a T5 sublayer, or why the module is not a supported sublayer."""
    held = children_of(module)
    found = next((pair for pair in SUBLAYERS if held.keys() == _children(pair[0])), None)
    if found is None:
        return "unknown children for a sublayer"
    layout, attention = found
    inner, norm = held[layout.inner], bound_norm(held[layout.before])
    if norm is None:
        return "its norm is unknown"
    if reason := unknown_attributes(module, (), tuple(held)):
        return reason
    if attention is None:
        block = feed_forward.match(inner)
        return block if isinstance(block, str) else BoundSublayer(module, layout, inner, norm, None, block)
    if len(modules_at(inner, attention.linears)) < len(attention.linears) or not vars(inner).keys() >= NEEDED:
        return "unknown children for an attention module"
    known = (*attention.linears, DISTANCES)
    reason = unknown_implementation(inner) or unknown_attributes(inner, ATTRIBUTES, known)
    return reason or BoundSublayer(module, layout, inner, norm, attention, None)


def _children(layout: Sublayer) -> set[str]:
    return {layout.before, layout.inner, layout.dropout}


class _Ready(NamedTuple):
    """Operands of an attention sublayer for one call."""

    block: SelfAttention
    pattern: Pattern
    bias: Tensor
    acting: ActiveOperands


def _distances(attention: nn.Module, x: Tensor, given: Tensor | None) -> Tensor | None:
    """Return the relative position bias (1 or B, H, T, T), given or newly computed; None if it is missing or trained.
    The parameters decide, because the first pass of a reentrant checkpoint runs without gradients.
    """
    tokens = x.shape[1]
    if given is None:
        table = attention._modules.get(DISTANCES)
        if table is None or any(parameter.requires_grad for parameter in table.parameters()):
            return None
        given = getattr(attention, COMPUTE)(tokens, tokens, device=x.device).contiguous()
    wanted = (attention.n_heads, tokens, tokens)
    return given if tuple(given.shape[1:]) == wanted and not given.requires_grad else None
