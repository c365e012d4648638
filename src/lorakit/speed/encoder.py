"""Fused encoder layers, and fused T5 sublayers.

A layer of BERT or a model derived from BERT has its norms after the residuals: norm(x + attention(x)), then
norm(x + mlp(x)), as in Devlin et al. 2018, arXiv:1810.04805. The layer is computed by two autograd functions and two
norms. Padding is masked by adding a bias to the attention scores.

A T5 sublayer is x + dropout(inner(norm(x))), where `inner` is a feed-forward block or self-attention. A frozen relative
position bias is added to the attention scores. The first layer computes this bias for all layers (Raffel et al. 2019,
arXiv:1910.10683, section 2.1). Cross-attention runs the model's own `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.ops.activation import activation
from lorakit.ops.attention_block import SelfAttention, attention_block
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.mlp import Form, mlp
from lorakit.ops.norm import Norm, normalize
from lorakit.speed import feed_forward
from lorakit.speed.attention import under
from lorakit.speed.feed_forward import BoundFeedForward
from lorakit.speed.linear import ActiveOperands, active_operands, forwards_of
from lorakit.speed.norm import BoundNorm, bound_norm, dropout_p, operands_of
from lorakit.speed.patching import RECOMPUTES, Options, children_of, is_watched, modules_at
from lorakit.speed.probe import Calls, Pairs
from lorakit.speed.submodules import (
    activation_of,
    is_activation_watched,
    knows_all,
    unknown_activation,
    unknown_attributes,
    unknown_implementation,
)

READ = frozenset({"attention_mask", "position_ids", "num_items_in_batch"})
"""Supported call arguments, which are read or have no effect. Other arguments make the module's own `forward` run."""

ATTRIBUTES = frozenset(
    {"config", "num_attention_heads", "attention_head_size", "all_head_size", "scaling", "n_heads", "dim", "layer_idx"}
    | {"is_decoder", "is_causal", "is_cross_attention", "add_cross_attention", "gradient_checkpointing"}
    | {"chunk_size_feed_forward", "seq_len_dim"}
)
"""Known attributes of encoder layers. Each is read in this module, or a probe shows its effect."""


class Layout(NamedTuple):
    """Paths of the modules in an encoder layer. The path of a dropout module is "" if the layer has no such module.

    Attributes:
        attention: Module that holds the attention settings; its child `dropout` is applied to the attention weights.
        inputs: Projections to q, k and v.
        output: Output projection, the dropout after it, and the norm after the residual.
        up, act: First linear module and activation of the feed-forward block.
        down: Last linear module of the feed-forward block, the dropout after it, and the norm after the residual.
    """

    attention: str
    inputs: tuple[str, str, str]
    output: tuple[str, str, str]
    up: str
    act: str
    down: tuple[str, str, str]

    @property
    def linears(self) -> tuple[str, ...]:
        """Return the paths of the six linear modules."""
        return (*self.inputs, self.output[0], self.up, self.down[0])

    @property
    def leaves(self) -> tuple[str, ...]:
        """Return the paths of the modules that the layer uses, excluding those that only contain other modules."""
        return (*self.inputs, *self.output, self.up, self.act, *self.down, f"{self.attention}.dropout")

    def children(self) -> dict[str, set[str]]:
        """Return a dict from path to names of children, for each module that only contains other modules."""
        held: dict[str, set[str]] = {}
        for path in self.leaves:
            names = path.split(".") if path else []
            for depth, name in enumerate(names):
                held.setdefault(".".join(names[:depth]), set()).add(name)
        return held


