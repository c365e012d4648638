"""Adapters and base models on the Hub as arguments of commands; the Hub is replaced by local directories or is a cache on disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from lorakit import cli
from lorakit.config import read_config

from ..stored_hub import StoredHub

Save = Callable[..., Path]


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, save_adapter: Save, tiny_tokenizer: Any, tiny_model_directory: Path
) -> StoredHub:
    """Two adapters on a Hub; the first one brings a tokenizer with another chat template."""
    stored = StoredHub(monkeypatch, tmp_path / "cache")
    tiny_tokenizer.chat_template = "own template"
    tiny_tokenizer.save_pretrained(save_adapter("one", 1))
    stored.add("owner/one", tmp_path / "one")
    stored.add("owner/two", save_adapter("two", 2))
    (tmp_path / "a.txt").write_text("The quick fox jumps over the lazy dog. " * 8, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return stored


COMMANDS = {
    "eval": "eval --model tiny-llama --data a.txt --max-length 32 --dtype float32 --device cpu --adapter {}",
    "generate": "generate --model tiny-llama --prompt The --no-chat --max-new-tokens 2 --device cpu --adapter {}",
    "merge": "merge --model tiny-llama --output-dir new --adapter {}",
    "combine": "combine --output-dir new --adapter {}",
    "compress": "compress --rank 2 --output-dir new --adapter {}",
    "inspect": "inspect {}",
    "compare": "compare owner/two {}",
    "push": "push {} me/copy --dry-run",
    "train": "train --data a.txt --output-dir new --max-length 32 --max-steps 1 --device cpu --dtype float32 "
    "--model tiny-llama --from-adapter {}",
}


def test_an_export_is_named_after_the_repository(hub: StoredHub, tmp_path: Path) -> None:
    assert cli.main(["export", "vllm", "owner/one@v2", "--output-dir", "out", "--served-base", "base"]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.startswith("one@")


@pytest.mark.filterwarnings("ignore:.*was edited")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_an_adapter_on_the_hub(
    command: str, hub: StoredHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert cli.main(COMMANDS[command].format("owner/one@v2").split()) == 0
    printed = capsys.readouterr().out
    name, given = hub.calls[-1]
    assert (name, given["revision"]) == ("owner/one", "v2")
    assert {"adapter_config.json", "tokenizer*", "chat_template*"} <= set(given["allow_patterns"])
    if command in ("eval", "merge", "combine", "compress"):
        assert "owner/one@v2" in printed
    if command in ("combine", "compress", "merge"):
        assert (tmp_path / "new" / "chat_template.jinja").read_text() == "own template"


@pytest.mark.costly(cases=0)
def test_a_classifier_on_the_hub_predicts(
    hub: StoredHub, tmp_path: Path, save_adapter: Save, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit.hub import load_model

    torch.manual_seed(0)
    model = load_model(tiny_model_directory, task="classification")
    hub.add("owner/labels", save_adapter("labels", model=model, task_type="SEQ_CLS", target_modules=["q_proj"]))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    command = "predict rows.jsonl --model tiny-llama --device cpu --adapter"
    found = []
    for name in ("owner/labels", "labels"):
        assert cli.main([*command.split(), name, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_that_is_not_on_the_hub_is_an_error_before_anything_is_loaded(
    command: str, hub: StoredHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(COMMANDS[command].format("owner/none").split()) == 1
    assert "'owner/none' is not a directory and was not found on the Hub" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(COMMANDS[command].format("owner/none").split()) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command",
    ["export vllm {} --served-base b --output-dir new", "check {} --for vllm", "verify {} --against reloaded"],
)
@pytest.mark.parametrize("lost", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_repository_without_an_adapter(
    command: str, lost: str, hub: StoredHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one" / lost).unlink()
    before = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "cache"))
    assert cli.main(command.format("owner/one").split()) == 1
    shown = capsys.readouterr()
    assert lost in shown.err and shown.err.count("error:") == 1 and not shown.out
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "cache")) == before


def test_adapters_on_the_hub_are_not_given_twice(hub: StoredHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["combine", "--output-dir", "new", "--adapter", "owner/one", "owner/one"]) == 2
    assert "--adapter lists owner/one twice" in capsys.readouterr().err
    assert hub.calls == []


@pytest.fixture
def cached_base(tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with the revisions main and v1 of a base; returns the directory of v1, which has other weights."""
    from lorakit.hub import load_model

    other = load_model(tiny_model_directory)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    repository = tmp_path / "hub" / "models--owner--base"
    for commit, reference in (("a" * 40, "main"), ("b" * 40, "v1")):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
        shutil.copytree(tiny_model_directory, repository / "snapshots" / commit)
    other.save_pretrained(repository / "snapshots" / ("b" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("The quick fox jumps over the lazy dog. " * 8, encoding="utf-8")
    return repository / "snapshots" / ("b" * 40)


def losses(capsys: pytest.CaptureFixture[str], *model: str) -> float:
    words = [
        "eval",
        "--data",
        "a.txt",
        "--max-length",
        "32",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--json",
        "--model",
    ]
    assert cli.main([*words, *model]) == 0
    return float(json.loads(capsys.readouterr().out)["results"][0]["loss"])


def test_the_base_is_that_of_the_revision(cached_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = losses(capsys, str(cached_base))
    assert losses(capsys, "owner/base") != wanted
    assert losses(capsys, "owner/base", "--revision", "v1") == wanted
    assert losses(capsys, "owner/base@v1") == wanted


def test_a_run_records_the_revision_and_a_further_run_uses_it(
    cached_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "train",
        "--data",
        "a.txt",
        "--max-length",
        "32",
        "--max-steps",
        "1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    assert cli.main([*words, "--output-dir", "first", "--model", "owner/base", "--revision", "v1"]) == 0
    config, _ = read_config("first")
    assert (config.base_model_name_or_path, config.revision) == ("owner/base", "v1")
    assert json.loads(Path("first/run.json").read_text())["settings"]["revision"] == "v1"
    assert cli.main([*words, "--output-dir", "second", "--from-adapter", "first"]) == 0
    settings = json.loads(Path("second/run.json").read_text())["settings"]
    assert (settings["model"], settings["revision"]) == ("owner/base", "v1")
    assert cli.main([*words, "--output-dir", "third", "--from-adapter", "first", "--model", str(cached_base)]) == 0
    assert read_config("third")[0].revision is None
    assert (
        cli.main(["merge", "--model", "owner/base", "--revision", "v1", "--adapter", "first", "--output-dir", "m"]) == 0
    )
    record = json.loads(Path("m/lorakit_merged.json").read_text())
    assert record["base"] == {"name": "owner/base", "name_or_path": "owner/base", "revision": "v1"}
    capsys.readouterr()


@pytest.mark.parametrize(
    "command",
    [
        "eval --data a.txt --model {}",
        "generate --prompt x --model {}",
        "merge --adapter first --output-dir new --model {}",
        "data a.txt --model {}",
        "plan {}",
        "train --data a.txt --output-dir new --model {}",
    ],
)
def test_a_revision_of_a_path_or_an_unknown_revision_is_an_error(
    command: str, cached_base: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter("first")
    assert cli.main([*command.format("tiny-llama").split(), "--revision", "v1"]) == 2
    assert "is a path, which has no revisions" in capsys.readouterr().err
    assert cli.main([*command.format("owner/base@v1").split(), "--revision", "v2"]) == 2
    assert "already names a revision" in capsys.readouterr().err
    assert cli.main([*command.format("owner/base").split(), "--revision", "v9"]) == 1
    assert "owner/base@v9: not a directory or a packaged model" in capsys.readouterr().err
    assert cli.main([*command.format("smollm2").split(), "--revision", "v1"]) == 1
    assert "no revisions" in capsys.readouterr().err
