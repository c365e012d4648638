"""Weights that are stored as plain tensors of floats, as they are or transposed."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lorakit.core.bases.storage import Base, at_least_fp32
from lorakit.core.layering.cloning import clone_with
from lorakit.errors import MergeError


def _stored(module: nn.Module, parameter: str) -> Tensor:
    tensor: Tensor = getattr(module, parameter)  # not from _parameters: FSDP has plain tensors there in a forward
    return tensor.detach()


def _read(_: nn.Module, stored: Tensor) -> Tensor:
    return at_least_fp32(stored.detach())


def _write(_: nn.Module, like: Tensor, canonical: Tensor) -> Tensor:
    return canonical.to(like.dtype).contiguous()


def _place(module: nn.Module, parameter: str, stored: Tensor) -> None:
    held: nn.Parameter = module._parameters[parameter]  # type: ignore[assignment]
    held.data = stored.to(held.device)


def _clone(module: nn.Module, parameter: str, stored: Tensor) -> nn.Module:
    return clone_with(module, {parameter: stored})


def _read_transposed(_: nn.Module, stored: Tensor) -> Tensor:
    return at_least_fp32(stored.detach()).T


def _write_transposed(_: nn.Module, like: Tensor, canonical: Tensor) -> Tensor:
    return canonical.T.to(like.dtype).contiguous()


def _device(module: nn.Module, parameter: str) -> torch.device:
    return module._parameters[parameter].device  # type: ignore[union-attr]


def _computed(module: nn.Module, parameter: str) -> Tensor:
    tensor: Tensor = getattr(module, parameter)
    return tensor.detach()


def _place_computed(module: nn.Module, parameter: str, stored: Tensor) -> None:
    raise MergeError(NOT_WRITTEN.format(parameter=parameter, type=type(module).__name__))


def _device_computed(module: nn.Module, parameter: str) -> torch.device:
    return _computed(module, parameter).device


NOT_WRITTEN = (
    "The parameter {parameter!r} of {type} is computed by torch.nn.utils.parametrize, so nothing can be written into "
    "it. Remove the parametrization first."
)

DENSE = Base(
    name="dense",
    types=("torch.nn.modules.module.Module",),
    transposed=False,
    quantised=False,
    stored=_stored,
    read=_read,
    write=_write,
    place=_place,
    clone=_clone,
    device=_device,
)

COMPUTED = replace(
    DENSE,
    name="computed",
    types=(),
    written=False,
    stored=_computed,
    place=_place_computed,
    device=_device_computed,
)
"""A parameter that torch.nn.utils.parametrize computes: it can be read, and there is no place to write it to."""

TRANSPOSED = replace(
    DENSE,
    name="transposed",
    types=("transformers.pytorch_utils.Conv1D", "torch.nn.modules.sparse.Embedding"),
    transposed=True,
    read=_read_transposed,
    write=_write_transposed,
)

COMPUTED_TRANSPOSED = replace(
    TRANSPOSED,
    name="computed transposed",
    types=(),
    written=False,
    stored=_computed,
    place=_place_computed,
    device=_device_computed,
)
"""The same of a module that stores its weight as (in, out)."""