LAYOUTS = (
    Layout(
        attention="attention.self",
        inputs=("attention.self.query", "attention.self.key", "attention.self.value"),
        output=("attention.output.dense", "attention.output.dropout", "attention.output.LayerNorm"),
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down=("output.dense", "output.dropout", "output.LayerNorm"),
    ),
    Layout(
        attention="attention",
        inputs=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        output=("attention.out_lin", "", "sa_layer_norm"),
        up="ffn.lin1",
        act="ffn.activation",
        down=("ffn.lin2", "ffn.dropout", "output_layer_norm"),
    ),
)
"""The layout of BERT and similar models (RoBERTa, ELECTRA), and the layout of DistilBERT."""


def layout_of(module: nn.Module) -> Layout | None:
    """Return the layout of an encoder layer, or None if a module is missing."""
    for found in LAYOUTS:
        if all(_at(module, path) is not None for path in (found.attention, *found.leaves)):
            return found
    return None


@dataclass(frozen=True)
class BoundEncoderLayer:
    """A fused encoder layer, bound to one module.

    Attributes:
        module: The layer.
        layout: Paths of its modules.
        attention: Module that holds the attention settings.
        holders: The modules between the layer and its leaves.
        norms: Norms after attention and after the feed-forward block.
        act: Name of the activation in `lorakit.ops.activation`.
    """

    module: nn.Module
    layout: Layout
    attention: Any
    holders: tuple[nn.Module, ...]
    norms: tuple[BoundNorm | None, ...]
    act: str

    @property
    def traced(self) -> tuple[str, ...]:
        """Return the paths, relative to the layer, of the modules whose calls `branches` needs."""
        return (self.layout.output[0], self.layout.up, self.layout.down[0])

    def accepts(self, options: Options) -> bool:
        """Return whether all arguments of a call, besides the hidden states, are known."""
        return knows_all(self.attention, options, READ)

    def run(self, x: Tensor, options: Options) -> Tensor | None:
        """Return the output (B, T, d) for x (B, T, d), or None if the layer's own `forward` must run."""
        ready = self._ready(x, options)
        if ready is None:
            return None
        y = normalize(attention_block(x, ready.block, ready.pattern, residual=True), ready.norms[0])
        y = normalize(mlp(y, ready.form), ready.norms[1])
        ready.acting.note(y)
        return y

    def branches(self, x: Tensor, options: Options, inside: Calls) -> Pairs:
        """Pair each recorded branch (B, T, d) with the branch that the fused `forward` adds to a residual."""
        attended, up, down = (inside[path] for path in self.traced)
        ready = self._ready(x, options)
        if ready is None:
            return [(None, attended.output)]
        return [
            (attention_block(x, ready.block, ready.pattern, residual=False), attended.output),
            (mlp(up.args[0], ready.form._replace(residual=False)), down.output),
        ]

    def _ready(self, x: Tensor, options: Options) -> _Ready | None:
        """Return the operands for hidden states x (B, T, d), or None if any operand is unknown."""
        module, found = self.module, self.layout
        if x.ndim != 3 or not self._is_plain(x):
            return None
        dropouts, norms = _dropouts(module, found, self.attention), self._current_norms(x)
        acting = active_operands([_at(module, path) for path in found.linears], forwards_of(module), x)
        if dropouts is None or len(norms) != 2 or acting is None:
            return None
        q, k, v, o, up, down = acting.operands
        width: int = self.attention.attention_head_size
        heads = (q.W.shape[1] if q.transposed else q.W.shape[0]) // width
        of_weights, of_output, of_down = dropouts
        pattern = under(options.get("attention_mask"), x, Pattern(False, self.attention.scaling, dropout=of_weights))
        if pattern is None or is_activation_watched(_at(module, found.act)):
            return None
        block = SelfAttention((q, k, v), o, width, heads, dropout=of_output)
        keep = RECOMPUTES not in module.__dict__
        return _Ready(
            block, pattern, Form((up,), down, activation(self.act), None, True, of_down, keep=keep), norms, acting
        )

    def _current_norms(self, x: Tensor) -> list[Norm]:
        """Return the two norms, omitting any that cannot be fused now or has another dtype than x (B, T, d)."""
        norms = operands_of(self.norms) or ()
        return [norm for norm in norms if norm is not None and norm.weight is not None and norm.weight.dtype == x.dtype]

    def _is_plain(self, x: Tensor) -> bool:
        """Return whether a call involves no modules with hooks, and no norms that change the dtype."""
        if x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
            return False  # a layer norm returns float32 under autocast
        is_seen = any(is_watched(holder, captures=False) for holder in self.holders)
        return not is_seen


