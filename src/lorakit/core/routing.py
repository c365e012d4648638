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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.errors import RouteError


@dataclass(frozen=True)
class Route:
    """Which adapters a forward uses.

    Attributes:
        names: Adapters that act on every row, in the order given; none of them is the base alone.
        rows: One adapter per row of the batch (None: the base alone), or None where all rows are alike.
        copies: A batch may also hold each row so many times running: beams, of which an encoder sees one.
        mentions: Every adapter that some row uses.
    """

    names: tuple[str, ...] = ()
    rows: tuple[str | None, ...] | None = None
    copies: int = 1
    _indices: dict[tuple[torch.device, int], list[tuple[str, Tensor]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    mentions: frozenset[str] = field(init=False, repr=False, compare=False)  # not cached: dynamo cannot trace the lock

    def __post_init__(self) -> None:
        some = self.names if self.rows is None else filter(None, self.rows)
        object.__setattr__(self, "mentions", frozenset(some))

    def common_to_all(self, names: frozenset[str]) -> bool:
        """Whether every row uses each of these adapters."""
        if self.rows is None:
            return names <= set(self.names)
        return all(names <= {row} for row in self.rows)

    def rows_of(self, size: int) -> tuple[str | None, ...] | None:
        """The adapter of each row of a batch, or None where the route does not fit it.

        Args:
            size: Rows of the batch.
        """
        rows = self.rows or ()
        if size == len(rows):
            return rows
        return tuple(row for row in rows for _ in range(self.copies)) if size == len(rows) * self.copies else None

    def segments(self, device: torch.device, size: int) -> list[tuple[str, Tensor]]:
        """The rows of each adapter, made once per device and size and kept.

        Args:
            device: Where the indices shall live.
            size: Rows of the batch, which the route fits.

        Returns:
            Pairs of an adapter and its row numbers, (rows of it,) int64; rows of the base appear in none.
        """
        if (device, size) not in self._indices:
            rows = self.rows_of(size) or ()
            self._indices[device, size] = [
                (name, torch.tensor([i for i, row in enumerate(rows) if row == name], device=device))
                for name in dict.fromkeys(filter(None, rows))
            ]
        return self._indices[device, size]

    def describe(self) -> str:
        """The route in words, for messages."""
        if self.rows is not None:
            return "rows " + ", ".join(row or "base" for row in self.rows)
        return "adapter " + " + ".join(self.names) if self.names else "the base alone"


BASE = Route()
"""The base alone."""


@dataclass(frozen=True)
class _Scope:
    """An override in force: for which state, which route, inside which backward it was opened (-1: none), and where."""

    state: AdapterState
    route: Route
    backward: int
    block: Override
    thread: int


# The only global: a context variable cannot be copied or pickled, so no object of a model may hold it.
_SCOPES: ContextVar[tuple[_Scope, ...]] = ContextVar("lorakit_scopes", default=())


class AdapterState:
    """What every adapted part of one model shares: the adapters' configs and which of them is active.

    Attributes:
        configs: Adapter name -> its config.
        default: The route where no scoped override is in force.
        frozen: The base's parameters with the `requires_grad` they had before the first adapter came.
        held: The base's modules that are kept from rewriting their own weight while adapters are here.
    """

    def __init__(self) -> None:
        self.configs: dict[str, LoraConfig] = {}
        self.default: Route = BASE
        self._joined: tuple[str, ...] = ()  # adapters that are in the default because they were merged
        self.frozen: list[tuple[torch.nn.Parameter, bool]] = []
        self.held: list[torch.nn.Module] = []
        self._open: dict[int, int] = {}  # thread -> overrides open in it
        # Threads that were told of an override elsewhere; not their numbers, which come again.
        self._told: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in {"_open", "_told"}}

    def __setstate__(self, known: dict[str, Any]) -> None:
        self.__dict__.update(known, _open={}, _told=weakref.WeakSet())

    def check(self, names: Sequence[str | None]) -> None:
        """Refuse names of adapters that are not there.

        Raises:
            RouteError: A name is unknown; the message lists those that are known.
        """
        unknown = sorted({name for name in names if name is not None and name not in self.configs})
        if unknown:
            known = ", ".join(self.configs) or "none"
            raise RouteError(f"There is no adapter {unknown[0]!r} on this model. Adapters here: {known}.")

    def replace_default(self, names: Sequence[str]) -> None:
        """Make these adapters the default, whatever it was."""
        self.default, self._joined = Route(tuple(names)), ()

    def join_default(self, names: Sequence[str]) -> None:
        """Put adapters that were merged into the default, behind those that are in it."""
        joined = tuple(name for name in dict.fromkeys(names) if name not in self.default.names)
        self.default, self._joined = Route((*self.default.names, *joined)), (*self._joined, *joined)

    def leave_default(self, names: Sequence[str]) -> None:
        """Take adapters that were unmerged out of the default, where merging had put them there."""
        left = tuple(name for name in self._joined if name in names)
        self._joined = tuple(name for name in self._joined if name not in names)
        self.default = Route(tuple(name for name in self.default.names if name not in left))

    def override(self, route: Route) -> Override:
        """A block in which this route is in force, in this context only.

        Args:
            route: What the block's forwards use.
        """
        return Override(self, route)

    def active(self) -> Route:
        """The route in force for this model in this context (not the rule for a recomputation; see `resolve`)."""
        for scope in reversed(_SCOPES.get()):
            if scope.state is self:
                return scope.route
        return self.default

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

    def __init__(self, state: AdapterState, route: Route) -> None:
        self._state, self._route = state, route

    def __enter__(self) -> None:
        thread = threading.get_ident()
        scope = _Scope(self._state, self._route, torch._C._current_graph_task_id(), self, thread)
        _SCOPES.set((*_SCOPES.get(), scope))
        self._state._open[thread] = self._state._open.get(thread, 0) + 1

    def __exit__(self, *_: object) -> None:
        scopes = _SCOPES.get()
        ours = next((scope for scope in reversed(scopes) if scope.block is self), None)
        _SCOPES.set(tuple(scope for scope in scopes if scope is not ours))
        thread = threading.get_ident() if ours is None else ours.thread
        left = self._state._open.get(thread, 1) - 1
        if left:
            self._state._open[thread] = left
        else:
            self._state._open.pop(thread, None)


class Forwards:
    """The forwards of one layer that a backward may run again, as far as they left a trace.

    A forward whose output has a graph is remembered for as long as that graph lives. Of the others, which end with
    their call or belong to reentrant checkpointing, only the routes are kept: one, or that there were several.
    Copies and pickles of it are empty, since graphs are not copied.
    """

    def __init__(self) -> None:
        self._alive: dict[int, weakref.ref[_Mark]] = {}
        self._without_graph = {True: _Routes(), False: _Routes()}  # by whether gradients were switched on

    def __reduce__(self) -> tuple[type[Forwards], tuple[()]]:
        return Forwards, ()

    def note(self, output: Any, route: Route) -> None:
        """Take note of a forward.

        Args:
            output: What it returned; a tensor of any shape (…), or something else.
            route: What it ran with.
        """
        if torch.is_inference_mode_enabled():
            return  # no backward ever comes to it
        if isinstance(output, tuple) and output:
            output = output[0]  # attention returns its weights beside its output
        if not isinstance(output, Tensor) or output.grad_fn is None:
            self._without_graph[torch.is_grad_enabled()].add(route)
            return
        mark, alive = _Mark(route), self._alive
        key = id(mark)
        alive[key] = weakref.ref(mark, lambda _: alive.pop(key, None))
        output.grad_fn.metadata["lorakit", id(self)] = mark  # type: ignore[index]  # torch's stub calls it a method

    def of_recomputation(self) -> Route:
        """The route of the forward that autograd runs again.

        Raises:
            RouteError: Forwards that it could be used several routes, or left no trace.
        """
        with_graph = [mark.route for ref in list(self._alive.values()) if (mark := ref()) is not None]
        switched_on, switched_off = self._without_graph[True], self._without_graph[False]
        if not torch.is_grad_enabled():  # so it was the first time, too
            possible = [switched_off]
        elif _is_non_reentrant():
            possible = [_Routes(with_graph), switched_on]
        else:  # reentrant checkpointing switches gradients off for the first run
            possible = [_Routes(with_graph), switched_on, switched_off]
        routes = {route for one in possible for route in one.some}
        if len(routes) == 1:
            return routes.pop()
        found = " and ".join(sorted(route.describe() for route in routes)) or "none"
        raise RouteError(
            "A checkpointed forward runs again in a backward, and which adapter it used cannot be known; forwards that "
            f"it could be used: {found}. Enable checkpointing with gradient_checkpointing_kwargs={{'use_reentrant': "
            "False, 'context_fn': lorakit.core.checkpoint_contexts(model)}."
        )


class _Routes:
    """Routes as a recomputation asks for them: at most two are kept, since two are too many already."""

    def __init__(self, routes: Sequence[Route] = ()) -> None:
        self.some: tuple[Route, ...] = ()
        for route in routes:
            self.add(route)

    def add(self, route: Route) -> None:
        if len(self.some) < 2 and route not in self.some:
            self.some = (*self.some, route)


def _is_non_reentrant() -> bool:
    """Whether non-reentrant checkpointing runs this forward again: its hook for saved tensors is then the topmost.

    Torch has no public word for it. A torch that names the hook otherwise makes the answer no, and more refused.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)(True)
    return top is not None and getattr(top[0], "__qualname__", "").startswith("_recomputation_hook.")


class _Mark:
    """A route kept alive by an autograd graph."""

    __slots__ = ("__weakref__", "route")

    def __init__(self, route: Route) -> None:
        self.route = route


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
    if torch.compiler.is_compiling() and not state._open:
        # No context variable can be read in a compiled graph. Dynamo guards on this being empty: while a block is open
        # anywhere, the layer is traced anew, cannot be, and runs uncompiled, so that it has the block's route.
        return default, False
    backward = torch._C._current_graph_task_id()
    for scope in reversed(_SCOPES.get()):
        if scope.state is state and scope.backward == backward:
            return scope.route, backward != -1
    if backward != -1:
        return forwards.of_recomputation(), True
    if state._open:
        state._tell_of_other_threads()
    return default, False


class CheckpointContexts:
    """A `context_fn` for non-reentrant checkpointing: the recomputation gets the route that the forward had."""

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def __call__(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """The context of the forward (none) and that of its recomputation."""
        return contextlib.nullcontext(), self.state.override(self.state.active())
