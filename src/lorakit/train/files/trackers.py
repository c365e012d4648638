"""Experiment trackers that receive a run's settings and metrics: TensorBoard, trackio, Weights & Biases and MLflow.

A tracker is optional and must not affect the run: it never waits for input, its output goes to stderr, the random
number generators are restored after each call, and a tracker that fails is reported once and then left out. Only this
module imports the trackers' packages.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorakit.errors import MissingExtra
from lorakit.train.files.checkpoint import random_state, restore_random_state
from lorakit.train.files.run_folder import TRACKER_FOLDERS

if TYPE_CHECKING:
    from lorakit.durable import JsonValue

_TENSORBOARD, _WANDB = TRACKER_FOLDERS

PROJECT = "lorakit"
"""Name of the project (trackio, wandb) or experiment (mlflow) that contains the runs."""

_MAX_PARAMETER = 500  # characters of a parameter's value, the limit of older MLflow servers


@dataclass(frozen=True)
class TrackedRun:
    """The description of a run that a tracker receives when it is opened.

    Attributes:
        folder: The run directory.
        settings: The run's settings as plain JSON values, keyed by name.
        step: Number of steps already taken.
        tracker_id: Id under which the tracker knows the run that is resumed, or None for a new run.
    """

    folder: Path
    settings: Mapping[str, JsonValue]
    step: int
    tracker_id: str | None


class Tracker(Protocol):
    """An open tracker.

    Attributes:
        id: Id under which the tracker knows the run; needed to resume it.
        note: Where the metrics are, for the user.
    """

    id: str
    note: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record values at a step."""

    def close(self, ending: str) -> None:
        """Finish the tracker's run; `ending` is the status of the run, as in `run.json`."""


class _TensorBoard:
    """Event files in the run directory; when a run is resumed, events after the checkpoint are discarded."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / _TENSORBOARD
        self._writer = SummaryWriter(str(folder), purge_step=run.step + 1 if run.tracker_id else None)
        self.id, self.note = _TENSORBOARD, f"tensorboard --logdir {folder}"
        rows = [f"| {name} | `{json.dumps(value)}` |" for name, value in run.settings.items()]
        self._writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]), run.step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, ending: str) -> None:
        self._writer.close()


class _Trackio:
    """A run in trackio's local database, or wherever trackio's own environment variables point."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        self.id = run.tracker_id or f"{run.folder.name}-{secrets.token_hex(4)}"  # trackio finds a run by its name
        self._run = trackio.init(
            project=PROJECT,
            name=self.id,
            config=dict(run.settings),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._finish, self.note = trackio.finish, f"trackio show --project {PROJECT}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, ending: str) -> None:
        self._finish()


class _Wandb:
    """A run of Weights & Biases; without a login, it is recorded offline in the run directory."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        is_offline = not wandb.login(prompt=False)
        self.id = run.tracker_id or secrets.token_hex(4)
        self._run = wandb.init(
            project=PROJECT,
            name=run.folder.name,
            id=self.id,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            mode="offline" if is_offline else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
        offline = f"wandb sync {run.folder / _WANDB}/offline-run-*-{self.id} (not logged in, so recorded offline)"
        self.note = offline if is_offline else f"wandb: {self._run.url}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, ending: str) -> None:
        self._run.finish(exit_code=0 if ending in ("finished", "stopped early") else 1)


class _Mlflow:
    """A run in the experiment `lorakit` of MLflow's tracking store, which MLflow's own settings select."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        if run.tracker_id is None:
            known = self._client.get_experiment_by_name(PROJECT)
            experiment = self._client.create_experiment(PROJECT) if known is None else known.experiment_id
            self.id = str(self._client.create_run(experiment, run_name=run.folder.name).info.run_id)
            parameters = [Param(name, json.dumps(value)[:_MAX_PARAMETER]) for name, value in run.settings.items()]
            self._client.log_batch(self.id, params=parameters)
        else:
            self.id = run.tracker_id
            self._client.update_run(self.id, status="RUNNING")
        self.note = f"mlflow: experiment {PROJECT}, run {self.id}"

    def log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.id, [self._metric(name, value, now, step) for name, value in values.items()])

    def close(self, ending: str) -> None:
        status = {"finished": "FINISHED", "stopped early": "FINISHED", "interrupted": "KILLED"}.get(ending, "FAILED")
        self._client.set_terminated(self.id, status)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _Wandb,
    "mlflow": _Mlflow,
}
"""Value of the setting `report_to`, which is also the name of the package -> function that opens it."""


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers (keys of `TRACKERS`) can be imported.

    Raises:
        MissingExtra: A package is not installed; the message gives the pip command.
    """
    for name in names:
        try:
            import_module(name)
        except ImportError as cause:
            text = f"--report-to {name} needs the package {name} ({cause}); run pip install {name}, or omit {name}."
            raise MissingExtra(text, what=name, field="report_to", allowed=TRACKERS) from cause


class Trackers:
    """The trackers of a run.

    Args:
        say: Function that prints a line for the user.

    Attributes:
        ids: Tracker -> id under which it knows the run, for `run.json`.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._open: dict[str, Tracker] = {}
        self.ids: dict[str, str] = {}

    def open(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, JsonValue], step: int, ids: Mapping[str, str]
    ) -> None:
        """Open trackers; one that cannot be opened is reported and left out.

        Args:
            names: Keys of `TRACKERS`.
            folder: The run directory.
            settings: The run's settings as plain JSON values.
            step: Number of steps already taken.
            ids: The ids that an earlier part of the run stored in `run.json`; empty for a new run.
        """
        self.ids = dict(ids)
        for name in names:
            with self._guarded(name):
                tracker = TRACKERS[name](TrackedRun(folder, settings, step, ids.get(name)))
                self._open[name], self.ids[name] = tracker, tracker.id
            if name in self._open:
                self._say(f"metrics: {self._open[name].note}")

    def log(self, row: Mapping[str, Any]) -> None:
        """Pass a row of `metrics.jsonl` to all trackers, with fields such as "train/loss" or "eval/loss"."""
        is_evaluation = "eval_loss" in row
        values = {
            f"eval/{name.removeprefix('eval_')}" if is_evaluation else f"train/{name}": value
            for name, value in row.items()
            if name != "step" and isinstance(value, (int, float))
        }
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.log(values, int(row["step"]))

    def close(self, ending: str) -> None:
        """Close all trackers with the status of the run, as in `run.json`; closing twice has no effect."""
        for name, tracker in list(self._open.items()):
            with self._guarded(name):
                tracker.close(ending)
        self._open.clear()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Keep a tracker from changing random numbers, writing to stdout, or stopping the run."""
        tensors, plain = random_state()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        except (Exception, SystemExit) as cause:  # noqa: BLE001 - the run does not depend on a tracker
            self._open.pop(name, None)
            self._say(
                f"warning: {name} failed and receives no more metrics ({type(cause).__name__}: {cause}); the run "
                "continues."
            )
        finally:
            restore_random_state(tensors, plain)
