"""Shard the frozen base over the processes of a run, with FSDP2 (`torch.distributed.fsdp.fully_shard`).

Only the frozen weights of the base are sharded, in the dtype in which they are stored. Everything that is trained stays
whole in every process, so gradients, the optimizer, checkpoints and adapters are handled as without sharding. Each
transformer block is a unit: its weights are gathered for its forward pass, freed, and gathered again for its backward
pass. All other weights (embeddings, last norm, head) form one more unit, which stays gathered from the beginning of a
forward pass to the end of its backward pass, because the loss reads the head's weight after the forward pass.

With `hsdp`, each machine has the whole base, sharded over its processes, so that weights are not sent between machines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit import allocator
from lorakit.core.model.index import AdapterIndex
from lorakit.errors import NotYetSupported
from lorakit.tables import format_bytes, format_count

IGNORED, SINCE = "ignored_params", "2.7"
"""The parameter of `fully_shard` that excludes what is trained, and the first release of torch that has it."""

BLOCK = "gradient_checkpointing"
"""Attribute of the layers that transformers can recompute: the repeated blocks of a model."""

AXES = ("machines", "processes")
"""Names of the dimensions of the mesh of processes; the base is sharded over the last one."""


@dataclass(frozen=True)
class Parallel:
    """How the processes of a run share the base.

    Attributes:
        method: "ddp" (each has the whole base), "fsdp" or "hsdp".
        shape: Numbers of processes along the dimensions of the mesh: (processes,), or (machines, processes of each).
        device: The device of this process.
        reason: Why this method is used.
    """

    method: str
    shape: tuple[int, ...]
    device: torch.device
    reason: str

    @property
    def is_sharded(self) -> bool:
        """Return whether the base is sharded."""
        return self.method != "ddp"

    @property
    def loading_device(self) -> torch.device:
        """The device onto which the base is loaded: one that is to be sharded is loaded into main memory.

        There, the processes of a machine share the pages of the weight files. `shard_base` moves one block at a time.
        """
        return torch.device("cpu") if self.is_sharded else self.device


@dataclass(frozen=True)
class ShardedBase:
    """A base that is sharded over processes.

    Attributes:
        method: "fsdp" or "hsdp".
        mesh: Numbers of processes along the dimensions of the mesh; the base is sharded over the last one.
        blocks: Number of transformer blocks.
        whole_bytes: Size of the base's weights.
        local_bytes: Size of this process's part of them.
        gathered_bytes: Size of the largest weights that are gathered at once: the next block's are gathered early.
        reason: Why the base is sharded.
    """

    method: str
    mesh: tuple[int, ...]
    blocks: int
    whole_bytes: int
    local_bytes: int
    gathered_bytes: int
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers and the reason as plain JSON values."""
        return dataclasses.asdict(self)

    def line(self) -> str:
        """Return a description for the user."""
        over = " × ".join(map(str, self.mesh))
        return (
            f"The base is sharded ({self.method} over {over} processes): each process keeps "
            f"{format_bytes(self.local_bytes)} of {format_bytes(self.whole_bytes)} and gathers up to "
            f"{format_bytes(self.gathered_bytes)} at once, in {format_count(self.blocks, 'block')} and the rest."
        )


def can_ignore() -> bool:
    """Return whether `fully_shard` exists and can exclude parameters."""
    from torch.distributed import fsdp

    shard = getattr(fsdp, "fully_shard", None)
    return shard is not None and IGNORED in inspect.signature(shard).parameters


def shard_base(model: nn.Module, parallel: Parallel) -> ShardedBase:
    """Shard the frozen base of a model over the processes, and move the model to the device of this process.

    The original weights, which adapters with a residual base keep, are given up, because each process would hold them
    as a whole.

    Raises:
        NotYetSupported: The model has no known blocks, or blocks that share weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    index, device = AdapterIndex.of(model), parallel.device
    blocks, sizes = blocks_of(index), frozen_bytes(index)
    *of_blocks, rest = _unit_bytes(index, blocks, sizes)
    kept = {parameter for parameter in model.parameters() if id(parameter) not in sizes}
    for _, layer in index.layers():
        if layer.moved_by:
            layer.release_original()
    mesh = init_device_mesh(device.type, parallel.shape, mesh_dim_names=AXES[-len(parallel.shape) :])
    units = [fully_shard(index.everything[path], mesh=mesh, ignored_params=kept) for path in (*blocks, "")]
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    gc.collect()
    allocator.trim()  # otherwise, malloc keeps the memory of the whole weights
    for unit in units:  # tensors that are first allocated in an evaluation could not be used in training
        unit.unshard()
        unit.reshard()
    return ShardedBase(
        method=parallel.method,
        mesh=parallel.shape,
        blocks=len(blocks),
        whole_bytes=sum(of_blocks) + rest,
        local_bytes=local_bytes(model),
        gathered_bytes=sum(sorted(of_blocks)[-2:]) + rest,
        reason=parallel.reason,
    )


def blocks_of(index: AdapterIndex) -> list[str]:
    """Return the paths of a model's transformer blocks: the outermost layers in lists that can be recomputed."""
    lists = {path for path, module in index.everything.items() if isinstance(module, nn.ModuleList)}
    blocks = list[str]()
    for path, module in index.everything.items():
        if path.rpartition(".")[0] in lists and hasattr(module, BLOCK) and not _is_within(path, blocks):
            blocks.append(path)
    return blocks


def _is_within(path: str, blocks: Sequence[str]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def frozen_bytes(index: AdapterIndex) -> dict[int, int]:
    """Return the size in bytes of each frozen parameter of a base under adapters, by the parameter's id."""
    parameters = (p for module in index.everything.values() for p in module._parameters.values() if p is not None)
    return {id(p): p.numel() * p.element_size() for p in parameters if not p.requires_grad}


def _unit_bytes(index: AdapterIndex, blocks: Sequence[str], sizes: Mapping[int, int]) -> list[int]:
    """Return the size of each block's frozen parameters, and of the rest.

    Raises:
        NotYetSupported: There are no blocks, or a parameter belongs to several units.
    """
    if not blocks:
        kind = type(index.model).__name__
        text = f"the transformer blocks of {kind} are not known, so its base cannot be sharded; use --parallel ddp."
        raise NotYetSupported(text, what=kind, field="parallel", allowed=("ddp",))
    units: dict[str, set[int]] = {block: set() for block in (*blocks, "")}
    owners = dict[int, str]()
    for path, module in index.everything.items():
        unit = next((block for block in blocks if _is_within(path, [block])), "")
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) not in sizes:
                continue
            if owners.setdefault(id(parameter), unit) != unit:
                text = f"{path}: this weight is also one of another block, so the base cannot be sharded"
                raise NotYetSupported(f"{text}; use --parallel ddp.", what=path, where=path, field="parallel")
            units[unit].add(id(parameter))
    return [sum(sizes[one] for one in unit) for unit in units.values()]


def local_bytes(model: nn.Module) -> int:
    """Return the size of this process's part of a sharded base in bytes, outside of forward and backward passes."""
    from torch.distributed.tensor import DTensor

    parts = [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return sum(part.numel() * part.element_size() for part in parts)


@contextlib.contextmanager
def without_hints() -> Iterator[None]:
    """Hide FSDP2's hint about outputs that are views; it matters only if they are changed in place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.fsdp\.")
        yield
