"""Save a run: checkpoints, and the adapter with its tokenizer, metadata and model card."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lorakit import core, durable, hub
from lorakit.core.model.index import state_of
from lorakit.errors import DiskError, describe
from lorakit.ops import choices
from lorakit.report import read_metrics
from lorakit.session.tokenizers import SavedTokenizer
from lorakit.tables import format_bytes
from lorakit.train.files import checkpoint
from lorakit.train.files.model_card import model_card
from lorakit.train.loop.optimizer import scaler_state, state_tensors
from lorakit.train.loop.run import Run
from lorakit.train.spec import ADAPTER, DiskSpace


def save_checkpoint(run: Run) -> Path | None:
    """Save a checkpoint and remove old ones; if the checkpoint does not fit on the disk, save only the adapter.

    All processes of the run take part, and the first one writes. The state must contain the position of the loader.

    Returns:
        The checkpoint's directory, or None if only the adapter was saved.

    Raises:
        DiskError: Not even the adapter can be written.
    """
    processes = run.spec.processes
    random = processes.exchange(checkpoint.random_state())
    return processes.from_first(lambda: _write_checkpoint(run, random))


def _write_checkpoint(run: Run, random: Sequence[checkpoint.RandomState]) -> Path | None:
    """Write a checkpoint, given the random number generator states of each process; see `save_checkpoint`."""
    spec, state = run.spec, run.state
    snapshot = checkpoint.Snapshot(
        state=state,
        optimizer=state_tensors(run.updates.optimizer, run.updates.named),
        random=random,
        environment=checkpoint.environment(
            spec.device, run.plan.job.dtype, spec.quantization_values, choices.to_strings(run.loaded.choices)
        ),
        schedule=dataclasses.asdict(run.updates.schedule),
        scaler=scaler_state(run.updates.scaler),
    )
    write_adapter, folder = partial(save_adapter, run), spec.folder
    try:
        check_checkpoint_space(folder, run.start.space)
        path = checkpoint.save(folder, snapshot, write_adapter)
    except DiskError as cause:
        checkpoint.save_adapter_only(folder, state.step, state.best_step, write_adapter)
        saved = checkpoint.describe_saved(folder)
        run.spec.progress.say(f"warning: {cause} The adapter was saved without a checkpoint. {saved}")
        return None
    checkpoint.prune(folder, spec.settings.save_total_limit, state.best_step)
    checkpoint.prune_adapters_only(folder, state.step, state.best_step)
    return path


def check_checkpoint_space(folder: Path, space: DiskSpace) -> None:
    """Raise DiskError if a checkpoint would leave too little disk space for the result of the run."""
    free = shutil.disk_usage(folder).free
    if free < space.checkpoint + space.least:
        raise DiskError(
            f"{folder}: a checkpoint of {format_bytes(space.checkpoint)} would leave no room for the final adapter "
            f"({format_bytes(space.least)}): only {format_bytes(free)} is free.",
            where=folder,
        )


def save_adapter(run: Run, folder: Path) -> None:
    """Write the run's adapter, which names its base, with the tokenizer and a model card to an existing directory.

    This is the only writer of an adapter's directory in a run: checkpoints call it, and `adapter/` is a copy.

    Raises:
        DiskError: A file cannot be written. The base's own tokenizer is omitted instead.
    """
    base = run.spec.source.recorded_name
    state_of(run.loaded.model).configs[ADAPTER].revision = run.spec.source.revision
    core.save_adapter(run.loaded.model, folder, ADAPTER, base_model_name_or_path=base, facts=adapter_metadata(run))
    try:
        _write_tokenizer(run.spec.tokenizer, folder)
    except DiskError as cause:
        if run.spec.has_own_tokenizer:  # such as one with new tokens or a template, which the base's tokenizer lacks
            raise
        for path in hub.tokenizer_files(folder):
            path.unlink()
        _note(run, f"{cause} The adapter was saved without a tokenizer; use the base's.")
    card = folder / "README.md"
    try:
        durable.write_text(card, model_card(folder, run.trainable_parameters, run.record()))
    except Exception as cause:  # noqa: BLE001 - the adapter does not need its card
        card.unlink(missing_ok=True)
        _note(run, f"The adapter was saved without a model card ({describe(cause)}).")


def _note(run: Run, text: str) -> None:
    """Print a message and add it to those of the run, once."""
    if text not in run.notes:
        run.spec.progress.say(text)
        run.notes = (*run.notes, text)


def _write_tokenizer(tokenizer: SavedTokenizer, folder: Path) -> None:
    """Write a tokenizer's files to a directory; raise DiskError if one cannot be written."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as cause:  # the tokenizers library raises a plain Exception if the disk is full
        raise DiskError(f"The tokenizer cannot be written ({' '.join(str(cause).split())}).", where=folder) from cause


def metrics_at(run: Run, *steps: int | None) -> list[dict[str, float | None]]:
    """Return the metrics of the task at each step (None: no such step) from `metrics.jsonl`, which is read once.

    Returns:
        A dict from metric to value for each step, the most important first; the value is None if the data does not
            define the metric. Empty without an evaluation at that step.
    """
    names = run.spec.task.task.summary
    rows = {row["step"]: row for row in read_metrics(run.spec.folder).evaluations} if names else {}
    at_steps = [rows.get(step, {}) for step in steps]
    return [{name: row[f"eval_{name}"] for name in names if f"eval_{name}" in row} for row in at_steps]


def undefined_at(run: Run, step: int | None) -> list[str]:
    """Return a sentence for each metric that the evaluation at a step does not define, with the reason."""
    rows = {row["step"]: row for row in read_metrics(run.spec.folder).evaluations}
    reasons = rows.get(step, {}).get("eval_undefined", {})
    return [f"The metric {name} is undefined: {reason}." for name, reason in reasons.items()]


def adapter_metadata(run: Run) -> dict[str, Any]:
    """Return the run's entries for `lorakit.json` (base, tokenizer and training) as plain JSON values."""
    spec, state = run.spec, run.state
    evaluated = state.evaluated_step == state.step
    origin: dict[str, Any] = {}
    if spec.start is not None:
        origin["from_adapter"] = {**spec.start.origin, "eval_loss": state.first_loss}
    now, first = metrics_at(run, state.step, 0)
    metrics = {"metrics": now, "first_metrics": first} if spec.task.task.summary else {}
    return {
        "base_name": spec.source.base_name,
        "tokenizer_sha256": spec.tokenizer_sha256,
        "chat_template_sha256": hub.chat_template_hash(spec.tokenizer),
        "training": {
            "step": state.step,
            "total_steps": run.limits.total_steps,
            "eval_loss": state.last_loss if evaluated and state.step else None,
            "base_eval_loss": state.first_loss if spec.start is None else None,
            "trained_tokens": state.trained_tokens,
            "data_sha256": dict(spec.hashes),
            **spec.task.as_dict(),
            **metrics,
            "prompt_format": run.batches.train_report.prompt_format,
            "shape": run.batches.train_report.shape or spec.settings.format,
            "columns": {**spec.settings.columns, **run.batches.train_report.columns},
            "max_length": spec.forecast.max_length,
            "seed": spec.settings.seed,
            "dtype": run.plan.job.dtype,
            "quantization": spec.quantization_values,
            **(
                {} if run.loaded.int8 is None else {"base_matmul": {"name": spec.base_matmul, **run.loaded.int8.record}}
            ),
            **origin,
        },
    }
