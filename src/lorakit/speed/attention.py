"""Fused self-attention, with or without rotary position embeddings, from the projections to the output projection.

A mask is read only once for all layers of a forward pass, and classified by what it hides beyond the causal or
sliding-window pattern: nothing, padding, or more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lorakit.architectures.families import ATTENTION
from lorakit.architectures.layouts import AttentionLayout
from lorakit.ops.adapted import Adapted
from lorakit.ops.attention_block import SelfAttention, attention_block
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.norm import Norm
from lorakit.ops.rotary import Rotary
from lorakit.speed.admission import Bound, is_version, version_of
from lorakit.speed.last_layer import KEYWORD
from lorakit.speed.linear import ActiveOperands, active_operands
from lorakit.speed.norm import BoundNorm, bound_norms, dropout_p, operands_of
from lorakit.speed.patching import Options, module_at, modules_at
from lorakit.speed.submodules import knows_all, unknown_attributes, unknown_implementation

HIDDEN = -1e4
"""A mask value at or below this threshold hides a position. Models use the lowest value of a dtype for this purpose."""

MASK_FIELDS = "_lorakit_read"
"""Attribute in which the results of reading a mask are cached; all layers of a forward pass share the mask."""


Known = TypeVar("Known")


def cached_on(x: Tensor, name: str, make: Callable[[], Known]) -> Known:
    """Return a value that is cached on a tensor (any shape) by name; recompute it if x was modified in place."""
    version, value = x.__dict__.get(name, (None, None))
    if version is None or not is_version(x, version):
        version = version_of(x)  # before the value is computed: another thread may modify x meanwhile
        value = make()
        x.__dict__[name] = version, value
    return value


def under(mask: Tensor | None, x: Tensor, pattern: Pattern) -> Pattern | None:
    """Combine an attention pattern with a mask for x (rows, T, d), as a bias if the mask hides more than the pattern.

    The mask is (rows or 1, heads or 1, T, T), with True or 0 where a token is visible. Returns None if it hides less
    than the pattern, hides everything from a token, has an unsupported form, or needs a bias that no kernel supports.
    """
    combined = pattern if mask is None else _under(mask, x, pattern)
    return None if combined is None or (combined.bias is not None and x.device.type != "cpu") else combined


def _under(mask: Tensor, x: Tensor, pattern: Pattern) -> Pattern | None:
    rows, tokens, _ = x.shape
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (tokens, tokens) or mask.requires_grad:
        return None
    if mask.shape[0] not in (1, rows):
        return None
    known: dict[Hashable, Any] = cached_on(mask, MASK_FIELDS, dict)
    key = (pattern.causal, pattern.window, pattern.segments, x.dtype)
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


def _read(mask: Tensor, pattern: Pattern, dtype: torch.dtype) -> Tensor | bool:
    """Return a bias equivalent to a mask, True if the mask equals the pattern, or False if the mask is unsupported."""
    hidden = ~mask if mask.dtype == torch.bool else mask <= HIDDEN
    if mask.dtype != torch.bool and not bool((hidden | (mask == 0)).all()):
        return False
    targets, seen = torch.arange(mask.shape[-1], device=mask.device), ~hidden
    allowed = pattern.allowed(targets, targets)
    if bool((seen == allowed).all()):
        return True
    if bool((seen & ~allowed).any()) or not bool(seen.any(-1).all()):
        return False
    keys = seen.any(-2, keepdim=True)
    least = keys if bool(((keys & allowed) == seen).all()) else seen  # padding hides the same keys from all queries
    return torch.zeros(least.shape, dtype=dtype, device=mask.device).masked_fill_(~least, -torch.inf)


ATTRIBUTES = frozenset(
    {"config", "layer_idx", "layer_type", "head_dim", "head_size", "rotary_ndims", "num_heads", "num_key_value_heads"}
    | {"num_key_value_groups", "num_attention_heads", "hidden_size", "embed_dim", "split_size", "is_causal"}
    | {"is_cross_attention", "scaling", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"}
    | {"reorder_and_upcast_attn", "attention_dropout", "dropout", "enable_bias", "sliding_window", "is_sliding"}
    | {"attn_logit_softcapping", "use_rope", "rotary_fn", "rope_theta", "max_position_embeddings"}
    | {"deterministic_flash_attn"}
)
"""Known attributes of attention modules. Each is read in this module, or a probe shows its effect."""

HEAD_DIMS = ("head_dim", "head_size")
"""Usual names of the attribute with the width of a head."""

DROPOUTS = ("attention_dropout", "dropout")
"""Names of the attribute with the probability for the attention weights, if no module has it."""

READ = frozenset(
    {"attention_mask", "position_embeddings", "hidden_states", "use_cache", "position_ids"}
    | {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch", "output_router_logits"}
    | {"shift_labels", "ignore_index", KEYWORD}  # read by the loss
)
"""Supported call arguments, which are read or have no effect; with others, the module's own `forward` runs."""


