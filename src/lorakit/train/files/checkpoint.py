"""Training checkpoints: what they contain, and how they are written and verified.

A checkpoint is a directory `checkpoint-<step>` that contains the adapter in PEFT's format, `optimizer.safetensors`,
`random.safetensors`, `state.json`, and `manifest.json`, which lists the size and SHA-256 of every other file. A
checkpoint is valid only if every file matches the manifest. Each checkpoint is written to a temporary directory that is
then renamed, so the checkpoint is either complete or absent. All values are plain JSON or named tensors, so pickle is
not needed. If a checkpoint does not fit on the disk, only the adapter is saved, as `adapter-only-<step>`. Such an
adapter loads like any other, but a run cannot be resumed from it.

This module depends on neither models nor the loop; callers pass the tensors and a function that writes the adapter.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from lorakit import __version__, durable, durable_folders
from lorakit.errors import DiskError, LorakitError, RunError
from lorakit.machine import library_variables
from lorakit.ops.kernels import compiled
from lorakit.train.files.run_folder import adapter_only_path, adapters_only, as_disk_error, checkpoints, step_of
from lorakit.train.files.train_state import TrainState


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the state of every global random number generator that training may use.

    Returns:
        A dict of 1-D uint8 tensors (with keys such as "torch", "cuda/0" and "mps"), and a dict of plain values (with
        the keys "python" and "numpy").
    """
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors.update({f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    version, words, gauss = random.getstate()
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    numbers = [float(one) if isinstance(one, float) else int(one) for one in rest]
    return tensors, {"python": [version, list(words), gauss], "numpy": [name, keys.tolist(), *numbers]}


def restore_random_state(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
    """Restore the random number generators from the result of `random_state`; absent devices are skipped."""
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda/{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda/{i}"], i)
    if "mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["mps"])
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    if "numpy" in plain:  # checkpoints of earlier versions may lack it
        name, keys, *rest = plain["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def environment(
    device: torch.device, dtype: str, quantization: Mapping[str, Any] | None = None, kernels: Sequence[str] = ()
) -> dict[str, Any]:
    """Return everything, apart from the inputs, that affects the exact bits of a result, as plain JSON values.

    Given equal inputs, equal environments produce bit-identical results. `kernels` are the autotuned kernel choices
    that differ from the defaults.
    """
    return {
        "lorakit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "dtype": dtype,
        "quantization": dict(quantization) if quantization else None,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa_limit": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        **library_variables(),
        "kernels": list(kernels),
        "compiled_kernels": compiled.kernels() is not None,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the differences between two environments in phrases such as "threads was 4 and is 2"."""
    names = {**before, **now}
    return [f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]


FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_STATE_BYTES = 16 << 20
_OTHER = "process/"  # beginning of the names of random number generator states of other processes

RandomState: TypeAlias = "tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]"
"""States of the random number generators of a process, from `random_state`."""


@dataclass(frozen=True)
class Snapshot:
    """The contents of a checkpoint, except for the adapter.

    Attributes:
        state: Progress of the run, including the position in the data.
        optimizer: Optimizer state, from `optimizer.state_tensors`.
        random: Result of `random_state` in each process of the run, by rank.
        environment: Hardware, package versions and other factors that affect results, from `environment`.
        schedule: Fields of the learning rate schedule.
        scaler: State of the loss scaler, from `scaling.scaler_state`; empty if the base is not in fp16.
    """

    state: TrainState
    optimizer: Mapping[str, torch.Tensor]
    random: Sequence[RandomState]
    environment: Mapping[str, Any]
    schedule: Mapping[str, Any]
    scaler: Mapping[str, float] = field(default_factory=dict)

    def random_of(self, rank: int, processes: int) -> RandomState | None:
        """Return the random number generator states of a process; None if another number of processes saved them."""
        return self.random[rank] if len(self.random) == processes else None


def save(folder: Path, snapshot: Snapshot, write_adapter: Callable[[Path], object]) -> Path:
    """Write `checkpoint-<step>` atomically: after a crash, it is complete or absent. Older checkpoints do not change.

    `write_adapter` writes the adapter's files to a given directory.

    Raises:
        DiskError: The checkpoint cannot be written; older checkpoints are unchanged, and the partial one is removed.
    """
    final = folder / f"checkpoint-{snapshot.state.step}"
    (own_tensors, own_plain), *others = snapshot.random
    plain = {
        "format": FORMAT,
        "state": dataclasses.asdict(snapshot.state),
        "random": own_plain,
        "environment": snapshot.environment,
        "schedule": snapshot.schedule,
        "scaler": dict(snapshot.scaler),
        **({"random_of_others": [plain for _, plain in others]} if others else {}),
    }
    random = dict(own_tensors)
    for rank, (tensors, _) in enumerate(others, start=1):
        random.update({f"{_OTHER}{rank}/{name}": tensor for name, tensor in tensors.items()})
    try:
        with durable_folders.publish_directory(final, replace=True) as temporary:  # saved again after an evaluation
            write_adapter(temporary)
            durable.write_bytes(temporary / OPTIMIZER, tensors_to_bytes(dict(snapshot.optimizer)))
            durable.write_bytes(temporary / RANDOM, tensors_to_bytes(random))
            durable.write_json(temporary / STATE, plain)
            durable.write_bytes(temporary / MANIFEST, _manifest(temporary, snapshot.state.step))
    except DiskError as cause:
        raise _unwritable(final, cause) from cause
    return final


def load(path: Path) -> Snapshot:
    """Verify a checkpoint and read everything in it except the adapter.

    Raises:
        RunError: The checkpoint is damaged, or its format is not supported.
    """
    verify(path)
    try:
        plain = durable.read_json(path / STATE, _MAX_STATE_BYTES)
        if plain["format"] != FORMAT:
            text = f"{path}: format {plain['format']} is not supported; this version of lorakit reads format {FORMAT}."
            raise RunError(text, what=plain["format"], where=path, field="format", allowed=(str(FORMAT),))
        random = tensors_from_bytes((path / RANDOM).read_bytes())
        own = {name: tensor for name, tensor in random.items() if not name.startswith(_OTHER)}
        others = enumerate(plain.get("random_of_others") or [], start=1)
        return Snapshot(
            state=TrainState.from_dict(plain["state"]),
            optimizer=tensors_from_bytes((path / OPTIMIZER).read_bytes()),
            random=[(own, plain["random"]), *((_with_prefix(random, f"{_OTHER}{rank}/"), one) for rank, one in others)],
            environment=plain["environment"],
            schedule=plain["schedule"],
            scaler=plain.get("scaler") or {},
        )
    except (OSError, KeyError, TypeError, SafetensorError) as cause:
        raise RunError(f"{path}: the checkpoint cannot be read ({cause}).", where=path) from cause


def _with_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def verify(path: Path) -> None:
    """Check every file in a checkpoint against the manifest, and the manifest against the SHA-256 stored in it.

    Raises:
        RunError: A file is missing or damaged; the message names the first such file.
    """
    fault = _fault(path)
    if fault is not None:
        raise RunError(f"{path}: {fault}.", what=fault, where=path)


def _fault(path: Path) -> str | None:
    """Return a clause that describes the first problem in a checkpoint's files, or None."""
    try:
        raw = durable.read_bytes(path / MANIFEST, _MAX_MANIFEST_BYTES)
        manifest = durable.parse_json(raw)
        files = manifest["files"]
        whole = raw == _canonical(manifest["step"], files) and manifest["step"] == step_of(path)
        names = set(files) if whole else set()
    except (LorakitError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole, names = False, set()
    if not whole:
        return f"{MANIFEST} is missing, damaged or from another checkpoint"
    missing = {OPTIMIZER, RANDOM, STATE} - names
    if missing:
        return f"{MANIFEST} does not list {', '.join(sorted(missing))}"
    for name in sorted(names):
        reason = _damage(path / name, files[name])
        if reason:
            return f"{name} {reason}"
    return None


def newest_valid(folder: Path) -> Path | None:
    """Return the newest valid checkpoint in a run directory, which is not modified, or None."""
    return next((path for path, fault in verified(folder) if fault is None), None)


def verified(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Verify the checkpoints of a run one at a time, newest first; its directory is not modified.

    Yields (directory, fault) pairs; the fault is a clause that describes the checkpoint's first problem, or None.
    """
    for path in reversed(checkpoints(folder)):
        try:
            fault = _fault(path)
        except OSError as cause:
            fault = str(cause)
        yield path, fault


def prune(folder: Path, limit: int, best_step: int | None) -> None:
    """Remove the oldest checkpoints if there are more than `limit`; the newest and the best are always kept.

    So with a limit of 1, two are kept if the best is not the newest.
    """
    present = checkpoints(folder)
    spared = set(present[-1:]) | {p for p in present if step_of(p) == best_step}
    for path in [path for path in present if path not in spared][: max(0, len(present) - limit)]:
        discard(path)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to `damaged-checkpoint-<step>` so that no run uses it again; its files are kept.

    Raises:
        DiskError: The directory cannot be renamed.
    """
    target = path.with_name(f"damaged-{path.name}")
    if target.exists():
        target = path.with_name(f"damaged-{path.name}-{secrets.token_hex(3)}")
    with as_disk_error(path, "the damaged checkpoint cannot be renamed"):
        return path.rename(target)


def discard(path: Path) -> None:
    """Remove a checkpoint; a crash leaves it intact or in a temporary directory that the next run deletes.

    Raises:
        DiskError: The directory cannot be renamed.
    """
    doomed = durable.temporary_name(path)
    with as_disk_error(path, "the old checkpoint cannot be removed"):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def save_adapter_only(folder: Path, step: int, best_step: int | None, write_adapter: Callable[[Path], object]) -> Path:
    """Atomically save an adapter without a checkpoint, then remove older adapters saved this way, except the best one.

    `write_adapter` writes the adapter's files to a given directory.

    Raises:
        DiskError: The adapter cannot be written; older adapters are unchanged.
    """
    final = adapter_only_path(folder, step)
    try:
        with durable_folders.publish_directory(final, replace=True) as temporary:
            write_adapter(temporary)
    except DiskError as cause:
        raise _unwritable(final, cause) from cause
    prune_adapters_only(folder, step, best_step)
    return final


def prune_adapters_only(folder: Path, step: int, best_step: int | None) -> None:
    """Remove adapters that were saved without a checkpoint before `step`, except the best one."""
    for path in adapters_only(folder):
        if step_of(path) < step and step_of(path) != best_step:
            shutil.rmtree(path, ignore_errors=True)


def describe_saved(folder: Path) -> str:
    """List what is saved in a run directory: the newest valid checkpoint, and adapters saved without a checkpoint."""
    valid = newest_valid(folder)
    saved = [] if valid is None else [f"{valid.name} (complete, for --resume)"]
    saved += [f"{path.name} (the adapter alone)" for path in adapters_only(folder)]
    return f"Saved in {folder}: {', '.join(saved) or 'no checkpoint and no adapter'}."


def _unwritable(path: Path, cause: DiskError) -> DiskError:
    reason = getattr(cause.__cause__, "strerror", None) or str(cause)
    return DiskError(f"{path}: cannot be written ({reason}).", where=path)


def _damage(path: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except OSError:
        return "is missing"
    if size != entry["bytes"]:
        return f"has {size:,} bytes instead of {entry['bytes']:,}"
    if durable.sha256_file(path) != entry["sha256"]:
        return "does not match its SHA-256 in the manifest"
    return None


def _manifest(folder: Path, step: int) -> bytes:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": durable.sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return _canonical(step, files)


def _canonical(step: int, files: Mapping[str, Any]) -> bytes:
    """Serialize a manifest in the only form that verification accepts, so that any changed bit is detected."""
    values = durable.sealed({"files": files, "format": FORMAT, "step": step})
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
