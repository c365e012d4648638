"""Fused encoder layers, and T5 sublayers.

A layer has norms after its residuals: norm(x + attention(x)), norm(x + mlp(x)), as in Devlin et al. 2018,
arXiv:1810.04805: BERT and its descendants. It runs as two autograd functions and two norms; padding is masked by a bias
of the scores.

A T5 sublayer is x + dropout(inner(norm(x))), with a feed-forward block or self-attention inside. The attention adds a
frozen relative position bias to its scores, which the first layer computes for all (Raffel et al. 2019,
arXiv:1910.10683, section 2.1). Cross-attention runs the model's own forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.core.clones import is_watched
from lorakit.ops.activation import activation
from lorakit.ops.attention_block import SelfAttention, attention_block
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.mlp import Form, mlp
from lorakit.ops.norm import Norm, normalize
from lorakit.speed import feed_forward
from lorakit.speed.attention import under
from lorakit.speed.linear import ActiveOperands, active_operands, forwards_of
from lorakit.speed.patching import RECOMPUTES
from lorakit.speed.probe import Call
from lorakit.speed.submodules import (
    activation_of,
    by_name,
    dropout_p,
    is_supported,
    knows_all,
    norm_of,
    unknown_attributes,
    wants_weights,
)

READ = frozenset({"attention_mask", "position_ids", "num_items_in_batch"})
"""Call arguments that are read or have no effect here; any other argument makes the module's own forward run."""

ATTRIBUTES = frozenset(
    {"config", "num_attention_heads", "attention_head_size", "all_head_size", "scaling", "n_heads", "dim", "layer_idx"}
    | {"is_decoder", "is_causal", "is_cross_attention", "add_cross_attention", "gradient_checkpointing"}
    | {"chunk_size_feed_forward", "seq_len_dim"}
)
"""Attributes of such layers that are read here, or whose effect a probe shows."""


class Layout(NamedTuple):
    """Paths of the modules of an encoder layer; "" if missing.

    Attributes:
        attention: Module with the attention settings, and with the dropout of its weights as child `dropout`.
        q, k, v, o: Attention projections.
        o_dropout, o_norm: Dropout before and norm after its residual.
        up, act, down: Feed-forward modules.
        down_dropout, down_norm: Dropout before and norm after its residual.
    """

    attention: str
    q: str
    k: str
    v: str
    o: str
    o_dropout: str
    o_norm: str
    up: str
    act: str
    down: str
    down_dropout: str
    down_norm: str

    @property
    def linears(self) -> tuple[str, ...]:
        """Return the six linear modules."""
        return self.q, self.k, self.v, self.o, self.up, self.down

    def children(self) -> dict[str, set[str]]:
        """Return, for each module that only contains others, its path and the names of its children."""
        held: dict[str, set[str]] = {}
        for path in (*self[1:], f"{self.attention}.dropout"):
            names = path.split(".") if path else []
            for depth, name in enumerate(names):
                held.setdefault(".".join(names[:depth]), set()).add(name)
        return held


LAYOUTS = (
    Layout(
        attention="attention.self",
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        o="attention.output.dense",
        o_dropout="attention.output.dropout",
        o_norm="attention.output.LayerNorm",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        down_dropout="output.dropout",
        down_norm="output.LayerNorm",
    ),
    Layout(
        attention="attention",
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        o="attention.out_lin",
        o_dropout="",
        o_norm="sa_layer_norm",
        up="ffn.lin1",
        act="ffn.activation",
        down="ffn.lin2",
        down_dropout="ffn.dropout",
        down_norm="output_layer_norm",
    ),
)
"""BERT, RoBERTa, ELECTRA and similar models; DistilBERT."""


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of an encoder layer, or None if a module is missing."""
    for found in LAYOUTS:
        if all(_at(module, path) is not None for path in (*found, f"{found.attention}.dropout")):
            return found
    return None


def fits(module: nn.Module) -> str | None:
    """Return why a module is not a supported encoder layer, or None if it is."""
    found = layout_of(module)
    if found is None:
        return "unknown children for an encoder layer"
    attention: Any = _at(module, found.attention)
    if not vars(attention).keys() >= {"attention_head_size", "scaling"} or dropout_p(attention.dropout) is None:
        return "unknown attributes for an attention"
    if getattr(attention, "is_causal", None) is not False:
        return "its attention is causal"
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation != "sdpa":
        return f"attention implementation {implementation!r} is not supported"
    if activation_of(_at(module, found.act)) is None:
        return f"unknown activation {type(_at(module, found.act)).__name__}"
    holders = {path: _at(module, path) for path in found.children()}
    if any(getattr(holder, "chunk_size_feed_forward", 0) for holder in holders.values()):
        return "its feed-forward runs in chunks"
    reasons = (unknown_attributes(holders[path], ATTRIBUTES, tuple(names)) for path, names in found.children().items())
    return next((reason for reason in reasons if reason is not None), None)


def run(module: nn.Module, hidden_states: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the layer's output (B, T, d), or None if its own forward must run."""
    ready = _ready(module, hidden_states, kwargs | by_name(module, args))
    if ready is None or hidden_states is None:
        return None
    around = ready.around
    x = normalize(attention_block(hidden_states, ready.block, ready.pattern, residual=True), around.o_norm)
    y = normalize(mlp(x, ready.form), around.down_norm)
    ready.acting.note(y)
    return y


