"""PEFT's data-driven inits, which collect statistics and then attach the adapter (for EVA, in the reverse order).

As in PEFT, `preprocess_corda` and `preprocess_loraga` store results in attributes of the base modules, which
`get_peft_model` removes. Caches are safetensors files, checked before the model is changed, and never pickles.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.config.nested import CordaConfig
from lorakit.core.files.tensors import encode, read_tensors
from lorakit.core.kinds import kind_named
from lorakit.core.model.index import walk
from lorakit.core.operations.data_init import DataSites
from lorakit.core.quantization import NOT_WRITTEN, at_least_fp32, weight_format_of
from lorakit.core.statistics.collecting import collect_inputs, in_mode
from lorakit.core.statistics.moments import GradientStatistics, InputStatistics
from lorakit.durable import write_bytes
from lorakit.errors import AdapterFileError, ConfigError, DataError, warn_caller
from lorakit.targets.resolving import Match

DENSE = ("Linear", "Conv1D")
EIGENS, GRADIENT = "eigens", "_peft_loraga_grad"
"""Attributes of a module in which PEFT's functions store their results."""

Given = str | PathLike[str] | None


@dataclass(frozen=True)
class Cache:
    """Contents of a cache file: tensors of any shape, and the header's metadata."""

    path: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, path: Given) -> Cache | None:
        """Read a cache file; return None if the file is missing or is an empty placeholder.

        Raises:
            AdapterFileError: The file is damaged or is a pickle, as written by PEFT.
        """
        if path is None or not Path(path).is_file() or not Path(path).stat().st_size:
            return None
        try:
            file = read_tensors(str(path))
        except AdapterFileError as cause:
            text = f"{cause} Only safetensors caches are read; convert PEFT's pickle with safetensors.torch.save_file."
            raise AdapterFileError(text, **cause.fields) from None
        return cls(str(path), file.tensors, file.metadata)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """Return a tensor from the cache, for example the left singular vectors, (out, r).

        Raises:
            ConfigError: The tensor is missing, has the wrong shape, or is not finite.
        """
        found = self.tensors.get(name)
        if found is None:
            raise self.error(f"{name} not found; the file belongs to another model or config", name)
        if shape is not None and found.shape != shape:
            raise self.error(f"{name} has shape {tuple(found.shape)}; expected {shape}", name)
        if not bool(torch.isfinite(found).all()):
            raise self.error(f"{name} contains NaN or infinite values", name)
        return found

    def error(self, problem: str, what: str) -> ConfigError:
        """Return an error about the cache file; `what` is the name of the invalid tensor or value."""
        return ConfigError(f"{self.path}: {problem}. Remove the file or choose another.", what=what, where=self.path)


@dataclass
class CordaEigens:
    """CorDA's decomposition of a weight: S_WC (r,), U_WC (out, r), and V_WC (in, r) with the inverse covariance."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def for_attaching(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, core.Statistics | None]:
    """Return the config and statistics for `core.attach`, and remove results that preprocessing stored on the model.

    With "eva", the adapter is attached with init_lora_weights=True until `initialize_lora_eva_weights`.

    Raises:
        ConfigError: The preprocessing step was not run, or `lora_ga_config` is missing.
    """
    init = config.init_lora_weights
    if init == "eva":
        return config.with_fields(init_lora_weights=True, eva_config=None), None
    if init not in ("corda", "lora_ga"):
        return config, None
    name, function = (EIGENS, "preprocess_corda") if init == "corda" else (GRADIENT, "preprocess_loraga")
    found = {path: vars(module).pop(name) for path, module in walk(model) if name in vars(module)}
    if not found:
        text = f"`{name}` attribute not found for layer, please run `{function}` first."
        raise ConfigError(text, what=init, field="init_lora_weights")
    if init == "corda":
        tensors = {path: {"U": one.U_WC, "S": one.S_WC, "Vh": one.V_WC.T} for path, one in found.items()}
        return config, core.Statistics(config, tensors)
    if config.lora_ga_config is None:
        raise ConfigError("lora_ga_config must be provided when init_lora_weights='lora_ga'.", field="lora_ga_config")
    sites = DataSites.of(model, config, ("partial_targets",))
    statistics = sites.reduce(
        model, {path: _mean_gradient(sites.index.base(path), gradient) for path, gradient in found.items()}
    )
    without = [match.path for match in sites.matches if match.path not in statistics.sites]
    if without:
        warn_caller(f"LoRA-GA has no gradient for {', '.join(without)}; these modules use init_lora_weights=True.")
    return config, dataclasses.replace(statistics, others_usual=True)


def _mean_gradient(module: nn.Module, gradient: Tensor) -> GradientStatistics:
    found = GradientStatistics()
    found.add(at_least_fp32(gradient.T if weight_format_of(module).transposed else gradient))
    found.batches = 1
    return found


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Decompose each targeted weight by its inputs, for init_lora_weights="corda"; call `get_peft_model` next.

    Targeted modules get an `eigens` attribute. The caches in `corda_config` are read if they exist and otherwise
    written. Without one, `run_model` runs `hooked_model`, by default `model`, on the data.

    Raises:
        ConfigError: `corda_config` or `run_model` is missing, the method is unknown, or no dense modules are targeted.
        AdapterFileError: A cache file is damaged or is a pickle.
        DataError: No data reached a module, or a module's inputs are not finite.
    """
    settings = _corda(lora_config)
    sites, modules = _dense(model, lora_config, "corda", "CorDA initialization. It uses the inputs of")
    cache = Cache.of(settings.cache_file)
    if cache is not None:
        _eigens_from(cache, settings, modules, _widths(sites))
        return
    counts: dict[str, int] = {}
    cache = Cache.of(settings.covariance_file)
    if cache is not None:
        covariances = {path: cache.tensor(path, (n, n)) for path, (_, n) in _widths(sites).items()}
    else:
        covariances, counts = _covariances(sites, settings, run_model, hooked_model or model)
        if settings.covariance_file is not None:
            write_bytes(settings.covariance_file, encode(covariances, {"format": "pt"}))
    found = sites.reduce(model, {path: _inputs(covariance) for path, covariance in covariances.items()}).sites
    kept: dict[str, Tensor] = {}
    for path, module in modules.items():
        eigens = CordaEigens(found[path]["S"], found[path]["U"], found[path]["Vh"].T.contiguous())
        setattr(module, EIGENS, eigens)
        kept |= {f"{path}.eigens.{name}": tensor for name, tensor in vars(eigens).items()}
        left = {"covariance_matrix": covariances[path], "corda_method": settings.corda_method, "rank": len(eigens.S_WC)}
        left["sample_count"] = counts.get(path)
        for field, value in left.items():
            vars(module).pop(field, None)  # left by an earlier call
            if value is not None and not settings.prune_temporary_fields:
                setattr(module, field, value)
    if settings.cache_file is not None:
        write_bytes(settings.cache_file, encode(kept, {"format": "pt", "corda_method": settings.corda_method}))


