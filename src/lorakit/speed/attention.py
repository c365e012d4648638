"""What the mask of a call hides beside its pattern: nothing, padding, or more; a mask is read once for all layers.

The recipe of causal self-attention with rotary positions or none: projections, heads and output as one function.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.ops.attention_block import SelfAttention, attention_block
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.norm import Norm
from lorakit.ops.rotary import Rotary
from lorakit.speed.admission import is_version, version_of
from lorakit.speed.last_layer import KEYWORD
from lorakit.speed.linear import acting_in, forwards_of
from lorakit.speed.submodules import (
    asks_for_weights,
    by_name,
    is_usual,
    norm_of,
    says_nothing_else,
    share_of,
    unknown_fields,
    unknown_words,
)

HIDDEN = -1e4
"""Numbers at or below this hide a place: the least of a dtype is added to its score."""

MASK_FIELDS = "_lorakit_read"
"""Where a mask, which all layers of a forward share, keeps what is known of it, with its version then."""


def under(mask: Any, x: Tensor, pattern: Pattern) -> Pattern | None:
    """A pattern with what a mask hides beside it.

    Args:
        mask: (rows or 1, heads or 1, T, T), true or 0 where a token is seen; or None.
        x: Hidden states, (rows, T, d).
        pattern: Who sees whom without it; it may have a bias.

    Returns:
        The pattern, with a bias where that hides more, or None where the mask shows more than the pattern, hides all
        from a token, or is no such mask; and where there is a bias on a device of which no kernel here takes one.
    """
    made = _under(mask, x, pattern)
    return None if made is None or (made.bias is not None and x.device.type != "cpu") else made


def _under(mask: Any, x: Tensor, pattern: Pattern) -> Pattern | None:
    if mask is None:
        return pattern
    rows, tokens, _ = x.shape
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (tokens, tokens) or mask.requires_grad:
        return None
    if mask.shape[0] not in (1, rows):
        return None
    known = _known(mask)
    key = (pattern.causal, pattern.window, x.dtype)
    if key not in known:
        known[key] = _read(mask, pattern, x.dtype)
    padding = known[key]
    if not isinstance(padding, Tensor):
        return pattern if padding else None
    if pattern.bias is None:
        return replace(pattern, bias=padding)
    with_bias = (*key, "with bias")
    of_bias, version, both = known.get(with_bias, (None, 0, padding))
    if of_bias is not pattern.bias or not is_version(pattern.bias, version):
        both = padding + pattern.bias.to(x.dtype)
        known[with_bias] = pattern.bias, version_of(pattern.bias), both
    return replace(pattern, bias=both)


def _known(mask: Tensor) -> dict[Any, Any]:
    """Return what is known of a mask as it is now, to be added to."""
    version, known = mask.__dict__.get(MASK_FIELDS, (None, {}))
    if version is None or not is_version(mask, version):
        known = {}
        mask.__dict__[MASK_FIELDS] = version_of(mask), known
    return known


def _read(mask: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor | bool:
    """What a mask adds to the scores; or whether it says what the pattern says."""
    hidden = ~mask if mask.dtype == torch.bool else mask <= HIDDEN
    if mask.dtype != torch.bool and not bool((hidden | (mask == 0)).all()):
        return False
    places, seen = torch.arange(mask.shape[-1], device=mask.device), ~hidden
    allowed = pattern.allowed(places, places)
    if bool((seen == allowed).all()):
        return True
    if bool((seen & ~allowed).any()) or not bool(seen.any(-1).all()):
        return False
    keys = seen.any(-2, keepdim=True)
    least = keys if bool(((keys & allowed) == seen).all()) else seen  # padding is the same for every token of a row
    return torch.zeros(least.shape, dtype=dtype, device=mask.device).masked_fill_(~least, -torch.inf)


INPUTS = (("q_proj", "k_proj", "v_proj"), ("c_attn",), ("qkv_proj",), ("query_key_value",))
INTERLEAVED = ("query_key_value",)
"""A projection of this name gives q, k and v of one head after the other."""

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")
NORMS = ("q_norm", "k_norm")
DROPOUTS = ("attn_dropout", "resid_dropout")
"""Of the weights, whose share alone is read, and of the output."""

WORDS = frozenset(
    {
        "config",
        "layer_idx",
        "layer_type",
        "head_dim",
        "head_size",
        "rotary_ndims",
        "num_heads",
        "num_key_value_heads",
        "num_key_value_groups",
    }
    | {"num_attention_heads", "hidden_size", "embed_dim", "split_size", "is_causal", "is_cross_attention", "scaling"}
    | {"scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "attention_dropout"}
    | {"dropout", "enable_bias"}  # of OPT
    | {
        "sliding_window",
        "is_sliding",
        "attn_logit_softcapping",
        "use_rope",
        "rotary_fn",
        "rope_theta",
        "max_position_embeddings",
    }
)
"""Attributes of attention modules that this recipe reads, or that a probe shows."""

FIELDS = frozenset({"sliding_window", "num_attention_heads", "num_key_value_heads"})
"""Fields of the config that this recipe reads, too, or that a probe shows."""

READ = frozenset(
    {"attention_mask", "position_embeddings", "hidden_states", "cache", "past_key_values", "use_cache", "position_ids"}
    | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch", "output_router_logits"}
    | {"shift_labels", "ignore_index", KEYWORD}  # of the loss
)
"""Arguments of a call that are read or change nothing here; another one sends the call back, whatever its value."""


@dataclass(frozen=True)
class Shape:
    """What an attention module is, told by its attributes.

    Attributes:
        inputs: Names of its projections of the input: three, or one for all.
        output: Name of its output projection.
        head_dim: Width of a head.
        scale: Factor of the scores.
        window: How far back a token sees, or None.
        softcap: Bound of the scores by tanh, or None.
    """

    inputs: tuple[str, ...]
    output: str
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


def fits(module: nn.Module) -> str | None:
    """Why a module is no attention that is known, or None where it is one."""
    shape = shape_of(module)
    if shape is None:
        return "not the children of an attention that is known"
    if getattr(module, "is_cross_attention", False) or getattr(module, "is_causal", None) is not True:
        return "it is not causal self-attention"
    way = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if way != ("sdpa" if shape.softcap is None else "eager"):
        return f"its attention is computed by {way!r}"
    if getattr(module, "is_sliding", shape.window is not None) is not (shape.window is not None):
        return "it has a window that it does not use"
    if getattr(module.config, "is_causal", True) is not True:
        return "its config makes it bidirectional"
    return unknown_fields(module, FIELDS) or unknown_words(
        module, WORDS, (*shape.inputs, shape.output, *NORMS, *DROPOUTS)
    )


def shape_of(module: nn.Module) -> Shape | None:
    """What an attention module is, or None where it is none that is known."""
    held, words = module._modules, vars(module)
    inputs = next((names for names in INPUTS if all(held.get(name) is not None for name in names)), None)
    output = next((name for name in OUTPUTS if held.get(name) is not None), None)
    head_dim, scale = words.get("head_dim", words.get("head_size")), words.get("scaling")
    if (
        inputs is None
        or output is None
        or not hasattr(module, "config")
        or not isinstance(head_dim, int)
        or not isinstance(scale, float)
    ):
        return None
    softcap: Any = getattr(module, "attn_logit_softcapping", None)
    told: Any = module if hasattr(module, "sliding_window") else module.config
    window: Any = getattr(told, "sliding_window", None)
    return Shape(inputs, output, head_dim, scale, window, softcap)


def run(module: nn.Module, hidden_states: Any = None, *args: Any, **kwargs: Any) -> tuple[Tensor, None] | None:
    """Output (B, T, d) and no weights, or None where the module's own forward has to run."""
    kwargs |= by_name(module, args)
    if not isinstance(hidden_states, Tensor):
        return None
    y = attention(module, hidden_states, None, kwargs, residual=False)
    return None if y is None else (y, None)


