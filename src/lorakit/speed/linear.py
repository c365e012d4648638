"""Operands that linear modules contribute to a fused operation, and fused linear modules with adapters.

A module has operands only if it is frozen, dense or an `Int8Linear`, unmerged and without hooks, and if it applies at
most one adapter, from lorakit or peft, which must be plain LoRA and the same for all rows. Otherwise, it is called
normally. All state is read on every call: which adapters are active, disabled or merged, and their scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.choices import CONV1D
from lorakit.config.lora import PEFT_TABLES_OF_VARIANTS
from lorakit.core.clones import share_dropped
from lorakit.core.layers.batched import called_factors, kept_stacks
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.named_layers import WeightLayer
from lorakit.core.quantization.int8_linear import Int8Linear
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import resolve
from lorakit.identity.identities import is_plain_linear
from lorakit.ops.adapted import Adapted, LowRank, factors
from lorakit.ops.kernels import kernels_for
from lorakit.ops.kernels.decoder_layer import MOST_LOW_RANKS, RowLinear
from lorakit.ops.linear import linears
from lorakit.speed.admission import Bound
from lorakit.speed.contract import is_adapted, is_peft_linear
from lorakit.speed.few_rows import Linear
from lorakit.speed.patching import Forwards, Options, is_watched


def operand(module: nn.Module, route: Route | None) -> Adapted | None:
    """Return the operands of a lorakit layer or a module of the base for a route, None if the model has no adapters.
    They are W (out, in) or (in, out), bias (out,) and, for an active adapter, A (r, in) and B (out, r), or None.
    """
    if is_watched(module):
        return None
    if not isinstance(module, LoraLayer):
        return frozen_linear(module)
    if route is None or route.rows is not None or module.own_route is not None or module.merged_adapters:
        return None
    owner = module.owner
    names = [name for name in route.names if name in module.r]
    if module.base_layer is not owner or is_watched(owner) or len(names) > 1:
        return None
    if not route.common_to_all(module.inside()):
        return None
    base = frozen_linear(owner)
    if base is None or not names:
        return base
    factor = module.factor(names[0])
    if called_factors(module, names[0]) is not None:
        return None
    if not factor.variant.is_lora or factor.bias is not None or module.kind.acts_on != "input":
        return None
    return _with_adapter(base, (factor.A, factor.B), factor.scale, factor.dropout)


def frozen_linear(module: nn.Module) -> Adapted | None:
    """Return W (out, in), or (in, out) of Conv1D, and bias (out,) of a frozen linear module, or None for any other."""
    kind = type(module)
    if kind is Int8Linear:
        return _int8_linear(cast(Int8Linear, module))
    is_linear = is_plain_linear(module)
    if not is_linear and not (kind.__name__ == CONV1D and kind.__module__ == "transformers.pytorch_utils"):
        return None
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.requires_grad:
        return None
    bias = module._parameters.get("bias")
    if bias is not None and bias.requires_grad:
        return None
    return Adapted(weight, bias, None, not is_linear)


def _int8_linear(module: Int8Linear) -> Adapted | None:
    """Return the operands of an int8 layer, or None if a parameter is trained or is not an ordinary one."""
    parameters = module._parameters.values()
    if any(each is not None and (type(each) is not nn.Parameter or each.requires_grad) for each in parameters):
        return None
    return Adapted(module.int8, module.bias)


def _with_adapter(base: Adapted, pair: tuple[Tensor, Tensor], scale: float, dropout: nn.Module) -> Adapted | None:
    """Add A (r, in) and B (out, r) to the operands of a linear module; return None if `dropout` is not supported."""
    p = share_dropped(dropout)
    return None if p is None else Adapted(base.W, base.bias, LowRank(*pair, scale, p), base.transposed)


def route_of(modules: Sequence[nn.Module]) -> Route | None:
    """Return the route of a call to modules of one model, or None if none of them has an adapter from lorakit."""
    layer = next((module for module in modules if isinstance(module, LoraLayer)), None)
    return None if layer is None else resolve(layer.state, layer.own_route, layer.forwards)[0]


def row_linear(module: nn.Module, route: Route | None, x: Tensor) -> RowLinear | None:
    """Return the operands of a linear module for inputs like x (rows, …, in) in generation, or None if it is called.

    These are a base that multiplies few rows, and stacks of plain adapters, one per row; nothing has a hook.
    """
    base, stacks = module, list[tuple[Tensor, Tensor, Tensor]]()
    if isinstance(module, LoraLayer):
        if is_watched(module) or module.own_route is not None or module.merged_adapters or module.moved_by:
            return None
        found = None if route is None else kept_stacks(module, route, x)
        if found is None:
            return None
        base, stacks = module._modules["base_layer"], found
    if type(base) is not Linear or is_watched(base) or len(stacks) > MOST_LOW_RANKS:
        return None
    weight, bias = base._parameters["weight"], base._parameters["bias"]
    if type(weight) is not nn.Parameter or not _has_rows(weight, x):
        return None
    if bias is not None and kernels_for(x, bias) is None:
        return None
    return RowLinear(weight, bias, stacks)


def _has_rows(weight: Tensor, x: Tensor) -> bool:
    """Return whether a weight (out, in) is like x (…, in), and its rows are contiguous."""
    is_like = weight.dtype == x.dtype and weight.device == x.device and weight.ndim == 2
    return is_like and weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1]


READ = ("active_adapters", "lora_A", "lora_B", "lora_dropout", "scaling")
"""Attributes that are read from a peft layer: the names of its active adapters, and dictionaries keyed by adapter."""

ODD_TABLES = ("lora_variant", "lora_bias", *PEFT_TABLES_OF_VARIANTS)
"""Dictionaries in current or older peft versions. A truthy entry means that an adapter is not plain LoRA."""


def peft_operand(module: nn.Module) -> Adapted | None:
    """Return the current operands of a module for which `is_peft_linear` is true, as `operand` does: W (out, in)."""
    if is_watched(module) or not all(hasattr(module, name) for name in READ) or module.merged:
        return None
    active, *tables = (getattr(module, name) for name in READ)
    base = module._modules["base_layer"]
    operands = None if base is None or is_watched(base) else frozen_linear(base)
    names = [] if module.disable_adapters else [name for name in active if name in tables[0]]
    if operands is None or not names:
        return operands
    if len(names) > 1 or any(_entry(getattr(module, table, None), names[0]) for table in ODD_TABLES):
        return None
    down, up, dropout, scale = (table[names[0]] for table in tables)
    if any(type(part) is not nn.Linear or is_watched(part) or part.bias is not None for part in (down, up)):
        return None
    if not isinstance(scale, (int, float)):
        return None
    return _with_adapter(operands, (down.weight, up.weight), float(scale), dropout)


def _entry(table: Mapping[str, Any] | bool | None, name: str) -> bool:
    return bool(table.get(name)) if isinstance(table, dict) else bool(table)


@dataclass(frozen=True)
class ActiveOperands:
    """Operands for one call to several modules that run as a single function. `forwards` is the history of the first
    adapted module; `route` is None if the model has no lorakit adapters.
    """

    operands: list[Adapted]
    forwards: Forwards | None
    route: Route | None
    is_recomputed: bool

    def note(self, y: Tensor) -> None:
        """Record the output y (…, d) in the forward history, in case the backward pass recomputes the call."""
        if self.route is not None and self.forwards is not None:
            self.forwards.note(y, self.route, self.is_recomputed)


def active_operands(modules: Sequence[nn.Module], x: Tensor) -> ActiveOperands | None:
    """Return the operands for one call with x (…, in) to linear modules of one model, or None if any has none.

    The call is recorded in the history of the first adapted module, where its own `forward` records other calls: a
    recomputed call finds its route whichever of the two ran first.
    """
    layer = next((module for module in modules if isinstance(module, LoraLayer)), None)
    forwards, route, is_recomputed = None, None, False
    if layer is not None:
        forwards = layer.forwards
        route, is_recomputed = resolve(layer.state, layer.own_route, forwards)
    operands = []
    for module in modules:
        one = peft_operand(module) if is_peft_linear(module) else operand(module, route)
        if one is None or not _is_here(one, x):
            return None
        operands.append(one)
    return ActiveOperands(operands, forwards, route, is_recomputed)


def _is_here(one: Adapted, x: Tensor) -> bool:
    """Return whether all operands are unsharded, are on the device of x (…, in), and have a supported dtype."""
    is_cast = torch.is_autocast_enabled(x.device.type)
    if not is_cast and any(base is not None and base.dtype != x.dtype for base in (one.W, one.bias)):
        return False
    base = (one.W,) if isinstance(one.W, Tensor) else (one.W.q, one.W.columns)
    tensors = (*base, one.bias, *factors([one]))
    # a sharded tensor has a different type (DTensor)
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and t.device == x.device) for t in tensors)


@dataclass(frozen=True)
class BoundLinear(Bound):
    """A fused linear module with an adapter, bound to one adapter layer."""

    def run(self, x: Tensor, options: Options) -> Tensor | None:
        """Return the output (…, out) for x (…, in), or None if the layer's own `forward` must run."""
        acting = active_operands([self.module], x)
        if acting is None or acting.operands[0].low is None:  # without an adapter, a fused `forward` gains nothing
            return None
        (y,) = linears(x, acting.operands)
        acting.note(y)
        return y


def match(module: nn.Module) -> BoundLinear | str:
    """Return the fused `forward` of a linear module with an adapter, or why the module is not supported."""
    if not is_adapted(module):
        return "it has no adapter"
    if isinstance(module, WeightLayer):
        return f"dense weights: {module.why_dense()}"
    base: nn.Module = getattr(module, "owner" if isinstance(module, LoraLayer) else "base_layer")
    return "its base is not a plain, frozen linear module" if frozen_linear(base) is None else BoundLinear(module)


def concerns(module: nn.Module) -> bool:
    """Return whether to report an adapter layer that has no fused `forward`: any but known experts, which need none."""
    return is_adapted(module) and not (isinstance(module, WeightLayer) and not module.why_dense())
