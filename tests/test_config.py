"""`LoraConfig`: a strict constructor, a tolerant reader, PEFT's names and defaults, JSON in both directions."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.config import (
    API_LEVEL,
    CONFIG_FILE,
    HEADS_BY_TASK,
    LoraConfig,
    PeftConfig,
    PeftType,
    TaskType,
    read_config,
    scale,
)
from lorakit.config.checks import NOT_BUILT, check_built
from lorakit.config.lora import NOT_IN_PEFT, PARTS
from lorakit.config.nested import LoftQConfig
from lorakit.errors import AdapterFileError, ConfigError, ConfigTypeError, NotYetSupported

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
    assert all(getattr(config, name) == neutral for name, neutral in NOT_BUILT.items())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "r zero": ({"r": 0}, r"r is 0; it must be an integer >= 1"),
    "r negative": ({"r": -4}, "r is -4"),
    "r a float": ({"r": 8.0}, r"r is 8\.0"),
    "r a word": ({"r": "8"}, "r is '8'"),
    "r a truth": ({"r": True}, "r is True"),
    "r nothing": ({"r": None}, "r is None"),
    "dropout one": ({"lora_dropout": 1.0}, r"lora_dropout is 1\.0; it must be in \[0, 1\)"),
    "dropout negative": ({"lora_dropout": -0.1}, r"lora_dropout is -0\.1"),
    "dropout NaN": ({"lora_dropout": math.nan}, "lora_dropout is nan; it must be a finite number"),
    "dropout a word": ({"lora_dropout": "0.1"}, "lora_dropout is '0.1'"),
    "alpha infinite": ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    "alpha a word": ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    "bias": ({"bias": "some"}, r"bias is 'some'; it must be one of 'none', 'all', 'lora_only'"),
    "task": ({"task_type": "CAUSAL"}, "Invalid task type: 'CAUSAL'. Must be one of .*Did you mean CAUSAL_LM?"),
    "method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "targets a number": ({"target_modules": 3}, "target_modules is 3"),
    "targets of numbers": ({"target_modules": ["q", 3]}, "target_modules contains 3"),
    "targets with nothing in them": ({"target_modules": ["q", ""]}, "target_modules contains ''"),
    "targets empty word": ({"target_modules": ""}, "target_modules is ''"),
    "excluded": ({"exclude_modules": 1.5}, r"exclude_modules is 1\.5"),
    "saved as one word": ({"modules_to_save": "score"}, r"modules_to_save is 'score'; it must be a list .*\['score'\]"),
    "rank of a pattern": ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\] is 0"),
    "alpha of a pattern": ({"alpha_pattern": {"q": "x"}}, r"alpha_pattern\['q'\] is 'x'"),
    "pattern a list": ({"rank_pattern": ["q"]}, r"rank_pattern is \['q'\]; it must be a mapping"),
    "pattern of a number": ({"alpha_pattern": {3: 1}}, "alpha_pattern contains the key 3"),
    "init a number": ({"init_lora_weights": 3}, "init_lora_weights is 3; it must be True, False or a name"),
    "layers pattern alone": ({"layers_pattern": "h"}, "When `layers_pattern` is specified, `layers_to_transform` must also"),
    "layers of a regex": ({"layers_to_transform": [1], "target_modules": "q.*"}, "`layers_to_transform` cannot be used when `target_modules` is a str"),
}  # fmt: skip


@pytest.mark.parametrize("which", BAD)
def test_the_constructor_names_field_value_and_what_is_allowed(which: str) -> None:
    fields, text = BAD[which]
    with pytest.raises(ConfigError, match=text) as caught:
        LoraConfig(**fields)
    assert isinstance(caught.value, ValueError)
    assert caught.value.field is not None and caught.value.field.partition("[")[0] in fields


def test_an_unknown_field_is_an_error_of_python() -> None:
    with pytest.raises(TypeError, match="lora_rank"):
        LoraConfig(lora_rank=8)


@pytest.mark.parametrize(
    "fields", [{"r": 1}, {"lora_dropout": 0}, {"lora_dropout": 0.999}, {"lora_alpha": 0.5}, {"lora_alpha": -8}]
)
def test_what_is_allowed(fields: dict[str, Any]) -> None:
    """The config accepts any scale; attaching and loading check it, and that check can be overridden."""
    LoraConfig(**fields)


ASKING = {
    "layer_replication": [(0, 2)], "target_parameters": ["w"], "trainable_token_indices": [1], "loftq_config": LoftQConfig(),
    "alora_invocation_tokens": [1], "megatron_config": {"x": 1}, "eva_config": {}, "corda_config": {}, "lora_ga_config": {},
    "velora_config": {}, "monteclora_config": {}, "use_bdlora": {}, "arrow_config": {}, "kasa_config": {},
}  # fmt: skip
WITH = {"loftq_config": {"init_lora_weights": "loftq"}, "alora_invocation_tokens": {"task_type": "CAUSAL_LM"}}
WITH |= {f"{name}_config": {"init_lora_weights": name} for name in ("eva", "corda", "lora_ga")}


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_is_known_but_not_built_is_a_config_and_refused_where_it_is_used(name: str) -> None:
    config = LoraConfig(**{name: ASKING.get(name, True)}, **WITH.get(name, {}))
    with pytest.raises(NotYetSupported, match=f"{name} is .*not supported yet; use"):
        check_built(config)
    check_built(LoraConfig(**{name: NOT_BUILT[name]}))
    check_built(LoraConfig(**{name: None}))


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
    assert read == config
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
    config, ignored = read_config(
        write(tmp_path, r=4, peft_type="LORA", zzz=1, future_thing={"a": 1}, megatron_core="x")
    )
    assert config.r == 4 and ignored == ["future_thing", "zzz"]


def test_an_old_file_without_most_fields(tmp_path: Path) -> None:
    config, _ = read_config(write(tmp_path, r=4, target_modules=["q"]))
    assert config.lora_alpha == 8 and config.target_modules == {"q"}


@pytest.mark.parametrize("name", ["loftq_config", "eva_config", "corda_config", "trainable_token_indices"])
def test_null_and_empty_ask_for_nothing(name: str, tmp_path: Path) -> None:
    for nothing in (None, {} if name == "loftq_config" else None):
        read_config(write(tmp_path, **{name: nothing}))


def test_errors_of_a_file_name_it(tmp_path: Path) -> None:
    for values, error, text in (
        ({"r": 0}, AdapterFileError, "r is 0"),
        ({"megatron_config": {"x": 1}}, NotYetSupported, "megatron_config"),
        ({"peft_type": "IA3"}, AdapterFileError, "peft_type is 'IA3'; only LORA"),
    ):
        with pytest.raises(error, match=f"{CONFIG_FILE}: .*{text}") as caught:
            read_config(write(tmp_path, **values))
        assert caught.value.where == str(tmp_path / CONFIG_FILE) and caught.value.field in values
    with pytest.raises(AdapterFileError, match=r"nowhere: .*not found") as caught:
        read_config(tmp_path / "nowhere")
    assert caught.value.where == str(tmp_path / "nowhere")


TEXT, NUMBER, LIST, TABLE = "a word", 7.5, [[0]], {"a": [1]}
WRONG: dict[str, tuple[Any, ...]] = {
    "task_type": (NUMBER, LIST, TABLE), "peft_type": (NUMBER, LIST, TABLE, None), "auto_mapping": (NUMBER, TEXT, LIST),
    "peft_version": (NUMBER, LIST, TABLE, True), "base_model_name_or_path": (NUMBER, LIST, TABLE, True),
    "revision": (NUMBER, LIST, TABLE), "inference_mode": (NUMBER, 1, TEXT, LIST, TABLE),
    "r": (NUMBER, TEXT, LIST, TABLE, None, True), "target_modules": (NUMBER, True, LIST, TABLE, [1], [""], ""),
    "exclude_modules": (NUMBER, True, LIST, TABLE, [None]), "lora_alpha": (TEXT, LIST, TABLE, None, True),
    "lora_dropout": (TEXT, LIST, TABLE, None, True, NUMBER), "fan_in_fan_out": (NUMBER, 1, TEXT, LIST, TABLE),
    "bias": (NUMBER, TEXT, LIST, TABLE, None, True), "use_rslora": (NUMBER, 1, "no", LIST, TABLE),
    "modules_to_save": (NUMBER, TEXT, LIST, TABLE, True), "init_lora_weights": (NUMBER, LIST, TABLE),
    "layers_to_transform": (NUMBER, TEXT, LIST, TABLE, True, ["1"], [1.5]),
    "layers_pattern": (NUMBER, LIST, TABLE, True), "rank_pattern": (NUMBER, TEXT, LIST, TABLE, {"": 1}, {"a": "1"}),
    "alpha_pattern": (NUMBER, TEXT, LIST, TABLE, {"a": "1"}, {"a": None}), "megatron_config": (NUMBER, TEXT, LIST),
    "trainable_token_indices": (NUMBER, TEXT, LIST, {"a": 1}, {"a": ["b"]}, [1.5], True),
    "loftq_config": (NUMBER, TEXT, LIST), "eva_config": (NUMBER, TEXT, LIST, {"rho": TEXT}, {"use_label_mask": 1}),
    "corda_config": (NUMBER, TEXT, LIST, {"verbose": TEXT}, {"cache_file": 1}),
    "lora_ga_config": (NUMBER, TEXT, LIST, {"stable_gamma": TEXT}, {"scale": 1}), "use_dora": (NUMBER, 1, TEXT, LIST, TABLE),
    "velora_config": (NUMBER, TEXT, LIST, {"num_groups": TEXT}), "alora_invocation_tokens": (NUMBER, TEXT, LIST, TABLE, ["a"]),
    "use_qalora": (NUMBER, TEXT, LIST, TABLE), "qalora_group_size": (0, TEXT, LIST, TABLE, 1.5),
    "monteclora_config": (NUMBER, TEXT, LIST, {"buffer_size": None}),
    "layer_replication": (NUMBER, TEXT, [[0]], [["a", 1]], [[0, 1, 2]], [0, 1], [[0, 1.5]], TABLE, [[0, True]], ["ab"]),
    "lora_bias": (NUMBER, 1, TEXT, LIST, TABLE), "target_parameters": (NUMBER, TEXT, LIST, TABLE, True),
    "use_bdlora": (NUMBER, TEXT, LIST, {"target_modules_bd_a": 1}, {"nblocks": TEXT}),
    "arrow_config": (NUMBER, TEXT, LIST, {"top_k": TEXT}), "kasa_config": (NUMBER, TEXT, LIST, {"beta": TEXT}),
    "ensure_weight_tying": (NUMBER, 1, TEXT, LIST, TABLE), "use_lora_xs": (NUMBER, 1, TEXT, LIST, TABLE),
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_a_value_of_a_wrong_type_in_a_file(field: str, tmp_path: Path) -> None:
    """Each error names the file, the field and the value found; none is an error of Python."""
    for value in WRONG[field]:
        content = {"peft_type": "LORA", "r": 4, "target_modules": ["q"], field: value}
        (tmp_path / CONFIG_FILE).write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(AdapterFileError) as caught:
            read_config(tmp_path)
        said = str(caught.value).replace("`", "").replace("task type", "task_type")
        assert str(tmp_path / CONFIG_FILE) in said
        assert field in said
        assert any(repr(part) in said for part in (value, *(value if isinstance(value, list) else ()), *_inside(value)))
        if field != "peft_type":
            with pytest.raises(ConfigError):
                LoraConfig(**content)


def _inside(value: Any) -> list[Any]:
    return [part for pair in value.items() for part in pair] if isinstance(value, dict) else []


def test_every_field_is_in_the_table_of_wrong_types() -> None:
    without_meaning = {"megatron_core", "runtime_config"}
    assert {field.name for field in dataclasses.fields(LoraConfig)} - without_meaning == set(WRONG)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            {"layer_replication": [[0]]},
            r"layer_replication is \[\[0\]\]; it must be a list of lists of 2 integers, or None",
        ),
        ({"use_rslora": "no"}, "use_rslora is 'no'; it must be true or false"),
        ({"layers_to_transform": "1"}, "is '1'; it must be a list of integers, or an integer, or None"),
        ({"trainable_token_indices": 3}, "a list of integers, or a dict of lists of integers, or None"),
        ({"eva_config": {"rho": "2"}}, "eva_config: rho is '2'; it must be a number"),
        ({"velora_config": 3}, "velora_config is 3; it must be a `VeloraConfig`, a dict, or None"),
    ],
    ids=str,
)
def test_what_a_type_should_be(value: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigTypeError, match=text):
        LoraConfig(**value)


def test_other_sequences_and_subclasses() -> None:
    @dataclasses.dataclass
    class Own(LoraConfig):
        more: Unknown = None  # type: ignore[name-defined] # noqa: F821

    config = Own(layers_to_transform=range(2), target_modules=("a",), layer_replication=((0, 2), [1, 2]))
    assert config.more is None
    assert LoraConfig(base_model_name_or_path=Path("x"), layers_to_transform=(1, 2)).r == 8
    with pytest.raises(ConfigTypeError, match="use_dora is 1; it must be true or false"):
        Own(use_dora=1)


def test_programs_that_hold_several_methods_may_ask() -> None:
    config = LoraConfig()
    assert config.is_prompt_learning is False and config.is_adaption_prompt is False
    assert config.to_dict()["r"] == 8


PEFTS = {"monteclora_config": {"num_samples": 2}, "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 2}}
PEFTS |= {"eva_config": {"rho": 1.5}, "corda_config": {"corda_method": "kpm"}, "kasa_config": {"beta": 0.5}}
PEFTS |= {"lora_ga_config": {"scale": "unit"}, "velora_config": {"num_groups": 8}}


@pytest.mark.filterwarnings("ignore:`.*` specified but will be ignored")
@pytest.mark.parametrize("name", PEFTS)
def test_a_nested_config_comes_back_as_its_class(name: str, tmp_path: Path) -> None:
    config = LoraConfig(**{name: PEFTS[name]})
    config.save_pretrained(tmp_path)
    read = LoraConfig.from_pretrained(tmp_path)
    assert read == config and type(getattr(read, name)).__name__.endswith("Config")
    with pytest.raises(ConfigTypeError, match=f"{name} is 3.*a dict, or None"):
        LoraConfig(**{name: 3})


@pytest.mark.parametrize("targets", [[], ""])
def test_no_modules_are_targeted_if_only_parameters_are(targets: list[str] | str) -> None:
    config = LoraConfig(target_modules=targets, target_parameters=["experts.down_proj"])
    assert config.target_modules == set()
    with pytest.raises(ConfigError, match="target_modules is ''"):
        LoraConfig(target_modules="")


def test_an_error_in_a_nested_config_names_field_and_allowed_values() -> None:
    with pytest.raises(ConfigError) as caught:
        LoraConfig(init_lora_weights="eva", eva_config={"rho": 0.5})
    assert (caught.value.field, caught.value.what) == ("eva_config.rho", "0.5")
    with pytest.raises(ConfigError) as caught:
        LoraConfig(bias="some")
    assert (caught.value.what, caught.value.allowed) == ("some", ("none", "all", "lora_only"))
    with pytest.raises(ConfigError) as caught:
        LoraConfig(task_type="CAUSAL")
    assert caught.value.what == "CAUSAL" and "CAUSAL_LM" in caught.value.allowed


def test_the_fields_their_defaults_and_json_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    ours, theirs = dataclasses.fields(LoraConfig), dataclasses.fields(peft.LoraConfig)
    assert [f.name for f in ours if f.name not in NOT_IN_PEFT] == [f.name for f in theirs]
    assert {**LoraConfig().as_json(), "peft_version": None} == {**peft.LoraConfig().to_dict(), "peft_version": None}
    assert [member.value for member in PeftType] == [member.value for member in peft.PeftType]
    for part in PARTS.values():
        other = getattr(peft.tuners.lora.config, part.__name__)
        assert dataclasses.asdict(part()) == dataclasses.asdict(other())


REFUSED = {
    "loftq without settings": ({"init_lora_weights": "loftq"}, "`loftq_config` must be specified when"),
    "dora of megatron": ({"use_dora": True, "megatron_config": {"a": 1}}, "DoRA does not support megatron_core"),
    "a bias of B with an init": ({"lora_bias": True, "init_lora_weights": "olora"}, "lora_bias=True is only supported with"),
    "a bias of B with DoRA": ({"lora_bias": True, "use_dora": True}, "lora_bias=True is not supported for DoRA"),
    "rho": ({"eva_config": {"rho": 0.5}, "init_lora_weights": "eva"}, "`rho` must be >= 1.0"),
    "a method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is supported"),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_fields_that_exclude_each_other(which: str) -> None:
    fields, text = REFUSED[which]
    with pytest.raises(ConfigError, match=text) as caught:
        LoraConfig(**fields)
    assert (caught.value.field or "").rpartition(".")[2] in (*fields, "loftq_config", "rho")
    with pytest.raises(TypeError, match="`target_parameters` must be a list of strings or None"):
        LoraConfig(target_parameters="w")


def test_settings_without_their_init_are_said() -> None:
    with pytest.warns(UserWarning, match="`loftq_config` specified but will be ignored"):
        assert LoraConfig(loftq_config=LoftQConfig()).loftq_config == {}
    with pytest.warns(UserWarning, match="`eva_config` is not specified. Using default EVA config"):
        assert LoraConfig(init_lora_weights="eva").eva_config is not None
    with pytest.warns(UserWarning, match="aLoRA is currently only supported for CAUSAL_LM"):
        LoraConfig(alora_invocation_tokens=[1])
    LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=8))


def test_a_key_of_a_newer_version_is_kept_and_named(tmp_path: Path) -> None:
    write(tmp_path, peft_type="LORA", r=3, zzz={"a": 1})
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['zzz'\] for class LoraConfig"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is LoraConfig and config.r == 3 and "zzz" not in config.to_dict()
    config.with_fields(r=4).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG_FILE).read_text())["zzz"] == {"a": 1}
    with pytest.raises(TypeError, match=r"The LoraConfig config .* is missing required keys: \{'peft_type'\}"):
        LoraConfig.from_pretrained(write(tmp_path, foo="bar"))
    with pytest.raises(ConfigError, match="peft_type is 'IA3'"):
        PeftConfig.from_pretrained(write(tmp_path, peft_type="IA3"))
    with pytest.raises(ValueError, match=f"Can't find '{CONFIG_FILE}' at"):
        PeftConfig.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [("use_new", True, True), ("use_new", False, False), ("new_config", {"a": 1}, True), ("new_config", {}, False),
     ("init_new", "x", True), ("lora_new", 2, True), ("lora_new", None, False), ("note", "x", False)],
)  # fmt: skip
def test_a_key_of_a_newer_version_is_refused_where_it_changes_what_is_computed(
    key: str, value: Any, refused: bool, tmp_path: Path
) -> None:
    write(tmp_path, **{key: value})
    if refused:
        with pytest.raises(NotYetSupported, match=f"{key} is .* another PEFT version"):
            read_config(tmp_path)
    else:
        assert read_config(tmp_path)[1] == [key]


def test_settings_of_a_process_are_not_written(tmp_path: Path) -> None:
    config = LoraConfig(runtime_config={"ephemeral_gpu_offload": True})
    assert config.runtime_config.ephemeral_gpu_offload and "runtime_config" not in config.to_dict()
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    with pytest.warns(UserWarning, match="`runtime_config` key. This is ignored"):
        read = LoraConfig.from_pretrained(write(tmp_path, **values, runtime_config={"ephemeral_gpu_offload": True}))
    assert not read.runtime_config.ephemeral_gpu_offload


def test_a_copy_with_other_fields_shares_nothing_and_says_nothing_again() -> None:
    with pytest.warns(UserWarning):
        config = LoraConfig(rank_pattern={"q": 2}, alora_invocation_tokens=[1])
    twin = config.with_fields(r=3)
    twin.rank_pattern["v"] = 1
    assert config.rank_pattern == {"q": 2} and config.r == 8 and twin.r == 3


def test_numbers_and_ranges_of_other_libraries_are_made_plain(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "r": np.int64(4),
        "lora_alpha": np.float32(8),
        "rank_pattern": {"q": np.int32(3)},
        "layers_to_transform": range(3),
        "trainable_token_indices": {"e": np.arange(2)},
        "modules_to_save": (name for name in ("head",)),
        "target_parameters": (name for name in ("experts.up",)),
    }
    LoraConfig(target_modules=["q"], **given).save_pretrained(tmp_path)
    held = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {name: held[name] for name in given} == {
        "r": 4,
        "lora_alpha": 8.0,
        "rank_pattern": {"q": 3},
        "layers_to_transform": [0, 1, 2],
        "trainable_token_indices": {"e": [0, 1]},
        "modules_to_save": ["head"],
        "target_parameters": ["experts.up"],
    }
    assert LoraConfig.from_pretrained(tmp_path).layers_to_transform == [0, 1, 2]


def test_a_gamma_may_be_any_number() -> None:
    config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config={"stable_gamma": 16.5})
    assert config.lora_ga_config is not None and config.lora_ga_config.stable_gamma == 16.5
