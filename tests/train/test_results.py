"""A failure after training never fails a run, and `run.json` always ends in a final state."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from lorakit import durable
from lorakit.errors import DiskError
from lorakit.report import read_metrics
from lorakit.train import results, trainer
from lorakit.train.files.trackers import TRACKERS
from lorakit.train.loop import saving
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.trainer import RunResult, run


def record_of(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(settings["output_dir"]) / "run.json").read_text())  # type: ignore[no-any-return]


def finished(settings: dict[str, Any]) -> RunResult:
    """Train, and check that the run finished with a complete adapter and record."""
    result = run(TrainSettings(**settings))
    assert result.ending == "finished" and result.adapter is not None
    assert {"adapter_config.json", "adapter_model.safetensors", "lorakit.json"} <= set(
        map(_name, result.adapter.iterdir())
    )
    record = record_of(settings)
    assert record["status"] == "finished" and record["result"]["adapter"] == str(result.adapter)
    return result


def _name(path: Path) -> str:
    return path.name


@pytest.mark.costly(cases=2)
@pytest.mark.parametrize("name", ["my $model_^$ v1", "$", "$$", r"\frac{", "a\x1b[31m\nb", "模型 🦜 _x_"])
def test_any_name_of_a_base(
    name: str, short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    model = shutil.copytree(short_run["model"], tmp_path / name)
    result = finished({**short_run, "model": model, "max_steps": 1})
    assert any("loss.svg" in note for note in result.notes) and (result.folder / "loss.svg").is_file()
    assert not any("failed" in note for note in result.notes)
    import xml.etree.ElementTree as xml

    xml.parse(result.folder / "loss.svg")


def test_the_plan_counts_the_evaluations_of_the_run(steady_run: dict[str, Any]) -> None:
    finished({**steady_run, "max_steps": 5})
    record, found = record_of(steady_run), read_metrics(Path(steady_run["output_dir"])).evaluations
    job = record["plan"]["job"]
    assert [row["step"] for row in found] == [0, 2, 4, 5] and job["evaluations"] == len(found)
    assert job["evaluated_tokens"] == record["evaluation_data"]["tokens"] > 0


def fails(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("out of luck")


@pytest.mark.costly(cases=2)
@pytest.mark.parametrize(
    ("place", "name", "missing"),
    [
        (results, "loss_plot", "loss.svg"),
        (saving, "model_card", "adapter/README.md"),
        (results, "read_metrics", "loss.svg"),
        (results, "metrics_at", "none"),
        (results, "undefined_at", "none"),
    ],
    ids=["plot", "card", "metrics", "summary", "undefined"],
)
def test_what_fails_after_training_is_a_note(
    place: Any, name: str, missing: str, short_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, name, fails)
    result = finished({**short_run, "max_steps": 1})
    assert any("ZeroDivisionError: out of luck" in note for note in result.notes)
    assert not (result.folder / missing).exists()


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
@pytest.mark.parametrize("method", ["log", "close"])
def test_a_tracker_that_fails(
    method: str, error: type[BaseException], short_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        id, note = "1", "nowhere"

        def log(self, values: Any, step: int) -> None: ...

        def close(self, ending: str) -> None: ...

    def fail(*_: Any) -> None:
        raise error("out of luck")

    monkeypatch.setattr(Failing, method, fail)
    monkeypatch.setitem(TRACKERS, "wandb", lambda run: Failing())
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    finished({**short_run, "max_steps": 1, "report_to": ["wandb"]})


def raises(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.costly(cases=3)
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ZeroDivisionError("out of luck"), "failed"),
        (MemoryError(), "failed"),
        (SystemExit(3), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (DiskError("full."), "failed"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("place", ["steps", "finish"])
def test_the_record_ends_in_a_final_state(
    error: BaseException, status: str, place: str, short_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = trainer.Loop if place == "steps" else trainer
    monkeypatch.setattr(owner, place, raises(error))
    with pytest.raises(type(error)):
        run(TrainSettings(**short_run))
    record = record_of(short_run)
    assert record["status"] == status
    assert (
        set(record["error"]) == {"code", "message"} and type(error).__name__ in record["error"]["message"] + "DiskError"
    )


@pytest.mark.parametrize("mode", ["overwrite", "resume"])
def test_a_signal_while_a_tracker_opens_leaves_a_run_that_resumes(
    mode: str, short_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    finished({**short_run, "max_steps": 1})
    monkeypatch.setitem(TRACKERS, "wandb", raises(KeyboardInterrupt()))
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    again = {**short_run, "max_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        run(TrainSettings(**{**again, "report_to": ["wandb"], mode: True}))
    assert record_of(short_run)["status"] == "interrupted"
    assert finished({**again, "resume": True, "report_to": []}).steps == 2


def test_a_result_that_is_no_json_leaves_a_final_state(
    short_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "peak_rss_bytes", lambda: float("nan"))
    result = run(TrainSettings(**{**short_run, "max_steps": 1}))
    assert result.adapter is not None and any("not recorded" in note for note in result.notes)
    assert record_of(short_run)["status"] == "finished"


def test_a_tokenizer_that_cannot_be_saved(short_run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", fails)
    result = finished({**short_run, "max_steps": 1})
    assert any("without a tokenizer" in note for note in result.notes)
    assert durable.read_json(result.adapter / "lorakit.json")  # type: ignore[operator]
