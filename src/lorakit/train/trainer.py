"""Train an adapter: `run` takes the settings, trains, and publishes the result.

Every error that can be detected without weights is raised before any weights are loaded (`build_spec`), and the files
of an earlier run are not modified until the new run is fully prepared (`prepare`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from lorakit.errors import DiskError, LorakitError, describe
from lorakit.ops import choices
from lorakit.startup import rare_collections
from lorakit.tables import format_count
from lorakit.train.files import checkpoint
from lorakit.train.files.run_folder import cut_metrics, read_record, remove_run, unlock, write_record
from lorakit.train.loop.interrupts import stoppable
from lorakit.train.loop.loop import Loop
from lorakit.train.loop.run import LAUNCH, Run
from lorakit.train.processes.processes import Processes, joined
from lorakit.train.processes.sharding import without_hints
from lorakit.train.progress import Progress
from lorakit.train.results import RunResult, finish
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup.agreement import check_alike
from lorakit.train.setup.fitting import padding_line
from lorakit.train.setup.prepare import prepare
from lorakit.train.setup.run_plan import check_space
from lorakit.train.setup.run_spec import build_spec

__all__ = ["RunResult", "run"]


def run(settings: TrainSettings, progress: Progress | None = None, processes: Processes | None = None) -> RunResult:
    """Train an adapter and return a `RunResult`; the run's files are saved in `output_dir`.

    The random number generators of torch, Python and numpy are seeded for the run and restored afterwards. In a process
    that torchrun or SLURM started, all processes train together; the first one prints and writes, and each of them
    returns its result.

    Args:
        settings: The run's settings. If `resume` is set, missing settings are taken from the existing run.
        progress: Object that receives progress reports; None disables them.
        processes: The processes of the run; None starts the group that the launcher prepared.

    Returns:
        The result of the run; after an interruption, its `adapter` is None.

    Raises:
        LorakitError: The run is impossible as specified, or the run failed; the error class and message say why. If the
            error occurs before training starts, an existing run is left unchanged. If the error occurs later, the last
            valid checkpoint is kept.
        KeyboardInterrupt: A signal arrived before the first step (the run directory is left unchanged, or `run.json`
            says that the run was interrupted), or a second signal arrived during training.
    """
    started = time.perf_counter()
    progress = progress or Progress()
    with contextlib.ExitStack() as stack:
        processes = processes or stack.enter_context(joined())
        progress = stack.enter_context(progress if processes.is_first else Progress())
        stack.enter_context(stoppable())
        stack.enter_context(_restored_random_state())
        with _unchanged_on_failure(Path(settings.output_dir)), processes.together(), rare_collections():
            if processes.restarts:
                settings = _continued(settings, processes, progress)
            spec = build_spec(settings, progress, processes)
            stack.callback(unlock, spec.lock)
            check_alike(spec)
            current = prepare(spec, started)
            if processes.is_first:
                check_space(spec, current.start.space)
                if padded := padding_line(current.loaded.acceleration, current.plan.job):
                    progress.say(padded)
        stack.enter_context(choices.activate(current.loaded.choices))
        stack.callback(lambda: current.trackers.close(current.status))
        with processes.together():
            processes.from_first(lambda: _start(current))
        hints = contextlib.nullcontext() if current.loaded.sharded is None else without_hints()
        with _failure_recorded(current), hints, processes.together():
            Loop(current).steps()
            with rare_collections():  # imports matplotlib
                return processes.from_first(lambda: finish(current))


def _continued(settings: TrainSettings, processes: Processes, progress: Progress) -> TrainSettings:
    """Return the settings with which processes go on that a launcher has started again, because one of them ended.

    Only a run that the same job of the launcher has begun is continued, with `resume`: another run in the same
    directory is what the settings say about it.

    Raises:
        RunError: The record of the run cannot be read.
    """
    has_begun = processes.from_first(lambda: _is_of_job(Path(settings.output_dir), processes.job))
    times = format_count(processes.restarts, "time")
    how = "the run goes on from its newest checkpoint" if has_begun else "the run starts at its first step"
    progress.say(f"The processes were started again ({times} so far), because one of them ended; {how}.")
    if not has_begun or settings.resume:
        return settings
    return TrainSettings(**{**settings.explicit, "resume": True, "overwrite": False})


def _is_of_job(folder: Path, job: str) -> bool:
    """Return whether a directory contains a run that a job of a launcher has begun."""
    return bool(job) and ((read_record(folder) or {}).get(LAUNCH) or {}).get("job") == job


def _start(current: Run) -> None:
    """Make the first changes to the run directory: remove outdated files and write `run.json`."""
    folder, settings = current.spec.folder, current.spec.settings
    if settings.overwrite:
        remove_run(folder)
    for path in current.start.damaged:
        checkpoint.set_aside(path)
    if settings.resume:
        cut_metrics(folder, current.state.step if current.start.resumed_from else -1, current.state.evaluated_step)
    ids = (current.spec.record or {}).get("trackers") or {}
    with _failure_recorded(current):  # a tracker may wait for a server, and an earlier run is removed
        current.trackers.open(settings.report_to, folder, settings.as_dict(), current.state.step, ids)
        if current.loaded.int8 is not None:
            current.loaded.int8.write(folder)
        write_record(folder, current.record())


@contextlib.contextmanager
def _unchanged_on_failure(folder: Path) -> Iterator[None]:
    """Remove the run directory, and its parents, if the block created them and then failed."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException as cause:
        with contextlib.suppress(OSError):  # a directory may be missing or not empty
            for path in missing:
                path.rmdir()
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted before the first step; {folder} is unchanged") from None
        raise


@contextlib.contextmanager
def _failure_recorded(current: Run) -> Iterator[None]:
    """If the block raises any exception, record it in `run.json`; for a `DiskError`, also list what was saved."""
    folder = current.spec.folder
    try:
        yield
    except BaseException as cause:
        raised = cause
        if isinstance(cause, DiskError):
            text = f"{cause} {checkpoint.describe_saved(folder)}"
            raised = DiskError(text, **cause.fields).with_traceback(cause.__traceback__)
        current.status = "interrupted" if isinstance(cause, KeyboardInterrupt) else "failed"
        if current.spec.processes.is_first:
            known = raised if isinstance(raised, LorakitError) else None
            error = {"code": known.code, "message": str(known)} if known else {"code": None, "message": describe(cause)}
            with contextlib.suppress(DiskError):
                write_record(folder, {**current.record(), "error": error})
        if raised is cause:
            raise
        raise raised from cause


@contextlib.contextmanager
def _restored_random_state() -> Iterator[None]:
    tensors, plain = checkpoint.random_state()
    try:
        yield
    finally:
        checkpoint.restore_random_state(tensors, plain)
