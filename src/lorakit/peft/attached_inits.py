"""PEFT's functions that reinitialize an existing adapter from layer inputs (EVA) or the original weights (LoftQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.config.nested import EvaConfig
from lorakit.core.inits import InitContext
from lorakit.core.inits.from_weight import residual_factors
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import AdapterIndex
from lorakit.core.operations.data_init import ranks_by_variance, redistributed
from lorakit.core.operations.tensor_sources import TensorSource, source_of_folder
from lorakit.core.statistics.collecting import Forward, TakeRows, in_mode
from lorakit.core.variants import Start
from lorakit.errors import AdapterError, ConfigError, ConfigTypeError, DataError, warn_caller
from lorakit.peft import model_adapters
from lorakit.peft.data_inits import dense_sites
from lorakit.peft.matching import find_minimal_target_modules
from lorakit.peft.model import PeftModel
from lorakit.peft.state_dicts import WRAPPED
from lorakit.targets.resolving import Match

CONDENSED_FROM = 20
"""Minimum number of targets for condensing their paths to the fewest suffixes that match them, as in PEFT."""

PrepareLayer = Callable[[Any, Any, str], Tensor]
PrepareLayers = PrepareLayer | Mapping[str, PrepareLayer] | None
PrepareBatch = Callable[[Any, LoraConfig], Any] | None
LayerInput = Tensor | Sequence[Tensor]
Batch = Tensor | Mapping[str, Any] | Sequence[Any]


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a model on a batch given as a dict from argument name to value."""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping[str, Tensor], peft_config: LoraConfig) -> Tensor:
    """Return row and column (positions, 2) of what is not padding and, if the config requires labels, has a label.

    Raises:
        ConfigTypeError: `model_input` is not a dictionary.
    """
    if not isinstance(model_input, dict):
        text = "When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary"
        raise ConfigTypeError(text, field="inputs")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    settings = peft_config.eva_config or EvaConfig()
    if settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: LayerInput, model_input: Tensor, layer_name: str) -> Tensor:
    """Return the input (positions, in) of a site at positions (positions, 2), from its input (rows, length, in)."""
    return _tensor(layer_input, layer_name)[model_input.T.unbind()]


def _plain(layer_input: LayerInput, _: Batch, layer_name: str) -> Tensor:
    x = _tensor(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1])


def _tensor(layer_input: LayerInput, layer_name: str) -> Tensor:
    if isinstance(layer_input, (tuple, list)):
        layer_input = layer_input[0]
    if not isinstance(layer_input, Tensor):
        text = f"unsupported input type {type(layer_input)} in {layer_name}; pass a custom prepare_layer_inputs_fn"
        raise ConfigTypeError(text, where=layer_name)
    return layer_input


