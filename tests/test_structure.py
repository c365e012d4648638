"""Each figure of `scripts/structure.py`, on a tree so small that the right value is obvious."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import lorakit

from .loading import ROOT, load

TEXT = '''"""Module.

Two lines of text.
"""

# a comment
LIMIT = 3  # counts
"""A limit."""


def f(
    x,
):
    "Doc."  # of one line
    text = """one

    three"""
    return text, x
'''


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    return load("scripts/structure.py")


@pytest.mark.parametrize(
    ("text", "code", "docstrings"), [(TEXT, 1 + 3 + 2 + 1, 4 + 1 + 1), ("def f(): 'Doc.'\n", 1, 0), ("", 0, 0)]
)
def test_lines(structure: ModuleType, text: str, code: int, docstrings: int) -> None:
    assert structure.line_counts(text) == (code, docstrings)


def test_the_command_needs_no_packages(tmp_path: Path) -> None:
    package = tmp_path / "src" / "lorakit"
    (package / "b").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    command = [sys.executable, "-S", str(ROOT / "scripts" / "structure.py"), "--src", str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "it has no __init__.py" in done.stderr
    (package / "__init__.py").write_text('"""Doc."""\nimport torch\n', encoding="utf-8")
    (package / "b" / "c.py").write_text("x = 1\n" * 401, encoding="utf-8")
    (tmp_path / "tests" / "test_c.py").write_text("x = 1\n\n", encoding="utf-8")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values = [line.split(" | ")[1].strip(" |") for line in done.stdout.splitlines()[2:]]
    assert values == ["2", "402", "1", "2", "b/c.py 401"]


def test_a_walk_lists_calls_into_other_files(
    structure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "walked"
    (folder / "inner").mkdir(parents=True)
    (folder / "called.py").write_text(
        "from walked.inner import deep\ndef f(): return g()\ndef g(): return max([1], key=deep.g) + deep.g(0)\n"
    )
    (folder / "inner" / "deep.py").write_text("def g(x): return [h(y) for y in [x]][0]\ndef h(x): return x\n")
    (folder / "imported.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    walk = structure.Walk(folder)
    with walk.recording():
        import walked.imported  # type: ignore[import-not-found] # noqa: F401
        from walked import called

        thread = threading.Thread(target=called.f)
        thread.start()
        thread.join()
    called.f()
    assert list(walk.calls) == ["called.py:f", "inner/deep.py:g"]
    assert walk.files == ["called.py", "inner/deep.py"]


def test_walks_of_lorakit(structure: ModuleType) -> None:
    walks = structure.walks_of_a_model(
        Path(lorakit.__file__).parent, lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    )
    assert "core/attachment/loading.py:load_adapter" in walks["load_adapter"].calls
    assert next(iter(walks["merge"].calls)) in ("__init__.py:__getattr__", "core/merging.py:merge")


@pytest.mark.slow
def test_the_walk_of_the_set_up_ends_before_the_first_step(structure: ModuleType) -> None:
    walk = structure.walk_of_set_up(Path(lorakit.__file__).parent)
    assert any(file.startswith("train/setup/") for file in walk.files)
    assert not any(call.startswith("train/loop/step.py:train_step") for call in walk.calls)
