"""Which adapter is active: one state object per model, a scoped override per context, one function that reads them.

Every layer of a model refers to the model's `AdapterState`. It holds a default, replaced whole, that a new thread
sees. `use`, `route` and `disable` lay a scoped override over it in a context variable: it ends with its block,
also when the block raises, and no other thread or task sees it. A forward that autograd runs again (gradient
checkpointing) must not ask what is active *now*: it takes the route that its first run had, or it raises.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from lorakit.config import LoraConfig
from lorakit.core.routing.recompute import Forwards, Traces
from lorakit.core.routing.route import BASE, Offsets, Route
from lorakit.errors import RouteError


@dataclass(frozen=True)
class Scope:
    """An override in force: for which state, inside which backward it was opened (-1: none), and where.

    Attributes:
        state: The model.
        route: What its forwards use; None if only offsets are given.
        offsets: On which positions adapters act, or None if that is not given.
        backward: Number of the backward.
        block: The block.
        thread: Number of the thread.
    """

    state: AdapterState
    route: Route | None
    offsets: Offsets | None
    backward: int
    block: Override
    thread: int


class PeftLayerMethodsLike(Protocol):
    """What answers, for programs written for PEFT, the attributes of a layer that only PEFT has."""

    names: ClassVar[frozenset[str]]

    def answer(self, layer: torch.nn.Module, word: str) -> object:
        """Return the value of an attribute, one of `names`, of an adapted layer."""


# The only global: a context variable cannot be copied or pickled, so no object of a model may hold it.
_SCOPES: ContextVar[tuple[Scope, ...]] = ContextVar("lorakit_scopes", default=())


OF_THIS_PROCESS = frozenset({"_open", "_told", "_members", "whole"})  # members join as they are copied


class AdapterState:
    """What every adapted part of one model shares: the adapters' configs and which of them is active.

    Attributes:
        configs: Adapter name -> its config.
        default: The route where no scoped override is in force.
        aside: The default that `lay_aside` took away, or None.
        frozen: The base's parameters with the `requires_grad` they had before the first adapter came.
        held: The base's modules that are kept from rewriting their own weight while adapters are here.
        replication: How the base's layers were stacked anew for the adapters, or None.
        kinds: Kinds of site that the user made, by name (`lorakit.core.Kind`).
        whole: Models that were looked through for adapted parts of another state, since the last copy; there are none.
        waiting: Adapters that do not act on all positions of a row, so that a forward needs offsets.
        peft_methods: What answers PEFT's own attributes of layers; None until `lorakit.peft` has met the model.
        biased: Whether an adapter has trained biases of the base in place, so that modules have to be asked for them.
    """

    biased: bool = False
    waiting: frozenset[str] = frozenset()
    peft_methods: PeftLayerMethodsLike | None = None

    def __init__(self) -> None:
        self.configs: dict[str, LoraConfig] = {}
        self.default: Route = BASE
        self.aside: Route | None = None
        self._joined: tuple[str, ...] = ()  # adapters that are in the default because they were merged
        self.frozen: list[tuple[torch.nn.Parameter, bool]] = []
        self.invocations: Traces[Offsets] = Traces()  # of forwards that had some
        self.held: list[torch.nn.Module] = []
        self.replication: Any = None
        self.kinds: dict[str, Any] = {}
        self._open: dict[int, int] = {}  # thread -> overrides open in it
        # Threads that were told of an override elsewhere; not their numbers, which come again.
        self._told: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self.whole: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        self.whole.clear()  # a copied layer may come to stand beside the first
        return {name: value for name, value in self.__dict__.items() if name not in OF_THIS_PROCESS}

    def __setstate__(self, known: dict[str, Any]) -> None:
        self.__dict__.update(known, _open={}, _told=weakref.WeakSet(), whole=weakref.WeakSet())

    def join(self, module: torch.nn.Module) -> None:
        """Note an adapted module that refers to this state; it is held weakly."""
        self.__dict__.setdefault("_members", {})[id(module)] = weakref.ref(module)

    def leave(self, module: torch.nn.Module) -> None:
        """Forget a module that is adapted no longer."""
        self.__dict__.get("_members", {}).pop(id(module), None)

    def members(self) -> list[Any]:
        """The adapted modules of this state in the order they came, found without a walk over the model."""
        found = [reference() for reference in self.__dict__.get("_members", {}).values()]
        return [module for module in found if module is not None]

    def check(self, names: Sequence[str | None]) -> None:
        """Refuse names of adapters that are not there.

        Raises:
            RouteError: A name is unknown; the message lists those that are known.
        """
        unknown = sorted({name for name in names if name is not None and name not in self.configs})
        if unknown:
            known = ", ".join(self.configs) or "none"
            raise RouteError(
                f"There is no adapter {unknown[0]!r} on this model. Adapters here: {known}.",
                what=unknown[0],
                allowed=self.configs,
            )

    def replace_default(self, names: Sequence[str]) -> None:
        """Make these adapters the default, whatever it was."""
        self.default, self._joined, self.aside = Route(tuple(names)), (), None

    @property
    def chosen(self) -> Route:
        """The default, also while it is laid aside."""
        return self.default if self.aside is None else self.aside

    def lay_aside(self) -> None:
        """Make the base alone the default, until `take_up`."""
        if self.aside is None:
            self.default, self.aside = BASE, self.default

    def take_up(self) -> None:
        """Undo `lay_aside`; adapters that left in between are not taken up."""
        if self.aside is not None:
            self.default, self.aside = Route(tuple(n for n in self.aside.names if n in self.configs)), None

    def join_default(self, names: Sequence[str]) -> None:
        """Put adapters that were merged into the default, behind those that are in it."""
        joined = tuple(name for name in dict.fromkeys(names) if name not in self.default.names)
        self.default, self._joined = Route((*self.default.names, *joined)), (*self._joined, *joined)

    def leave_default(self, names: Sequence[str]) -> None:
        """Take adapters that were unmerged out of the default, where merging had put them there."""
        left = tuple(name for name in self._joined if name in names)
        self._joined = tuple(name for name in self._joined if name not in names)
        self.default = Route(tuple(name for name in self.default.names if name not in left))

    def override(self, route: Route | None, offsets: Offsets | None = None) -> Override:
        """A block in which this route is in force, in this context only.

        Args:
            route: What the block's forwards use; None leaves that as it is, and only gives offsets.
            offsets: On which positions adapters act that do not act on all.
        """
        return Override(self, route, offsets)

    def active(self) -> Route:
        """The route in force for this model in this context (not the rule for a recomputation; see `resolve`)."""
        route, offsets = self._scoped(None)
        return (self.default if route is None else route).at(offsets)

    def _scoped(self, backward: int | None) -> tuple[Route | None, Offsets | None]:
        """What the innermost overrides say: of any backward, or of the one with that number."""
        offsets = None
        for scope in reversed(_SCOPES.get()):
            if scope.state is self and backward in (None, scope.backward):
                offsets = scope.offsets if offsets is None else offsets
                if scope.route is not None:
                    return scope.route, offsets
        return None, offsets

    def scopes(self) -> list[Scope]:
        """The overrides of this model that were opened in this context and backward, the innermost first."""
        backward = torch._C._current_graph_task_id()
        return [s for s in reversed(_SCOPES.get()) if s.state is self and s.backward == backward]

    def offsets(self) -> Offsets | None:
        """Return the offsets that overrides of this context and backward give, or None."""
        route, offsets = self._scoped(torch._C._current_graph_task_id())
        return offsets if offsets is not None or route is None else route.offsets

    def awaited(self) -> tuple[str, ...]:
        """Return the waiting adapters that act somewhere in the model now, sorted."""
        if not self.waiting:
            return ()
        acting = set(self.active().mentions)
        for module in self.members():
            if module.own_route is not None:
                acting |= module.own_route.mentions
        return tuple(sorted(self.waiting & acting))

    def awaits(self, route: Route) -> bool:
        """Return whether a route has an adapter that does not act on all positions."""
        return not self.waiting.isdisjoint(route.mentions)

    def fits_a_graph(self, default: Route) -> bool:
        """Whether a compiled graph can have a layer's default, since no context variable can be read in one.

        Dynamo guards on what is asked here: while a block is open anywhere, or the default waits for tokens, the
        layer is traced again, cannot be, and runs uncompiled, so that it has the block's route and the offsets.

        Args:
            default: Of the layer, or of the model.
        """
        if self._open:  # asked by a branch: dynamo puts no guard on a `not` that is only returned
            return False
        return not self.awaits(default)

    def _tell_of_other_threads(self) -> None:
        thread, number = threading.current_thread(), threading.get_ident()
        if thread in self._told or not any(other != number for other in list(self._open)):
            return
        self._told.add(thread)
        warnings.warn(
            "A `use`, `route` or `disable` block of another thread is open on this model; this thread does not see it "
            f"and runs with {self.default.describe()}. Open the block in the thread that runs the forward.",
            RuntimeWarning,
            stacklevel=2,
        )


class Override(contextlib.AbstractContextManager[None]):
    """A scoped override; it can be entered again, also by several threads and tasks at once: it holds no state."""

    def __init__(self, state: AdapterState, route: Route | None, offsets: Offsets | None = None) -> None:
        self._state, self._route, self._offsets = state, route, offsets

    def __enter__(self) -> None:
        thread = threading.get_ident()
        scope = Scope(self._state, self._route, self._offsets, torch._C._current_graph_task_id(), self, thread)
        _SCOPES.set((*_SCOPES.get(), scope))
        if self._route is not None:
            self._state._open[thread] = self._state._open.get(thread, 0) + 1

    def __exit__(self, *_: object) -> None:
        scopes = _SCOPES.get()
        ours = next((scope for scope in reversed(scopes) if scope.block is self), None)
        _SCOPES.set(tuple(scope for scope in scopes if scope is not ours))
        if self._route is None:
            return
        thread = threading.get_ident() if ours is None else ours.thread
        left = self._state._open.get(thread, 1) - 1
        if left:
            self._state._open[thread] = left
        else:
            self._state._open.pop(thread, None)


def resolve(state: AdapterState, own: Route | None, forwards: Forwards) -> tuple[Route, bool]:
    """The route that a forward of one layer uses now.

    Args:
        state: The model's state.
        own: The layer's exception to the default, or None.
        forwards: The layer's forwards so far.

    Returns:
        The route, and whether autograd is running this forward again.

    Raises:
        RouteError: It runs again and its first route cannot be known.
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
    """Return the offsets of the forward that autograd runs again."""
    alive = state.invocations.alive()
    names = sorted(state.waiting & route.mentions)
    first = alive[0] if alive else None
    if first is None or not all(first.agrees(other, names) for other in alive[1:]):
        raise RouteError(
            f"A checkpointed forward runs again in a backward, and where {', '.join(names)} began in its rows cannot "
            f"be known: {len(alive)} forwards could be meant. Enable checkpointing with gradient_checkpointing_kwargs="
            "{'use_reentrant': False, 'context_fn': lorakit.core.checkpoint_contexts(model)}."
        )
    return first


class CheckpointContexts:
    """A `context_fn` for non-reentrant checkpointing: the recomputation gets the route that the forward had."""

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def __call__(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """The context of the forward (none) and that of its recomputation."""
        return contextlib.nullcontext(), self.state.override(self.state.active())
