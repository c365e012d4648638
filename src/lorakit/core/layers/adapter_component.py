"""`AdapterComponent`, the protocol for everything that carries adapters, and base classes for adapted modules.

Operations on a whole model (merge, unmerge, detach, save) call the protocol's methods on each component. In a merge or
unmerge, every component first stages its change; the changes are committed only after all components have staged
theirs. `AdapterModule` also has PEFT's methods, for programs that switch adapters module by module.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from lorakit.core.routing.recompute import Forwards
from lorakit.core.routing.route import BASE, Route
from lorakit.core.routing.state import AdapterState, resolve
from lorakit.errors import MergeError, MixedRowsError, ModelError, warn_caller

P = ParamSpec("P")
R = TypeVar("R")
Value = TypeVar("Value")
Model = TypeVar("Model", bound=nn.Module)


def trainable_tensors(function: Callable[Concatenate[Model, P], R]) -> Callable[Concatenate[Model, P], R]:
    """Wrap a function of a model or a layer so that its new tensors are trainable even in inference mode."""

    @wraps(function)
    def called(model: Model, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with trainable(model, next(model.parameters(), None)):
            return function(model, *args, **kwargs)

    return called


def trainable(model: nn.Module, first: nn.Parameter | None) -> AbstractContextManager[object]:
    """Return a context in which new tensors are trainable, even within `torch.inference_mode`.

    `first` is any parameter (any shape) of the model, or None if it has none. If the model was created outside of
    inference mode, the context turns inference mode off; otherwise, a ModelError is raised unless inference mode is on.
    """
    inside = torch.is_inference_mode_enabled()
    if (first is not None and first.is_inference()) == inside:
        return nullcontext()
    if not inside:
        text = f"This {type(model).__name__} was created in torch.inference_mode(), so torch cannot train it."
        raise ModelError(text, what=type(model).__name__)
    return torch.inference_mode(False)


KeepBase = Literal[True, False, "cpu"]


@dataclass(frozen=True)
class MergeOptions:
    """Merge options.

    Attributes:
        keep_base: Keep each original weight on its device (True) or in main memory ("cpu"), or discard it (False).
        in_place: Whether the adapters stay on the model; if so, they are merged into a residual base if there is one,
            because unmerged adapters may use it.
        dense: If set, quantized modules and grouped convolutions are replaced with plain modules. The value is the
            dtype of the new weight if a quantized module does not record its original dtype.
        apart: Ids of the components that must get a separate parameter because they share one with other modules.
    """

    keep_base: KeepBase = True
    in_place: bool = True
    dense: torch.dtype | None = None
    apart: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SiteMerge:
    """The effect of a merge on the weight of one site.   [docs/math.md (12)]

    Attributes:
        retained: Fraction of the delta that the stored weight W' retains: 1 − ‖W' − (W₀ + Δ)‖ / ‖Δ‖, but at least 0.
        changed: Fraction of the weight's elements that changed.
        error: Relative error of the stored weight: ‖W' − (W₀ + Δ)‖ / ‖W₀ + Δ‖.
    """

    path: str
    retained: float
    changed: float
    error: float


@dataclass(frozen=True)
class StagedMerge:
    """A staged change to one component: its effect on a weight, or None, and `commit`, which cannot fail."""

    report: SiteMerge | None
    commit: Callable[[], None]


class AdapterComponent:
    """Protocol for everything that carries adapters: layers, saved modules, trainable tokens and trained biases.

    All adapted modules of a model share one `state`.
    """

    state: AdapterState

    @abstractmethod
    def available_adapters(self) -> list[str]:
        """Return the adapters that have parameters in this component."""

    @abstractmethod
    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """Return a list of an adapter's parameters in this component, A and B first; empty if there are none."""

    def set_trained(self, name: str, trained: bool) -> None:
        """Unfreeze or freeze an adapter's parameters here, if it has any."""
        for parameter in self.parameters_of(name):
            if parameter.requires_grad is not trained:
                parameter.requires_grad_(trained and parameter.is_floating_point())

    @abstractmethod
    def saved_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return the tensors to save for an adapter, keyed by their names relative to this component's path."""

    @abstractmethod
    def remove(self, adapter: str) -> nn.Module:
        """Remove an adapter's parameters, if any; return this module, or the plain module if no adapters are left."""

    @abstractmethod
    def stage_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> StagedMerge | None:
        """Prepare to merge adapters, changing nothing; return None without any, or raise a MergeError."""

    @abstractmethod
    def stage_unmerge(self, adapters: Sequence[str]) -> StagedMerge | None:
        """Prepare to restore the original values bit for bit, or raise a MergeError; return None if there are none."""

    @abstractmethod
    def merged_tensors(self, adapters: Sequence[str], options: MergeOptions) -> dict[str, Tensor]:
        """Return this component's base tensors with adapters merged in, keyed by their names in the plain module."""

    @abstractmethod
    def unload(self) -> nn.Module:
        """Return the plain module; merged adapters remain in its weights, and all others are dropped."""


