"""The run directory: which ones a run can use, and their creation and removal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import DiskError, RunError, UsageError
from lorakit.train.files.run_folder import check_output_dir, lock_output_dir, remove_run, unlock


def test_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        check_output_dir(tmp_path)
    error = caught.value
    assert (error.where, error.field, error.override) == (str(tmp_path), "output_dir", "overwrite")
    assert error.allowed == ("resume", "overwrite")
    for word in ("a run exists", "--resume", "--overwrite", "--output-dir"):
        assert word in str(error)
    check_output_dir(tmp_path, resume=True)
    check_output_dir(tmp_path, overwrite=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "adapter", "checkpoint-3"])
def test_what_is_left_of_a_run_counts_as_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="a run exists in"):
        check_output_dir(tmp_path)


def test_a_folder_with_other_things_is_fine(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    check_output_dir(tmp_path)


def test_nothing_to_resume_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run to resume.*--resume") as caught:
        check_output_dir(tmp_path / "nope", resume=True)
    assert (caught.value.where, caught.value.field) == (str(tmp_path / "nope"), "resume")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match=r"not a directory.*--output-dir") as caught:
        check_output_dir(tmp_path / "file")
    assert (caught.value.where, caught.value.field) == (str(tmp_path / "file"), "output_dir")


def test_claiming_makes_the_folder_and_sweeps(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    lock = lock_output_dir(folder)
    assert list(folder.iterdir()) == []
    with pytest.raises(RunError, match="a run is active") as caught:
        lock_output_dir(folder)
    assert caught.value.where == str(folder) and "process" in str(caught.value.what)
    unlock(lock)
    (folder / ".lorakit-tmp-123-checkpoint-4").mkdir()
    unlock(lock_output_dir(folder))
    assert list(folder.iterdir()) == []


def test_a_disk_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(DiskError, match=r"cannot be created \(Read-only file system\)"):
        lock_output_dir(tmp_path / "run")


@pytest.mark.skipif(os.name != "posix", reason="modes of folders")
def test_removing_a_run_leaves_the_rest(tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-22", "damaged-checkpoint-2", "adapter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x", encoding="utf-8")
    for name in ("run.json", "metrics.jsonl", "loss.svg", "notes.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    remove_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
