"""Loading through PEFT's interface reports what is implausible, and rejects numbers that are not finite."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit.peft as ours
from lorakit.core import inspect_adapter
from lorakit.errors import AdapterFileError

from .models import ids, randomise

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tiny_llama: Any, tmp_path: Path) -> Path:
    model = ours.get_peft_model(copy.deepcopy(tiny_llama), ours.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "lorakit.json").unlink(missing_ok=True)
    return tmp_path / "adapter"


def edit_config(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **fields}))


def edit_b(folder: Path, value: float) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.fill_(value)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def fresh(base: Any) -> Any:
    return ours.get_peft_model(copy.deepcopy(base), ours.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def from_pretrained(base: Any, folder: Path, **words: Any) -> None:
    ours.PeftModel.from_pretrained(copy.deepcopy(base), folder, **words)


def with_config(base: Any, folder: Path, **words: Any) -> None:
    from_pretrained(base, folder, config=ours.LoraConfig.from_pretrained(folder), **words)


def one_more(base: Any, folder: Path, **words: Any) -> None:
    fresh(base).load_adapter(folder, "other", **words)


def into_the_same(base: Any, folder: Path, **words: Any) -> None:
    fresh(base).load_adapter(folder, "default", **words)


def renamed(base: Any, folder: Path, **words: Any) -> None:
    fresh(base).load_adapter(folder, "other", key_mapping={"nothing": "else"}, **words)


def hotswapped(base: Any, folder: Path) -> None:
    from lorakit.peft.utils.hotswap import hotswap_adapter

    hotswap_adapter(fresh(base), str(folder), "default")


Load = Callable[..., None]
WAYS: tuple[Load, ...] = (from_pretrained, with_config, one_more, into_the_same, renamed)


def implausible(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "implausible" in str(warning.message)]


@pytest.mark.parametrize("load", [*WAYS, hotswapped])
def test_an_adapter_that_does_nothing_is_reported_once(load: Load, tiny_llama: Any, folder: Path) -> None:
    assert implausible(lambda: load(tiny_llama, folder)) == []
    edit_b(folder, 0.0)
    (message,) = implausible(lambda: load(tiny_llama, folder))
    (finding,) = inspect_adapter(folder).judged
    assert finding.kind == "zero_update" and str(finding) in message and str(folder) in message


@pytest.mark.parametrize("load", WAYS)
def test_a_new_adapter_that_is_loaded_to_be_trained_is_not(load: Load, tiny_llama: Any, folder: Path) -> None:
    edit_b(folder, 0.0)
    assert implausible(lambda: load(tiny_llama, folder, is_trainable=True)) == []


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"lora_alpha": 1e9}, "large_scale"),
        ({"lora_alpha": 0}, "alpha_not_positive"),
        ({"lora_alpha": -8}, "alpha_not_positive"),
        ({"alpha_pattern": {"v_proj": 8000}}, "steep_alpha_pattern"),
        ({"init_lora_weights": "fancy"}, "unknown_init"),
    ],
    ids=str,
)
def test_what_peft_loads_silently_is_reported(fields: dict[str, Any], kind: str, tiny_llama: Any, folder: Path) -> None:
    edit_config(folder, **fields)
    found = inspect_adapter(folder).judged
    assert kind in {finding.kind for finding in found}
    (message,) = implausible(lambda: from_pretrained(tiny_llama, folder))
    assert all(str(finding) in message for finding in found)


@pytest.mark.parametrize("load", [*WAYS, hotswapped])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_an_error(load: Load, value: float, tiny_llama: Any, folder: Path) -> None:
    edit_b(folder, value)
    with pytest.raises(AdapterFileError, match="lora_B"):
        load(tiny_llama, folder)


def test_a_rejected_adapter_leaves_the_model_as_it_was(tiny_llama: Any, folder: Path) -> None:
    model = fresh(tiny_llama).eval()
    randomise(model)
    before, names = model(input_ids=ids()).logits, [name for name, _ in model.named_parameters()]
    edit_b(folder, float("nan"))
    for name, words in (("other", {}), ("default", {}), ("third", {"key_mapping": {"nothing": "else"}})):
        with pytest.raises(AdapterFileError):
            model.load_adapter(folder, name, **words)
    assert list(model.peft_config) == ["default"]
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(input_ids=ids()).logits, before)


def test_values_beyond_the_dtype_of_the_base_are_an_error(tiny_llama: Any, folder: Path) -> None:
    edit_b(folder, 1e5)
    base = copy.deepcopy(tiny_llama).to(torch.float16)
    with pytest.raises(AdapterFileError, match=r"lora_B.*float16"):
        ours.PeftModel.from_pretrained(base, folder)
    assert not any("lora" in name for name, _ in base.named_parameters())
