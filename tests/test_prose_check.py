"""Findings, what is not checked, and exit status of `scripts/prose_check.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .loading import ROOT, load

SCRIPT = str(ROOT / "scripts" / "prose_check.py")


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    return load("scripts/prose_check.py")


def found(checker: ModuleType, path: str, text: str) -> list[tuple[int, str, str]]:
    return [(line, rule.name, phrase) for line, rule, phrase in checker.check(path, text, checker.read_rules())]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# kept beside it", [(1, "beside", "beside")]),  # prose-check: ok
        ("x = 1\n'''Done Anew.'''", [(2, "anew", "Anew")]),  # prose-check: ok
        ("raise E('it is ' f'no size of {x}')", [(1, "is no", "is ' f'no")]),  # prose-check: ok
        ("# the file is\n# told about it", [(1, "is told", "is # told")]),  # prose-check: ok
        ('def f():\n    """What it does."""', [(2, "What docstring", "What it does")]),  # prose-check: ok
        ('def f():\n    """As above. Of a run."""', [(2, "inverted", "Of a")]),  # prose-check: ok
        (
            "x = flag(help='', other=1, help=\"Which modules.\")",
            [(1, "help fragment", 'help="Which modules.')],  # prose-check: ok
        ),
        (
            '    raise KeyError(\n        f"there is no x")',
            [(1, "There is no", 'raise KeyError( f"there is no x')],  # prose-check: ok
        ),
        ("# the optimiser is optimistic; optimist", [(1, "spelling", "optimiser")]),  # prose-check: ok
        ("# what it refuses", [(1, "refuse", "refuses")]),  # prose-check: ok
        ("# bystanders; understands; withstand", []),
        ("# What it does; of a run", []),
    ],
)
def test_findings_in_python(checker: ModuleType, text: str, expected: list[tuple[int, str, str]]) -> None:
    assert found(checker, "a.py", text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "beside = anew(lies)",  # prose-check: ok
        "x = 'beside'",  # prose-check: ok
        "x = {'anew': 1}['anew']",  # prose-check: ok
        "# `beside` and ``anew``",
        "x = f'a {beside + anew} b'",  # prose-check: ok
        "x = 'a is', 1, 'no size'",
        "x = 1  # type: ignore  beside",  # prose-check: ok
        "x = 1  # put beside (prose-check: ok)",
        "x = 'put beside'  # prose-check: ok",
    ],
)
def test_what_is_no_prose_in_python(checker: ModuleType, text: str) -> None:
    assert found(checker, "a.py", text) == []


def test_findings_in_markdown(checker: ModuleType) -> None:
    text = """# Put WORD

`WORD` [text](WORD.md) https://x.y/WORD <!-- WORD -->

```sh
WORD
```

A line that ends in a stray ` and

one more WORD, before `code`.
""".replace("WORD", "beside")
    assert found(checker, "a.md", text) == [(1, "beside", "beside"), (11, "beside", "beside")]


def test_every_rule_is_well_formed(checker: ModuleType) -> None:
    rules = checker.read_rules()
    assert len({rule.name for rule in rules}) == len(rules) > 80
    for rule in rules:
        assert rule.kind in ("problem", "hint")
        assert rule.where in ("prose", "cased", "raw", "raw-cased")
        assert all(text and text == text.lower() for text in rule.literals)


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False, cwd=folder)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("# what it refuses\n", encoding="utf-8")  # prose-check: ok
    (tmp_path / "bad.md").write_text("Beside, and\nrefused anew.\n", encoding="utf-8")  # prose-check: ok
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "old.md").write_text("anew\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("anew\n", encoding="utf-8")
    done = run(".", folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "bad.md:1: [beside] Beside -> with, next to, alongside, in addition to",  # prose-check: ok
        "bad.md:2: [refuse?] refused -> reject, raise; check",  # prose-check: ok
        "bad.md:2: [anew] anew -> again",  # prose-check: ok
        "good.py:1: [refuse?] refuses -> reject, raise; check",  # prose-check: ok
        "2 problems and 2 hints in 2 files",
        "     2  refuse (hint)",  # prose-check: ok
        "     1  beside",  # prose-check: ok
        "     1  anew",  # prose-check: ok
    ]
    short = run("-s", ".", folder=tmp_path)
    assert (short.returncode, short.stdout.splitlines()) == (1, done.stdout.splitlines()[4:])
    hints = run("good.py", folder=tmp_path)
    assert (hints.returncode, hints.stdout.splitlines()[1]) == (0, "0 problems and 1 hints in 1 files")
    missing = run("gone.md", folder=tmp_path)
    assert missing.returncode == 2
    assert "gone.md does not exist" in missing.stderr
