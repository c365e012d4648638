"""scripts/check_variant_diff.py accepts a commit that adds a variant, and names every other path that one touches."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from .loading import load

TABLE = "src/lorakit/core/variants/__init__.py"
NEW = "src/lorakit/core/variants/new.py"
ENTRY = [
    "from lorakit.core.variants.new import NEW",
    "VARIANTS: tuple[Variant, ...] = (PLAIN)",
    "VARIANTS: tuple[Variant, ...] = (PLAIN, NEW)",
]
VARIANT = [
    ("A", NEW),
    ("M", TABLE),
    ("M", "src/lorakit/config/lora.py"),
    ("M", "src/lorakit/peft/paths.py"),
    ("M", "docs/math.md"),
    ("A", "tests/core/variants/test_new.py"),
    ("M", "CHANGELOG.md"),
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("scripts/check_variant_diff.py")


def test_a_variant_is_accepted(script: ModuleType) -> None:
    assert script.breaches(VARIANT, ENTRY) == []


@pytest.mark.parametrize(
    "path",
    [
        "src/lorakit/core/layers/lora_layer.py",
        "src/lorakit/core/variants/variant.py",
        "src/lorakit/peft/saving.py",
        "src/lorakit/plan/params.py",
        "src/lorakit/configs.py",
        "scripts/demo.py",
        "pyproject.toml",
    ],
)
def test_another_path_is_named(script: ModuleType, path: str) -> None:
    assert script.breaches([*VARIANT, ("M", path)], ENTRY) == [f"{path}: M"]


def test_one_file_and_one_entry_are_needed(script: ModuleType) -> None:
    second = "src/lorakit/core/variants/second.py"
    assert any("2 new files" in one for one in script.breaches([*VARIANT, ("A", second)], ENTRY))
    assert any("0 new files" in one for one in script.breaches(VARIANT[1:], ENTRY))
    assert script.breaches(VARIANT[:1], []) == [f"{TABLE}: no entry"]
    assert script.breaches(VARIANT, [*ENTRY, "def helped() -> None:"]) == [
        f"{TABLE}: more than an entry: def helped() -> None:"
    ]


def test_a_commit_is_read_from_git(script: ModuleType, tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    git("init", "-q")
    write(TABLE, f"{ENTRY[1]}\n")
    write("src/lorakit/other.py", "")
    git("add", "-A")
    git("commit", "-qm", "base")
    write(TABLE, f"{ENTRY[0]}\n{ENTRY[2]}\n")
    write(NEW, "NEW = 1\n")
    git("add", "-A")
    git("commit", "-qm", "variant")
    assert script.of_commit("HEAD", tmp_path) == []
    write("src/lorakit/other.py", "x = 1\n")
    git("commit", "-qa", "--amend", "--no-edit")
    assert script.of_commit("HEAD", tmp_path) == ["src/lorakit/other.py: M"]
