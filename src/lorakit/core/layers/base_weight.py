"""`BaseWeight`: how the base weight of a layer changes when adapters are merged, unmerged or unloaded.

A layer handles only its own weight; `merging` decides which layers change, and in which order. `merged_weight` also
measures how far the stored weight deviates from the exact sum. The deviation is a rounding error for a plain weight,
and much larger for a quantized weight.

The weight of a grouped convolution cannot hold an update, because the update covers all input channels for every output
channel. Instead, the update is merged into a convolution with one group, whose weight is `groups` times as large.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.core.kinds.convolution import Convolution
from lorakit.core.layers.adapter_component import MergeOptions, SiteMerge, StagedMerge, base_not_kept
from lorakit.core.layers.stored_weight import Replacement, StoredWeight, give_back
from lorakit.core.quantization import NOT_WRITTEN, Stored, at_least_fp32, weight_format_of
from lorakit.core.shards import is_shard
from lorakit.core.variants import variant_named
from lorakit.errors import MergeError

StagedBias = tuple[Tensor, Tensor | None]
"""The bias to store in the base, (out,), and the original bias to keep, (out,).

The second value is None if the bias to store is the original itself.
"""

Merged = tuple[Replacement, Tensor, Tensor]
"""The weight or plain module to store; W₀, (out, in); and the exact sum of the updates, (out, in)."""


class BaseWeight(StoredWeight):
    """A wrapper around a base module that can merge adapters into one of the module's weights."""

    def check_mergeable(self, path: str, adapters: Sequence[str]) -> None:
        """Raise a MergeError if an adapter can never be merged here, or if its bias cannot be stored."""
        for name in adapters:
            variant = variant_named(self.variant[name]) if name in self.r else None
            if variant is not None and isinstance(variant.update, str):
                text = f"Adapter {name!r} at {path} is {variant.title}, which cannot be merged: {variant.update}."
                raise MergeError(text, what=name, where=path)
        self._check_place_of_bias(path, adapters)

    def _check_place_of_bias(self, path: str, adapters: Sequence[str]) -> None:
        """Reject adapters whose B has a bias if the base has no bias, or if another adapter trains the base bias."""
        bringing = [name for name in adapters if self.bias_of(name) is not None]
        trainer = None if self.old_bias is None else self.old_bias[0]
        other = next((name for name in bringing if trainer not in (None, name)), None)
        if other is not None:
            text = f"Adapter {other!r} has lora_bias, but {trainer!r} trains the base's bias at {path}; detach it."
            raise MergeError(text, what=other, where=path, field="lora_bias")
        if bringing and self.original_bias() is None:
            text = (
                "Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias: "
                f"{path} cannot store the adapter's bias."
            )
            raise MergeError(text, what=bringing[0], where=path, field="lora_bias")

    def check_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> None:
        """Raise a MergeError if an adapter is merged or cannot be merged, or if the weight cannot be written."""
        here = [name for name in adapters if name in self.r]
        if not here:
            return
        self.check_mergeable(path, here)
        self.check_not_merged(path, here)
        base = self.base
        self.check_written(path)
        if self.merged_adapters and not self.keeps_base:
            raise base_not_kept(self.merged_adapters, path)
        replaces = options.dense is not None and (base.quantized or self.spec.groups > 1)
        if replaces and self.old_bias is not None and (options.in_place or self.old_bias[0] not in adapters):
            trainer = self.old_bias[0]
            text = f"dense=True replaces the module at {path}, but adapter {trainer!r} trains its bias in place."
            raise MergeError(text, what=trainer, where=path)

    def check_unmerge(self, path: str, adapters: Sequence[str]) -> None:
        """Raise a MergeError if a merged adapter cannot be unmerged: base values were not kept or cannot be written."""
        lost = [name for name in adapters if name in self.merged_adapters]
        if lost and not self.keeps_base:
            raise base_not_kept(lost, path)
        if lost:
            self.check_written(path)

    def check_written(self, path: str) -> None:
        """Raise a MergeError if a weight is computed in each forward pass, or if this process has only a part of it."""
        weight = self.source._parameters.get(self.spec.parameter)
        if weight is not None and is_shard(weight):
            text = f"{path}: the base is sharded over processes; save the adapter, and merge it in one process."
            raise MergeError(text, what=type(weight).__name__, where=path, field=self.spec.parameter)
        if not self.base.written:
            text = NOT_WRITTEN.format(parameter=self.spec.parameter, type=type(self.owner).__name__)
            raise MergeError(text, what=type(self.owner).__name__, where=path, field=self.spec.parameter)

    def stage_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> StagedMerge | None:
        """Compute the weight with additional adapters merged, and measure its error; nothing is changed.

        With `keep_base=False`, the merged weight is discarded after its error has been measured, and is recomputed on
        commit. This avoids holding a second copy of the model in memory.

        Raises:
            MergeError: The result is not finite.
        """
        new = [name for name in adapters if name in self.r]
        if not new:
            return None
        stored, report = merged_weight(path, self, new, options)
        bias = self._staged_bias([*self.merged_adapters, *new])
        if options.keep_base is False:
            return StagedMerge(report, functools.partial(self._write_unkept, new, options, bias))
        kept = self.kept
        if kept is None and not isinstance(stored, nn.Module):
            kept = self.original()
            if options.keep_base == "cpu" and isinstance(kept, Tensor) and not self.base.quantized:
                kept = kept.to("cpu")
        return StagedMerge(report, functools.partial(self._put_merged, stored, kept, bias, new, options))

    def stage_unmerge(self, adapters: Sequence[str]) -> StagedMerge | None:
        """Compute the weight without the given adapters, bitwise identical to the original if no others are merged."""
        left = [name for name in self.merged_adapters if name not in adapters]
        if left == self.merged_adapters:
            return None
        stored, bias = self.stored_with(left), self._staged_bias(left)
        return StagedMerge(None, functools.partial(self._put_unmerged, stored, bias, left))

    def merged_tensors(self, adapters: Sequence[str], options: MergeOptions) -> dict[str, Tensor]:
        """Return parameter name -> tensor (any shape) with adapters merged: the weight, and the bias if one has a bias.

        The layer is not changed. The result is empty if no adapter has factors here; with `dense`, it is dequantized.

        Raises:
            MergeError: An adapter cannot be merged into the weight, or the merged bias is not finite.
        """
        here = [name for name in adapters if name in self.r]
        if not here:
            return {}
        stored, _, _ = sum_of_updates(self, here, options)
        tensors = {self.spec.parameter: stored} if isinstance(stored, Tensor) else {}
        if isinstance(stored, nn.Module):
            tensors = {
                name: parameter.detach() for name, parameter in stored._parameters.items() if parameter is not None
            }
        bias = self.merged_bias(here)
        return tensors if bias is None else {**tensors, "bias": bias}

    def merged_bias(self, adapters: Sequence[str]) -> Tensor | None:
        """Return the sum of the base bias and the adapters' biases, (out,), or None if no merge affects the bias."""
        staged = self._staged_bias(adapters)
        return None if staged is None else staged[0]

    def unload(self) -> nn.Module:
        """Return the base module with its merged adapters; first remove a residual base that no merged adapter uses."""
        if self.moved_by and not set(self.moved_by).intersection(self.merged_adapters):
            self.moved_by = ()
            self.put_stored(self.stored_with(self.merged_adapters))
        return self.owner

    def follow(self, tied: BaseWeight) -> None:
        """Update the records after a merge or unmerge in the tied layer whose factors and weight this layer uses."""
        self.merged_adapters = list(tied.merged_adapters)
        if self.merged_adapters or not self.moved_by:
            self.kept = tied.kept if self.merged_adapters else None

    def stored_with(self, merged: Sequence[str]) -> Replacement:
        """Return the weight or module to store after merging adapters; the unmerged weight if `merged` is empty."""
        if merged:
            return self.with_updates(merged, MergeOptions())[0]
        return self.original(moved=bool(self.moved_by))

    def with_updates(self, names: Sequence[str], options: MergeOptions) -> Merged:
        """Return `sum_of_updates` of these adapters, as a plain module if an earlier merge installed a plain module."""
        if self.replaced:
            options = dataclasses.replace(options, dense=self.owner.get_parameter("weight").dtype)
        return sum_of_updates(self, names, options)

    def _write_unkept(self, new: Sequence[str], options: MergeOptions, bias: StagedBias | None) -> None:
        """Recompute the merged weight and store it without keeping the original."""
        stored, _, _ = self.with_updates([*self.merged_adapters, *new], options)
        self._put_merged(stored, self.kept, bias, new, options)

    def _put_merged(
        self,
        stored: Replacement,
        kept: Stored | None,
        bias: StagedBias | None,
        new: Sequence[str],
        options: MergeOptions,
    ) -> None:
        """Store a merged weight; if this layer is being untied, store it in a separate parameter."""
        parameter, keeps = self.spec.parameter, options.keep_base is not False
        self.kept = kept
        untied = id(self) in options.apart and not self.base.quantized
        shared = self.owner._parameters.get(parameter) if untied else None
        if shared is not None and isinstance(stored, Tensor):  # the other modules keep the shared parameter
            if keeps and self.tied_weight is None:
                self.tied_weight = shared
            self.owner._parameters[parameter] = nn.Parameter(stored, requires_grad=shared.requires_grad)
        else:
            self.put_stored(stored)
            if not keeps:
                self.replaced = ()
        self._put_bias(bias)
        self.merged_adapters = [*self.merged_adapters, *new]

    def _put_unmerged(self, stored: Replacement, bias: StagedBias | None, left: list[str]) -> None:
        if self.tied_weight is not None and not left and isinstance(stored, Tensor):
            give_back(self.owner, self.spec.parameter, self.tied_weight, stored)
            self.tied_weight = None
        else:
            self.put_stored(stored)
        self._put_bias(bias)
        self.merged_adapters = left
        if not left:
            self.kept = self.kept if self.moved_by else None

    def _staged_bias(self, adapters: Sequence[str]) -> StagedBias | None:
        """Return the bias to store and the original bias to keep, or None if no merge affects the bias."""
        bringing = [name for name in adapters if self.bias_of(name) is not None]
        old = self.original_bias()
        if old is None or not (bringing or self.kept_bias is not None):
            return None
        if not bringing:
            return old, None
        with torch.no_grad():
            total = at_least_fp32(old).clone()
            for name in bringing:
                total += self.bias_of(name).to(total.dtype) * self.scaling[name]  # type: ignore[union-attr]
            if not bool(torch.isfinite(total).all()):
                text = (
                    f"NaNs detected in the merged weights: the bias of B in {', '.join(adapters)} is NaN or infinite."
                )
                raise MergeError(text, what=", ".join(adapters), field="lora_bias")
            return total.to(old.dtype), old.detach()

    def _put_bias(self, staged: StagedBias | None) -> None:
        if staged is not None:
            bias, self.kept_bias = staged
            parameter = self.owner._parameters.get("bias")
            if parameter is not None:
                parameter.data = bias
            else:  # HQQ stores the bias as a plain attribute
                self.owner.__dict__["bias"] = bias


