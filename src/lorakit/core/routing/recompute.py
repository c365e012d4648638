"""Forward history, for backward passes that recompute forward passes (gradient checkpointing).

This file does not determine which adapter is active; it only stores the routes that it is given.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.checkpoint import CheckpointFunction

from lorakit.errors import RouteError

if TYPE_CHECKING:
    from lorakit.core.routing.route import Route


What = TypeVar("What")


class Traces(Generic[What]):
    """Values that autograd graphs keep alive, each for as long as its graph exists.

    Copies and unpickled objects are empty, because graphs are not copied.
    """

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[_Mark[What]] = weakref.WeakSet()

    def __reduce__(self) -> tuple[type[Traces[What]], tuple[()]]:
        return type(self), ()

    def note(self, outputs: Iterable[Tensor], what: What) -> None:
        """Remember a value for as long as the graph of one of these outputs (…) is alive, if they have one."""
        mark = _Mark(what)
        self._alive.add(mark)
        for output in outputs:
            if output.grad_fn is not None:
                output.grad_fn.metadata["lorakit", id(self)] = mark  # type: ignore[index]  # torch's stub calls it a method

    def alive(self) -> list[What]:
        """Return the values whose autograd graphs are still alive."""
        return [mark.what for mark in list(self._alive)]


class Forwards:
    """The forward history of one layer: forward passes that a backward pass may recompute.

    A forward pass whose output has a graph is remembered for as long as the graph is alive. Forward passes with
    gradients disabled are remembered in order; the order distinguishes the first run of a reentrant checkpoint from an
    evaluation run. If gradients are enabled but the output has no graph, the route is remembered indefinitely; at most
    two such routes are kept. Copies and unpickled objects are empty, because graphs are not copied.
    """

    def __init__(self) -> None:
        self._with_graph: Traces[Route] = Traces()
        self._without_graph: tuple[Route, ...] = ()
        self._switched_off = _Runs()

    def __reduce__(self) -> tuple[type[Forwards], tuple[()]]:
        return Forwards, ()

    def note(self, output: object, route: Route, again: bool = False) -> None:
        """Record a forward pass with an output of any shape (…), or another object.

        With `again`, it is a recomputation, which is recorded only if gradients are disabled, for reentrant checkpoints
        nested inside other checkpoints.
        """
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return  # in inference mode there is no backward pass
        if not torch.is_grad_enabled():
            self._switched_off.add(route.named())
            return
        if again:
            return
        if isinstance(output, tuple) and output:
            output = output[0]  # attention modules also return attention weights
        if not isinstance(output, Tensor) or output.grad_fn is None:
            self._without_graph = _with(self._without_graph, route.named())
        else:
            self._with_graph.note((output,), route.named())

    def of_recomputation(self) -> Route:
        """Return the one route of the forward pass that autograd is recomputing, or raise a RouteError."""
        node = None if _is_non_reentrant() else _reentrant_node()
        if torch.is_grad_enabled() and node is None:
            possible: list[Sequence[Route]] = [self._with_graph.alive(), self._without_graph]
            if not _is_non_reentrant():  # another library may run the first pass without gradients
                possible.append(self._switched_off.first_after(None))
        else:  # gradients were off in the first run: reentrant checkpointing or the model turned them off
            possible = [self._switched_off.first_after(node)]
        routes = {route for some in possible for route in some}
        if len(routes) == 1:
            return routes.pop()
        described = " and ".join(sorted(route.describe() for route in routes)) or "none"
        raise RouteError(
            "A backward pass is recomputing a checkpointed forward pass, but the adapter of that forward pass "
            f"cannot be determined; candidates: {described}. Enable checkpointing with gradient_checkpointing_kwargs={{"
            "'use_reentrant': False, 'context_fn': lorakit.core.checkpoint_contexts(model)}.",
            what=described,
        )


def _with(some: tuple[Route, ...], route: Route) -> tuple[Route, ...]:
    """Add a route to the possible routes of a recomputation; keep at most two, since two are already ambiguous."""
    return some if len(some) > 1 or route in some else (*some, route)


LONGEST_HISTORY = 64
"""Maximum number of route changes that a layer remembers for its forward passes with gradients disabled."""


@dataclass
class _Run:
    """Consecutive forward passes with one route in one thread; `number` is autograd's sequence number after them."""

    thread: threading.Thread
    route: Route
    number: int


class _Runs:
    """Forward passes with gradients disabled, oldest first.

    Autograd numbers the nodes of each thread in order of creation. A reentrant checkpoint creates its node before its
    first run, so the first run recorded with a number above the node's belongs to that checkpoint.
    """

    def __init__(self) -> None:
        self._runs: deque[_Run] = deque()
        self._dropped: tuple[Route, ...] = ()
        self._dropped_number = -1

    def add(self, route: Route) -> None:
        number, thread = torch._C._autograd._get_sequence_nr(), threading.current_thread()
        last = self._runs[-1] if self._runs else None
        same = last is not None and (last.route is route or last.route == route)
        if last is not None and same and last.thread is thread and last.number <= number:
            last.number = number
            return
        self._runs.append(_Run(thread, route, number))
        if len(self._runs) > LONGEST_HISTORY:
            dropped = self._runs.popleft()
            self._dropped = _with(self._dropped, dropped.route)
            self._dropped_number = dropped.number

    def first_after(self, node: int | None) -> Sequence[Route]:
        """Return the route of the first run after a node with this number, or all possible ones if that is unknown."""
        runs = list(self._runs)
        numbers = [run.number for run in runs]
        ordered = len({id(run.thread) for run in runs}) <= 1 and numbers == sorted(numbers)
        if node is None or not ordered:
            return [*self._dropped, *(run.route for run in runs)]
        if node < self._dropped_number:
            return self._dropped
        return [run.route for run in runs if run.number > node][:1]


def _reentrant_node() -> int | None:
    """Return the sequence number of the reentrant checkpoint that is recomputing this forward pass, or None."""
    node: Node | None = getattr(torch._C, "_current_autograd_node", lambda: None)()
    if node is None or getattr(type(node), "_forward_cls", None) is not CheckpointFunction:
        return None
    return node._sequence_nr()


def _is_non_reentrant() -> bool:
    """Return whether non-reentrant checkpointing is recomputing this forward pass.

    PyTorch has no public API for this: the topmost saved-tensors hook then belongs to the checkpoint. If PyTorch
    renames the hook, this function returns False, and more recomputations are rejected.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)(True)
    return top is not None and getattr(top[0], "__qualname__", "").startswith("_recomputation_hook.")


class _Mark(Generic[What]):
    """A value that an autograd graph keeps alive."""

    __slots__ = ("__weakref__", "what")

    def __init__(self, what: What) -> None:
        self.what = what
