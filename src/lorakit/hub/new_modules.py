"""Find the modules of a model that its files have no weights for, such as a new head; no weights are loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from lorakit.config import HEADS_BY_TASK, TaskType
from lorakit.hub.model_config import weight_files
from lorakit.hub.sources import ModelSource
from lorakit.hub_cache import offline
from lorakit.targets import names_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Sizes: TypeAlias = "dict[str, tuple[int, ...]]"
"""Name of a tensor -> its shape."""

_HEADS: Mapping[str, tuple[str, ...]] = {
    "classification": HEADS_BY_TASK[TaskType.SEQ_CLS],
    "token-classification": HEADS_BY_TASK[TaskType.TOKEN_CLS],
}
"""Task, as in `lorakit.hub.model_config.TASKS` -> possible names of its head."""


def full_modules(model: PreTrainedModel, source: ModelSource, task: str) -> tuple[str, ...]:
    """Return the paths of the modules that a task trains in full: its head, and modules that the files lack.

    The pooler of a model that computes embeddings is set to None if the files lack it, as when the model is loaded.
    """
    missing = missing_names(model, source)
    if is_unused_pooler(task, missing):
        model.pooler = None
        return ()
    heads = _HEADS.get(task)
    if heads is None:
        return ()
    paths = {path for name, _ in model.named_parameters() for path in _above(name)}
    full = {path for path in paths if any(names_path(head, path) for head in heads)} | set(modules_with(model, missing))
    return tuple(sorted(path for path in full if not full.intersection(_above(path))))


def _above(path: str) -> list[str]:
    """Return the paths of the modules that contain a module or parameter, outermost first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def is_unused_pooler(task: str, missing: Collection[str]) -> bool:
    """Return whether only the pooler is missing, as in files of masked language models; embeddings do not use it."""
    return task == "encoder" and bool(missing) and all(name.startswith("pooler.") for name in missing)


def unused_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths of layers on whose output the last hidden states do not depend.

    They are found by a backward pass on the meta device, which sets the gradients of the model's parameters.
    """
    import torch

    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    with contextlib.suppress(Exception):  # some models read values, which meta tensors do not have
        model.eval()(input_ids=ids).last_hidden_state.sum().backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        return tuple(name.removesuffix(".weight") for name in without if name.endswith(".weight"))
    return ()


def modules_with(model: PreTrainedModel, missing: Collection[str]) -> tuple[str, ...]:
    """Return the paths of the largest modules all of whose parameters are missing."""
    present = {name for name, _ in model.named_parameters()} - set(missing)
    found = set()
    for name in missing:
        path = name.rpartition(".")[0]
        while path and not any(other.startswith(f"{path.rpartition('.')[0]}.") for other in present):
            above = path.rpartition(".")[0]
            if not above:
                break
            path = above
        found.add(path)
    return tuple(sorted(found))


def missing_names(model: PreTrainedModel, source: ModelSource) -> frozenset[str]:
    """Return the names of parameters that a model's files lack, or have with another shape.

    The result is empty if the files would have to be downloaded, or if all weights are missing, so that the files are
    not those of this model.
    """
    stored = _stored(source)
    if stored is None:
        return frozenset()
    aliases: dict[int, list[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    sizes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    present = {name for name, size in _renamed(model, stored).items() if size in (None, sizes.get(name))}
    missing = [names[0] for names in aliases.values() if present.isdisjoint(names)]
    return frozenset(missing if len(missing) < len(aliases) else ())


def _renamed(model: PreTrainedModel, stored: Sizes) -> dict[str, tuple[int, ...] | None]:
    """Return the names of stored tensors in the model -> their shapes; None for tensors that are converted."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[int, ...] | None] = {}
    for name, size in stored.items():
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, pattern = rename_source_key(name, [], [], prefix, expected)
        if pattern is None:
            found[renamed] = size
        else:
            first, *_ = targets = by_pattern[pattern].target_patterns
            found |= {renamed.replace(first, target): None for target in targets}
    return found


def _stored(source: ModelSource) -> Sizes | None:
    """Return the tensors in a model's safetensors files, or None if they are unknown."""
    if source.kind in ("config", "gguf"):
        return None
    files = weight_files(source)
    if files is not None:
        return _sizes(files)
    return _on_hub(source) if source.kind == "hub" else None


def _sizes(files: Iterable[Path]) -> Sizes:
    from safetensors import safe_open

    found: Sizes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def _on_hub(source: ModelSource) -> Sizes | None:
    """Return the tensors of a model on the Hub, read from the headers of its files, or None if it is unreachable."""
    import huggingface_hub

    if offline():
        return None
    try:
        metadata = huggingface_hub.get_safetensors_metadata(source.path_or_id, revision=source.revision)
    except Exception:  # noqa: BLE001 - depends on the client's transport; the loader reports what prevents loading
        return None
    return {name: tuple(info.shape) for part in metadata.files_metadata.values() for name, info in part.tensors.items()}
