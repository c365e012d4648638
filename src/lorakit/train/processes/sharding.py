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
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lorakit import allocator, plan
from lorakit.core.model import frozen
from lorakit.core.model.index import AdapterIndex
from lorakit.core.variants import moving_variant
from lorakit.errors import LorakitError, NotYetSupported, UsageError
from lorakit.tables import format_bytes, format_count
from lorakit.train.loop.progress import Progress
from lorakit.train.settings.types import SHARDED

if TYPE_CHECKING:
    from lorakit.train.setup.run_spec import RunSpec

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
        """Whether the base is sharded."""
        return self.method in SHARDED

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


def check_sharding(spec: RunSpec) -> None:
    """Check, before weights are loaded, that the base can be sharded if the settings ask for it.

    Args:
        spec: The run's specification.

    Raises:
        NotYetSupported: The base cannot be sharded together with another setting, which the message names.
        UsageError: This release of torch cannot do it.
    """
    found = obstacle(spec) if spec.settings.parallel in SHARDED and not spec.processes.is_alone else None
    if found is not None:
        raise found


def obstacle(spec: RunSpec) -> LorakitError | None:
    """Return the error that tells why the base of a run cannot be sharded, or None if it can.

    Args:
        spec: The run's specification.
    """
    config, asked = spec.forecast.config, f"parallel is {spec.settings.parallel!r}, but"
    if not _can_ignore():
        text = (
            f"{asked} torch {torch.__version__} cannot exclude tensors from sharding; it takes torch {SINCE} or newer."
        )
        return UsageError(text, what=torch.__version__, field="parallel", allowed=("ddp",))
    if spec.settings.fit is not None:
        text = f"{asked} --fit cannot measure a run whose base is sharded; omit it, or use --parallel ddp."
        return NotYetSupported(text, what=spec.settings.fit, field="fit")
    if spec.quantization is not None:
        name = spec.quantization.name
        text = f"{asked} a base quantized by {name} cannot be sharded; use --parallel ddp, or omit --quantization."
        return NotYetSupported(text, what=name, field="quantization")
    if spec.base_matmul == "int8":
        text = f"{asked} a base that is multiplied in int8 cannot be sharded; use --parallel ddp."
        return NotYetSupported(text, what="int8", field="base_matmul")
    variant = moving_variant(config)
    if variant is not None:
        text = f"{asked} {variant.title} changes the base's weights, which cannot be sharded then; use --parallel ddp."
        return NotYetSupported(text, what=variant.title, field=variant.field)
    if config.layer_replication:
        text = f"{asked} replicated layers share their weights, which cannot be sharded then; use --parallel ddp."
        return NotYetSupported(text, what=config.layer_replication, field="layer_replication")
    if spec.task.task.needs_batch:
        text = f"{asked} batches of task {spec.task.task.name} may run the model unequally often; use --parallel ddp."
        return NotYetSupported(text, what=spec.task.task.name, field="task")
    return None


def _can_ignore() -> bool:
    """Return whether `fully_shard` exists and can exclude parameters."""
    from torch.distributed import fsdp

    shard = getattr(fsdp, "fully_shard", None)
    return shard is not None and IGNORED in inspect.signature(shard).parameters


def choose_parallel(spec: RunSpec, estimated: plan.Plan) -> Parallel:
    """Choose how the processes of a run share the base; `auto` shards it only if it does not fit otherwise.

    Args:
        spec: The run's specification.
        estimated: The plan of one process.

    Returns:
        The choice of the first process, with its reason.

    Raises:
        UsageError: The numbers of processes on the machines do not allow the method.
    """
    processes, asked = spec.processes, spec.settings.parallel
    whole, ranks = (processes.count,), processes.exchange(processes.local_rank)
    if processes.is_alone:
        return Parallel("ddp", whole, spec.device, "there is one process")
    if asked == "hsdp":
        return _hybrid(ranks, spec.device, f"parallel is {asked!r}")
    if asked != "auto":
        return Parallel(asked, whole, spec.device, f"parallel is {asked!r}")
    found = processes.from_first(lambda: _automatic(spec, estimated, ranks))
    return dataclasses.replace(found, device=spec.device)


