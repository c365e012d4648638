"""The modules that a config names, compared with the installed peft, and PEFT's messages about them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lorakit.errors import ConfigError
from lorakit.peft import LoraConfig, get_peft_model
from lorakit.peft.tuners.tuners_utils import (
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    inspect_matched_modules,
)

CASES = [
    ("foo", {"target_modules": ["foo"]}),
    ("a.foo", {"target_modules": ["foo"]}),
    ("afoo", {"target_modules": ["foo"]}),
    ("a.foo", {"target_modules": "a.*"}),
    ("a.1.foo", {"target_modules": ["foo"], "layers_to_transform": [0]}),
    ("a.h.1.foo", {"target_modules": ["foo"], "layers_to_transform": [1]}),
    ("a.h.1.foo", {"target_modules": ["foo"], "layers_to_transform": 1, "layers_pattern": "h"}),
    ("a.h.2.foo", {"target_modules": ["foo"], "layers_to_transform": 1, "layers_pattern": ["h"]}),
    ("a.h.1.foo", {"target_modules": ["foo"], "layers_to_transform": 1, "layers_pattern": ""}),
    ("h.1.h.2.foo", {"target_modules": ["foo"], "layers_to_transform": 1, "layers_pattern": ["h"]}),
    ("h.1.h.2.foo", {"target_modules": ["foo"], "layers_to_transform": 2, "layers_pattern": [r"\d+\.h"]}),
    ("h.1.b.2.foo", {"target_modules": ["foo"], "layers_to_transform": 2, "layers_pattern": ["b", "h"]}),
    ("a.foo", {"target_modules": ["foo"], "exclude_modules": ["a.foo"]}),
    ("a.foo", {"target_modules": ["foo"], "exclude_modules": r".*foo"}),
    ("a.foo", {"target_modules": ["foo"], "modules_to_save": ["a"]}),
]


@pytest.mark.parametrize(("key", "fields"), CASES)
def test_a_module_is_named_as_in_peft(key: str, fields: dict[str, Any]) -> None:
    theirs = pytest.importorskip("peft")
    wanted = theirs.tuners.tuners_utils.check_target_module_exists(theirs.LoraConfig(**fields), key)
    assert bool(check_target_module_exists(LoraConfig(**fields), key)) is bool(wanted)


def test_the_fewest_ends_that_tell_modules_apart() -> None:
    wanted = [f"decoder.layers.{i}.self_attn.{n}" for i in range(30) for n in ("q_proj", "v_proj")]
    others = [f"encoder.layers.{i}.self_attn.k_proj" for i in range(30)]
    assert _find_minimal_target_modules(wanted, others) == {"q_proj", "v_proj"}
    assert _find_minimal_target_modules(["a.b", "c.b"], ["d.b"]) == {"a.b", "c.b"}
    for bad, text in (("x", "list or set"), ([], "list or set"), ([""], "empty string")):
        with pytest.raises(ConfigError, match=text):
            _find_minimal_target_modules(bad, [])
    with pytest.raises(ConfigError, match=r"common elements.*Common: ") as caught:
        _find_minimal_target_modules(["a"], ["a"])
    assert caught.value.what == "a"


def test_all_linear_is_spelled_out(tiny_llama: Any) -> None:
    config = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), tiny_llama)
    assert len(config.target_modules) == 14 and "lm_head" not in config.target_modules
    listed = LoraConfig(target_modules=["q_proj"])
    assert _maybe_include_all_linear_layers(listed, tiny_llama).target_modules == {"q_proj"}


def test_what_matched_and_what_did_not() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), LoraConfig(target_modules=["0"]))
    found = inspect_matched_modules(model.base_model)
    assert found["matched"] == ["0"] and "1" in found["unmatched"]


def test_without_target_modules_no_module_is_named() -> None:
    for config in (LoraConfig(), LoraConfig(target_parameters=["a.weight"])):
        assert check_target_module_exists(config, "a") is False


@pytest.mark.parametrize("targets", ["base_model.model.2", r"^base_model\.model\.2", ["base_model.model.2"], ["2"]])
def test_targets_of_a_wrapped_model_may_have_its_prefix(targets: str | list[str]) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        model = get_peft_model(model, LoraConfig(target_modules=targets), "second")
    assert [name for name, p in model.named_parameters() if ".second." in name and ".2." not in name] == []
    assert "second" in model.base_model.model[2].lora_A


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["head"], "modules_to_save": ["mine"]},
        {"target_modules": ["words"], "trainable_token_indices": {"mine": [1]}},
    ],
)
def test_an_adapter_is_not_named_like_a_module_that_it_trains(fields: dict[str, Any]) -> None:
    base = nn.ModuleDict({"words": nn.Embedding(5, 4), "head": nn.Linear(4, 2)})
    with pytest.raises(ConfigError, match="name, 'mine', is also the name of a module") as caught:
        get_peft_model(base, LoraConfig(**fields), "mine")
    assert caught.value.what == "mine" and caught.value.field in fields
    assert type(base["head"]) is nn.Linear and type(base["words"]) is nn.Embedding
