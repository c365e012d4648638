"""Every example runs, prints what it promises, and is short enough to read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorakit.train import TrainSettings, run

from ..loading import load

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_every_example_is_tested_here() -> None:
    tested = {"quickstart", "many_adapters", "alpha_and_learning_rate", "naive_lora"}
    tested |= {"reference_project", "full_fine_tuning"}
    tested |= {"moe_experts", "pissa_to_plain_lora"}
    tested |= {"ray_train"}
    tested |= {"optimizers", "dora", "combine_adapters", "qlora", "activated_lora"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    limit = {"reference_project": 350, "full_fine_tuning": 150}.get(path.stem, 60)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    load("examples/quickstart.py").main()
    told = capsys.readouterr().out
    assert "trainable parameters at 14 sites" in told
    assert "the base's row equals the base: True" in told
    assert "loaded: same base" in told


def test_activated_lora(capsys: pytest.CaptureFixture[str]) -> None:
    load("examples/activated_lora.py").main()
    told = capsys.readouterr().out
    assert "positions that the adapter changes: [12, 13] of 14" in told
    assert "tokens read: [128, 14, 14]" in told
    assert "'judge': 7" in told
    assert "'base': 7" not in told


def test_pissa_to_plain_lora(capsys: pytest.CaptureFixture[str]) -> None:
    load("examples/pissa_to_plain_lora.py").main()
    told = capsys.readouterr().out
    assert "pissa changes base weights (sites: 2)" in told
    assert "new adapter: the output changed by 0.0000" in told
    assert "on disk: r 8, alpha 16, init_lora_weights True" in told
    assert "plain LoRA on the original base: same output within 0.0000" in told
    assert "restored for training: r 4, bit-identical: True" in told
    assert "detached: base restored bit for bit: True" in told


def test_many_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("examples/many_adapters.py")
    example.main()
    told = capsys.readouterr().out
    assert "summarize, translate, classify" in told
    difference = float(told.split("single rows: ")[1].split()[0])
    assert difference < 1e-5
    model = example.base_with_adapters()
    tokens = example.torch.randint(0, 100, (3, 12))
    alone = example.one_by_one(model, tokens)
    assert (alone - example.mixed(model, tokens).roll(1, 0)).abs().max() > 0.01  # the adapters do differ


def test_combine_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    load("examples/combine_adapters.py").main()
    told = capsys.readouterr().out
    assert float(told.split("logits differ by ")[1].split()[0]) < 1e-5
    away = [
        float(line.split(": ")[1].split("%")[0]) for line in told.splitlines() if "deviation at the worst site" in line
    ]
    assert len(away) == 3 and 0 < away[0] < away[1]
    assert "both - brief = polite: cosine 1.000000" in told
    assert 0 < float(told.split("loses ")[1].split("%")[0]) < 60


def test_moe_experts(capsys: pytest.CaptureFixture[str]) -> None:
    load("examples/moe_experts.py").main()
    told = capsys.readouterr().out
    first, last = (float(line.split()[1]) for line in told.splitlines() if line.startswith("loss "))
    assert last < first / 2
    assert told.count("4 experts, rank 2") == 2
    assert float(told.split("differ by ")[1]) < 1e-4


def test_alpha_and_learning_rate() -> None:
    assert load("examples/alpha_and_learning_rate.py").table().count("\n") == 6


def test_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    load("examples/optimizers.py").main()
    lines = capsys.readouterr().out.splitlines()
    left = {line.partition(":")[0]: int(line.partition(": ")[2].partition("%")[0]) for line in lines}
    assert len(left) == 5
    assert all(share < 90 for share in left.values())
    assert left["LoRA+, B at 16 times the rate"] < left["AdamW"]
    assert left["AdamW, layer 0 at 10 times the rate"] < left["AdamW"]
    assert "ranks [4, 4, 4], 576 trained parameters" in next(line for line in lines if line.startswith("LoRA-FA"))


def test_reference_project(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first four parts in the quick form, on a tiny model; the counts are the real ones."""
    monkeypatch.setattr(sys, "argv", ["reference_project.py", "--quick", "--parts", "1", "2", "3", "4"])
    load("examples/reference_project.py").main()
    told = capsys.readouterr().out
    assert "**811,008** trainable of **124,439,808** (0.65%)" in told
    assert [line for line in told.splitlines() if line.startswith("## ")] == [
        "## 1. Number of trained parameters",
        "## 2. Twenty epochs on a small text",
        "## 3. Three tasks, one base",
        "## 4. Rules of thumb, tested",
    ]
    before, after = next(line for line in told.splitlines() if "the trained text" in line).split("|")[2:4]
    assert float(after) < float(before)
    difference = float(told.split("differ from those of single rows by at most ")[1].split(".\n")[0])
    assert difference < 1e-4


@pytest.mark.slow
def test_full_fine_tuning_beside_lora() -> None:
    """Its last part, which starts processes of its own."""
    command = [sys.executable, str(EXAMPLES / "reference_project.py"), "--quick", "--parts", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "## 5. Full fine-tuning and LoRA, measured" in done.stdout
    assert "| trained parameters | 8,704 | 37,024 |" in done.stdout


def test_dora(capsys: pytest.CaptureFixture[str]) -> None:
    load("examples/dora.py").main()
    told = capsys.readouterr().out
    ends = {
        (line.split(":")[0], line.split()[1]): float(line.split()[-1])
        for line in told.splitlines()
        if "final loss" in line
    }
    assert ends["lengths", "dora"] < 1e-6 < 1e-3 < ends["lengths", "lora"]
    assert ends["low-rank", "lora"] < 1e-6 < ends["low-rank", "dora"]
    moved = [float(line.split()[-1]) for line in told.splitlines() if "merging" in line]
    assert len(moved) == 2
    assert max(moved) < 1e-5


def test_qlora(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    load("examples/qlora.py").main()
    told = capsys.readouterr().out
    before, after = (float(word) for word in told.split("loss ")[1].split(" in ")[0].split(" -> "))
    assert after < before - 1
    assert "on the unquantized base (same at other precision)" in told
    packed = float(told.split("error ")[1].split("%")[0])
    assert 5 < packed < 15
    assert "merged into dense weights: error 0.0e+00" in told
    assert float(told.rsplit("loss ", 1)[1]) == pytest.approx(after, abs=0.2)


@pytest.mark.slow
def test_ray_train(tiny_model_directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    (tmp_path / "data").mkdir()
    for number in range(6):
        (tmp_path / "data" / f"{number}.txt").write_text(f"The quick fox number {number} jumps over dogs. " * 3)
    flags = {"model": tiny_model_directory, "data": tmp_path / "data", "output-dir": tmp_path / "run", "max-steps": 2}
    flags["dtype"] = "float32"  # the default depends on the processor
    source = EXAMPLES.parent / "src"
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "ray_train.py"), *(f"--{name}={value}" for name, value in flags.items())],
        env={**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert all(f"worker {rank}: finished after 2 steps" in done.stdout for rank in range(2))
    alone = TrainSettings(  # as in the example, with as many rows in a step
        model=str(tiny_model_directory),
        data=[str(tmp_path / "data")],
        output_dir=tmp_path / "alone",
        dtype="float32",
        max_steps=2,
        max_length=64,
        eval_fraction=0,
        gradient_accumulation_steps=2,
    )
    run(alone)
    saved = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("run", "alone")]
    torch.testing.assert_close(*saved, rtol=0, atol=1e-5)
