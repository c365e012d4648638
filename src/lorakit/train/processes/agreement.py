"""What the processes of a run must have in common: settings, data, base, tokenizer, versions and run directory."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from lorakit import core, durable, hub
from lorakit.data import BatchLoader
from lorakit.errors import DataError, RunError
from lorakit.train.files import run_folder
from lorakit.train.loop.optimizer import Named
from lorakit.train.processes.processes import Processes
from lorakit.train.setup.run_spec import RunSpec


def check_alike(spec: RunSpec) -> None:
    """Check, before weights are loaded, that all processes would train the same run in the same directory.

    Args:
        spec: The run's specification in this process.

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
    name = processes.from_first(lambda: _made_in(folder))
    try:
        with processes.together():
            if not (folder / name).exists() or not os.access(folder, os.W_OK):
                raise RunError(
                    f"{folder.absolute()}: the run directory cannot be written to, or is not the one that process 0 "
                    "has created; use an --output-dir that all processes share.",
                    where=folder,
                    field="output_dir",
                )
    finally:
        if processes.is_first:
            (folder / name).unlink(missing_ok=True)


def _made_in(folder: Path) -> str:
    """Make a temporary file in a directory, and return its name."""
    path = durable.temporary_name(folder / "probe")
    durable.write_bytes(path, b"")
    return path.name


def check_same_base(model: nn.Module, processes: Processes) -> None:
    """Check that all processes have loaded the same base, by a fingerprint of its values.

    Args:
        model: The base, without adapters.
        processes: The processes of the run.

    Raises:
        UsageError: The bases differ.
    """
    if not processes.is_alone:
        values = durable.json_bytes(core.fingerprint(model).as_dict())
        processes.check_equal({"fingerprint of the base": durable.sha256_bytes(values)})


def check_rows(loader: BatchLoader, processes: Processes) -> None:
    """Check that there is a row for each process.

    Args:
        loader: The loader of the training data.
        processes: The processes of the run.

    Raises:
        DataError: There are more processes than rows.
    """
    count = len(loader.sequences)
    if count < processes.count:
        raise DataError(
            f"the training data has fewer rows ({count}) than there are processes ({processes.count}); start fewer "
            "processes.",
            what=count,
            field="data",
        )


def share_tensors(named: Named, processes: Processes) -> None:
    """Give all processes the trainable tensors of the first one.

    Args:
        named: (name, tensor) pairs for the trainable tensors (any shape).
        processes: The processes of the run.

    Raises:
        UsageError: The processes do not have the same trainable tensors.
    """
    processes.check_equal({"trainable tensors": [(name, tuple(p.shape), p.dtype) for name, p in named]})
    processes.from_first_in_place([parameter for _, parameter in named])
