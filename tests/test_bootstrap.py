"""scripts/bootstrap.py: what it says when set-up cannot go on, and when it has nothing to do."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from .loading import load

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bootstrap.py"


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The script as a module whose checkout is an empty folder."""
    module = load("scripts/bootstrap.py")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    for name, path in {"ROOT": tmp_path, "VENV": tmp_path / ".venv"}.items():
        monkeypatch.setattr(module, name, path)
    monkeypatch.setattr(module, "STAMP", module.VENV / "setup.json")
    monkeypatch.setattr(module, "LOG", module.VENV / "setup.log")
    return module


def make_environment(bootstrap: types.ModuleType) -> None:
    (bootstrap.VENV / "bin").mkdir(parents=True)
    (bootstrap.VENV / "bin" / "python").symlink_to(sys.executable)
    (bootstrap.VENV / "pyvenv.cfg").write_text("version = 3.11.7\n")


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (["ERROR: Could not install: [Errno 28] No space left on device"], "the disk is full"),
        (["WARNING: Retrying after NewConnectionError", "ERROR: No matching distribution"], "index cannot be reached"),
        (["ERROR: No matching distribution found for torch"], "no release fits this Python"),
        (["ERROR: [SSL: CERTIFICATE_VERIFY_FAILED]"], "set PIP_CERT"),
        (["ERROR: something new"], "could not be installed. pip: ERROR: something new"),
        ([], "pip: no output"),
    ],
)
def test_a_failed_pip_is_one_sentence_with_a_hint(bootstrap: types.ModuleType, tail: list[str], said: str) -> None:
    sentence = bootstrap.explain("torch", tail)
    assert sentence.startswith("torch")
    assert said in sentence
    assert "\n" not in sentence


def test_a_full_disk_is_said_before_anything_is_made(
    bootstrap: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10**9))
    assert bootstrap.main() == 1
    assert "setup: error: 1.0 GB free, 4 GB needed" in capsys.readouterr().err


def test_a_python_without_venv_is_said(
    bootstrap: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "works", lambda path, code="pass": code == "pass")
    assert bootstrap.main() == 1
    assert "sudo apt install python3-venv" in capsys.readouterr().err


def test_an_old_python_is_said(
    bootstrap: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "works", lambda path, code="pass": False)
    assert bootstrap.main() == 1
    assert "Python 3.10 or newer is required" in capsys.readouterr().err


def test_a_failed_install_leaves_no_stamp_and_shows_no_traceback(
    bootstrap: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_environment(bootstrap)
    monkeypatch.setattr(bootstrap, "works", lambda path, code="pass": True)
    monkeypatch.setattr(bootstrap, "needs_cpu_index", lambda _: False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(bootstrap.ROOT))
    assert bootstrap.main() == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("setup: error: lorakit and its test dependencies")
    assert "Traceback" not in captured.err
    assert not bootstrap.STAMP.exists()


def test_a_finished_setup_is_not_done_again_until_its_inputs_change(
    bootstrap: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_environment(bootstrap)
    installed: list[str] = []
    monkeypatch.setattr(bootstrap, "works", lambda path, code="pass": True)
    monkeypatch.setattr(bootstrap, "needs_cpu_index", lambda _: False)
    monkeypatch.setattr(bootstrap, "pip", lambda python, what, *rest: installed.append(what))
    assert bootstrap.main() == 0
    first = len(installed)
    assert bootstrap.main() == 0
    assert len(installed) == first == 2
    (bootstrap.ROOT / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert bootstrap.main() == 0
    assert len(installed) == 2 * first


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ("", True),
        ("global.cert='x'\n", True),
        (":env:.find-links='/wheels'\n", False),
        ("global.index-url='x'\n", False),
    ],
)
def test_the_cpu_index_is_for_linux_without_gpu_and_without_own_sources(
    bootstrap: types.ModuleType, monkeypatch: pytest.MonkeyPatch, settings: str, wanted: bool
) -> None:
    monkeypatch.setattr(bootstrap.sys, "platform", "linux")
    monkeypatch.setattr(bootstrap, "works", lambda path, code="pass": False)
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: False)
    listed = types.SimpleNamespace(stdout=settings.encode())
    monkeypatch.setattr(bootstrap.subprocess, "run", lambda *_, **__: listed)
    assert bootstrap.needs_cpu_index("python") is wanted
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: True)
    assert bootstrap.needs_cpu_index("python") is False


def test_make_alone_prints_help() -> None:
    done = subprocess.run(["make"], cwd=SCRIPT.parent.parent, capture_output=True, text=True, check=True)
    assert "make test " in done.stdout
