"""`lorakit verify`: text, JSON, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from lorakit import core
from lorakit.choices import VerifyName
from lorakit.durable import sealed, write_json
from lorakit.train.files.model_card import model_card


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


def test_results_are_kept_in_the_card_by_runtime_and_weights(
    call: Callable[..., int], save_adapter: Callable[..., Path], tiny_model_directory: Path
) -> None:
    def verify(folder: Path, *runtimes: str) -> str:
        words = ["--model", tiny_model_directory, "--prompts", 1, "--max-new-tokens", 2]
        assert call("verify", folder, *words, "--against", *runtimes) == 0
        core.read_adapter(folder)  # its seal is right
        return card.read_text(encoding="utf-8")

    folder = save_adapter("notes")
    card = folder / "README.md"
    card.write_text("# Mine\n\n## Use\n\nby hand\n", encoding="utf-8")
    text = verify(folder, "reloaded", "merged")
    assert text.startswith("# Mine\n") and text.endswith("\n\n## Use\n\nby hand\n")
    assert text.count("the adapter's answers") == 2 and f"torch {torch.__version__}" in text
    assert verify(folder, "reloaded").count("the adapter's answers") == 2
    assert "the adapter's answers" in model_card(folder, 1)

    save_adapter("other", seed=9)  # the directory gets other weights, with the results of the former
    for name in ("adapter_model.safetensors", "lorakit.json"):
        facts = json.loads((folder / "lorakit.json").read_text()) if name == "lorakit.json" else {}
        (folder / name).write_bytes((folder.with_name("other") / name).read_bytes())
    facts = {**json.loads((folder / "lorakit.json").read_text()), "verified": facts["verified"]}
    write_json(folder / "lorakit.json", sealed(facts))
    assert "the adapter's answers" not in model_card(folder, 1)
    assert verify(folder, "reloaded").count("the adapter's answers") == 1


def test_results_that_cannot_be_kept_are_still_printed(
    call: Callable[..., int],
    save_adapter: Callable[..., Path],
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model", tiny_model_directory, "--prompts", 1, "--max-new-tokens", 2, "--against", "reloaded"]
    folder = save_adapter("notes")
    (folder / "manifest.json").write_text("{}")  # of a checkpoint, which lists its files
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert call("verify", folder, *words) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shown = capsys.readouterr()
    assert " ok" in shown.out and "not kept" in shown.err


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
