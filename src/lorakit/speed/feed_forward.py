"""Fused feed-forward blocks, either gated (SwiGLU, GeGLU) or plain, with adapters, dropout and a norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from lorakit.architectures.families import FEED_FORWARD
from lorakit.architectures.layouts import FeedForwardLayout
from lorakit.ops.activation import activation
from lorakit.ops.mlp import Form, mlp
from lorakit.ops.norm import Norm
from lorakit.speed.admission import Bound
from lorakit.speed.linear import ActiveOperands, active_operands
from lorakit.speed.norm import dropout_p
from lorakit.speed.patching import RECOMPUTES, Options, attribute_at, children_of, modules_at
from lorakit.speed.submodules import (
    activation_of,
    is_activation_watched,
    unknown_activation,
    unknown_attributes,
)

ATTRIBUTES = frozenset({"config", "hidden_size", "intermediate_size", "mlp_bias", "layer_idx", "embed_dim"})
"""Known attributes of feed-forward modules. If an attribute has an effect, a probe shows it."""


@dataclass(frozen=True)
class BoundFeedForward(Bound):
    """A fused feed-forward block, bound to the module that holds it; `act` is a name in `lorakit.ops.activation`."""

    layout: FeedForwardLayout
    act: str

    def run(self, x: Tensor, options: Options) -> Tensor | None:
        """Return the output for x (…, d), or None if the block's own `forward` must run."""
        prepared = prepare(self, x, None)
        return None if prepared is None else prepared.run(x, residual=False)


def match(module: nn.Module) -> BoundFeedForward | str:
    """Return the fused `forward` of a feed-forward block, or why the module is not a supported block."""
    bound = match_children(module)
    if isinstance(bound, str):
        return bound
    return unknown_attributes(module, ATTRIBUTES, bound.layout.children) or bound


def match_children(module: nn.Module) -> BoundFeedForward | str:
    """Return the fused `forward` of a block whose modules are children of `module`, or why they are not supported."""
    layout = _layout(module)
    return "unknown children for a feed-forward block" if layout is None else bind(module, layout)


def bind(module: nn.Module, layout: FeedForwardLayout) -> BoundFeedForward | str:
    """Return the fused `forward` of a block with modules at the paths of a layout, or why it is not supported."""
    function = activation_at(module, layout)
    act = activation_of(function)
    return unknown_activation(function) or "" if act is None else BoundFeedForward(module, layout, act)


class PreparedFeedForward(NamedTuple):
    """The operands of a fused feed-forward block for one call."""

    form: Form
    operands: ActiveOperands

    def run(self, x: Tensor, *, residual: bool) -> Tensor:
        """Return the output (…, d) for x (…, d)."""
        y = mlp(x, self.form._replace(residual=residual))
        self.operands.note(y)
        return y


def prepare(block: BoundFeedForward, x: Tensor, norm: Norm | None, dropout: float = 0.0) -> PreparedFeedForward | None:
    """Return what a block, with the norm before it and dropout after it, needs for x (…, d), which `is_supported`
    accepts, or None if the module's own `forward` must run.
    """
    module, layout = block.module, block.layout
    dropouts = _probabilities(module, layout, dropout)
    if dropouts is None or is_activation_watched(activation_at(module, layout)):
        return None
    operands = active_operands(modules_at(module, layout.linears), x)
    if operands is None:
        return None
    *inner, down = operands.operands
    keep = RECOMPUTES not in module.__dict__
    form = Form(tuple(inner), down, activation(block.act), norm, False, *dropouts, fused=layout.is_fused, keep=keep)
    return PreparedFeedForward(form, operands)


def _probabilities(module: nn.Module, layout: FeedForwardLayout, behind: float) -> tuple[float, float] | None:
    """Return the current dropout probabilities for the output and the inner activation, or None if unknown."""
    inner, output = (dropout_p(module._modules.get(name)) for name in (layout.inner_dropout, layout.output_dropout))
    if inner is None or output is None or (output and behind):
        return None
    return output or behind, inner


def _layout(module: nn.Module) -> FeedForwardLayout | None:
    """Return the layout of a block: of those with its linear modules, the first one with most of its children."""
    children = children_of(module).keys()
    layouts = (one for one in FEED_FORWARD if children >= set(one.linears))
    return max(layouts, key=lambda one: len(children & set(one.children)), default=None)


def activation_at(module: nn.Module, layout: FeedForwardLayout) -> Callable[[Tensor], Tensor] | None:
    """Return the activation of a block, or None."""
    functions = (attribute_at(module, path) for path in layout.activation)
    return next((function for function in functions if function is not None), None)
