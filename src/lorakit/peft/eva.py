"""EVA in PEFT's two functions: look at what each site receives, then give an adapter that is there what was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import EvaConfig, LoraConfig
from lorakit.core.attachment.attaching import with_targets
from lorakit.core.inits import init_for
from lorakit.core.kinds import kind_of
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import layers, survey
from lorakit.core.model.target_weights import bare_parameters
from lorakit.core.operations.data_init import ranks_by_variance, redistributed
from lorakit.core.operations.rank_allocation import in_groups
from lorakit.core.statistics.collecting import in_mode
from lorakit.core.statistics.moments import InputStatistics
from lorakit.errors import AdapterError, ConfigError, ConfigTypeError, DataError, warn_caller
from lorakit.peft import adapter_queries
from lorakit.peft.matching import find_minimal_target_modules
from lorakit.targets import Match, match_path, resolve

DENSE = ("Linear", "Conv1D")
INSIDE = "base_model.model."
CONDENSED_FROM = 20
"""So many targets are written as the shortest suffixes that name the same, as PEFT does."""

PrepareLayer = Callable[[Any, Any, str], Tensor]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on a batch that is a table of its arguments."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """The positions of a batch that count: not padding, and with a label where labels are asked.

    Args:
        model_input: A table with input_ids (rows, length), perhaps attention_mask and labels.
        peft_config: Its `eva_config` says whether labels count.

    Returns:
        (positions, 2), row and place of each.

    Raises:
        ConfigTypeError: The batch is no table.
    """
    if not isinstance(model_input, dict):
        raise ConfigTypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    settings = peft_config.eva_config or EvaConfig()
    if settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows of a site's input at the positions that count.

    Args:
        layer_input: What the site received, (rows, length, in), or a tuple that begins with it.
        model_input: What `prepare_model_inputs_fn_language_modeling` returned, (positions, 2).
        layer_name: For messages.

    Returns:
        (positions, in).
    """
    return _tensor(layer_input, layer_name)[model_input.T.unbind()]


