"""Fused decoder layers for generation: calls without gradients whose keys and values are in `lorakit.ops.cache`.

Norms, rotary positions, attention and the gate run as kernels. Linear modules are called, so that their hooks run and
each row can have its own adapter. The class of a layer is changed to a subclass, in place, as in `few_rows`. As in
`accelerate`, only layers whose source is known and whose probes agree are changed, and a layer's own `forward` runs if
a call is not supported or if anything that the fused one relies on has changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lorakit.architectures.known_forwards import known_forwards
from lorakit.identity.contract import Contract
from lorakit.identity.identities import Identities, original_class
from lorakit.ops.activation import activate, activation
from lorakit.ops.cache import BLOCK, CACHE_NAMES, Blocks, PassCache, Stored, attend_cached, is_short
from lorakit.ops.kernels import kernels_for
from lorakit.ops.kernels.compiled import ACTIVATIONS
from lorakit.ops.kernels.decoder_layer import LayerOperands
from lorakit.ops.norm import Norm, normalize
from lorakit.ops.rotary import rotated
from lorakit.ops.segments import SHORT_CHUNK
from lorakit.speed import attention, decoder
from lorakit.speed.admission import Bound, FusedForward, Known, Parts, candidates, compare, one_of_each
from lorakit.speed.attention import rotary_of
from lorakit.speed.contract import contract_for
from lorakit.speed.decoder import BoundLayer
from lorakit.speed.feed_forward import BoundFeedForward, activation_at
from lorakit.speed.linear import route_of, row_linear
from lorakit.speed.norm import operands_of
from lorakit.speed.patching import DECODES, Fused, Options, is_watched, modules_at, subclass, walk
from lorakit.speed.probe import TOKENS, Call, attempt, calls, eval_mode, frozen, token_ids
from lorakit.speed.submodules import is_activation_watched, is_supported, knows_all


@dataclass(frozen=True)
class BoundDecoding(Bound):
    """A fused decoder layer with a cache, bound to one module: `layer` has its parts, and `block` is not None."""

    layer: BoundLayer
    block: BoundFeedForward

    def accepts(self, options: Options) -> bool:
        """Return whether a call has such a cache, and all its other arguments, besides the hidden states, are known."""
        others = {name: value for name, value in options.items() if name not in CACHE_NAMES}
        return _cache_of(options) is not None and knows_all(self.layer.attention.module, others, attention.READ)

    def run(self, x: Tensor, options: Options) -> Tensor | None:
        """Return the output (B, T, d) for x (B, T, d), or None if the layer's own `forward` must run."""
        first, second = (each.around(self.module, frozen=False) for each in self.layer.sublayers)
        of_heads = operands_of(self.layer.attention.norms, frozen=False)
        cache, mask = _cache_of(options), options.get("attention_mask")
        if first is None or second is None or of_heads is None or cache is None or not self._may_run(x):
            return None
        norms = (first.before, first.after, second.before, second.after, *(of_heads or (None, None)))
        if any(norm is not None and norm.weight.dtype != x.dtype for norm in norms):
            return None
        if mask is None and 1 < cache.new < cache.table.shape[1]:
            return None  # what a missing mask means depends on the implementation of attention
        whole = self._whole(x, cache, options, norms)
        if whole is not None:
            return whole
        attended = self._attended(_normalized(x, first.before), cache, options, of_heads)
        x = x + _normalized(attended, first.after)
        return x + _normalized(self._fed(_normalized(x, second.before)), second.after)

    def _may_run(self, x: Tensor) -> bool:
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or self.module.training or x.ndim != 3:
            return False
        if is_watched(self.layer.attention.module, captures=False) or is_watched(self.block.module):
            return False
        return not is_activation_watched(activation_at(self.block.module, self.block.layout))

    def _whole(self, x: Tensor, cache: PassCache, options: Options, norms: Sequence[Norm | None]) -> Tensor | None:
        """Return the output (B, T, d) of the layer for x (B, T, d) from one kernel, or None if it does not support it.

        Its bits are those of the separate kernels.
        """
        bound, act = self.layer.attention, ACTIVATIONS.get(self.block.act)
        kernels = kernels_for(x, *(None if norm is None else norm.weight for norm in norms))
        kernel = None if kernels is None else kernels.layer
        if kernel is None or act is None or x.numel() > kernel.most_rows.get(x.dtype, 0) * x.shape[-1]:
            return None
        if cache.lengths is None or bound.window is not None or not is_short(cache) or cache.new > SHORT_CHUNK:
            return None
        rotary = rotary_of(bound, options)
        tables = None if rotary is None else (rotary.cos, rotary.sin)
        if tables and any(t.dtype != x.dtype or t.ndim != 3 or not t.is_contiguous() for t in tables):
            return None
        if any(norm is not None and norm.kind != "rms" for norm in norms):
            return None
        *inner, down = modules_at(self.block.module, self.block.layout.linears)
        modules = [*modules_at(bound.module, bound.layout.linears), *inner, down]
        route = route_of(modules)
        linears = [row_linear(module, route, x) for module in modules]
        if any(one is None for one in linears):
            return None
        if len(inner) == 1:
            linears.insert(5, None)
        of_keys = linears[1].W.shape[0]  # type: ignore[union-attr]
        like = x.new_empty(0, of_keys // bound.head_dim, bound.head_dim)
        stored = cache.room(like, vars(bound.module)["layer_idx"])
        of_norms = [None if norm is None else (norm.weight, norm.eps, norm.offset) for norm in norms]
        places = cache.write, cache.table, cache.lengths
        given = LayerOperands(linears, of_norms, act, bound.scale, tables, *stored, *places)
        return kernel.decoder_layer(x.contiguous(), given)

    def _attended(self, x: Tensor, cache: PassCache, options: Options, norms: list[Norm | None]) -> Tensor:
        """Return the output of attention (B, T, d) for normalized hidden states x (B, T, d)."""
        bound = self.layer.attention
        *inputs, output = modules_at(bound.module, bound.layout.linears)
        q, k, v = (_called(module, x).unflatten(-1, (-1, bound.head_dim)) for module in inputs)
        q_norm, k_norm = norms or (None, None)
        q, k, rotary = _normalized(q, q_norm), _normalized(k, k_norm), rotary_of(bound, options)
        if rotary is not None:
            q, k = rotated(q, rotary), rotated(k, rotary)
        stored, mask = cache.store(k, v, vars(bound.module)["layer_idx"]), options.get("attention_mask")
        y = attend_cached(q, stored, cache, bound.scale, mask, is_full=bound.window is None)
        return _called(output, y.flatten(2))

    def _fed(self, x: Tensor) -> Tensor:
        """Return the output of the feed-forward block (B, T, d) for normalized hidden states x (B, T, d)."""
        *inner, down = modules_at(self.block.module, self.block.layout.linears)
        first, *up = (_called(module, x).flatten(0, 1) for module in inner)
        active = activate(activation(self.block.act), first, up[0] if up else None, torch.empty_like(first))
        return _called(down, active.view(*x.shape[:2], -1))


def _called(module: nn.Module, x: Tensor) -> Tensor:
    """Return the contiguous output of a linear module."""
    y: Tensor = module(x)
    return y.contiguous()


def _normalized(x: Tensor, norm: Norm | None) -> Tensor:
    return x if norm is None else normalize(x, norm)


def _cache_of(options: Options) -> PassCache | None:
    cache = next((options[name] for name in CACHE_NAMES if options.get(name) is not None), None)
    return cache if type(cache) is PassCache else None


def match(module: nn.Module) -> BoundDecoding | str:
    """Return the fused `forward` of a decoder layer for calls with a cache, or why the layer is not supported."""
    layer = decoder.match(module)
    if isinstance(layer, str):
        return layer
    block, attends = layer.block, layer.attention
    has_dropout = attends.layout.output_dropout or any(one.layout.dropout for one in layer.sublayers)
    if block is None or layer.is_parallel or len(attends.layout.inputs) != 3 or attends.is_eager or has_dropout:
        return "its layout is not supported in generation"
    if block.layout.is_fused or block.layout.inner_dropout or block.layout.output_dropout or not attends.causal:
        return "its layout is not supported in generation"
    if not isinstance(getattr(attends.module, "layer_idx", None), int):
        return "its place in the cache is unknown"
    return BoundDecoding(module, layer, block)


FUSED = FusedForward("decoder layer", match, residual=True)


def fuse_decoding(model: nn.Module) -> int:
    """Give the decoder layers of a model a fused `forward` for generation with `lorakit.generate`.

    Outputs agree up to rounding; a probe checks this. Adapters may be attached before or after.

    Args:
        model: A causal language model of transformers; changed in place.

    Returns:
        The number of layers that were changed: those that are supported and have not been changed before.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return 0
    known = Known(Identities(), known_forwards())
    with frozen(model), eval_mode(model):
        wanted, _ = candidates(dict(walk(model)), (FUSED,), known)
        wanted = {path: part for path, part in wanted.items() if DECODES not in vars(part.module)}
        probed = attempt(lambda: _agree(model, wanted)) if wanted else False
    if probed is not True:
        return 0
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    contract = contract_for([part.module for part in wanted.values()], None, known.identities)
    for part in wanted.values():
        module, kind = part.module, type(part.module)
        if kind not in classes:
            classes[kind] = subclass(kind, DECODES)
        module.__dict__[DECODES] = Fused(part.bound.accepts, _always, _if_holds(part.bound, contract))
        module.__class__ = classes[kind]
    return len(wanted)


def undo_fused_decoding(model: nn.Module) -> None:
    """Undo `fuse_decoding`."""
    for _, module in walk(model):
        if vars(module).pop(DECODES, None) is not None:
            module.__class__ = original_class(module)


def _always() -> bool:
    return True


def _if_holds(bound: Bound, contract: Contract) -> Callable[[Tensor, Options], Any]:
    """Return a function that calls `run` with supported hidden states, if the contract of all layers holds.

    It is checked once per forward pass: in many layers, one after another, that takes as long as a layer's small steps.
    """

    def run(x: Tensor, options: Options) -> Any:
        cache = _cache_of(options)
        if cache is None or not is_supported(x):
            return None
        if cache.holds is None:
            cache.holds = contract.holds()
        return bound.run(x, options) if cache.holds else None

    return run


def _agree(model: nn.Module, wanted: Parts) -> bool:
    """Return whether the outputs of one layer of each kind agree, when prompts are read and when rows are continued."""
    firsts, _ = one_of_each(wanted, wanted)
    bounds = {path: part.bound for path, part in firsts.items()}
    has_windows = any(isinstance(bound, BoundDecoding) and bound.layer.attention.window for bound in bounds.values())
    passes = _passes(model, {path: bound.module for path, bound in bounds.items()}, has_windows=has_windows)
    verdicts = [compare(bounds[path], call, residual=True) for recorded in passes for path, call in recorded.items()]
    return bool(verdicts) and not any(verdict.why for verdict in verdicts)


def _passes(model: nn.Module, modules: Mapping[str, nn.Module], *, has_windows: bool) -> Iterator[Mapping[str, Call]]:
    """Yield the calls to modules in passes with a cache: over prompts, parts of prompts, and tokens of several rows."""
    name = next(name for name in CACHE_NAMES if name in inspect.signature(model.forward).parameters)
    ids = token_ids(model, 1, 2 * BLOCK)
    pool, rows = Blocks(ids.device), (Stored(), Stored())
    steps: list[tuple[tuple[Stored, ...], int, Literal["before", "after"] | None]]
    steps = [(rows[:1], TOKENS, None), (rows[1:], BLOCK, None), (rows[1:], TOKENS, None), (rows, 1, "before")]
    if not has_windows:
        steps.append((rows, 1, "after"))
    for some, new, padding in steps:
        for row in some:
            row.extend(pool, new)
        cache = PassCache(pool, some, new, padding, is_contiguous=False)
        inputs = {"input_ids": ids[:, :new].expand(len(some), new), "use_cache": True, name: cache}
        inputs |= {"attention_mask": cache.mask, "position_ids": cache.positions}
        recorded, _ = calls(model, modules, stop=True, inputs=inputs)
        yield recorded
        for row in some:
            row.length += new
