"""Collect input moments and weight gradients for each site over a few batches.

Data-dependent inits and rank allocation use these statistics. Hooks are registered on the base module of each site,
whether or not the site has adapters, and are removed afterwards, even after an error. The model's weights,
`requires_grad` flags, `.grad` attributes and training modes are left unchanged. This module does not handle adapter
arithmetic.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lorakit.core.clones import bare
from lorakit.core.kinds import kind_of
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import AdapterIndex
from lorakit.core.quantization import at_least_fp32, weight_format_of
from lorakit.core.statistics.moments import GradientStatistics, InputStatistics
from lorakit.errors import DataError, RunError, TargetError, nearest

Forward = Callable[[nn.Module, Any], Any]
"""A function that runs the model on one batch; to collect gradients, it must return the loss, a scalar."""

TakeRows = Callable[[str, Tensor], Tensor]
"""A function that takes a site's path and input (…), and returns the rows to use, (n, in)."""

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def collect_inputs(
    model: nn.Module,
    paths: Sequence[str],
    batches: Iterable[Any],
    forward: Forward,
    *,
    keep: Callable[[Any], Tensor | TakeRows | None] | None = None,
    even: bool = False,
) -> dict[str, InputStatistics]:
    """Collect moments of each site's input, without gradients and in evaluation mode, in 4·in² bytes per site.

    Active adapters change the inputs of later sites; use `lorakit.core.disable(model)` to prevent this.

    Args:
        model: Any model; unchanged afterwards.
        paths: Dotted paths of the sites: dense layers with inputs (…, in), or ungrouped convolutions, whose rows are
            the input patches.
        batches: Batches to pass to `forward`; iterated once.
        forward: Runs the model on one batch; its result is ignored.
        keep: Function that takes a batch and returns either a mask (rows, length) of the positions to use, for example
            to exclude padding, or a function that selects rows of a site's input. None uses all positions.
        even: Whether to divide each input by its largest element, so that all batches have equal weight.

    Raises:
        TargetError: A path does not name a module, or names an embedding or a grouped convolution.
        DataError: There are no batches, or a mask does not match a site's input.
    """
    modules = _modules_at(model, paths)
    for path, module in modules.items():
        _check_inputs(path, module)
    statistics = {path: InputStatistics() for path in paths}
    collector = _Inputs(statistics, even)
    with torch.no_grad(), in_mode(model, False), hooked(modules, collector.hook):
        for batch in at_least_one(batches):
            collector.begin(keep(batch) if keep is not None else None)
            forward(model, batch)
    return statistics


def collect_gradients(
    model: nn.Module, paths: Sequence[str], batches: Iterable[Any], forward: Forward
) -> dict[str, GradientStatistics]:
    """Collect gradients of the loss with respect to each site's weight, in evaluation mode and averaged over batches.

    Weights do not need `requires_grad` and may be quantized: the gradient Gᵀ·X, (out, in), is computed from the
    module's input X and the gradient G with respect to the module's output; `.grad` is not used. One dense fp32 tensor
    per site is kept in memory. A weight that two sites share has a separate gradient for each site. The arguments are
    those of `collect_inputs`; `forward` returns the loss, a scalar.

    Raises:
        TargetError: A path does not name a module.
        DataError: There are no batches.
        RunError: A loss depends on none of the sites.
    """
    modules = _modules_at(model, paths)
    by_path = {path: GradientStatistics() for path in paths}
    with torch.enable_grad(), in_mode(model, False):
        anchor = torch.zeros((), requires_grad=True)
        collector = _Gradients(by_path, anchor)
        with hooked(modules, collector.hook):
            for batch in at_least_one(batches):
                loss = forward(model, batch)
                if not isinstance(loss, Tensor) or not loss.requires_grad:
                    text = "The loss depends on none of the sites whose gradients are collected."
                    raise RunError(text, field="forward")
                torch.autograd.grad(loss, anchor, allow_unused=True)  # leaves the model's `.grad` unchanged
                for statistics in by_path.values():
                    statistics.batches += 1
    return by_path


class _Inputs:
    """Collects the inputs of modules; a tensor that several modules receive in succession is processed only once."""

    def __init__(self, statistics: dict[str, InputStatistics], even: bool) -> None:
        self.statistics, self.even = statistics, even
        self.mask: Tensor | TakeRows | None = None
        self._last: tuple[weakref.ref[Tensor], int, InputStatistics] | None = None

    def begin(self, mask: Tensor | TakeRows | None) -> None:
        """Start a batch, with a mask of the positions to use, (rows, length), or a function that selects rows."""
        self.mask, self._last = mask, None

    def hook(self, path: str, module: nn.Module) -> Callable[..., None]:
        def take(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], __: Tensor) -> None:
            self._take(path, module, first_input(args, kwargs))

        return take

    def _take(self, path: str, module: nn.Module, x: Tensor) -> None:
        statistics = self.statistics[path]
        if self._last is not None and self._last[0]() is x and self._last[1] == x._version and not callable(self.mask):
            statistics.merge(self._last[2])
            return
        rows = patches(module, x) if _is_convolution(module) else self._rows(path, x)
        if self.even:
            rows = evened(rows)
        part = InputStatistics()
        part.add(rows)
        self._last = (weakref.ref(x), x._version, part)
        statistics.merge(part)

    def _rows(self, path: str, x: Tensor) -> Tensor:
        """Return the rows (n, in) to use from an input (…, in)."""
        if callable(self.mask):
            return self.mask(path, x)
        if self.mask is None:
            return x.reshape(-1, x.shape[-1])
        mask = self.mask.to(x.device, torch.bool)
        if mask.shape != x.shape[:-1] and mask.numel() != x.shape[:-1].numel():
            text = (
                f"The mask of shape {tuple(mask.shape)} does not match the input of {path}, which has shape "
                f"{tuple(x.shape)}; omit `keep`, or leave this site out."
            )
            raise DataError(text, what=tuple(mask.shape), where=path, field="keep")
        return x.reshape(-1, x.shape[-1])[mask.reshape(-1)]


