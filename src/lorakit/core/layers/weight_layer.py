"""`WeightLayer`: a layer whose factors act on a weight for the length of one forward.

For modules that never show what their weight is multiplied with: bare parameters, fused experts, nn.MultiheadAttention.
One dense weight per adapted weight is made in each forward, but where fused experts show their tokens (`experts`); the
module itself is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import clone_with
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.moe import ExpertFactor, expert_factor, experts_forward, shows_tokens
from lorakit.core.routing.route import BASE, Route
from lorakit.errors import MixedRowsError


class WeightLayer(LoraLayer):
    """A base module, or a layer around it, one of whose weights has low-rank factors."""

    def adapted(self, route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The owner's output, once, as a clone whose adapted weights have their updates in them.

        Args:
            route: Which adapters act.
            args: What the owner takes.
            kwargs: Likewise.

        Raises:
            MixedRowsError: Rows of the batch have different adapters.
            RouteError: The route has another number of rows.
        """
        if route.rows is not None:
            if len(set(route.rows)) > 1:
                raise MixedRowsError(
                    f"The rows of this batch have different adapters, and a {self.kind_name} has one weight for all "
                    "rows. Run the rows of each adapter on their own with `use`, or leave the module out of them.",
                    what=self.kind_name,
                )
            self._check_rows(route, args, kwargs)
            route = Route(tuple(filter(None, route.rows[:1])))
        owner = self.owner
        tensors: dict[str, Tensor] = {}
        factors: dict[str, list[ExpertFactor]] = {}
        for layer in self.chain():
            weight, factors[layer.slot.parameter] = layer.beside_tokens(route)
            if weight is not None:
                tensors[layer.slot.parameter] = weight
        clone = clone_with(owner, tensors)
        for child in self.kind.inner:
            inside = owner._modules[child]
            weight = inside.effective(route) if isinstance(inside, WeightLayer) else None
            if weight is not None:
                clone._modules[child] = clone_with(inside.base_layer, {"weight": weight})  # type: ignore[union-attr, arg-type]
        if any(factors.values()):
            return experts_forward(clone, factors, *args, **kwargs)
        return clone(*args, **kwargs)

    def _check_rows(self, route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse a route that does not fit the batch, where the module shows its rows; no batch is one row."""
        x, axis = args[0] if args else next(iter(kwargs.values()), None), self.kind.row_axis(self.owner)
        if isinstance(x, Tensor) and axis is not None:
            self._row_axis(route, x if x.ndim > 2 else x.unsqueeze(axis))

    def chain(self) -> Iterator[WeightLayer]:
        """The layer and those that stand inside it around the same owner, the outermost first."""
        layer: nn.Module = self
        while isinstance(layer, WeightLayer):
            yield layer
            layer = layer.base_layer

    def effective(self, route: Route) -> Tensor | None:
        """The weight as it acts under a route, in the base's layout and dtype; None where it lies so already.

        Args:
            route: Which adapters act, on all rows.

        Returns:
            (out, in) or as the base stores it, with a graph to A and B.
        """
        names = [name for name in route.names if name in self.r]
        if frozenset(names) == self.inside() == frozenset(self.merged_adapters):
            return None
        self.check_kept()
        with torch.autocast(self.base.device(self.owner, self.slot.parameter).type, enabled=False):
            W = self.read()
            moved = next((name for name in names if name in self.moved_by), None)
            total = W if moved is None else self.read(moved)
            for name in names:
                total = total + self.addition(name, W, self.training)
            stored: Tensor = self.base.write(self.owner, self.original(), total)
        return stored

    def beside_tokens(self, route: Route) -> tuple[Tensor | None, list[ExpertFactor]]:
        """What acts where experts show their tokens; elsewhere the weight has it all and no factor is left.

        Args:
            route: Which adapters act, on all rows.

        Returns:
            The weight (experts, …, …) that shall lie in the module, None where it lies so already, and factors beside.
        """
        names = [name for name in route.names if name in self.r]
        drops = any(isinstance(self.lora_dropout[name], nn.Dropout) for name in names)
        whole = torch.compiler.is_compiling() and not drops  # the tokens of an expert have no size of their own there
        if whole or self.moved_by or not shows_tokens(self.owner, self.slot.parameter):
            return self.effective(route), []
        merged = self.inside() <= set(names)
        beside = [name for name in names if not merged or name not in self.merged_adapters]
        weight = None if merged else self.effective(BASE)
        return weight, [expert_factor(self.slot, self.factor(name).plain(self.training)) for name in beside]
