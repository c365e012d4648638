"""lorakit.registry.contents: the hash of an adapter, and adapters that are not published."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import AdapterFileError
from lorakit.registry import Registry, content_hash
from lorakit.registry.contents import checked_contents

Save = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"


def test_the_hash_is_that_of_the_sorted_names_and_hashes(one: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == ["adapter_config.json", WEIGHTS, "lorakit.json"]
    lines = "".join(f"{name} {hashlib.sha256((one / name).read_bytes()).hexdigest()}\n" for name in names)
    assert content_hash(one) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"])
def test_what_can_change_an_answer_changes_the_hash(name: str, one: Path) -> None:
    before = content_hash(one)
    (one / name).parent.mkdir(exist_ok=True)
    (one / name).write_text("x")
    first = content_hash(one)
    (one / name).write_text("y")
    assert len({before, first, content_hash(one)}) == 3


@pytest.mark.parametrize("name", ["README.md", "optimizer.pt", "train.jsonl", "verify.json"])
def test_what_cannot_is_left_out(name: str, one: Path, registry: Registry) -> None:
    before = content_hash(one)
    (one / name).write_text("x")
    assert content_hash(one) == before
    stored = registry.add("legal", one).version
    assert stored.hash == before == content_hash(stored.folder)
    assert not (stored.folder / name).exists()


def test_exports_of_the_common_form_have_the_hash_of_their_files(one: Path, tmp_path: Path) -> None:
    """`export` uses the same formula, over all files but lorakit.json and the README."""
    from lorakit.core import common_form
    from lorakit.export.formats import export
    from lorakit.export.request import ExportRequest

    exported, folder = export("peft", ExportRequest(common_form(one), "legal", served_base="base"), tmp_path / "out")
    (folder / "lorakit.json").unlink()
    assert exported.name == f"legal@{content_hash(folder)[:12]}"


def change(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    """Change an adapter's tensors as another program does, which leaves lorakit.json as it is."""
    tensors = {name: tensor.contiguous() for name, tensor in edit(load_file(folder / WEIGHTS)).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _site(folder: Path) -> str:
    return str(next(iter(load_file(folder / WEIGHTS))).rpartition(".lora_")[0])


BROKEN: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "cut weights": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4]),
    "edited lorakit.json": lambda folder: (folder / "lorakit.json").write_text('{"format_version": 2}'),
    "NaN": lambda folder: change(folder, lambda t: t | {k: v * torch.nan for k, v in list(t.items())[:1]}),
    "infinity": lambda folder: change(folder, lambda t: t | {k: v * torch.inf for k, v in list(t.items())[-1:]}),
    "no B at a site": lambda folder: change(folder, lambda t: dict(list(t.items())[:-1])),
    "a site is missing": lambda folder: change(
        folder, lambda t: {k: v for k, v in t.items() if _site(folder) not in k}
    ),
    "no tensors": lambda folder: (change(folder, lambda t: {}), (folder / "lorakit.json").unlink()),
    "a pickle": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_adapter_changes_nothing(how: str, one: Path, two: Path, registry: Registry) -> None:
    BROKEN[how](two)
    with pytest.raises(AdapterFileError) as caught:
        registry.add("legal", two)
    assert str(two) in str(caught.value.where)
    assert not registry.folder.exists()
    registry.add("legal", one)
    with pytest.raises(AdapterFileError):
        registry.add("legal", two)
    assert registry.entry("legal").hashes == {content_hash(one)}
    assert len(list((registry.folder / "objects").iterdir())) == 1


def test_an_adapter_of_peft_is_published(one: Path, registry: Registry) -> None:
    (one / "lorakit.json").unlink()
    assert registry.add("legal", one).is_new


@pytest.mark.filterwarnings("ignore")
def test_a_classifier_is_published(save_adapter: Save, tiny_llama: Any, registry: Registry) -> None:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.LlamaConfig(vocab_size=64, num_labels=3, pad_token_id=0, **sizes)
    model = transformers.LlamaForSequenceClassification(config)
    folder = save_adapter("labels", model=model, task_type="SEQ_CLS", target_modules=["q_proj"])
    version = registry.add("labels", folder).version
    assert any("score" in name for name in load_file(version.folder / WEIGHTS))


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "lorakit.json"])
def test_a_link_out_of_the_directory_is_rejected(name: str, one: Path, tmp_path: Path, registry: Registry) -> None:
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"password": 1}))
    (one / name).unlink(missing_ok=True)
    (one / name).symlink_to(secret)
    with pytest.raises(AdapterFileError) as caught:
        registry.add("legal", one)
    assert (caught.value.what, caught.value.where) == (name, str(one / name))
    assert not registry.folder.exists()


@pytest.mark.skipif(os.name == "nt", reason="links")
@pytest.mark.parametrize("is_cache", [True, False])
def test_links_inside_and_of_the_hubs_cache_are_copied_as_files(
    is_cache: bool, one: Path, tmp_path: Path, registry: Registry
) -> None:
    expected = content_hash(one)
    snapshot = tmp_path / "models--owner--one" / "snapshots" / "abc"
    shutil.copytree(one, snapshot)
    blob = snapshot.parents[1] / "blobs" / "x" if is_cache else snapshot / "blob"
    blob.parent.mkdir(exist_ok=True)
    (snapshot / WEIGHTS).rename(blob)
    (snapshot / WEIGHTS).symlink_to(os.path.relpath(blob, snapshot))
    version = registry.add("legal", snapshot).version
    assert version.hash == expected and not any(path.is_symlink() for path in version.folder.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="names")
def test_one_file_cannot_pass_for_two(one: Path, tmp_path: Path, registry: Registry) -> None:
    """The name of the second adapter's only tokenizer file has the line of another file, so the lines are the same."""
    other = tmp_path / "other"
    shutil.copytree(one, other)
    for name in ("tokenizer.json", "vocab.json"):
        (one / name).write_text(name)
    first = hashlib.sha256(b"tokenizer.json").hexdigest()
    (other / f"tokenizer.json {first}\nvocab.json").write_text("vocab.json")
    with pytest.raises(AdapterFileError) as caught:
        registry.add("legal", other)
    assert caught.value.what == f"tokenizer.json {first}\nvocab.json"
    assert registry.add("legal", one).is_new


def test_files_that_change_while_they_are_copied(one: Path, two: Path, tmp_path: Path) -> None:
    contents = checked_contents(one)
    shutil.copy(two / WEIGHTS, one / WEIGHTS)
    with pytest.raises(AdapterFileError) as caught:
        contents.copy_to(tmp_path / "copy")
    assert (caught.value.what, caught.value.where) == ("changed", str(one))
