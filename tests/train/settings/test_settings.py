"""Settings are checked strictly, and errors name the setting."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from lorakit.errors import ConfigError
from lorakit.train.settings.defaults import DEFAULTS, flag_type, types_of_settings
from lorakit.train.settings.settings import TrainSettings

GIVEN: dict[str, Any] = {"model": "m", "data": ["a.txt"], "output_dir": "out"}


def test_every_setting_has_an_entry_and_every_default_a_reason() -> None:
    assert list(TrainSettings.model_fields) == list(types_of_settings()) == list(DEFAULTS)
    for name, row in DEFAULTS.items():
        assert row.reason or row.value is ..., name
        assert TrainSettings.model_fields[name].description == row.help()
        assert row.conflict is None or row.conflict.other in DEFAULTS


def test_a_flag_has_the_type_of_its_setting() -> None:
    def types(annotation: Any) -> set[Any]:
        origin, parts = get_origin(annotation), get_args(annotation)
        inner = () if origin in (Literal, list, dict) else parts[:1] if origin is Annotated else parts
        return set().union(*map(types, inner)) if inner else {origin or annotation}

    for name in DEFAULTS:
        taken = types(TrainSettings.model_fields[name].annotation) - {type(None)}
        flag = flag_type(types_of_settings()[name])
        if list in taken or dict in taken:
            is_part = name.endswith("_config") or name == "use_bdlora"  # a JSON object
            assert flag in ((str,) if is_part else (list[str], list[int])), name
        else:
            assert {flag} == {str if one is Literal else one for one in taken}, name


def test_defaults_are_those_of_the_issue() -> None:
    settings = TrainSettings(**GIVEN)
    assert (settings.target_modules, settings.r, settings.lora_alpha, settings.dtype) == ("all-linear", 16, 32, "auto")
    config = settings.lora_config()
    assert (config.r, config.lora_alpha, config.target_modules, config.bias) == (16, 32, "all-linear", "none")


@pytest.mark.parametrize("alpha", [32, 32.0, 0.5])
def test_the_settings_in_a_record_give_the_same_config(alpha: float) -> None:
    for settings in (TrainSettings(**GIVEN), TrainSettings(**GIVEN, lora_alpha=alpha)):
        again = TrainSettings(**json.loads(json.dumps(settings.as_dict())))
        assert repr(again.lora_config()) == repr(settings.lora_config())


def test_rates_by_pattern_come_as_words_or_as_a_table() -> None:
    table = {"q_proj": 1e-4, r"layers\.(0|1)=?": 0.5}
    for given in (table, ["q_proj=1e-4", r"layers\.(0|1)=?=0.5"]):
        settings = TrainSettings(**GIVEN, learning_rate_pattern=given)
        assert settings.learning_rate_pattern == table
        assert TrainSettings(**settings.as_dict()) == settings
    assert TrainSettings(**GIVEN, learning_rate_pattern="q_proj=2").learning_rate_pattern == {"q_proj": 2.0}
    assert TrainSettings(**GIVEN).learning_rate_pattern == {}


@pytest.mark.parametrize(
    ("values", "keywords"),
    [
        ({"r": 0}, ("r is 0", "at least 1")),
        ({"r": "8"}, ("r is '8'", "an integer")),
        ({"r": True}, ("r is True", "an integer")),
        ({"lora_dropout": 1.0}, ("lora_dropout is 1.0", "at least 0 and less than 1")),
        ({"lora_dropout": -0.1}, ("lora_dropout is -0.1", "at least 0 and less than 1")),
        ({"learning_rate": float("nan")}, ("learning_rate is nan", "finite")),
        ({"learning_rate": "1e-4"}, ("learning_rate is '1e-4'", "a number")),
        ({"learning_rate": 0.0}, ("learning_rate is 0.0", "greater than 0")),
        ({"use_dora": "yes"}, ("use_dora is 'yes'", "true or false")),
        ({"data": []}, ("data is []", "not be empty")),
        ({"data": [3]}, ("data is 3", "a string")),
        ({"target_modules": []}, ("target_modules is []", "not be empty")),
        ({"dtype": "bf15"}, ("dtype is 'bf15'", "'auto', 'bfloat16', 'float16' or 'float32'", "Did you mean bfloat16?")),
        ({"device": "tpu"}, ("device is 'tpu'", "auto, cpu, cuda, cuda:N or mps")),
        ({"device": "auto:0"}, ("device is 'auto:0'", "auto, cpu, cuda, cuda:N or mps")),
        ({"memory_budget": "much"}, ("memory_budget is 'much'", "such as 4GiB or 800MB")),
        ({"learning_rat": 1.0}, ("learning_rat is not a setting", "Did you mean learning_rate?")),
        ({"zzz": 1}, ("zzz is not a setting", "lorakit train --help")),
        ({"optimizer": "lora_fa"}, ("optimizer is 'lora_fa'", "'adamw8bit', 'lorafa'", "Did you mean lorafa?")),
        ({"base_matmul": "int4"}, ("base_matmul is 'int4'", "'dtype' or 'int8'")),
        ({"int8_loss_bound": -0.1}, ("int8_loss_bound is -0.1", "at least 0")),
        ({"quantization": "nf5"}, ("quantization is 'nf5'", "'hqq8'", "Did you mean nf4?")),
        ({"loraplus_lr_ratio": 0}, ("loraplus_lr_ratio is 0", "greater than 0")),
        ({"allocate_ranks": True}, ("allocate_ranks is True", "'none', 'gradients' or 'inputs'")),
        ({"learning_rate_pattern": {"q_proj": 0}}, ("learning_rate_pattern is {'q_proj': 0}", "PATTERN=RATE", "above 0")),
        ({"learning_rate_pattern": ["q_proj"]}, ("learning_rate_pattern is ['q_proj']", "PATTERN=RATE", "above 0")),
        ({"learning_rate_pattern": ["(=1e-4"]}, ("learning_rate_pattern is ['(=1e-4']", "'('", "regular expression")),
        ({"learning_rate_pattern": 3}, ("learning_rate_pattern is 3", "map")),
        ({"loraplus_lr_ratio": 4.0, "optimizer": "lorafa"}, ("loraplus_lr_ratio", "lorafa", "cannot be combined")),
        ({"group": "id", "eval_data": ["b.txt"]}, ("eval_data", "no rows are held out")),
        ({"from_optimizer": True}, ("requires from_adapter",)),
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, ("warmup_ratio", "omit one")),
        ({"decay_ratio": 0.1}, ("wsd", "is cosine")),
        ({"resume": True, "overwrite": True}, ("resume and overwrite cannot be combined",)),
        ({"allocate_ranks": "gradients", "init_lora_weights": "eva"}, ("allocate_ranks", "eva", "cannot be combined")),
    ],
)  # fmt: skip
def test_bad_values_are_named(values: dict[str, Any], keywords: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainSettings(**{**GIVEN, **values})
    for word in keywords:
        assert word in str(caught.value)
    assert caught.value.field == next(iter(values))
    assert caught.value.exit_code == 2


def test_an_error_holds_the_value_and_what_is_allowed() -> None:
    for values, what, allowed in (
        ({"dtype": "bf15"}, "bf15", ("auto", "bfloat16", "float16", "float32")),
        ({"quantization": "nf5"}, "nf5", ("nf4", "fp4", "int8", "int8-torchao", "hqq4", "hqq8")),
        ({"learning_rat": 1.0}, "learning_rat", tuple(TrainSettings.model_fields)),
        ({"r": 0}, "0", ()),
    ):
        with pytest.raises(ConfigError) as caught:
            TrainSettings(**{**GIVEN, **values})
        assert (caught.value.what, caught.value.allowed) == (what, allowed)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainSettings(model="m", r=0, max_steps=-1)
    for part in ("data is missing; pass --data", "output_dir is missing", "r is 0", "max_steps is -1"):
        assert part in str(caught.value)


@pytest.mark.parametrize("field", ["label_map", "columns", "output_dir", "data"])
def test_bytes_that_are_not_utf8_are_rejected_at_once(field: str) -> None:
    word = os.fsdecode(b"\xff\xfe")  # as Python decodes a flag
    with pytest.raises(ConfigError, match=r"surrogate|string") as found:
        TrainSettings(**{**GIVEN, field: {"data": [word], "output_dir": word}.get(field, {"x": word})})
    assert found.value.field == field


def test_words_people_use_are_taken() -> None:
    settings = TrainSettings(model=Path("m"), data="a.txt", output_dir=Path("out"), dtype="bf16", lora_alpha=16)
    assert (settings.model, settings.data, settings.output_dir, settings.dtype) == ("m", ["a.txt"], "out", "bfloat16")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ["q_proj"]),
        ([r".*\.q_proj"], r".*\.q_proj"),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("all-linear", "all-linear"),
    ],
)
def test_target_modules_as_flags_give_them(given: Any, taken: Any) -> None:
    assert TrainSettings(**GIVEN, target_modules=given).target_modules == taken


def test_settings_go_through_json() -> None:
    settings = TrainSettings(**GIVEN, target_modules=["q_proj"], eval_data=["b.txt"], max_steps=3)
    assert TrainSettings(**settings.as_dict()) == settings


@pytest.mark.parametrize(
    ("values", "field", "keyword"),
    [
        ({"base_matmul": "int8", "quantization": "nf4"}, "base_matmul", "quantization nf4"),
        ({"keep_bf16_base": True}, "keep_bf16_base", "--base-matmul int8"),
    ],
    ids=["quantized base", "without int8"],
)
def test_int8_matmuls_exclude_some_settings(values: dict[str, Any], field: str, keyword: str) -> None:
    with pytest.raises(ConfigError, match=keyword) as found:
        TrainSettings(**GIVEN, **values)
    assert found.value.field == field


def test_int8_matmuls_are_off_by_default_and_go_through_json() -> None:
    assert TrainSettings(**GIVEN).base_matmul == "dtype"
    settings = TrainSettings(**GIVEN, base_matmul="int8", int8_loss_bound=0.1, keep_bf16_base=True)
    assert TrainSettings(**settings.as_dict()) == settings
