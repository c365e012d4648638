"""The recipe of a decoder layer: norm, attention, residual; norm, feed-forward, residual; each half as one function."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lorakit.core.layering.operands import is_watched
from lorakit.speed import attention, feed_forward
from lorakit.speed.parts import by_name, is_usual, norm_of, unknown_words

CHILDREN = (
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    ("ln_1", "attn", "ln_2", "mlp"),
)
WORDS = frozenset({"config", "hidden_size", "layer_idx", "attention_type", "layer_type", "gradient_checkpointing"})


def fits(module: nn.Module) -> str | None:
    """Why a module is no decoder layer that is known, or None where it is one."""
    names = _names(module)
    if names is None:
        return "not the children of a decoder layer that is known"
    before, attn, after, _ = (module._modules[name] for name in names)
    if norm_of(before) is None or norm_of(after) is None:
        return "its norms are none that are known"
    return attention.fits(attn) or unknown_words(module, WORDS, names)  # type: ignore[arg-type]


def run(module: nn.Module, hidden_states: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
    """The layer's output (B, T, d), or None where its own forward has to run."""
    names = _names(module)
    if names is None or not isinstance(hidden_states, Tensor) or not is_usual(hidden_states):
        return None
    kwargs |= by_name(module, args)
    before, attn, after, mlp = (module._modules[name] for name in names)
    first, second = norm_of(before), norm_of(after)
    if first is None or second is None or attn is None or mlp is None or is_watched(attn):
        return None
    x = attention.attention(attn, hidden_states, first, kwargs, residual=True)
    if x is None:
        return None
    y = None if feed_forward.fits(mlp) or is_watched(mlp) else feed_forward.feed_forward(mlp, x, second, residual=True)
    return x + mlp(after(x)) if y is None else y  # type: ignore[misc]


def _names(module: nn.Module) -> tuple[str, ...] | None:
    return next((names for names in CHILDREN if all(module._modules.get(name) is not None for name in names)), None)
