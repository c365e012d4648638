"""Convert configs and tensors of adapters that were made under transformers 4, where each expert was a module.

The sites, the factors and the checks are those of `lorakit.core.attachment.old_experts`. This module offers them under
PEFT's names, and as rules for transformers' own loader (`model.load_adapter`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from lorakit.architectures.layouts import DOWN, FUSED
from lorakit.config import LoraConfig, PeftType
from lorakit.core.attachment.old_experts import fused_A, fused_B, tensors_with_fused_experts
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.target_weights import bare_parameters, model_type_of
from lorakit.errors import NotYetSupported
from lorakit.peft import model_adapters
from lorakit.targets.experts import with_current_names

if TYPE_CHECKING:
    from lorakit.hub.loader_extensions import Rule

TARGETS = ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern")
"""Fields of a config that change if experts of transformers 4 are fused."""


def convert_peft_config_for_transformers(
    peft_config: LoraConfig, model: nn.Module, conversions: Sequence[Rule] | None = None
) -> None:
    """Replace the names that transformers 4 used for experts and routers in a config by the current ones, in place.

    Args:
        peft_config: The config; it is changed. Other methods' configs are left as they are.
        model: The base model; models without fused experts leave the config as it is.
        conversions: Ignored; the names follow from the model's type.

    Raises:
        ConfigError: Only one of the parts of a fused parameter is named, or only some experts.
        TargetError: The config names an expert that does not exist.
    """
    if peft_config.peft_type != PeftType.LORA:
        return
    index = AdapterIndex.of(model_adapters.user_model(model))
    parameters = bare_parameters(index)
    converted = with_current_names(peft_config, model_type_of(index.model), index.candidates, parameters)
    for field in TARGETS:
        setattr(peft_config, field, getattr(converted, field))


def convert_peft_adapter_state_dict_for_transformers(
    model: nn.Module, peft_config: LoraConfig, adapter_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> Mapping[str, Tensor]:
    """Return an adapter's tensors with the separate experts of transformers 4 fused.

    With rsLoRA, B is divided by √parts, so that the updates are those of the separate experts; see `fused_B`.

    Raises:
        AdapterFileError: Experts or parts are missing, or have different scales.
        ShapeMismatchError: The experts of a layer have tensors of different shapes.
    """
    if peft_config.peft_type != PeftType.LORA:
        return adapter_state_dict
    label = f"state dict of adapter {adapter_name!r}"
    return tensors_with_fused_experts(adapter_state_dict, peft_config, model_adapters.user_model(model), label)


def get_model_conversion_mapping(model: nn.Module) -> list[Rule]:
    """Return the rules that transformers applies to the weight files of a base model."""
    from lorakit.hub.loader_extensions import rules_of

    return rules_of(model)


def build_peft_weight_mapping(
    weight_conversions: Iterable[Rule] | None, adapter_name: str, peft_config: LoraConfig | None = None
) -> list[Rule]:
    """Return rules with which transformers' loader reads an adapter's tensors.

    The rules add the adapter's name, rename tensors as those of the base, and fuse separate experts.

    Args:
        weight_conversions: The rules for the base's tensors; without any, the result is empty.
        adapter_name: Name of the adapter.
        peft_config: The adapter's config, with its targets as in the file; None if unknown.

    Raises:
        NotYetSupported: The adapter targets modules, other than experts, that transformers now fuses; or its ranks or
            alphas differ between parts of a fused parameter.
    """
    if not weight_conversions:
        return []
    from lorakit.hub.loader_extensions import is_renaming, renaming

    prefixes = (("base_model.model.model.", "model."), ("base_model.model.", ""))
    found = [renaming(*pair) for pair in (*prefixes, (r"(lora_[^\.]*)", rf"\1.{adapter_name}"))]
    rules: list[Rule] = list(found)
    given = list(weight_conversions)
    outer = {name for rule in given if not is_renaming(rule) and _fuses(rule, DOWN) for name in _old_names(rule)}
    for rule in given:
        if is_renaming(rule):
            rules.append(rule)
        elif _fuses(rule, FUSED) or _fuses(rule, DOWN):
            rules += _rules_of_experts(rule, adapter_name, peft_config, outer)
        elif _names_any(peft_config, _old_names(rule)):
            names = ", ".join(sorted(_old_names(rule)))
            text = f"Factors of {names}, which transformers fuses now, cannot be fused. Use an older transformers."
            raise NotYetSupported(text, what=min(_old_names(rule)), field="target_modules")
    return rules


def _fuses(rule: Rule, parameter: str) -> bool:
    """Return whether a rule stacks the weights of separate experts in a parameter of the given name."""
    targets = [target.rpartition(".")[2] for target in rule.target_patterns]
    return targets == [parameter] and all("*." in source for source in rule.source_patterns)


def _old_names(rule: Rule) -> set[str]:
    """Return the last word of each module path whose tensors a rule joins."""
    return {source.removesuffix(".weight").rpartition(".")[2] for source in rule.source_patterns}


def _rules_of_experts(rule: Rule, adapter: str, config: LoraConfig | None, outer: set[str]) -> Iterator[Rule]:
    """Yield the rules for A and B of a fused parameter."""
    from lorakit.hub.loader_extensions import joining

    _check_alike(config, _old_names(rule))
    owner, _, parameter = rule.target_patterns[0].rpartition(".")
    inside = ".base_layer" if parameter == FUSED and _names_any(config, outer) else ""
    sources = [source.removesuffix(".weight") for source in rule.source_patterns]
    use_rslora = config is not None and config.use_rslora
    for part, join in (("lora_A", fused_A), ("lora_B", partial(fused_B, use_rslora=use_rslora))):
        ending = f".{part}.{adapter}.weight"
        yield joining([source + ending for source in sources], f"{owner}{inside}{ending}", join, rule)


def _check_alike(config: LoraConfig | None, names: set[str]) -> None:
    """Check that all parts of a fused parameter have the rank and alpha of the config."""
    targets = None if config is None else config.target_modules
    is_named = isinstance(targets, str) or not names.isdisjoint(targets or ())
    for field in ("rank_pattern", "alpha_pattern") if is_named and len(names) > 1 else ():
        key = next((key for key in getattr(config, field) if key.rpartition(".")[2] in names), None)
        if key is not None:
            text = f"{field} has an entry for {key}, a part of a fused parameter. Use PeftModel.from_pretrained."
            raise NotYetSupported(text, what=key, field=field)


def _names_any(config: LoraConfig | None, names: set[str]) -> bool:
    """Return whether a config may target modules with the given names; a regular expression may match any module."""
    if config is None or isinstance(config.target_modules, str):
        return True
    return not names.isdisjoint(target.rpartition(".")[2] for target in config.target_modules or ())
