"""Functions on a model with adapters, wrapped or not: query, activate, delete, cast, train and freeze adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.factor import BufferDict
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.index import AdapterIndex, find_state, walk
from lorakit.core.routing.state import AdapterState
from lorakit.errors import AdapterError, ConfigError, RouteError, warn_caller

CONFIGS = "peft_config"
"""Attribute of the user's model in which other programs look for the adapters' configs."""


def is_wrapper(model: nn.Module) -> bool:
    """Return whether a model is a `PeftModel`, that is, whether it contains a tuner around the user's model."""
    inner = model._modules.get("base_model")
    return inner is not None and hasattr(inner, "tuner_layer_cls")


def user_model(model: nn.Module) -> nn.Module:
    """Return the user's model inside a wrapper or a tuner; any other model is returned unchanged."""
    if is_wrapper(model):
        return model.get_submodule("base_model.model")
    return model.get_submodule("model") if hasattr(type(model), "tuner_layer_cls") else model


def adapted(model: nn.Module) -> Iterator[AdapterModule]:
    """Iterate over a model's adapted layers, saved modules and trainable tokens."""
    return (module for _, module in walk(model) if isinstance(module, AdapterModule))


def configs_of(model: nn.Module) -> dict[str, LoraConfig]:
    """Return the model's dict from adapter name to config (not a copy), or an empty dict if there are no adapters."""
    state = find_state(model)
    return {} if state is None else state.configs


def active_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that are active by default, also while adapters are disabled."""
    state = find_state(model)
    return [] if state is None else list(state.chosen.names)


def as_names(adapter_names: str | Iterable[str]) -> list[str]:
    """Return adapter names as a list, given a single name or several names."""
    return [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)


def check_exist(
    configs: Mapping[str, LoraConfig], adapter_names: str | Iterable[str], problem: str = "not found"
) -> None:
    """Check that adapters exist.

    Raises:
        AdapterError: An adapter, the error's `what`, does not exist.
    """
    for name in as_names(adapter_names):
        if name not in configs:
            text = f"Adapter {name} {problem}. Available: {', '.join(configs) or 'none'}."
            raise AdapterError(text, what=name, allowed=configs)


def check_is_lora(config: object, problem: str) -> None:
    """Raise a ConfigError unless a config is a LoraConfig; `problem` is formatted with its `kind` and its `method`."""
    if not isinstance(config, LoraConfig):
        kind = type(config).__name__
        text = problem.format(kind=kind, method=getattr(config, "peft_type", kind))
        raise ConfigError(text, what=kind, field="peft_config")


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: type | None = None
) -> None:
    """Activate adapters, make them trainable, and freeze all others; two of them must not save the same module."""
    names, state = as_names(adapter_name), find_state(model) or AdapterState()
    state.check(names)
    if not state.configs:
        return
    members = state.members()
    check_together(members, names)
    if any(module.merged_adapters for module in members):
        warn_caller("Adapter cannot be set when the model is merged. Unmerging the model first.")
        core.unmerge(model)
    core.activate(model, *names)
    core.set_trained(model, {} if inference_mode else dict.fromkeys(names, True), others=False)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = "lora_", layer_cls: type[nn.Module] | None = None
) -> list[str] | None:
    """Remove an adapter if it exists, as in PEFT, and return the active ones; see `remove_adapter`."""
    if adapter_name in configs_of(model):
        remove_adapter(model, adapter_name)
        if not configs_of(model):
            setattr(model, CONFIGS, {})  # as in PEFT, since transformers reads this attribute and then removes it
    return active_adapters(model) or None


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; if it was the only active one, the alphabetically first remaining adapter becomes active.

    Raises:
        AdapterError: The adapter does not exist or is merged.
    """
    check_exist(configs_of(model), name, "does not exist")
    if name in AdapterIndex.of(model).merged_adapters():
        text = f"Cannot delete adapter(s) {[name]} while they are merged. Please unmerge them first."
        raise AdapterError(text, what=name)
    active = active_adapters(model)
    core.detach(model, name)
    left = sorted(configs_of(model))
    if not left:
        model.__dict__.pop(CONFIGS, None)
    elif active == [name]:
        warn_caller(f"Adapter {name} was active which is now deleted. Setting active adapter to {left[0]}.")
        set_adapter(model, left[0])


