"""Quantize a base for int8 matmuls (W8A8): calibrate its linear layers on data, or use known input scales.

Nothing is changed until all batches have been run and all values have been checked. The weights are then quantized one
after another; of weights in a mapped file, only those in use are in memory. The int8 weights follow from the original
weights, the input scales and the positions of the channels that keep their dtype, so the same base gets the same int8
weights from the last two, which are small.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.allocator import file_mappings, trim
from lorakit.choices import KEPT_CHANNELS
from lorakit.core.int8.calibrating import (
    TRAINED,
    Calibration,
    Target,
    agree_on,
    choose_targets,
    release_mapped,
    run_batch,
    run_batches,
)
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.base_view import base_tensors, quantized_weights
from lorakit.core.model.checks import check_not_distributed
from lorakit.core.model.fingerprint import fingerprint
from lorakit.core.model.index import AdapterIndex, state_of
from lorakit.core.quantization.int8_linear import Int8Linear, frozen_parameter, int8_matmul_linear
from lorakit.core.statistics.collecting import Forward
from lorakit.errors import ConfigError, MergeError, ModelError, NonFiniteError
from lorakit.ops.int8_weight import SMOOTHING, input_scales

WORST_SITES = 8
"""Number of sites with the largest outliers that a report lists."""

FREED_BYTES = 32 << 20
"""Size of the freed weights after which free memory is returned to the system; each time takes about a millisecond."""

NOT_REACHED = "not reached by the calibration batches"
GAIN, KEPT = "gain", "kept"


@dataclass(frozen=True)
class Int8Base:
    """A base that was quantized for int8 matmuls.

    Attributes:
        paths: Paths of the quantized modules.
        skipped: Path of a linear layer that keeps its dtype -> the reason.
        kept: Number of input channels per weight that keep their dtype.
        smoothing: Exponent of the activations' maximum in the input scales.
        tokens: Number of tokens of the calibration batches, without padding.
        losses: Loss of the original model on each batch, or on each row of it; empty if the batches have no labels.
        worst: Path of a site -> largest |x| of its input channels divided by the median channel's, largest first.
        bytes_before: Size of the base's weights before.
        bytes_after: Size of the base's weights after; weights that are kept for `restore` are not included.
        originals: Path -> the original module, if it was kept.
    """

    model: nn.Module = field(repr=False)
    paths: tuple[str, ...]
    skipped: Mapping[str, str]
    kept: int
    smoothing: float
    tokens: int
    losses: tuple[float, ...]
    worst: Mapping[str, float]
    bytes_before: int
    bytes_after: int
    originals: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def restore(self) -> None:
        """Put the original modules back; raise a MergeError if they were not kept, or adapters changed the base."""
        if len(self.originals) != len(self.paths):
            text = "the original weights were not kept (keep=True); load the model again."
            raise MergeError(text, what="not kept", field="keep")
        index = AdapterIndex.of(self.model)
        _check_unchanged(index)
        for path, module in self.originals.items():
            module.train(index.base(path).training)
            _put_base(index, path, module)


def quantize_base(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    kept: int = KEPT_CHANNELS,
    smoothing: float = SMOOTHING,
    keep: bool = False,
    forward: Forward | None = None,
    needs_mask: bool = False,
) -> Int8Base:
    """Replace every frozen linear layer of the model's blocks by an `Int8Linear`, calibrated on batches.

    The output head, embeddings, routers, experts, tied weights, saved modules and layers outside the model's blocks
    keep their dtype. Layers that get the same input share their input scales. With torch.distributed, all processes
    must call this function; each calibrates on its own batches, and all get the same scales. If it raises an exception
    before the weights are quantized, the model is unchanged.

    Args:
        model: A model with or without adapters, changed in place.
        batches: Arguments of the model, such as `input_ids`, `attention_mask` (rows, length) and `labels`; iterated
            once. Padding is not used.
        kept: Number of input channels per weight that keep their dtype.
        smoothing: Exponent of the activations' maximum in the input scales, from 0 to 1.
        keep: Whether to keep the original modules, for `restore`.
        forward: Runs the model on one batch, and returns its loss, the losses of its rows (rows,), an output with a
            `loss`, or None.
        needs_mask: Whether padding must be excluded from the inputs of all layers. Otherwise, it is used for a layer
            whose input is neither (rows, length, …, in) nor (rows · length, in).

    Raises:
        ConfigError: A setting is not valid, the base is quantized already, or no layer can be quantized.
        DataError: There are no batches.
        NonFiniteError: An input or a weight is not finite.
        MergeError: Adapters are merged, or use a residual base.
        NotYetSupported: `needs_mask` is true, and padding cannot be excluded from the input of a layer; or the weights
            are distributed over processes.
    """
    _check_settings(kept, smoothing)
    index = AdapterIndex.of(model)
    _check_base(index)
    targets, skipped = choose_targets(index)
    calibration = Calibration(targets, needs_mask=needs_mask)
    losses, tokens = run_batches(model, batches, forward or run_batch, calibration)
    tokens = agree_on(targets, tokens)
    skipped |= {target.path: NOT_REACHED for target in targets if not bool(target.absmax.any())}
    targets = [target for target in targets if target.path not in skipped]
    _check_some(targets, skipped)
    scaled = [_checked_scales(group, kept, smoothing) for group in _grouped(targets)]
    worst, before = _worst(targets), base_bytes(index)
    originals = _replace_layers(index, scaled, keep)
    paths = tuple(target.path for target in targets)
    after = base_bytes(AdapterIndex.of(model))
    return Int8Base(model, paths, skipped, kept, smoothing, tokens, losses, worst, before, after, originals)


def record_original_base(model: nn.Module) -> None:
    """Record the fingerprint of a base in the state of its adapters, because its weights are about to be quantized."""
    index, state = AdapterIndex.of(model), state_of(model)
    if state.base is None:
        state.base = fingerprint(index).as_dict()


def int8_scales(model: nn.Module) -> dict[str, Tensor]:
    """Return the input scales and the kept channels of all int8 layers of a model.

    Returns:
        Two tensors for each group of layers that share an input: "<paths>.gain", fp32 (in,), and "<paths>.kept", int64
        (k,), where <paths> are the paths of the layers, separated by commas.
    """
    index = AdapterIndex.of(model)
    groups: dict[int, tuple[list[str], Int8Linear]] = {}
    for path in index.modules:
        layer = index.base(path)
        if isinstance(layer, Int8Linear):
            groups.setdefault(id(layer.gain), ([], layer))[0].append(path)
    scales = {}
    for paths, layer in groups.values():
        name = ",".join(paths)
        scales[f"{name}.{GAIN}"], scales[f"{name}.{KEPT}"] = layer.gain.detach(), layer.kept.detach()
    return scales


def quantize_with_scales(model: nn.Module, scales: Mapping[str, Tensor], *, keep: bool = False) -> dict[str, nn.Module]:
    """Replace linear layers of a base by int8 layers with known scales, the result of `int8_scales`, in place.

    Returns:
        A dict from path to original module if `keep` is true; otherwise it is empty, and the originals are freed.

    Raises:
        ModelError: The scales do not fit the model, which is unchanged then.
    """
    index = AdapterIndex.of(model)
    return _replace_layers(index, list(_checked_groups(index, scales)), keep)


def base_bytes(index: AdapterIndex) -> int:
    """Return the size in bytes of the base's parameters and buffers; shared tensors are counted once."""
    sizes = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for _, tensor, _ in base_tensors(index)}
    return sum(sizes.values())


