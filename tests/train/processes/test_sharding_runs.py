"""Whole runs with a sharded base in two processes: files, checkpoints, resumption, and what cannot be sharded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.report import read_metrics
from lorakit.train.processes.launching import PROCESS_ENDED
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.trainer import run

from .processes import begin, end

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture
def settings(short_run: dict[str, Any]) -> dict[str, Any]:
    """Settings of a small run, as plain JSON values; the last step of an epoch has fewer batches than processes."""
    plain = {**short_run, "data": [str(path) for path in short_run["data"]], "model": str(short_run["model"])}
    steady = {"lr_scheduler_type": "constant", "warmup_steps": 0, "tuning": False, "token_cache": False}
    more = {"eval_fraction": 0.2, "eval_steps": 2, "lora_dropout": 0.1, "per_device_train_batch_size": 1}
    return {**plain, **steady, **more, "output_dir": str(short_run["output_dir"])}


def base_of(adapter: Path) -> Any:
    return json.loads((adapter / "lorakit.json").read_text())["base"]


@pytest.mark.slow
def test_a_run_has_the_files_of_one_without_sharding_and_resumes(
    settings: dict[str, Any], outcomes: Callable[..., Any], tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in ("ddp", "fsdp", "mixed")}
    runs = [
        {**settings, "output_dir": str(folders["ddp"]), "max_steps": 6},
        {**settings, "output_dir": str(folders["fsdp"]), "max_steps": 6, "parallel": "fsdp"},
        {**settings, "output_dir": str(folders["mixed"]), "max_steps": 4, "parallel": "ddp"},
        {**settings, "output_dir": str(folders["mixed"]), "max_steps": 6, "parallel": "fsdp", "resume": True},
    ]
    for process in outcomes(runs):
        assert [one.get("ending", one) for one in process] == ["finished"] * 4
    records = {name: json.loads((folder / "run.json").read_text()) for name, folder in folders.items()}
    assert records["ddp"]["sharding"] is None
    for name in ("fsdp", "mixed"):
        assert records[name]["sharding"]["method"] == "fsdp"
        assert records[name]["sharding"]["local_bytes"] < 0.6 * records[name]["sharding"]["whole_bytes"]
        for step in ("adapter", "checkpoint-6"):
            for file in ADAPTER:
                assert (folders[name] / step / file).read_bytes() == (folders["ddp"] / step / file).read_bytes()
            assert base_of(folders[name] / step) == base_of(folders["ddp"] / step)
        for file in ("optimizer.safetensors", "random.safetensors"):
            ours, theirs = (folders[one] / "checkpoint-6" / file for one in (name, "ddp"))
            assert ours.read_bytes() == theirs.read_bytes()
        rows, expected = read_metrics(folders[name]), read_metrics(folders["ddp"])
        assert [row["loss"] for row in rows.train] == [row["loss"] for row in expected.train]
        assert [row["eval_loss"] for row in rows.evaluations] == [row["eval_loss"] for row in expected.evaluations]
    alone = {**settings, "output_dir": str(folders["mixed"]), "max_steps": 8, "resume": True}
    assert run(TrainSettings(**{**alone, "parallel": "fsdp"})).steps == 8  # one process has nothing to share


@pytest.mark.slow
def test_what_cannot_be_sharded(settings: dict[str, Any], outcomes: Callable[..., Any], tmp_path: Path) -> None:
    base = {**settings, "max_steps": 3, "parallel": "fsdp"}
    cases = {
        "fit": {**base, "fit": "8GB"},
        "quantization": {**base, "quantization": "int8"},
        "kasa_config": {**base, "kasa_config": {}},
        "parallel": {**base, "parallel": "hsdp", "max_steps": 1, "output_dir": str(tmp_path / "hsdp")},
    }
    for process in outcomes(list(cases.values())):
        found = dict(zip(cases, process, strict=True))
        for name in ("fit", "quantization", "kasa_config"):
            assert (found[name]["kind"], found[name]["field"]) == ("NotYetSupported", name)
        assert found["parallel"]["ending"] == "finished"
    assert not (tmp_path / "run").exists()
    assert json.loads((tmp_path / "hsdp" / "run.json").read_text())["sharding"]["mesh"] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "ends"])
def test_a_failure_in_one_process_does_not_leave_the_other_waiting(how: str, tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("process_lockstep.py"))
    (code, _, messages), _ = end(begin([program, str(tmp_path), how], 2))
    assert code == 0, messages
    found = json.loads((tmp_path / "0.json").read_text())
    if how == "raises":
        assert (found["kind"], found["field"]) == ("DataError", "data")
        assert found["message"].startswith("process 1: ")
    else:
        assert (found["kind"], found["field"]) == ("RunError", PROCESS_ENDED)
