"""lorakit.cli.pull: what is written, and repositories that cannot be used, which leave nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.stored_hub import StoredHub

from lorakit.cli import main
from lorakit.cli.pull import run
from lorakit.errors import AdapterFileError, ModelError, UsageError

Save = Callable[..., Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StoredHub:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return StoredHub(monkeypatch, tmp_path / "cache")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def repository(save_adapter: Save, tiny_tokenizer: Any, hub: StoredHub) -> Path:
    """The files of owner/notes: an adapter with a tokenizer, two chat templates and a card, and others."""
    folder = save_adapter("notes")
    tiny_tokenizer.save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "README.md").write_text("# Notes")
    hub.add("owner/notes", folder)
    return folder


def test_an_adapter_is_written_to_a_new_directory(
    repository: Path, hub: StoredHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = contents(repository)
    (repository / "train.py").write_text("import os")
    (repository / "optimizer.pt").write_bytes(b"")
    assert main(["pull", "owner/notes"]) == 0
    assert contents(tmp_path / "here" / "notes") == expected
    said = capsys.readouterr().out
    assert "notes" in said and "rank 4" in said
    assert main(["pull", "owner/notes"]) == 2  # nothing is overwritten
    assert contents(tmp_path / "here" / "notes") == expected


@pytest.mark.parametrize("words", [["owner/notes", "--revision", "v1"], ["owner/notes@v1"]])
def test_as_json_from_a_revision(
    words: list[str], repository: Path, hub: StoredHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", *words, "--output-dir", "deep/one", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["repository"], said["path"]) == ("owner/notes", "deep/one")
    assert set(said["files"]) == set(contents(tmp_path / "here" / "deep" / "one"))
    assert hub.last == {"revision": "v1"}


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_repository_without_an_adapter(missing: str, repository: Path, tmp_path: Path) -> None:
    (repository / missing).unlink()
    with pytest.raises(AdapterFileError) as caught:
        run("owner/notes")
    assert (caught.value.where, caught.value.what) == ("owner/notes", missing)
    assert main(["pull", "owner/notes"]) == 1
    assert not (tmp_path / "here" / "notes").exists()


def test_damaged_weights(repository: Path, tmp_path: Path) -> None:
    path = repository / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert main(["pull", "owner/notes"]) == 1
    assert not (tmp_path / "here" / "notes").exists()


def test_unknown_names_and_no_network(hub: StoredHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError) as caught:
        run("owner/nothing")
    assert (caught.value.what, caught.value.field) == ("owner/nothing", None)
    for name in ("notes", "a/b/c", "../notes", "owner/no tes"):
        with pytest.raises(UsageError) as rejected:
            run(name)
        assert (rejected.value.what, rejected.value.field) == (name, "repository")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError) as caught:
        run("owner/nothing")
    assert caught.value.field == "HF_HUB_OFFLINE"
    assert [*(tmp_path / "here").iterdir()] == []
    assert len(hub.calls) == 2
