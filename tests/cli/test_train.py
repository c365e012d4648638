"""`lorakit train` from flags to run directory: its files, its output and its errors."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit import cli, core, hub
from lorakit.data import encoding
from lorakit.session import Evaluation
from lorakit.train.files import checkpoint, run_folder
from lorakit.train.loop import loop
from lorakit.train.settings.defaults import ALIASES, DEFAULTS

from ..docs.test_format import listed

Train = Callable[..., int]


def adapter_config(folder: Path) -> dict[str, Any]:
    """The config of a run's adapter."""
    found: dict[str, Any] = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    paths = []
    for number in range(6):
        path = tmp_path / f"{number}.txt"
        path.write_text(f"The quick fox number {number} jumps over {number + 3} lazy dogs. " * 4, encoding="utf-8")
        paths.append(str(path))
    return paths


@pytest.fixture
def train(tmp_path: Path, tiny_model_directory: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run the command on a tiny model; keywords replace flags, None omits one."""
    monkeypatch.setitem(
        __import__("sys").modules, "matplotlib.figure", None
    )  # plotting takes longer than training here

    def call(*more: str, **flags: Any) -> int:
        given = {
            "model": tiny_model_directory,
            "data": texts,
            "output-dir": tmp_path / "run",
            "max-length": 24,
            "dtype": "float32",
            "device": "cpu",
            "max-steps": 4,
            "eval-fraction": 0.2,
            "learning-rate": 0.005,
            "r": 4,
        }
        given.update({name.replace("_", "-"): value for name, value in flags.items()})
        words = ["train"]
        for name, value in given.items():
            if value is not None:
                words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return cli.main([*words, *more])

    return call


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_run_and_what_it_leaves(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    out = capsys.readouterr().out
    folder = tmp_path / "run"
    for part in (
        "training data: 5 documents",
        "1 of 6 documents is held out for evaluation (seed 0).",
        " in float32\ntrainable: ",
        "evaluation at step 0: loss",
        "step 1/4  loss",
        "Finished at step 4 of 4",
        "Evaluation perplexity: ",
        f"Adapter: {folder / 'adapter'} (step ",
        'The loss plot needs matplotlib: pip install "lorakit[report]"',
    ):
        assert part in out
    rows = _rows(folder)
    assert [list(row) for row in rows if "loss" in row] == [listed("train")] * 4
    assert [list(row) for row in rows if "eval_loss" in row] == [listed("eval")] * 5
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    record = _record(folder)
    assert record["status"] == "finished"
    assert record["settings"]["lora_alpha"] == 32
    assert record["resolved"]["total_steps"] == 4
    assert record["plan"]["adapter"]["trainable"] == record["resolved"]["trainable_parameters"]
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["data_sha256"]) == 6
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter",
        "checkpoint-3",
        "checkpoint-4",
        "metrics.jsonl",
        "run.json",
    ]


def test_the_adapter_is_whole_and_better_than_the_base(
    train: Train, tmp_path: Path, tiny_model_directory: Path
) -> None:
    assert train() == 0
    folder = tmp_path / "run" / "adapter"
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "lorakit.json", "tokenizer.json"} <= {
        path.name for path in folder.iterdir()
    }
    model = hub.load_model(str(tiny_model_directory))
    report = core.load_adapter(model, folder)
    assert (report.base, report.warnings) == ("same", ())
    facts = json.loads((folder / "lorakit.json").read_text(encoding="utf-8"))
    assert facts["training"]["step"] == 4
    assert facts["training"]["eval_loss"] < facts["training"]["base_eval_loss"]
    assert facts["base_name"] == str(tiny_model_directory)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tiny_model_directory)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: peft")
    assert "perplexity" in card


def test_json_is_all_that_goes_to_stdout(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["ending"], result["steps"], result["adapter_step"]) == ("finished", 4, 4)
    assert result["best_loss"] < result["first_loss"]
    assert result["adapter"] == str(tmp_path / "run" / "adapter")
    assert "step 1/4" in captured.err


def test_flags_in_every_form(train: Train, tmp_path: Path, texts: list[str]) -> None:
    words = ["--data", texts[0], "--data", texts[1], "--target_modules", "q_proj", "v_proj", "--use_dora"]
    assert train(*words, data=None, max_steps=1, eval_fraction=0) == 0
    settings = _record(tmp_path / "run")["settings"]
    assert settings["data"] == texts[:2]
    assert settings["target_modules"] == ["q_proj", "v_proj"]
    assert settings["use_dora"] is True


def test_a_file_of_settings_with_flags_winning(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning-rate: 1e-3\nr: 2\nweight_decay: 1e-2\n", encoding="utf-8")
    assert train("--config", str(path), r=8, learning_rate=None, max_steps=1) == 0
    settings = _record(tmp_path / "run")["settings"]
    assert (settings["learning_rate"], settings["r"], settings["weight_decay"]) == (1e-3, 8, 1e-2)


def test_a_single_document_leaves_nothing_to_evaluate(
    train: Train, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data=texts[:1]) == 0
    out = capsys.readouterr().out
    assert "No data is held out for evaluation: the data is a single document" in out
    assert "Evaluation: not measured (no evaluation data)" in out
    assert _record(tmp_path / "run")["result"]["adapter_step"] == 4


def _losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Make evaluations return these losses, one after another."""
    course = iter(losses)
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: Evaluation(next(course), 10))


