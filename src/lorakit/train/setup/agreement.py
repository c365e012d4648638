"""What the processes of a run have in common (settings, data, base, trainable tensors), and how they share the base."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lorakit import core, durable, hub, plan
from lorakit.data import BatchLoader
from lorakit.errors import DataError, LorakitError, NotYetSupported, RunError, UsageError
from lorakit.tables import format_count
from lorakit.train.files import run_folder
from lorakit.train.loop.optimizer import Named
from lorakit.train.processes.processes import ALONE, Processes
from lorakit.train.processes.sharding import SINCE, Parallel, ShardedBase, can_ignore, shard_base
from lorakit.train.settings.types import SHARDED
from lorakit.train.spec import RunSpec


def pick_device(word: str, processes: Processes = ALONE) -> torch.device:
    """Return the device that the setting `device` selects; each of several processes on a machine gets its own GPU.

    Raises:
        UsageError: The device is not available on this machine, or several processes would share it.
    """
    return hub.pick_device(word if processes.is_alone else _word_of(word, processes))


def _word_of(word: str, processes: Processes) -> str:
    """Return the device of one of several processes as a value of the setting `device`."""
    local, devices = processes.local_rank, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if word == "auto":
        word = "cuda" if devices else "cpu"
    if word == "cuda" and local >= devices:
        text = (
            f"no GPU is left for process {processes.rank}, which is number {local} on its machine (LOCAL_RANK): torch "
            f"finds {format_count(devices, 'CUDA device')} there, and processes cannot share one; start one process "
            "for each GPU, or use --device cpu."
        )
        raise UsageError(text, what=local, field="device")
    if word not in ("cuda", "cpu"):
        text = (
            f"device is {word!r}, which the {processes.count} processes of this run cannot share; use --device cuda "
            "(one GPU for each process on a machine) or --device cpu."
        )
        raise UsageError(text, what=word, field="device", allowed=("auto", "cuda", "cpu"))
    return f"cuda:{local}" if word == "cuda" else word


def check_alike(spec: RunSpec) -> None:
    """Check, before weights are loaded, that all processes would train the same run in the same directory.

    Raises:
        UsageError: Something differs between processes; the message names it.
        RunError: A process does not see the run directory of the first one, or cannot write to it.
    """
    processes = spec.processes
    if processes.is_alone:
        return
    processes.check_equal(
        {
            **spec.settings.as_dict(),
            **{f"version of {name}": version for name, version in run_folder.versions().items()},
            **{f"data {path}": digest for path, digest in spec.hashes.items()},
            "base": spec.source.base_name,
            "shape of the data": spec.data.train.shape,
            "columns of the data": dict(spec.data.train.columns),
            "labels": spec.task.as_dict(),
            "tokenizer": spec.tokenizer_sha256,
            "chat template": hub.chat_template_hash(spec.tokenizer),
            "device": spec.device.type,
            "base matmul": spec.base_matmul,
        }
    )
    _check_same_folder(spec.folder, processes)


def _check_same_folder(folder: Path, processes: Processes) -> None:
    """Check that all processes see a file that the first one makes in the run directory, and remove the file."""
    name = processes.from_first(lambda: _new_file(folder))
    try:
        with processes.together():
            if not (folder / name).exists() or not os.access(folder, os.W_OK):
                text = (
                    f"{folder.absolute()}: the run directory cannot be written to, or is not the one that process 0 "
                    "has created; use an --output-dir that all processes share."
                )
                raise RunError(text, where=folder, field="output_dir")
    finally:
        if processes.is_first:
            (folder / name).unlink(missing_ok=True)


def _new_file(folder: Path) -> str:
    """Make a temporary file in a directory, and return its name."""
    path = durable.temporary_name(folder / "probe")
    durable.write_bytes(path, b"")
    return path.name


def check_same_base(model: nn.Module, processes: Processes) -> None:
    """Check that all processes have loaded the same base, by a fingerprint of its values.

    Raises:
        UsageError: The bases differ.
    """
    if not processes.is_alone:
        values = durable.json_bytes(core.fingerprint(model).as_dict())
        processes.check_equal({"fingerprint of the base": durable.sha256_bytes(values)})


def check_rows(loader: BatchLoader, processes: Processes) -> None:
    """Check that there is a row of training data for each process.

    Raises:
        DataError: There are more processes than rows.
    """
    count = len(loader.sequences)
    if count < processes.count:
        text = (
            f"the training data has fewer rows ({count}) than there are processes ({processes.count}); start fewer "
            "processes."
        )
        raise DataError(text, what=count, field="data")


def share_tensors(named: Named, processes: Processes) -> None:
    """Give all processes the trainable tensors (any shape) of the first one.

    Raises:
        UsageError: The processes do not have the same trainable tensors.
    """
    processes.check_equal({"trainable tensors": [(name, tuple(p.shape), p.dtype) for name, p in named]})
    processes.from_first_in_place([parameter for _, parameter in named])


def check_sharding(spec: RunSpec) -> None:
    """Check, before weights are loaded, that the base can be sharded if the settings ask for it.

    Raises:
        NotYetSupported: The base cannot be sharded together with another setting, which the message names.
        UsageError: This release of torch cannot do it.
    """
    error = obstacle(spec) if spec.settings.parallel in SHARDED and not spec.processes.is_alone else None
    if error is not None:
        raise error


def obstacle(spec: RunSpec) -> LorakitError | None:
    """Return the error that tells why the base of a run cannot be sharded, or None if it can."""
    config, asked = spec.forecast.config, f"parallel is {spec.settings.parallel!r}, but"
    if not can_ignore():
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
    variant = core.moving_variant(config)
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


def choose_parallel(spec: RunSpec, estimated: plan.Plan) -> Parallel | None:
    """Return the first process's choice of how several processes share the base, or None for one process.

    `auto` shards it only if the plan of one process does not fit otherwise.

    Raises:
        UsageError: The numbers of processes on the machines do not allow the method.
    """
    processes, asked = spec.processes, spec.settings.parallel
    if processes.is_alone:
        return None
    whole, ranks = (processes.count,), processes.exchange(processes.local_rank)
    if asked == "hsdp":
        return _hybrid(ranks, spec.device, f"parallel is {asked!r}")
    if asked != "auto":
        return Parallel(asked, whole, spec.device, f"parallel is {asked!r}")
    chosen = processes.from_first(lambda: _automatic(spec, estimated, ranks))
    return dataclasses.replace(chosen, device=spec.device)


def _automatic(spec: RunSpec, estimated: plan.Plan, ranks: Sequence[int]) -> Parallel:
    """Return the first way in which the planned memory fits into the device, as `lorakit plan --nproc` chooses it."""
    whole, local = (len(ranks),), len(ranks) // max(1, ranks.count(0))
    if spec.device.type != "cuda":
        return Parallel("ddp", whole, spec.device, f"the processes share the memory of the {spec.device.type}")
    limit = torch.cuda.get_device_properties(spec.device).total_memory
    error = obstacle(spec)
    chosen = plan.choose_parallel(
        estimated,
        plan.Cluster(len(ranks), local),
        limit_bytes=limit,
        obstacle=None if error is None else f"the base cannot be sharded: {error.message}",
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
        text = (
            f"parallel is 'hsdp', which shards the base over the processes of each machine, but these have the local "
            f"ranks {', '.join(map(str, ranks))}; start the same number of processes, at least 2, on each machine, or "
            "use --parallel fsdp."
        )
        raise UsageError(text, what=tuple(ranks), field="parallel", allowed=("ddp", "fsdp"))
    if machines == 1:
        return Parallel("fsdp", (local,), device, f"{reason}; on one machine, hsdp is the same as fsdp")
    return Parallel("hsdp", (machines, local), device, reason)


def share_base(model: nn.Module, parallel: Parallel | None, spec: RunSpec) -> ShardedBase | None:
    """Shard the base of a run if it is to be sharded, and report how the processes share it.

    Everything that reads whole weights outside of forward passes comes before.

    Raises:
        NotYetSupported: The model has no known blocks, or blocks that share weights.
    """
    if parallel is None:
        return None
    if not parallel.is_sharded:
        spec.progress.detail(f"parallel: {parallel.method}, because {parallel.reason}")
        return None
    sharded = shard_base(model, parallel)
    spec.processes.in_lockstep = True
    spec.progress.say(sharded.line())
    return sharded
