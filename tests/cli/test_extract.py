"""lorakit.cli.extract: an adapter from the change of full fine-tuning; weights are read from files one by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, hub
from lorakit.cli import main

from ..laws.zoo import MIXTRAL, randomise

Save = Callable[..., Path]
IDS = torch.tensor([[5, 17, 200, 3, 9, 44]])


@pytest.fixture
def tuned(tiny_model_directory: Path, save_adapter: Save, tmp_path: Path) -> Path:
    """A model directory whose dense weights changed by rank 4, and whose last norm changed too."""
    model = hub.load_model(tiny_model_directory, "float32")
    core.load_adapter(model, save_adapter("one"))
    core.merge_and_unload(model)
    with torch.no_grad():
        model.model.norm.weight.add_(0.25)
    model.config.dtype = torch.float32
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


@pytest.mark.parametrize("files", [True, False])
def test_what_changed_is_found_again(
    tiny_model_directory: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from lorakit.cli import extract

    if not files:
        monkeypatch.setattr(extract, "_has_files", lambda source: False)
    out = tmp_path / "adapter"
    words = ["--base", tiny_model_directory, "--tuned", tuned, "--output-dir", out, "--rank", 4]
    assert main(["extract", *map(str, words)]) == 0
    text = capsys.readouterr().out
    assert f"{out}: 14 sites, ranks 4 to 4, scale 1" in text
    assert "captured   9" in text
    assert "not in the adapter: 1 other tensors\n  - model.norm.weight: changed by 1.41" in text
    base, after = hub.load_model(tiny_model_directory, "float32"), hub.load_model(tuned, "float32")
    loaded = core.load_adapter(base, out)
    assert loaded.base == "same" and loaded.config.base_model_name_or_path == str(tiny_model_directory)
    base.model.norm.weight.data = after.model.norm.weight.data
    with torch.no_grad():
        torch.testing.assert_close(base(IDS).logits, after(IDS).logits, rtol=1e-3, atol=1e-3)


def test_json_energy_and_modules_taken_whole(
    tiny_model_directory: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--base", tiny_model_directory, "--tuned", tuned, "--output-dir", tmp_path / "a", "--energy", 0.7]
    words += ["--target-modules", "q_proj", "down_proj", "--modules-to-save", "model.norm", "--json"]
    assert main(["extract", *map(str, words)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["sites"]) == 4 and found["copied"] == ["model.norm"]
    assert all(site["energy_lost"] <= 0.3 for site in found["sites"])
    assert {change["why"] for change in found["outside"]} == {"changed"}
    core.load_adapter(hub.load_model(tiny_model_directory, "float32"), tmp_path / "a")


def test_what_is_refused(
    tiny_model_directory: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start: list[Any] = ["extract", "--base", tiny_model_directory, "--output-dir", tmp_path / "a"]
    for words, code, said in (
        (["--tuned", tuned], 2, "either a rank or a fraction of the energy"),
        (["--tuned", tuned, "--rank", 2, "--target-modules", "q_prj"], 1, "q_prj"),
        (["--tuned", tmp_path / "no", "--rank", 2], 1, "no"),
    ):
        assert main([*map(str, start), *map(str, words)]) == code
        assert said in capsys.readouterr().err
        assert not (tmp_path / "a").exists()


def test_another_family_of_models(
    tiny_model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    sizes = transformers.AutoConfig.from_pretrained(tiny_model_directory).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = transformers.Qwen2Config(**{n: sizes[n] for n in (*names, "num_key_value_heads")})
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "qwen")
    words = [
        "--base",
        tiny_model_directory,
        "--tuned",
        tmp_path / "qwen",
        "--output-dir",
        tmp_path / "out",
        "--rank",
        4,
    ]
    assert main(["extract", *map(str, words)]) == 0
    said = capsys.readouterr().err
    assert "warning: " in said and all(name in said for name in ("qwen2", "llama", "--base"))


def test_experts_that_lie_one_by_one_in_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers saves fused experts one by one, so the models are loaded; changes are found per expert."""
    model = MIXTRAL.model()
    model.save_pretrained(tmp_path / "base")
    core.attach(model, MIXTRAL.config(), "a")
    randomise(model, "a", 3)
    core.merge_and_unload(model, "a")
    model.save_pretrained(tmp_path / "tuned")
    words = ["extract", "--base", tmp_path / "base", "--tuned", tmp_path / "tuned", "--output-dir", tmp_path / "x"]
    words += ["--rank", 4, "--target-modules", "q_proj", "--target-parameters", *MIXTRAL.parameters]
    assert main([*map(str, words)]) == 0
    assert "6 sites, ranks 4 to 4, scale 1\ncaptured   100.00%" in capsys.readouterr().out
    base = hub.load_model(tmp_path / "base", "float32")
    core.load_adapter(base, tmp_path / "x")
    with torch.no_grad():
        torch.testing.assert_close(base(IDS % 50).logits, model(IDS % 50).logits, rtol=1e-3, atol=1e-3)
