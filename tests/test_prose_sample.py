"""Passages that `scripts/prose_sample.py` chooses from."""

from __future__ import annotations

from pathlib import Path

import pytest

from .loading import load

SOURCE = '''"""Module docstring, which is long enough to be a passage."""

# A comment that goes on
# in a second line and belongs together.
x = 1


def f():
    """Short."""
    raise ValueError(f"the value {x} is not allowed here, use another")
'''
MARKDOWN = (
    "# Title\n\nA paragraph of documentation, long enough to be read.\n\n| a | table |\n\n```\ncode\n\ncode\n```\n"
)


def test_passages_and_their_lines(tmp_path: Path) -> None:
    sampler = load("scripts/prose_sample.py")
    (tmp_path / "a.py").write_text(SOURCE)
    (tmp_path / "b.md").write_text(MARKDOWN)
    found = [text.removeprefix(f"{tmp_path}/").split("\n", 1) for text in sampler.passages([tmp_path])]
    assert sorted(found) == [
        ["a.py:1", "Module docstring, which is long enough to be a passage."],
        ["a.py:10", "f'the value {x} is not allowed here, use another'"],
        ["a.py:3", "A comment that goes on in a second line and belongs together."],
        ["b.md:3", "A paragraph of documentation, long enough to be read."],
    ]


def test_a_seed_chooses_the_same_passages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampler = load("scripts/prose_sample.py")
    (tmp_path / "b.md").write_text("\n\n".join(f"Paragraph {i} of the documentation, long enough." for i in range(30)))
    outputs = []
    for seed in (1, 1, 2):
        sampler.main(["-n", "5", "--seed", str(seed), str(tmp_path)])
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[0].count("Paragraph") == 5