def _moved(batch: Batch, device: torch.device | None) -> Batch:
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [_moved(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)  # a namedtuple has fields
    return batch


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Batch],
    peft_config: LoraConfig | None = None,
    forward_fn: Forward = forward_fn_dict,
    prepare_model_inputs_fn: PrepareBatch = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayers = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Return the principal directions (rank, in) of each targeted dense module's inputs; explained variance sets ranks.

    PEFT iterates over the data until an incremental SVD converges. This function accumulates the second moment of all
    input rows, which yields the exact directions, so `tau` has no effect. Modules are processed in groups whose
    statistics fit in memory, and the data is read once per group.

    Args:
        model: A model, or a `PeftModel` with the adapter; adapters are inactive during collection.
        dataloader: Batches of data; every batch is used.
        peft_config: The config; required for a model without adapters.
        forward_fn: Function that runs the model on a batch.
        prepare_model_inputs_fn: Maps a batch and the config to the second argument of `prepare_layer_inputs_fn`; None
            passes the batch itself.
        prepare_layer_inputs_fn: Returns the rows to use (rows, in) for a module's input, the prepared batch and the
            module's name; or a dict from module name to such a function.
        adapter_name: Name of the adapter.
        gather_distributed_inputs: Ignored; inputs are collected in a single process.
        show_progress_bar: Ignored; no progress is shown.

    Raises:
        ConfigError: The config is missing, `prepare_layer_inputs_fn` has an unknown name, or a rank is too large.
        DataError: `dataloader` is empty, or no data reached a module.
    """
    if isinstance(dataloader, Sized) and not len(dataloader):
        raise DataError("dataloader is empty", field="dataloader")
    user = model_adapters.user_model(model)
    wrapped = user is not model
    if peft_config is None and not wrapped:
        raise ConfigError("peft_config is required if model is not a PeftModel", field="peft_config")
    prefix = WRAPPED if wrapped else ""
    config = peft_config or model_adapters.configs_of(user)[adapter_name]
    here = {path for path, _ in AdapterIndex.of(user).layers(adapter_name)} if wrapped else None
    sites = dense_sites(user, config.with_fields(layer_replication=None), "eva", here)
    prepare = _per_layer(prepare_layer_inputs_fn, [prefix + match.path for match in sites.matches])
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), None)

    def rows_of(batch: Batch) -> TakeRows:
        batch = _moved(batch, device)
        prepared = batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)
        return lambda path, x: (prepare[prefix + path] or _plain)((x,), prepared, prefix + path)

    with in_mode(model, False):
        found = sites.collect(user, dataloader, lambda _, batch: forward_fn(model, _moved(batch, device)), rows_of)
    settings, ranks = config.eva_config or EvaConfig(), {match.path: match.rank for match in sites.matches}
    ranks = ranks_by_variance(settings, ranks, {path: tensors["ratios"].tolist() for path, tensors in found.items()})
    return {prefix + path: _directions(found[path], rank, settings) for path, rank in ranks.items()}


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Batch] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Forward = forward_fn_dict,
    prepare_model_inputs_fn: PrepareBatch = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareLayers = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Redistribute the ranks of an EVA adapter among its modules, and set each A to the principal directions.

    The parameters are recreated, so create the optimizer after this call. Modules whose rank becomes 0 lose the
    adapter. Batches are required without `eva_state_dict`; the other arguments are those of `get_eva_state_dict`.

    Raises:
        ConfigError: The model is not a `PeftModel`, several adapters are active, its init is another, there is no data,
            or the state dict belongs to another model. The model is left unchanged.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError("model must be a PeftModel", field="model")
    if len(model.active_adapters) > 1:
        text = "`initialize_lora_eva_weights` currently only works with a single active adapter"
        raise ConfigError(text, field="adapter_name")
    model_adapters.check_exist(model.peft_config, adapter_name)
    if model.peft_config[adapter_name].init_lora_weights != "eva":
        text = "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`"
        raise ConfigError(text, field="init_lora_weights")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader is required if eva_state_dict is not provided", field="dataloader")
        prepare = (prepare_model_inputs_fn, prepare_layer_inputs_fn)
        eva_state_dict = get_eva_state_dict(model, dataloader, None, forward_fn, *prepare, adapter_name)
    _apply(model, {name.removeprefix(WRAPPED): A for name, A in eva_state_dict.items()}, adapter_name)


def _apply(model: PeftModel, found: Mapping[str, Tensor], name: str) -> None:
    user, active = model.get_base_model(), model.active_adapters
    index = AdapterIndex.of(user)
    here = dict(index.layers(name))
    _check(here, found, name)
    dtype = next(iter(here.values())).factor(name).A.dtype
    trained = any(parameter.requires_grad for layer in here.values() for parameter in layer.parameters_of(name))
    matches = [Match(path, layer.kind_name, layer.r[name], layer.lora_alpha[name], "") for path, layer in here.items()]
    ranks = {path: len(found[path]) if path in found else layer.r[name] for path, layer in here.items()}
    targets = {path for path, rank in ranks.items() if rank}
    if len(targets) >= CONDENSED_FROM:
        targets = find_minimal_target_modules(targets, index.modules.keys() - targets)
    config = redistributed(model.peft_config[name], matches, ranks).with_fields(target_modules=targets)
    core.detach(user, name)
    model.base_model.inject(name, config, autocast_adapter_dtype=dtype == torch.float32)
    if active != model.active_adapters:
        model.base_model.set_adapter(active)
    model.set_requires_grad(name, trained)
    for path, layer in AdapterIndex.of(user).layers(name):
        if path in found:
            A = layer.factor(name).A
            A.data.copy_(found[path].reshape(A.shape))


def _check(here: Mapping[str, LoraLayer], found: Mapping[str, Tensor], name: str) -> None:
    """Raise an error if directions, (rank, in), are unusable or every rank is 0; warn about other mismatches."""
    for path in here.keys() & found.keys():
        A, width = found[path], here[path].spec.in_features
        variant = here[path].factor(name).variant
        if variant.parts.shapes or variant.parts.start:
            text = f"{path}: EVA needs A and B in their standard shapes, unlike {variant.title}. Use another init."
            raise ConfigError(text, what="eva", where=path, field=variant.field)
        if A.ndim != 2 or A.shape[1] != width:
            text = f"eva_state_dict: {path} has shape {tuple(A.shape)}; expected (rank, {width})."
            raise ConfigError(text, where=path)
        if not bool(torch.isfinite(A).all()):
            text = f"eva_state_dict: {path} contains NaN or infinite values. Collect the directions again."
            raise ConfigError(text, where=path)
    if here and all(path in found and not len(found[path]) for path in here):
        text = f"eva_state_dict assigns rank 0 to every module of adapter {name!r}. Collect the directions again."
        raise ConfigError(text, what=name)
    unknown = sorted(found.keys() - here.keys())
    if unknown and here.keys().isdisjoint(found):
        text = f"eva_state_dict has no entries for adapter {name!r}; it contains, for example, {unknown[0]}."
        raise ConfigError(text, what=name, where=unknown[0])
    if unknown:
        warn_caller(f"eva_state_dict names modules that adapter {name!r} does not have: {unknown}")
    missing = [path for path in here if path not in found]
    if missing:
        warn_caller(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {missing}"
        )


def _per_layer(given: PrepareLayers, names: list[str]) -> dict[str, PrepareLayer | None]:
    if not isinstance(given, Mapping):
        return dict.fromkeys(names, given)
    unknown = given.keys() - set(names)
    if unknown:
        text = f"prepare_layer_inputs_fn names modules that were not found in the model: {sorted(unknown)}"
        raise ConfigError(text, field="prepare_layer_inputs_fn", allowed=names)
    return {name: given.get(name) for name in names}


def _directions(found: Mapping[str, Tensor], rank: int, settings: EvaConfig) -> Tensor:
    A = found["directions"][:rank]
    return A / found["values"][:rank, None].sqrt() if settings.whiten else A.clone()


FOUR_BIT = "bitsandbytes 4-bit"


def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Recompute an adapter's factors on a 4-bit base so that they best compensate for the quantization error.

    At each site, s·B·A becomes the best rank-r approximation of W − Q, where Q is the quantized and W the original
    weight, read from safetensors files, one at a time. A DoRA magnitude becomes the norm of the result. PEFT ignores
    the scale and the magnitude, and fails to transpose GPT-2's Conv1D weights. An error restores every site.

    Args:
        peft_model: The `PeftModel`.
        model_path: Directory with the base's safetensors files, or one of them; None: where it was loaded from.
        adapter_name: Name of the adapter whose factors are replaced.
        callback: Called after each site with the model and its path; if it returns False, the site is restored.

    Raises:
        ConfigTypeError: `peft_model` is not a `PeftModel`.
        ConfigError: A weight is not found or has the wrong shape, the scale is 0, or r exceeds a dimension.
        AdapterError: No site of the adapter is a 4-bit layer, or the adapter is merged.

    Source: Li et al. 2023 (arXiv:2310.08659), one step of Algorithm 1 for a given quantized weight.
    """
    if not isinstance(peft_model, PeftModel):
        text = "The passed model does not appear to be a valid PeftModel; create one with get_peft_model."
        raise ConfigTypeError(text, field="peft_model")
    model = peft_model.get_base_model()
    sites = _sites(model, adapter_name)
    source = source_of_folder(_where(model, model_path))
    names = {path: _name(source, path, layer) for path, layer in sites.items()}
    written: list[tuple[Tensor, Tensor]] = []
    try:
        for path, layer in sites.items():
            W = source.read(names[path])
            here = _write(layer, adapter_name, path, W.T if _is_transposed(layer) else W)
            written += here
            if callback is not None and not callback(peft_model, path):
                _put(here)
    except BaseException:
        _put(reversed(written))
        raise


