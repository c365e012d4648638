"""`lorakit verify`: text, JSON, exit codes."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from tests.verify.peft_server import Models, serving

import lorakit
from lorakit import cli, core, durable
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
    assert call("verify", *words, "--against", "reloaded, merged", "--verbose") == 0
    text = capsys.readouterr().out
    assert "3 prompts (packaged)" in text and text.count(" ok") == 2 and "3 of 3" in text
    assert call("verify", *words, "--against", "reloaded", "merged", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["good"] is True and [one["runtime"] for one in found["comparisons"]] == ["reloaded", "merged"]
    assert all(one["difference"] < one["bound"] == 1e-4 for one in found["comparisons"])


GOOD = "the adapter's answers"
WORDS = ("--prompts", 1, "--max-new-tokens", 2)


def test_results_are_recorded_by_runtime_and_weights(
    call: Callable[..., int],
    save_adapter: Callable[..., Path],
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def verify(*runtimes: str) -> str:
        assert call("verify", folder, "--model", tiny_model_directory, *WORDS, "--against", *runtimes) == 0
        core.read_adapter(folder)  # its seal is right
        return card.read_text(encoding="utf-8", errors="surrogateescape")

    folder = save_adapter("notes")
    card = folder / "README.md"
    given = b"# Mine\n\xff\n\n## Use\n\nby hand\n"
    card.write_bytes(given)
    text = verify("reloaded", "merged")
    assert text.startswith("# Mine\n\udcff\n") and text.endswith("\n\n## Use\n\nby hand\n")
    assert text.count(GOOD) == 2 and f"torch {torch.__version__}" in text and f"lorakit {lorakit.__version__}" in text
    assert verify("merged") == text and model_card(folder, 1).count(GOOD) == 2
    verified = json.loads((folder / "lorakit.json").read_text())["verified"]
    assert [one["runtime"] for one in verified["comparisons"]] == ["reloaded", "merged"]
    assert all(set(one["lorakit"]) == {"lorakit", "torch", "transformers"} for one in verified["comparisons"])

    for name in ("adapter_model.safetensors", "lorakit.json"):  # other weights, with the results of the former ones
        (folder / name).write_bytes((save_adapter("other", seed=9) / name).read_bytes())
    facts = {**json.loads((folder / "lorakit.json").read_text()), "verified": verified}
    write_json(folder / "lorakit.json", sealed(facts))
    assert GOOD not in model_card(folder, 1)
    capsys.readouterr()
    assert cli.main(["push", str(folder), "owner/notes", "--dry-run"]) == 0
    assert GOOD not in capsys.readouterr().out and GOOD in card.read_text(errors="replace")
    assert verify("reloaded").count(GOOD) == 1
    card.unlink()
    text = verify("merged")
    assert text.count(GOOD) == 2 and "# LoRA adapter for" in text and str(tiny_model_directory) not in text


def test_results_of_several_dtypes_are_recorded(save_adapter: Callable[..., Path], tiny_model_directory: Path) -> None:
    folder = save_adapter("notes")
    for dtype in ("float32", "bfloat16", "auto"):
        words = ["--model", tiny_model_directory, *WORDS, "--dtype", dtype, "--against", "merged"]
        assert cli.main(["verify", str(folder), *map(str, words)]) == 0
    verified = json.loads((folder / "lorakit.json").read_text())["verified"]
    assert [one["dtype"] for one in verified["comparisons"]] == ["bfloat16", "float32"]
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text.count(GOOD) == 1 and "| bfloat16 |" in text


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it
def test_a_worse_result_replaces_a_better_one(
    call: Callable[..., int], save_adapter: Callable[..., Path], tiny_model_directory: Path
) -> None:
    def answers(url: str) -> int:
        words = ["--model", tiny_model_directory, *WORDS, "--against", url, "--served-model", "notes"]
        return call("verify", folder, *words)

    folder, other = save_adapter("notes"), save_adapter("other", seed=2)
    with serving(Models(tiny_model_directory, {"notes": folder, "secret": other})) as url:
        assert answers(url) == 0
    text = (folder / "README.md").read_text()
    assert text.count(GOOD) == 1 and "peft 1.2.3" in text
    with serving(Models(tiny_model_directory, {"notes": other, "secret": folder})) as url:
        assert answers(url) == 1
    text = (folder / "README.md").read_text() + (folder / "lorakit.json").read_text()
    assert GOOD not in text and "log-probabilities differ by" in text
    assert "secret" not in text and "http://" not in text


@pytest.mark.filterwarnings("ignore:.*was edited")
@pytest.mark.parametrize("why", ["checkpoint", "no lorakit.json", "edited", "disk"])
def test_results_that_cannot_be_recorded_are_still_printed(
    call: Callable[..., int],
    save_adapter: Callable[..., Path],
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    folder, write = save_adapter("notes"), durable.write_new

    def full(path: Path, data: bytes, replaced: Path) -> None:
        if path.parent == folder:
            raise PermissionError(errno.EROFS, "Read-only file system")
        write(path, data, replaced)

    if why == "checkpoint":
        (folder / "manifest.json").write_text("{}")  # lists its files
    elif why == "no lorakit.json":
        (folder / "lorakit.json").unlink()
    elif why == "edited":
        config = folder / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 9}))
    else:
        monkeypatch.setattr(durable, "write_new", full)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert call("verify", folder, "--model", tiny_model_directory, *WORDS, "--against", "reloaded") == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shown = capsys.readouterr()
    assert " ok" in shown.out and "not recorded" in shown.err


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
        (["--against", "URL"], "against"),
        (["--against", "http://localhost:port"], "against"),
        (["--against", "http://localhost:1", "--timeout", "0"], "timeout"),
        (["--against", "http://localhost:1", "--timeout", "inf"], "timeout"),
        (["--against", "http://localhost:1", "--timeout", "1e300"], "timeout"),
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