class _Gradients:
    """Hooks module outputs, so that the backward pass can compute the gradients of the modules' weights."""

    def __init__(self, statistics: dict[str, GradientStatistics], anchor: Tensor) -> None:
        self.statistics, self.anchor = statistics, anchor

    def hook(self, path: str, module: nn.Module) -> Callable[..., Tensor | None]:
        def tap(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            total, x = self.statistics[path], first_input(args, kwargs)
            tapped: Tensor = _Tap.apply(y, x, self.anchor, lambda x, G: total.add(weight_gradient(module, x, G)))
            return tapped

        return tap


class _Tap(torch.autograd.Function):
    """The identity function on a module's output; in the backward pass, it also passes the gradient to `take`.

    The tensor `anchor` makes autograd record a graph even if nothing else requires a gradient.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, anchor: Tensor, take: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return y.clone()  # a view could not be modified in place afterwards

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.take(*ctx.saved_tensors, G)
        return G, None, None, None


def evened(rows: Tensor) -> Tensor:
    """Return rows (n, in) divided by the absolute value of their maximum, in fp32 or wider.

    If the maximum is zero, the rows are divided by the largest absolute value of any element instead.
    """
    rows = at_least_fp32(rows)
    if not rows.numel():
        return rows
    largest = float(rows.max().abs()) or float(rows.abs().max())
    return rows / largest if largest else rows


def weight_gradient(module: nn.Module, x: Tensor, G: Tensor) -> Tensor:
    """Return the gradient (out, in) of a module's canonical weight, from one call to a layer, embedding or convolution.

    x (…, in), indices (…) or (N, C, …) is the input, and G (…, out) or (N, out, …) the gradient of the output. The
    result, in fp32 or wider, is (out, in / groups, k…) for a convolution.
    """
    x, G = x.detach(), at_least_fp32(G.detach())
    if isinstance(module, nn.Embedding):
        rows = torch.zeros(module.num_embeddings, G.shape[-1], dtype=G.dtype, device=G.device)
        return rows.index_add_(0, x.reshape(-1), G.reshape(-1, G.shape[-1])).T
    if _is_convolution(module):
        weight = at_least_fp32(module.weight.detach()).requires_grad_()
        bias = {} if module.bias is None else {"bias": at_least_fp32(module.bias.detach())}
        with torch.enable_grad():
            y = torch.func.functional_call(bare(module), {**bias, "weight": weight}, (at_least_fp32(x),))
        return weight_format_of(module).read(module, torch.autograd.grad(y, weight, G)[0])
    return G.reshape(-1, G.shape[-1]).T @ x.reshape(-1, x.shape[-1]).to(G.dtype)


def patches(module: Convolution, x: Tensor) -> Tensor:
    """Return a convolution's input patch at each output position: the rows that the weight matrix multiplies.

    x is (N, C, …), and the result (N · positions, C · k…), in fp32 or wider, in the order of the weight's elements.
    """
    stored, x = weight_format_of(module), at_least_fp32(x)
    shape = stored.read(module, module.weight.to("meta")).shape[1:]  # without a copy of the weight
    size = shape.numel()
    identity = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *shape)
    own = {"weight": stored.write(module, identity, identity)}
    if module.bias is not None:
        own["bias"] = torch.zeros(size, dtype=x.dtype, device=x.device)
    seen: Tensor = torch.func.functional_call(bare(module), own, (x,))  # keeps stride, dilation and padding
    return seen.flatten(2).transpose(1, 2).reshape(-1, size)


def _modules_at(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    """Return a dict from path to base module, without the adapters that wrap the module."""
    index = AdapterIndex.of(model)
    modules = {}
    for path in paths:
        module = index.everything.get(path)
        if module is None:
            close = nearest(path, list(index.everything), 1)
            hint = f"; nearest: {close[0]}" if close else ""
            raise TargetError(f"module {path!r} not found in the model{hint}.", what=path, allowed=close)
        modules[path] = module.owner if isinstance(module, LoraLayer) else module
    return modules


def _is_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Return whether a module is a convolution, whose weight has kernel dimensions."""
    kind = kind_of(type(module))
    return kind is not None and bool(kind.specs(module)[0].kernel)


def _check_inputs(path: str, module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        text = f"{path} is an embedding: its inputs are indices, which have no moments. Leave it out."
        raise TargetError(text, where=path)
    if _is_convolution(module) and module.groups > 1:
        text = f"{path} is a convolution with {module.groups} groups, each with its own inputs. Leave it out."
        raise TargetError(text, where=path)


def first_input(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    """Return the first argument of a call of a module, of any shape, which may be passed by name."""
    return args[0] if args else next(iter(kwargs.values()))


def at_least_one(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield all batches; raise a DataError if there are none."""
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise DataError("`batches` is empty; pass at least one batch to collect from.", field="batches")


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set a model's training mode within a context, and restore each module's previous mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


@contextlib.contextmanager
def hooked(modules: dict[str, nn.Module], hook: Callable[[str, nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Register a forward hook, which `hook` returns for a path and a module, on each module within a context."""
    with contextlib.ExitStack() as handles:
        for path, module in modules.items():
            handles.enter_context(module.register_forward_hook(hook(path, module), with_kwargs=True))
        yield
