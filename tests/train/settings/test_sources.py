"""Flags override a file, a file overrides defaults; a resumed run keeps its settings."""

from __future__ import annotations

import itertools
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lorakit.errors import ConfigError, RunError
from lorakit.train.files.run_folder import read_record, write_record
from lorakit.train.settings.conversion.converting import convert_file
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.settings.sources import gather, read_mapping, read_settings_file, resumed, settings_text


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def gather_file(path: Path) -> TrainSettings:
    return gather({}, path)


def _check_refused_soon(read: Callable[[Path], Any], path: Path) -> None:
    """Read a file that must be rejected, with an alarm instead of an endless test, and within bounded memory."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{path}: not rejected in time")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)  # far above the limits; an unlimited reader takes minutes or forever
    try:
        with pytest.raises(ConfigError) as caught:
            read(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    assert len(str(caught.value)) < 1000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


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
        (
            "learning_rat: 1\n",
            "learning_rat is not a setting; see `lorakit train --help-all`. Did you mean learning_rate?",
        ),
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
    with pytest.raises(ConfigError, match="no such file"):
        gather({}, tmp_path / "nope.yaml")
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid YAML"):
        gather({}, path)


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghijkl")
)
MAPS = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{{', '.join(f'{at}: *{before}' for at in range(9))}}}\n"
    for before, name in itertools.pairwise("abcdefghijkl")
)
HOSTILE = {
    "aliases": LAUGHS,
    "aliases of mappings": MAPS,
    "an alias of itself": "a: &a [*a]\n",
    "depth in one line": "a: " + "[" * 5000 + "]" * 5000,
    "depth in blocks": "".join("  " * level + "a:\n" for level in range(500)),
    "unclosed depth": "[" * 100_000,
    "many nodes": "a: [" + "1," * 100_000 + "]",
    "a number in base 60": "model: m\ndata: d\noutput_dir: o\nmax_steps: " + ":".join(["1"] * 400_000),
    "a tagged number in base 60": "model: m\ndata: d\noutput_dir: o\nmax_steps: !!int " + ":".join(["1"] * 400_000),
    "a tagged fraction in base 60": "model: m\ndata: d\noutput_dir: o\nmax_steps: !!float "
    + ":".join(["1"] * 400_000)
    + ".5",
    "many keys": "base_model: x\n" + "".join(f"key_{at}: 1\n" for at in range(4_000)),
    "size": "a: 1\n" + "#" * (2 << 20),
    "a surrogate": 'model: "\\ud800"\n',
}


@pytest.mark.costly(cases=2)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("read", [gather_file, convert_file])
def test_hostile_yaml_is_an_error_soon(read: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    _check_refused_soon(read, _file(tmp_path, text))


@pytest.mark.parametrize("read", [gather_file, convert_file])
@pytest.mark.parametrize("text", ["[" * 900 + "]" * 900, '"\\ud800"', '"' + "a" * (2 << 20) + '"'])
def test_hostile_json_is_an_error_soon(read: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(f'{{"model": {text}}}')
    _check_refused_soon(read, path)


@pytest.mark.parametrize("read", [gather_file, convert_file])
def test_only_regular_files_are_read(read: Callable[[Path], Any], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "link.yaml").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "pipe.yaml", tmp_path / "link.yaml", Path("/dev/zero"), Path("/proc/self/maps")):
        _check_refused_soon(read, path)


def test_what_tools_write_is_within_the_limits(tmp_path: Path) -> None:
    ids = list(range(32_000))
    text = f"base: &base {{r: 8}}\nother: *base\nids: {ids}\nname: {'x' * 5000}\nat: 12:30:45\ndeep: {'[' * 50}{']' * 50}\n"
    found = read_mapping(_file(tmp_path, text))
    assert (found["ids"], found["other"], found["name"], found["at"]) == (ids, {"r": 8}, "x" * 5000, 45045)


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
    assert resumed(merged.explicit, read_record(run_folder) or {}) == merged


def test_settings_from_a_program_are_completed(run_folder: Path) -> None:
    given = TrainSettings(model="m", data=["a.txt"], output_dir=str(run_folder), resume=True, max_steps=20)
    settings = resumed(given.explicit, read_record(run_folder) or {})
    assert (given.r, settings.r, settings.max_steps, settings.overwrite) == (16, 4, 20, False)


def test_a_resumed_run_keeps_the_base_that_its_adapter_named(run_folder: Path) -> None:
    record = read_record(run_folder) or {}
    record["settings"] |= {"from_adapter": "old"}
    given = TrainSettings(from_adapter="old", data=["a.txt"], output_dir=str(run_folder), resume=True)
    assert given.model is None and "model" not in given.explicit
    assert resumed(given.explicit, record).model == "m"


def test_settings_written_as_yaml_are_read_as_the_same(tmp_path: Path) -> None:
    texts = [
        "1e3",
        "1E+3",
        "yes",
        "null",
        "~",
        "0x1F",
        "1:30",
        "2026-01-01",
        " lead",
        "- a",
        "#c",
        "é\u2028x",
        "1.5",
        "",
    ]
    values = {"new_tokens": texts, "learning_rate": 1e-5, "learning_rate_pattern": {"no": 0.1, "1e2": 3.0}, "r": 8}
    path = tmp_path / "run.yaml"
    path.write_text(settings_text(values), encoding="utf-8")
    assert read_mapping(path) == values
