"""lorakit.cli.push: which files are uploaded, the model card, and refusals before any network access."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from lorakit.cli import main
from lorakit.core import read_for_training
from lorakit.durable import sealed, sha256_file
from lorakit.hub import base_named

Save = Callable[..., Path]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "lorakit.json", "README.md"}


class Hub:
    """A Hub without a network, which stores what is uploaded."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repository: str, *, private: bool | None, exist_ok: bool) -> Any:
        self.calls.append(("repo", (repository, private, exist_ok)))
        return SimpleNamespace(repo_id=repository)

    def create_branch(self, repository: str, *, branch: str, exist_ok: bool) -> None:
        self.calls.append(("branch", (repository, branch, exist_ok)))

    def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None, **_: Any) -> str:
        self.calls.append(("upload", (repo_id, revision)))
        self.files = {str(p.relative_to(folder_path)): p.read_bytes() for p in folder_path.rglob("*") if p.is_file()}
        return f"https://hub/{repo_id}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    stored = Hub()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: stored)
    return stored


@pytest.fixture
def run_directory(save_adapter: Save, tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A run directory with an adapter among files that are not part of it."""
    folder = tmp_path / "run"
    shutil.copytree(save_adapter("one"), folder / "adapter")
    shutil.copytree(folder / "adapter", folder / "checkpoint-3")
    tiny_tokenizer.save_pretrained(folder / "adapter")
    for name in ("optimizer.safetensors", "train.jsonl", ".env", "manifest.json", "state.json"):
        (folder / "adapter" / name).write_text("private")
    settings = {"data": ["/home/me/notes.md"], "learning_rate": 0.001, "new_tokens": []}
    (folder / "run.json").write_text(json.dumps({"format": 1, "settings": settings, "versions": {"lorakit": "9"}}))
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "owner/base"}))
    return folder


@pytest.mark.filterwarnings("ignore:.*was edited")
def test_only_the_files_of_the_adapter_are_uploaded(
    run_directory: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run_directory.rglob("*"))
    words = ["push", str(run_directory), "me/notes", "--private", "--revision", "v1", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["url"] == "https://hub/me/notes"
    assert hub.calls == [
        ("repo", ("me/notes", True, True)),
        ("branch", ("me/notes", "v1", True)),
        ("upload", ("me/notes", "v1")),
    ]
    assert set(hub.files) == set(found["files"])
    assert set(hub.files) - {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} == ADAPTER
    assert (
        hub.files["adapter_model.safetensors"] == (run_directory / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    assert sorted(run_directory.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:.*was edited")
def test_a_dry_run_uses_no_network_and_prints_the_card(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *_, **__: pytest.fail("the network was used"))
    assert main(["push", str(run_directory), "me/notes", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for part in (*ADAPTER, "base_model: owner/base", "| data | notes.md |", "| versions | lorakit 9 |", "Not uploaded"):
        assert part in out
    assert "/home/me" not in out and "optimizer.safetensors" not in out


@pytest.mark.filterwarnings("ignore:.*was edited")
def test_a_card_that_exists_is_kept_and_its_metadata_completed(
    run_directory: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    card = run_directory / "adapter" / "README.md"
    card.write_text("---\nlicense: mit\nbase_model: /home/me/base\ntags:\n- mine\n---\n\n# My adapter\n")
    assert main(["push", str(run_directory / "adapter"), "me/notes"]) == 0
    assert capsys.readouterr().out.startswith("Uploaded ")
    sent = hub.files["README.md"].decode()
    assert sent.endswith("---\n\n# My adapter\n") and "license: mit" in sent and "- mine" in sent
    assert "base_model: owner/base" in sent and "library_name: peft" in sent and "/home/me" not in sent
    assert "/home/me" in card.read_text()


def test_a_local_base_is_not_named_in_the_card(
    save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(save_adapter("one")), "me/notes", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "base_model:" not in said.out and "# LoRA adapter for tiny" in said.out
    assert "does not name a base on the Hub" in said.err


def test_the_path_of_a_base_is_not_uploaded(save_adapter: Save, hub: Hub, tmp_path: Path) -> None:
    adapter = save_adapter("one")
    config = json.loads((adapter / "adapter_config.json").read_text())
    packaged = "/home/me/.cache/lorakit/models/smollm2-135m-instruct-dequantized-q4_1"
    config = {**config, "base_model_name_or_path": packaged}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    sidecar = json.loads((adapter / "lorakit.json").read_text())
    sidecar["config"]["sha256"] = sha256_file(adapter / "adapter_config.json")
    (adapter / "lorakit.json").write_text(json.dumps(sealed({**sidecar, "base_name": "smollm2"})))
    assert main(["push", str(adapter), "me/notes"]) == 0
    assert [name for name, content in hub.files.items() if b"/home/me" in content] == []
    assert json.loads(hub.files["adapter_config.json"]) == {**config, "base_model_name_or_path": None}
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    found = read_for_training(tmp_path)  # warns if the config does not match `lorakit.json`
    assert base_named(found.config.base_model_name_or_path, found.facts["base_name"]) == "smollm2"


@pytest.mark.parametrize("name", ["notes", "a/b/c", "me/", "me/no tes", "../notes"])
def test_a_name_that_is_not_a_repository(name: str, save_adapter: Save, hub: Hub) -> None:
    assert main(["push", str(save_adapter("one")), name]) == 2
    assert hub.calls == []


def test_without_an_adapter_or_a_token_nothing_is_sent(
    save_adapter: Save,
    tmp_path: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one = save_adapter("one")
    assert main(["push", str(tiny_model_directory), "me/notes"]) == 1
    assert "not an adapter" in capsys.readouterr().err
    (one / "adapter_model.safetensors").rename(tmp_path / "weights")
    assert main(["push", str(one), "me/notes"]) == 1
    assert "adapter_model.safetensors" in capsys.readouterr().err
    (tmp_path / "weights").rename(one / "adapter_model.safetensors")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["push", str(one), "me/notes"]) == 1
    assert "HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["push", str(one), "me/notes", "--json"]) == 1
    assert "HF_HUB_OFFLINE" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert hub.calls == []


def test_an_upload_that_fails(
    save_adapter: Save, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr(hub, "upload_folder", fail)
    assert main(["push", str(save_adapter("one")), "me/notes"]) == 1
    assert "no route" in capsys.readouterr().err