def _plain(layer_input: Any, _: Any, layer_name: str) -> Tensor:
    x = _tensor(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def _tensor(layer_input: Any, layer_name: str) -> Tensor:
    if isinstance(layer_input, (tuple, list)):
        layer_input = layer_input[0]
    if not isinstance(layer_input, Tensor):
        raise ConfigTypeError(
            f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer {layer_name}, please "
            "provide a custom prepare_layer_inputs_fn"
        )
    return layer_input


@dataclass(frozen=True)
class _Looking:
    """How to look at the batches."""

    model: nn.Module
    dataloader: Iterable[Any]
    config: LoraConfig
    forward: Callable[[nn.Module, Any], Any]
    prepare_model: Callable[[Any, LoraConfig], Any] | None
    prepare_layer: Mapping[str, PrepareLayer | None]

    def at(self, modules: Mapping[str, nn.Module]) -> dict[str, InputStatistics]:
        found = {path: InputStatistics() for path in modules}
        batch_says: list[Any] = [None]

        def look(path: str) -> Callable[..., None]:
            prepare = self.prepare_layer[path] or _plain

            def hook(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
                found[path].add(prepare(args, batch_says[0], path))

            return hook

        handles = [module.register_forward_hook(look(path)) for path, module in modules.items()]
        device = next((p.device for p in self.model.parameters() if p.device.type != "meta"), None)
        try:
            for batch in self.dataloader:
                batch = _moved(batch, device)
                batch_says[0] = batch if self.prepare_model is None else self.prepare_model(batch, self.config)
                self.forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return found


def _moved(batch: Any, device: torch.device | None) -> Any:
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


@torch.no_grad()
def get_eva_state_dict(
    model: Any,
    dataloader: Any,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer
    | Mapping[str, PrepareLayer]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The principal directions of what each targeted dense module receives, with ranks where they explain most.

    PEFT goes round and round over the data until a sketch settles; here the second moment of all rows is kept, so one
    pass (for each group of modules that fits into memory) gives the exact directions, and `tau` decides nothing.

    Args:
        model: A model, or a `PeftModel` whose adapter is looked at; adapters do not act meanwhile.
        dataloader: Batches; gone through whole.
        peft_config: The config, for a model without adapters.
        forward_fn: Runs the model on a batch.
        prepare_model_inputs_fn: From a batch and the config to what the next function gets; None for the batch itself.
        prepare_layer_inputs_fn: From what a module receives, that, and its name to rows; or a table of such functions.
        adapter_name: The adapter.
        gather_distributed_inputs: Accepted; one process looks.
        show_progress_bar: Accepted; nothing is drawn.

    Returns:
        Name of each module -> its directions, (rank, in); rank 0 for a module that gets none.

    Raises:
        ConfigError: There is no config, a table names modules that are not there, or too few directions exist.
        DataError: There is no batch, or nothing reached a module.
    """
    if hasattr(dataloader, "__len__") and len(dataloader) == 0:
        raise DataError("dataloader is empty")
    wrapped = adapter_queries.is_wrapper(model)
    if peft_config is None and not wrapped:
        raise ConfigError("peft_config is required if model is not a PeftModel")
    user = model.get_base_model() if wrapped else model
    prefix = INSIDE if wrapped else ""
    config = peft_config or model.peft_config[adapter_name]
    matches, modules = _sites(user, config, adapter_name if wrapped else None)
    names = [prefix + match.path for match in matches]
    prepare = _per_layer(prepare_layer_inputs_fn, names)
    looking = _Looking(model, dataloader, config, forward_fn, prepare_model_inputs_fn, prepare)
    settings = config.eva_config or EvaConfig()
    found: dict[str, dict[str, Tensor]] = {}
    by_name = dict(zip(names, matches, strict=True))
    with core.disable(user) if wrapped else contextlib.nullcontext(), in_mode(model, False):
        for group in in_groups(names, lambda name: 4 * _width(modules[name.removeprefix(prefix)]) ** 2):
            here = {name: modules[name.removeprefix(prefix)] for name in group}
            for name, statistics in looking.at(here).items():
                found[by_name[name].path] = _principal(name, statistics, by_name[name].rank, settings)
    ratios = {path: tensors["ratios"].tolist() for path, tensors in found.items()}
    ranks = ranks_by_variance(settings, {match.path: match.rank for match in matches}, ratios)
    return {prefix + match.path: _directions(found[match.path], ranks[match.path], settings) for match in matches}


def initialize_lora_eva_weights(
    model: Any,
    dataloader: Any = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayer
    | Mapping[str, PrepareLayer]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Make an adapter with init_lora_weights="eva" what that says: its A are principal directions, its ranks spread.

    Its factors are made anew, so an optimizer comes after this. Modules that get no rank lose it.

    Args:
        model: A `PeftModel`.
        dataloader: Batches, where `eva_state_dict` is not given.
        eva_state_dict: What `get_eva_state_dict` returned: name -> (rank, in).
        forward_fn: As there, and so the others.
        prepare_model_inputs_fn: Likewise.
        prepare_layer_inputs_fn: Likewise.
        adapter_name: The adapter.
        gather_distributed_inputs: Accepted.
        show_progress_bar: Accepted.

    Raises:
        ConfigError: The model is no `PeftModel`, several adapters are active, the adapter has another init, there is
            neither data nor a state dict, or the state dict is of another model. Nothing was changed.
        AdapterError: There is no such adapter.
    """
    if not adapter_queries.is_wrapper(model):
        raise ConfigError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ConfigError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if adapter_name not in model.peft_config:
        text = f"Adapter {adapter_name} not found. Adapters here: {', '.join(model.peft_config)}."
        raise AdapterError(text, what=adapter_name, allowed=model.peft_config)
    if model.peft_config[adapter_name].init_lora_weights != "eva":
        raise ConfigError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
        )
    _apply(model, {name.removeprefix(INSIDE): A for name, A in eva_state_dict.items()}, adapter_name)


def _apply(model: Any, found: Mapping[str, Tensor], name: str) -> None:
    user = model.get_base_model()
    config, active = model.peft_config[name], list(model.active_adapters)
    here = {path: layer for path, layer in layers(user) if name in layer.r}
    _check(here, found, name)
    sample = next(iter(here.values())).factor(name).A
    trained = any(parameter.requires_grad for layer in here.values() for parameter in layer.parameters_of(name))
    matches = [Match(path, layer.kind_name, layer.r[name], layer.lora_alpha[name], "") for path, layer in here.items()]
    ranks = {path: len(found[path]) if path in found else layer.r[name] for path, layer in here.items()}
    missing = [path for path in here if path not in found]
    if missing:
        warn_caller(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {missing}"
        )
    spread = redistributed(config, matches, ranks).with_fields(target_modules=_names(user, here, ranks))
    core.detach(user, name)
    model.base_model.inject(name, spread, autocast_adapter_dtype=sample.dtype == torch.float32)
    if active != list(model.active_adapters):
        model.base_model.set_adapter(active)
    model.base_model.set_requires_grad(name, trained)
    for path, layer in layers(user):
        if name in layer.r and path in found:
            factor = layer.factor(name)
            factor.A.data.copy_(found[path].reshape(factor.A.shape))


def _check(here: Mapping[str, LoraLayer], found: Mapping[str, Tensor], name: str) -> None:
    """Refuse directions (rank, in) that are of another model, or that leave the adapter nothing."""
    for path in here.keys() & found.keys():
        A, width = found[path], here[path].slot.in_features
        if A.ndim != 2 or A.shape[1] != width:
            raise ConfigError(
                f"eva_state_dict: {path} has shape {tuple(A.shape)}, and (rank, {width}) was expected: it is of "
                "another model."
            )
        if not bool(torch.isfinite(A).all()):
            raise ConfigError(f"eva_state_dict: {path} holds NaN or infinite numbers. Collect it anew.")
    if here and all(path in found and not len(found[path]) for path in here):
        raise ConfigError(f"eva_state_dict leaves no rank to any module of adapter {name!r}. Collect it anew.")
    strangers = sorted(found.keys() - here.keys())
    if strangers and here.keys().isdisjoint(found):
        raise ConfigError(f"eva_state_dict has nothing for adapter {name!r}; it names {strangers[0]} and others.")
    if strangers:
        warn_caller(f"eva_state_dict names modules that adapter {name!r} does not have: {strangers}")


def _names(user: nn.Module, here: Mapping[str, LoraLayer], ranks: Mapping[str, int]) -> set[str]:
    left = [path for path in here if ranks[path]]
    if len(left) < CONDENSED_FROM:
        return set(left)
    others = [path for path, _ in user.named_modules() if path and path not in left]
    return set(find_minimal_target_modules(left, others))


def _sites(user: nn.Module, config: LoraConfig, adapter: str | None) -> tuple[list[Match], dict[str, nn.Module]]:
    """The dense modules to look at, with the ranks that the config gives them."""
    site_map = survey(user)
    asked = with_targets(config, user)
    bare = bare_parameters(site_map) if asked.target_parameters else None
    named = resolve(site_map.candidates, asked, allow_partial=True, parameters=bare).matches
    for match in named:
        if match.parameter:
            init_for("eva", site_map.kind(match.kind), match_path(match))
    matches = [match for match in named if match.kind in DENSE]
    if adapter is not None:
        standing_here = {path for path, layer in layers(user) if adapter in layer.r}
        matches = [match for match in matches if match.path in standing_here]
    return matches, {match.path: site_map.base(match.path) for match in matches}


def _per_layer(given: Any, names: list[str]) -> dict[str, PrepareLayer | None]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    strangers = given.keys() - set(names)
    if strangers:
        raise ConfigError(
            "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
            f"{sorted(strangers)}"
        )
    return {name: given.get(name) for name in names}


def _width(module: nn.Module) -> int:
    kind: Any = kind_of(type(module))
    return int(kind.slots(module)[0].in_features)


def _principal(name: str, statistics: InputStatistics, rank: int, settings: EvaConfig) -> dict[str, Tensor]:
    if not statistics.rows:
        raise DataError(f"{name}: nothing of the data reached this module. Leave it out of the targets.")
    most = round(rank * settings.rho)
    principal = statistics.principal(most)
    return {"directions": principal.vectors, "values": principal.values, "ratios": principal.ratios}


def _directions(found: Mapping[str, Tensor], rank: int, settings: EvaConfig) -> Tensor:
    A = found["directions"][:rank]
    return A / found["values"][:rank, None].sqrt() if settings.whiten else A.clone()
