"""The active adapters: one state object per model, scoped overrides per context, and one function that reads both.

Every layer of a model refers to the model's `AdapterState`. The state's default route applies in every thread and is
replaced, never modified. `use`, `route` and `disable` override the default in a context variable: the override ends
with its block, even if the block raises an error, and no other thread or task sees the override. A forward pass that
autograd recomputes (gradient checkpointing) must not use the adapters that are active *now*: it uses the route of its
first run, or raises an error.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lorakit.config import LoraConfig
from lorakit.core.kinds import Kind
from lorakit.core.routing.recompute import Forwards, Traces
from lorakit.core.routing.route import BASE, Offsets, Route
from lorakit.durable import JsonObject
from lorakit.errors import LorakitError, RouteError


@dataclass(frozen=True)
class Scope:
    """An active override: its block, and the ids of the backward pass (−1 if none) and thread that opened it."""

    block: Override
    backward: int
    thread: int


# Global: a context variable cannot be copied or pickled, so no object in a model may hold it.
_SCOPES: ContextVar[tuple[Scope, ...]] = ContextVar("lorakit_scopes", default=())


OF_THIS_PROCESS = frozenset({"_open", "_told", "_members", "whole", "places"})  # copied members join again


class Place(NamedTuple):
    """Where an adapted module was when the model was last indexed: its path, and its name in its parent.

    The module and the parent are weak references; `adapters` have parameters in the module.
    """

    path: str
    parent: weakref.ref[torch.nn.Module]
    attribute: str
    module: weakref.ref[torch.nn.Module]
    adapters: tuple[str, ...]


class AdapterState:
    """The state that all adapted modules of one model share: the adapters' configs, and which adapters are active.

    Attributes:
        default: The route that applies without a scoped override.
        aside: The default route that `suspend_default` removed, or None.
        kinds: User-defined kinds, keyed by name (`lorakit.core.Kind`).
        whole: Models in which every adapted module is known to use this state; cleared when the state is copied.
        places: Where the adapted modules were when the model was last indexed, including modules replaced since then.
        waiting: Adapters that are active at only some positions of a row, so that a forward pass needs offsets.
        peft_methods: Object that provides layer attributes found only in PEFT; None until `lorakit.peft` is used on the
            model.
        biased: Whether an adapter trains biases in place; if so, modules must be searched for trained biases.
        base: Fingerprint of the base, as JSON values, from before its weights may be sharded; None in a single process.
    """

    biased: bool = False
    base: JsonObject | None = None
    waiting: frozenset[str] = frozenset()
    peft_methods: Any = None  # a `lorakit.peft.layer_methods.PeftLayerMethods`

    def __init__(self) -> None:
        self.configs: dict[str, LoraConfig] = {}
        self.default: Route = BASE
        self.aside: Route | None = None
        self._joined: tuple[str, ...] = ()  # adapters that merging added to the default route
        self.invocations: Traces[Offsets] = Traces()  # of forward passes with offsets
        self.kinds: dict[str, Kind] = {}
        self._open: dict[int, int] = {}  # thread id -> number of open overrides
        # Threads (not their ids, which are reused) that were already warned about an override in another thread.
        self._told: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self.whole: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self.places: list[Place] = []

    def __getstate__(self) -> dict[str, Any]:
        self.whole.clear()  # a copied layer may be put into the same model
        return {name: value for name, value in self.__dict__.items() if name not in OF_THIS_PROCESS}

    def __setstate__(self, known: dict[str, Any]) -> None:
        self.__dict__.update(known, _open={}, _told=weakref.WeakSet(), whole=weakref.WeakSet(), places=[])

    def join(self, module: torch.nn.Module) -> None:
        """Register an adapted module with this state, through a weak reference."""
        self.__dict__.setdefault("_members", {})[id(module)] = weakref.ref(module)

    def leave(self, module: torch.nn.Module) -> None:
        """Forget a module that is no longer adapted."""
        self.__dict__.get("_members", {}).pop(id(module), None)

    def substitute(self, old: torch.nn.Module, new: torch.nn.Module) -> None:
        """Register a module that is put in place of an adapted module and shares its `__dict__`; forget the old one."""
        self.join(new)  # first, so that another thread that switches adapters misses no module
        self.places = [
            place._replace(module=weakref.ref(new)) if place.module() is old else place for place in self.places
        ]
        self.leave(old)

    def members(self) -> list[Any]:
        """Return the adapted modules of this state in order of registration, without traversing the model."""
        references = list(self.__dict__.get("_members", {}).values())  # one step: another thread may register a module
        members = [reference() for reference in references]
        return [module for module in members if module is not None]

    def in_place(self) -> bool:
        """Return whether every adapted module is still where an index last found it, without traversing the model."""
        for place in self.places:  # a plain loop, because `use` is called often
            parent, module = place.parent(), place.module()
            present = module if parent is None else parent._modules.get(place.attribute)
            if present is not module and (present is None or module is None or present.__dict__ is not module.__dict__):
                return False  # `speed` puts a module in place of another one and shares its `__dict__`
        return True

    def check(self, names: Sequence[str | None], error: type[LorakitError] = RouteError) -> None:
        """Raise an error of this type, which lists the known names, if an adapter is unknown; None is the base."""
        unknown = sorted({name for name in names if name is not None and name not in self.configs})
        if unknown:
            text = f"Adapter {unknown[0]!r} not found on this model; available: {', '.join(self.configs) or 'none'}."
            raise error(text, what=unknown[0], allowed=self.configs)

    def replace_default(self, names: Sequence[str]) -> None:
        """Make a route with the given adapters the default."""
        self.default, self._joined, self.aside = Route(tuple(names)), (), None

    @property
    def chosen(self) -> Route:
        """The default route, even while it is suspended."""
        return self.default if self.aside is None else self.aside

    def suspend_default(self) -> None:
        """Use the base model without adapters by default until `restore_default` is called."""
        if self.aside is None:
            self.default, self.aside = BASE, self.default

    def restore_default(self) -> None:
        """Undo `suspend_default`, but leave out adapters that were removed in the meantime."""
        if self.aside is not None:
            self.default, self.aside = Route(tuple(n for n in self.aside.names if n in self.configs)), None

    def join_default(self, names: Sequence[str]) -> None:
        """Append merged adapters to the default route."""
        joined = tuple(name for name in dict.fromkeys(names) if name not in self.default.names)
        self.default, self._joined = Route((*self.default.names, *joined)), (*self._joined, *joined)

    def leave_default(self, names: Sequence[str]) -> None:
        """Remove unmerged adapters from the default route if merging had added them."""
        left = tuple(name for name in self._joined if name in names)
        self._joined = tuple(name for name in self._joined if name not in names)
        self.default = Route(tuple(name for name in self.default.names if name not in left))

    def override(self, route: Route | None, offsets: Offsets | None = None) -> Override:
        """Return a context manager that activates a route, or only offsets, in the current context only."""
        return Override(self, route, offsets)

    def active(self) -> Route:
        """Return the model's active route in the current context (for recomputed forward passes, see `resolve`)."""
        route, offsets = self._scoped(None)
        return (self.default if route is None else route).at(offsets)

    def _scoped(self, backward: int | None) -> tuple[Route | None, Offsets | None]:
        """Return the route and offsets that the innermost overrides set, in one backward pass or in all."""
        offsets = None
        for scope in reversed(_SCOPES.get()):
            block = scope.block
            if block.state is self and backward in (None, scope.backward):
                offsets = block.offsets if offsets is None else offsets
                if block.route is not None:
                    return block.route, offsets
        return None, offsets

    def blocks(self) -> list[Override]:
        """Return the model's overrides opened in the current context and backward pass, innermost first."""
        backward = torch._C._current_graph_task_id()
        return [s.block for s in reversed(_SCOPES.get()) if s.block.state is self and s.backward == backward]

    def offsets(self) -> Offsets | None:
        """Return the offsets set by overrides in the current context and backward pass, or None."""
        route, offsets = self._scoped(torch._C._current_graph_task_id())
        return offsets if offsets is not None or route is None else route.offsets

    def awaited(self) -> tuple[str, ...]:
        """Return the sorted names of the active adapters that are triggered by invocation tokens."""
        if not self.waiting:
            return ()
        acting = set(self.active().mentions)
        for module in self.members():
            if module.own_route is not None:
                acting |= module.own_route.mentions
        return tuple(sorted(self.waiting & acting))

    def awaits(self, route: Route) -> bool:
        """Return whether a route uses an adapter that is active at only some positions."""
        return not self.waiting.isdisjoint(route.mentions)

    def fits_a_graph(self, default: Route) -> bool:
        """Return whether a compiled graph, which cannot read context variables, can use a default route.

        Dynamo guards on the values that this method reads. If an override is open in any thread, or if the default
        route uses an adapter triggered by invocation tokens, dynamo fails to retrace the layer and runs it uncompiled,
        with the active route and offsets.
        """
        if self._open:  # an explicit branch, because dynamo does not guard on a returned `not`
            return False
        return not self.awaits(default)

    def _tell_of_other_threads(self) -> None:
        thread, number = threading.current_thread(), threading.get_ident()
        if thread in self._told or not any(other != number for other in list(self._open)):
            return
        self._told.add(thread)
        warnings.warn(
            "A `use`, `route` or `disable` block is open on this model in another thread; this thread does not see it "
            f"and runs with {self.default.describe()}. Open the block in the thread that runs the forward pass.",
            RuntimeWarning,
            stacklevel=2,
        )


