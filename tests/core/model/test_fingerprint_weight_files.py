"""SHA-256 of the files that a base was loaded from: found, cached, and optional."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import LoraConfig, core
from lorakit.core.model.fingerprint import (
    DIFFERENT,
    MOST_BYTES,
    SAME,
    compare,
    fingerprint,
    sampled_positions,
    weight_file_hashes,
    weight_file_inputs,
)
from lorakit.errors import BaseMismatchError


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to hash them."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr("lorakit.file_hashes.sha256_file", counted)
    return names


def from_folder(name: str | Path | None) -> nn.Module:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(name_or_path=name if name is None else str(name))  # type: ignore[assignment]
    return model


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def written(folder: Path, content: bytes = b"one", name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def shards(folder: Path, **content: bytes) -> Path:
    for name, data in content.items():
        written(folder, data, f"{name}.safetensors")
    table = {f"tensor.{name}": f"{name}.safetensors" for name in content}
    written(folder, json.dumps({"weight_map": table}).encode(), "model.safetensors.index.json")
    return folder


def test_files_of_a_folder(tmp_path: Path) -> None:
    assert weight_file_hashes(from_folder(written(tmp_path / "a"))) == {"model.safetensors": sha256(b"one")}
    parts = shards(tmp_path / "b", x=b"1", y=b"2")
    assert weight_file_hashes(from_folder(parts)) == {"x.safetensors": sha256(b"1"), "y.safetensors": sha256(b"2")}
    (parts / "y.safetensors").unlink()
    assert weight_file_hashes(from_folder(parts)) == {}  # part of a base does not identify it


@pytest.mark.parametrize("name", [None, "", "not/there", "nobody/nothing", "a\0b", "x" * 5000], ids=repr)
def test_where_no_files_are_known(name: str | None) -> None:
    assert weight_file_hashes(from_folder(name)) == {}
    assert weight_file_hashes(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b'{"weight_map": 1}', b'{"weight_map": {"a": "../../secret.safetensors"}}'], ids=str
)
def test_an_index_that_cannot_be_used(index: bytes, tmp_path: Path) -> None:
    folder = written(tmp_path / "outer" / "a", index, "model.safetensors.index.json")
    written(tmp_path, b"secret", "secret.safetensors")
    assert weight_file_hashes(from_folder(folder)) == {}


def test_what_is_not_a_regular_file_is_not_opened(tmp_path: Path) -> None:
    folder = shards(tmp_path / "a", x=b"1")
    (folder / "x.safetensors").unlink()
    os.mkfifo(folder / "x.safetensors")
    assert weight_file_hashes(from_folder(folder)) == {}


def test_without_a_home_directory_no_files_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert weight_file_hashes(from_folder("owner/name")) == {}


def test_large_files_are_hashed_only_where_it_costs_nothing(tmp_path: Path, hashed: list[str]) -> None:
    folder = shards(tmp_path / "a", x=b"1", y=b"2")
    os.truncate(folder / "x.safetensors", MOST_BYTES // 2)  # without content on the disk
    os.truncate(folder / "y.safetensors", MOST_BYTES // 2 + 1)
    assert weight_file_hashes(from_folder(folder)) == {} and hashed == []


def in_hub(tmp_path: Path, revision: str, *blobs: str, content: bytes = b"one") -> Path:
    """A snapshot in a hub's cache, whose files are links to blobs."""
    home = tmp_path / "hub" / "models--owner--name"
    snapshot = home / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for number, blob in enumerate(blobs):
        written(home / "blobs", content, blob)
        (snapshot / f"part{number}.safetensors").symlink_to(Path("..", "..", "blobs", blob))
    table = {str(number): f"part{number}.safetensors" for number in range(len(blobs))}
    written(snapshot, json.dumps({"weight_map": table}).encode(), "model.safetensors.index.json")
    return snapshot