@dataclass(frozen=True)
class BoundAttention(Bound):
    """Fused attention, bound to one module, with the paths of the modules in it and its settings. `window` is in
    tokens; `softcap` bounds the scores with tanh; `settings` is the module with the settings; `norms` are those of q
    and k.
    """

    layout: AttentionLayout
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None
    causal: bool
    settings: nn.Module
    norms: tuple[BoundNorm | None, ...] = ()

    @property
    def is_eager(self) -> bool:
        """Return whether the scores have a form that only transformers' eager attention computes."""
        return self.softcap is not None or bool(self.layout.sinks)

    def accepts(self, options: Options) -> bool:
        """Return whether all arguments of a call, besides the hidden states, are known."""
        return knows_all(self.settings, options, READ)

    def run(self, x: Tensor, options: Options) -> tuple[Tensor, None] | None:
        """Return (output (B, T, d), None) for x (B, T, d), or None if the module's own `forward` must run."""
        prepared = prepare(self, x, None, options)
        return None if prepared is None else (prepared.run(x, residual=False), None)


def match(module: nn.Module) -> BoundAttention | str:
    """Return the fused `forward` of an attention module, or why the module is not a supported attention module."""
    layout = _layout(module)
    bound = None if layout is None else bind(module, layout)
    if layout is None or bound is None:
        return "unknown children for an attention module"
    if getattr(module, "is_cross_attention", False) or not isinstance(getattr(module, "is_causal", None), bool):
        return "not self-attention"
    if reason := unknown_implementation(module, "eager" if bound.is_eager else "sdpa"):
        return reason
    if getattr(module, "is_sliding", bound.window is not None) is not (bound.window is not None):
        return "it has a window that it does not use"
    if getattr(module.config, "is_causal", bound.causal) is not bound.causal:
        return "its config makes it " + ("bidirectional" if bound.causal else "causal")
    norms = bound_norms(module, *layout.norms)
    if norms is None:
        return "its norms are unknown"
    known = (*layout.linears, *layout.norms, layout.weights_dropout, layout.output_dropout)
    return unknown_attributes(module, ATTRIBUTES, known, (layout.sinks,)) or replace(bound, norms=tuple(norms))


def _layout(module: nn.Module) -> AttentionLayout | None:
    """Return the layout of an attention module, or None if it is unknown."""
    parameters = {name for name, value in module._parameters.items() if value is not None}
    complete = (one for one in ATTENTION if len(modules_at(module, one.linears)) == len(one.linears))
    return next((one for one in complete if parameters == {one.sinks} - {""}), None)


def bind(module: nn.Module, layout: AttentionLayout, head_dims: Sequence[str] = HEAD_DIMS) -> BoundAttention | None:
    """Return fused attention without norms of q and k, as read from a module's attributes; None if one is unknown.
    `head_dims` are the possible names of the one with the width of a head.
    """
    settings = module_at(module, layout.settings) if layout.settings else module
    options = {} if settings is None else vars(settings)
    head_dim = next((options[name] for name in head_dims if name in options), None)
    scale = options.get("scaling", head_dim**-0.5 if isinstance(head_dim, int) else None)
    if settings is None or not isinstance(head_dim, int) or not isinstance(scale, float) or "config" not in options:
        return None
    softcap: float | None = getattr(settings, "attn_logit_softcapping", None)
    causal: bool = options.get("is_causal", True)
    window: int | None = getattr(settings, "sliding_window", getattr(settings.config, "sliding_window", None))
    if window is not None and not causal:
        window = getattr(settings.config, "sliding_window", None)  # the module has that of flash attention: one more
    return BoundAttention(module, layout, head_dim, scale, window, softcap, causal, settings)


class PreparedAttention(NamedTuple):
    """The operands of fused attention for one call."""

    block: SelfAttention
    pattern: Pattern
    rope: Rotary | None
    operands: ActiveOperands

    def run(self, x: Tensor, *, residual: bool, wanted: Tensor | None = None) -> Tensor:
        """Return the output (B, T, d) for x (B, T, d), or (n, d) if the output projection receives only the tokens with
        the flat indices `wanted` (n,).
        """
        y = attention_block(x, self.block, self.pattern, self.rope, residual, wanted)
        self.operands.note(y)
        return y