def test_the_adapter_is_the_best_not_the_last(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _losses(monkeypatch, 2.0, 1.9, 1.5, 1.7, 1.6, 1.8)
    assert train(max_steps=5, save_total_limit=1) == 0
    folder, result = tmp_path / "run", _record(tmp_path / "run")["result"]
    assert (result["adapter_step"], result["first_loss"], result["best_loss"]) == (2, 2.0, 1.5)
    assert [path.name for path in run_folder.checkpoints(folder)] == ["checkpoint-2", "checkpoint-5"]
    name = "adapter_model.safetensors"
    assert (folder / "adapter" / name).read_bytes() == (folder / "checkpoint-2" / name).read_bytes()
    assert (folder / "adapter" / name).read_bytes() != (folder / "checkpoint-5" / name).read_bytes()
    assert "not better than the base" not in capsys.readouterr().out


def test_a_lost_best_checkpoint_does_not_lend_its_loss(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result and the model card show the loss at the step whose adapter was published."""
    course = iter((2.0, 1.9, 1.5, 1.7, 1.6, 1.8))

    def evaluate(*_: object, **__: object) -> Evaluation:
        loss = next(course)
        if loss == 1.8:
            (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").unlink()
        return Evaluation(loss, 10)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    assert train(max_steps=5, save_total_limit=1) == 0
    result = _record(tmp_path / "run")["result"]
    assert (result["adapter_step"], result["best_loss"], result["adapter_loss"]) == (5, 1.5, 1.8)
    out, card = capsys.readouterr().out, (tmp_path / "run" / "adapter" / "README.md").read_text()
    for text in (out, card):
        assert "Evaluation perplexity: 7.39 → 6.05" in text  # e**2.0 and e**1.8


def test_an_adapter_that_is_worse_than_the_base_is_not_praised(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _losses(monkeypatch, 1.0, 1.2, 1.1)
    assert train(max_steps=2) == 0
    assert "The adapter is not better than the base on the evaluation data" in capsys.readouterr().out
    _losses(monkeypatch, 1.0, 1.0, 1.0)  # as of a single pair of texts: its ranking loss is always 0
    assert train(max_steps=2, output_dir=tmp_path / "same") == 0
    out = capsys.readouterr().out
    assert "does not tell the adapter from the base" in out and "do not use it" not in out


def test_early_stopping(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _losses(monkeypatch, 2.0, 1.9, 1.95, 1.8, 1.85, 1.9)
    assert train(max_steps=50, eval_steps=1, early_stopping_patience=2) == 0
    result = _record(tmp_path / "run")["result"]
    assert (result["ending"], result["steps"], result["adapter_step"]) == ("stopped early", 5, 3)
    assert "Stopped early at step 5 of 50" in capsys.readouterr().out


def test_interrupted_once_it_saves_and_exits_130_and_goes_on_to_the_same_bits(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(output_dir=tmp_path / "whole", save_steps=100, eval_steps=100) == 0
    _signal_in_step(monkeypatch, signal.SIGTERM, step=2, times=1)
    assert train(save_steps=100, eval_steps=100) == 130
    captured = capfd.readouterr()
    folder = tmp_path / "run"
    assert "interrupted: finishing this step and saving a checkpoint" in captured.err
    assert f"Resume with: lorakit train --output-dir {folder} --resume" in captured.out
    assert _record(folder)["status"] == "interrupted"
    assert [path.name for path in run_folder.checkpoints(folder)] == ["checkpoint-2"]
    assert not (folder / "adapter").exists()
    monkeypatch.undo()
    assert cli.main(["train", "--output-dir", str(folder), "--resume"]) == 0
    for name in ("adapter/adapter_model.safetensors", "checkpoint-4/optimizer.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_interrupted_twice_it_stops_at_once(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _signal_in_step(monkeypatch, signal.SIGINT, step=3, times=2)
    assert train(save_steps=1) == 130
    folder = tmp_path / "run"
    assert checkpoint.newest_valid(folder) == folder / "checkpoint-2"
    assert [row["step"] for row in _rows(folder) if "loss" in row] == [1, 2]
    assert "error: interrupted" in capfd.readouterr().err


def _signal_in_step(monkeypatch: pytest.MonkeyPatch, number: int, step: int, times: int) -> None:
    real, done = loop.train_step, iter(range(1, 1000))

    def step_with_signal(*arguments: Any) -> Any:
        if next(done) == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step", step_with_signal)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("there", [False, True])
def test_a_signal_while_data_is_read(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    there: bool,
) -> None:
    folder = tmp_path / "run"
    if there:
        assert train(max_steps=1) == 0
    before = _files(tmp_path)
    real = encoding.token_parts

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(encoding, "token_parts", signalled)
    capsys.readouterr()
    assert train(*(["--overwrite"] if there else [])) == 130
    assert capsys.readouterr().err == f"error: interrupted before the first step; {folder} is unchanged\n"
    assert _files(tmp_path) == before
    assert folder.exists() is there
    monkeypatch.setattr(encoding, "token_parts", real)
    assert train("--overwrite", max_steps=1) == 0  # the directory is not locked


def test_resume_passes_over_damage_and_says_so(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(save_steps=1, save_total_limit=4, eval_fraction=0) == 0
    folder = tmp_path / "run"
    before = (folder / "checkpoint-4" / "optimizer.safetensors").read_bytes()
    (folder / "checkpoint-4" / "optimizer.safetensors").write_bytes(before[:-1])
    (folder / "checkpoint-3" / "state.json").unlink()
    assert cli.main(["train", "--output-dir", str(folder), "--resume"]) == 0
    out = capsys.readouterr().out
    assert f"{folder / 'checkpoint-4'}: skipped, because optimizer.safetensors has " in out
    assert f"{folder / 'checkpoint-3'}: skipped, because state.json is missing." in out
    assert f"Resuming from {folder / 'checkpoint-2'}." in out
    assert (folder / "checkpoint-4" / "optimizer.safetensors").read_bytes() == before
    assert {"damaged-checkpoint-3", "damaged-checkpoint-4"} <= {path.name for path in folder.iterdir()}
    assert [row["step"] for row in _rows(folder)] == [1, 2, 3, 4]


def test_resume_with_every_checkpoint_damaged_starts_over(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(eval_fraction=0) == 0
    folder = tmp_path / "run"
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    for path in run_folder.checkpoints(folder):
        (path / "manifest.json").unlink()
    assert cli.main(["train", "--output-dir", str(folder), "--resume"]) == 0
    assert "no valid checkpoint; the run starts from the beginning" in capsys.readouterr().out
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_resume_goes_further_with_more_steps_and_refuses_the_rest(
    train: Train, tmp_path: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    folder = tmp_path / "run"
    again = ["train", "--output-dir", str(folder), "--resume"]
    assert cli.main([*again, "--max-steps", "6", "--save-steps", "5", "--eval-steps", "3"]) == 0
    assert [row["step"] for row in _rows(folder) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    capsys.readouterr()
    assert cli.main([*again, "--r", "8", "--learning-rate", "0.1"]) == 1
    said = capsys.readouterr().err
    assert "cannot resume" in said and "r is 8 and was 4; learning_rate is 0.1 and was 0.005" in said
    Path(texts[0]).write_text("something else", encoding="utf-8")
    assert cli.main(again) == 1
    assert f"the data changed: {texts[0]}" in capsys.readouterr().err


def test_resume_to_fewer_steps_than_are_done(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(save_steps=1, save_total_limit=9) == 0
    folder = tmp_path / "run"
    again = ["train", "--output-dir", str(folder), "--resume", "--max-steps"]
    before = _files(folder)
    capsys.readouterr()
    with monkeypatch.context() as loading:
        loading.setattr(hub, "load_model", lambda *_, **__: pytest.fail("loaded"))
        assert cli.main([*again, "2"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in (str(folder), "checkpoint-4", "max_steps is 2", "--max-steps"))
    assert _files(folder) == before
    assert cli.main([*again, "4"]) == 0
    assert "Finished at step 4 of 4" in capsys.readouterr().out
    (folder / "checkpoint-4" / "state.json").unlink()
    (folder / "checkpoint-3" / "state.json").unlink()
    assert cli.main([*again, "2"]) == 0  # the newest valid one is that of step 2
    assert "Finished at step 2 of 2" in capsys.readouterr().out


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwrite_replaces_the_run_once_the_new_one_can_begin(train: Train, tmp_path: Path) -> None:
    assert train() == 0
    folder = tmp_path / "run"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert train("--overwrite", data=[str(tmp_path / "nope.txt")]) == 1
    assert train("--overwrite", target_modules=["q_prok"]) == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert train("--overwrite", max_steps=2) == 0
    assert [path.name for path in run_folder.checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    assert len([row for row in _rows(folder) if "loss" in row]) == 2


def _refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, *words: str, **flags: Any
) -> str:
    """Return the error message of a rejected call; no run may have been created."""
    before = sorted(tmp_path.iterdir())
    assert train(*words, **flags) == code
    assert sorted(tmp_path.iterdir()) == before
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.removeprefix("error: ").strip()


def test_bad_flags(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(code: int, *words: str, **flags: Any) -> str:
        return _refused(train, tmp_path, capsys, code, *words, **flags)

    assert refused(2, r=0) == "r is 0; it must be at least 1."
    assert refused(2, lora_dropout=1.0) == "lora_dropout is 1.0; it must be at least 0 and less than 1."
    assert "Did you mean --learning-rate?" in refused(2, "--learning-rat", "3")
    assert refused(2, model=None).startswith(
        "model is missing; pass --model (model directory, GGUF file, Hub id, or smollm2"
    )
    assert refused(2, device="cuda:77").startswith("device is 'cuda:77', but torch")
    assert refused(2, dtype="bf15").startswith("dtype is 'bf15'; it must be 'auto', 'bfloat16', 'float16' or 'float32'")
    assert refused(2, max_length=4096).endswith("supports at most 128 tokens; pass --max-length 128 or less.")
    assert refused(2, eval_fraction=0, early_stopping_patience=2).startswith(
        "early_stopping_patience requires evaluation"
    )


def test_bad_data(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(content: bytes, name: str = "bad.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return _refused(train, tmp_path, capsys, 1, data=[str(path)])

    missing = tmp_path / "nope.txt"
    assert _refused(train, tmp_path, capsys, 1, data=[str(missing)]).startswith(f"{missing}: data file not found")
    assert "bad.jsonl" in refused(b"")
    assert "bad.jsonl" in refused(b"\x00\x01\xff\xfe" * 50)
    assert "bad.txt" in refused("straße".encode("latin-1"), "bad.txt")
    assert "bad.jsonl:2: the field 'text' is the number 3" in refused(b'{"text": "a"}\n{"text": 3}\n')


def test_bad_models_and_targets(
    train: Train, tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typo = _refused(train, tmp_path, capsys, 1, target_modules=["q_proj", "v_prok"])
    assert "v_prok" in typo
    assert "v_proj" in typo
    assert train("--allow-partial-targets", target_modules=["q_proj", "v_prok"], max_steps=1) == 0
    capsys.readouterr()
    (tiny_model_directory / "tokenizer.json").unlink()
    assert "the model directory has no tokenizer" in _refused(train, tmp_path, capsys, 1, output_dir=tmp_path / "other")


def test_a_second_run_in_the_same_folder(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    capsys.readouterr()
    folder = tmp_path / "run"
    sentence = (
        f"error: a run exists in {folder}; pass --resume to continue it, --overwrite to replace it, or another "
        "--output-dir.\n"
    )
    assert train() == 2
    assert capsys.readouterr().err == sentence
    assert cli.main(["train", "--output-dir", str(folder)]) == 2
    assert capsys.readouterr().err == sentence


def test_several_processes(train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert train() == 2
    assert "WORLD_SIZE is 4, but " in capsys.readouterr().err


def test_a_loss_that_becomes_nan(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train(learning_rate=1e30, max_grad_norm=0, warmup_ratio=0, save_steps=1, eval_fraction=0, max_steps=9)
    assert code == 1
    err = capsys.readouterr().err
    folder = tmp_path / "run"
    good = checkpoint.newest_valid(folder)
    assert good is not None
    assert f"error: {folder}: step " in err
    assert "the step was not taken. Try a lower --learning-rate, or --dtype float32." in err
    assert f"Last valid checkpoint: {good.name}." in err
    assert _record(folder)["status"] == "failed"
    assert _record(folder)["error"]["code"] == "LORA-E091"
    from safetensors.torch import load_file

    assert all(torch.isfinite(t).all() for t in load_file(good / "adapter_model.safetensors").values())
    assert len([row for row in _rows(folder) if "loss" in row]) == int(good.name.split("-")[1])


def test_a_base_that_holds_nan(
    train: Train, tmp_path: Path, tiny_model_directory: Path, tiny_llama: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama.model.norm.weight.data.fill_(float("nan"))
    tiny_llama.save_pretrained(tiny_model_directory)
    assert train() == 1
    err = capsys.readouterr().err
    assert "step 0: the evaluation loss is nan" in err and "non-finite" in err
    assert "No checkpoint was saved." in err


@contextlib.contextmanager
def _no_file_above(size: int) -> Iterator[None]:
    """Limit the size of files (EFBIG), as on a disk on which some files fit and others do not."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# at r 16 the adapter of the tiny model has 66 kB, the optimizer state twice as much
needs_limits = pytest.mark.skipif(os.name != "posix", reason="RLIMIT_FSIZE")


@needs_limits
def test_checkpoints_that_do_not_fit_leave_adapters(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_directory: Path
) -> None:
    folder = tmp_path / "run"
    assert train(r=16, save_steps=2, output_dir=tmp_path / "whole") == 0
    with _no_file_above(100_000):
        assert train(r=16, save_steps=2) == 0
    out = capsys.readouterr().out
    assert "warning: " in out
    assert f"Saved in {folder}: adapter-only-2 (the adapter alone)." in out
    assert "Finished at step 4 of 4" in out
    assert _record(folder)["status"] == "finished"
    assert run_folder.checkpoints(folder) == []
    assert not list(folder.glob(".lorakit-tmp-*"))
    assert not list(folder.glob("adapter-only-*"))  # the best, which was the last, was published
    name = "adapter/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert core.load_adapter(hub.load_model(str(tiny_model_directory)), folder / "adapter").warnings == ()
    assert len([row for row in _rows(folder) if "loss" in row]) == 4


@needs_limits
def test_a_disk_that_fills_up_keeps_the_good_checkpoint_and_the_best_adapter(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _losses(monkeypatch, 2.0, 1.9, 1.5, 1.7, 1.8)
    assert train(r=16, max_steps=1, eval_steps=1) == 0
    folder = tmp_path / "run"
    again = ["train", "--output-dir", str(folder), "--resume", "--max-steps", "4", "--save-steps", "1"]
    capsys.readouterr()
    with _no_file_above(100_000):
        assert cli.main(again) == 0
    out = capsys.readouterr().out
    assert f"Saved in {folder}: checkpoint-1 (complete, for --resume), adapter-only-2 (the adapter alone)." in out
    assert _record(folder)["result"]["adapter_step"] == 2
    assert checkpoint.newest_valid(folder) == folder / "checkpoint-1"
    assert [path.name for path in sorted(folder.glob("adapter-only-*"))] == ["adapter-only-4"]


@needs_limits
def test_a_disk_that_takes_no_adapter_either(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    with _no_file_above(50_000):
        assert train(r=16, save_steps=2) == 1
    err = capsys.readouterr().err
    assert "adapter-only-1" in err or "adapter-only-2" in err
    assert f"Saved in {folder}: no checkpoint and no adapter." in err
    assert _record(folder)["status"] == "failed"
    assert _record(folder)["error"]["code"] == "LORA-E100"
    assert {path.name for path in folder.iterdir()} == {"run.json", "metrics.jsonl"}


@needs_limits
def test_a_tokenizer_that_does_not_fit_costs_only_itself(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_directory: Path
) -> None:
    size = (tiny_model_directory / "tokenizer.json").stat().st_size
    with _no_file_above(size - 1):
        assert train(r=1, max_steps=1, eval_fraction=0, target_modules=["q_proj"]) == 0
    assert "was saved without a tokenizer" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "run" / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "tokenizer.json" not in names
    assert core.load_adapter(hub.load_model(str(tiny_model_directory)), tmp_path / "run" / "adapter").warnings == ()


def test_no_checkpoint_takes_the_room_of_the_result(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.train.setup import run_plan

    monkeypatch.setattr(run_plan.shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=300_000))
    assert train(r=4) == 0
    assert "would leave no room for the final adapter" in capsys.readouterr().out
    assert run_folder.checkpoints(tmp_path / "run") == []
    assert _record(tmp_path / "run")["status"] == "finished"


@needs_limits
def test_an_interruption_without_room_for_its_checkpoint_says_so(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _signal_in_step(monkeypatch, signal.SIGTERM, step=2, times=1)
    with _no_file_above(100_000):
        assert train(r=16, save_steps=100, eval_steps=100) == 130
    out = capsys.readouterr().out
    assert "a checkpoint was saved" not in out
    assert "adapter-only-2 (the adapter alone)" in out
    assert "Resume from the beginning with" in out
    assert _record(tmp_path / "run")["result"]["checkpoint_step"] is None


@pytest.mark.parametrize(("free", "code"), [(1_000, 1), (600_000, 0), (10**9, 0)])
def test_free_space_is_looked_at_before_the_first_step(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    code: int,
) -> None:
    from lorakit.train.setup import run_plan

    monkeypatch.setattr(run_plan.shutil, "disk_usage", lambda _: SimpleNamespace(total=0, used=0, free=free))
    assert train(r=16) == code
    captured = capsys.readouterr()
    assert ("not enough disk space for this run" in captured.err) is (free == 1_000)
    assert ("too small for all checkpoints" in captured.out) is (free == 600_000)
    assert (tmp_path / "run").exists() is (code == 0)


@pytest.mark.parametrize(
    ("on", "next_"),
    [
        ("", "--recompute feed-forward; --recompute layers"),
        ("--recompute feed-forward", "--recompute layers"),
        ("--gradient-checkpointing", "half the --per-device-train-batch-size"),
        ("--memory-budget 4GiB", "a smaller --memory-budget; half"),
        ("--no-accelerate", "fused forward passes"),
    ],
)
def test_memory_that_runs_out(
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on: str,
    next_: str,
) -> None:
    from lorakit.tasks import causal_lm

    real = causal_lm.loss_sum

    def greedy(model: Any, *more: Any) -> Any:
        if model.training:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, *more)

    monkeypatch.setattr(causal_lm, "loss_sum", greedy)
    assert train(*on.split()) == 1
    err = capsys.readouterr().err
    said = "step 1: out of memory: batch of 4 × 24 tokens. Try, in this order: "
    assert said + next_ in err


def test_random_generators_are_left_as_they_were(train: Train) -> None:
    before = torch.get_rng_state()
    assert train(lora_dropout=0.5) == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_help_in_full_gives_every_flag_with_its_reason_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help-all"]) == 0
    said = capsys.readouterr().out
    text = " ".join(said.replace("│", " ").split())
    for name in ("config", "nproc", *DEFAULTS):
        assert f"--{name.replace('_', '-')} " in text
    assert "Default 16: enough to learn a new task" in text
    titles = [line.split("─")[1].strip() for line in said.splitlines() if line.startswith("╭")]
    assert titles == ["Parameters", *dict.fromkeys(row.group for row in DEFAULTS.values())]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_settings_that_people_change_on_one_screen(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", flag, "--r", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    known = {f"--{name.replace('_', '-')}" for name in (*DEFAULTS, *ALIASES)}
    assert len(shown) == len(set(shown)) == 20 and set(shown) <= known
    assert "--help-all" in " ".join(lines)


def test_lorafa_and_rates_by_pattern_reach_the_run(train: Train, tmp_path: Path) -> None:
    assert train("--learning-rate-pattern", "q_proj=0.5", "down_proj=1e-9", optimizer="lorafa") == 0
    before = core.inspect_adapter(tmp_path / "run" / "checkpoint-4")
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["settings"]["learning_rate_pattern"] == {"q_proj": 0.5, "down_proj": 1e-9}
    planned = record["plan"]["adapter"]["trainable"]
    assert record["result"]["trainable_parameters"] == planned < record["plan"]["adapter"]["factors"]
    with __import__("safetensors").safe_open(str(tmp_path / "run/checkpoint-4/optimizer.safetensors"), "pt") as file:
        assert all(".lora_B." in name for name in file.keys())  # noqa: SIM118
    norms = {site.path.rpartition(".")[2]: site.norm for site in before.sites}
    assert norms["q_proj"] > 5 * norms["up_proj"]
    assert norms["up_proj"] > 1e4 * norms["down_proj"]


def test_a_schedule_with_a_warm_up_in_steps_and_an_optimizer_reach_the_run(train: Train, tmp_path: Path) -> None:
    flags = ("--warmup-steps", "2", "--lr-scheduler-type", "wsd", "--decay-ratio", "0.5", "--optimizer", "adamw")
    assert train(*flags, max_steps=8) == 0
    rates = [row["learning_rate"] for row in _rows(tmp_path / "run") if "loss" in row]
    assert rates == pytest.approx([0.0025, *[0.005] * 4, *(0.005 * (1 - (n / 4) ** 0.5) for n in (1, 2, 3))])
    assert train("--warmup-steps", "9", max_steps=8, output_dir=tmp_path / "other") == 2
    assert not (tmp_path / "other" / "run.json").exists()
    assert train("--resume", max_steps=9) == 0


def test_a_rate_for_no_module_is_refused_before_anything_is_loaded(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("loaded"))
    assert train("--learning-rate-pattern", "q_pro=0.5") == 2
    said = capsys.readouterr().err
    assert (
        "learning_rate_pattern key 'q_pro' matches none of the adapted modules (14 in total); nearest: q_proj" in said
    )
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("by", ["gradients", "inputs"])
def test_allocated_ranks_are_in_the_adapter_and_within_the_budget(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str
) -> None:
    assert train(allocate_ranks=by) == 0
    said = capsys.readouterr().out
    assert f"Ranks allocated by {by} over " in said
    ranks = adapter_config(tmp_path / "run")["rank_pattern"]
    assert len(set(ranks.values())) > 1
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    budget = record["plan"]["adapter"]["trainable"]
    assert 0.9 * budget < record["result"]["trainable_parameters"] <= budget
    scales = {site.scale for site in core.inspect_adapter(tmp_path / "run" / "adapter").sites}
    assert scales == {8.0}


@pytest.mark.costly(cases=3)
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "eva", "corda", "lora_ga", "mica"])
def test_inits(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], init: str) -> None:
    assert train(init_lora_weights=init, r=3 if init == "lora_ga" else 4) == 0
    said = capsys.readouterr().out
    assert ("Adapter initialized by" in said) is (init in ("eva", "corda", "lora_ga"))
    moves = init in ("pissa", "olora", "corda", "lora_ga")
    assert (f"{init} changes base weights (sites: " in said) is moves
    config = adapter_config(tmp_path / "run")
    assert config["init_lora_weights"] is True if moves else config["init_lora_weights"] == init
    if moves:  # any program can load it on the unchanged base
        assert config["r"] == (6 if init == "lora_ga" else 8)
        assert "began" in json.loads((tmp_path / "run" / "adapter" / "lorakit.json").read_text(encoding="utf-8"))


def test_an_init_that_is_none(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(init_lora_weights="pisa") == 2
    assert "init_lora_weights is 'pisa'; it must be one of default, gaussian, pissa" in capsys.readouterr().err
    assert train(init_lora_weights="eva", allocate_ranks="inputs") == 2
    assert "allocate_ranks cannot be combined with init_lora_weights eva" in capsys.readouterr().err
