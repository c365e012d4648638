"""End of a run: publishes the adapter of its best step, draws the plot, completes the record."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorakit import hub
from lorakit.errors import DiskError, RunError
from lorakit.machine import peak_rss_bytes
from lorakit.tables import format_bytes, format_percent, format_rate, format_seconds
from lorakit.train import adapter_only, checkpoint
from lorakit.train.publishing import model_card, plot_loss, publish_adapter, write_tokenizer
from lorakit.train.run_folder import ADAPTER_FOLDER, versions, write_record
from lorakit.train.run_spec import Ready

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        folder: The run folder.
        ending: "finished", "stopped early" or "interrupted".
        adapter: Folder of the adapter; None after an interruption.
        steps: Optimizer steps done.
        total_steps: Optimizer steps asked for.
        adapter_step: The step that `adapter` is of; None after an interruption.
        first_loss: Evaluation loss of the base, or None without evaluation data.
        best_loss: Evaluation loss of `adapter`, or None.
        trainable_parameters: Numbers trained.
        total_parameters: Numbers of the base.
        adapter_bytes: Size of the adapter's weights file.
        base_bytes: Size of the base's weights in memory.
        tokens_per_second: Over all steps, without evaluations and saving.
        peak_rss_bytes: Largest resident size of the process.
        seconds: From the call to the return.
        dtype: Precision of the base.
        plan: What was planned, as `Plan.as_dict()` gives it.
        notes: Sentences a person should read.
        checkpoint_step: The step that `--resume` goes on from after an interruption; None without one.
    """

    folder: Path
    ending: str
    adapter: Path | None
    steps: int
    total_steps: int
    adapter_step: int | None
    first_loss: float | None
    best_loss: float | None
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    base_bytes: int
    tokens_per_second: float
    peak_rss_bytes: int
    seconds: float
    dtype: str
    plan: dict[str, Any]
    notes: tuple[str, ...]
    checkpoint_step: int | None = None

    def lines(self, verbose: bool = False) -> list[str]:
        """Return the result as lines of text, the most important first.

        Args:
            verbose: Add sizes, the planned speed and the plot.
        """
        if self.ending == "interrupted":
            return self._interrupted()
        speed, planned = format_rate(self.tokens_per_second, "tokens/s"), ""
        rate = (self.plan.get("lora") or {}).get("tokens_per_second")
        if verbose and rate:
            planned = f" (estimated {format_rate(rate, 'tokens/s')})"
        lines = [
            _result_sentence(self.first_loss, self.best_loss),
            f"Adapter: {self.adapter} (step {self.adapter_step}, {format_bytes(self.adapter_bytes)})",
            f"{'Stopped early' if self.ending == 'stopped early' else 'Finished'} at step {self.steps} of "
            f"{self.total_steps} in {format_seconds(self.seconds)}, {speed}{planned}, peak memory "
            f"{format_bytes(self.peak_rss_bytes)}.",
        ]
        if verbose:
            share = format_percent(self.trainable_parameters / self.total_parameters)
            lines.append(
                f"Trained {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share}); the base "
                f"has {format_bytes(self.base_bytes)}."
            )
        return [*lines, *self.notes]

    def _interrupted(self) -> list[str]:
        again = f"lorakit train --output-dir {self.folder} --resume"
        where = f"Interrupted at step {self.steps} of {self.total_steps}"
        if self.checkpoint_step == self.steps:
            return [f"{where}; a checkpoint was saved. Resume with: {again}"]
        start = "the beginning" if self.checkpoint_step is None else f"step {self.checkpoint_step}"
        return [
            f"{where}; its checkpoint could not be saved. {adapter_only.account(self.folder)}",
            f"Resume from {start} with: {again}",
        ]

    def as_dict(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        values = dataclasses.asdict(self)
        values.update(folder=str(self.folder), adapter=str(self.adapter) if self.adapter else None)
        values["notes"] = list(self.notes)
        return values


def finish(ready: Ready, ending: str, seconds: float) -> RunResult:
    """Publish what the run came to; after an interruption only the record is written.

    Args:
        ready: The run.
        ending: "finished", "stopped early" or "interrupted".
        seconds: Time since the run was asked for.

    Returns:
        The result, which also stands in `run.json`.

    Raises:
        RunError: No checkpoint of the run verifies.
        DiskError: The disk refuses.
    """
    request, state = ready.request, ready.state
    notes = list(ready.notes)
    adapter = step = None
    if ending != "interrupted":
        step, source = _chosen(ready, notes)
        adapter = _publish(ready, step, source, notes)
        if source == adapter_only.place(request.folder, step):
            shutil.rmtree(source, ignore_errors=True)
        notes.append(plot_loss(request.folder, f"{request.source.base_name}: loss over the steps"))
        if state.best_loss is not None and state.first_loss is not None and state.best_loss >= state.first_loss:
            notes.append("The adapter is not better than the base on the evaluation data; do not use it.")
    result = RunResult(
        folder=request.folder,
        ending=ending,
        adapter=adapter,
        steps=state.step,
        total_steps=ready.pace.total_steps,
        adapter_step=step,
        first_loss=state.first_loss,
        best_loss=state.best_loss,
        trainable_parameters=ready.trainable_parameters,
        total_parameters=ready.total_parameters,
        adapter_bytes=(adapter / _WEIGHTS).stat().st_size if adapter else 0,
        base_bytes=ready.base_bytes,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        peak_rss_bytes=peak_rss_bytes(),
        seconds=seconds,
        dtype=ready.planned.dtype,
        plan=dict(ready.planned.values),
        notes=tuple(notes),
        checkpoint_step=_resumed_from(request.folder) if ending == "interrupted" else None,
    )
    try:
        write_record(request.folder, {**record(ready, ending), "result": result.as_dict()})
    except DiskError as cause:  # what the run came to is saved all the same
        return dataclasses.replace(result, notes=(*result.notes, f"{cause} It does not say how the run ended."))
    return result


def record(ready: Ready, status: str) -> dict[str, Any]:
    """The content of `run.json` but for the result.

    Args:
        ready: The run.
        status: "running", "failed", "interrupted", "stopped early" or "finished".

    Returns:
        Plain JSON values.
    """
    request = ready.request
    held_out = ready.batches.held_out_report
    return {
        "status": status,
        "settings": request.settings.as_dict(),
        "resolved": {
            "base": request.source.base_name,
            "dtype": ready.planned.dtype,
            "quantization": request.quantization,
            "device": str(request.device),
            "max_length": request.forecast.max_length,
            **dataclasses.asdict(ready.pace),
            "trainable_parameters": ready.trainable_parameters,
            "total_parameters": ready.total_parameters,
        },
        "versions": versions(),
        "data_sha256": dict(request.hashes),
        "data": ready.batches.train_report.as_dict(),
        "evaluation_data": held_out.as_dict() if held_out else None,
        "plan": dict(ready.planned.values),
    }


def adapter_facts(ready: Ready) -> dict[str, Any]:
    """What `lorakit.json` of a saved adapter says beside core's own: base, tokenizer, training.

    Args:
        ready: The run, at the step that is saved.

    Returns:
        Plain JSON values.
    """
    request, state = ready.request, ready.state
    evaluated = state.evaluated_step == state.step
    return {
        "base_name": request.source.base_name,
        "tokenizer_sha256": hub.tokenizer_hash(ready.request.tokenizer),
        "chat_template_sha256": hub.chat_template_hash(ready.request.tokenizer),
        "training": {
            "step": state.step,
            "total_steps": ready.pace.total_steps,
            "eval_loss": state.last_loss if evaluated and state.step else None,
            "base_eval_loss": state.first_loss,
            "trained_tokens": state.trained_tokens,
            "data_sha256": dict(request.hashes),
            "seed": request.settings.seed,
            "dtype": ready.planned.dtype,
            "quantization": request.quantization,
        },
    }


def _chosen(ready: Ready, notes: list[str]) -> tuple[int, Path]:
    """The step that becomes `adapter/`, the best by evaluation loss, else the last, and where its adapter is."""
    folder, state = ready.request.folder, ready.state
    wanted = state.best_step or state.step
    whole = folder / f"checkpoint-{wanted}"
    try:
        checkpoint.verify(whole)
    except RunError as cause:
        alone = adapter_only.saved(folder)
        if adapter_only.place(folder, wanted) in alone:
            return wanted, adapter_only.place(folder, wanted)
        good = checkpoint.newest_good(folder).path
        found = [(checkpoint.step_of(good), good)] if good else []
        found += [(adapter_only.step_of(path), path) for path in alone]
        if not found:
            raise
        step, path = max(found)
        notes.append(f"{cause} {ADAPTER_FOLDER} was taken from {path.name} instead.")
        return step, path
    return wanted, whole


def _publish(ready: Ready, step: int, source: Path, notes: list[str]) -> Path:
    """Publish the adapter; if the disk has no room for the base's own tokenizer, without that."""
    request, card = ready.request, model_card(_card_facts(ready, step))
    try:
        return publish_adapter(source, request.folder, partial(write_tokenizer, request.tokenizer), card)
    except DiskError as cause:
        if request.forecast.new_tokens is not None:  # the base's own tokenizer does not know them
            raise
        adapter = publish_adapter(source, request.folder, lambda folder: None, card)
        notes.append(f"{cause} {adapter} was saved without its tokenizer, which equals the base's.")
        return adapter


def _resumed_from(folder: Path) -> int | None:
    found = checkpoint.newest_good(folder).path
    return None if found is None else checkpoint.step_of(found)


def _card_facts(ready: Ready, step: int) -> Mapping[str, Any]:
    settings, state = ready.request.settings, ready.state
    targets = settings.target_modules
    return {
        "base": ready.request.source.base_name,
        "base_model_name_or_path": ready.request.source.recorded_name,
        "trainable": ready.trainable_parameters,
        "total": ready.total_parameters,
        "r": settings.r,
        "lora_alpha": f"{settings.lora_alpha:g}",
        "targets": targets if isinstance(targets, str) else ", ".join(targets),
        "new_tokens": settings.new_tokens,
        "data": [Path(path).name for path in settings.data],
        "step": step,
        "steps": ready.pace.total_steps,
        "learning_rate": f"{settings.learning_rate:g}",
        "seed": settings.seed,
        "dtype": ready.planned.dtype,
        "eval": _result_sentence(state.first_loss, state.best_loss),
        "versions": versions(),
    }


def _result_sentence(first: float | None, best: float | None) -> str:
    if best is None:
        return "Evaluation: not measured (no evaluation data)"
    before = f"{math.exp(min(first, 700)):.2f} → " if first is not None else ""
    return f"Evaluation perplexity: {before}{math.exp(min(best, 700)):.2f}"
