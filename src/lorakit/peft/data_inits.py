"""The caches of PEFT's two-step inits: safetensors here, checked against the model before anything is left on it.

Where PEFT's two-step inits meet: what `preprocess_corda` and `preprocess_loraga` left on a model is taken.

Inits that look at data or gradients, in PEFT's two steps: look first, attach after (EVA: the other way round).

What was found stays on the base's modules under PEFT's attributes until `get_peft_model` takes it. Arithmetic and
collecting are `lorakit.core`'s; caches are safetensors, and a pickle is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import CordaConfig, LoraConfig
from lorakit.core.attachment.attaching import with_targets
from lorakit.core.files.tensor_file import encode, read_tensors
from lorakit.core.kinds import Slot, kind_of
from lorakit.core.model.index import survey
from lorakit.core.model.target_weights import bare_parameters
from lorakit.core.operations.data_init import reduced
from lorakit.core.quantization import NOT_WRITTEN, at_least_fp32, base_of
from lorakit.core.statistics.collecting import evened, in_mode
from lorakit.core.statistics.moments import GradientStatistics, InputStatistics
from lorakit.durable import write_bytes
from lorakit.errors import AdapterFileError, ConfigError, DataError, warn_caller
from lorakit.peft.eva import get_eva_state_dict, initialize_lora_eva_weights
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


Given = str | PathLike[str] | None


def is_there(path: Given) -> bool:
    """Whether a cache can be read; an empty file, as a name that was only reserved, is none."""
    return path is not None and Path(path).is_file() and Path(path).stat().st_size > 0


@dataclass(frozen=True)
class Cache:
    """A cache that was read.

    Attributes:
        path: Where it lies.
        tensors: Name -> tensor (…).
        words: What its header says.
    """

    path: str
    tensors: Mapping[str, Tensor]
    words: Mapping[str, str]

    @classmethod
    def of(cls, path: Given) -> Cache:
        """Read it.

        Args:
            path: The file.

        Raises:
            AdapterFileError: It is damaged, or a pickle, as PEFT writes it.
        """
        where = str(path)
        try:
            file = read_tensors(where)
        except AdapterFileError as cause:
            raise AdapterFileError(
                f"{cause} Caches are safetensors here and pickles in PEFT: remove the file, or write what PEFT loads "
                "from it with safetensors.torch.save_file."
            ) from None
        return cls(where, file.tensors, file.metadata)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """One of its tensors, such as (out, r).

        Args:
            name: Its name.
            shape: The shape that it must have, or None for any.

        Raises:
            ConfigError: It is not there, has another shape, or is not finite.
        """
        found = self.tensors.get(name)
        if found is None:
            raise ConfigError(
                f"{self.path}: there is nothing for {name}; it is of another model or config. Remove the file.",
                where=self.path,
            )
        if shape is not None and found.shape != shape:
            raise ConfigError(
                f"{self.path}: {name} has shape {tuple(found.shape)}, and {shape} was expected; it is of another model "
                "or config. Remove the file.",
                where=self.path,
            )
        if not bool(torch.isfinite(found).all()):
            raise ConfigError(f"{self.path}: {name} holds NaN or infinite numbers. Remove the file.", where=self.path)
        return found


EIGENS, GRADIENT = "eigens", "_peft_loraga_grad"
"""Attributes under which PEFT's functions leave what they found on a module."""


def for_attaching(model: nn.Module, config: LoraConfig) -> tuple[LoraConfig, core.Statistics | None]:
    """What `core.attach` needs for a config: PEFT's two-step inits leave their findings on the model, which are taken.

    "eva" begins as True does and is made what it is by `initialize_lora_eva_weights`.

    Args:
        model: The base.
        config: As it was given.

    Returns:
        The config to attach, and the statistics, or None.

    Raises:
        ConfigError: The first step was left out.
    """
    init = config.init_lora_weights
    if init == "eva":
        return config.with_fields(init_lora_weights=True, eva_config=None), None
    if init not in ("corda", "lora_ga"):
        return config, None
    word, function = (EIGENS, "preprocess_corda") if init == "corda" else (GRADIENT, "preprocess_loraga")
    found = {path: vars(module).pop(word) for path, module in model.named_modules() if word in vars(module)}
    if not found:
        raise ConfigError(
            f"`{word}` attribute not found for layer, please run `{function}` first: init_lora_weights={init!r} begins "
            "at what the data show."
        )
    if init == "corda":
        sites = {path: {"U": e.U_WC, "S": e.S_WC, "Vh": e.V_WC.T} for path, e in found.items()}
        return config, core.Statistics(config, sites)
    if config.lora_ga_config is None:
        raise ConfigError("lora_ga_config must be provided when init_lora_weights='lora_ga'.")
    gradients = {path: _gradient(model.get_submodule(path), gradient) for path, gradient in found.items()}
    statistics = reduced(model, config, gradients, ("partial_targets",))
    named = [
        match.path
        for match in resolve(survey(model).candidates, with_targets(config, model), allow_partial=True).matches
    ]
    without = [path for path in named if path not in statistics.sites]
    if without:
        warn_caller(
            f"LoRA-GA has no gradient for {', '.join(without)}; they begin as with init_lora_weights=True. "
            "preprocess_loraga takes those of dense layers that the loss depends on."
        )
    return config, dataclasses.replace(statistics, others_usual=True)