def _grouped(targets: Sequence[Target]) -> list[list[Target]]:
    """Return the layers in groups that share an input and its width; each group's maximum covers all its layers."""
    groups: dict[tuple[int, int, torch.device], list[Target]] = {}
    for target in targets:
        groups.setdefault((target.group, len(target.absmax), target.absmax.device), []).append(target)
    return list(groups.values())


def _checked_scales(group: Sequence[Target], kept: int, smoothing: float) -> tuple[list[str], Tensor, Tensor]:
    """Return the paths, g (in,) and K (k,) of a group, after a check that its inputs and weights are finite."""
    for target in group:
        for what, tensor in (("input", target.absmax), ("weight", target.weight.abs().amax(0))):
            if not bool(torch.isfinite(tensor).all()):
                text = f"{target.path}: the {what} has NaN or infinite values; check the model and the data."
                raise NonFiniteError(text, what=what, where=target.path)
    absmax = torch.stack([target.absmax for target in group]).amax(0)
    scales = input_scales(absmax, [target.weight for target in group], kept, smoothing)
    for target in group:
        target.release()
    return [target.path for target in group], *scales


def _replace_layers(
    index: AdapterIndex, groups: Sequence[tuple[Sequence[str], Tensor, Tensor]], keep: bool
) -> dict[str, nn.Module]:
    """Replace groups of layers by int8 layers, given the paths, g (in,) and K (k,) of each group.

    Return a dict from path to original module; if they are not kept, each weight is freed before the next one is
    quantized, and the dict is empty.
    """
    if not keep:
        _copy_mapped(index, [path for paths, _, _ in groups for path in paths])
    originals, freed = dict[str, nn.Module](), 0
    for paths, gain, kept in groups:
        shared_gain, shared_kept = frozen_parameter(gain), frozen_parameter(kept)
        for path in paths:
            original = index.base(path)
            _put_base(index, path, int8_matmul_linear(original, shared_gain, shared_kept))
            is_mapped = release_mapped(cast(Tensor, original.weight))
            if keep:
                originals[path] = original
                continue
            freed += 0 if is_mapped else cast(Tensor, original.weight).nbytes
            original._parameters.clear()  # other objects may refer to the module
            if freed > FREED_BYTES:
                trim()  # malloc does not reuse blocks here that other threads allocated when they loaded the model
                freed = 0
    return originals


