"""`fit` chooses the batch size: the process stays within the limit, and the losses are those of the same rows per step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import ConfigError
from lorakit.report import read_metrics
from lorakit.train import TrainSettings, run
from lorakit.train.progress import PlainProgress

from ...small_models import llama

SCRIPT = """
import json, sys
from lorakit import allocator
allocator.set_up()
from lorakit.errors import ConfigError
from lorakit.machine import peak_rss_bytes
from lorakit.train import TrainSettings, run
words = json.loads(sys.argv[1])
try:
    run(TrainSettings(**words))
    fault = None
except ConfigError as cause:
    fault = cause.fields["field"]
print(json.dumps({"peak": peak_rss_bytes(), "fault": fault}))
"""


@pytest.fixture
def settings(short_run: dict[str, Any]) -> dict[str, Any]:
    short_run = {**short_run, "eval_fraction": 0.0, "max_steps": 3, "tuning": False}
    return {**short_run, "per_device_train_batch_size": 4, "allow_missing_end": True}


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def losses_of(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder).train]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_process_stays_within_the_limit(settings: dict[str, Any], tmp_path: Path, tiny_tokenizer: Any) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "model"
    llama(vocab_size=8192, hidden_size=128, intermediate_size=512, num_hidden_layers=4).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": f" {number} b" * (20 + 40 * (number % 5))} for number in range(48)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = {**settings, "model": str(folder), "data": [str(data)], "max_length": 128, "accelerate": False}
    words["per_device_train_batch_size"] = 16

    def trained(name: str, **more: Any) -> tuple[dict[str, Any], Path]:
        given = {**words, "output_dir": str(tmp_path / name), **more}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SCRIPT, json.dumps(given)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1]), tmp_path / name

    whole, plain = trained("plain")
    sizes = set()
    for number, share in enumerate((1.4, 1.0, 0.9)):
        limit = int(share * whole["peak"])
        found, made = trained(f"fit-{number}", fit=f"{limit}B")
        assert found["peak"] <= limit
        if found["fault"] is None:
            resolved = record_of(made)["resolved"]
            assert resolved["batch_rows"] * resolved["accumulation"] == 16
            assert losses_of(made) == pytest.approx(losses_of(plain), rel=1e-5)
            sizes.add((resolved["batch_rows"], resolved["recompute"]))
        else:
            assert found["fault"] == "fit"
    assert len(sizes) >= 2


def test_the_choice_is_printed_recorded_and_kept(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(TrainSettings(**{**settings, "output_dir": tmp_path / "plain"}))
    run(TrainSettings(**settings, fit="64GB"), PlainProgress())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fit ")]
    assert len(said) == 1
    resolved = record_of(tmp_path / "run")["resolved"]
    assert f"--per-device-train-batch-size {resolved['batch_rows']} " in said[0]
    assert f"--gradient-accumulation-steps {resolved['accumulation']} " in said[0]
    assert resolved["batch_rows"] * resolved["accumulation"] == 4
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-5)
    changed = {**record_of(tmp_path / "run")}
    changed["resolved"] |= {"batch_rows": 4, "accumulation": 1, "recompute": "layers"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(changed), encoding="utf-8")
    again = {"output_dir": tmp_path / "run", "resume": True, "max_steps": 4}
    run(TrainSettings(**{**settings, **again}, fit="64GB"), PlainProgress())
    assert record_of(tmp_path / "run")["resolved"]["recompute"] == "layers"


def test_what_cannot_fit_is_an_error_before_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--quantization") as caught:
        run(TrainSettings(**settings, fit="10MB"))
    assert caught.value.fields["field"] == "fit"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "others", [{"memory_budget": "1GB"}, {"recompute": "layers"}, {"gradient_checkpointing": True}], ids=str
)
def test_fit_excludes_what_it_chooses(settings: dict[str, Any], others: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"fit and .* are mutually exclusive") as caught:
        TrainSettings(**settings, fit="1GB", **others)
    assert caught.value.fields["field"] == "fit"