def prepare(
    bound: BoundAttention, x: Tensor, norm: Norm | None, options: Options, dropout: float = 0.0
) -> PreparedAttention | None:
    """Return what attention, with the norm before it and dropout after it, needs for x (B, T, d), which `is_supported`
    accepts, or None if the module's own `forward` must run.
    """
    if x.ndim != 3:
        return None
    dropouts = _probabilities(bound)
    pattern = None if dropouts is None else _pattern(bound, x, dropouts[0], options)
    if dropouts is None or pattern is None or (dropouts[1] and dropout):
        return None
    operands = active_operands(modules_at(bound.module, bound.layout.linears), x)
    norms = operands_of(bound.norms)
    if operands is None or norms is None:
        return None
    *inputs, output = operands.operands
    kv_heads = _kv_heads(bound, operands.operands)
    q_norm, k_norm = norms or (None, None)
    p, interleaved = dropouts[1] or dropout, bound.layout.is_interleaved
    block = SelfAttention(tuple(inputs), output, bound.head_dim, kv_heads, norm, q_norm, k_norm, p, interleaved)
    return PreparedAttention(block, pattern, rotary_of(bound, options), operands)


def rotary_of(bound: BoundAttention, options: Options) -> Rotary | None:
    """Return the tables for rotary position embeddings, or None if the module uses none."""
    tables = options.get("position_embeddings")
    if tables is None or not getattr(bound.settings, "use_rope", True):
        return None
    cos, sin = tables
    if bound.layout.has_half_tables:
        cos, sin = (cached_on(half, DOUBLED, partial(torch.cat, (half, half), -1)) for half in tables)
    return Rotary(cos, sin)


DOUBLED = "_lorakit_doubled"
"""Attribute of a table for half a head in which the table for a whole head is cached."""


def lengths_of(boundaries: Tensor | None) -> tuple[int, ...] | None:
    """Return the lengths of packed sequences from their boundaries (sequences + 1,), or None if not given. They are
    cached on the tensor, which all layers share, so that the device is synchronized once.
    """
    if not isinstance(boundaries, Tensor):
        return None
    return cached_on(boundaries, LENGTHS, lambda: tuple(boundaries.diff().tolist()))


LENGTHS = "_lorakit_lengths"
"""Attribute of the boundaries tensor in which the sequence lengths are cached."""


def _kv_heads(bound: BoundAttention, operands: Sequence[Adapted]) -> int:
    count = None
    if len(operands) == 2:
        settings = bound.settings
        count = getattr(settings, "num_key_value_heads", None) or getattr(settings.config, "num_key_value_heads", None)
    return int(count or operands[1].out_features // bound.head_dim)


def _pattern(bound: BoundAttention, x: Tensor, dropped: float, options: Options) -> Pattern | None:
    """Return the attention pattern for a call, or None if its mask is not supported."""
    mask = options.get("attention_mask")
    if mask is None and bound.is_eager and bound.causal:
        return None  # Without a mask, eager attention lets each token see all tokens.
    # Without a mask, the rows are shorter than the window, or the model does not use a window. It also lets each token
    # see the sequences before its own: only a mask keeps packed sequences apart.
    window = None if mask is None else bound.window
    sinks = bound.settings._parameters.get(bound.layout.sinks)
    if sinks is not None and sinks.requires_grad:
        return None
    bias = options.get("position_bias")
    pattern = Pattern(bound.causal, bound.scale, window, bound.softcap, None, dropped, bias, sinks)
    segments = None if mask is None else lengths_of(options.get("cu_seq_lens_q"))
    if segments is not None and sum(segments) == x.shape[1] and min(segments) > 0:
        packed = replace(pattern, segments=segments)
        if under(mask, x, packed) is packed:  # the mask hides the other sequences and nothing else
            return packed
    return under(mask, x, pattern)


def _probabilities(bound: BoundAttention) -> tuple[float, float] | None:
    """Return the current dropout probabilities for the attention weights and the output, or None if unknown."""
    settings, layout, p = bound.settings, bound.layout, 0.0
    if settings.training:
        weights = module_at(bound.module, layout.weights_dropout)
        sources = (getattr(weights, "p", None), *(getattr(settings, name, None) for name in DROPOUTS))
        p = next((one for one in sources if one is not None), 0.0)
    last = dropout_p(module_at(bound.module, layout.output_dropout))
    return None if last is None or not isinstance(p, (int, float)) or not 0 <= p < 1 else (p, last)
