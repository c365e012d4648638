"""Checks before any data is read: processes and devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import hub
from lorakit.errors import UsageError
from lorakit.train.processes.processes import Processes
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup.agreement import pick_device
from lorakit.train.setup.run_spec import fitting_length


def test_devices_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    second = Processes(1, 2, 1)
    assert pick_device("auto", second) == pick_device("cpu", second) == torch.device("cpu")
    for word in ("cuda:0", "mps"):
        with pytest.raises(UsageError, match="cannot share"):
            pick_device(word, second)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", second) == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="finds 2 CUDA devices"):
        pick_device("cuda", Processes(2, 3, 2))


def test_one_gpu_for_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device("cuda", Processes(5, 8, local)).index for local in range(2)] == [0, 1]
    for devices in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        with pytest.raises(UsageError, match=r"process 5, .*LOCAL_RANK.* finds \d CUDA device") as caught:
            pick_device("cuda", Processes(5, 8, 1))
        assert (caught.value.field, caught.value.what) == ("device", "1")


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UsageError, match=r"device is 'cuda:99'.* \d+ CUDA devices?"):
        pick_device("cuda:99")


def test_the_memory_limits_the_length(tiny_model_directory: Path) -> None:
    shape = hub.shape_of(hub.resolve(str(tiny_model_directory)))
    settings = TrainSettings(model="m", data=["d"], output_dir="o")
    config = settings.lora_config()
    assert fitting_length(4096, shape, config, settings) == 4096
    tight = settings.model_copy(update={"memory_budget": "300MB"})
    found = [fitting_length(size, shape, config, tight) for size in (512, 1 << 14, 1 << 22)]
    assert found[0] == 512 and 512 <= found[2] < 1 << 22
    assert fitting_length(400, shape, config, settings.model_copy(update={"memory_budget": "1MB"})) == 400


def test_a_run_records_its_length_and_resume_eval_and_predict_use_it_again(
    short_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit import cli
    from lorakit.train.trainer import run

    rows = [{"prompt": "say ", "completion": "fox " * (1 + number)} for number in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    del short_run["max_length"]
    settings = {**short_run, "data": [str(path)], "max_steps": 2, "save_steps": 1, "tuning": False}
    run(TrainSettings(**settings))
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    length = record["resolved"]["max_length"]
    assert record["settings"]["max_length"] is None and 16 < length < 512
    assert record["data"]["cut_rows"] == 0  # 1% of 32 rows is less than one row
    run(
        TrainSettings(
            output_dir=settings["output_dir"], resume=True, data=[str(path)], model=short_run["model"], max_steps=3
        )
    )
    again = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert again["resolved"]["max_length"] == length
    longer = tmp_path / "longer.jsonl"
    longer.write_text(json.dumps({"prompt": "say ", "completion": "fox " * 60}) + "\n", encoding="utf-8")
    words = ["eval", "--model", str(short_run["model"]), "--data", str(longer), "--dtype", "float32"]
    capsys.readouterr()
    assert cli.main([*words, "--adapter", str(tmp_path / "run")]) == 0
    assert f"1 row (100.0%) truncated to {length} tokens" in capsys.readouterr().err
    assert cli.main(words) == 0
    assert "truncated" not in capsys.readouterr().err
