import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from lorakit.errors import ModelError
from lorakit.hub import base_named, require, resolve
from lorakit.hub.models import load_base
from lorakit.hub_cache import offline


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never contact the real Hub: a test that needs an answer sets one."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def refused(model: object, **needs: bool) -> str:
    with pytest.raises(ModelError) as error:
        source = resolve(model)  # type: ignore[arg-type]
        require(source, **needs)
    return str(error.value)


def model_folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    for name in files:
        (path / name).write_bytes(b"{}")
    return path


def test_an_existing_path_comes_first(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "smollm2", "model.safetensors", "tokenizer.json")
    source = resolve("smollm2")
    require(source, weights=True, tokenizer=True)
    assert (source.kind, source.given, source.recorded_name) == ("directory", "smollm2", "smollm2")
    assert resolve(folder).recorded_name == str(folder)
    config = resolve(folder / "config.json")
    assert config.kind == "config"
    assert "a config file has shapes but no weights" in refused(folder / "config.json")


def test_what_is_no_model_directory(tmp_path: Path) -> None:
    assert "'./nothing': model directory not found." in refused("./nothing")
    assert refused("no/such/model").endswith("The directory no/such does not exist either.")
    assert "''" in refused("")
    model_folder(tmp_path / "models" / "llama-small")
    assert refused("models/llama-smal").endswith("Similar: models/llama-small.")
    words = "no config.json, so this is not a model directory. Subdirectories with models: llama-small."
    assert refused("models").endswith(words)
    (tmp_path / "file.txt").write_text("x")
    assert "file.txt: this is a file; pass a directory with a config.json" in refused("file.txt")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gpt2"}))
    assert refused("adapter").endswith(
        "It is an adapter: pass it as --adapter, and its base as --model. Its base is 'gpt2'."
    )


def test_what_a_model_directory_lacks(tmp_path: Path) -> None:
    bare = model_folder(tmp_path / "bare")
    assert refused(bare) == (
        f"{bare}: the model directory has no weights; add model.safetensors (or an index and its shards)."
    )
    pickled = model_folder(tmp_path / "pickled", "pytorch_model.bin")
    assert "pickle weights are not loaded (pytorch_model.bin)" in refused(pickled)
    gguf = model_folder(tmp_path / "gguf", "x.Q4_1.gguf")
    assert f"pass a GGUF file in it: {gguf / 'x.Q4_1.gguf'}" in refused(gguf)
    both = model_folder(tmp_path / "both", "model.safetensors", "adapter_config.json")
    assert f"{both}: the directory contains both a model and an adapter (adapter_config.json)" in refused(both)
    dumb = model_folder(tmp_path / "dumb", "model.safetensors")
    assert refused(dumb, tokenizer=True).startswith(
        f"{dumb}: the model directory has no tokenizer file (such as tokenizer."
    )


def test_a_hub_id_without_a_network() -> None:
    said = refused("gpt3")
    assert said.startswith("gpt3: not a directory or a packaged model (smollm2), and the Hub cannot be reached ")
    assert "(ConnectionError: no route). Pass a directory, or try again with a network" in said
    assert "Similar: gpt2" in said


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_respected_and_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "0")
    assert offline() is None
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: pytest.fail("the network was used"))
    assert f"Network access is off ({name} is set): unset it, or pass a directory." in refused("some/model")


def test_the_hub_s_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    source = resolve("openai-community/gpt2")
    assert (source.kind, source.path_or_id, source.recorded_name) == ("hub", *["openai-community/gpt2"] * 2)


def test_what_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*files: str) -> None:
        found = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
        monkeypatch.setattr(huggingface_hub, "model_info", lambda *_, **__: found)

    answer("config.json", "model.safetensors")
    assert resolve("some/model").kind == "hub"
    answer("config.json", "pytorch_model.bin")
    assert "the Hub has no safetensors weights" in refused("some/model")
    answer("README.md")
    assert "not a transformers model on the Hub (no config.json)" in refused("some/model")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("RepositoryNotFoundError", "and the Hub has no model"),
        ("GatedRepoError", "restricted; request access on the model's page"),
    ],
)
def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch, kind: str, said: str) -> None:
    missing = getattr(huggingface_hub.errors, kind)
    error = missing.__new__(missing, "404")

    def not_found(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "model_info", not_found)
    assert said in refused("some/modle")


def test_a_relative_base_is_found_from_another_directory(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    adapter = work / "runs" / "one" / "adapter"
    for folder in (adapter, elsewhere):
        folder.mkdir(parents=True)
    tiny_model_directory.rename(work / "base")
    monkeypatch.chdir(elsewhere)
    assert base_named("./base", folder=adapter) == str(work / "base")
    assert base_named("./base") == "./base"
    assert base_named("owner/name", folder=adapter) == "owner/name"
    work.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "runs" / "one" / "adapter"
    model = load_base("base", task="CAUSAL_LM", written_class=("", ""), tokenizer_folder=moved, options={})
    assert model.name_or_path == str(tmp_path / "moved" / "base")
    (elsewhere / "base").mkdir()
    assert base_named("base", folder=moved) == "base"
