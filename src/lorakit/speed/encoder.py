"""Fused encoder layers.

BERT and models derived from it have norms after the residuals: norm(x + attention(x)), then norm(x + mlp(x)), as in
Devlin et al. 2018, arXiv:1810.04805. Two autograd functions and two norms compute a layer; padding is a bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.architectures.families import BLOCKS
from lorakit.architectures.layouts import Block, FeedForwardLayout
from lorakit.ops.norm import Norm, normalize
from lorakit.speed import attention, feed_forward
from lorakit.speed.admission import Bound
from lorakit.speed.attention import BoundAttention, PreparedAttention
from lorakit.speed.feed_forward import BoundFeedForward, PreparedFeedForward
from lorakit.speed.norm import BoundNorm, bound_norm, dropout_p, operands_of
from lorakit.speed.patching import Options, attribute_at, is_watched, module_at
from lorakit.speed.probe import Calls, Pairs
from lorakit.speed.submodules import knows_all, unknown_attributes, unknown_implementation

READ = frozenset({"attention_mask", "position_ids", "num_items_in_batch"})
"""Supported call arguments, which are read or have no effect; with others, the module's own `forward` runs."""

ATTRIBUTES = frozenset(
    {"config", "num_attention_heads", "attention_head_size", "all_head_size", "scaling", "n_heads", "dim", "layer_idx"}
    | {"is_decoder", "is_causal", "is_cross_attention", "add_cross_attention", "gradient_checkpointing"}
    | {"chunk_size_feed_forward", "seq_len_dim"}
)
"""Known attributes of encoder layers. Each is read in this package, or a probe shows its effect."""


LAYERS: tuple[Block, ...] = tuple(block for block in BLOCKS if block.is_post_norm)
"""Supported layouts of layers: those of BERT and similar models (RoBERTa, ELECTRA), and of DistilBERT."""


def layout_of(module: nn.Module) -> Block | None:
    """Return the layout of an encoder layer, or None if a module is missing."""
    for layout in LAYERS:
        if all(attribute_at(module, path) is not None for path in _leaves(layout)):
            return layout
    return None


def _leaves(layout: Block) -> tuple[str, ...]:
    """Return the paths of the modules that a layer uses, excluding those that only contain other modules."""
    attended, fed = layout.attention, layout.feed_forward
    weights_dropout = attended.at([layout.attention_modules.weights_dropout])
    dropouts = [path for path in (attended.dropout, fed.dropout) if path]
    return (*layout.linears, *layout.activations, *weights_dropout, *dropouts, *layout.norms)


def _holders(layout: Block) -> dict[str, set[str]]:
    """Return a dict from path to names of children, for each module that only contains other modules."""
    names_by_path: dict[str, set[str]] = {}
    for path in _leaves(layout):
        names = path.split(".")
        for depth, name in enumerate(names):
            names_by_path.setdefault(".".join(names[:depth]), set()).add(name)
    return names_by_path


@dataclass(frozen=True)
class BoundEncoderLayer(Bound):
    """A fused encoder layer, bound to one module, with its sublayers. `holders` are the modules between the layer and
    its leaves; `norms` are those after attention and feed-forward.
    """

    layout: Block
    attention: BoundAttention
    block: BoundFeedForward
    holders: tuple[nn.Module, ...]
    norms: tuple[BoundNorm | None, ...]

    @property
    def traced(self) -> tuple[str, ...]:
        """Return the paths, relative to the layer, of the modules whose calls `branches` needs."""
        return self.layout.linears[3:]

    def accepts(self, options: Options) -> bool:
        """Return whether all arguments of a call, besides the hidden states, are known."""
        return knows_all(self.attention.settings, options, READ)

    def run(self, x: Tensor, options: Options) -> Tensor | None:
        """Return the output (B, T, d) for x (B, T, d), or None if the layer's own `forward` must run."""
        prepared = self._prepare(x, options)
        if prepared is None:
            return None
        attended, fed, (first, second) = prepared
        return normalize(fed.run(normalize(attended.run(x, residual=True), first), residual=True), second)

    def branches(self, x: Tensor, options: Options, inside: Calls) -> Pairs:
        """Pair each recorded branch (B, T, d) with the branch that the fused `forward` adds to a residual."""
        output, up, down = (inside[path] for path in self.traced)
        prepared = self._prepare(x, options)
        if prepared is None:
            return [(None, output.output)]
        attended, fed, _ = prepared
        return [(attended.run(x, residual=False), output.output), (fed.run(up.args[0], residual=False), down.output)]

    def _prepare(self, x: Tensor, options: Options) -> _Prepared | None:
        """Return the operands for hidden states x (B, T, d), or None if any operand is unknown."""
        if x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
            return None  # a layer norm returns float32 under autocast
        norms = [norm for norm in operands_of(self.norms) or () if norm is not None and norm.weight.dtype == x.dtype]
        sublayers = (self.layout.attention, self.layout.feed_forward)
        first, second = (dropout_p(module_at(self.module, one.dropout)) for one in sublayers)
        is_seen = any(is_watched(holder, captures=False) for holder in self.holders)
        if is_seen or len(norms) != 2 or first is None or second is None:
            return None
        attended = attention.prepare(self.attention, x, None, options, first)
        fed = None if attended is None else feed_forward.prepare(self.block, x, None, second)
        return None if attended is None or fed is None else _Prepared(attended, fed, norms)


class _Prepared(NamedTuple):
    """Operands of a layer for one call; `norms` contains the norms after attention and after the feed-forward block."""

    attention: PreparedAttention
    feed_forward: PreparedFeedForward
    norms: list[Norm]


def match(module: nn.Module) -> BoundEncoderLayer | str:
    """Return the fused `forward` of an encoder layer, or why the module is not a supported encoder layer."""
    layout = layout_of(module)
    if layout is None:
        return "unknown children for an encoder layer"
    holder, modules = attribute_at(module, layout.attention.inner), layout.attention_modules
    bound = attention.bind(holder, modules, ("attention_head_size",))
    if bound is None or dropout_p(module_at(holder, modules.weights_dropout)) is None:
        return "unknown attributes for an attention module"
    if bound.causal:
        return "its attention is causal"
    if reason := unknown_implementation(bound.settings):
        return reason
    block = feed_forward.bind(module, _relative(layout))
    if isinstance(block, str):
        return block
    inside = _holders(layout)
    holders = {path: attribute_at(module, path) for path in inside}
    if any(getattr(holder, "is_cross_attention", False) for holder in holders.values()):
        return "not self-attention"
    if any(getattr(holder, "chunk_size_feed_forward", 0) for holder in holders.values()):
        return "its feed-forward block runs in chunks"
    reasons = (unknown_attributes(holders[path], ATTRIBUTES, tuple(names)) for path, names in inside.items())
    if reason := next((reason for reason in reasons if reason is not None), None):
        return reason
    norms = tuple(bound_norm(attribute_at(module, path)) for path in layout.norms)
    inner = tuple(child for path, child in holders.items() if path)
    return BoundEncoderLayer(module, layout, bound, block, inner, norms)


def _relative(layout: Block) -> FeedForwardLayout:
    """Return the layout of the feed-forward block with paths relative to the layer."""
    modules = layout.feed_forward_modules
    assert modules is not None  # encoder layers have no experts
    return replace(modules, inner=layout.inputs[1], down=layout.outputs[1], activation=layout.activations)
