"""lorakit.cli.export: text, JSON and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.small_gguf import own_gguf_cache, write_gguf  # noqa: F401 - a fixture

from lorakit import core, hub
from lorakit.cli import main
from lorakit.core.operations import common_form
from lorakit.export import gguf, gguf_base

Save = Callable[..., Path]


def test_an_adapter_for_vllm(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "vllm", str(save_adapter("notes")), "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--served-base", str(tiny_model_directory)]) == 0
    out = capsys.readouterr().out
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.startswith("notes@")
    assert f"to {folder}" in out
    assert f"--lora-modules {folder.name}={folder}\n" in out
    assert core.load_adapter(hub.load_model(tiny_model_directory), folder).base == "same"


def test_as_json_with_a_name(save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "sglang", str(save_adapter("one")), "--output-dir", str(tmp_path / "out"), "--name", "legal"]
    assert main([*words, "--served-base", "owner/base", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["name"].startswith("legal@")
    assert said["path"] == str(tmp_path / "out" / said["name"])
    assert "SGLang" in said["commands"]


def test_what_is_rejected(save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dora = save_adapter("dora", use_dora=True)
    assert main(["export", "vllm", str(dora), "--output-dir", str(tmp_path / "out")]) == 1
    assert "DoRA (use_dora)" in capsys.readouterr().err
    words = ["export", "vllm", str(save_adapter("one")), "--output-dir", str(tmp_path / "out"), "--name", "a/b"]
    assert main(words) == 2
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_mlx_lm(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["export", "mlx", str(save_adapter("notes")), "--output-dir", str(out), "--untested-architecture"]
    assert main([*words, "--model", str(tiny_model_directory)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    assert f"mlx_lm.generate --model {tiny_model_directory} --adapter-path {out} " in capsys.readouterr().out
    assert main([*words, "--model", str(tiny_model_directory)]) == 2
    assert str(out) in capsys.readouterr().err


def test_an_export_is_verified_before_it_is_written(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = save_adapter("notes", use_rslora=True), tmp_path / "out"
    words = ["export", "vllm", str(adapter), "--output-dir", str(out), "--model", str(tiny_model_directory)]
    assert main([*words, "--served-base", "base", "--verify", "--prompts", "0"]) == 2 and not out.exists()
    assert main([*words, "--served-base", "base", "--verify", "--prompts", "3"]) == 0
    assert "log-probabilities differ by at most" in capsys.readouterr().err
    (folder,) = out.iterdir()
    verified = json.loads((folder / "lorakit.json").read_text())["verified"]
    assert verified["comparisons"][0]["difference"] < 1e-4 and verified["comparisons"][0]["prompts"] == 3


def test_an_export_with_other_answers_is_not_written(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = common_form.padded
    monkeypatch.setattr(
        common_form, "padded", lambda product, rank: exact(product.__class__(product.A, 2 * product.B), rank)
    )
    words = ["export", "vllm", str(save_adapter("notes")), "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--model", str(tiny_model_directory), "--served-base", "base", "--verify"]) == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def base_gguf(tmp_path: Path, tiny_model_directory: Path) -> Path:
    """`tiny_model_directory` as a GGUF file in F32."""
    model, tokenizer = hub.load_model(tiny_model_directory), hub.load_tokenizer(tiny_model_directory)
    model.resize_token_embeddings(len(tokenizer))  # llama.cpp wants as many rows as tokens
    model.save_pretrained(tiny_model_directory)
    return write_gguf(tmp_path / "base.gguf", model, tokenizer, "F32")


@pytest.mark.parametrize("outtype", ["F32", "Q8_0"])
def test_a_merged_model_is_verified_in_llama_cpp(
    base_gguf: Path, save_adapter: Save, tmp_path: Path, outtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    words = ["export", "gguf", str(save_adapter("notes")), "--merged", "--base-gguf", str(base_gguf)]
    words += ["--model", str(tmp_path / "tiny-llama"), "--outtype", outtype, "--verify", "--json"]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "merged, in llama.cpp: log-probabilities differ by at most" in said.err
    name = json.loads(said.out)["name"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", f"{name}.gguf"]
    assert set(json.loads(said.out)["commands"]) == {"llama.cpp", "Ollama", "llama-quantize"}
    assert 'TEMPLATE """{{- range .Messages }}<|im_start|>' in (tmp_path / "out" / "Modelfile").read_text()


def test_a_gguf_adapter_is_verified_on_another_file(base_gguf: Path, save_adapter: Save, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    words = ["export", "gguf", str(save_adapter("notes")), "--model", str(tmp_path / "tiny-llama"), "--verify"]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 2
    assert main([*words, "--output-dir", str(tmp_path / "out"), "--base-gguf", str(base_gguf)]) == 0
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".gguf"]


def test_a_wrong_merge_is_not_written(
    base_gguf: Path, save_adapter: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(gguf.GgufLayout, "rows", lambda layout, name, B: B)
    adapter = save_adapter("notes")
    (adapter / "lorakit.json").unlink()  # has samples of the base, at other positions
    words = ["export", "gguf", str(adapter), "--merged", "--base-gguf", str(base_gguf), "--outtype", "F32", "--verify"]
    monkeypatch.setattr(gguf_base.GgufBase, "check", lambda base, request: True)
    assert main([*words, "--model", str(tmp_path / "tiny-llama"), "--output-dir", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_with_other_values_needs_a_flag(
    base_gguf: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tmp_path / "tiny-llama", save_adapter("notes")
    model = hub.load_model(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other = write_gguf(tmp_path / "other.gguf", model, hub.load_tokenizer(base), "F32")
    words = ["export", "gguf", str(adapter), "--merged", "--base-gguf", str(other), "--model", str(base)]
    words += ["--output-dir", str(tmp_path / "out")]
    assert main(words) == 1
    assert "or pass --allow-base-mismatch." in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*words, "--allow-base-mismatch"]) == 0
    assert "values of 1 weights differ" in capsys.readouterr().err


def test_only_gguf_is_merged(save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "vllm", str(save_adapter("notes")), "--merged", "--output-dir", str(tmp_path / "out")]
    assert main(words) == 2
    assert "--merged" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*words[:3], "--outtype", "Q8_0", *words[-2:]]) == 2
    assert "add --merged" in capsys.readouterr().err and not (tmp_path / "out").exists()
