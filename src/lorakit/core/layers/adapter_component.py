"""Everything that carries adapter state: the protocol `AdapterComponent`, and the base class of modules that carry it.

Calls on a whole model (merge, unmerge, detach, save) go through the protocol, component by component: a component
stages its change, and commits it after all others have staged theirs. `AdapterModule` also answers which adapters act
in it, in PEFT's words, for programs that switch adapters module by module. Factors and weights are not known here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from lorakit.core.routing.recompute import Forwards
from lorakit.core.routing.route import BASE, Route
from lorakit.core.routing.state import AdapterState
from lorakit.errors import MixedRowsError, ModelError, RowCountError, warn_caller

Function = TypeVar("Function", bound=Callable[..., Any])


def trainable_tensors(function: Function) -> Function:
    """Wrap a function over a model, so that tensors that it makes can be trained if it is called in inference mode.

    Args:
        function: Takes the model, or a layer, first.
    """

    @wraps(function)
    def called(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with trainable(model, next(model.parameters(), None)):
            return function(model, *args, **kwargs)

    return cast(Function, called)


def trainable(model: nn.Module, first: nn.Parameter | None) -> AbstractContextManager[object]:
    """Return a block whose new tensors can be trained afterwards, also inside `torch.inference_mode`.

    A base from outside a block of `torch.inference_mode` gets tensors as if there were no block. A base that was made
    in one can only be used in one.

    Args:
        model: The model, or a layer.
        first: A parameter (any shape) of it, or None if it has none.

    Raises:
        ModelError: The model was made in inference mode, and this is outside of it.
    """
    inside = torch.is_inference_mode_enabled()
    if (first is not None and first.is_inference()) == inside:
        return nullcontext()
    if not inside:
        raise ModelError(
            f"This {type(model).__name__} was made in torch.inference_mode(), so torch neither trains it nor tracks it "
            "outside of such a block. Make or load it outside, or work with it inside."
        )
    return torch.inference_mode(False)


KeepBase = Literal[True, False, "cpu"]


@dataclass(frozen=True)
class MergeOptions:
    """How adapters are merged.

    Attributes:
        keep_base: Keep each original weight on its device (True), in main memory ("cpu"), or not (False).
        in_place: Adapters stay on the model, so a weight must also be right for an adapter whose init moved the base.
        dense: Dtype of the plain module that replaces a quantized one whose matmuls have no dtype of their own, and a
            convolution with groups; None: quantized modules stay.
        apart: The ids of components that get a parameter of their own, because they share one with other modules.
    """

    keep_base: KeepBase = True
    in_place: bool = True
    dense: torch.dtype | None = None
    apart: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SiteMerge:
    """What a merge did to the weight of one site.   [docs/math.md (12)]

    Attributes:
        path: The site.
        retained: Fraction of the delta in the stored weight, 1 − ‖W' − (W₀ + Δ)‖ / ‖Δ‖, at least 0.
        changed: Fraction of the weight's elements that changed.
        error: Relative error of the stored weight: ‖W' − (W₀ + Δ)‖ / ‖W₀ + Δ‖.
    """

    path: str
    retained: float
    changed: float
    error: float


@dataclass(frozen=True)
class StagedMerge:
    """A change of one component that is ready to be made.

    Attributes:
        report: What the merge does to the weight; None if the component has none, and when unmerging.
        commit: Makes the change. It raises nothing: staging has checked everything and allocated the memory.
    """

    report: SiteMerge | None
    commit: Callable[[], None]


class AdapterComponent:
    """Protocol of everything that carries adapters: layers, saved modules, trainable tokens and trained biases.

    Attributes:
        state: The state shared by the adapted modules of the model.
    """

    state: AdapterState

    @abstractmethod
    def available_adapters(self) -> list[str]:
        """Return the adapters that have parameters here."""

    @abstractmethod
    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """Return an adapter's parameters here, (…); A and B first; an empty list if it has none."""

    @abstractmethod
    def saved_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return the tensors of an adapter that a file stores: key below this component's path -> tensor (…)."""

    @abstractmethod
    def remove(self, adapter: str) -> nn.Module:
        """Remove an adapter's parameters, if it has any, and return the module that belongs here afterwards."""

    @abstractmethod
    def stage_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> StagedMerge | None:
        """Prepare to merge adapters and change nothing; None if they have nothing here.

        Raises:
            MergeError: The result is not finite, or the component cannot take these adapters.
        """

    @abstractmethod
    def stage_unmerge(self, adapters: Sequence[str]) -> StagedMerge | None:
        """Prepare to unmerge adapters; committing restores the bits. None if none of them is merged here.

        Raises:
            MergeError: The base's values were not kept.
        """

    @abstractmethod
    def merged_tensors(self, adapters: Sequence[str], options: MergeOptions) -> dict[str, Tensor]:
        """Return the base's tensors here with adapters merged: name in the plain module -> tensor (…)."""

    @abstractmethod
    def unload(self) -> nn.Module:
        """Return the plain module, with the merged adapters and without any other."""


