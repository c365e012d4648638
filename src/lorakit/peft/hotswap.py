"""Hot swapping: replacing the values of one adapter with those of another without changing any modules. So that a
compiled model is not recompiled, factors are zero-padded to the largest rank, and scales become tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig, PeftConfig, PeftType, scale
from lorakit.config.types import Value
from lorakit.core.attachment.old_experts import with_fused_experts
from lorakit.core.files.adapter_folder import read_adapter
from lorakit.core.files.tensors import plain_path
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.checks import ALLOWANCES
from lorakit.core.model.index import COMPILED, AdapterIndex, layers, without_wrappers
from lorakit.errors import ConfigError, MergeError, warn_caller
from lorakit.peft import model_adapters
from lorakit.peft.loaded import adapter_folder, check_options, warn_of_problems
from lorakit.peft.state_dicts import WRAPPED, StateDictError, tensors_of
from lorakit.targets.patterns import first_match

if TYPE_CHECKING:
    from lorakit.peft.model import PeftModel


CONFIG_KEYS_TO_CHECK: dict[PeftType, list[str]] = {
    PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]
}
"""Config fields that must be the same for both adapters, since swapping tensors does not change them."""


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Check that two configs differ only in ways that a hot swap can handle.

    Raises:
        ConfigError: The configs differ in a field that must be the same, or are not those of a LoRA adapter.
    """
    if config0.peft_type != config1.peft_type:
        text = f"Incompatible PEFT types found: {config0.peft_type} and {config1.peft_type}"
        raise ConfigError(text, what=config1.peft_type, field="peft_type")
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        text = f"Only adapters of type {', '.join(CONFIG_KEYS_TO_CHECK)} can be swapped, not {config0.peft_type}."
        raise ConfigError(text, what=config0.peft_type, field="peft_type", allowed=CONFIG_KEYS_TO_CHECK)
    for key in CONFIG_KEYS_TO_CHECK[PeftType(config0.peft_type)]:
        first, second = getattr(config0, key, None), getattr(config1, key, None)
        if first != second:
            raise ConfigError(f"Configs are incompatible: for {key}, {first} != {second}", what=second, field=key)


def hotswap_adapter(
    model: PeftModel, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Value
) -> None:
    """Replace an adapter's values, on their device, with those of a saved one; `kwargs` are those of `HubOptions`.

    Raises:
        AdapterFileError: Files are missing or damaged, or contain NaN or infinite values.
        ConfigError: The configs are incompatible.
        StateDictError: A tensor does not match the model.
        MergeError: The adapter is merged.
    """
    folder = adapter_folder(model_name_or_path, kwargs)
    check_options("hotswap_adapter", kwargs)
    user = model_adapters.user_model(getattr(model, COMPILED, model))
    files = with_fused_experts(read_adapter(folder), AdapterIndex.of(user))
    check_hotswap_configs_compatible(model.active_peft_config, files.config)
    warn_of_problems(user, files, ALLOWANCES)
    named = {in_memory_name(key, adapter_name): tensor for key, tensor in files.file.tensors.items()}
    hotswap_adapter_from_state_dict(model, named, adapter_name, files.config)


def in_memory_name(key: str, adapter_name: str) -> str:
    """Convert a factor's name on disk to its name in memory, which contains the adapter's name."""
    return re.sub(r"(.*lora_[^.]*)", rf"\1.{adapter_name}", key, count=1)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    adapter_name: str,
    config: LoraConfig,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace an adapter's tensors (any shape) by name in memory; missing ones are zero. An error changes nothing.

    Raises:
        StateDictError: A tensor does not match the model.
        MergeError: The adapter is merged.
    """
    if adapter_name in AdapterIndex.of(model).merged_adapters():
        text = f"Adapter '{adapter_name}' is currently merged into the base weights. Unmerge it before hot-swapping it."
        raise MergeError(text, what=adapter_name)
    prefix = f".{parameter_prefix}"
    targets = {without_wrappers(key): tensor for _, key, tensor in tensors_of(model, adapter_name) if prefix in key}
    given = {without_wrappers(key): tensor for key, tensor in state_dict.items()}
    unexpected = [key for key in given if key not in targets]
    if unexpected:
        text = f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}."
        raise StateDictError(text, what=unexpected[0], where=unexpected[0])
    for key, tensor in given.items():
        _check_fits(key, targets[key], tensor)
    adapted = {without_wrappers(path): layer for path, layer in layers(model)}
    with torch.no_grad():
        for key in targets.keys() - given.keys():
            targets[key].zero_()
        for key, tensor in given.items():
            site = key.rpartition(prefix)[0]
            layer = adapted[site]
            path = _pattern_path(site.removeprefix(WRAPPED), layer)
            rank = first_match(config.rank_pattern, path, config.r)
            alpha = first_match(config.alpha_pattern, path, config.lora_alpha)
            _put_scale(layer, adapter_name, scale(rank, alpha, config.use_rslora))
            groups = layer.spec.groups if ".lora_A." in key else 1
            _put(targets[key], tensor.to(targets[key].device), groups)


def _pattern_path(path: str, layer: LoraLayer) -> str:
    """Return the path of a layer's module or bare parameter, to match against `rank_pattern` and `alpha_pattern`."""
    return f"{plain_path(path)}.{layer.spec.parameter}" if layer.kind.names_parameter else path