def match(module: nn.Module) -> BoundEncoderLayer | str:
    """Return the fused `forward` of an encoder layer, or why the module is not a supported encoder layer."""
    found = layout_of(module)
    if found is None:
        return "unknown children for an encoder layer"
    attention = _at(module, found.attention)
    if not vars(attention).keys() >= {"attention_head_size", "scaling"} or dropout_p(attention.dropout) is None:
        return "unknown attributes for an attention module"
    if getattr(attention, "is_causal", None) is not False:
        return "its attention is causal"
    if reason := unknown_implementation(attention) or unknown_activation(_at(module, found.act)):
        return reason
    holders = {path: _at(module, path) for path in found.children()}
    if any(getattr(holder, "is_cross_attention", False) for holder in holders.values()):
        return "not self-attention"
    if any(getattr(holder, "chunk_size_feed_forward", 0) for holder in holders.values()):
        return "its feed-forward block runs in chunks"
    reasons = (unknown_attributes(holders[path], ATTRIBUTES, tuple(names)) for path, names in found.children().items())
    if reason := next((reason for reason in reasons if reason is not None), None):
        return reason
    norms = tuple(bound_norm(_at(module, path)) for path in (found.output[2], found.down[2]))
    inner = tuple(holder for path, holder in holders.items() if path)
    return BoundEncoderLayer(module, found, attention, inner, norms, activation_of(_at(module, found.act)) or "")


class _Ready(NamedTuple):
    """Operands of a layer for one call; `norms` contains the norms after attention and after the feed-forward block."""

    block: SelfAttention
    pattern: Pattern
    form: Form
    norms: list[Norm]
    acting: ActiveOperands


def _dropouts(module: nn.Module, found: Layout, attention: Any) -> tuple[float, float, float] | None:
    """Return the current dropout probabilities for the attention weights and both outputs, or None if unknown."""
    # the model reads only p from this module and never calls it
    of_weights: float = attention.dropout.p if attention.training else 0.0
    of_output, of_down = (dropout_p(_at(module, path) if path else None) for path in (found.output[1], found.down[1]))
    if of_output is None or of_down is None or not 0 <= of_weights < 1:
        return None
    return of_weights, of_output, of_down


def _at(module: nn.Module, path: str) -> Any:
    """Return the module or function at a path relative to `module`, or None; the path "" is `module` itself."""
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found


NORM, DROPOUT = "layer_norm", "dropout"
FED, ATTENDED = "DenseReluDense", "SelfAttention"
PROJECTIONS = ("q", "k", "v", "o")
DISTANCES, COMPUTE = "relative_attention_bias", "compute_bias"

SUBLAYER_ATTRIBUTES = frozenset(
    {"config", "d_model", "key_value_proj_dim", "n_heads", "inner_dim", "scaling", "layer_idx", "dropout"}
    | {"is_decoder", "is_causal", "gradient_checkpointing", "has_relative_attention_bias"}
    | {"relative_attention_num_buckets", "relative_attention_max_distance"}
)
"""Known attributes of T5 attention modules. Each is read in this module, or a probe shows its effect."""

SUBLAYER_READ = READ | {"position_bias"}
NEEDED = {"key_value_proj_dim", "n_heads", "scaling", "is_causal", "dropout"}


