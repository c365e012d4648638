"""Loading an adapter whose files were read before: the same model, and the files are neither read again nor changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lorakit.core import detach, load_adapter, read_adapter, save_adapter, use
from lorakit.errors import AdapterFileError, BaseMismatchError

from ...laws.zoo import GPT2, LLAMA, randomise, run, with_adapters


def test_files_load_without_their_directory(tmp_path: Path) -> None:
    save_adapter(with_adapters(LLAMA, "x"), tmp_path / "adapter", "x")
    files = read_adapter(tmp_path / "adapter")
    before = {name: tensor.clone() for name, tensor in files.file.tensors.items()}
    model = LLAMA.model()
    one = load_adapter(model, tmp_path / "adapter", "one")
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(AdapterFileError):
        load_adapter(model, tmp_path / "adapter", "two")
    two = load_adapter(model, files, "two")
    assert (two.config, two.sites, two.base) == (one.config, one.sites, one.base)
    with use(model, "one"):
        expected = run(model, LLAMA.given())
    with use(model, "two"):
        assert torch.equal(run(model, LLAMA.given()), expected)
    randomise(model, "two", 3)
    detach(model, "two")
    load_adapter(model, files, "two")  # not those that were changed
    with use(model, "two"):
        assert torch.equal(run(model, LLAMA.given()), expected)
    assert all(torch.equal(files.file.tensors[name], tensor) for name, tensor in before.items())


def test_files_of_another_base_are_rejected_as_from_a_directory(tmp_path: Path) -> None:
    save_adapter(with_adapters(GPT2, "x"), tmp_path, "x")
    errors = []
    for given in (tmp_path, read_adapter(tmp_path)):
        with pytest.raises(BaseMismatchError) as caught:
            load_adapter(LLAMA.model(), given, "x")
        errors.append((str(caught.value), caught.value.fields))
    assert errors[0] == errors[1]