def _check_fits(key: str, target: Tensor, tensor: Tensor) -> None:
    differ = [axis for axis, (a, b) in enumerate(zip(target.shape, tensor.shape, strict=False)) if a != b]
    if target.ndim != tensor.ndim or len(differ) > 1:
        shapes = f"{tuple(target.shape)} and {tuple(tensor.shape)}"
        raise StateDictError(f"Incompatible shapes found for LoRA weights {key}: {shapes}.", where=key)


def _put(target: Tensor, tensor: Tensor, groups: int) -> None:
    if target.shape == tensor.shape:
        target.copy_(tensor)
    elif all(a >= b for a, b in zip(target.shape, tensor.shape, strict=True)):
        target.zero_()
        _fill(target, tensor, groups)
    else:  # a larger rank than before: the parameter grows, so a compiled model is recompiled
        target.data = tensor.to(target.dtype)


def _put_scale(layer: LoraLayer, adapter: str, value: float) -> None:
    scaling: dict[str, Any] = layer.scaling
    if isinstance(scaling[adapter], Tensor):  # prepared for compilation
        scaling[adapter].fill_(value)
    else:
        scaling[adapter] = value


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: LoraConfig | Mapping[str, LoraConfig] | None = None,
    check_compiled: str = "error",
) -> None:
    """Prepare a model with its first adapter for compilation: convert scales to tensors and zero-pad factors.

    `target_rank` is the largest rank that will be swapped in, also set in the given configs. `check_compiled` ("error",
    "warn" or "ignore") decides about a model that is compiled.

    Raises:
        ConfigError: The model is already compiled or has no adapters, or a layer cannot be padded to `target_rank`.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False):
        _check_compiled(check_compiled)
    found = layers(model)
    if not found:
        text = "No adapter layers found on the model; load the first adapter before preparing the model for others."
        raise ConfigError(text, field="model")
    for _, layer in found:
        device = layer.base.device(layer.owner, layer.spec.parameter)
        scaling: dict[str, Any] = layer.scaling
        for adapter, value in scaling.items():
            scaling[adapter] = torch.as_tensor(value, device=device)
        if target_rank is not None:
            _pad(layer, target_rank)
    if target_rank is not None and config:
        for one in config.values() if isinstance(config, Mapping) else [config]:
            one.r = target_rank
            one.rank_pattern = dict.fromkeys(one.rank_pattern, target_rank)


def _check_compiled(check_compiled: str) -> None:
    if check_compiled == "error":
        raise ConfigError("Call prepare_model_for_compiled_hotswap *before* compiling the model", field="model")
    if check_compiled == "warn":
        text = "prepare_model_for_compiled_hotswap was called with a model that is already compiled"
        warn_caller(f"{text}, which will likely result in re-compilation. Call it before compiling the model.")
    elif check_compiled != "ignore":
        text = f"check_compiles should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead."
        raise ConfigError(text, what=check_compiled, field="check_compiled", allowed=("error", "warn", "ignore"))


def _pad(layer: LoraLayer, target_rank: int) -> None:
    groups = layer.spec.groups
    if target_rank % groups:
        text = (
            f"Trying to pad a {layer.kind_name} LoRA adapter with groups={groups} to target rank {target_rank}, but "
            f"the target rank is not divisible by {groups}. Please choose a target rank that is divisible by {groups}."
        )
        raise ConfigError(text, what=target_rank, field="target_rank")
    for attribute, axis, size in (("lora_A", 0, target_rank), ("lora_B", 1, target_rank // groups)):
        holder = layer._modules.get(attribute)
        for carrier in holder.children() if holder is not None else ():
            weight = carrier.get_parameter("weight")
            rank = weight.shape[axis]
            if rank > size:
                text = f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger"
                raise ConfigError(f"{text} ({rank}).", what=target_rank, field="target_rank")
            padded = weight.new_zeros(*weight.shape[:axis], size, *weight.shape[axis + 1 :])
            _fill(padded, weight.detach(), groups if axis == 0 else 1)
            carrier.weight = nn.Parameter(padded, requires_grad=weight.requires_grad)


def _fill(target: Tensor, tensor: Tensor, groups: int) -> None:
    """Copy a tensor of any shape into the leading part of a larger one, group by group if there are groups."""
    if groups > 1:
        target, tensor = (one.view(groups, one.shape[0] // groups, *one.shape[1:]) for one in (target, tensor))
    target[tuple(slice(size) for size in tensor.shape)].copy_(tensor)