def _gradient(module: nn.Module, gradient: Tensor) -> GradientStatistics:
    found = GradientStatistics()
    found.add(at_least_fp32(gradient.T if base_of(module).transposed else gradient))
    found.batches = 1
    return found


CORDA_FIELDS = ("covariance_matrix", "corda_method", "rank", "sample_count")
"""What PEFT leaves on a module where `prune_temporary_fields` is off; the last is known where data were run alone."""

DENSE = ("Linear", "Conv1D")


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
    if is_there(settings.cache_file):
        _eigens_from(settings, modules)
        return
    covariances = _spread(settings, modules)
    if covariances is None:
        covariances = _covariances(model, lora_config, run_model, hooked_model, modules)
        if settings.covariance_file is not None:
            write_bytes(settings.covariance_file, encode(covariances, {"format": "pt"}))
    collected = {path: _inputs(covariance) for path, covariance in covariances.items()}
    statistics = reduced(model, lora_config.with_fields(init_lora_weights="corda"), collected, ("partial_targets",))
    for path, tensors in statistics.sites.items():
        eigens = CordaEigens(tensors["S"], tensors["U"], tensors["Vh"].T.contiguous())
        setattr(modules[path], EIGENS, eigens)
        left = (covariances[path], settings.corda_method, len(tensors["S"]))
        _leave(modules[path], {} if settings.prune_temporary_fields else dict(zip(CORDA_FIELDS[:3], left, strict=True)))
    if settings.cache_file is not None:
        words = {"S": "S_WC", "U": "U_WC"}
        kept = {f"{p}.eigens.{word}": t[name] for p, t in statistics.sites.items() for name, word in words.items()}
        kept |= {f"{path}.eigens.V_WC": t["Vh"].T.contiguous() for path, t in statistics.sites.items()}
        write_bytes(settings.cache_file, encode(kept, {"format": "pt", "corda_method": settings.corda_method}))


def _leave(module: nn.Module, fields: Mapping[str, Any]) -> None:
    """What PEFT leaves on a module besides: these fields, or none of its own."""
    if not fields:
        for field in CORDA_FIELDS:
            vars(module).pop(field, None)
    for field, value in fields.items():
        setattr(module, field, value)


def _spread(settings: CordaConfig, modules: Mapping[str, nn.Module]) -> dict[str, Tensor] | None:
    """Path -> covariance (in, in) as a file has it, or None where there is no file."""
    if not is_there(settings.covariance_file):
        return None
    cache = Cache.of(settings.covariance_file)
    sides = {path: _slot(module).in_features for path, module in modules.items()}
    return {path: cache.tensor(path, (n, n)) for path, n in sides.items()}


def _eigens_from(settings: CordaConfig, modules: Mapping[str, nn.Module]) -> None:
    """Leave on the modules what a cache holds for them; all of it is checked first."""
    cache, found = Cache.of(settings.cache_file), {}
    method = cache.words.get("corda_method", settings.corda_method)
    if method != settings.corda_method:
        raise ConfigError(
            f"{cache.path}: holds what corda_method {method!r} takes, and the config says {settings.corda_method!r}. "
            "Remove the file, or name another.",
            where=cache.path,
        )
    for path, module in modules.items():
        slot, r = _slot(module), len(cache.tensor(f"{path}.eigens.S_WC"))
        shapes = {"S_WC": (r,), "U_WC": (slot.out_features, r), "V_WC": (slot.in_features, r)}
        found[path] = [cache.tensor(f"{path}.eigens.{word}", shape) for word, shape in shapes.items()]
    for path, module in modules.items():
        setattr(module, EIGENS, CordaEigens(*(tensor.to(_device(module)) for tensor in found[path])))


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
                raise DataError(f"{path}: Invalid value found in input, please check your input data.", where=path)
            seen[path].add(rows)

        return hook

    runs = hooked_model or model
    handles = [hooked[path].register_forward_hook(look(path)) for path in seen if path in hooked]
    try:
        with torch.no_grad(), in_mode(runs, False):
            run_model()
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for path, module in modules.items():
        if not seen[path].rows:
            raise DataError(
                f"{path}: run_model brought nothing to this module. Leave it out of the targets.", where=path
            )
        half = config.corda_config is not None and config.corda_config.use_float16_for_covariance
        spread = seen[path].second_moment() * (seen[path].rows / seen[path].calls)
        found[path] = spread.half().float() if half else spread
        module.covariance_matrix, module.sample_count = found[path], seen[path].calls  # type: ignore[assignment]
    return found