ALONE = "Only one adapter can be set at a time for {wrapper}, got {names}: {why}"


def check_together(modules: Iterable[AdapterModule], names: Sequence[str]) -> None:
    """Check that no two adapters replace the same module or embedding row.

    Raises:
        ConfigError: Two of the adapters save the same module or train the same token.
    """
    for module in modules:
        if isinstance(module, ModulesToSave) and len(set(names) & set(module.available_adapters())) > 1:
            why = "each has its own copy of the module."
            text = ALONE.format(wrapper="ModulesToSaveWrapper", names=list(names), why=why)
            raise ConfigError(text, field="modules_to_save")
        if isinstance(module, TrainableTokens):
            try:
                module.token_adapter.replacements(names)
            except RouteError as error:
                text = ALONE.format(wrapper="TrainableTokensWrapper", names=list(names), why=error)
                raise ConfigError(text, field="trainable_token_indices") from error


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the number of trainable parameters and the total number of parameters; both include adapters."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


HALF = (torch.float16, torch.bfloat16)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Upcast an adapter's 16-bit and 8-bit factors to fp32."""
    if autocast_adapter_dtype:
        for _, parameter in _factors(model, adapter_name):
            if parameter.dtype in HALF or parameter.element_size() == 1:
                parameter.data = parameter.data.float()


def cast_to_base(model: nn.Module, adapter_name: str) -> None:
    """Cast an adapter's factors to the dtype of their base weight if that dtype is floating-point."""
    for layer, parameter in _factors(model, adapter_name):
        weight = layer.owner._parameters.get(layer.spec.parameter)
        if weight is not None and weight.is_floating_point():
            parameter.data = parameter.data.to(weight.dtype)


def empty(model: nn.Module, adapter_name: str) -> None:
    """Move an adapter's factors to torch's meta device, which frees their memory."""
    for _, layer in AdapterIndex.of(model).layers(adapter_name):
        for holder in layer.children():
            if isinstance(holder, nn.ModuleDict) and adapter_name in holder:
                holder[adapter_name].to("meta")
            elif isinstance(holder, nn.ParameterDict) and adapter_name in holder:
                held = holder[adapter_name]
                holder[adapter_name] = nn.Parameter(held.to("meta"), held.requires_grad)
            elif isinstance(holder, BufferDict) and adapter_name in holder:
                holder[adapter_name] = holder[adapter_name].to("meta")


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace factors on the meta device with copies of the given tensors, placed on the base weight's device."""
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        layer = model.get_submodule(path.partition(".lora_")[0])
        device = layer.base.device(layer.owner, layer.spec.parameter) if isinstance(layer, LoraLayer) else "cpu"
        old = owner._parameters[leaf]
        flag = old is not None and old.requires_grad
        owner._parameters[leaf] = nn.Parameter(tensor.detach().to(device, copy=True), flag)


def _factors(model: nn.Module, adapter: str) -> Iterator[tuple[LoraLayer, nn.Parameter]]:
    for _, layer in AdapterIndex.of(model).layers(adapter):
        yield from ((layer, parameter) for parameter in layer.parameters_of(adapter))


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make adapters trainable or freeze them, whether or not they are active."""
    core.set_trained(model, dict.fromkeys(as_names(adapter_names), requires_grad))


def pause(model: nn.Module) -> list[nn.Parameter]:
    """Freeze every adapter."""
    state = find_state(model)
    trained = [
        parameter
        for module in (() if state is None else state.members())
        for name in module.available_adapters()
        for parameter in module.parameters_of(name)
        if parameter.requires_grad
    ]
    for parameter in trained:
        parameter.requires_grad_(False)
    return trained


@contextlib.contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Disable and freeze a model's adapters within a context, as in PEFT.

    All threads share the `requires_grad` flags, so they change only if the calling thread records gradients: threads
    that run inference do not affect one that trains. They are not restored if an adapter is deactivated meanwhile.
    """
    state = find_state(model)
    if state is None:
        yield
        return
    before = set(state.chosen.names)
    trained = pause(model) if torch.is_grad_enabled() else []
    try:
        with core.disable(model):
            yield
    finally:
        for parameter in trained if before <= set(state.chosen.names) else ():
            parameter.requires_grad_(True)