def base_not_kept(merged: Sequence[str], path: str | None = None) -> MergeError:
    """Return the error for a call that needs the base values of a module at `path`, which a merge did not keep."""
    names = ", ".join(merged)
    text = (
        f"The merge of {names} into the base{f' at {path}' if path else ''} did not keep the base's values "
        "(keep_base=False), so neither the base alone nor other adapters can be used. Reload the base; to keep its "
        "values, merge with keep_base=True."
    )
    return MergeError(text, what=names, where=path)


class TunerLayer:
    """A module that other programs switch and disable, layer by layer, as PEFT's `BaseTunerLayer`."""


class AdapterModule(nn.Module, AdapterComponent):
    """A module in which adapters can be active.

    Attributes:
        own_route: This module's override of the model's default route, or None.
        aside: A one-element tuple with the override that applied before this module's adapters were disabled; empty
            while the adapters are enabled.
    """

    state: AdapterState
    merged_adapters: list[str]
    own_route: Route | None
    aside: tuple[Route | None, ...] = ()

    def __setstate__(self, known: dict[str, Any]) -> None:
        super().__setstate__(known)
        self.state.join(self)  # a copy joins the copied state

    def check_not_merged(self, path: str, adapters: Sequence[str]) -> None:
        """Raise a MergeError if any of these adapters is already merged here."""
        twice = next((name for name in adapters if name in self.merged_adapters), None)
        if twice is not None:
            raise MergeError(f"Adapter {twice!r} is already merged. Unmerge it first.", what=twice, where=path)

    def kept_bytes(self) -> int:
        """Return the total size, in bytes, of the original tensors that were kept when adapters were merged."""
        return 0

    def check_mergeable(self, path: str, adapters: Sequence[str]) -> None:
        """Raise a MergeError if an adapter can never be merged here, whatever is merged now; nothing is computed."""

    def check_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> None:
        """Raise a MergeError if a merge is impossible here now; nothing is computed."""
        self.check_mergeable(path, adapters)

    def check_unmerge(self, path: str, adapters: Sequence[str]) -> None:
        """Raise a MergeError if an adapter that is merged here cannot be unmerged: the base values were not kept."""

    def drop_override(self, name: str) -> None:
        """Drop this module's override of the default route if it names an adapter that is being removed."""
        if self.own_route is not None and name in self.own_route.mentions:
            self.own_route = None
        if self.aside and self.aside[0] is not None and name in self.aside[0].mentions:
            self.aside = (None,)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that are active in this module, or would be if adapters were enabled."""
        if self.aside:
            chosen = self.aside[0] or self.state.chosen
        else:
            now = self.state.active() if self.own_route is None else self.own_route
            chosen = now if now.mentions or self.own_route is not None else self.state.chosen
        return list(chosen.names)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the adapter that is active in this module; a list of names unless exactly one is active."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def _active_adapter(self) -> str | list[str]:
        """Override the model's default route in this module; neither `requires_grad` nor `disable_adapters` changes."""
        return self.active_adapter

    @_active_adapter.setter
    def _active_adapter(self, names: str | Sequence[str]) -> None:
        """Override the model's default route in this module; neither `requires_grad` nor `disable_adapters` changes.

        Raises:
            RouteError: One of the adapters is not on the model.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        self.state.check(names)
        if self.aside:
            self.aside = (Route(names),)
        else:
            self.own_route = Route(names)

    @property
    def disable_adapters(self) -> bool:
        """True if adapters are disabled by `enable_adapters(False)`, a model-wide setting, or a scoped override."""
        if self.aside or self.state.aside is not None:
            return True
        return not self.state.active().mentions and bool(self.state.chosen.names)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable this module's adapters; `requires_grad` does not change."""
        if not enabled and not self.aside:
            self.aside, self.own_route = (self.own_route,), BASE
        elif enabled and self.aside:
            self.own_route, self.aside = self.aside[0], ()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Override the model's default route in this module until `activate` is called; freeze all other adapters here.

        An empty list selects the base alone. In `inference_mode`, the named adapters are frozen too. A RouteError is
        raised if one of them is not on the model.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.state.check(names)
        self.own_route, self.aside = Route(names), ()
        for name in self.available_adapters():
            self.set_trained(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Unfreeze or freeze adapters here, whether they are active or not."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.set_trained(name, requires_grad)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Remove an adapter's parameters here; `new_active_adapters` is ignored, and present for PEFT compatibility.

        If it was the only active adapter, the remaining adapter that comes first alphabetically becomes active.
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
        """Return `available_adapters()` as a set, for compatibility with PEFT."""
        return set(self.available_adapters())


class ReplacingModule(AdapterModule):
    """Base class for adapted modules whose active adapter replaces the whole base module or some rows of its weight.

    `_what` describes this type of module in messages, and `_field` is the config field that selects such modules.
    """

    _what: ClassVar[str]  # leading underscores, so as not to hide attributes of the module
    _field: ClassVar[str]
    forwards: Forwards

    def __init__(self, training: bool, state: AdapterState) -> None:
        super().__init__()
        self.training, self.state, self.forwards, self.own_route = training, state, Forwards(), None
        state.join(self)

    def __contains__(self, name: str) -> bool:
        return name in self.available_adapters()

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that have parameters here and are active, or would be active if adapters were enabled."""
        return [name for name in super().active_adapters if name in self]

    @property
    def _adapters(self) -> set[str]:
        """The set of adapters that have parameters in this module; present for compatibility with PEFT."""
        return self._get_available_adapters()

    @abstractmethod
    def run_alike(self, route: Route, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
        """Return the output for a route that is the same for all rows, or raise a RouteError."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output for the active adapters; in a mixed batch, each adapter processes its own rows.

        In a mixed batch, the first axis of every tensor must be the batch axis. A RouteError is raised for a wrong
        route.
        """
        route, again = resolve(self.state, self.own_route, self.forwards)
        output = self.run_alike(route, args, kwargs) if route.rows is None else self._mixed(route, args, kwargs)
        self.forwards.note(output, route, again)
        return output

    def _mixed(self, route: Route, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Run each adapter's rows of a mixed batch separately and return the outputs in row order, (rows, …)."""
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        rows = None if x is None else route.rows_of(x.shape[0])
        if x is None or rows is None:
            shape = "unknown, because there is no tensor" if x is None else tuple(x.shape)
            raise route.mismatch(f"the input of {self._what}", shape, None, self._field)
        outputs: list[Tensor] = []
        indices = []
        for row in dict.fromkeys(rows):
            index = torch.tensor([i for i, other in enumerate(rows) if other == row], device=x.device)
            alone = BASE if row is None else Route((row,))
            some = [_rows_of(value, index, len(rows)) for value in args]
            named = {key: _rows_of(value, index, len(rows)) for key, value in kwargs.items()}
            with self.state.override(alone):  # nested adapted modules see only these rows
                output = self.run_alike(alone, some, named)
            if not isinstance(output, Tensor):
                name = type(output).__name__
                text = f"The output of {self._what} is a {name}, whose rows cannot be concatenated; `use` one adapter."
                raise MixedRowsError(text, what=name, field=self._field)
            outputs.append(output)
            indices.append(index)
        return torch.cat(outputs).index_select(0, torch.cat(indices).argsort())


def _rows_of(value: Value, index: Tensor, rows: int) -> Value | Tensor:
    """Return the rows of a tensor (rows, …) at the given indices (n,); return any other value unchanged."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
        return value.index_select(0, index)
    return value
