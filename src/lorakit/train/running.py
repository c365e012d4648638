"""One run from settings to adapter: check, load, train, publish.

The order is the point: whatever can be refused is refused before a weight is loaded, and nothing of an older run is
touched before the new one can begin. The arithmetic is in `step.py`, the sequence of steps in `loop.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

from lorakit import core
from lorakit.errors import DiskError, LorakitError
from lorakit.ops import choices
from lorakit.train import adapter_only, checkpoint
from lorakit.train.ending import RunResult, adapter_facts, finish, record
from lorakit.train.interrupts import stoppable
from lorakit.train.lock import release
from lorakit.train.loop import Loop
from lorakit.train.metrics import cut
from lorakit.train.optim import state_tensors
from lorakit.train.preparing import remove_run
from lorakit.train.progress import Progress, Silence
from lorakit.train.publishing import write_tokenizer
from lorakit.train.readying import ADAPTER, Ready, make_ready
from lorakit.train.record import write_record
from lorakit.train.request import check
from lorakit.train.settings import TrainSettings
from lorakit.train.space import Space, check_checkpoint, check_space, needed
from lorakit.train.state import TrainState, environment, random_state, restore_random_state

__all__ = ["RunResult", "run"]


def run(settings: TrainSettings, progress: Progress | None = None) -> RunResult:
    """Train an adapter as the settings say; the run is kept as a folder.

    Torch's, Python's and numpy's random generators are seeded for the run and put back afterwards.

    Args:
        settings: What to do. With `resume`, what was not given is taken from the run.
        progress: Where to report to; None is silent.

    Returns:
        What the run came to.

    Raises:
        LorakitError: Something cannot be done as asked; class and message say what. An older run has not been touched
            unless training had begun, and then its last good checkpoint stands.
        KeyboardInterrupt: A signal came while loading, or a second one while training. Before the first step nothing
            of the run has been written; the message says so.
    """
    began = time.perf_counter()
    progress = progress or Silence()
    with progress, stoppable(), _random_numbers_kept(), contextlib.ExitStack() as held:
        with _nothing_left(Path(settings.output_dir)):
            request = check(settings, progress)
            held.callback(release, request.lock)
            ready = make_ready(request, progress)
            space = needed(ready)
            for line in check_space(ready, space):
                progress.say(line)
        held.enter_context(choices.acting(ready.choices))
        _begin(ready)
        with _failure_recorded(ready):
            ending = _train(ready, space, progress)
            return finish(ready, ending, time.perf_counter() - began)


@contextlib.contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """A block before the first step: if it fails, a folder that it made is removed."""
    made = not folder.exists()
    try:
        yield
    except BaseException as cause:
        if made:
            with contextlib.suppress(OSError):  # it is not there, or not empty
                folder.rmdir()
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted before the first step; {folder} is as it was") from None
        raise


def _begin(ready: Ready) -> None:
    """From here on files of the run change."""
    folder, settings = ready.request.folder, ready.request.settings
    if settings.overwrite:
        remove_run(folder)
    for path, _ in ready.found.skipped:
        checkpoint.set_aside(path)
    if settings.resume:
        cut(folder, ready.state.step if ready.found.path else -1, ready.state.evaluated_step)
    write_record(folder, record(ready, "running"))


def _train(ready: Ready, space: Space, progress: Progress) -> str:
    return Loop(
        trainee=ready.trainee,
        loader=ready.batches.loader,
        held_out=ready.batches.held_out,
        schedule=ready.schedule,
        pace=ready.pace,
        state=ready.state,
        save=lambda state: _save(ready, state, space, progress),
        folder=ready.request.folder,
        progress=progress,
        kept=(ready.state.step, ready.state.evaluated_step) if ready.found.path else (-1, -1),
    ).run()


@contextlib.contextmanager
def _failure_recorded(ready: Ready) -> Iterator[None]:
    """A block whose failure is written into the record before it is raised; of a full disk it is said what is saved."""
    folder = ready.request.folder
    try:
        yield
    except LorakitError as cause:
        if isinstance(cause, DiskError):
            cause = DiskError(f"{cause} {adapter_only.account(folder)}").with_traceback(cause.__traceback__)
        error = {"code": cause.code, "message": str(cause)}
        with contextlib.suppress(DiskError):
            write_record(folder, {**record(ready, "failed"), "error": error})
        raise cause


def _save(ready: Ready, state: TrainState, space: Space, progress: Progress) -> Path | None:
    """Save a checkpoint, or, if that does not fit, the adapter alone and None."""
    request, trainee = ready.request, ready.trainee
    tensors, plain = random_state()
    snapshot = checkpoint.Snapshot(
        state=state,
        optimizer=state_tensors(trainee.optimizer, trainee.named),
        random=tensors,
        random_plain=plain,
        environment=environment(
            request.device, ready.planned.dtype, request.quantization, choices.words(ready.choices)
        ),
        schedule=dataclasses.asdict(ready.schedule),
    )

    def write_adapter(folder: Path) -> None:
        core.save_adapter(
            trainee.model,
            folder,
            ADAPTER,
            base_model_name_or_path=request.source.recorded_name,
            facts=adapter_facts(ready),
        )
        if request.forecast.new_tokens is not None:  # the base's own tokenizer would not know them
            write_tokenizer(request.tokenizer, folder)

    folder = request.folder
    try:
        check_checkpoint(folder, space)
        path = checkpoint.save(folder, snapshot, write_adapter)
    except DiskError as cause:
        adapter_only.save(folder, state.step, state.best_step, write_adapter)
        progress.say(f"warning: {cause} The adapter alone was saved. {adapter_only.account(folder)}")
        return None
    checkpoint.prune(folder, request.settings.save_total_limit, state.best_step)
    adapter_only.prune(folder, state.step, state.best_step)
    return path


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    tensors, plain = random_state()
    try:
        yield
    finally:
        restore_random_state(tensors, plain)