def attention(
    module: nn.Module,
    x: Tensor,
    norm: Norm | None,
    call: dict[str, Any],
    *,
    residual: bool,
    dropout: float = 0.0,
    wanted: Tensor | None = None,
) -> Tensor | None:
    """Attention with the norm before it and the residual after it.

    Args:
        module: A module that `fits`.
        x: Hidden states, (B, T, d).
        norm: The norm before it, or None.
        call: The call's arguments by name.
        residual: Add x.
        dropout: Share of the output that is dropped behind it.
        wanted: Which tokens go through the output projection, laid flat (n,), or None for all.

    Returns:
        (B, T, d), or (n, d) of the wanted ones; None where the module's own forward has to run.
    """
    shape = shape_of(module)
    if shape is None or not is_usual(x) or x.ndim != 3 or not _is_plain(module, call):
        return None
    shares = _shares(module)
    pattern = None if shares is None else _pattern(shape, x, shares[0], call)
    if shares is None or pattern is None or (shares[1] and dropout):
        return None
    inside: list[nn.Module] = [module._modules[name] for name in (*shape.inputs, shape.output)]  # type: ignore[misc]
    acting = acting_in(inside, forwards_of(module), x)
    norms = [norm_of(module._modules.get(name)) for name in NORMS]
    if acting is None or any(
        made is None and module._modules.get(name) is not None for made, name in zip(norms, NORMS, strict=True)
    ):
        return None
    turn = call.get("position_embeddings") if getattr(module, "use_rope", True) else None
    *inputs, output = operands = acting.operands
    kv_heads = _kv_heads(module, shape, operands)
    block = SelfAttention(tuple(inputs), output, shape.head_dim, kv_heads, norm, norms[0], norms[1])
    block = replace(block, dropout=shares[1] or dropout, interleaved=shape.inputs == INTERLEAVED)
    y = attention_block(x, block, pattern, None if turn is None else Rotary(*turn), residual, wanted)
    acting.note(y)
    return y


