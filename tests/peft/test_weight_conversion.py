"""`peft.utils.transformers_weight_conversion`: configs, tensors and rules for transformers' loader, as in peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit.peft as ours
from lorakit.errors import ConfigError, NotYetSupported
from lorakit.peft.utils import transformers_weight_conversion as conversion

from .experts import BY_KIND, FAMILIES, Family, each, loss_and_logits, old_tensors, quiet, theirs, write_old

of_peft = pytest.importorskip("peft.utils.transformers_weight_conversion")

MIXTRAL, QWEN = BY_KIND["mixtral"], BY_KIND["qwen3_moe"]
OLD = tuple(family for family in FAMILIES if family.old)
FIELDS = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")


def converted(library: Any, model: nn.Module, **fields: Any) -> dict[str, Any]:
    """Return the fields of a config after a library converted them in place; lists and sets as sets."""
    config = library.LoraConfig(r=2, lora_alpha=6, **fields)
    module = conversion if library is ours else of_peft
    assert module.convert_peft_config_for_transformers(config, model, conversions=None) is None
    found = {field: getattr(config, field) for field in FIELDS}
    return {field: set(value) if isinstance(value, list) else value for field, value in found.items()}


@pytest.mark.parametrize("family", each(OLD))
def test_a_config_with_old_names(family: Family) -> None:
    model = family.model()
    for fields in ({"target_modules": ["q_proj", *family.old]}, {"target_modules": [family.old[0], *family.old[1:3]]}):
        assert converted(ours, model, **fields) == converted(theirs, model, **fields)


@pytest.mark.parametrize("fields", [{"target_modules": ["q_proj"]}, {"target_modules": r".*\.q_proj"}], ids=str)
def test_a_config_with_nothing_to_convert_stays_as_it_is(fields: dict[str, Any]) -> None:
    for model in (BY_KIND["gpt_oss"].model(), nn.Sequential(nn.Linear(2, 2))):
        found = converted(ours, model, **fields)
        wanted = fields["target_modules"]
        assert found["target_modules"] == (wanted if isinstance(wanted, str) else set(wanted))
        assert not found["target_parameters"] and not found["rank_pattern"]


def test_half_of_a_fused_parameter_is_a_value_error_and_changes_nothing() -> None:
    config, model = ours.LoraConfig(target_modules=["w1", "w2"]), MIXTRAL.model()
    with pytest.raises(ConfigError, match="w3"):
        conversion.convert_peft_config_for_transformers(config, model, None)
    assert config.target_modules == {"w1", "w2"} and config.target_parameters is None


@pytest.mark.parametrize("family", each(OLD))
def test_tensors_of_separate_experts(family: Family) -> None:
    model, found = family.model(), []
    for library, module in ((theirs, of_peft), (ours, conversion)):
        config = library.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", *family.old])
        module.convert_peft_config_for_transformers(config, model, None)
        found.append(module.convert_peft_adapter_state_dict_for_transformers(model, config, old_tensors(family)))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def read_by_transformers(model: Any, config: Any, tensors: dict[str, Tensor]) -> Any:
    """Load an adapter as transformers' `load_adapter` does, with the rules of lorakit; return what was loaded."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    rules = conversion.build_peft_weight_mapping(get_model_conversion_mapping(model), "default", peft_config=config)
    ours.inject_adapter_in_model(config, model, "default")
    load_config = LoadStateDictConfig(pretrained_model_name_or_path=None, weight_mapping=rules, device_map={"": "cpu"})
    expected = [name for name, _ in model.named_parameters() if "lora" in name]
    with quiet():
        info, _ = model._load_pretrained_model(
            model=model, state_dict=tensors, checkpoint_files=[], load_config=load_config, expected_keys=expected
        )
    missing = {name for name in info.missing_keys if "lora_" in name}
    assert not missing and not info.unexpected_keys and not info.mismatched_keys
    return model.eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", each(OLD))
def test_rules_for_transformers_loader(family: Family, rslora: bool, tmp_path: Path) -> None:
    if rslora and family not in (MIXTRAL, QWEN):
        pytest.skip("two families suffice")
    fields = {"target_modules": ["q_proj", *family.old], "use_rslora": rslora}
    config = ours.LoraConfig(r=2, lora_alpha=6, **fields)
    with quiet():
        model = read_by_transformers(family.model(), config, old_tensors(family))
        expected = ours.PeftModel.from_pretrained(family.model(), write_old(tmp_path, old_tensors(family), **fields))
    for found, wanted in zip(loss_and_logits(model), loss_and_logits(expected.eval()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_rules_if_only_one_parameter_is_targeted(tmp_path: Path) -> None:
    tensors = {n: t for n, t in old_tensors(MIXTRAL).items() if ".w2." not in n and "q_proj" not in n}
    fields = {"target_modules": ["w1", "w3", "gate"]}
    with quiet():
        model = read_by_transformers(MIXTRAL.model(), ours.LoraConfig(r=2, lora_alpha=6, **fields), tensors)
        expected = ours.PeftModel.from_pretrained(MIXTRAL.model(), write_old(tmp_path, tensors, **fields)).eval()
    torch.testing.assert_close(loss_and_logits(model)[1], loss_and_logits(expected)[1], rtol=1e-5, atol=1e-5)


def test_what_the_rules_cannot_do_is_an_error() -> None:
    rules = conversion.get_model_conversion_mapping(MIXTRAL.model())
    for field in ("rank_pattern", "alpha_pattern"):
        config = ours.LoraConfig(target_modules=["w1", "w2", "w3"], **{field: {"w1": 4}})
        with pytest.raises(NotYetSupported) as caught:
            conversion.build_peft_weight_mapping(rules, "default", config)
        assert (caught.value.what, caught.value.field) == ("w1", field)
        current = ours.LoraConfig(target_modules=["q_proj"], target_parameters=["down_proj"], **{field: {"w2": 4}})
        assert conversion.build_peft_weight_mapping(rules, "default", current)
    assert conversion.build_peft_weight_mapping([], "default") == []
    assert conversion.build_peft_weight_mapping(None, "default") == []


def test_without_experts_the_rules_are_those_of_peft() -> None:
    rules = [
        rule for rule in conversion.get_model_conversion_mapping(MIXTRAL.model()) if not hasattr(rule, "operations")
    ]
    found = conversion.build_peft_weight_mapping(rules, "mine", ours.LoraConfig())
    expected = of_peft.build_peft_weight_mapping(rules, "mine", theirs.LoraConfig())
    shown = [[(rule.source_patterns, rule.target_patterns) for rule in some] for some in (found, expected)]
    assert shown[0] == shown[1]
