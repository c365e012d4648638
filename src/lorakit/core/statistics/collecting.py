"""What passes through a model's sites: moments of their inputs, and gradients of their weights, over a few batches.

Initialisers that look at data and the allocation of ranks both ask here. A site is named by its path; hooks sit on the
base's own module there, whether or not adapters stand on it, and are gone afterwards, also after an error. Nothing is
written to the model: weights, `requires_grad`, `.grad` and modes are as before. Knows nothing of adapters' arithmetic.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import AdapterIndex
from lorakit.core.quantization import at_least_fp32
from lorakit.core.statistics.moments import GradientStatistics, InputStatistics
from lorakit.errors import DataError, RunError, TargetError, nearest

Forward = Callable[[nn.Module, Any], Any]
"""Runs the model on one batch; for gradients it returns the scalar loss."""

TakeRows = Callable[[str, Tensor], Tensor]
"""Takes the path of a site and what it received, (…), and returns the rows that count, (n, in)."""


def collect_inputs(
    model: nn.Module,
    paths: Sequence[str],
    batches: Iterable[Any],
    forward: Forward,
    *,
    components: int | None = None,
    keep: Callable[[Any], Tensor | TakeRows | None] | None = None,
    even: bool = False,
) -> dict[str, InputStatistics]:
    """Moments of what each site receives, without gradients and in evaluation mode.

    Whatever adapters are active act on what later sites receive; within `lorakit.core.disable(model)` none does.

    Args:
        model: Any model; it is left as it was.
        paths: Dotted paths of the sites: dense layers (…, in), or convolutions without groups, whose rows are patches.
        batches: What `forward` takes; run through once.
        forward: Runs the model on one batch; what it returns is not looked at.
        components: None keeps the whole second moment, 4·in² bytes a site; a number keeps so many principal directions
            by incremental SVD, 4·components·in bytes, and what lies beyond them is lost.
        keep: From a batch to a mask (rows, length) of the positions that count, such as those that are not padding, or
            to a function that takes the rows out of what a site received.
        even: Divide what a site receives in a call by its largest number, so that no batch outweighs the others.

    Returns:
        Path -> statistics; those of a site that no batch reached have 0 rows.

    Raises:
        TargetError: A path is no module, or one whose inputs have no moments (an embedding, a grouped convolution).
        DataError: There is no batch, or a mask does not fit what a site received.
    """
    modules = _modules_at(model, paths)
    for path, module in modules.items():
        _refuse_inputs(path, module)
    found = {path: InputStatistics(components) for path in paths}
    collector = _Inputs(found, even)
    hooks = {path: collector.hook(path, module) for path, module in modules.items()}
    with torch.no_grad(), in_mode(model, False), _hooked(modules, hooks):
        for batch in _some(batches):
            collector.begin(keep(batch) if keep is not None else None)
            forward(model, batch)
    return found


def collect_gradients(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Any], forward: Forward
) -> dict[str, GradientStatistics]:
    """The gradient of the loss by each site's weight, averaged over batches, in evaluation mode.

    The weight needs no `requires_grad` and may be quantised: the gradient is made from what the module received and
    what came back to its output, (out, in) = Gᵀ·X, and never stands in `.grad`. A site keeps one dense fp32 tensor.
    A weight that two sites share has its own gradient at each.

    Args:
        model: Any model; it is left as it was.
        paths: Dotted paths of the sites: dense layers, embeddings, convolutions.
        batches: What `forward` takes; run through once.
        forward: Runs the model on one batch and returns its loss, a scalar.

    Returns:
        Path -> statistics; those of a site that no loss depends on have 0 calls.

    Raises:
        TargetError: A path is no module.
        DataError: There is no batch.
        RunError: A loss depends on none of the sites.
    """
    modules = _modules_at(model, paths)
    found = {path: GradientStatistics() for path in paths}
    with torch.enable_grad(), in_mode(model, False):
        anchor = torch.zeros((), requires_grad=True)
        collector = _Gradients(found, anchor)
        with _hooked(modules, {path: collector.hook(path, module) for path, module in modules.items()}):
            for batch in _some(batches):
                loss = forward(model, batch)
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    raise RunError("The loss depends on none of the sites whose gradients were asked for.")
                torch.autograd.grad(loss, anchor, allow_unused=True)  # so no `.grad` of the model is touched
                for statistics in found.values():
                    statistics.batches += 1
    return found


class _Inputs:
    """Takes note of what modules receive; the same tensor given to several in turn is worked on once."""

    def __init__(self, found: dict[str, InputStatistics], even: bool) -> None:
        self.found, self.even = found, even
        self.mask: Tensor | TakeRows | None = None
        self._last: tuple[weakref.ref[Tensor], int, InputStatistics] | None = None
        self._busy = False

    def begin(self, mask: Tensor | TakeRows | None) -> None:
        """Start a new batch, with the positions of it that count, (rows, length), or what takes its rows."""
        self.mask, self._last = mask, None

    def hook(self, path: str, module: nn.Module) -> Callable[..., None]:
        def take(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
            if not self._busy:
                self._take(path, module, _first(args, kwargs))

        return take

    def _take(self, path: str, module: nn.Module, x: Tensor) -> None:
        statistics = self.found[path]
        if self._last is not None and self._last[0]() is x and self._last[1] == x._version and not callable(self.mask):
            statistics.merge(self._last[2])
            return
        self._busy = True
        try:
            rows = patches(module, x) if isinstance(module, _CONVOLUTIONS) else self._rows(path, x)
        finally:
            self._busy = False
        if self.even:
            rows = evened(rows)
        if statistics.components is None:
            part = InputStatistics()
            part.add(rows)
            self._last = (weakref.ref(x), x._version, part)
            statistics.merge(part)
        else:
            statistics.add(rows)

    def _rows(self, path: str, x: Tensor) -> Tensor:
        """(…, in) -> (rows that count, in)."""
        if callable(self.mask):
            return self.mask(path, x)
        if self.mask is None:
            return x.reshape(-1, x.shape[-1])
        mask = self.mask.to(x.device, torch.bool)
        if mask.shape != x.shape[:-1] and mask.numel() != x.shape[:-1].numel():
            raise DataError(
                f"The mask of shape {tuple(mask.shape)} does not fit what {path} received, {tuple(x.shape)}; "
                "leave `keep` out, or leave this site out."
            )
        return x.reshape(-1, x.shape[-1])[mask.reshape(-1)]


class _Gradients:
    """Taps the outputs of modules, so that what comes back to them makes their weights' gradients."""

    def __init__(self, found: dict[str, GradientStatistics], anchor: Tensor) -> None:
        self.found, self.anchor = found, anchor
        self._busy = False

    def hook(self, path: str, module: nn.Module) -> Callable[..., Tensor | None]:
        def tap(_: nn.Module, args: Any, kwargs: Any, y: Tensor) -> Tensor | None:
            if self._busy or not torch.is_grad_enabled():
                return None
            x = _first(args, kwargs)
            tapped: Tensor = _Tap.apply(y, x, self.anchor, lambda x, G: self._take(path, module, x, G))
            return tapped

        return tap

    def _take(self, path: str, module: nn.Module, x: Tensor, G: Tensor) -> None:
        self._busy = True
        try:
            self.found[path].add(weight_gradient(module, x, G))
        finally:
            self._busy = False