def lengths_of(boundaries: Any) -> tuple[int, ...] | None:
    """Lengths of sequences that lie end to end, from their boundaries (sequences + 1,); None where none are given.

    The answer is kept on the boundaries, which all layers of a forward share: a device is waited for once.
    """
    if not isinstance(boundaries, Tensor):
        return None
    version, lengths = boundaries.__dict__.get(LENGTHS, (None, ()))
    if version is None or not is_version(boundaries, version):
        lengths = tuple(after - before for before, after in itertools.pairwise(boundaries.tolist()))
        boundaries.__dict__[LENGTHS] = version_of(boundaries), lengths
    known: tuple[int, ...] = lengths
    return known


LENGTHS = "_lorakit_lengths"
"""Where boundaries keep the lengths between them, with their version then."""


def _kv_heads(module: nn.Module, shape: Shape, operands: Any) -> int:
    if len(operands) == 2:
        count = getattr(module, "num_key_value_heads", None) or getattr(module.config, "num_key_value_heads", None)
        return int(count or operands[1].W.shape[0 if operands[1].transposed else 1] // shape.head_dim)
    W = operands[1].W
    return int(W.shape[1 if operands[1].transposed else 0] // shape.head_dim)


def _pattern(shape: Shape, x: Tensor, dropped: float, call: dict[str, Any]) -> Pattern | None:
    """Who sees whom in a call, or None where its mask is none that is known."""
    segments = lengths_of(call.get("cu_seq_lens_q"))
    mask = None if segments else call.get("attention_mask")  # these say all that a mask of packed sequences says
    if mask is None and segments is None and shape.softcap is not None:
        return None  # eager attention without a mask sees all tokens
    # a window that is longer than the rows, or that a model does not use, comes without a mask
    window = None if segments is None and mask is None else shape.window
    return under(mask, x, Pattern(True, shape.scale, window, shape.softcap, segments, dropped))


def _is_plain(module: nn.Module, call: dict[str, Any]) -> bool:
    """Whether a call asks for attention over its own tokens and nothing else."""
    if asks_for_weights(module, call) or call.get("cache") is not None or call.get("past_key_values") is not None:
        return False
    return says_nothing_else(call, READ)


def _shares(module: nn.Module) -> tuple[float, float] | None:
    """The shares of the weights and of the output that are dropped now, or None where it is not that simple."""
    weights, output = (module._modules.get(name) for name in DROPOUTS)
    told: list[Any] = [getattr(module, name, None) for name in ("attention_dropout", "dropout")]
    found = [one for one in (getattr(weights, "p", None), *told) if one is not None]
    share: Any = found[0] if module.training and found else 0.0
    last = share_of(output)
    return None if last is None or not isinstance(share, (int, float)) or not 0 <= share < 1 else (share, last)