class AdapterModule(nn.Module, AdapterComponent):
    """A module in which adapters can be active.

    Attributes:
        state: The state shared by the adapted modules of the model.
        own_route: This module's override of the model's default, or None.
        aside: The override that was active before this module's adapters were disabled; a tuple, empty if they are
            enabled.
    """

    state: AdapterState
    own_route: Route | None
    aside: tuple[Route | None, ...] = ()

    def __setstate__(self, known: dict[str, Any]) -> None:
        super().__setstate__(known)
        self.state.join(self)  # a copy belongs to the copied state

    def merged_here(self) -> Sequence[str]:
        """Return the adapters that are merged here now."""
        return ()

    def kept_bytes(self) -> int:
        """Return the memory of the originals that merges kept."""
        return 0

    def check_mergeable(self, path: str, adapters: Sequence[str]) -> None:
        """Reject adapters that no weight can hold, whatever is merged now; nothing is computed.

        Args:
            path: This module's path, for messages.
            adapters: Adapters; those without parameters here are ignored.

        Raises:
            MergeError: One of them cannot be merged here.
        """

    def check_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> None:
        """Reject a merge that this module cannot take now; nothing is computed.

        Args:
            path: This module's path, for messages.
            adapters: Adapters; those without parameters here are ignored.
            options: How they are merged.

        Raises:
            MergeError: One of them cannot be merged here, or is merged already.
        """
        self.check_mergeable(path, adapters)

    def check_unmerge(self, path: str, adapters: Sequence[str]) -> None:
        """Reject to unmerge adapters if the base's values were not kept.

        Args:
            path: This module's path, for messages.
            adapters: Adapters; those that are not merged here are ignored.

        Raises:
            MergeError: The message names the adapter and the path.
        """

    def drop_override(self, name: str) -> None:
        """End this module's override of the model's default if it names an adapter that leaves."""
        if self.own_route is not None and name in self.own_route.mentions:
            self.own_route = None
        if self.aside and self.aside[0] is not None and name in self.aside[0].mentions:
            self.aside = (None,)

    def set_trained(self, name: str, trained: bool) -> None:
        """Train what an adapter has here, or freeze it.

        Args:
            name: The adapter; one that has nothing here is no matter.
            trained: Its parameters require gradients.
        """
        for parameter in self.parameters_of(name):
            if parameter.requires_grad is not trained:
                parameter.requires_grad_(trained and parameter.is_floating_point())

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act here, also while they are disabled."""
        if self.aside:
            chosen = self.aside[0] or self.state.chosen
        else:
            now = self.state.active() if self.own_route is None else self.own_route
            chosen = now if now.mentions or self.own_route is not None else self.state.chosen
        return list(chosen.names)

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter that acts here, or a list where there is not exactly one."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off here: by `enable_adapters`, for the model, or by a block around it."""
        if self.aside or self.state.aside is not None:
            return True
        return not self.state.active().mentions and bool(self.state.chosen.names)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch this module's adapters off, or on again; what is trained stays so.

        Args:
            enabled: On.
        """
        if not enabled and not self.aside:
            self.aside, self.own_route = (self.own_route,), BASE
        elif enabled and self.aside:
            self.own_route, self.aside = self.aside[0], ()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an exception to the model's default in this module alone; `activate` on the model ends it.

        Args:
            adapter_names: One adapter or several; none means the base alone. They alone are trained here.
            inference_mode: They are not trained either.

        Raises:
            RouteError: There is no such adapter on the model.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.state.check(names)
        self.own_route, self.aside = Route(names), ()
        for name in self.available_adapters():
            self.set_trained(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters here, or freeze them, whatever acts.

        Args:
            adapter_names: One adapter or several.
            requires_grad: Train them.
        """
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.set_trained(name, requires_grad)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Drop what an adapter has here; where it alone acted, the first that is left does.

        Args:
            adapter_name: The adapter; one that has nothing here is no matter.
            new_active_adapters: PEFT's; what acts follows from what is left.
        """
        active = self.active_adapters
        self.remove(adapter_name)
        if adapter_name not in active:
            return
        rest = [name for name in active if name != adapter_name]
        left = sorted(self.available_adapters())
        if not rest and left:
            warn_caller(f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.")
        self.set_adapter(rest or left[:1])

    def _get_available_adapters(self) -> set[str]:
        """PEFT's name for `available_adapters`."""
        return set(self.available_adapters())


