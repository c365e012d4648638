"""lorakit.cli.compress: a smaller adapter, and the reported loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import core, hub
from lorakit.cli import main

Save = Callable[..., Path]


def test_to_a_rank(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one")
    assert main(["compress", "--adapter", str(one), "--output-dir", str(tmp_path / "small"), "--rank", "2"]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'small'}: {one} at 14 sites, total rank 56 before, 28 after" in out
    assert "of the energy ‖ΔW‖² of the whole adapter" in out
    assert "sites that lose most" in out
    loaded = core.load_adapter(hub.load_model(tiny_model_directory), tmp_path / "small")
    assert loaded.base == "same" and loaded.config.r == 2


def test_to_a_share_of_the_energy_as_json(
    save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer: Any
) -> None:
    one = save_adapter("one")
    tiny_tokenizer.save_pretrained(one)
    words = ["compress", "--adapter", str(one), "--output-dir", str(tmp_path / "small"), "--energy", "0.8", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["energy_lost"] <= 0.2
    assert all(site["energy_lost"] <= 0.2 for site in found["sites"])
    assert found["operation"]["energy"] == 0.8
    assert (tmp_path / "small" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "either a rank or a fraction of the energy"),
        (["--rank", "2", "--energy", "0.5"], "either a rank or"),
        (["--energy", "2"], "energy is 2.0; it must be a fraction"),
    ],
)
def test_what_is_refused(
    save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    one = save_adapter("one")
    assert main(["compress", "--adapter", str(one), "--output-dir", str(tmp_path / "small"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