@dataclass(frozen=True)
class BoundSublayer:
    """A fused T5 sublayer, bound to one module.

    Attributes:
        module: The sublayer.
        inner: Its attention module or feed-forward block.
        norm: The norm before it.
        block: The fused `forward` of the feed-forward block, or None for attention.
    """

    module: nn.Module
    inner: nn.Module
    norm: BoundNorm
    block: BoundFeedForward | None

    @property
    def traced(self) -> tuple[str, ...]:
        """Return the paths, relative to the sublayer, of the modules whose calls `branches` needs."""
        return (f"{ATTENDED}.o",) if self.block is None else (f"{FED}.wo",)

    def accepts(self, options: Options) -> bool:
        """Return whether all arguments of a call, besides the hidden states, are known."""
        return not options if self.block is not None else knows_all(self.inner, options, SUBLAYER_READ)

    def run(self, x: Tensor, options: Options) -> Tensor | tuple[Tensor, Tensor, None] | None:
        """Return the output for x (B, T, d), or None if the sublayer's own `forward` must run."""
        norm, p = self.norm.operands(), dropout_p(self.module._modules[DROPOUT])
        if norm is None or p is None or is_watched(self.inner):
            return None
        if self.block is not None:
            return feed_forward.feed_forward(self.block, x, norm, residual=True, dropout=p)
        ready = _ready_sublayer(self.module, self.inner, x, options) if x.ndim == 3 else None
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
        elif (ready := _ready_sublayer(self.module, self.inner, x, options)) is not None:
            made = attention_block(x, replace(ready.block, norm=norm), ready.pattern, residual=False)
        return [(made, own)]


def match_sublayer(module: nn.Module) -> BoundSublayer | str:
    """Return the fused `forward` of a T5 sublayer, or why the module is not a supported sublayer."""
    inner = _inner(module)
    if inner is None:
        return "unknown children for a sublayer"
    norm = bound_norm(module._modules[NORM])
    if norm is None:
        return "its norm is unknown"
    if reason := unknown_attributes(module, (), (NORM, DROPOUT, FED, ATTENDED)):
        return reason
    if FED in module._modules:
        block = feed_forward.match(inner)
        return block if isinstance(block, str) else BoundSublayer(module, inner, norm, block)
    if len(modules_at(inner, PROJECTIONS)) < len(PROJECTIONS) or not vars(inner).keys() >= NEEDED:
        return "unknown children for an attention module"
    known = (*PROJECTIONS, DISTANCES)
    reason = unknown_implementation(inner) or unknown_attributes(inner, SUBLAYER_ATTRIBUTES, known)
    return reason or BoundSublayer(module, inner, norm, None)


class _ReadySublayer(NamedTuple):
    """Operands of an attention sublayer for one call."""

    block: SelfAttention
    pattern: Pattern
    bias: Tensor
    acting: ActiveOperands


def _ready_sublayer(module: nn.Module, inner: nn.Module, x: Tensor, options: Options) -> _ReadySublayer | None:
    bias = _distances(inner, x, options.get("position_bias"))
    acting = active_operands(modules_at(inner, PROJECTIONS), forwards_of(module), x)
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
    return _ReadySublayer(block, masked, bias, acting)


def _inner(module: nn.Module) -> nn.Module | None:
    held = children_of(module)
    return next((held[name] for name in (FED, ATTENDED) if held.keys() == {NORM, DROPOUT, name}), None)


def _distances(attention: nn.Module, x: Tensor, given: Tensor | None) -> Tensor | None:
    """Return the relative position bias (1 or B, H, T, T): `given` if it is not None, otherwise a newly computed bias.

    Returns None if the bias is missing, has an unexpected shape, or is trainable.
    """
    tokens = x.shape[1]
    if given is None:
        if attention._modules.get(DISTANCES) is None:
            return None
        given = getattr(attention, COMPUTE)(tokens, tokens, device=x.device).contiguous()
    wanted = (attention.n_heads, tokens, tokens)
    return given if tuple(given.shape[1:]) == wanted and not given.requires_grad else None
