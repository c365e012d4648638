"""Inits that look at data or gradients, in PEFT's two steps: look first, attach after (EVA: the other way round).

What was found stays on the base's modules under PEFT's attributes until `get_peft_model` takes it. Arithmetic and
collecting are `lorakit.core`'s; caches are safetensors, and a pickle is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import CordaConfig, LoraConfig
from lorakit.core.bases import NOT_WRITTEN, base_of
from lorakit.core.data.collecting import evened
from lorakit.core.data.inits import reduced
from lorakit.core.data.moments import InputStatistics
from lorakit.core.files.tensorfile import encode, read_tensors
from lorakit.core.layering.parameter_sites import bare_parameters
from lorakit.core.layering.sitemap import survey
from lorakit.core.making.attaching import with_targets
from lorakit.durable import write_bytes
from lorakit.errors import ConfigError, DataError
from lorakit.peft.eva import get_eva_state_dict, initialize_lora_eva_weights
from lorakit.peft.init_steps import EIGENS, GRADIENT, for_attaching
from lorakit.peft.loftq import replace_lora_weights_loftq
from lorakit.targets import resolve

__all__ = [
    "CordaEigens",
    "for_attaching",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
]

CORDA_FIELDS = ("sample_count", "covariance_matrix", "corda_method", "rank")
DENSE = ("Linear", "Conv1D")
Cache = str | PathLike[str] | None


@dataclass
class CordaEigens:
    """What CorDA found for a module.

    Attributes:
        S_WC: Singular values, (r,).
        U_WC: Left singular vectors, (out, r).
        V_WC: Right ones times the inverse of the covariance, (in, r).
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Look at what the targeted modules receive, for init_lora_weights="corda"; `get_peft_model` comes after it.

    Args:
        model: The model that will be adapted; its targeted modules get an attribute `eigens`.
        lora_config: With `corda_config`: files named there are read where they exist, else written, as safetensors.
        run_model: Runs the model over the data; not needed where a file holds the result.
        hooked_model: The model that `run_model` runs, where it is another one.

    Raises:
        ConfigError: There is no corda_config, its method is unknown, run_model is missing, or no dense module is named.
        AdapterFileError: A cache is damaged, or a pickle.
        DataError: Nothing reached a module.
    """
    settings = _corda(lora_config)
    modules = _dense(model, lora_config, "CorDA initialization. It looks at what reaches")
    if _is_there(settings.cache_file):
        cache = read_tensors(settings.cache_file).tensors  # type: ignore[arg-type]
        for path, module in modules.items():
            found = (_cached(cache, f"{path}.eigens.{word}", settings.cache_file) for word in ("S_WC", "U_WC", "V_WC"))
            setattr(module, EIGENS, CordaEigens(*(t.to(_device(module)) for t in found)))
        return
    if _is_there(settings.covariance_file):
        spread = read_tensors(settings.covariance_file).tensors  # type: ignore[arg-type]
        covariances = {path: _cached(spread, path, settings.covariance_file) for path in modules}
    else:
        covariances = _covariances(model, lora_config, run_model, hooked_model, modules)
        if settings.covariance_file is not None:
            write_bytes(settings.covariance_file, encode(covariances, {"format": "pt"}))
    collected = {path: _inputs(covariance) for path, covariance in covariances.items()}
    statistics = reduced(model, lora_config.with_fields(init_lora_weights="corda"), collected, ("partial_targets",))
    for path, tensors in statistics.sites.items():
        eigens = CordaEigens(tensors["S"], tensors["U"], tensors["Vh"].T.contiguous())
        setattr(modules[path], EIGENS, eigens)
    if settings.prune_temporary_fields:
        for module in modules.values():
            for field in CORDA_FIELDS:
                vars(module).pop(field, None)
    if settings.cache_file is not None:
        words = {"S": "S_WC", "U": "U_WC"}
        kept = {f"{p}.eigens.{word}": t[name] for p, t in statistics.sites.items() for name, word in words.items()}
        kept |= {f"{path}.eigens.V_WC": t["Vh"].T.contiguous() for path, t in statistics.sites.items()}
        write_bytes(settings.cache_file, encode(kept, {"format": "pt"}))


def _corda(config: LoraConfig) -> CordaConfig:
    if config.corda_config is None:
        raise ConfigError("preprocess_corda needs a corda_config: LoraConfig(corda_config=CordaConfig(...)).")
    if config.corda_config.corda_method not in ("ipm", "kpm"):
        raise ConfigError(
            f"Invalid corda_method found: {config.corda_config.corda_method}, it should be 'ipm' or 'kpm'."
        )
    return config.corda_config


def _inputs(covariance: Tensor) -> InputStatistics:
    """A covariance that is averaged over calls already, as statistics of one call."""
    found = InputStatistics()
    found.rows = found.calls = 1
    found.gram, found.total = covariance, covariance[0]
    return found


def _covariances(
    model: nn.Module,
    config: LoraConfig,
    run_model: Callable[[], Any] | None,
    hooked_model: nn.Module | None,
    modules: Mapping[str, nn.Module],
) -> dict[str, Tensor]:
    """Path -> Σ x·xᵀ over the rows of a call, averaged over calls, (in, in); also left on the modules, as PEFT does."""
    if run_model is None:
        raise ConfigError("run_model must be specified when covariance file and cache file aren't built.")
    hooked = modules if hooked_model is None or hooked_model is model else _targeted(hooked_model, config)
    seen = {path: InputStatistics() for path in modules}

    def look(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
            rows = evened(args[0].detach().reshape(-1, args[0].shape[-1]))
            if not bool(torch.isfinite(rows).all()):
                raise DataError(f"{path}: Invalid value found in input, please check your input data.")
            seen[path].add(rows)

        return hook

    runs = hooked_model or model
    runs.eval()
    handles = [hooked[path].register_forward_hook(look(path)) for path in seen if path in hooked]
    try:
        with torch.no_grad():
            run_model()
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for path, module in modules.items():
        if not seen[path].rows:
            raise DataError(f"{path}: run_model brought nothing to this module. Leave it out of the targets.")
        half = config.corda_config is not None and config.corda_config.use_float16_for_covariance
        spread = seen[path].second_moment() * (seen[path].rows / seen[path].calls)
        found[path] = spread.half().float() if half else spread
        module.covariance_matrix, module.sample_count = found[path], seen[path].calls  # type: ignore[assignment]
    return found


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: Cache = None
) -> None:
    """Take the gradients of targeted weights, for init_lora_weights="lora_ga"; `get_peft_model` comes after it.

    Args:
        model: The model that will be adapted; its targeted modules get an attribute `_peft_loraga_grad`.
        lora_config: With `lora_ga_config`.
        train_step: Runs forward and backward, once or several times; nothing else.
        cache_file: Read where it exists, else written, as safetensors.

    Raises:
        ConfigError: There is no lora_ga_config, no dense module is named, or a targeted weight is quantised.
        TargetError: The config names nothing.
        AdapterFileError: The cache is damaged, or a pickle.
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)."
        )
    modules = _dense(model, lora_config, "LoRA-GA initialization. It takes gradients of")
    for path, module in modules.items():
        if not base_of(module).written:
            raise ConfigError(NOT_WRITTEN.format(parameter=f"{path}.weight", type=type(module).__name__))
        if base_of(module).quantised or hasattr(module, "quant_state"):
            raise ConfigError(
                f"LoRA-GA does not support quantized models. Found quantized module: {path!r}: its weight takes no "
                "gradient. Collect on the base as it was before it was quantised."
            )
    if _is_there(cache_file):
        cache = read_tensors(cache_file).tensors  # type: ignore[arg-type]
        for path, module in modules.items():
            setattr(module, GRADIENT, _cached(cache, f"{path}.{GRADIENT}", cache_file).to(_device(module)))
        return
    with _only_trained(model, modules.values()) as counts, torch.enable_grad():
        train_step()
        for module in modules.values():
            weight: Any = module.weight
            if weight.grad is not None and counts[module]:
                setattr(module, GRADIENT, weight.grad.detach() / counts[module])
    if cache_file is not None:
        kept = {f"{path}.{GRADIENT}": getattr(module, GRADIENT) for path, module in modules.items()}
        write_bytes(cache_file, encode(kept, {"format": "pt"}))


