"""Fused encoder layers.

BERT and models derived from it have norms after the residuals: norm(x + attention(x)), then norm(x + mlp(x)), as in
Devlin et al. 2018, arXiv:1810.04805. Two autograd functions and two norms compute a layer; padding is a bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.architectures.families import BLOCKS
from lorakit.architectures.layouts import Block
from lorakit.ops.activation import activation
from lorakit.ops.attention_block import SelfAttention, attention_block
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.mlp import Form, mlp
from lorakit.ops.norm import Norm, normalize
from lorakit.speed.attention import under
from lorakit.speed.linear import ActiveOperands, active_operands
from lorakit.speed.norm import BoundNorm, bound_norm, dropout_p, operands_of
from lorakit.speed.patching import RECOMPUTES, Options, is_watched
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
"""Supported call arguments, which are read or have no effect; with others, the module's own `forward` runs."""

ATTRIBUTES = frozenset(
    {"config", "num_attention_heads", "attention_head_size", "all_head_size", "scaling", "n_heads", "dim", "layer_idx"}
    | {"is_decoder", "is_causal", "is_cross_attention", "add_cross_attention", "gradient_checkpointing"}
    | {"chunk_size_feed_forward", "seq_len_dim"}
)
"""Known attributes of encoder layers. Each is read in this module, or a probe shows its effect."""


LAYERS: tuple[Block, ...] = tuple(block for block in BLOCKS if block.is_post_norm)
"""Supported layouts of layers: those of BERT and similar models (RoBERTa, ELECTRA), and of DistilBERT."""


def layout_of(module: nn.Module) -> Block | None:
    """Return the layout of an encoder layer, or None if a module is missing."""
    for found in LAYERS:
        if all(_at(module, path) is not None for path in (_settings(found), *_leaves(found))):
            return found
    return None


def _settings(layout: Block) -> str:
    """Return the path of the module with the settings of attention."""
    settings = layout.attention_modules.settings
    return layout.attention.at([settings])[0] if settings else layout.attention.inner


def _leaves(layout: Block) -> tuple[str, ...]:
    """Return the paths of the modules that a layer uses, excluding those that only contain other modules."""
    attended, fed = layout.attention, layout.feed_forward
    weights_dropout = attended.at([layout.attention_modules.weights_dropout])
    dropouts = [path for path in (attended.dropout, fed.dropout) if path]
    return (*layout.linears, *layout.activations, *weights_dropout, *dropouts, *layout.norms)


def _holders(layout: Block) -> dict[str, set[str]]:
    """Return a dict from path to names of children, for each module that only contains other modules."""
    held: dict[str, set[str]] = {}
    for path in _leaves(layout):
        names = path.split(".")
        for depth, name in enumerate(names):
            held.setdefault(".".join(names[:depth]), set()).add(name)
    return held


@dataclass(frozen=True)
class BoundEncoderLayer:
    """A fused encoder layer, bound to one module.

    `linears` and `activation` are paths, `attention` has the attention settings, `holders` are the modules between the
    layer and its leaves, `norms` follow attention and feed-forward, and `act` is a key of
    `lorakit.ops.activation.ACTIVATIONS`.
    """

    module: nn.Module
    layout: Block
    linears: tuple[str, ...]
    activation: str
    attention: Any
    holders: tuple[nn.Module, ...]
    norms: tuple[BoundNorm | None, ...]
    act: str

    @property
    def traced(self) -> tuple[str, ...]:
        """Return the paths, relative to the layer, of the modules whose calls `branches` needs."""
        return self.linears[3:]

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
        acting = active_operands([_at(module, path) for path in self.linears], x)
        if dropouts is None or len(norms) != 2 or acting is None:
            return None
        q, k, v, o, up, down = acting.operands
        width: int = self.attention.attention_head_size
        heads = (q.W.shape[1] if q.transposed else q.W.shape[0]) // width
        of_weights, of_output, of_down = dropouts
        pattern = under(options.get("attention_mask"), x, Pattern(False, self.attention.scaling, dropout=of_weights))
        if pattern is None or is_activation_watched(_at(module, self.activation)):
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
    attention = _at(module, _settings(found))
    if not vars(attention).keys() >= {"attention_head_size", "scaling"} or dropout_p(attention.dropout) is None:
        return "unknown attributes for an attention module"
    if getattr(attention, "is_causal", None) is not False:
        return "its attention is causal"
    if reason := unknown_implementation(attention) or unknown_activation(_at(module, found.activations[0])):
        return reason
    inside = _holders(found)
    holders = {path: _at(module, path) for path in inside}
    if any(getattr(holder, "is_cross_attention", False) for holder in holders.values()):
        return "not self-attention"
    if any(getattr(holder, "chunk_size_feed_forward", 0) for holder in holders.values()):
        return "its feed-forward block runs in chunks"
    reasons = (unknown_attributes(holders[path], ATTRIBUTES, tuple(names)) for path, names in inside.items())
    if reason := next((reason for reason in reasons if reason is not None), None):
        return reason
    norms = tuple(bound_norm(_at(module, path)) for path in found.norms)
    inner = tuple(holder for path, holder in holders.items() if path)
    act = activation_of(_at(module, found.activations[0])) or ""
    return BoundEncoderLayer(module, found, found.linears, found.activations[0], attention, inner, norms, act)


class _Ready(NamedTuple):
    """Operands of a layer for one call; `norms` contains the norms after attention and after the feed-forward block."""

    block: SelfAttention
    pattern: Pattern
    form: Form
    norms: list[Norm]
    acting: ActiveOperands


def _dropouts(module: nn.Module, found: Block, attention: Any) -> tuple[float, float, float] | None:
    """Return the current dropout probabilities for the attention weights and both outputs, or None if unknown."""
    # the model reads only p from this module and never calls it
    of_weights: float = attention.dropout.p if attention.training else 0.0
    of_output, of_down = (
        dropout_p(_at(module, one.dropout) if one.dropout else None) for one in (found.attention, found.feed_forward)
    )
    if of_output is None or of_down is None or not 0 <= of_weights < 1:
        return None
    return of_weights, of_output, of_down


def _at(module: nn.Module, path: str) -> Any:
    """Return the module or function at a path relative to `module`, or None; the path "" is `module` itself."""
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
    return found
