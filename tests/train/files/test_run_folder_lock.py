"""A directory that is locked by an active run: the error names the owner and gives advice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit import cli, durable_folders
from lorakit.errors import RunError
from lorakit.train.files import run_folder
from lorakit.train.files.run_folder import check_output_dir

pytestmark = pytest.mark.skipif(os.name != "posix", reason="flock")


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """The directory of a run that is active in this process."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text("{}", encoding="utf-8")
    held = run_folder.lock(folder)
    yield folder
    run_folder.unlock(held)


def _check_message(message: str, folder: Path) -> None:
    assert message.startswith(f"{folder}: a run is active")
    assert "--output-dir" in message
    assert "--resume" not in message
    assert "--overwrite" not in message
    if sys.platform == "linux":
        assert f"process {os.getpid()} " in message


@pytest.mark.parametrize("more", [{}, {"resume": True}, {"overwrite": True}])
def test_a_live_run_is_not_to_be_resumed_or_overwritten(live: Path, more: dict[str, Any]) -> None:
    with pytest.raises(RunError) as caught:
        check_output_dir(live, **more)
    _check_message(str(caught.value), live)


def test_flags_that_are_missing_are_not_the_point(live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--output-dir", str(live)]) == 1
    _check_message(capsys.readouterr().err.removeprefix("error: "), live)


def test_an_owner_that_is_not_known(live: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(durable_folders, "_LOCKS", tmp_path / "none")
    with pytest.raises(RunError, match="another process is training in this directory"):
        run_folder.lock(live)


def test_a_look_at_a_folder_does_not_keep_it(tmp_path: Path) -> None:
    run_folder.check_unlocked(tmp_path / "not there")
    run_folder.check_unlocked(tmp_path)
    run_folder.unlock(run_folder.lock(tmp_path))
