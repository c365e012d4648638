"""When the loop steps, evaluates, saves and stops, observed in a small run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import RunError
from lorakit.report import read_metrics
from lorakit.train.files import checkpoint
from lorakit.train.loop import loop
from lorakit.train.results import RunResult
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup import prepare
from lorakit.train.spec import RunLimits
from lorakit.train.trainer import run

from ... import small_models


@pytest.fixture
def settings(short_run: dict[str, Any]) -> dict[str, Any]:
    return {**short_run, "max_steps": 4, "eval_fraction": 0.2, "eval_steps": 2, "save_steps": 3}


def _run(settings: dict[str, Any], **more: Any) -> RunResult:
    return run(TrainSettings(**{**settings, **more}))


def test_a_step_never_reaches_over_the_end_of_an_epoch(settings: dict[str, Any], tmp_path: Path) -> None:
    result = _run(settings, max_steps=None, num_train_epochs=2, gradient_accumulation_steps=3, eval_steps=100)
    rows = read_metrics(tmp_path / "run").train
    assert result.steps == result.total_steps == len(rows)
    assert rows[len(rows) // 2 - 1]["epoch"] == 1.0
    assert rows[-1]["epoch"] == 2.0
    assert sum(row["tokens"] for row in rows[: len(rows) // 2]) == sum(row["tokens"] for row in rows[len(rows) // 2 :])


def test_intervals_that_are_not_given_are_a_tenth_of_the_run(settings: dict[str, Any]) -> None:
    class Batches:
        batches_per_epoch = 70

    plain = {k: v for k, v in settings.items() if k not in ("max_steps", "eval_steps", "save_steps")}
    limits = RunLimits.of(TrainSettings(**plain), Batches)  # type: ignore[arg-type]
    assert (limits.total_steps, limits.eval_steps, limits.save_steps) == (210, 21, 21)
    limits = RunLimits.of(TrainSettings(**plain, num_train_epochs=0.01, eval_steps=7), Batches)  # type: ignore[arg-type]
    assert (limits.total_steps, limits.eval_steps, limits.save_steps) == (1, 7, 7)


def test_a_signal_while_evaluating_abandons_it_and_resuming_catches_up(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(settings, output_dir=tmp_path / "whole")
    real, calls = loop.evaluate, iter(range(1, 100))

    def evaluate(*arguments: Any, **named: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **named)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    assert _run(settings).ending == "interrupted"
    folder = tmp_path / "run"
    assert checkpoint.load(folder / "checkpoint-2").state.evaluated_step == 0
    assert [row["step"] for row in read_metrics(folder).evaluations] == [0]
    monkeypatch.setattr(loop, "evaluate", real)
    result = _run(settings, resume=True)
    assert (result.ending, result.best_loss) == ("finished", whole.best_loss)
    assert [row["eval_loss"] for row in read_metrics(folder).evaluations] == [
        row["eval_loss"] for row in read_metrics(tmp_path / "whole").evaluations
    ]
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def without_feed_forward(monkeypatch: pytest.MonkeyPatch, layers: list[int], factor: float | None) -> None:
    """Make layers skip their feed-forward module, or multiply its output by a factor."""
    real = prepare.load_model_for

    def load(*arguments: Any, **named: Any) -> Any:
        loaded = real(*arguments, **named)
        for module in (loaded.model.model.layers[number].mlp for number in layers):
            whole = module.forward
            module.forward = torch.zeros_like if factor is None else lambda x, whole=whole: factor * whole(x)
        return loaded

    monkeypatch.setattr(prepare, "load_model_for", load)


def test_modules_that_the_model_does_not_call_are_a_finding(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.train.progress import PlainProgress

    without_feed_forward(monkeypatch, [1], None)
    result = run(TrainSettings(**settings, accelerate=False), PlainProgress())
    assert result.untrained_sites == 3
    [note] = [note for note in result.notes if "received no gradient in any step" in note]
    assert "3 of 14 sites" in note and all(f"model.layers.1.mlp.{name}_proj" in note for name in ("gate", "up", "down"))
    assert "3 of 14 sites received no gradient in the first step" in capsys.readouterr().out
    record = json.loads((result.folder / "run.json").read_text())["result"]
    assert record["untrained_sites"] == 3 and note in record["notes"]
    whole = _run(settings, output_dir=settings["output_dir"].with_name("more"), max_steps=1)
    assert whole.untrained_sites == 3


def test_an_adapter_without_any_gradient_is_not_to_be_used(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_feed_forward(monkeypatch, [0, 1], 0.0)
    result = _run(settings, target_modules=["up_proj"], accelerate=False)
    assert result.untrained_sites == 2
    assert any("The adapter is untrained, do not use it" in note for note in result.notes)


def test_experts_that_no_token_reached_are_a_finding(
    settings: dict[str, Any], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    torch.manual_seed(0)
    model = small_models.mixtral(vocab_size=len(tiny_tokenizer), num_local_experts=5)
    for layer in model.model.layers:  # of two opposite scores, one is positive, so that expert 3 is never in the top 2
        first = layer.mlp.gate.weight.data[0]
        layer.mlp.gate.weight.data = torch.stack([first, -first, 0.5 * first, 0 * first, -0.5 * first])
    folder = tmp_path / "mixtral"
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    result = _run(settings, model=folder, **targets)
    assert result.untrained_sites == 2
    [note] = [note for note in result.notes if "received no gradient in any step" in note]
    assert "2 of 12 sites" in note and all(f"model.layers.{n}.mlp.experts (expert 3)" in note for n in (0, 1))


def test_two_processes_do_not_train_into_one_folder(settings: dict[str, Any], tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "run"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(RunError, match=r"a run is active: .* is training in this directory"):
            _run(settings)
    finally:
        os.close(descriptor)
    assert _run(settings, max_steps=1).ending == "finished"
    assert _run(settings, max_steps=2, resume=True).steps == 2


def test_the_base_does_not_move(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = prepare.load_model_for

    def load(*arguments: Any, **named: Any) -> Any:
        loaded = real(*arguments, **named)
        seen["model"] = loaded.model
        seen["before"] = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
        return loaded

    monkeypatch.setattr(prepare, "load_model_for", load)
    _run(settings, lora_dropout=0.1, gradient_checkpointing=True)
    from lorakit import core

    core.detach(seen["model"])
    after = seen["model"].state_dict()
    assert after.keys() == seen["before"].keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in seen["before"].items())
