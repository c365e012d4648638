"""Law 8: a run that is killed with SIGKILL, at any step and any operation, and resumed gives the same bits as one that
was never interrupted.

One child process loads everything once; each run is a fork of it, so that a kill is a real one and costs no start-up.
Compared are SHA-256 of every file of the last checkpoint and of the adapter, and the metrics but for times.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lorakit.choices import OPTIMIZERS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

DRIVER = '''
import hashlib, json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # once, not in each fork
from lorakit import core
from lorakit.errors import LorakitError
from lorakit.train import trainer
from lorakit.train.files import checkpoint, run_folder
from lorakit.train.loop import loop
from lorakit.train.settings.settings import TrainSettings

sys.modules["matplotlib.figure"] = None  # no plot: it costs more than the run
root, job = Path(sys.argv[1]), json.loads(sys.argv[2])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def killer(place, step):
    """Make this process kill itself at a place of a step."""
    def around(function, when, before):
        def wrapped(*arguments, **named):
            if before and when(*arguments, **named):
                die()
            result = function(*arguments, **named)
            if not before and when(*arguments, **named):
                die()
            return result
        return wrapped
    steps = iter(range(step - 1, -1, -1))
    def is_step(*_, **__):
        return next(steps, None) == 0
    def is_row(log, row):
        return row["step"] == step and "loss" in row
    def is_save(folder, snapshot, write):
        return snapshot.state.step >= step
    if place == "before the step":
        loop.train_step = around(loop.train_step, is_step, True)
    elif place == "after the step":
        loop.train_step = around(loop.train_step, is_step, False)
    elif place == "after the row":
        loop.MetricsLog.append = around(loop.MetricsLog.append, is_row, False)
    elif place == "while saving":
        core.save_adapter = around(core.save_adapter, lambda *_, **__: is_step(), False)
    elif place == "after saving":
        checkpoint.save = around(checkpoint.save, is_save, False)
    elif place == "while evaluating":
        loop.evaluate = around(loop.evaluate, is_step, True)
    elif place == "while publishing":
        from lorakit.train import results
        results.publish_adapter = around(results.publish_adapter, lambda *_, **__: True, False)

def run(folder, kill=None, **more):
    """Fork, train, and say how it ended."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            if kill:
                killer(*kill)
            trainer.run(TrainSettings(**{**job["settings"], "output_dir": str(folder), **more}))
        except LorakitError as error:
            print(error, file=sys.stderr)
            code = 1
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()