def preprocess_loraga(
    model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any], cache_file: Given = None
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
    modules = _takes_gradients(_dense(model, lora_config, "LoRA-GA initialization. It takes gradients of"))
    if is_there(cache_file):
        _gradients_from(Cache.of(cache_file), modules)
        return
    for module in modules.values():
        vars(module).pop(GRADIENT, None)  # of an earlier call
    with in_mode(model, True), _only_trained(model, modules.values()) as counts, torch.enable_grad():
        train_step()
        for module in modules.values():
            weight: Any = module.weight
            if weight.grad is not None and counts[module]:
                setattr(module, GRADIENT, weight.grad.detach() / counts[module])
    if cache_file is not None:
        reached = {path: vars(module)[GRADIENT] for path, module in modules.items() if GRADIENT in vars(module)}
        kept = {f"{path}.{GRADIENT}": gradient for path, gradient in reached.items()}
        words = {"format": "pt", "without": "\n".join(sorted(modules.keys() - reached.keys()))}
        write_bytes(cache_file, encode(kept, words))


def _takes_gradients(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    for path, module in modules.items():
        if not base_of(module).written:
            raise ConfigError(NOT_WRITTEN.format(parameter=f"{path}.weight", type=type(module).__name__))
        if base_of(module).quantised or hasattr(module, "quant_state"):
            raise ConfigError(
                f"LoRA-GA does not support quantized models. Found quantized module: {path!r}: its weight takes no "
                "gradient. Collect on the base as it was before it was quantised."
            )
    return modules


def _gradients_from(cache: Cache, modules: Mapping[str, nn.Module]) -> None:
    """Leave on the modules what a cache holds for them; all of it is checked first."""
    without = set(cache.words.get("without", "").split("\n"))
    weights: dict[str, Any] = {path: module.weight for path, module in modules.items() if path not in without}
    found = {path: cache.tensor(f"{path}.{GRADIENT}", tuple(weight.shape)) for path, weight in weights.items()}
    for path, gradient in found.items():
        setattr(modules[path], GRADIENT, gradient.to(_device(modules[path])))


@contextmanager
def _only_trained(model: nn.Module, modules: Collection[nn.Module]) -> Iterator[dict[nn.Module, int]]:
    """The weights of these modules alone take gradients; how often a gradient came to each module is counted."""
    weights: list[Any] = [module.weight for module in modules]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = [(weight, weight.grad) for weight in weights]
    counts = dict.fromkeys(modules, 0)

    def count(module: nn.Module, *_: Any) -> None:
        counts[module] += 1

    handles = [module.register_full_backward_hook(count) for module in modules]
    try:
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


def _targeted(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Path -> module, of the dense modules that a config names."""
    site_map = survey(model)
    asked = with_targets(config, model)
    bare = bare_parameters(site_map) if asked.target_parameters else None
    matches: Iterable[Any] = resolve(site_map.candidates, asked, allow_partial=True, parameters=bare).matches
    return {match.path: site_map.base(match.path) for match in matches if match.kind in DENSE}


def _slot(module: nn.Module) -> Slot:
    kind: Any = kind_of(type(module))
    slot: Slot = kind.slots(module)[0]
    return slot


def _dense(model: nn.Module, config: LoraConfig, what: str) -> dict[str, nn.Module]:
    modules = _targeted(model, config)
    if not modules:
        raise ConfigError(
            f"No supported layers found for {what} nn.Linear and Conv1D, and target_modules names none of these."
        )
    return modules


def _device(module: nn.Module) -> torch.device:
    return base_of(module).device(module, "weight")
