"""Loading a model whose weights are converted to another dtype in temporary files."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.allocator import file_mappings
from lorakit.errors import ModelError
from lorakit.hub import LoadOptions, load_for_task, load_model
from lorakit.hub.converting import converted_files
from lorakit.hub.sources import resolve
from lorakit.machine import cache_directory

from .. import small_models
from ..speed.architectures import Architecture, NotBuilt, architectures, small

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives back pages")

FAMILIES = tuple(
    getattr(small_models, name)
    for name in ("llama", "qwen3", "gemma2", "phi3", "mixtral", "neox", "gpt2", "opt", "bert", "t5")
)


def saved(folder: Path, model: Any, **options: Any) -> Path:
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())) / 64)
    model.save_pretrained(folder, **options)
    return folder


def contents(model: nn.Module) -> dict[str, tuple[torch.dtype, bytes]]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (t.dtype, t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in named.items()
    }


def is_mapped(tensor: torch.Tensor) -> bool:
    return any(first <= tensor.data_ptr() < last for first, last in file_mappings())


def assert_equal(made: Any, usual: Any) -> None:
    assert type(made) is type(usual) and made.training is usual.training
    assert contents(made) == contents(usual)
    assert made.config.to_dict() == usual.config.to_dict()
    assert made.name_or_path == usual.name_or_path and made.config.name_or_path == usual.config.name_or_path
    if usual.can_generate():
        assert made.generation_config.to_dict() == usual.generation_config.to_dict()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_values_are_those_of_the_usual_conversion(
    tmp_path: Path, family: Callable[[], Any], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    folder = saved(tmp_path / "model", family())
    task = {"bert": "encoder", "t5": "seq2seq"}.get(family.__name__, "causal")
    made = load_model(folder, dtype, task=task, convert_in_files=True)
    assert_equal(made, load_model(folder, dtype, task=task))
    linear = next(module for module in made.modules() if isinstance(module, nn.Linear))
    assert is_mapped(linear.weight) or (family.__name__ == "t5" and dtype == torch.float16)  # "wo" stays in fp32


def task_of(name: str) -> str:
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    return "encoder" if name.endswith("ForMaskedLM") else "seq2seq"


@pytest.mark.slow
@pytest.mark.parametrize("one", tuple(architectures()), ids=lambda one: one.name)
def test_every_architecture_gets_the_values_of_the_usual_conversion(tmp_path: Path, one: Architecture) -> None:
    task = task_of(one.name)
    try:
        small(one.kind, one.name).save_pretrained(tmp_path)
        usual = load_model(tmp_path, "bfloat16", task=task)
    except (NotBuilt, ModelError, RuntimeError) as cause:
        pytest.skip(str(cause))
    made = load_model(tmp_path, "bfloat16", task=task, convert_in_files=True)
    assert_equal(made, usual)
    assert any(is_mapped(parameter) for parameter in made.parameters())


def test_shards_are_converted_where_they_need_it(tmp_path: Path) -> None:
    torch.manual_seed(1)
    folder = saved(tmp_path / "model", small_models.llama(tie_word_embeddings=False), max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    halved = {name: tensor.bfloat16() for name, tensor in load_file(shards[0]).items()}
    save_file(halved, shards[0], metadata={"format": "pt"})
    with converted_files(resolve(folder), torch.bfloat16) as made:
        assert made is not None
        files = {path.name: path.resolve() for path in made.glob("*.safetensors")}
        assert files.keys() == {path.name for path in shards}
        assert files[shards[0].name] == shards[0].resolve()
        found = {name: tensor.dtype for path in shards for name, tensor in load_file(made / path.name).items()}
    assert {dtype for name, dtype in found.items() if "norm" not in name} == {torch.bfloat16}
    assert torch.float32 in found.values()  # vectors are not converted
    assert_equal(load_model(folder, torch.bfloat16, convert_in_files=True), load_model(folder, torch.bfloat16))


def test_large_tensors_are_converted_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.hub import converting

    monkeypatch.setattr(converting, "BLOCK_BYTES", 64)
    torch.manual_seed(2)
    folder = saved(tmp_path / "model", small_models.llama())
    assert_equal(load_model(folder, "bfloat16", convert_in_files=True), load_model(folder, "bfloat16"))


def test_a_new_head_has_the_same_random_values(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", small_models.bert())
    heads = []
    for in_files in (False, True):
        torch.manual_seed(3)
        values = {"id2label": {0: "a", 1: "b", 2: "c"}}
        loaded = load_for_task(folder, LoadOptions("bfloat16", convert_in_files=in_files), "classification", values)
        heads.append((loaded.new_modules, contents(loaded.model)))
    assert heads[0] == heads[1] and heads[0][0]


@pytest.mark.parametrize("case", ["the same dtype", "no space", "another system", "no cache"])
def test_without_a_conversion_in_files_the_values_are_the_same(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, dtype = saved(tmp_path / "model", small_models.llama()), torch.bfloat16
    usual = load_model(folder, torch.float32 if case == "the same dtype" else dtype)
    if case == "the same dtype":
        dtype = torch.float32
    elif case == "no space":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 999, 1))  # type: ignore[attr-defined]
    elif case == "another system":
        monkeypatch.setattr(sys, "platform", "darwin")
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "file" / "cache"))
    with converted_files(resolve(folder), dtype) as made:
        assert made is None
    assert_equal(load_model(folder, dtype, convert_in_files=True), usual)


def test_nothing_is_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = saved(tmp_path / "model", small_models.llama())
    model = load_model(folder, "bfloat16", convert_in_files=True)
    assert is_mapped(model.lm_head.weight)
    assert not any(cache_directory().iterdir()) and not any((tmp_path / "temporary").iterdir())


def test_damaged_files_raise_the_usual_error(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", small_models.llama())
    weights = folder / "model.safetensors"
    for damaged in (weights.read_bytes()[:-100], b"\xff" * 64, b"", (4).to_bytes(8, "little") + b"[{}]"):
        weights.write_bytes(damaged)
        with pytest.raises(ModelError) as usual:
            load_model(folder, "bfloat16")
        with pytest.raises(ModelError) as made:
            load_model(folder, "bfloat16", convert_in_files=True)
        assert str(made.value) == str(usual.value)