def in_one_group(layer: StoredWeight, names: Sequence[str]) -> Merged:
    """Merge adapters into a grouped convolution, as a convolution with one group.

    Returns:
        The new convolution, the base weight, and the exact sum of updates; both tensors are expanded to one group,
        (out, in, k…).
    """
    kind = layer.kind
    spec = dataclasses.replace(layer.spec, groups=1)
    shape = (spec.out_features, spec.in_features, *spec.kernel)
    W = kind.flat_weight(layer.spec, layer.read()).reshape(shape)
    total = torch.zeros_like(W)
    for name in names:
        factor = layer.factor(name)
        update = factor.variant.update
        if isinstance(update, str):
            continue  # already rejected before the merge
        A, B = (half.to(W.dtype) for half in factor.multiplied())
        A, B = kind.flat(layer.spec, A, B)
        wide = dataclasses.replace(factor, A=A.view(-1, *shape[1:]), B=B.view(*B.shape, *[1] * len(spec.kernel)))
        delta = (B @ A).view(shape) * factor.scale
        total += update(kind, spec, W, delta, wide)
    source: Convolution = layer.source  # type: ignore[assignment]  # only convolutions have groups
    return _convolution(source, W + total), W, total


def _convolution(source: Convolution, W: Tensor) -> nn.Module:
    """Return a one-group convolution with weight W (out, in, k…) and the geometry and bias of `source`."""
    moves = {name: getattr(source, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    convolution: Convolution = nn.utils.skip_init(
        type(source), W.shape[1], W.shape[0], source.kernel_size, bias=False, device=W.device, **moves
    )
    convolution.weight = nn.Parameter(W.to(source.weight.dtype), requires_grad=source.weight.requires_grad)
    convolution.bias = source.bias
    return convolution.train(source.training)


def sum_of_updates(layer: StoredWeight, names: Sequence[str], options: MergeOptions) -> Merged:
    """Return W₀ + Σ update in stored form, plus W₀ and the exact Σ update, each (out, in).   [docs/math.md (11)]

    If the site has a residual base, the sum starts from that base in two cases: if one of the given adapters uses it,
    or if the adapters stay on the model, because unmerged adapters may use it. The sum is rounded only once. With
    `options.dense`, the stored form is a plain module that replaces a quantized module or a grouped convolution.
    """
    with torch.no_grad():
        if options.dense is not None and layer.spec.groups > 1:
            return in_one_group(layer, names)
        (base, source), original = layer.storage, layer.original()
        W = base.read(source, original)
        from_moved = bool(layer.moved_by) and (options.in_place or not set(layer.moved_by).isdisjoint(names))
        start = layer.read(layer.moved_by[0]) if from_moved else W
        total = functools.reduce(torch.add, (layer.addition(name, W) for name in names))
        if options.dense is not None and base.quantized:
            stored = base.dense(source, start + total, options.dense)
        else:
            stored = base.write(source, original, start + total)
        return stored, W, total + (start - W) if from_moved else total


def merged_weight(
    path: str, layer: BaseWeight, new: Sequence[str], options: MergeOptions
) -> tuple[Replacement, SiteMerge]:
    """Return what to store at a site after merging `new` too, and the effect; raise a MergeError if not finite."""
    stored, W, total = layer.with_updates([*layer.merged_adapters, *new], options)
    (base, source), new_weight = layer.storage, stored
    if isinstance(stored, nn.Module):
        base, source = weight_format_of(stored), stored
        new_weight = base.stored(stored, "weight")
    after, exact = base.read(source, new_weight), W + total
    wanted, whole = float(torch.linalg.vector_norm(total)), float(torch.linalg.vector_norm(exact))
    lost = float(torch.linalg.vector_norm(exact.sub_(after)))
    if not math.isfinite(lost) and not bool(torch.isfinite(after).all()):  # a finite norm implies finite elements
        text = (
            f"NaNs detected in the merged weights. The adapter {', '.join(new)} seems to be broken: merging it at "
            f"{path} gives NaN or infinite weights. Nothing was changed."
        )
        raise MergeError(text, what=", ".join(new), where=path)
    changed = int(torch.count_nonzero(after != W)) / max(after.numel(), 1)
    error = lost / max(whole, torch.finfo(torch.float32).tiny)
    return stored, SiteMerge(path, 1.0 if wanted == 0 else max(0.0, 1.0 - lost / wanted), changed, error)