def traced(module: nn.Module) -> tuple[str, ...]:
    """Return the paths below a supported layer of the modules whose calls `branches` needs."""
    found = layout_of(module)
    return () if found is None else (found.o, found.up, found.down)


def branches(module: nn.Module, call: Call, inside: Mapping[str, Call]) -> list[tuple[Tensor | None, Tensor]]:
    """Pair what the fused forward adds to the residuals with the outputs of the projections, (B, T, d) each."""
    attended, up, down = (inside[path] for path in traced(module))
    ready = _ready(module, call.hidden, call.kwargs | by_name(module, call.args[1:]))
    if ready is None:
        return [(None, attended.output)]
    return [
        (attention_block(call.hidden, ready.block, ready.pattern, residual=False), attended.output),
        (mlp(up.args[0], ready.form._replace(residual=False)), down.output),
    ]


class _Ready(NamedTuple):
    """Current operands of a layer for one call."""

    block: SelfAttention
    pattern: Pattern
    form: Form
    around: _Around
    acting: ActiveOperands


def _ready(module: nn.Module, x: Tensor | None, call: dict[str, Any]) -> _Ready | None:
    """Return the operands for hidden states x (B, T, d) and the call's arguments by name, or None if unknown."""
    found = layout_of(module)
    if found is None or not isinstance(x, Tensor) or x.ndim != 3 or not _is_plain(module, found, x, call):
        return None
    around = _around(module, found, x)
    acting = active_operands([_at(module, path) for path in found.linears], forwards_of(module), x)
    if around is None or acting is None:
        return None
    attention: Any = _at(module, found.attention)
    q, k, v, o, up, down = acting.operands
    width: int = attention.attention_head_size
    heads = (q.W.shape[1] if q.transposed else q.W.shape[0]) // width
    pattern = under(call.get("attention_mask"), x, Pattern(False, attention.scaling, dropout=around.weights))
    act = activation_of(_at(module, found.act))
    if pattern is None or act is None:
        return None
    block = SelfAttention((q, k, v), o, width, heads, dropout=around.first)
    form = Form((up,), down, activation(act), None, True, around.second, keep=RECOMPUTES not in module.__dict__)
    return _Ready(block, pattern, form, around, acting)


class _Around(NamedTuple):
    """Current dropout probabilities and norms of a layer."""

    weights: float
    first: float
    second: float
    o_norm: Norm
    down_norm: Norm


def _around(module: nn.Module, found: Layout, x: Tensor) -> _Around | None:
    attention: Any = _at(module, found.attention)
    dropped = attention.dropout.p if attention.training else 0.0  # the module itself is never called
    dropouts = [dropout_p(_at(module, path) if path else None) for path in (found.o_dropout, found.down_dropout)]
    norms = [norm_of(_at(module, path)) for path in (found.o_norm, found.down_norm)]
    if any(share is None for share in dropouts) or not 0 <= dropped < 1:
        return None
    if any(norm is None or norm.weight is None or norm.weight.dtype != x.dtype for norm in norms):
        return None
    return _Around(dropped, *dropouts, *norms)  # type: ignore[arg-type]


def _is_plain(module: nn.Module, found: Layout, x: Tensor, call: dict[str, Any]) -> bool:
    """Return whether a call is plain self-attention over its own tokens, with modules that have no hooks."""
    if not is_supported(x) or (x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type)):
        return False  # under autocast a layer norm returns float32
    holders = [_at(module, path) for path in found.children() if path]
    if wants_weights(_at(module, found.attention), call) or any(is_watched(one, captures=False) for one in holders):
        return False
    return knows_all(call, READ)


def _at(module: nn.Module, path: str) -> Any:
    """Return the module at a path below a module (itself for ""), or None."""
    found: Any = module
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found


NORM, DROPOUT = "layer_norm", "dropout"
FED, ATTENDED = "DenseReluDense", "SelfAttention"
PROJECTIONS = ("q", "k", "v", "o")
DISTANCES = "relative_attention_bias"

SUBLAYER_ATTRIBUTES = frozenset(
    {"config", "d_model", "key_value_proj_dim", "n_heads", "inner_dim", "scaling", "layer_idx", "dropout"}
    | {"is_decoder", "is_causal", "gradient_checkpointing", "has_relative_attention_bias"}
    | {"relative_attention_num_buckets", "relative_attention_max_distance"}
)
"""Attributes of such an attention that are read here, or whose effect a probe shows."""

