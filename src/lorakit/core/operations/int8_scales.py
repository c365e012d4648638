"""The input scales of a base that is multiplied in int8: read them, and quantize the same base with them again.

The int8 weights follow from the original weights, the input scales and the positions of the channels that keep their
dtype. With the last two, which are small, the same base gets the same int8 weights without calibration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lorakit.core.model.fingerprint import fingerprint
from lorakit.core.model.index import AdapterIndex, state_of
from lorakit.core.operations.int8_base import replace_layers
from lorakit.core.quantization.int8 import Int8Linear
from lorakit.errors import ModelError

GAIN, KEPT = "gain", "kept"


def record_original_base(model: nn.Module) -> None:
    """Record the fingerprint of a model's base, because its weights are about to be quantized for int8 matmuls.

    Args:
        model: A model with adapters, whose state holds the record.
    """
    index, state = AdapterIndex.of(model), state_of(model)
    if state.base is None:
        state.base = fingerprint(index).as_dict()


def int8_scales(model: nn.Module) -> dict[str, Tensor]:
    """Return the input scales and the kept channels of all int8 layers of a model.

    Args:
        model: A model whose base `quantize_base` has quantized, with or without adapters.

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
    found = {}
    for paths, layer in groups.values():
        name = ",".join(paths)
        found[f"{name}.{GAIN}"], found[f"{name}.{KEPT}"] = layer.gain.detach(), layer.kept.detach()
    return found


def quantize_with_scales(model: nn.Module, scales: Mapping[str, Tensor], *, keep: bool = False) -> dict[str, nn.Module]:
    """Replace linear layers of a base by int8 layers with known input scales, as `quantize_base` did before.

    Args:
        model: A model with the original weights, with or without adapters; changed in place.
        scales: Result of `int8_scales`.
        keep: Whether to return the original modules, so that they are not freed.

    Returns:
        A dict from path to original module; empty if they are not kept.

    Raises:
        ModelError: The scales do not fit the model, which is unchanged then.
    """
    index = AdapterIndex.of(model)
    return replace_layers(index, list(_checked(index, scales)), keep)


def _checked(index: AdapterIndex, scales: Mapping[str, Tensor]) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Yield the paths, the input scales (in,) and the kept channels (k,) of each group, on the device of its layers."""
    for name, gain in scales.items():
        names, _, part = name.rpartition(".")
        if part != GAIN:
            continue
        kept, paths = scales.get(f"{names}.{KEPT}", gain), names.split(",")
        for path in paths:
            weight = index.base(path)._parameters.get("weight") if path in index.modules else None
            if weight is None or kept is gain or gain.numel() not in weight.shape:
                raise ModelError(
                    f"the input scales of int8 matmuls do not fit this model: {path} is missing, or is not a linear "
                    f"layer with {gain.numel():,} inputs in its original dtype; use the base that they were made for.",
                    what=path,
                    field="base_matmul",
                )
            gain, kept = gain.to(weight.device), kept.to(weight.device)
        yield paths, gain, kept