class _Tap(torch.autograd.Function):
    """The identity on a module's output, whose backward hands on what it gets; the anchor makes it part of a graph."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return y.clone()  # a view could not be changed in place by what follows

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.take(*ctx.saved_tensors, G)
        return G, None, None, None


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def evened(rows: Tensor) -> Tensor:
    """Rows (n, in) over their largest number (where none is positive, over the largest magnitude), in fp32 or wider."""
    rows = at_least_fp32(rows)
    if not rows.numel():
        return rows
    largest = float(rows.max().abs()) or float(rows.abs().max())
    return rows / largest if largest else rows


def weight_gradient(module: nn.Module, x: Tensor, G: Tensor) -> Tensor:
    """The gradient by a module's canonical weight from one call of it.

    Args:
        module: A dense layer, an embedding or a convolution.
        x: What it received: (…, in), indices (…), or (N, C, …).
        G: What came back to its output, (…, out) or (N, out, …).

    Returns:
        (out, in), for a convolution (out, in / groups, k…), fp32 or wider.
    """
    x, G = x.detach(), at_least_fp32(G.detach())
    if isinstance(module, nn.Embedding):
        rows = torch.zeros(module.num_embeddings, G.shape[-1], dtype=G.dtype, device=G.device)
        return rows.index_add_(0, x.reshape(-1), G.reshape(-1, G.shape[-1])).T
    if isinstance(module, _CONVOLUTIONS):
        weight = at_least_fp32(module.weight.detach()).requires_grad_()
        with torch.enable_grad():
            y = torch.func.functional_call(module, {**_fp32_bias(module), "weight": weight}, (at_least_fp32(x),))
        return torch.autograd.grad(y, weight, G)[0]
    return G.reshape(-1, G.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(G.dtype)


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """What each place of a convolution's output sees: the rows that its weight, as a matrix, is applied to.

    Args:
        module: A convolution without groups.
        x: (N, C, …).

    Returns:
        (N · places, C · k…), in the order of the weight's own numbers, fp32 or wider.
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    size = weight[0].numel()
    x = at_least_fp32(x)
    identity = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *weight.shape[1:])
    own = {"weight": identity}
    if module.bias is not None:
        own["bias"] = torch.zeros(size, dtype=x.dtype, device=x.device)
    seen: Tensor = torch.func.functional_call(module, own, (x,))  # keeps stride, dilation and padding as they are
    return seen.flatten(2).transpose(1, 2).reshape(-1, size)


def _fp32_bias(module: nn.Module) -> dict[str, Tensor]:
    bias = module.bias
    return {"bias": at_least_fp32(bias.detach())} if isinstance(bias, Tensor) else {}


def _modules_at(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """Return path -> the base's own module there, below any adapters."""
    index = AdapterIndex.of(model)
    found = {}
    for path in paths:
        module = index.everything.get(path)
        if module is None:
            close = nearest(path, list(index.everything), 1)
            raise TargetError(f"There is no module {path!r} in the model{f'; nearest: {close[0]}' if close else ''}.")
        found[path] = module.owner if isinstance(module, LoraLayer) else module
    return found


def _refuse_inputs(path: str, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        raise TargetError(f"{path} is an embedding: what it receives are indices, which have no moments. Leave it out.")
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
        raise TargetError(
            f"{path} is a convolution with {module.groups} groups, each of which sees other inputs. Leave it out."
        )


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def _some(batches: Iterable[Any]) -> Iterator[Any]:
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise DataError("There is no batch to collect from.")


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """A block in which a model trains or evaluates; each module has its own mode again afterwards.

    Args:
        model: Any model.
        training: Its mode in the block.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


@contextlib.contextmanager
def _hooked(modules: dict[str, nn.Module], hooks: dict[str, Callable[..., Any]]) -> Iterator[None]:
    handles = []
    try:
        for path, module in modules.items():
            handles.append(module.register_forward_hook(hooks[path], with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
