"""lorakit adapters: each command as text and JSON, exit codes, and errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import SUBCOMMANDS, main
from lorakit.registry import Registry, content_hash

from ..stored_hub import StoredHub

pytestmark = pytest.mark.skipif(os.name == "nt", reason="flock")
Save = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def adapters(folder: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run `lorakit adapters …` on the registry, and return the exit code, stdout and stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["adapters", *map(str, words), "--registry", str(folder)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def as_json(adapters: Call, *words: object, code: int = 0) -> Any:
    found, out, _ = adapters(*words, "--json")
    assert found == code
    return json.loads(out)


def test_a_version_is_published_and_rolled_back(save_adapter: Save, adapters: Call, folder: Path) -> None:
    one, two = save_adapter("one", 1), save_adapter("two", 2)
    ids = [f"legal@{content_hash(source)[:12]}" for source in (one, two)]
    assert adapters("add", "legal", one) == (0, f"{ids[0]}: current\n", "")
    assert adapters("add", "legal", one)[:2] == (0, f"{ids[0]}: unchanged\n")
    assert adapters("add", "legal", two)[:2] == (0, f"{ids[1]}: current, was {ids[0]}\n")
    assert adapters("rollback", "legal")[:2] == (0, f"{ids[0]}: current, was {ids[1]}\n")
    assert Registry(folder).resolve("legal").id == ids[0]
    code, _, err = adapters("rollback", "legal")
    assert code == 1 and "no version before" in err
    said = as_json(adapters, "rollback", ids[1])
    assert said == {
        "name": "legal",
        "id": ids[1],
        "hash": content_hash(two),
        "folder": str(folder / "objects" / content_hash(two)),
        "before": ids[0],
        "changed": True,
    }


def test_list_and_show(save_adapter: Save, adapters: Call, folder: Path) -> None:
    one, two = save_adapter("one", 1), save_adapter("two", 2, r=8)
    assert adapters("add", "legal", one)[0] == adapters("add", "legal", two)[0] == adapters("add", "sql", one)[0] == 0
    assert adapters("tag", f"legal@{content_hash(one)[:12]}", "stable")[:2] == (
        0,
        f"legal@stable: legal@{content_hash(one)[:12]}\n",
    )
    _, out, _ = adapters("list")
    assert [line.split()[:2] for line in out.splitlines()[2:]] == [
        ["legal", content_hash(two)[:12]],
        ["sql", content_hash(one)[:12]],
    ]
    (legal, sql) = as_json(adapters, "list")
    size = sum(path.stat().st_size for path in two.iterdir())
    assert (legal["base_model"], legal["r"], legal["size_bytes"], legal["versions"]) == ("tiny", 8, size, 2)
    assert legal["tags"] == {"stable": content_hash(one)} and sql["r"] == 4
    shown = as_json(adapters, "show", "legal")
    assert shown["previous"] == [content_hash(one)] and shown["hash"] == content_hash(two)
    assert [event["action"] for event in shown["history"]] == ["add", "add"]
    _, out, _ = adapters("show", "legal")
    assert out.startswith(f"legal@{content_hash(two)[:12]}: 2 versions\n  base: tiny\n  rank: 8\n")
    lines = out.splitlines()[-2:]
    assert [line.split()[3:] for line in lines] == [
        [content_hash(one)[:12], "stable"],
        [content_hash(two)[:12], "current"],
    ]


def test_tags(save_adapter: Save, adapters: Call, folder: Path) -> None:
    adapters("add", "legal", save_adapter("one"))
    assert as_json(adapters, "tag", "legal", "stable")["tag"] == "stable"
    assert adapters("tag", "legal", "stable", "--delete")[0] == 0
    assert Registry(folder).entry("legal").tags == {}
    assert adapters("tag", "legal", "stable", "--delete")[0] == 1
    assert adapters("tag", "legal", "0123456789ab")[0] == 2


def test_remove_and_gc(save_adapter: Save, adapters: Call, folder: Path) -> None:
    one, two = save_adapter("one", 1), save_adapter("two", 2)
    for source in (one, two):
        adapters("add", "legal", source)
    assert as_json(adapters, "gc") == {"removed": [], "in_use": [], "freed_bytes": 0}
    assert as_json(adapters, "gc", "--keep", 0)["removed"] == [content_hash(one)]
    version = Registry(folder).resolve("legal")
    assert adapters("remove", "legal")[0] == 0
    with Registry(folder).lease(version):
        assert adapters("gc")[1] == "removed 0 versions (0 B); 1 version in use\n"
    assert adapters("gc")[1].startswith("removed 1 version (")
    assert adapters("list")[1].endswith("no names.\n")
    assert adapters("gc", "--keep", -1)[0] == 2


def test_damage_is_exit_code_1(save_adapter: Save, adapters: Call, folder: Path) -> None:
    one = save_adapter("one")
    adapters("add", "legal", one)
    assert adapters("verify")[:2] == (0, f"{folder}: no damage found\n")
    damaged = folder / "objects" / content_hash(one)
    (damaged / "adapter_config.json").write_text("{")
    assert adapters("verify")[:1] == (1,)
    (problem,) = as_json(adapters, "verify", code=1)["problems"]
    assert problem["where"] == str(damaged)
    assert "error" in as_json(adapters, "show", "legal") and adapters("list")[0] == 0
    name = folder / "names" / "legal.json"
    name.write_text("{}")
    code, _, err = adapters("list")
    assert code == 0 and str(name) in err
    assert "error" in as_json(adapters, "list")[0]
    assert {one["where"] for one in as_json(adapters, "verify", code=1)["problems"]} == {str(damaged), str(name)}


def test_an_adapter_on_the_hub(
    save_adapter: Save, adapters: Call, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = save_adapter("one")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    StoredHub(monkeypatch, tmp_path / "cache").add("owner/one", one)
    assert adapters("add", "legal", "owner/one")[0] == 0
    assert Registry(folder).resolve("legal").hash == content_hash(one)


def test_errors(save_adapter: Save, adapters: Call, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = adapters("list")
    assert code == 1 and "not a registry" in err
    assert adapters("add", "a/b", save_adapter("one"))[0] == 2
    assert adapters("add", "legal", folder / "none")[0] == 1
    assert not folder.exists()
    assert main(["adapters", "list"]) == 2
    assert main(["adapters", "lst", "--registry", str(folder)]) == 2
    assert '"lst"' in capsys.readouterr().err


def test_the_registry_from_the_environment(
    save_adapter: Save, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAKIT_REGISTRY", str(folder))
    assert main(["adapters", "add", "legal", str(save_adapter("one"))]) == 0
    assert Registry(folder).resolve("legal").folder.is_dir()


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters"]) == 0
    summary = capsys.readouterr().out
    for command, text in SUBCOMMANDS["adapters"].items():
        assert f" {command} " in summary
        assert main(["adapters", command, "--help"]) == 0
        assert f"Usage: lorakit adapters {command}" in capsys.readouterr().out, text
