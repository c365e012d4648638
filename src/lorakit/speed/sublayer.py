"""Fused T5 sublayers: x + dropout(inner(norm(x))), with a feed-forward block or self-attention inside.

The attention adds a frozen relative position bias to its scores, which the first layer computes for all (Raffel et al.
2019, arXiv:1910.10683, section 2.1). Cross-attention runs the model's own forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorakit.core.clones import is_watched
from lorakit.ops.attention_block import SelfAttention, attention_block
from lorakit.ops.attention_pattern import Pattern
from lorakit.speed import feed_forward
from lorakit.speed.attention import under
from lorakit.speed.linear import ActiveOperands, active_operands, forwards_of
from lorakit.speed.probe import Call
from lorakit.speed.submodules import (
    by_name,
    dropout_p,
    is_supported,
    knows_all,
    norm_of,
    unknown_attributes,
    wants_weights,
)

NORM, DROPOUT = "layer_norm", "dropout"
FED, ATTENDED = "DenseReluDense", "SelfAttention"
PROJECTIONS = ("q", "k", "v", "o")
DISTANCES = "relative_attention_bias"

ATTRIBUTES = frozenset(
    {"config", "d_model", "key_value_proj_dim", "n_heads", "inner_dim", "scaling", "layer_idx", "dropout"}
    | {"is_decoder", "is_causal", "gradient_checkpointing", "has_relative_attention_bias"}
    | {"relative_attention_num_buckets", "relative_attention_max_distance"}
)
"""Attributes of such an attention that are read here, or whose effect a probe shows."""

NEEDED = {"key_value_proj_dim", "n_heads", "scaling", "is_causal", "dropout"}

READ = frozenset({"attention_mask", "position_bias", "position_ids", "num_items_in_batch"})
"""Call arguments that are read or have no effect here; any other argument makes the module's own forward run."""


def fits(module: nn.Module) -> str | None:
    """Return why a module is not a supported sublayer, or None if it is."""
    inner = _inner(module)
    if inner is None:
        return "unknown children for a sublayer"
    if norm_of(module._modules[NORM]) is None:
        return "unknown norm"
    value = unknown_attributes(module, (), (NORM, DROPOUT, FED, ATTENDED))
    return value or (feed_forward.fits(inner) if FED in module._modules else _why_not(inner))


def run(module: nn.Module, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Return the sublayer's output for hidden states (B, T, d), or None if its own forward must run."""
    x, kwargs = hidden_states, kwargs | by_name(module, args)
    inner, norm, p = _inner(module), norm_of(module._modules[NORM]), dropout_p(module._modules[DROPOUT])
    if (
        inner is None
        or norm is None
        or p is None
        or not isinstance(x, Tensor)
        or not is_supported(x)
        or is_watched(inner)
    ):
        return None
    if FED in module._modules:
        return None if kwargs else feed_forward.feed_forward(inner, x, norm, residual=True, dropout=p)
    if x.ndim != 3 or not knows_all(kwargs, READ):
        return None
    ready = _ready(module, inner, x, kwargs)
    if ready is None:
        return None
    block = replace(ready.block, norm=norm, dropout=p)
    y = attention_block(x, block, ready.pattern, residual=True)
    ready.acting.note(y)
    return y, ready.bias, None


def traced(module: nn.Module) -> tuple[str, ...]:
    """Return the paths below a sublayer of the modules whose calls `branches` needs."""
    return (f"{FED}.wo",) if FED in module._modules else (f"{ATTENDED}.o",)


def branches(module: nn.Module, call: Call, inside: Mapping[str, Call]) -> list[tuple[Tensor | None, Tensor]]:
    """Pair what the fused forward adds to the residual with what the inner module adds to it, (B, T, d)."""
    (own,) = (inside[path].output for path in traced(module))
    x, kwargs, inner = call.hidden, call.kwargs | by_name(module, call.args[1:]), _inner(module)
    if inner is None:
        return [(None, own)]
    norm = norm_of(module._modules[NORM])
    if FED in module._modules:
        return [(feed_forward.feed_forward(inner, x, norm, residual=False), own)]
    ready = _ready(module, inner, x, kwargs)
    if ready is None:
        return [(None, own)]
    return [(attention_block(x, replace(ready.block, norm=norm), ready.pattern, residual=False), own)]


class _Ready(NamedTuple):
    """Current operands of the attention for one call."""

    block: SelfAttention
    pattern: Pattern
    bias: Tensor
    acting: ActiveOperands


def _ready(module: nn.Module, inner: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> _Ready | None:
    bias = None if wants_weights(inner, kwargs) else _distances(inner, x, kwargs.get("position_bias"))
    pattern = None if bias is None else _pattern(inner, x, bias, kwargs.get("attention_mask"))
    acting = active_operands([inner._modules[name] for name in PROJECTIONS], forwards_of(module), x)  # type: ignore[misc]
    if bias is None or pattern is None or acting is None:
        return None
    *inputs, o = acting.operands
    settings: Any = inner
    return _Ready(SelfAttention(tuple(inputs), o, settings.key_value_proj_dim, settings.n_heads), pattern, bias, acting)


def _inner(module: nn.Module) -> nn.Module | None:
    held = {name: child for name, child in module._modules.items() if child is not None}
    return next((held[name] for name in (FED, ATTENDED) if held.keys() == {NORM, DROPOUT, name}), None)


def _why_not(attention: nn.Module) -> str | None:
    if any(attention._modules.get(name) is None for name in PROJECTIONS) or not vars(attention).keys() >= NEEDED:
        return "unknown children for an attention"
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation != "sdpa":
        return f"attention implementation {implementation!r} is not supported"
    return unknown_attributes(attention, ATTRIBUTES, (*PROJECTIONS, DISTANCES))


def _distances(attention: Any, x: Tensor, given: Tensor | None) -> Tensor | None:
    """Return the relative position bias, (1 or B, H, T, T), given or computed; None if it is not frozen."""
    tokens = x.shape[1]
    if given is None:
        if attention._modules.get(DISTANCES) is None:
            return None
        given = attention.compute_bias(tokens, tokens, device=x.device).contiguous()
    wanted = (attention.n_heads, tokens, tokens)
    return given if tuple(given.shape[1:]) == wanted and not given.requires_grad else None


def _pattern(attention: Any, x: Tensor, bias: Tensor, mask: Any) -> Pattern | None:
    dropped = attention.dropout if attention.training else 0.0
    if not 0 <= dropped < 1:
        return None
    return under(mask, x, Pattern(attention.is_causal, attention.scaling, dropout=dropped, bias=bias))
