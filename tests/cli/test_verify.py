"""`lorakit verify`: text, JSON, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from lorakit.choices import VerifyName


def test_text_and_json(
    call: Callable[..., int],
    save_adapter: Callable[..., Path],
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [save_adapter("notes"), "--model", tiny_model_directory, "--prompts", 3, "--max-new-tokens", 3]
    assert call("verify", *words, "--against", "reloaded,merged", "--verbose") == 0
    text = capsys.readouterr().out
    assert "3 prompts (packaged)" in text and text.count(" ok") == 2 and "3 of 3" in text
    assert call("verify", *words, "--against", "reloaded", "merged", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["good"] is True and [one["runtime"] for one in found["comparisons"]] == ["reloaded", "merged"]
    assert all(one["difference"] < one["bound"] == 1e-4 for one in found["comparisons"])


def test_an_adapter_without_effect_fails(
    call: Callable[..., int],
    save_adapter: Callable[..., Path],
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [save_adapter("notes", spread=1e-9), "--model", tiny_model_directory, "--prompts", 1]
    assert call("verify", *words, "--against", "reloaded") == 1
    assert "differs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--against", "vllm"], "against"),
        (["--against", ","], "against"),
        (["--against", "reloaded", "--prompts", "0"], "prompts"),
        (["--against", "reloaded", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--against", "http://localhost:1", "--timeout", "0"], "timeout"),
        (["--against", "http://localhost:1", "--api-key-env", "NO_SUCH_VARIABLE"], "api-key-env"),
        (["--against", "reloaded", "--data", "nothing.txt"], "nothing.txt"),
    ],
)
def test_usage_errors(
    call: Callable[..., int],
    save_adapter: Callable[..., Path],
    words: list[str],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("verify", save_adapter("notes"), *words) in (1, 2)
    assert name in capsys.readouterr().err


def test_names_are_those_of_the_registry() -> None:
    from lorakit.verify.verifying import RUNTIMES

    assert set(RUNTIMES) == {*get_args(VerifyName), "http", "https"}