def _automatic(spec: RunSpec, estimated: plan.Plan, ranks: Sequence[int]) -> Parallel:
    """Return the first way in which the planned memory fits into the device, as `lorakit plan --nproc` chooses it."""
    whole, local = (len(ranks),), len(ranks) // max(1, ranks.count(0))
    if spec.device.type != "cuda":
        return Parallel("ddp", whole, spec.device, f"the processes share the memory of the {spec.device.type}")
    limit = torch.cuda.get_device_properties(spec.device).total_memory
    found = obstacle(spec)
    chosen = plan.choose_parallel(
        estimated,
        plan.Cluster(len(ranks), local),
        limit_bytes=limit,
        obstacle=None if found is None else f"the base cannot be sharded: {found.message}",
        must_fit=False,
    )
    if chosen.way == "hsdp":
        return _hybrid(ranks, spec.device, chosen.reason)
    return Parallel(chosen.way, whole, spec.device, chosen.reason)


def _hybrid(ranks: Sequence[int], device: torch.device, reason: str) -> Parallel:
    """Return how to shard the base over the processes of each machine, given the local rank of each process."""
    machines = max(1, ranks.count(0))
    local = len(ranks) // machines
    if list(ranks) != list(range(local)) * machines or local == 1:
        raise UsageError(
            f"parallel is 'hsdp', which shards the base over the processes of each machine, but these have the local "
            f"ranks {', '.join(map(str, ranks))}; start the same number of processes, at least 2, on each machine, or "
            "use --parallel fsdp.",
            what=tuple(ranks),
            field="parallel",
            allowed=("ddp", "fsdp"),
        )
    if machines == 1:
        return Parallel("fsdp", (local,), device, f"{reason}; on one machine, hsdp is the same as fsdp")
    return Parallel("hsdp", (machines, local), device, reason)


def share_base(model: nn.Module, spec: RunSpec, parallel: Parallel, progress: Progress) -> ShardedBase | None:
    """Shard the base of a run if it is to be sharded, and report how the processes share it.

    Args:
        model: The adapted model, after everything that reads whole weights outside of forward passes.
        spec: The run's specification.
        parallel: How the processes share the base.
        progress: Receives the report.

    Raises:
        NotYetSupported: The model has no known blocks, or blocks that share weights.
    """
    if not parallel.is_sharded:
        if not spec.processes.is_alone:
            progress.detail(f"parallel: {parallel.method}, because {parallel.reason}")
        return None
    made = shard_base(model, parallel)
    progress.say(made.line())
    return made


def shard_base(model: nn.Module, parallel: Parallel) -> ShardedBase:
    """Shard the frozen base of a model over the processes, and move the model to the device of this process.

    The original weights, which adapters with a residual base keep, are given up, because each process would hold them
    as a whole.

    Args:
        model: The adapted model, in main memory.
        parallel: How the processes share the base: "fsdp" or "hsdp".

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
    with frozen.replacing(index):
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
    """Return the paths of a model's transformer blocks: the outermost layers in lists that can be recomputed.

    Args:
        index: The index of a transformers model.
    """
    lists = {path for path, module in index.everything.items() if isinstance(module, nn.ModuleList)}
    found = list[str]()
    for path, module in index.everything.items():
        if path.rpartition(".")[0] in lists and hasattr(module, BLOCK) and not _is_within(path, found):
            found.append(path)
    return found


def _is_within(path: str, blocks: Sequence[str]) -> bool:
    return any(path == block or path.startswith(f"{block}.") for block in blocks)


def frozen_bytes(index: AdapterIndex) -> dict[int, int]:
    """Return the size in bytes of each frozen parameter of a base, by the parameter's id.

    Args:
        index: The index of the model with its adapters.
    """
    held = (p for module in index.everything.values() for p in module._parameters.values() if p is not None)
    return {id(p): p.numel() * p.element_size() for p in held if not p.requires_grad}


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
    """Return the size of this process's part of a sharded base, in bytes.

    Args:
        model: The model, outside of its forward and backward passes.
    """
    from torch.distributed.tensor import DTensor

    parts = [parameter.to_local() for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return sum(part.numel() * part.element_size() for part in parts)


@contextlib.contextmanager
def without_hints(base: ShardedBase | None) -> Iterator[None]:
    """Hide FSDP2's hint about outputs that are views; it matters only if they are changed in place.

    Args:
        base: The sharded base, or None, for which nothing is hidden.
    """
    with warnings.catch_warnings():
        if base is not None:
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.fsdp\.")
        yield
