"""GGUF files are converted once; oracle: what transformers reads from the file itself, bit for bit."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from lorakit import hub
from lorakit.caches import GGUF
from lorakit.hub import converting, sources
from lorakit.hub.packaged import MANIFEST
from lorakit.terminal import watched

from ..small_gguf import write_gguf

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / GGUF.place


@pytest.fixture
def file(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama, tiny_tokenizer, form="Q8_0")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the loaders that read the GGUF file itself."""
    found, call = list[str](), sources.call_loader

    def counted(source: Any, load: Any, **options: Any) -> Any:
        if source.header is not None:
            found.append(getattr(load, "func", load).__self__.__name__)
        return call(source, load, **options)

    monkeypatch.setattr(converting, "call_loader", counted)
    return found


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.is_dir())


def directly(file: Path, kind: str, dtype: torch.dtype, **config: Any) -> Any:
    options = {"gguf_file": file.name, "dtype": dtype, "quantization_config": transformers.GgufConfig(dequantize=True)}
    return getattr(transformers, kind).from_pretrained(file.parent, **options, **config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_converted_once_with_the_same_bits(file: Path, cache: Path, read: list[str], dtype: str) -> None:
    wanted = directly(file, "AutoModelForCausalLM", getattr(torch, dtype))
    said = list[str]()
    for _ in range(2):
        model = hub.load_model(hub.resolve(file, said.append), dtype)
        found = model.state_dict()
        assert found.keys() == wanted.state_dict().keys()
        for name, tensor in wanted.state_dict().items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
        unlike = {"_name_or_path", "quantization_config"}
        mine, theirs = model.config.to_dict(), wanted.config.to_dict()
        assert {k: v for k, v in mine.items() if k not in unlike} == {
            k: v for k, v in theirs.items() if k not in unlike
        }
        assert model.config.name_or_path == str(file)
    assert read == ["AutoModelForCausalLM"] and len(entries(cache)) == 1
    assert sum("converting tiny.gguf" in line for line in said) == 1


def test_a_plan_is_for_the_files_that_are_loaded(file: Path, cache: Path) -> None:
    source, shape = hub.resolve(file), hub.shape_of(file)
    converted = replace(shape, converted_bytes=file.stat().st_size)
    assert hub.as_kept(shape, source, "causal", "bfloat16") == converted
    hub.load_model(source, "bfloat16")
    (folder,) = entries(cache)
    kept = hub.as_kept(shape, source, "causal", "bfloat16")
    assert (kept.source, kept.dtype, kept.parameters) == (str(folder), "bfloat16", shape.parameters)
    assert (
        hub.as_kept(shape, source, "causal", "float32")
        == hub.as_kept(shape, source, "encoder", "bfloat16")
        == converted
    )
    (folder / "config.json").write_text("{}")
    assert hub.as_kept(shape, source, "causal", "bfloat16") == converted


def test_new_heads_are_not_kept_and_are_drawn_as_from_the_file(file: Path, read: list[str]) -> None:
    weights = list[Any]()
    for labels in (3, 3, 4):
        torch.manual_seed(7)
        names = {str(number): f"l{number}" for number in range(labels)}
        loaded = hub.load_for_task(hub.resolve(file), task="classification", config_values={"id2label": names})
        assert loaded.new_modules == ("score",) and loaded.model.score.weight.shape[0] == labels
        weights.append(loaded.model.score.weight)
    assert torch.equal(weights[0], weights[1]) and len(read) == 1


def test_a_tokenizer_is_kept(file: Path, cache: Path, read: list[str], tiny_tokenizer: Any) -> None:
    found = [hub.load_tokenizer(hub.resolve(file)) for _ in range(3)]
    assert len(read) == 1 and len(entries(cache)) == 1
    text = "def add(a, b): return 12 + 345\n  two  spaces <|im_start|>user"
    for tokenizer in found:
        assert tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
        assert hub.tokenizer_hash(tokenizer) == hub.tokenizer_hash(found[0])
        assert hub.tokenizer_settings(tokenizer) == hub.tokenizer_settings(found[0])
        assert tokenizer.chat_template == tiny_tokenizer.chat_template and tokenizer.name_or_path == str(file)


def test_other_content_under_the_same_size_and_time_is_converted(
    file: Path, cache: Path, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    before, first = file.stat(), hub.load_model(file)
    time.sleep(0.02)  # longer than a tick of the file system's clock
    with torch.no_grad():
        tiny_llama.model.norm.weight.add_(1)
    write_gguf(file, tiny_llama, tiny_tokenizer, form="Q8_0")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = hub.load_model(file)
    assert torch.equal(second.model.norm.weight, first.model.norm.weight + 1)
    assert len(entries(cache)) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST])
def test_a_damaged_directory_is_made_again(file: Path, cache: Path, read: list[str], name: str) -> None:
    wanted = {key: tensor.clone() for key, tensor in hub.load_model(file).state_dict().items()}  # not mapped
    (entry,) = entries(cache)
    raw = bytearray((entry / name).read_bytes())
    raw[-3] ^= 1
    (entry / name).write_bytes(raw)
    found = hub.load_model(file).state_dict()
    assert len(read) == 2 and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("why", ["disk", "size", "directory", "differs"])
def test_what_cannot_be_kept_is_read_from_the_file(
    file: Path, cache: Path, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, said = directly(file, "AutoModelForCausalLM", torch.float32).state_dict(), list[str]()
    if why == "disk":
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5_000))
    elif why == "size":
        monkeypatch.setattr(converting, "MOST_BYTES", 5_000)
    elif why == "directory":
        cache.parent.write_text("a file")
    else:
        monkeypatch.setattr(converting, "_is_same", lambda one, other: False)
    for _ in range(2):
        found = hub.load_model(hub.resolve(file, said.append)).state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any("not kept" in line for line in said) == (why in ("disk", "directory"))


def test_the_directories_unused_for_longest_are_removed(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.load_model(file, "bfloat16")
    (first,) = entries(cache)
    os.utime(first, (1, 1))
    size = sum(path.stat().st_size for path in first.iterdir())
    monkeypatch.setattr(converting, "MOST_BYTES", 2 * size)
    hub.load_model(file, "float16")
    assert first in entries(cache)
    os.utime(first, (1, 1))
    monkeypatch.setattr(converting, "TOKENIZER_BYTES", 100)
    hub.load_tokenizer(file)
    assert first not in entries(cache) and len(entries(cache)) == 2


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_a_long_conversion_is_not_silent_while_progress_bars_are_hidden(
    part: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = sources.call_loader

    def slow(source: Any, load: Any, **options: Any) -> Any:
        def loads(*given: Any, **more: Any) -> Any:
            print("a progress bar", file=sys.stderr)
            time.sleep(0.2)
            return load(*given, **more)

        return call(source, loads if source.header is not None else load, **options)

    monkeypatch.setattr(converting, "call_loader", slow)
    source = hub.resolve(file)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with contextlib.redirect_stderr(terminal), watched("lorakit eval", 0.01):
        hub.load_model(source) if part == "weights" else hub.load_tokenizer(source)
    lines = terminal.getvalue().splitlines()
    assert sum(line.startswith("converting tiny.gguf (") and line.endswith("s") for line in lines) > 3
    assert not any("progress bar" in line for line in lines)
