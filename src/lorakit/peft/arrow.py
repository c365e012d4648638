"""`create_arrow_model`: load several adapters and a router that sends each token to the adapters that fit it best."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import core
from lorakit.config import CONFIG_FILE, LoraConfig
from lorakit.config.nested import ArrowConfig
from lorakit.core.variants.arrow import GENERAL_PREFIX
from lorakit.errors import AdapterFileError, ConfigError, ConfigTypeError
from lorakit.peft import model_adapters
from lorakit.peft.model import PeftModel

TASK_PREFIX = "task_"
"""Start of the names of the adapters for tasks, as in PEFT; a number follows."""
ROUTER = "arrow_router"
"""Name of the router's adapter, as in PEFT."""
FEATURES = ("use_dora", "alora_invocation_tokens", "lora_bias", "kasa_config", "arrow_config")
"""Config fields of adapters whose update of a dense layer is not s·B·A."""


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Load adapters as experts, and add and activate a router over them; an error leaves the model unchanged.

    The experts are named `task_0`, `task_1`, …, the adapters of general knowledge, needed if `use_gks` is set, `gks_0`,
    …, and the router `arrow_router`. An adapter that is added to the model later becomes a further expert.

    Args:
        base_model: The base model without adapters; adapted in place.
        task_specific_adapter_paths: The experts: local directories, Hub ids or Hub ids followed by a subfolder.
        arrow_config: The router's settings; the names of the adapters are written to it.
        general_adapter_paths: The adapters whose mean is subtracted from the experts.
        adapter_kwargs: Passed to `PeftModel.from_pretrained` and `load_adapter`.

    Raises:
        ConfigError: An argument is missing, `top_k` exceeds the number of experts, the model already has adapters, or
            the adapters have different ranks or sites, or updates other than s·B·A.
        AdapterFileError: An adapter's files are missing or damaged, or do not match the model.
    """
    general = _general_paths(arrow_config, general_adapter_paths)
    experts = _paths("task_specific_adapter_paths", task_specific_adapter_paths)
    if arrow_config.top_k > len(experts):
        text = f"top_k is {arrow_config.top_k}, but there are {len(experts)} adapter(s). Lower it, or pass more."
        raise ConfigError(text, what=arrow_config.top_k, field="top_k")
    user = model_adapters.user_model(base_model)
    if model_adapters.configs_of(user):
        raise ConfigError("The model has adapters, which would become experts; unload them.", field="base_model")
    names = [f"{TASK_PREFIX}{i}" for i in range(len(experts))]
    names_of_general = [f"{GENERAL_PREFIX}{i}" for i in range(len(general))]
    sources = dict(zip((*names, *names_of_general), map(source_of, (*experts, *general)), strict=True))
    configs = {name: _config(name, *source, **adapter_kwargs) for name, source in sources.items()}
    _check_alike(configs)
    with _unchanged_on_error(user):
        model = _loaded(base_model, sources, adapter_kwargs)
        first = configs[names[0]]
        router = LoraConfig(
            arrow_config=arrow_config,
            target_modules=_targets(model, list(sources)),
            r=first.r,
            layers_to_transform=first.layers_to_transform,
            layers_pattern=first.layers_pattern,
        )
        model.add_adapter(ROUTER, router)
    model.set_adapter(ROUTER)
    for config in (arrow_config, model.peft_config[ROUTER].arrow_config):
        if config is not None:
            config.task_adapter_names, config.gks_adapter_names = list(names), list(names_of_general)
    return model


@contextlib.contextmanager
def _unchanged_on_error(user: nn.Module) -> Iterator[None]:
    """Remove all adapters from the user's model if the block raises an error, and restore the model's mode."""
    training = user.training
    try:
        yield
    except BaseException:
        for name in tuple(model_adapters.configs_of(user)):
            core.detach(user, name)
        user.__dict__.pop(model_adapters.CONFIGS, None)
        user.train(training)  # loading an adapter selects the eval mode
        raise


def _general_paths(arrow_config: ArrowConfig, paths: Sequence[str] | None) -> Sequence[str]:
    if not isinstance(arrow_config, ArrowConfig):
        raise ConfigTypeError.of("arrow_config", arrow_config, "an ArrowConfig")
    return _paths("general_adapter_paths", paths) if arrow_config.use_gks else ()


def _paths(field: str, paths: Sequence[str] | None) -> Sequence[str]:
    if isinstance(paths, (str, os.PathLike)):
        raise ConfigTypeError.of(field, paths, "a list of paths")
    if not paths:
        why = "to subtract general knowledge (use_gks)" if field.startswith("general") else "as experts"
        raise ConfigError(f"{field} must contain at least one adapter's path, {why}.", field=field)
    return paths


def source_of(path: str) -> tuple[str, str | None]:
    """Split the path of an adapter into a local directory or a Hub id, and a subfolder of a Hub repository.

    Raises:
        AdapterFileError: A local directory contains no adapter.
    """
    if Path(path).is_dir():
        if not (Path(path) / CONFIG_FILE).is_file():
            raise AdapterFileError(f"{path}: the directory does not contain {CONFIG_FILE}.", where=path)
        return path, None
    parts = path.strip("/").split("/")
    return ("/".join(parts[:2]), "/".join(parts[2:]) or None) if len(parts) > 1 else (path, None)


def _config(name: str, path: str, subfolder: str | None, **options: Any) -> LoraConfig:
    """Read an adapter's config, and check that its update is s·B·A."""
    config = LoraConfig.from_pretrained(path, options.get("subfolder", subfolder), revision=options.get("revision"))
    assert isinstance(config, LoraConfig)  # another method is an error
    field = next((field for field in FEATURES if getattr(config, field)), None)
    if field is not None:
        text = f"{path}: {field} is set, but Arrow can combine only updates of the form s·B·A."
        raise ConfigError(text, what=name, where=path, field=field)
    return config


