"""The recipes of T5's sublayers: x + dropout(inner(norm(x))), the inner one a feed-forward block or self-attention.

The attention has frozen numbers for the distance of two tokens in its scores, which the first layer makes for all
(Raffel et al. 2019, arXiv:1910.10683, section 2.1). Attention to another sequence is the model's own.
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
from lorakit.speed.linear import Acting, acting_in, forwards_of
from lorakit.speed.probe import Call
from lorakit.speed.submodules import (
    asks_for_weights,
    by_name,
    is_usual,
    norm_of,
    says_nothing_else,
    share_of,
    unknown_words,
)

NORM, DROPOUT = "layer_norm", "dropout"
FED, ATTENDED = "DenseReluDense", "SelfAttention"
PROJECTIONS = ("q", "k", "v", "o")
DISTANCES = "relative_attention_bias"

WORDS = frozenset(
    {"config", "d_model", "key_value_proj_dim", "n_heads", "inner_dim", "scaling", "layer_idx", "dropout"}
    | {"is_decoder", "is_causal", "gradient_checkpointing", "has_relative_attention_bias"}
    | {"relative_attention_num_buckets", "relative_attention_max_distance"}
)
"""Attributes of such an attention that this recipe reads, or that a probe shows."""

NEEDED = {"key_value_proj_dim", "n_heads", "scaling", "is_causal", "dropout"}

READ = frozenset({"attention_mask", "position_bias", "position_ids", "num_items_in_batch"})
"""Arguments of a call that are read or change nothing here; another one sends the call back, whatever its value."""


def fits(module: nn.Module) -> str | None:
    """Why a module is no sublayer that is known, or None where it is one."""
    inner = _inner(module)
    if inner is None:
        return "not the children of a sublayer that is known"
    if norm_of(module._modules[NORM]) is None:
        return "its norm is none that is known"
    said = unknown_words(module, (), (NORM, DROPOUT, FED, ATTENDED))
    return said or (feed_forward.fits(inner) if FED in module._modules else _why_not(inner))


def run(module: nn.Module, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
    """What the sublayer gives of hidden states (B, T, d), or None where its own forward has to run."""
    x, kwargs = hidden_states, kwargs | by_name(module, args)
    inner, norm, p = _inner(module), norm_of(module._modules[NORM]), share_of(module._modules[DROPOUT])
    if inner is None or norm is None or p is None or not isinstance(x, Tensor) or not is_usual(x) or is_watched(inner):
        return None
    if FED in module._modules:
        return None if kwargs else feed_forward.feed_forward(inner, x, norm, residual=True, dropout=p)
    if x.ndim != 3 or not says_nothing_else(kwargs, READ):
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
    """Pair what the fast forward adds to the residual with what the inner module adds to it, (B, T, d)."""
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
    """The operands of the attention as they act in one call."""

    block: SelfAttention
    pattern: Pattern
    bias: Tensor
    acting: Acting


def _ready(module: nn.Module, inner: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> _Ready | None:
    bias = None if asks_for_weights(inner, kwargs) else _distances(inner, x, kwargs.get("position_bias"))
    pattern = None if bias is None else _pattern(inner, x, bias, kwargs.get("attention_mask"))
    acting = acting_in([inner._modules[name] for name in PROJECTIONS], forwards_of(module), x)  # type: ignore[misc]
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
        return "not the children of an attention that is known"
    way = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if way != "sdpa":
        return f"its attention is computed by {way!r}"
    return unknown_words(attention, WORDS, (*PROJECTIONS, DISTANCES))


def _distances(attention: Any, x: Tensor, given: Tensor | None) -> Tensor | None:
    """What the distance of two tokens adds to their score, (1 or B, H, T, T): given, or made; None where not frozen."""
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