@contextmanager
def _only_trained(model: nn.Module, modules: Collection[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """The weights of these modules alone take gradients; how often a gradient came to each module is counted."""
    weights: list[Any] = [module.weight for module in modules]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [(weight, weight.grad) for weight in weights]
    was_training, counts = model.training, dict.fromkeys(modules, 0)

    def count(module: nn.Module, *_: Any) -> None:
        counts[module] += 1

    handles = [module.register_full_backward_hook(count) for module in modules]
    try:
        model.train()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(True)
        yield counts
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for weight, gradient in before:
            weight.grad = gradient
        model.train(was_training)


def _targeted(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Path -> module, of the dense modules that a config names."""
    site_map = survey(model)
    asked = with_targets(config, model)
    bare = bare_parameters(site_map, model) if asked.target_parameters else None
    matches: Iterable[Any] = resolve(site_map.candidates, asked, allow_partial=True, parameters=bare).matches
    return {match.path: site_map.base(match.path) for match in matches if match.kind in DENSE}


def _dense(model: nn.Module, config: LoraConfig, what: str) -> dict[str, nn.Module]:
    modules = _targeted(model, config)
    if not modules:
        raise ConfigError(
            f"No supported layers found for {what} nn.Linear and Conv1D, and target_modules names none of these."
        )
    return modules


def _is_there(path: Cache) -> bool:
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0


def _cached(tensors: Mapping[str, Tensor], name: str, path: Cache) -> Tensor:
    if name not in tensors:
        raise ConfigError(f"{path}: there is nothing for {name}; it is of another model or config. Remove the file.")
    return tensors[name]


def _device(module: nn.Module) -> torch.device:
    return base_of(module).device(module, "weight")
