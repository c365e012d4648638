"""Flags override a file, a file overrides defaults; a resumed run keeps its settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorakit.errors import ConfigError, RunError
from lorakit.train.run_folder import write_record
from lorakit.train.settings import TrainSettings
from lorakit.train.settings_sources import complete, gather, read_settings_file


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_rate_without_a_dot_is_a_number(tmp_path: Path) -> None:
    values = read_settings_file(
        _file(tmp_path, "learning-rate: 1e-4\nweight_decay: 1E-2\nmax_steps: 10\nmodel: 1e-4x\n")
    )
    assert values == {"learning_rate": 1e-4, "weight_decay": 1e-2, "max_steps": 10, "model": "1e-4x"}


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "model: m\ndata: a.txt\noutput-dir: out\nr: 4\nlearning_rate: 1e-4\nuse_dora: true\n")
    settings = gather({"r": 8, "use_dora": False, "lora_alpha": None}, path)
    assert (settings.r, settings.learning_rate, settings.use_dora, settings.lora_alpha) == (8, 1e-4, False, 32)
    assert settings.data == ["a.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1\n", "learning_rat is not a setting; see `lorakit train --help`. Did you mean learning_rate?"),
        ("r: 4\nr: 8\n", "duplicate key 'r'"),
        ("max-steps: 4\nmax_steps: 8\n", "a setting is given twice"),
        ("- r\n", "`learning_rate: 3e-4`"),
        ("r: [4\n", "not valid YAML"),
        ("r: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_by_path(tmp_path: Path, text: str, message: str) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        gather({}, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the settings file cannot be read \\(No such file or directory\\)"):
        gather({}, tmp_path / "nope.yaml")
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid YAML"):
        gather({}, path)


def test_an_empty_file_gives_nothing(tmp_path: Path) -> None:
    assert read_settings_file(_file(tmp_path, "# nothing\n")) == {}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    settings = TrainSettings(model="m", data=["a.txt"], output_dir=str(folder), r=4, max_steps=10, overwrite=True)
    write_record(folder, {"settings": settings.as_dict()})
    return folder


def test_resume_takes_what_is_not_given_from_the_run(run_folder: Path) -> None:
    settings = gather({"output_dir": str(run_folder), "resume": True, "max_steps": 20, "save_steps": 5})
    assert (settings.model, settings.r, settings.max_steps, settings.save_steps) == ("m", 4, 20, 5)
    assert settings.resume and not settings.overwrite


def test_resume_refuses_other_settings_by_name(run_folder: Path) -> None:
    with pytest.raises(RunError) as caught:
        gather({"output_dir": str(run_folder), "resume": True, "r": 8, "seed": 3, "max_steps": 20})
    text = str(caught.value)
    assert (caught.value.field, caught.value.where) == ("r", str(run_folder))
    assert "r is 8 and was 4; seed is 3 and was 0" in text
    assert "max_steps" not in text


def test_resume_with_a_record_that_is_damaged(run_folder: Path) -> None:
    (run_folder / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match="not valid JSON") as caught:
        gather({"output_dir": str(run_folder), "resume": True})
    assert caught.value.where == str(run_folder / "run.json")


def test_resume_where_no_run_has_begun_needs_the_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model is missing") as caught:
        gather({"output_dir": str(tmp_path), "resume": True})
    assert (caught.value.field, caught.value.what) == ("model", None)
    assert gather({"output_dir": str(tmp_path), "resume": True, "model": "m", "data": ["a.txt"]}).resume


def test_settings_of_a_resumed_run_are_merged_once(run_folder: Path) -> None:
    merged = gather({"output_dir": str(run_folder), "resume": True, "max_steps": 20})
    assert complete(merged) == merged


def test_settings_from_a_program_are_completed(run_folder: Path) -> None:
    given = TrainSettings(model="m", data=["a.txt"], output_dir=str(run_folder), resume=True, max_steps=20)
    settings = complete(given)
    assert (given.r, settings.r, settings.max_steps, settings.overwrite) == (16, 4, 20, False)
    new = given.model_copy(update={"resume": False})
    assert complete(new) is new