SUBLAYER_READ = READ | {"position_bias"}
NEEDED = {"key_value_proj_dim", "n_heads", "scaling", "is_causal", "dropout"}


def fits_sublayer(module: nn.Module) -> str | None:
    """Return why a module is not a supported sublayer, or None if it is."""
    inner = _inner(module)
    if inner is None:
        return "unknown children for a sublayer"
    if norm_of(module._modules[NORM]) is None:
        return "unknown norm"
    value = unknown_attributes(module, (), (NORM, DROPOUT, FED, ATTENDED))
    return value or (feed_forward.fits(inner) if FED in module._modules else _why_not(inner))


def run_sublayer(module: nn.Module, hidden_states: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
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
    if x.ndim != 3 or not knows_all(kwargs, SUBLAYER_READ):
        return None
    ready = _ready_sublayer(module, inner, x, kwargs)
    if ready is None:
        return None
    block = replace(ready.block, norm=norm, dropout=p)
    y = attention_block(x, block, ready.pattern, residual=True)
    ready.acting.note(y)
    return y, ready.bias, None


def traced_in_sublayer(module: nn.Module) -> tuple[str, ...]:
    """Return the paths below a sublayer of the modules whose calls `branches_of_sublayer` needs."""
    return (f"{FED}.wo",) if FED in module._modules else (f"{ATTENDED}.o",)


def branches_of_sublayer(
    module: nn.Module, call: Call, inside: Mapping[str, Call]
) -> list[tuple[Tensor | None, Tensor]]:
    """Pair what the fused forward adds to the residual with what the inner module adds to it, (B, T, d)."""
    (own,) = (inside[path].output for path in traced_in_sublayer(module))
    x, kwargs, inner = call.hidden, call.kwargs | by_name(module, call.args[1:]), _inner(module)
    if inner is None:
        return [(None, own)]
    norm = norm_of(module._modules[NORM])
    if FED in module._modules:
        return [(feed_forward.feed_forward(inner, x, norm, residual=False), own)]
    ready = _ready_sublayer(module, inner, x, kwargs)
    if ready is None:
        return [(None, own)]
    return [(attention_block(x, replace(ready.block, norm=norm), ready.pattern, residual=False), own)]


class _ReadySublayer(NamedTuple):
    """Current operands of the attention for one call."""

    block: SelfAttention
    pattern: Pattern
    bias: Tensor
    acting: ActiveOperands


def _ready_sublayer(module: nn.Module, inner: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> _ReadySublayer | None:
    bias = None if wants_weights(inner, kwargs) else _distances(inner, x, kwargs.get("position_bias"))
    pattern = None if bias is None else _pattern(inner, x, bias, kwargs.get("attention_mask"))
    acting = active_operands([inner._modules[name] for name in PROJECTIONS], forwards_of(module), x)  # type: ignore[misc]
    if bias is None or pattern is None or acting is None:
        return None
    *inputs, o = acting.operands
    settings: Any = inner
    return _ReadySublayer(
        SelfAttention(tuple(inputs), o, settings.key_value_proj_dim, settings.n_heads), pattern, bias, acting
    )


def _inner(module: nn.Module) -> nn.Module | None:
    held = {name: child for name, child in module._modules.items() if child is not None}
    return next((held[name] for name in (FED, ATTENDED) if held.keys() == {NORM, DROPOUT, name}), None)


def _why_not(attention: nn.Module) -> str | None:
    if any(attention._modules.get(name) is None for name in PROJECTIONS) or not vars(attention).keys() >= NEEDED:
        return "unknown children for an attention"
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if implementation != "sdpa":
        return f"attention implementation {implementation!r} is not supported"
    return unknown_attributes(attention, SUBLAYER_ATTRIBUTES, (*PROJECTIONS, DISTANCES))


def _distances(attention: Any, x: Tensor, given: Tensor | None) -> Tensor | None:
    """Return the relative position bias, (1 or B, H, T, T), given or computed; None if it is not frozen."""
    tokens = x.shape[1]
    if given is None:
        if attention._modules.get(DISTANCES) is None:
            return None
        given = attention.compute_bias(tokens, tokens, device=x.device).contiguous()
    wanted = (attention.n_heads, tokens, tokens)
    return given if tuple(given.shape[1:]) == wanted and not given.requires_grad else None


def _pattern(attention: Any, x: Tensor, bias: Tensor, mask: Tensor | None) -> Pattern | None:
    dropped = attention.dropout if attention.training else 0.0
    if not 0 <= dropped < 1:
        return None
    return under(mask, x, Pattern(attention.is_causal, attention.scaling, dropout=dropped, bias=bias))
