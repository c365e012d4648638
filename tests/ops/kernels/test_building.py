"""Building the kernels: once, by the compiler that is there, and with a reason where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit.ops.kernels import building

needs_a_compiler = pytest.mark.skipif(
    all(shutil.which(name) is None for name in building.COMPILERS), reason="no C compiler"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(building.SWITCH, raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(building.tempfile, "tempdir", str(tmp_path))
    building.built.cache_clear()
    yield
    building.built.cache_clear()


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


@needs_a_compiler
def test_it_is_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = building.built("BF16")
    assert first.functions is not None
    folder = tmp_path / "cache" / "kernels"
    (made,) = folder.iterdir()
    assert f"kept in {folder}" in first.why
    building.built.cache_clear()
    monkeypatch.setattr(building, "_build", lambda *_: pytest.fail("built again"))
    assert building.built("BF16").functions is not None
    assert list(folder.iterdir()) == [made]


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(building.SWITCH, "off")
    assert building.built("") == (None, "LORAKIT_KERNELS=off")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert building.built("") == (None, "no C compiler (gcc, cc, clang) is on the path")
    monkeypatch.setenv("CC", "one-that-is-not-there")
    assert building.built("").functions is None


def test_a_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", script(tmp_path, "exit 1\n"))
    found = building.built("")
    assert found.functions is None
    assert f"{tmp_path}/compiler could not compile rows.c" in found.why
    assert not list((tmp_path / "cache" / "kernels").iterdir())


@needs_a_compiler
def test_a_compiler_without_openmp_builds_for_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = next(found for name in building.COMPILERS if (found := shutil.which(name)))
    refusing = f'for a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\nexec {real} "$@"\n'
    monkeypatch.setenv("CC", script(tmp_path, refusing))
    assert building.built("").functions is not None


@needs_a_compiler
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "a file"))
    found = building.built("")
    assert found.functions is not None
    assert f"kept in {tmp_path / 'lorakit-'}" in found.why


@needs_a_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no users")
def test_a_library_that_others_may_write_is_not_loaded(tmp_path: Path) -> None:
    assert building.built("").functions is not None
    (made,) = (tmp_path / "cache" / "kernels").iterdir()
    made.chmod(0o777)
    building.built.cache_clear()
    found = building.built("")
    assert found.functions is not None  # another, in the temporary folder
    assert str(tmp_path / "lorakit-") in found.why


@needs_a_compiler
def test_processes_that_build_at_once(tmp_path: Path) -> None:
    program = "from lorakit.ops.kernels.building import built\nassert built('').functions is not None, built('').why\n"
    environment = {**os.environ, "LORAKIT_CACHE": str(tmp_path / "shared")}
    started = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(3)]
    assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    assert len(list((tmp_path / "shared" / "kernels").iterdir())) == 1


@pytest.mark.slow
def test_all_operations_without_kernels() -> None:
    """PyTorch's own operations are the other half of each operation: its tests hold for them too."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/ops",
        "-m",
        "not slow and not gpu",
    ]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, building.SWITCH: "off"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
