"""What a run is at a step beside its tensors: position, best so far, random generators, the machine.

Everything here becomes plain JSON or named tensors, so that no checkpoint needs pickle. Knows nothing about files.

Checkpoints: a folder `checkpoint-<step>` that is whole or absent, and is believed only when every byte verifies.

In it: the adapter in PEFT's files, `optimizer.safetensors`, `random.safetensors`, `state.json`, and `manifest.json`
with size and SHA-256 of each. Written out of sight and renamed into place; read newest first until one verifies.
Knows nothing about models or the loop: who saves hands in the tensors and a function that writes the adapter.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from lorakit import __version__, durable
from lorakit.errors import DiskError, LorakitError, RunError
from lorakit.ops.kernels import compiled


@dataclass
class TrainState:
    """Where a run stands after `step` optimizer steps.

    Attributes:
        step: Optimizer steps done.
        data: Position in the data, as the loader gives it.
        evaluated_step: The last step that was evaluated, or -1.
        best_step: The trained step with the lowest evaluation loss, or None.
        best_loss: Its evaluation loss.
        first_loss: Evaluation loss before the first step.
        last_loss: The newest evaluation loss.
        stale_evaluations: Evaluations since the best one.
        trained_tokens: Trained tokens of all steps.
        tokens: Tokens of all steps.
        seconds: Time in steps, without evaluations and saving.
    """

    step: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    evaluated_step: int = -1
    best_step: int | None = None
    best_loss: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    stale_evaluations: int = 0
    trained_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def note_evaluation(self, loss: float) -> bool:
        """Take an evaluation of this step into account.

        Args:
            loss: The evaluation loss.

        Returns:
            Whether it is the best of a trained step; the one before the first step is the base's and never is.
        """
        self.evaluated_step, self.last_loss = self.step, loss
        if self.step == 0:
            self.first_loss = loss
            return False
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss, self.stale_evaluations = self.step, loss, 0
            return True
        self.stale_evaluations += 1
        return False

    def as_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """The state that `as_dict` gave.

        Raises:
            RunError: A field is missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise RunError(f"The checkpoint's state does not have the fields of this version of lorakit ({odd}).")
        return cls(**values)


