"""lorakit.cli.compare: compare two adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli import main

Save = Callable[..., Path]


def test_two_adapters(save_adapter: Save, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = save_adapter("one"), save_adapter("two", 2, target_modules=["q_proj", "up_proj"])
    assert main(["compare", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert f"{one} and {two}: cosine " in out
    assert "base       same" in out
    assert f"only in    {one}: 10 sites, first model.layers.0.mlp.down_proj" in out
    assert [line.split()[0] for line in out.splitlines() if line.endswith(tuple("0123456789"))][-2:] == [
        "up_proj",
        "q_proj",
    ]
    assert main(["compare", str(one), str(one), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cosine"] == pytest.approx(1) and len(found["sites"]) == 14
    assert {group["module"] for group in found["groups"]} >= {"q_proj", "down_proj"}
    assert found["sites"][0]["output_overlap"] == pytest.approx(1)


def test_adapters_without_a_site_in_common(save_adapter: Save, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (save_adapter(name, target_modules=[name]) for name in ("q_proj", "k_proj"))
    assert main(["compare", str(one), str(two)]) == 0
    out = capsys.readouterr().out
    assert "no sites in common" in out and "cosine 0.0000" in out


def test_what_is_refused(
    save_adapter: Save, tmp_path: Path, tiny_gpt2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one")
    assert main(["compare", str(one), str(tmp_path / "typo")]) == 1
    assert "adapter directory not found" in capsys.readouterr().err
    assert main(["compare", str(one)]) == 2


def test_several_adapters_are_compared_pair_by_pair(save_adapter: Save, capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        str(save_adapter("one")),
        str(save_adapter("two", 2)),
        str(save_adapter("three", 3, target_modules=["q_proj"])),
    ]
    assert main(["compare", *names]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["first", "second", "cosine", "writes", "reads", "sites", "base"]
    assert [line.split()[:2] for line in lines[2:5]] == [names[:2], [names[0], names[2]], names[1:]]
    assert main(["compare", *names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["adapters"] == names and [pair["sites"] for pair in found["pairs"]] == [14, 2, 2]
    assert main(["compare", *names[:2], "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert found["pairs"][0]["cosine"] == alone["cosine"]
