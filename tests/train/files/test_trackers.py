"""Trackers: what they receive, how they are resumed, and that a tracker that fails does not touch the run."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lorakit import choices
from lorakit.errors import ConfigError, MissingExtra
from lorakit.train import TrainSettings, run
from lorakit.train.files.trackers import TRACKERS, TrackedRun
from lorakit.train.progress import Progress

SHORT = {"max_steps": 3, "eval_steps": 2, "save_steps": 1, "num_train_epochs": 1.0, "eval_fraction": 0.2}


class Lines(Progress):
    """Progress that keeps the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class StandIn:
    """A tracker that records its calls, uses random numbers and prints, and fails at a given call."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    fails = ""

    def __init__(self, tracked: TrackedRun) -> None:
        self.id, self.note = tracked.tracker_id or "id-1", "here"
        self._note("open", tracked)

    def log(self, values: dict[str, float], step: int) -> None:
        self._note("log", values, step)

    def close(self, ending: str) -> None:
        self._note("close", ending)

    def _note(self, name: str, *values: Any) -> None:
        random.random()
        print("noise on stdout")
        if self.fails == name:
            raise OSError("no connection")
        self.calls.append((name, *values))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(StandIn, "calls", [])
    monkeypatch.setattr(StandIn, "fails", "")
    monkeypatch.setitem(TRACKERS, "wandb", StandIn)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    return StandIn


def whole_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows(folder: Path) -> list[dict[str, Any]]:
    found = whole_rows(folder)
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "peak_rss_bytes")} for row in found
    ]


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text()))


def test_settings_and_trackers_name_the_same() -> None:
    assert tuple(TRACKERS) == choices.TRACKERS


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("wandb", ["wandb"]),
        (["tensorboard,mlflow", "wandb"], ["tensorboard", "mlflow", "wandb"]),
        (["wandb", "wandb"], ["wandb"]),
        ("none", []),
        ([], []),
    ],
)
def test_names_come_as_flags_or_as_a_list(given: Any, taken: list[str]) -> None:
    assert TrainSettings(model="m", data="d", output_dir="o", report_to=given).report_to == taken


@pytest.mark.parametrize("given", [["wandbb"], 3, [3]])
def test_other_names_are_errors(given: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainSettings(model="m", data="d", output_dir="o", report_to=given)
    assert caught.value.field == "report_to"
    assert "tensorboard" in str(caught.value)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_an_error_before_the_model_is_looked_for(
    name: str, short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra) as caught:
        run(TrainSettings(**{**short_run, **SHORT, "model": tmp_path / "no-model", "report_to": [name]}))
    assert (caught.value.what, caught.value.field) == (name, "report_to")
    assert f"pip install {name}" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tracker_gets_the_settings_every_row_and_the_end(
    short_run: dict[str, Any], stand_in: type[StandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Lines()
    run(TrainSettings(**{**short_run, **SHORT, "report_to": ["wandb"]}), progress)
    (first, tracked), *logged, last = stand_in.calls
    assert (first, last) == ("open", ("close", "finished"))
    assert (tracked.step, tracked.tracker_id, tracked.settings["r"]) == (0, None, 2)
    folder = Path(short_run["output_dir"])
    expected = [(len(row) - 1, row["step"], row.get("loss", row.get("eval_loss"))) for row in whole_rows(folder)]
    assert [(len(v), step, v.get("train/loss", v.get("eval/loss"))) for _, v, step in logged] == expected
    assert record(folder)["trackers"] == {"wandb": "id-1"}
    assert any("here" in line for line in progress.lines)
    assert "noise" not in capsys.readouterr().out


@pytest.mark.parametrize("fails", ["open", "log", "close"])
def test_a_tracker_that_fails_is_reported_once_and_changes_no_bit(
    fails: str, short_run: dict[str, Any], tmp_path: Path, stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(TrainSettings(**{**short_run, **SHORT, "output_dir": tmp_path / "plain", "lora_dropout": 0.1}))
    monkeypatch.setattr(StandIn, "fails", fails)
    progress = Lines()
    result = run(TrainSettings(**{**short_run, **SHORT, "report_to": ["wandb"], "lora_dropout": 0.1}), progress)
    assert result.ending == "finished"
    reported = [line for line in progress.lines if "no connection" in line]
    assert len(reported) == 1
    assert "wandb" in reported[0]
    assert rows(tmp_path / "run") == rows(tmp_path / "plain")
    weights = [path / "adapter" / "adapter_model.safetensors" for path in (tmp_path / "run", tmp_path / "plain")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_resumed_run_goes_on_under_the_same_id(short_run: dict[str, Any], stand_in: type[StandIn]) -> None:
    run(TrainSettings(**{**short_run, **SHORT, "report_to": ["wandb"]}))
    stand_in.calls.clear()
    again = {"output_dir": short_run["output_dir"], "model": short_run["model"], "data": short_run["data"]}
    run(TrainSettings(**again, resume=True, max_steps=4))
    (_, tracked), *logged, _ = stand_in.calls
    assert (tracked.tracker_id, tracked.step) == ("id-1", 3)
    assert [step for _, values, step in logged if "train/loss" in values] == [4]
    run(TrainSettings(**again, resume=True, max_steps=5, report_to=[]))
    assert record(Path(short_run["output_dir"]))["trackers"] == {"wandb": "id-1"}


def test_a_run_that_fails_is_closed_as_failed(
    short_run: dict[str, Any], stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.errors import NonFiniteError

    with pytest.raises(NonFiniteError):
        run(
            TrainSettings(**{**short_run, **SHORT, "report_to": ["wandb"], "learning_rate": 1e30, "max_grad_norm": 0.0})
        )
    assert stand_in.calls[-1] == ("close", "failed")


# --- the calls of each package, on modules made here


def module(name: str, **attributes: Any) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(attributes)
    return made


class Calls:
    """An object whose methods record their calls and return it."""

    def __init__(self) -> None:
        self.made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.url, self.experiment_id, self.info = "https://here", "1", types.SimpleNamespace(run_id="run-7")

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Calls:
            self.made.append((name, arguments, named))
            return self

        return call

    def named(self, name: str) -> dict[str, Any]:
        return next(named for called, _, named in self.made if called == name)


@pytest.mark.parametrize("has_login", [True, False])
def test_wandb_never_asks_and_is_offline_without_a_login(
    has_login: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls()

    def login(*, prompt: bool) -> bool:
        assert prompt is False
        return has_login

    monkeypatch.setitem(sys.modules, "wandb", module("wandb", login=login, init=calls.init, Settings=dict))
    tracker = TRACKERS["wandb"](TrackedRun(tmp_path, {"r": 2}, 5, "abc"))
    tracker.log({"train/loss": 1.0}, 6)
    tracker.close("interrupted")
    given = calls.named("init")
    assert (given["id"], given["resume"], given["config"]) == ("abc", "allow", {"r": 2})
    assert given["mode"] == (None if has_login else "offline")
    assert ("log", ({"train/loss": 1.0},), {"step": 6}) in calls.made
    assert calls.named("finish") == {"exit_code": 1}
    assert ("wandb sync" in tracker.note) is not has_login


def test_trackio_goes_on_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "trackio", module("trackio", init=calls.init, finish=calls.finish))
    first = TRACKERS["trackio"](TrackedRun(tmp_path, {}, 0, None))
    again = TRACKERS["trackio"](TrackedRun(tmp_path, {}, 3, first.id))
    again.log({"train/loss": 1.0}, 4)
    again.close("finished")
    inits = [named for name, _, named in calls.made if name == "init"]
    assert [named["name"] for named in inits] == [first.id, first.id]
    assert first.id.startswith(tmp_path.name)
    assert calls.made[-2:] == [("log", ({"train/loss": 1.0},), {"step": 4}), ("finish", (), {})]


def test_mlflow_stores_the_settings_once_and_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls()
    entities = module("mlflow.entities", Metric=lambda *values: values, Param=lambda *values: values)
    monkeypatch.setitem(sys.modules, "mlflow", module("mlflow", MlflowClient=lambda: calls, entities=entities))
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    TRACKERS["mlflow"](TrackedRun(tmp_path, {"r": 2, "data": ["a"]}, 0, None))
    assert calls.named("log_batch")["params"] == [("r", "2"), ("data", '["a"]')]
    calls.made.clear()
    tracker = TRACKERS["mlflow"](TrackedRun(tmp_path, {"r": 2}, 3, "run-7"))
    tracker.log({"train/loss": 1.0, "train/tokens": 5}, 4)
    tracker.close("interrupted")
    assert [name for name, _, _ in calls.made] == ["update_run", "log_batch", "set_terminated"]
    run_id, metrics = calls.made[1][1]
    assert run_id == "run-7"
    assert [(name, value, step) for name, value, _, step in metrics] == [("train/loss", 1.0, 4), ("train/tokens", 5, 4)]
    assert calls.made[2][1] == ("run-7", "KILLED")


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_holds_the_rows_and_a_resumed_run_goes_on(short_run: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(short_run["output_dir"])
    run(TrainSettings(**{**short_run, **SHORT, "report_to": ["tensorboard"]}))
    again = {"output_dir": short_run["output_dir"], "model": short_run["model"], "data": short_run["data"]}
    run(TrainSettings(**again, resume=True, max_steps=5))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"])) for row in rows(folder) if "loss" in row]
    assert "settings/text_summary" in events.Tags()["tensors"]
    run(TrainSettings(**{**short_run, **SHORT, "overwrite": True}))
    assert not (folder / "tensorboard").exists()