def _copy_mapped(index: AdapterIndex, paths: Collection[str]) -> None:
    """Copy the weights that are in mapped files, except for those of the layers that are about to be quantized.

    The file is then unmapped when the last of them has been replaced. Before the int8 weights exist, there is room for
    a weight and its copy.
    """
    ranges, quantized = file_mappings(), {id(index.base(path)) for path in paths}
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor, module in base_tensors(index):
        is_quantized = name.endswith(".weight") and id(module) in quantized
        first = tensor.data_ptr() if tensor.device.type == "cpu" else 0
        if is_quantized or not any(begin <= first < end for begin, end in ranges):
            continue
        key = first, tensor.shape  # weights may be tied by their memory
        if key not in copies:
            copies[key] = tensor.detach().clone()
            release_mapped(tensor)
        tensor.data = copies[key]


def _put_base(index: AdapterIndex, path: str, module: nn.Module) -> None:
    """Replace the base module at a path, inside its adapter layers if there are any."""
    layer = index.modules[path]
    if not isinstance(layer, LoraLayer):
        index.replace(layer, module)
        index.modules[path] = module
        return
    while isinstance(layer.base_layer, LoraLayer):
        layer = layer.base_layer
    layer.base_layer = module


def _worst(targets: Sequence[Target]) -> dict[str, float]:
    smallest = torch.finfo(torch.float32).tiny
    ratios = {t.path: float(t.absmax.max() / t.absmax.median().clamp_min(smallest)) for t in targets}
    largest = sorted(ratios, key=lambda path: ratios[path], reverse=True)[:WORST_SITES]
    return {path: ratios[path] for path in largest}


def _check_settings(kept: int, smoothing: float) -> None:
    if kept < 0:
        raise ConfigError.of("kept", kept, "an integer >= 0")
    if not 0 <= smoothing <= 1:
        raise ConfigError.of("smoothing", smoothing, "a number from 0 to 1")


def _check_base(index: AdapterIndex) -> None:
    """Check that a base is not quantized, sharded or changed by adapters."""
    quantized = next(iter(quantized_weights(index)), None)
    if quantized is not None:
        text = f"{quantized.name} is quantized ({quantized.base.name}); load the model without quantization for int8."
        raise ConfigError(text, what=quantized.base.name, where=quantized.name, field="base_matmul")
    check_not_distributed(index.plain_modules())
    _check_unchanged(index)


def _check_unchanged(index: AdapterIndex) -> None:
    """Check that no adapter changes the base, by a merge or by a residual base."""
    merged = index.merged_adapters()
    if merged:
        text = f"adapters are merged into the base: {', '.join(merged)}. Unmerge them first."
        raise MergeError(text, what=", ".join(merged))
    moved = next(((path, layer.moved_by) for path, layer in index.layers() if layer.moved_by), None)
    if moved is not None:
        text = f"{moved[0]}: adapter {', '.join(moved[1])} uses a residual base; use an init that keeps the base."
        raise MergeError(text, what=", ".join(moved[1]), where=moved[0])


def _check_some(targets: Sequence[Target], skipped: Mapping[str, str]) -> None:
    if targets:
        return
    trained = next((path for path, why in skipped.items() if why == TRAINED), None)
    why = "the base is trained; call model.requires_grad_(False) first" if trained else "none is a frozen nn.Linear"
    text = f"no linear layer can be quantized for int8 matmuls: {why}."
    raise ConfigError(text, what=TRAINED if trained else "no linear layers", where=trained, field="base_matmul")


def _checked_groups(index: AdapterIndex, scales: Mapping[str, Tensor]) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Yield the paths, the input scales (in,) and the kept channels (k,) of each group, on the device of its layers."""
    for name, gain in scales.items():
        names, _, part = name.rpartition(".")
        if part != GAIN:
            continue
        kept, paths = scales.get(f"{names}.{KEPT}", gain), names.split(",")
        for path in paths:
            weight = index.base(path)._parameters.get("weight") if path in index.modules else None
            if weight is None or kept is gain or gain.numel() not in weight.shape:
                text = (
                    f"the input scales of int8 matmuls do not fit this model: {path} is missing, or is not a linear "
                    f"layer with {gain.numel():,} inputs in its original dtype; use the base that they were made for."
                )
                raise ModelError(text, what=path, field="base_matmul")
            gain, kept = gain.to(weight.device), kept.to(weight.device)
        yield paths, gain, kept
