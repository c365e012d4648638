"""Load saved adapters into a wrapped model, optionally renaming their tensors."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.config.types import Value
from lorakit.core.attachment.loading import check_base, place_adapter
from lorakit.core.attachment.old_experts import with_fused_experts
from lorakit.core.files.adapter_folder import AdapterFiles, read_adapter
from lorakit.core.files.inspecting import implausible, judge_files
from lorakit.core.model.checks import ALLOWANCES
from lorakit.core.model.index import AdapterIndex
from lorakit.errors import NotYetSupported, ShapeMismatchError, did_you_mean, warn_caller
from lorakit.hub_cache import HubOptions, local_adapter
from lorakit.peft.layer_methods import answer_as_peft
from lorakit.peft.model_adapters import CONFIGS, configs_of, user_model
from lorakit.peft.state_dicts import WRAPPED, IncompatibleKeys, StateDictError, names_of, put_tensors
from lorakit.peft.tuner import kinds_of
from lorakit.peft.weight_conversion import TARGETS

WITHOUT_EFFECT = (
    *("low_cpu_mem_usage", "ephemeral_gpu_offload"),  # factors are created once, on their final device
    *("torch_device", "device_map", "max_memory", "offload_folder", "offload_dir"),  # factors use their site's device
    *("torch_dtype", "dtype"),  # factors are fp32 or wider, regardless of the base dtype
    "proxies",  # the Hub client reads HTTPS_PROXY
)
"""Options that are accepted but have no effect."""

NOT_BUILT = "push_to_hub"
"""Option that is not supported yet; a falsy value is accepted and ignored."""


def check_options(call: str, options: Mapping[str, Any]) -> None:
    """Check the options that a call accepts but does not use.

    Raises:
        NotYetSupported: An unsupported option would change the result.
    """
    for name, value in options.items():
        if name == NOT_BUILT and value:
            raise NotYetSupported(f"{call}: {name}={value!r} is not supported yet. Leave it at False.", field=name)
        if name not in (*WITHOUT_EFFECT, NOT_BUILT):
            meant = did_you_mean(name, (*WITHOUT_EFFECT, NOT_BUILT))
            warn_caller(f"{call}: unknown option {name} has no effect.{meant}")


def adapter_folder(model_id: str | os.PathLike[str], options: MutableMapping[str, Any]) -> Path:
    """Return the local directory of an adapter; one on the Hub is downloaded to its cache."""
    return local_adapter(model_id, HubOptions.taken_from(options))


LENIENT = tuple(word for word in ALLOWANCES if word != "nonfinite")
"""Checks that only warn on failure, since PEFT does not perform them; NaN and infinite values still raise an error."""


def load_whole(
    model: nn.Module, folder: Path, name: str, *, trainable: bool, config: LoraConfig | None = None
) -> IncompatibleKeys:
    """Load a saved adapter as a new one; return the names of tensors that only the model or only the file has.

    Raises:
        StateDictError: Shapes do not match.
    """
    try:
        warnings, held = _load(model, folder, name, trainable, config)
    except ShapeMismatchError as refused:
        raise StateDictError(f"size mismatch: {refused}", **refused.fields) from None
    if not warnings:
        return IncompatibleKeys([], [])
    targets = dict(names_of(model, name))
    missing = [key for on_disk, key in targets.items() if on_disk not in held]
    return IncompatibleKeys(missing, sorted(held - set(targets)))


def _load(
    model: nn.Module, folder: Path, name: str, trainable: bool, config: LoraConfig | None
) -> tuple[Sequence[str], frozenset[str]]:
    """Load an adapter; return any warnings, and the names of the tensors in its files with fused experts."""
    user = user_model(model)
    if config is None:
        report = core.load_adapter(user, folder, name, trainable=trainable, allow=LENIENT)
        warnings, held = report.warnings, report.tensors
    else:
        files = read_adapter(folder)
        found = (*files.warnings, *check_base(user, files, LENIENT)[1])
        files = dataclasses.replace(files, config=config, config_is_ours=False, warnings=found)
        _, warnings, held = place_adapter(user, files, name, trainable, LENIENT, kinds_of(config))
        config.inference_mode = not trainable
        configs = configs_of(user)
        loaded = configs[name]
        if loaded.target_parameters != config.target_parameters:  # experts of transformers 4 were fused
            for field in TARGETS:
                setattr(config, field, getattr(loaded, field))
        configs[name] = config
    setattr(user, CONFIGS, configs_of(user))
    answer_as_peft(user)
    return warnings, held


def read_by_names(
    model: nn.Module, folder: Path, key_mapping: Mapping[str, str] | None, *, may_be_zero: bool
) -> AdapterFiles:
    """Read an adapter's files, with renamed tensors and fused experts, and warn of implausible values."""
    files, tensors = _renamed_tensors(folder, key_mapping)
    files = dataclasses.replace(files, file=dataclasses.replace(files.file, tensors=tensors))
    user = user_model(model)
    files = with_fused_experts(files, AdapterIndex.of(user))
    warn_of_problems(user, files, LENIENT, may_be_zero=may_be_zero)
    return files


def _renamed_tensors(folder: Path, key_mapping: Mapping[str, str] | None) -> tuple[AdapterFiles, dict[str, Tensor]]:
    files = read_adapter(folder)
    return files, {renamed(key, key_mapping or {}): tensor for key, tensor in files.file.tensors.items()}


def put_by_names(model: nn.Module, files: AdapterFiles, name: str, ignore_sizes: bool) -> IncompatibleKeys:
    """Copy an adapter's tensors by name into an existing one; `ignore_sizes` leaves out those of other shapes."""
    result = put_tensors(model, files.file.tensors, name, ignore_sizes)
    own = {key for _, key in names_of(model, name)}
    return IncompatibleKeys([key for key in result.missing_keys if key in own], result.unexpected_keys)


def warn_of_problems(
    user: nn.Module, files: AdapterFiles, allow: Collection[str], *, may_be_zero: bool = False
) -> None:
    """Warn if an adapter was trained on another base, which `allow` must permit, or has implausible values."""
    of_base = check_base(user, files, allow)[1]
    for message in (*of_base, *implausible(files.folder, judge_files(files), may_be_zero)):
        warn_caller(message)


def renamed(key: str, key_mapping: Mapping[str, str]) -> str:
    """Return a tensor's new name according to the first pattern that matches; the name's prefix is not changed."""
    bare = key.removeprefix(WRAPPED)
    for pattern, replacement in key_mapping.items():
        changed, count = re.subn(pattern, replacement, bare)
        if count:
            return WRAPPED + changed
    return key


def load_peft_weights(
    model_id: str, device: str | None = None, key_mapping: Mapping[str, str] | None = None, **kwargs: Value
) -> dict[str, Tensor]:
    """Return the tensors (any shape) of a saved adapter by name on disk; `kwargs` are those of `HubOptions`."""
    folder = adapter_folder(model_id, kwargs)
    check_options("load_peft_weights", kwargs)
    _, tensors = _renamed_tensors(folder, key_mapping)
    return tensors if device is None else {key: tensor.to(device) for key, tensor in tensors.items()}
