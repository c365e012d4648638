"""Tensors that are distributed over processes: recognize them, complete their values, and write to them.

Three engines leave only a part of a parameter in each process: FSDP 2 and tensor parallelism (DTensors), FSDP 1 (views
of a flat buffer) and DeepSpeed ZeRO-3 (empty tensors with further attributes). Only operations of these engines are
used. `completed` and `write` communicate if a tensor is distributed, so every process must call them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from lorakit.errors import AdapterError, MissingExtra, NotYetSupported

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DEEPSPEED_SINCE = "0.16"
"""Oldest release of DeepSpeed that is accepted; only 0.19.8 was run, so others may differ."""

FSDP_1 = "_fsdp_wrapped_module"
"""Name under which FSDP 1 holds the module that it wraps."""

FLAT = "it is a part of a flat buffer of FSDP; pass the outermost FSDP module, or use its summon_full_params."
EVERY_PROCESS = "call this function in every process at the same point of the program"


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor of any shape is distributed by FSDP 2 or tensor parallelism."""
    return type(tensor).__module__.startswith("torch.distributed.")


def is_of_zero(tensor: Tensor) -> bool:
    """Return whether DeepSpeed has partitioned a tensor of any shape and its values are not gathered now."""
    return getattr(getattr(tensor, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE"


def is_freed_by_zero(tensor: Tensor) -> bool:
    """Return whether DeepSpeed frees a tensor of any shape after the forward pass of the module that holds it."""
    return hasattr(tensor, "ds_status")


def is_flat(tensor: Tensor) -> bool:
    """Return whether a tensor of any shape is a part of FSDP 1's flat buffer, or the buffer itself.

    A whole vector (n,) looks the same within `summon_full_params`, and is taken for a part.
    """
    return getattr(tensor, "_is_flat_param", False) or (tensor.ndim < 2 and getattr(tensor, "_fsdp_flattened", False))


def is_shard(tensor: Tensor) -> bool:
    """Return whether this process may hold only a part of the values of a tensor of any shape."""
    return is_dtensor(tensor) or is_of_zero(tensor) or is_flat(tensor)


def is_sharded(module: nn.Module) -> bool:
    """Return whether this process holds only parts of some of the parameters of a model."""
    return any(is_shard(parameter) for parameter in module.parameters())


def is_own_unit(module: nn.Module) -> bool:
    """Return whether FSDP gathers the parameters of a module only while the module is called."""
    return type(module).__module__.startswith("torch.distributed.")


def inside(module: nn.Module) -> nn.Module:
    """Return the module inside FSDP 1's wrapper, or the module itself if it has none."""
    return module._modules.get(FSDP_1) or module


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape that a tensor of any shape has with all of its values."""
    whole: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return whole


def completed(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors (…), by name, with all of their values; every process must call this for the same tensors.

    Those that are not distributed are returned unchanged.

    Raises:
        AdapterError: A tensor cannot be completed; the message names it.
        MissingExtra: A tensor is partitioned by DeepSpeed, which is not installed.
        NotYetSupported: The installed release of DeepSpeed is too old.
    """
    whole = {name: _whole(name, tensor) for name, tensor in named.items() if not is_of_zero(tensor)}
    partitioned = {name: tensor for name, tensor in named.items() if is_of_zero(tensor)}
    if partitioned:
        with _gathered(list(partitioned.values())):
            for name, tensor in partitioned.items():
                whole[name] = tensor.detach().clone()
                if whole[name].shape != shape_of(tensor):
                    raise _incomplete(name, f"DeepSpeed gathered {tuple(whole[name].shape)}; {EVERY_PROCESS}.")
    return {name: whole[name] for name in named}


def _whole(name: str, tensor: Tensor) -> Tensor:
    if is_flat(tensor):
        raise _incomplete(name, FLAT)
    if not is_dtensor(tensor):
        return tensor
    try:
        whole: Tensor = tensor.full_tensor().detach()
    except RuntimeError as cause:
        raise _incomplete(name, f"{' '.join(str(cause).split())}; {EVERY_PROCESS}.") from cause
    return whole


def write(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Copy process 0's values into distributed parameters (any shape), by name; every process must call this.

    Raises:
        AdapterError: A parameter cannot be written; the message names it.
        MissingExtra: A parameter is partitioned by DeepSpeed, which is not installed.
        NotYetSupported: The installed release of DeepSpeed is too old.
    """
    flat = next((name for name, (parameter, _) in pairs.items() if is_flat(parameter)), None)
    if flat is not None:
        raise _incomplete(flat, FLAT)
    ordered = sorted(pairs.items())  # processes may have read the values in different orders
    with torch.no_grad():
        for name, (parameter, value) in ordered:
            if is_dtensor(parameter):
                _scatter(name, parameter, value)
        partitioned = [pair for _, pair in ordered if is_of_zero(pair[0])]
        if partitioned:
            with _gathered([parameter for parameter, _ in partitioned], writer=0):
                for parameter, value in partitioned:
                    parameter.data.copy_(value)


def _scatter(name: str, parameter: DTensor, value: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    try:
        part = distribute_tensor(value.to(mesh.device_type, parameter.dtype), mesh, parameter.placements)
    except RuntimeError as cause:
        raise _incomplete(name, f"{' '.join(str(cause).split())}; {EVERY_PROCESS}.") from cause
    parameter.to_local().copy_(part.to_local())


def _gathered(tensors: Sequence[Tensor], writer: int | None = None) -> AbstractContextManager[object]:
    """Return a context in which tensors that DeepSpeed has partitioned are whole; the `writer`'s changes are kept."""
    try:
        import deepspeed
    except ImportError as cause:
        raise MissingExtra(
            "The model is partitioned by DeepSpeed ZeRO-3, but deepspeed cannot be imported: pip install "
            f"'deepspeed>={DEEPSPEED_SINCE}'.",
            what="deepspeed",
        ) from cause
    installed = str(deepspeed.__version__)
    if TorchVersion(installed) < DEEPSPEED_SINCE:
        text = f"deepspeed {installed} is too old: pip install 'deepspeed>={DEEPSPEED_SINCE}'."
        raise NotYetSupported(text, what=installed, field="deepspeed", allowed=(DEEPSPEED_SINCE,))
    context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(list(tensors), modifier_rank=writer)
    return context


def _incomplete(name: str, reason: str) -> AdapterError:
    text = f"{name} is distributed over processes and cannot be read or written here: {reason}"
    return AdapterError(text, what=name, where=name)


def has_several_processes() -> bool:
    """Return whether a launcher or a process group says that this process is one of several."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size() > 1
    return os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1")