class Override(contextlib.AbstractContextManager[None]):
    """A scoped override of the route, the offsets or both. Several threads and tasks can enter it at once."""

    def __init__(self, state: AdapterState, route: Route | None, offsets: Offsets | None = None) -> None:
        self.state, self.route, self.offsets = state, route, offsets

    def __enter__(self) -> None:
        thread, opened = threading.get_ident(), self.state._open
        _SCOPES.set((*_SCOPES.get(), Scope(self, torch._C._current_graph_task_id(), thread)))
        if self.route is not None:
            opened[thread] = opened.get(thread, 0) + 1

    def __exit__(self, *_: object) -> None:
        scopes, opened = _SCOPES.get(), self.state._open
        ours = next((scope for scope in reversed(scopes) if scope.block is self), None)
        _SCOPES.set(tuple(scope for scope in scopes if scope is not ours))
        if self.route is None:
            return
        thread = threading.get_ident() if ours is None else ours.thread
        opened[thread] = opened.get(thread, 1) - 1
        if not opened[thread]:
            del opened[thread]


def resolve(state: AdapterState, own: Route | None, forwards: Forwards) -> tuple[Route, bool]:
    """Return the route for a forward pass of one layer, and whether autograd is recomputing this forward pass.

    `own` is the layer's override of the default route, or None.

    Raises:
        RouteError: This is a recomputation, and the route of the first run cannot be determined.
    """
    default = state.default if own is None else own
    if torch.compiler.is_compiling() and state.fits_a_graph(default):
        return default, False
    backward = torch._C._current_graph_task_id()
    again = backward != -1
    route, offsets = state._scoped(backward)
    if route is None and again:
        route = forwards.of_recomputation()
    elif route is None:
        route = default
        if state._open:
            state._tell_of_other_threads()
    if again and offsets is None and route.offsets is None and state.awaits(route):
        offsets = _first_offsets(state, route)
    return route.at(offsets), again


def _first_offsets(state: AdapterState, route: Route) -> Offsets:
    """Return the offsets of the forward pass that autograd is recomputing."""
    alive = state.invocations.alive()
    names = sorted(state.waiting & route.mentions)
    first = alive[0] if alive else None
    if first is None or not all(first.agrees(other, names) for other in alive[1:]):
        raise RouteError(
            "A backward pass is recomputing a checkpointed forward pass, but the start positions of "
            f"{', '.join(names)} in that pass cannot be determined (candidates: {len(alive)}). Enable checkpointing "
            "with gradient_checkpointing_kwargs={'use_reentrant': False, "
            "'context_fn': lorakit.core.checkpoint_contexts(model)}.",
            what=", ".join(names),
        )
    return first


class CheckpointContexts:
    """A `context_fn` that makes non-reentrant checkpointing recompute a forward pass with its original route."""

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def __call__(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Return a no-op context for the forward pass, and a context for its recomputation."""
        return contextlib.nullcontext(), self.state.override(self.state.active())