def _check_alike(configs: dict[str, LoraConfig]) -> None:
    """Check what the configs tell before any weights are read."""
    (reference, first), *others = configs.items()
    for name, config in others:
        for field in ("r", "target_modules", "layers_to_transform", "layers_pattern"):
            expected, value = getattr(first, field), getattr(config, field)
            if value != expected:
                text = f"Arrow's adapters must agree: {field} of {name} is {value!r}, that of {reference} {expected!r}."
                raise ConfigError(text, what=name, field=field)


def _loaded(base_model: nn.Module, sources: dict[str, tuple[str, str | None]], options: dict[str, Any]) -> PeftModel:
    model: PeftModel | None = None
    for name, (path, subfolder) in sources.items():
        more = dict(options) if subfolder is None else {"subfolder": subfolder, **options}
        if model is None:
            model = PeftModel.from_pretrained(base_model, path, adapter_name=name, **more)
        else:
            model.load_adapter(path, adapter_name=name, **more)
    assert model is not None  # there is at least one expert
    return model


def _targets(model: PeftModel, names: list[str]) -> list[str]:
    """Return the last parts of the paths of the adapters' sites, sorted.

    Raises:
        ConfigError: Adapters have different sites or shapes, or a site's kind is not supported.
    """
    found: dict[str, dict[str, tuple[torch.Size, torch.Size]]] = {name: {} for name in names}
    for site in core.sites(model.get_base_model()):
        for name in found.keys() & site.layer.r.keys():
            factor = site.layer.factor(name)
            found[name][site.path] = (factor.A.shape, factor.B.shape)
    first = found[names[0]]
    for name, shapes in found.items():
        different = sorted(path for path in shapes.keys() | first.keys() if shapes.get(path) != first.get(path))
        if different:
            text = f"Arrow needs the same sites and shapes; {name} and {names[0]} differ at {different[0]}."
            raise ConfigError(text, what=name, where=different[0], field="target_modules")
    return sorted({path.rpartition(".")[2] for path in first})