def outcome(folder):
    last = run_folder.checkpoints(folder)[-1]
    files = {f"{p.parent.name}/{p.name}": digest(p) for p in [*last.iterdir(), *(folder / "adapter").iterdir()]}
    state = json.loads((last / "state.json").read_text())
    state["state"].pop("seconds")
    for name in ("manifest.json", "state.json"):
        files.pop(f"{last.name}/{name}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("seconds", "tokens_per_second", "peak_rss_bytes"):
            row.pop(name, None)
    leftovers = sorted(p.name for p in folder.iterdir() if p.name.startswith((".lorakit", "damaged")))
    return {"files": files, "state": state, "rows": rows, "left": leftovers}

whole = root / "whole"
assert run(whole) == 0
print(json.dumps({"whole": outcome(whole)}))
for number, kills in enumerate(job["kills"]):
    folder = root / f"killed-{number}"
    codes = [run(folder, kill, resume=position > 0) for position, kill in enumerate(kills)]
    codes.append(run(folder, resume=True))
    print(json.dumps({"kills": kills, "codes": codes, **outcome(folder)}))
'''

PLACES = ("before the step", "after the step", "after the row")
"""Places that every step passes; the others are passed at intervals, and count their own passes."""


def _data(folder: Path) -> list[str]:
    paths = []
    for number in range(10):
        path = folder / f"{number}.txt"
        path.write_text(
            f"The quick fox number {number} jumps over {number + 7} lazy dogs. " * (2 + number % 3), encoding="utf-8"
        )
        paths.append(str(path))
    return paths


def _settings(model: Path, data: list[str], **values: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "data": data,
        "eval_fraction": 0.2,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.1,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 2,
        "max_length": 24,
        "dtype": "float32",
        "device": "cpu",
        **values,
    }


def _drive(folder: Path, settings: dict[str, Any], kills: list[list[tuple[str, int]]]) -> list[dict[str, Any]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    job = json.dumps({"settings": settings, "kills": kills})
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), job], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check(whole: dict[str, Any], outcomes: list[dict[str, Any]]) -> None:
    for found in outcomes:
        where = found["kills"]
        assert found["codes"] == [-signal.SIGKILL] * len(where) + [0], where
        assert found["files"] == whole["files"], where
        assert found["state"] == whole["state"], where
        assert found["rows"] == whole["rows"], where
        assert found["left"] == [], where


@pytest.mark.costly
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "kills",
    [
        [(PLACES[step % 3], step) for step in range(1, 7)],
        [(PLACES[step % 3], step) for step in range(7, 12)],
        [("while saving", 1), ("while saving", 3), ("while saving", 5), ("after saving", 2), ("after saving", 11)],
        [("while evaluating", 1), ("while evaluating", 2), ("while evaluating", 4), ("while publishing", 0)],
    ],
    ids=["early steps", "late steps", "saving", "evaluating"],
)
def test_killed_once_at_every_step(
    tmp_path: Path, tiny_model_directory: Path, kills: list[tuple[str, int]], accumulation: int
) -> None:
    """Kill at every step of more than two epochs, cycling through the operations; saving every second step repeats steps."""
    settings = _settings(
        tiny_model_directory,
        _data(tmp_path),
        per_device_train_batch_size=6 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=11,
        eval_steps=3,
        save_steps=2,
    )
    whole, *outcomes = _drive(tmp_path, settings, [[kill] for kill in kills])
    assert len({row["epoch"] // 1 for row in whole["whole"]["rows"] if "loss" in row}) >= 2  # an epoch ends on the way
    _check(whole["whole"], outcomes)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, tiny_model_directory: Path) -> None:
    """A kill after each step of each resumed run, until the end is reached; checkpoints are kept one by one."""
    settings = _settings(
        tiny_model_directory, _data(tmp_path), max_steps=6, eval_steps=2, save_steps=1, save_total_limit=1
    )
    kills = [
        [("after saving", step) for step in range(1, 6)],
        [
            ("after the row", 2),
            ("while evaluating", 1),
            ("while saving", 1),
            ("before the step", 1),
            ("after the step", 2),
        ],
    ]
    whole, *outcomes = _drive(tmp_path, settings, kills)
    _check(whole["whole"], outcomes)


OTHER_SETTINGS: list[dict[str, Any]] = [
    {"dtype": "bfloat16"},
    {"gradient_checkpointing": True},
    {"recompute": "feed-forward"},
    {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    {"early_stopping_patience": 3, "learning_rate": 0.3, "eval_steps": 1},
    {"eval_fraction": 0.0, "lr_scheduler_type": "linear", "weight_decay": 0.1, "use_rslora": True},
    {"loraplus_lr_ratio": 8.0, "learning_rate_pattern": {"q_proj": 0.1, "down_proj": 0.001}, "weight_decay": 0.1},
    {
        "optimizer": "lorafa",
        "weight_decay": 0.1,
        "loraplus_lr_embedding": 1e-3,
        "target_modules": ["embed_tokens", "q_proj", "up_proj"],
    },
    {"allocate_ranks": "gradients", "optimizer": "lorafa"},
    {"optimizer": "adamw8bit", "r": 64, "weight_decay": 0.1, "loraplus_lr_ratio": 4.0, "use_dora": True},
    {"optimizer": "muon", "weight_decay": 0.1, "loraplus_lr_ratio": 4.0, "use_dora": True},
    {"optimizer": "muon", "target_modules": ["embed_tokens", "q_proj"], "learning_rate_pattern": {"q_proj": 0.02}},
    {"lr_scheduler_type": "wsd", "decay_ratio": 0.5, "warmup_steps": 2},
    {"learning_rate_pattern": {".*": 0.1}, "allocate_ranks": "inputs", "use_dora": True},
    {"init_lora_weights": "pissa", "dtype": "bfloat16"},
    {"init_lora_weights": "corda", "use_rslora": True},
    {"init_lora_weights": "lora_ga", "r": 3, "use_dora": True},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "mica"},
    {"new_tokens": ["jumps over", "<never>"], "weight_decay": 0.1},
    {"streaming": "on", "gradient_accumulation_steps": 2},
]


def test_the_settings_have_each_optimizer() -> None:
    assert {more["optimizer"] for more in OTHER_SETTINGS if "optimizer" in more} == {*OPTIMIZERS} - {"adamw"}


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize(
    "more",
    OTHER_SETTINGS,
    ids=lambda more: str(more.get("init_lora_weights", next(iter(more)))),
)
def test_killed_with_other_settings(tmp_path: Path, tiny_model_directory: Path, more: dict[str, Any]) -> None:
    settings = _settings(
        tiny_model_directory, _data(tmp_path), **{"max_steps": 6, "eval_steps": 2, "save_steps": 2, **more}
    )
    whole, *outcomes = _drive(tmp_path, settings, [[("after the row", 1)], [("before the step", 3)]])
    _check(whole["whole"], outcomes)


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_killed_while_streaming_a_table(tmp_path: Path, tiny_model_directory: Path, suffix: str) -> None:
    """Several epochs of a file of rows; the position is a byte offset in the middle of a file, or a row number."""
    rows = [{"text": f"The quick fox number {number} jumps, over\n{number + 7} lazy dogs."} for number in range(14)]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pyarrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        tables.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join([f'"{row}"\n' for row in ["text", *(row["text"] for row in rows)]]))
    steps = {"max_steps": 12, "eval_steps": 5, "save_steps": 2, "streaming": "on"}
    settings = _settings(tiny_model_directory, [str(path)], **steps)
    whole, *outcomes = _drive(tmp_path, settings, [[("after the row", 1), ("before the step", 3), ("after saving", 8)]])
    assert max(row["epoch"] for row in whole["whole"]["rows"]) > 1
    _check(whole["whole"], outcomes)


@pytest.mark.slow
def test_killed_from_outside_at_random_times(tmp_path: Path, tiny_model_directory: Path) -> None:
    """The command itself, killed at random times and resumed automatically until it ends."""
    import random

    random.seed(8)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = ["--model", str(tiny_model_directory), "--data", *_data(tmp_path), "--eval-fraction", "0.2"]
    arguments += [
        "--max-steps",
        "400",
        "--save-steps",
        "5",
        "--eval-steps",
        "50",
        "--max-length",
        "24",
        "--dtype",
        "float32",
    ]
    arguments += ["--lora-dropout", "0.1", "--device", "cpu"]

    def train(folder: Path, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "lorakit", "train", "--output-dir", str(folder), *arguments, *more]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert train(tmp_path / "whole").wait() == 0
    folder = tmp_path / "killed"
    process, kills = train(folder), 0
    while not (folder / "run.json").exists():
        time.sleep(0.01)
    while kills < 8:
        time.sleep(random.uniform(0.05, 0.6))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process = train(folder, "--resume")
        begun = (folder / "run.json").stat().st_mtime_ns
        while process.poll() is None and (folder / "run.json").stat().st_mtime_ns == begun:
            time.sleep(0.01)
        if process.poll() is not None:
            break
    assert process.wait() == 0
    assert kills >= 3
    for name in ("adapter/adapter_model.safetensors", "checkpoint-400/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (name, kills)