class ReplacingModule(AdapterModule):
    """A module that is replaced, as a whole or in some rows, in the forwards of its adapters.

    Attributes:
        forwards: The forwards so far, for recomputation.
    """

    forwards: Forwards

    def __init__(self, training: bool, state: AdapterState) -> None:
        super().__init__()
        self.training, self.state, self.forwards = training, state, Forwards()
        self.own_route = None
        state.join(self)

    def __contains__(self, name: str) -> bool:
        return name in self.available_adapters()

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that have parameters here, even while they are disabled."""
        return [name for name in super().active_adapters if name in self]

    @property
    def _adapters(self) -> set[str]:
        """PEFT's name for `available_adapters`."""
        return set(self.available_adapters())

    @staticmethod
    def _by_adapter(
        route: Route, x: Tensor | None, what: str, field: str, run: Callable[[Route, Tensor], object]
    ) -> Tensor:
        """Run the rows of each adapter of a mixed batch by themselves and return all outputs in order.

        Args:
            route: It has rows.
            x: The first tensor of the batch, (rows, …), or None if there is none.
            what: Name of the module, for messages.
            field: Field of the config that selects such modules, for errors.
            run: Route of one adapter, indices of its rows (n,) -> output, (n, …).

        Raises:
            RowCountError: The route does not fit the batch.
            MixedRowsError: An output is not a tensor.
        """
        rows = None if x is None else route.rows_of(x.shape[0])
        if x is None or rows is None:
            raise RowCountError(
                f"The route names {len(route.rows or ())} rows, and {what} received "
                f"{'no tensor' if x is None else tuple(x.shape)}. Give one adapter per row of the batch."
            )
        outputs: list[Tensor] = []
        indices = []
        for row in dict.fromkeys(rows):
            index = torch.tensor([i for i, other in enumerate(rows) if other == row], device=x.device)
            output = run(BASE if row is None else Route((row,)), index)
            if not isinstance(output, Tensor):
                name = type(output).__name__
                raise MixedRowsError(
                    f"The output of {what} is a {name}, whose rows cannot be concatenated. Run the rows of each "
                    "adapter by themselves with `use`.",
                    what=name,
                    field=field,
                )
            outputs.append(output)
            indices.append(index)
        return torch.cat(outputs).index_select(0, torch.cat(indices).argsort())
