"""lorakit.serve.app, asked by another client: `lorakit verify` compares log-probabilities, ids and greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorakit import cli

from .conftest import Start


@pytest.mark.costly(cases=1)
def test_verify_agrees_with_the_server(
    start: Start, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (
        tiny_model_directory / "generation_config.json"
    )  # an answer ends at the end of a turn, without a template too
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [0, 2]}))
    running = start()
    for name in ("one", "two"):
        command = ["verify", str(running.folders[name]), "--model", str(tiny_model_directory), "--against", running.url]
        assert cli.main([*command, "--prompts", "3", "--max-new-tokens", "4"]) == 0
        assert f"{running.id(name)} of lorakit" in " ".join(capsys.readouterr().out.split())
    wrong = ["verify", str(running.folders["one"]), "--model", str(tiny_model_directory), "--against", running.url]
    assert cli.main([*wrong, "--served-model", running.id("two"), "--prompts", "2", "--max-new-tokens", "2"]) == 1
