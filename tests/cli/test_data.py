"""`lorakit data`: its output, page and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit.cli import main


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "qa.csv"
    lines = [f"what is {n} plus {n}?,{2 * n} of course" for n in range(6)]
    path.write_text("\n".join(["question,answer", *lines]) + "\n")
    return path


def test_the_report(rows: Path, tiny_model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    words = ["data", str(rows), "--model", str(tiny_model_directory), "--eval-fraction", "0", "--html", str(page)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"{rows}: question-answer rows." in said
    assert "6 conversations: 6 sequences" in said
    assert " with loss (in brackets: contributes to the loss)" in said and "[0 of course" in said
    assert page.read_text().count('<div class="row">') == 6


def test_json(rows: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", str(rows), "--model", str(tiny_model_directory), "--eval-data", str(rows), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["conversations"] == 6 and len(found["leaks"]) == 6


def test_an_end_that_is_never_trained_fails(
    rows: Path, tiny_model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    words = ["data", str(rows), "--model", str(tiny_model_directory), "--chat-template", str(template)]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert "6 sequences" in captured.out or "5 sequences" in captured.out
    assert "No end marker contributes to the loss" in captured.err


def test_a_chat_template_by_name(rows: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", str(rows), "--model", str(tiny_model_directory), "--chat-template"]
    assert main([*words, "plain"]) == 0
    assert "Assistant:[ 0 of course" in capsys.readouterr().out
    assert main([*words, "llama3"]) == 2
    assert "--new-tokens '<|start_header_id|>'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--columns", "question"], "columns is ['question']; each entry must be FIELD=COLUMN"),
        (["--format", "alpca"], "Did you mean alpaca?"),
        (["--on-bad-row", "drop"], "on_bad_row is 'drop'; it must be one of stop, skip"),
        (["--max-length", "1"], "max_length is 1; it must be at least 2"),
        (["--chat-template", "none.jinja"], "none.jinja cannot be read"),
        (["--chat-template", "/dev/zero"], "/dev/zero cannot be read"),
    ],
)
def test_wrong_choices(
    rows: Path, tiny_model_directory: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", str(rows), "--model", str(tiny_model_directory), *words]) != 0
    assert message in capsys.readouterr().err