def _sites(model: nn.Module, name: str) -> dict[str, LoraLayer]:
    found = {path: layer for path, layer in AdapterIndex.of(model).layers(name) if layer.base.name == FOUR_BIT}
    if not found:
        text = f"No bnb LoRA module found on the model: no 4-bit module with adapter {name!r}."
        raise AdapterError(text, what=name)
    for path, layer in found.items():
        if name in layer.merged_adapters:
            text = f"Adapter {name!r} is merged at {path}; unmerge it before replacing its LoRA weights."
            raise AdapterError(text, what=name, where=path)
    return found


def _is_transposed(layer: LoraLayer) -> bool:
    return getattr(layer.source, "source_cls", nn.Linear).__name__ == "Conv1D"


def _name(source: TensorSource, path: str, layer: LoraLayer) -> str:
    name = source.under([f"{path}.weight"])
    if name is None:
        text = f"{source.label}: {path}.weight not found, so the model was not loaded from this source."
        raise ConfigError(text, what=f"{path}.weight", where=source.label)
    shape = (layer.spec.out_features, layer.spec.in_features)
    expected = shape[::-1] if _is_transposed(layer) else shape
    if source.shapes[name] != expected:
        text = f"{source.label}: {name} has shape {source.shapes[name]}, but the model needs {expected}."
        raise ConfigError(text, what=name, where=source.label)
    return name