def _eigens_from(
    cache: Cache, settings: CordaConfig, modules: Mapping[str, nn.Module], widths: Mapping[str, tuple[int, int]]
) -> None:
    """Check all tensors in a cache, and then store them on the modules."""
    found, method = {}, cache.metadata.get("corda_method", settings.corda_method)
    if method != settings.corda_method:
        raise cache.error(f"corda_method is {method!r}, but the config has {settings.corda_method!r}", method)
    for path, (m, n) in widths.items():
        r = len(cache.tensor(f"{path}.eigens.S_WC"))
        shapes = {"S_WC": (r,), "U_WC": (m, r), "V_WC": (n, r)}
        found[path] = [cache.tensor(f"{path}.eigens.{name}", shape) for name, shape in shapes.items()]
    for path, module in modules.items():
        setattr(module, EIGENS, CordaEigens(*(tensor.to(_device(module)) for tensor in found[path])))


def _corda(config: LoraConfig) -> CordaConfig:
    if config.corda_config is None:
        text = "preprocess_corda needs a corda_config: LoraConfig(corda_config=CordaConfig(...))."
        raise ConfigError(text, field="corda_config")
    method = config.corda_config.corda_method
    if method not in ("ipm", "kpm"):
        text = f"Invalid corda_method found: {method}, it should be 'ipm' or 'kpm'."
        raise ConfigError(text, what=method, field="corda_config.corda_method", allowed=("ipm", "kpm"))
    return config.corda_config


def _inputs(covariance: Tensor) -> InputStatistics:
    """Convert a covariance, (in, in), already averaged over calls, to the statistics of a single call."""
    found = InputStatistics()
    found.rows = found.calls = 1
    found.gram, found.total = covariance, covariance[0]
    return found


