"""What forwards leave behind for a backward that runs them again: marks that live as long as an autograd graph.

It knows nothing of which adapter is active; it only remembers what it is told.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from lorakit.errors import RouteError

if TYPE_CHECKING:
    from lorakit.core.routes.route import Route

What = TypeVar("What")


class Traces(Generic[What]):
    """Things kept alive by autograd graphs, each for as long as its graph lives.

    Copies and pickles of it are empty, since graphs are not copied.
    """

    def __init__(self) -> None:
        self._alive: dict[int, weakref.ref[_Mark]] = {}

    def __reduce__(self) -> tuple[type[Traces[What]], tuple[()]]:
        return type(self), ()

    def note(self, outputs: Iterable[Tensor], what: What) -> None:
        """Remember something of a forward.

        Args:
            outputs: Tensors (…) that came out of it; one without a graph holds nothing.
            what: What to remember while one of their graphs lives.
        """
        mark, alive = _Mark(what), self._alive
        key = id(mark)
        alive[key] = weakref.ref(mark, lambda _: alive.pop(key, None))
        for output in outputs:
            if output.grad_fn is not None:
                output.grad_fn.metadata["lorakit", id(self)] = mark  # type: ignore[index]  # torch's stub calls it a method

    def alive(self) -> list[What]:
        """What is remembered now."""
        return [mark.what for ref in list(self._alive.values()) if (mark := ref()) is not None]


class Forwards:
    """The forwards of one layer that a backward may run again, as far as they left a trace.

    A forward whose output has a graph is remembered for as long as that graph lives. Of the others, which end with
    their call or belong to reentrant checkpointing, only the routes are kept: one, or that there were several.
    Copies and pickles of it are empty, since graphs are not copied.
    """

    def __init__(self) -> None:
        self._with_graph: Traces[Route] = Traces()
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
            self._without_graph[torch.is_grad_enabled()].add(route.named())
        else:
            self._with_graph.note((output,), route.named())

    def of_recomputation(self) -> Route:
        """The route of the forward that autograd runs again.

        Raises:
            RouteError: Forwards that it could be used several routes, or left no trace.
        """
        with_graph = self._with_graph.alive()
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
    """Something kept alive by an autograd graph."""

    __slots__ = ("__weakref__", "what")

    def __init__(self, what: Any) -> None:
        self.what = what