def _write(layer: LoraLayer, name: str, path: str, W: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Replace a layer's factors, given the original W, (out, in); return each changed tensor with its previous data."""
    factor, kind = layer.factor(name), layer.kind
    variant = factor.variant
    if variant.parts.shapes or variant.parts.start or variant.move:
        text = f"{path}: adapter {name!r} uses {variant.title}, whose A and B cannot represent a quantization error."
        raise ConfigError(text, what=name, where=path, field=variant.field)
    with torch.no_grad():
        now = layer.read(name)
        shapes = (tuple(factor.A.shape), tuple(factor.B.shape))
        device, dtype = factor.A.device, factor.A.dtype
        config = layer.state.configs[name].with_fields(init_lora_weights="loftq")
        blank = InitContext(
            kind, layer.spec, layer.r[name], factor.scale, *shapes, device, dtype, path, lambda: now, config
        )
        blank.check_rank(min(now.shape))
        A, B = blank.in_layout(*residual_factors(blank, (W.to(now) - now)[None]))
        new = [(factor.A, A), (factor.B, B)]
        start = Start(kind, layer.spec, A, B, factor.scale, lambda: now, path, factor.setting)
        begins = factor.variant.parts.extra_tensors(start)
        new += [(tensor, begins[held].to(tensor)) for held, tensor in factor.own.items()]
        before = [(tensor, tensor.data) for tensor, _ in new]
        _put(new)
    return before


def _put(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in values:
        tensor.data = value


def _where(model: nn.Module, given: str | PathLike[str] | None) -> Path:
    if given is not None:
        path = Path(given)
        is_sharded = path.suffix == ".safetensors" and not path.is_file()
        return path.parent if is_sharded else path
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if name and Path(name).is_dir():
        return Path(name)
    from lorakit.hub.sources import downloaded

    found = downloaded(name) if name else None
    if found is None:
        text = f"model.safetensors must be present on disk, but it could not be found: {name!r}. Pass model_path."
        raise ConfigError(text, what=name, field="model_path")
    return found