def _covariances(
    sites: DataSites, settings: CordaConfig, run_model: Callable[[], Any] | None, model: nn.Module
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return each module's covariance (in, in), the mean over calls of the sum of x·xᵀ, and the calls, by path."""
    if run_model is None:
        text = "run_model must be specified when covariance file and cache file aren't built."
        raise ConfigError(text, field="run_model")
    paths = [match.path for match in sites.matches]
    seen = collect_inputs(model, paths, [None], lambda *_: run_model(), even=True)
    found = {}
    for path, inputs in seen.items():
        if not inputs.rows:
            raise DataError(f"{path}: run_model does not reach this module. Exclude it from the targets.", where=path)
        covariance = inputs.second_moment() * (inputs.rows / inputs.calls)
        if not bool(torch.isfinite(covariance).all()):
            raise DataError(f"{path}: Invalid value found in input, please check your input data.", where=path)
        found[path] = covariance.half().float() if settings.use_float16_for_covariance else covariance
    return found, {path: inputs.calls for path, inputs in seen.items()}


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: Given = None
) -> None:
    """Collect the gradients of targeted weights, for init_lora_weights="lora_ga"; call `get_peft_model` next.

    Targeted modules get a `_peft_loraga_grad` attribute. `train_step` runs forward and backward passes and nothing
    else. `cache_file` is read if it exists and otherwise written.

    Raises:
        ConfigError: `lora_ga_config` is missing, no dense modules are targeted, or a targeted weight is quantized.
        AdapterFileError: The cache is damaged or is a pickle.
    """
    if lora_config.lora_ga_config is None:
        text = "If you want to use LoRA-GA, please initialize the LoraConfig with lora_ga_config=LoraGAConfig(...)."
        raise ConfigError(text, field="lora_ga_config")
    modules = _dense(model, lora_config, "lora_ga", "LoRA-GA initialization. It uses the gradients of")[1]
    _check_gradients_exist(modules)
    cache = Cache.of(cache_file)
    if cache is not None:
        _gradients_from(cache, modules)
        return
    for module in modules.values():
        vars(module).pop(GRADIENT, None)  # left by an earlier call
    with in_mode(model, True), _only_trained(model, modules.values()) as counts, torch.enable_grad():
        train_step()
        for module in modules.values():
            gradient = module.get_parameter("weight").grad
            if gradient is not None and counts[module]:
                setattr(module, GRADIENT, gradient.detach() / counts[module])
    if cache_file is not None:
        reached = {path: vars(module)[GRADIENT] for path, module in modules.items() if GRADIENT in vars(module)}
        metadata = {"format": "pt", "without": "\n".join(sorted(modules.keys() - reached.keys()))}
        kept = {f"{path}.{GRADIENT}": gradient for path, gradient in reached.items()}
        write_bytes(cache_file, encode(kept, metadata))


def _check_gradients_exist(modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        if not weight_format_of(module).written:
            raise ConfigError(NOT_WRITTEN.format(parameter=f"{path}.weight", type=type(module).__name__), where=path)
        if weight_format_of(module).quantized or hasattr(module, "quant_state"):
            text = f"LoRA-GA does not support quantized modules, such as {path!r}. Preprocess the model before."
            raise ConfigError(text, where=path)


def _gradients_from(cache: Cache, modules: Mapping[str, nn.Module]) -> None:
    """Check all tensors in a cache, and then store them on the modules."""
    without = set(cache.metadata.get("without", "").split("\n"))
    shapes = {path: module.get_parameter("weight").shape for path, module in modules.items() if path not in without}
    found = {path: cache.tensor(f"{path}.{GRADIENT}", tuple(shape)) for path, shape in shapes.items()}
    for path, gradient in found.items():
        setattr(modules[path], GRADIENT, gradient.to(_device(modules[path])))


@contextmanager
def _only_trained(model: nn.Module, modules: Collection[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """Return a context manager that makes only the given modules' weights trainable.

    The context manager yields a counter of each module's backward passes. As in PEFT, gradients are read from `.grad`,
    which `train_step` may reset between steps.
    """
    weights = [module.get_parameter("weight") for module in modules]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [weight.grad for weight in weights]
    counts: Counter[nn.Module] = Counter()
    handles = [module.register_full_backward_hook(lambda m, *_: counts.update([m])) for module in modules]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(True)
        yield counts
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for weight, gradient in zip(weights, before, strict=True):
            weight.grad = gradient


def dense_sites(model: nn.Module, config: LoraConfig, init: str, paths: Collection[str] | None = None) -> DataSites:
    """Find the dense modules that a config targets; PEFT's data-driven inits skip all other modules.

    Raises:
        ConfigError: The config uses `target_parameters`.
        TargetError: Nothing in the model matches the targets.
    """

    def only(match: Match) -> bool:
        return bool(match.parameter) or (match.kind in DENSE and (paths is None or match.path in paths))

    return DataSites.of(model, config.with_fields(init_lora_weights=init), ("partial_targets",), only)


def _dense(model: nn.Module, config: LoraConfig, init: str, what: str) -> tuple[DataSites, dict[str, nn.Module]]:
    sites = dense_sites(model, config, init)
    if not sites.matches:
        text = f"No supported layers found for {what} nn.Linear and Conv1D, but target_modules matches neither."
        raise ConfigError(text, field="target_modules")
    return sites, {match.path: sites.index.base(match.path) for match in sites.matches}


def _widths(sites: DataSites) -> dict[str, tuple[int, int]]:
    """Return a dict from module path to the module's output and input widths."""
    specs = {match.path: kind_named(match.kind).specs(sites.index.base(match.path))[0] for match in sites.matches}
    return {path: (spec.out_features, spec.in_features) for path, spec in specs.items()}


def _device(module: nn.Module) -> torch.device:
    return weight_format_of(module).device(module, "weight")