def random_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of every global random generator that training can draw from.

    Returns:
        Tensors by name ("torch", "cuda/0", "mps": bytes), and the plain part ("python", and "numpy" where it is
        loaded).
    """
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors.update({f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    version, words, gauss = random.getstate()
    plain: dict[str, Any] = {"python": [version, list(words), gauss]}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        plain["numpy"] = [name, keys.tolist(), *(float(r) if isinstance(r, float) else int(r) for r in rest)]
    return tensors, plain


def restore_random_state(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave; generators of devices that are not here are left alone.

    Args:
        tensors: The tensors by name.
        plain: The plain part.
    """
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda/{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda/{i}"], i)
    if "mps" in tensors and torch.backends.mps.is_available():
        torch.mps.set_rng_state(tensors["mps"])
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = sys.modules.get("numpy")
    if numpy is not None and "numpy" in plain:
        name, keys, *rest = plain["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))


def environment(
    device: torch.device, dtype: str, quantization: Mapping[str, Any] | None = None, kernels: Sequence[str] = ()
) -> dict[str, Any]:
    """What decides the bits of a result beside the inputs: the same here and there gives the same bits.

    Args:
        device: Where the run computes.
        dtype: Precision of the base.
        quantization: How the base is stored in fewer bits, or None.
        kernels: Where another way than the usual one computes, and which.

    Returns:
        Plain values by name.
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
        "kernels": list(kernels),
        "compiled_kernels": compiled.kernels() is not None,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two environments, in words.

    Args:
        before: The environment of the checkpoint.
        now: That of this process.

    Returns:
        One phrase per difference, such as "threads was 4 and is 2".
    """
    names = [*before, *(name for name in now if name not in before)]
    return [f"{n} was {before.get(n)!r} and is {now.get(n)!r}" for n in names if before.get(n) != now.get(n)]


FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
_NAME = re.compile(r"checkpoint-(\d{1,12})")
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_STATE_BYTES = 16 << 20


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds beside the adapter.

    Attributes:
        state: Position, best so far, data position.
        optimizer: Optimizer state by name.
        random: Random generators' tensors by name.
        random_plain: Their plain part.
        environment: The machine and versions (`state.environment`).
        schedule: The schedule's fields.
    """

    state: TrainState
    optimizer: Mapping[str, torch.Tensor]
    random: Mapping[str, torch.Tensor]
    random_plain: Mapping[str, Any]
    environment: Mapping[str, Any]
    schedule: Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """The outcome of looking for a checkpoint to go on from.

    Attributes:
        path: The newest checkpoint that verifies, or None.
        skipped: Newer ones that do not, each with the reason, newest first.
    """

    path: Path | None
    skipped: tuple[tuple[Path, str], ...]


def save(folder: Path, snapshot: Snapshot, write_adapter: Callable[[Path], object]) -> Path:
    """Write `checkpoint-<step>`; after a crash at any moment the old ones stand and this one is whole or absent.

    Args:
        folder: The run folder.
        snapshot: What to keep; its state gives the step.
        write_adapter: Writes the adapter's files into the folder that it is given.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskError: The disk refuses; checkpoints that are there already are unchanged, and no part of this one is left.
    """
    final = folder / f"checkpoint-{snapshot.state.step}"
    plain = {
        "format": FORMAT,
        "state": snapshot.state.as_dict(),
        "random": snapshot.random_plain,
        "environment": snapshot.environment,
        "schedule": snapshot.schedule,
    }
    try:
        with durable.publish_directory(final, replace=True) as temporary:  # the same step again, after evaluating it
            write_adapter(temporary)
            durable.write_bytes(temporary / OPTIMIZER, tensors_to_bytes(dict(snapshot.optimizer)))
            durable.write_bytes(temporary / RANDOM, tensors_to_bytes(dict(snapshot.random)))
            durable.write_json(temporary / STATE, plain)
            durable.write_bytes(temporary / MANIFEST, _manifest(temporary))
    except DiskError as cause:
        reason = getattr(cause.__cause__, "strerror", None) or str(cause)
        raise DiskError(f"{final}: cannot be written ({reason}).", where=final) from cause
    return final


def load(path: Path) -> Snapshot:
    """Read a checkpoint that verifies; the adapter's files are the caller's to read.

    Args:
        path: The checkpoint's folder.

    Returns:
        What was saved.

    Raises:
        RunError: The checkpoint is damaged; the message names the file.
    """
    verify(path)
    try:
        plain = durable.read_json(path / STATE, _MAX_STATE_BYTES)
        if plain["format"] != FORMAT:
            text = f"{path}: written in format {plain['format']}; this version of lorakit reads {FORMAT}."
            raise RunError(text, what=plain["format"], where=path, field="format", allowed=(str(FORMAT),))
        return Snapshot(
            state=TrainState.from_dict(plain["state"]),
            optimizer=tensors_from_bytes((path / OPTIMIZER).read_bytes()),
            random=tensors_from_bytes((path / RANDOM).read_bytes()),
            random_plain=plain["random"],
            environment=plain["environment"],
            schedule=plain["schedule"],
        )
    except (OSError, KeyError, TypeError, SafetensorError) as cause:
        raise RunError(f"{path}: the checkpoint cannot be read ({cause}).", where=path) from cause


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest, and the manifest against itself.

    Args:
        path: The checkpoint's folder.

    Raises:
        RunError: Something is missing or differs; the message names the first such file.
    """
    fault = _fault(path)
    if fault is not None:
        raise RunError(f"{path}: {fault}.", what=fault, where=path)


def _fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, as a clause, or None."""
    try:
        raw = durable.read_bytes(path / MANIFEST, _MAX_MANIFEST_BYTES)
        manifest = durable.parse_json(raw)
        files = manifest["files"]
        whole = raw == _canonical(manifest["step"], files) and manifest["step"] == step_of(path)
        names = set(files) if whole else set()
    except (LorakitError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole, names = False, set()
    if not whole:
        return f"{MANIFEST} is missing, damaged or of another checkpoint"
    missing = {OPTIMIZER, RANDOM, STATE} - names
    if missing:
        return f"{', '.join(sorted(missing))} is not listed in {MANIFEST}"
    for name in sorted(names):
        reason = _damage(path / name, files[name])
        if reason:
            return f"{name} {reason}"
    return None


def newest_good(folder: Path) -> Found:
    """The newest checkpoint of a run that verifies, and the newer ones that do not.

    Args:
        folder: The run folder.

    Returns:
        What was found; files are only read.
    """
    skipped: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(folder)):
        try:
            fault = _fault(path)
        except OSError as cause:
            fault = str(cause)
        if fault is None:
            return Found(path, tuple(skipped))
        skipped.append((path, fault))
    return Found(None, tuple(skipped))


def checkpoints(folder: Path) -> list[Path]:
    """The folders that bear a checkpoint's name, oldest step first, whether they verify or not."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: pair[0]) if path.is_dir()]


def prune(folder: Path, limit: int, best_step: int | None) -> list[Path]:
    """Remove the oldest checkpoints above a limit; the newest and the best always stay.

    Args:
        folder: The run folder.
        limit: How many may stay, at least 1; two stay at a limit of 1 when the best is not the newest.
        best_step: Step of the best checkpoint, or None.

    Returns:
        The folders removed.
    """
    present = checkpoints(folder)
    spared = set(present[-1:]) | {p for p in present if step_of(p) == best_step}
    removable = [path for path in present if path not in spared]
    removed = removable[: max(0, len(present) - limit)]
    for path in removed:
        discard(path)
    return removed


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for one again; its content stays for people to look at.

    Args:
        path: The checkpoint's folder.

    Returns:
        Its new place, `damaged-checkpoint-<step>` or that with a suffix.

    Raises:
        DiskError: The disk refuses.
    """
    target = path.with_name(f"damaged-{path.name}")
    if target.exists():
        target = path.with_name(f"damaged-{path.name}-{secrets.token_hex(3)}")
    try:
        return path.rename(target)
    except OSError as cause:
        raise DiskError(
            f"{path}: the damaged checkpoint cannot be set aside ({cause.strerror}).", where=path
        ) from cause


def discard(path: Path) -> None:
    """Remove a folder so that a crash leaves it whole or under a name that the next start sweeps away.

    Args:
        path: The folder.

    Raises:
        DiskError: The disk refuses.
    """
    doomed = path.with_name(f"{durable.TEMPORARY}{secrets.token_hex(6)}-{path.name}")
    try:
        path.rename(doomed)
    except OSError as cause:
        raise DiskError(f"{path}: the old checkpoint cannot be removed ({cause.strerror}).", where=path) from cause
    shutil.rmtree(doomed, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint gives, or -1 if it is not the name of one."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _damage(path: Path, entry: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
    except OSError:
        return "is missing"
    if size != entry["bytes"]:
        return f"has {size:,} bytes instead of {entry['bytes']:,}"
    if durable.sha256_file(path) != entry["sha256"]:
        return "does not have the SHA-256 that the manifest gives"
    return None


def _manifest(folder: Path) -> bytes:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": durable.sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    step = json.loads((folder / STATE).read_text(encoding="utf-8"))["state"]["step"]
    return _canonical(step, files)


def _canonical(step: int, files: Mapping[str, Any]) -> bytes:
    """The one way in which a manifest is written, so that a change of any bit of it shows."""
    values = durable.sealed({"files": files, "format": FORMAT, "step": step})
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()
