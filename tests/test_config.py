"""`LoraConfig`: strict where it is made, tolerant where it is read, the field's names and defaults, JSON both ways."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from lorakit.config import API_LEVEL, CONFIG_FILE, HEADS_BY_TASK, NEUTRAL, LoraConfig, TaskType, read_config, scale
from lorakit.errors import AdapterFileError, ConfigError, NotYetSupported

DEFAULTS = {
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None, "exclude_modules": None, "bias": "none",
    "use_rslora": False, "use_dora": False, "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "task_type": None, "inference_mode": False, "fan_in_fan_out": False,
    "layers_to_transform": None, "layers_pattern": None, "base_model_name_or_path": None, "revision": None,
    "peft_type": "LORA", "peft_version": "0.22.0", "auto_mapping": None,
}  # fmt: skip


def test_defaults_are_the_fields() -> None:
    config = LoraConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert API_LEVEL == "0.22.0"
    assert all(getattr(config, name) == neutral for name, neutral in NEUTRAL.items())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "r zero": ({"r": 0}, r"r is 0; it must be a whole number of at least 1"),
    "r negative": ({"r": -4}, "r is -4"),
    "r a float": ({"r": 8.0}, r"r is 8\.0"),
    "r a word": ({"r": "8"}, "r is '8'"),
    "r a truth": ({"r": True}, "r is True"),
    "r nothing": ({"r": None}, "r is None"),
    "dropout one": ({"lora_dropout": 1.0}, r"lora_dropout is 1\.0; it must lie in \[0, 1\)"),
    "dropout negative": ({"lora_dropout": -0.1}, r"lora_dropout is -0\.1"),
    "dropout NaN": ({"lora_dropout": math.nan}, "lora_dropout is nan; it must be a finite number"),
    "dropout a word": ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
    "alpha infinite": ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    "alpha a word": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "bias": ({"bias": "some"}, r"bias is 'some'; it must be one of 'none', 'all', 'lora_only'"),
    "task": ({"task_type": "CAUSAL"}, "task_type is 'CAUSAL'; it must be one of .*Did you mean CAUSAL_LM?"),
    "method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "targets a number": ({"target_modules": 3}, "target_modules is 3"),
    "targets of numbers": ({"target_modules": ["q", 3]}, "target_modules holds 3"),
    "targets with nothing in them": ({"target_modules": ["q", ""]}, "target_modules holds ''"),
    "targets empty word": ({"target_modules": ""}, "target_modules is ''"),
    "excluded": ({"exclude_modules": 1.5}, r"exclude_modules is 1\.5"),
    "saved as one word": ({"modules_to_save": "score"}, r"modules_to_save is 'score'; it must be a list .*\['score'\]"),
    "rank of a pattern": ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0"),
    "alpha of a pattern": ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\] is 'x'"),
    "pattern a list": ({"rank_pattern": ["q"]}, r"rank_pattern is \['q'\]; it must be a table"),
    "pattern of a number": ({"alpha_pattern": {3: 1}}, "alpha_pattern holds the key 3"),
    "init a number": ({"init_lora_weights": 3}, "init_lora_weights is 3; it must be True, False or a name"),
    "layers pattern alone": ({"layers_pattern": "h"}, "layers_pattern is given without layers_to_transform"),
    "layers of a regex": ({"layers_to_transform": [1], "target_modules": "q.*"}, "cannot be combined with target_modules as one string"),
}  # fmt: skip


@pytest.mark.parametrize("which", BAD)
def test_the_constructor_names_field_value_and_what_is_allowed(which: str) -> None:
    fields, text = BAD[which]
    with pytest.raises(ConfigError, match=text) as caught:
        LoraConfig(**fields)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_field_is_an_error_of_python() -> None:
    with pytest.raises(TypeError, match="lora_rank"):
        LoraConfig(lora_rank=8)


@pytest.mark.parametrize(
    "fields", [{"r": 1}, {"lora_dropout": 0}, {"lora_dropout": 0.999}, {"lora_alpha": 0.5}, {"lora_alpha": -8}]
)
def test_what_is_allowed(fields: dict[str, Any]) -> None:
    """Whether a scale makes sense is judged where an adapter is attached or loaded, with a word to lift it."""
    LoraConfig(**fields)


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_is_known_but_not_built_says_so(name: str) -> None:
    value = {"layer_replication": [(0, 2)], "target_parameters": ["w"]}.get(
        name, True if NEUTRAL[name] is False else {"x": 1}
    )
    with pytest.raises(NotYetSupported, match=f"{name} is .*not built yet. Leave it at"):
        LoraConfig(**{name: value})
    LoraConfig(**{name: NEUTRAL[name]})


def test_what_was_passed_in_is_not_shared() -> None:
    targets, ranks, saved = ["q", "v"], {"q": 2}, ["score"]
    config = LoraConfig(target_modules=targets, rank_pattern=ranks, modules_to_save=saved)
    assert config.target_modules == {"q", "v"}
    config.rank_pattern["v"] = 3
    config.modules_to_save.append("x")
    assert (targets, ranks, saved) == (["q", "v"], {"q": 2}, ["score"])


@pytest.mark.parametrize("value", ["CAUSAL_LM", TaskType.CAUSAL_LM])
def test_task_types(value: str) -> None:
    config = LoraConfig(task_type=value)
    assert config.task_type is TaskType.CAUSAL_LM and config.task_type == "CAUSAL_LM"
    assert json.dumps(config.as_json())
    assert set(HEADS_BY_TASK) == {TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS}


def test_equality_copies_and_pickles() -> None:
    config = LoraConfig(r=3, target_modules=["b", "a"], rank_pattern={"a": 2}, task_type="SEQ_CLS")
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert twin == config and twin is not config


def test_scale() -> None:
    assert scale(8, 16) == 2
    assert scale(16, 8) == 0.5
    assert scale(16, 8, use_rslora=True) == 2
    assert scale(2, 3, True) == pytest.approx(3 / math.sqrt(2))


def test_json_both_ways(tmp_path: Path) -> None:
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["v", "q"], exclude_modules=["x"], modules_to_save=["score"], bias="all",
        task_type="SEQ_CLS", rank_pattern={"q": 2}, alpha_pattern={"v": 1.5}, use_dora=True, init_lora_weights="gaussian",
        layers_to_transform=[0, 1], layers_pattern=["layers"], use_rslora=True, lora_dropout=0.25,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    read, ignored = read_config(tmp_path)
    assert ignored == []
    assert read == dataclasses.replace(config, inference_mode=True)
    assert config.inference_mode is False
    assert LoraConfig.from_pretrained(tmp_path) == read == read_config(tmp_path / CONFIG_FILE)[0]


def test_the_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    """Sets have no order of their own; a file must have one."""
    words = [f"module_{number}" for number in range(30)]
    LoraConfig(target_modules=[*reversed(words)]).save_pretrained(tmp_path / "1")
    LoraConfig(target_modules=set(words)).save_pretrained(tmp_path / "2")
    first = (tmp_path / "1" / CONFIG_FILE).read_bytes()
    assert first == (tmp_path / "2" / CONFIG_FILE).read_bytes()
    assert json.loads(first)["target_modules"] == sorted(words)


def write(folder: Path, **values: Any) -> Path:
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    return folder


def test_reading_is_tolerant_and_says_what_it_left_out(tmp_path: Path) -> None:
    config, ignored = read_config(write(tmp_path, r=4, peft_type="LORA", zzz=1, future={"a": 1}, megatron_core="x"))
    assert config.r == 4 and ignored == ["future", "zzz"]


def test_an_old_file_without_most_fields(tmp_path: Path) -> None:
    config, _ = read_config(write(tmp_path, r=4, target_modules=["q"]))
    assert config.lora_alpha == 8 and config.target_modules == {"q"}


@pytest.mark.parametrize("name", ["loftq_config", "eva_config", "corda_config", "trainable_token_indices"])
def test_null_and_empty_ask_for_nothing(name: str, tmp_path: Path) -> None:
    for nothing in (None, NEUTRAL[name]):
        read_config(write(tmp_path, **{name: nothing}))


def test_errors_of_a_file_name_it(tmp_path: Path) -> None:
    for values, error, text in (
        ({"r": 0}, AdapterFileError, "r is 0"),
        ({"use_qalora": True}, NotYetSupported, "use_qalora"),
        ({"peft_type": "IA3"}, AdapterFileError, "peft_type is 'IA3'; only LORA"),
    ):
        with pytest.raises(error, match=f"{CONFIG_FILE}: .*{text}") as caught:
            read_config(write(tmp_path, **values))
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(AdapterFileError, match="nowhere: there is no such"):
        read_config(tmp_path / "nowhere")


def test_programs_that_hold_several_methods_may_ask() -> None:
    config = LoraConfig()
    assert config.is_prompt_learning is False and config.is_adaption_prompt is False
    assert config.to_dict()["r"] == 8