@pytest.mark.parametrize("by_id", [True, False])
def test_a_blob_of_the_hub_is_named_by_its_sha256(by_id: bool, tmp_path: Path, hashed: list[str]) -> None:
    git, lfs = "c" * 40, "d" * 64
    snapshot = in_hub(tmp_path, "main", git, lfs)
    model = from_folder("owner/name" if by_id else snapshot)
    assert weight_file_hashes(model) == {"part0.safetensors": sha256(b"one"), "part1.safetensors": lfs}
    assert hashed == [git]


def test_a_blob_that_is_not_hashed_enters_keys_with_its_status(tmp_path: Path) -> None:
    blob = in_hub(tmp_path, "main", "d" * 64) / "part0.safetensors"
    model, before = from_folder("owner/name"), blob.stat()
    first = weight_file_inputs(model)
    assert first["part0.safetensors"][0] == "d" * 64 and weight_file_inputs(model) == first
    time.sleep(0.02)  # longer than a tick of the file system's clock
    blob.write_bytes(b"two")
    os.utime(blob, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weight_file_hashes(model) == {"part0.safetensors": "d" * 64}
    assert weight_file_inputs(model) != first


def test_a_file_with_a_hash_for_a_name_outside_a_hub_is_hashed(tmp_path: Path) -> None:
    written(tmp_path / "other", b"one", "d" * 64)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").symlink_to(tmp_path / "other" / ("d" * 64))
    assert weight_file_hashes(from_folder(tmp_path / "a")) == {"model.safetensors": sha256(b"one")}


def test_of_several_revisions_none_is_guessed(tmp_path: Path) -> None:
    in_hub(tmp_path, "one", "d" * 64)
    (tmp_path / "hub" / "models--owner--name" / "snapshots" / "config-only").mkdir()
    assert weight_file_hashes(from_folder("owner/name")) == {"part0.safetensors": "d" * 64}
    in_hub(tmp_path, "two", "e" * 64)
    assert weight_file_hashes(from_folder("owner/name")) == {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_of(folder: Path, output: Path) -> Path:
    model = LlamaForCausalLM.from_pretrained(folder)
    core.attach(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    core.save_adapter(model, output)
    return output


def test_an_adapter_names_the_files_of_its_base(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path / "adapter")
    files = json.loads((adapter / "lorakit.json").read_text(encoding="utf-8"))["base"]["files"]
    assert files == {"model.safetensors": sha256((folder / "model.safetensors").read_bytes())}
    model = LlamaForCausalLM.from_pretrained(folder)
    known = core.inspect_adapter(adapter).base
    verdict, reason, warning = compare(known, fingerprint(model, with_files=True))
    assert verdict == SAME and "files" in reason and not warning
    assert core.load_adapter(model, adapter).base == SAME


def test_a_file_that_changed_where_nothing_is_sampled_is_a_warning(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path / "adapter")
    model = LlamaForCausalLM.from_pretrained(folder)
    known = fingerprint(model)
    name, weight = "model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj.weight
    sampled = set(sampled_positions(known, name, tuple(weight.shape)))
    with torch.no_grad():
        weight.view(-1)[next(target for target in range(weight.numel()) if target not in sampled)] += 1
    assert fingerprint(model) == known
    model.save_pretrained(folder)
    changed = LlamaForCausalLM.from_pretrained(folder)
    with pytest.warns(UserWarning, match="weight files differ"):
        report = core.load_adapter(changed, adapter)
    assert report.base == SAME and any("weight files differ" in warning for warning in report.warnings)


def test_equal_files_excuse_no_other_numbers(folder: Path, tmp_path: Path) -> None:
    adapter = adapter_of(folder, tmp_path / "adapter")
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    assert compare(core.inspect_adapter(adapter).base, fingerprint(model, with_files=True)).verdict == DIFFERENT
    with pytest.raises(BaseMismatchError):
        core.load_adapter(model, adapter)
