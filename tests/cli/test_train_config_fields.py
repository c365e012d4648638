"""Every field of `LoraConfig` is a setting of `lorakit train`, and a run that uses them resumes with the same bits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorakit import cli
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError
from lorakit.train import TrainSettings
from lorakit.train.settings.defaults import DEFAULTS

Train = Callable[..., int]

NOT_SETTINGS = {
    # what a run determines itself
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "runtime_config",
    # not supported by lorakit at all
    "megatron_config", "megatron_core",
    # a router is not trained
    "arrow_config",
    # changes the quantized base, which a run does not save
    "loftq_config",
}  # fmt: skip


def settings(**fields: Any) -> TrainSettings:
    return TrainSettings(model="m", data="d.txt", output_dir="o", **fields)


def test_every_other_field_is_a_setting() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} - NOT_SETTINGS <= set(DEFAULTS)


def test_settings_reach_the_config() -> None:
    config = settings(
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["v_proj"],
        modules_to_save="lm_head",
        layers_to_transform=[0],
        rank_pattern=["q_proj=4"],
        alpha_pattern={"q_proj": 2.5},
        bias="lora_only",
        lora_bias=True,
        layer_replication=["0:2", "1:3"],
        kasa_config='{"beta": 0.5}',
    ).lora_config()
    assert config.exclude_modules == {"v_proj"} and config.modules_to_save == ["lm_head"]
    assert config.layers_to_transform == [0] and config.layer_replication == [[0, 2], [1, 3]]
    assert (config.rank_pattern, config.alpha_pattern) == ({"q_proj": 4}, {"q_proj": 2.5})
    assert (config.bias, config.lora_bias) == ("lora_only", True)
    assert config.kasa_config is not None and config.kasa_config.beta == 0.5


def test_parameters_alone_are_the_targets_unless_modules_are_given_too() -> None:
    assert settings(target_parameters=["mlp.down"]).lora_config().target_modules is None
    both = settings(target_parameters=["mlp.down"], target_modules=["q_proj"]).lora_config()
    assert both.target_modules == {"q_proj"} and both.target_parameters == ["mlp.down"]
    again = TrainSettings(**settings(target_parameters=["mlp.down"]).as_dict())
    assert again.target_modules is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": ["q_proj"]}, "each entry must be PATTERN=NUMBER"),
        ({"layer_replication": ["2"]}, "each range must be FIRST:END"),
        ({"kasa_config": "beta=1"}, "it must be a JSON object"),
        ({"bias": "some"}, "it must be 'none', 'all' or 'lora_only'"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform"),
    ],
)
def test_wrong_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**fields).lora_config()


@pytest.fixture
def train(tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    rows = [{"prompt": f"what is {n} plus {n}? ", "completion": f"{2 * n} of course"} for n in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(folder: str, steps: int, *more: str) -> int:
        flags = ["--model", tiny_model_directory, "--data", data, "--output-dir", tmp_path / folder, "--max-length", 64]
        words = ["train", *map(str, flags), "--device", "cpu", "--dtype", "float32", "--eval-fraction", "0"]
        return cli.main([*words, "--r", "2", "--batch-size", "2", "--max-steps", str(steps), "--lr", "0.01", *more])

    return call


FIELDS = {
    "saved modules, biases and patterns": [
        *("--target-modules", "q_proj", "down_proj", "--rank-pattern", "down_proj=3", "--alpha-pattern", "down_proj=5"),
        *("--modules-to-save", "lm_head", "--bias", "all", "--layers-to-transform", "1"),
    ],
    "aLoRA": ["--target-modules", "q_proj", "--alora-invocation-tokens", "{ids}"],
    "KaSA": ["--target-modules", "q_proj", "--kasa-config", '{"beta": 0.01}'],
    "VeLoRA": ["--velora-config", '{"num_groups": 4, "init_type": "batch_average_once"}'],
    "LoRA-XS": ["--target-modules", "q_proj", "--use-lora-xs"],
    "MonteCLoRA": ["--target-modules", "q_proj", "--monteclora-config", '{"num_samples": 2, "kl_loss_weight": 0.01}'],
}


@pytest.mark.costly
@pytest.mark.parametrize("case", FIELDS)
def test_a_run_resumes_with_the_same_bits(case: str, train: Train, tmp_path: Path, tiny_tokenizer: Any) -> None:
    ids = [str(token) for token in tiny_tokenizer(" plus", add_special_tokens=False)["input_ids"]]
    words = [word for given in FIELDS[case] for word in (ids if given == "{ids}" else [given])]
    assert train("whole", 4, *words) == 0
    assert train("parts", 2, *words) == 0
    assert train("parts", 4, "--resume") == 0
    found, wanted = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("parts", "whole")
    )
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)
    config = json.loads((tmp_path / "whole" / "adapter" / "adapter_config.json").read_text())
    if case == "aLoRA":
        assert config["alora_invocation_tokens"] == list(map(int, ids))
    elif case == "KaSA":
        assert config["kasa_config"]["beta"] == 0.01
    elif case == "LoRA-XS":
        assert config["use_lora_xs"] and all(tensor.any() for tensor in wanted.values())
    elif case == "VeLoRA":
        assert config["velora_config"]["num_groups"] == 4
        assert all(tensor.any() for name, tensor in wanted.items() if "velora" in name)
    elif case == "MonteCLoRA":
        assert config["monteclora_config"]["num_samples"] == 2
        assert sum("monteclora" in name for name in wanted) == 4 * sum("lora_A" in name for name in wanted)
    else:
        assert config["modules_to_save"] == ["lm_head"] and config["bias"] == "all"
        assert any("lm_head" in name for name in wanted) and not any("layers.0." in name for name in wanted)
        assert wanted["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape[0] == 3
