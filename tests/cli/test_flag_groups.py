"""Flags that `data`, `eval` and `predict` share: the same errors, before torch is loaded, and the same request."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.cli import main
from lorakit.cli.flag_groups import BASE, ROWS, BaseFlags, RowFlags
from lorakit.data import Request
from lorakit.errors import ConfigError
from lorakit.plan.quantized import Quantization
from lorakit.session import SessionOptions


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    return path


def words_of(command: str, data: Path) -> list[str]:
    return [command, *(["--data"] if command == "eval" else []), str(data), "--model", "smollm2"]


@pytest.mark.parametrize("command", ["data", "eval", "predict"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--columns", "prompt=question", "completion"], ("columns", "FIELD=COLUMN")),
        (["--columns", "=question"], ("columns", "FIELD=COLUMN")),
        (["--on-bad-row", "drop"], ("on_bad_row", "stop, skip")),
    ],
)
def test_wrong_flags_about_rows(
    command: str, words: list[str], said: tuple[str, ...], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words_of(command, data), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and all(part in captured.err for part in said)


@pytest.mark.parametrize("command", ["eval", "predict"])
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dtype", "float8"], ("dtype", "bfloat16")),
        (["--device", "gpu"], ("device", "cuda")),
        (["--quantization", "nf3"], ("quantization", "nf4")),
    ],
)
def test_wrong_flags_about_the_base(
    command: str, words: list[str], said: tuple[str, ...], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words_of(command, data), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and all(part in captured.err for part in said)


def test_wrong_columns_are_reported_before_torch_is_loaded(data: Path) -> None:
    words = [*words_of("data", data), "--columns", "question"]
    code = f"import sys; from lorakit.cli import main; assert main({words}) == 2; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_error_about_columns_has_fields() -> None:
    with pytest.raises(ConfigError) as caught:
        RowFlags(columns=["prompt"]).check()
    assert (caught.value.field, caught.value.what) == ("columns", "['prompt']")


def test_the_request_has_all_flags() -> None:
    flags = RowFlags("question-answer", ["question=q", "answer=a"], "skip")
    flags.check()
    columns = {"question": "q", "answer": "a"}
    allowed = ("question-answer", "text")
    assert flags.request(allowed, "topic", needs_label=False) == Request(
        "question-answer", columns, True, "topic", allowed, False
    )
    assert ROWS.request() == Request()


def test_the_base_without_flags_and_with_all() -> None:
    assert BASE.options(None) == SessionOptions()
    flags = BaseFlags(quantization="nf4", double_quantization=False, allow_base_mismatch=True)
    assert flags.options(None) == SessionOptions(quantization=Quantization("nf4", False), allow=("base_mismatch",))
    assert BaseFlags("main").options("owner/name@main").revision is None  # the name has it
    assert BaseFlags("main").options(None).revision == "main"
