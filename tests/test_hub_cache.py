"""lorakit.hub_cache: every function that takes an adapter's name passes all arguments on to the download."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorakit
from lorakit.config import PeftConfig
from lorakit.errors import ConfigError, ModelError
from lorakit.hub_cache import HubOptions, adapter_from_hub, is_on_hub, split_revision, with_revision
from lorakit.peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, load_peft_weights
from lorakit.peft.utils.hotswap import hotswap_adapter

from .stored_hub import StoredHub

NAME = "owner/notes"
ARGUMENTS: dict[str, Any] = {
    "revision": "v2",
    "token": "secret",
    "cache_dir": "/elsewhere",
    "local_files_only": True,
    "force_download": True,
    "subfolder": "inner",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> StoredHub:
    """A Hub with an adapter at the root and in a folder of a repository, with a tokenizer that has two templates."""
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_llama.name_or_path = str(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False, revision="b1")
    model = get_peft_model(tiny_llama, config)
    model.save_pretrained(tmp_path / "repository")
    model.save_pretrained(tmp_path / "repository" / "inner")
    model.unload()
    tiny_tokenizer.add_tokens([f"<new{number}>" for number in range(300)])
    tiny_tokenizer.chat_template = {"default": "A", "tools": "B"}
    tiny_tokenizer.save_pretrained(tmp_path / "repository")
    (tmp_path / "repository" / "optimizer.pt").write_text("not for download")
    stored = StoredHub(monkeypatch, tmp_path / "cache")
    stored.add(NAME, tmp_path / "repository")
    return stored


def auto(base: nn.Module, **options: Any) -> Any:
    return AutoPeftModelForCausalLM.from_pretrained(NAME, **options)


def hotswap(base: nn.Module, **options: Any) -> None:
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    hotswap_adapter(model, NAME, "default", **options)


def second(base: nn.Module, **options: Any) -> None:
    get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["v_proj"])).load_adapter(NAME, "other", **options)


CALLS: dict[str, Callable[..., Any]] = {
    "PeftModel.from_pretrained": lambda base, **options: PeftModel.from_pretrained(base, NAME, **options),
    "load_adapter": second,
    "PeftConfig.from_pretrained": lambda base, **options: PeftConfig.from_pretrained(NAME, **options),
    "LoraConfig.from_pretrained": lambda base, **options: LoraConfig.from_pretrained(NAME, **options),
    "AutoPeftModel": auto,
    "load_peft_weights": lambda base, **options: load_peft_weights(NAME, **options),
    "hotswap_adapter": hotswap,
    "lorakit.load_adapter": lambda base, **options: lorakit.load_adapter(base, NAME, hub=HubOptions(**options)),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("call", CALLS)
def test_an_argument_arrives_at_the_download(call: str, argument: str, hub: StoredHub, tiny_llama: Any) -> None:
    CALLS[call](tiny_llama, **{argument: ARGUMENTS[argument]})
    assert {name for name, _ in hub.calls} == {NAME}
    for _, given in hub.calls:
        inside = [pattern for pattern in given["allow_patterns"] if pattern.startswith("inner/")]
        assert bool(inside) is (argument == "subfolder")
        assert (inside or given["allow_patterns"])[0].endswith("adapter_config.json")
    assert hub.last == ({} if argument == "subfolder" else {argument: ARGUMENTS[argument]})


@pytest.mark.parametrize("call", sorted(set(CALLS) - {"lorakit.load_adapter"}))
def test_the_former_name_of_the_token(call: str, hub: StoredHub, tiny_llama: Any) -> None:
    CALLS[call](copy.deepcopy(tiny_llama), use_auth_token="old")
    assert hub.last == {"token": "old"}
    CALLS[call](tiny_llama, use_auth_token="old", token="new")
    assert hub.last == {"token": "new"}


@pytest.mark.parametrize("subfolder", [None, "inner"])
def test_an_automatic_class_brings_the_tokenizer_and_passes_the_arguments_to_the_base(
    subfolder: str | None, hub: StoredHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    seen: dict[str, Any] = {}
    load = transformers.AutoModelForCausalLM.from_pretrained

    def record(name: str, **options: Any) -> Any:
        seen.update(options, name=name)
        return load(name)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", record)
    options = {**ARGUMENTS, "subfolder": subfolder}
    model = auto(nn.Identity(), **options, dtype=torch.float32)
    wanted = {name: value for name, value in ARGUMENTS.items() if name != "subfolder"}
    assert seen == {**wanted, "revision": "b1", "dtype": torch.float32, "name": str(tmp_path / "base")}
    assert model.get_base_model().get_input_embeddings().weight.shape[0] > 512  # resized for the adapter's tokenizer
    ((_, given),) = hub.calls
    assert {"chat_template*", "additional_chat_templates/*", "tokenizer*"} <= set(given["allow_patterns"])


def test_only_the_files_of_the_adapter_are_downloaded(hub: StoredHub) -> None:
    def names(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    own = {"adapter_config.json", "adapter_model.safetensors", "lorakit.json"}
    assert names(adapter_from_hub(NAME)) == own
    whole = names(adapter_from_hub(NAME, has_tokenizer=True))
    assert own | {"tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"} <= whole
    assert "optimizer.pt" not in whole
    assert names(adapter_from_hub(NAME, files=["adapter_config.json"])) == {"adapter_config.json"}
    inner = adapter_from_hub(NAME, HubOptions(subfolder="inner"), has_tokenizer=True)
    assert inner.name == "inner" and own <= names(inner) and (inner.parent / "tokenizer.json").is_file()


def test_a_name_with_a_revision(hub: StoredHub, tiny_llama: Any) -> None:
    lorakit.load_adapter(tiny_llama, f"{NAME}@refs/pr/3")
    assert (hub.calls[-1][0], hub.last) == (NAME, {"revision": "refs/pr/3"})
    assert adapter_from_hub(f"{NAME}@v1", HubOptions(revision="v1")).is_dir()
    with pytest.raises(ConfigError) as caught:
        adapter_from_hub(f"{NAME}@v1", HubOptions(revision="v2"))
    assert (caught.value.field, caught.value.what) == ("revision", "v2")
    assert split_revision("owner/name") == ("owner/name", None)
    assert with_revision("owner/name", None) == "owner/name" and with_revision("owner/name", "x") == "owner/name@x"
    for model in ("owner/name@y", "."):
        with pytest.raises(ConfigError) as caught:
            with_revision(model, "x")
        assert (caught.value.field, caught.value.where) == ("revision", model)


def test_what_is_on_the_hub_and_what_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_on_hub("owner/name") and is_on_hub("owner/name@v1")
    for path in ("runs/adapter", "./a/b", "/a/b", "~/a", "a", "a/b/c", "owner/adapter_config.json"):
        assert not is_on_hub(path)


def test_directories_take_a_subfolder_and_no_network(
    hub: StoredHub, tmp_path: Path, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path / "repository" / "inner", ignore_errors=True)
    shutil.copytree(tmp_path / "repository", tmp_path / "local" / "inner")
    lorakit.load_adapter(tiny_llama, tmp_path / "local", hub=HubOptions(subfolder="inner"))
    assert PeftConfig.from_pretrained(tmp_path / "local", subfolder="inner").r == 8
    assert hub.calls == []


@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_found(call: str, hub: StoredHub, tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.remove(NAME)
    with pytest.raises(ValueError) as caught:
        CALLS[call](tiny_llama)
    assert NAME in str(caught.value) and "Hub" in str(caught.value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
        CALLS[call](tiny_llama)
    assert hub.last == {"local_files_only": True}
    if call == "lorakit.load_adapter":
        with pytest.raises(ModelError) as missing:
            CALLS[call](tiny_llama)
        assert (missing.value.what, missing.value.field) == (NAME, "HF_HUB_OFFLINE")
        assert not lorakit.adapters(tiny_llama)
