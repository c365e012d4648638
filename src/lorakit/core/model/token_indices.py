"""Which rows of which tables an adapter trains: `trainable_token_indices` against a model, and what is tied to them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import ChosenRows, TrainableTokens
from lorakit.core.model.index import AdapterIndex
from lorakit.errors import ConfigError, NoTargetError, TargetError, nearest, warn_caller
from lorakit.targets import names_path

USUAL_NAME = "embed_tokens"
"""Where a list of indices belongs in a model that does not say which module is its input embedding."""


def chosen_rows(
    index: AdapterIndex, config: LoraConfig, sites: Collection[str], saved: Collection[str]
) -> list[ChosenRows]:
    """The rows that a config names.

    Args:
        index: The model's index.
        config: The config.
        sites: Paths of the modules that the same adapter gives factors.
        saved: Paths of the modules that it copies whole.

    Returns:
        One entry per table; those that are tied and named with the same rows are one.

    Raises:
        TargetError: A name matches no table, or another part of an adapter sits on the table.
        ConfigError: Numbers of rows are not in the table, or tied tables are named with different rows.
    """
    named = _named(index, config)
    for path in named:
        _check_free(path, index, config, sites, saved)
    groups = _groups(named, index, config)
    if config.ensure_weight_tying and named and not any(group.tied for group in groups):
        warn_caller(
            "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). Weight "
            "tying will not be applied for trainable_token_indices."
        )
    for group in groups:
        for path in group.tied:
            _check_free(path, index, config, sites, saved)
        _check_standing(group, index)
    return groups


def sharers(index: AdapterIndex, path: str) -> list[str]:
    """Paths of the other modules of the base whose weight is the very parameter of the module at a path."""
    whole = next((group for group in shared_weights(index) if path in group), [])
    return [other for other in whole if other != path]


def shared_weights(index: AdapterIndex) -> list[list[str]]:
    """The modules of the base that share one parameter as their weight, as lists of paths in the model's order.

    Copies of one layer (`layer_replication`) are not meant: they share all they have, and are adapted apart on purpose.
    """
    groups: dict[int, dict[str, str]] = {}
    for path in index.modules:
        weight = table_at(index, path)._parameters.get("weight")
        if weight is not None:
            groups.setdefault(id(weight), {}).setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", path), path)
    return [list(paths.values()) for paths in groups.values() if len(paths) > 1]


def input_embedding(index: AdapterIndex) -> str | None:
    """Path of the model's input embedding in the plain base, or None where the model does not say which it is."""
    getter = getattr(index.model, "get_input_embeddings", None)
    try:
        module = getter() if getter is not None else None
    except (AttributeError, NotImplementedError):  # models without one differ in how they say so
        module = None
    found = (path for path, standing in index.modules.items() if module in (standing, table_at(index, path)))
    return next(found, None) if module is not None else None


def table_at(index: AdapterIndex, path: str) -> nn.Module:
    """The base's module at a path, whatever stands around it."""
    standing = index.modules[path]
    return standing.original_module if isinstance(standing, ModulesToSave) else index.base(path)


def _named(index: AdapterIndex, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    asked = config.trainable_token_indices
    if asked is None:
        return {}
    if not isinstance(asked, Mapping):
        path = input_embedding(index)
        asked = {USUAL_NAME if path is None else path: asked}
    named: dict[str, tuple[int, ...]] = {}
    for name, indices in asked.items():
        paths = [path for path in index.modules if names_path(name, path)]
        if not paths:
            words = nearest(name, [p.rpartition(".")[2] for p in index.modules], 1)
            raise NoTargetError(
                f"Target modules {{{name!r}}} not found in the base model. trainable_token_indices names it"
                + (f"; nearest: {words[0]}." if words else "."),
                what=name,
                field="trainable_token_indices",
            )
        for path in paths:
            named[path] = _checked(index, path, indices)
    return named


def _checked(index: AdapterIndex, path: str, indices: Sequence[int]) -> tuple[int, ...]:
    table = table_at(index, path)
    weight = table._parameters.get("weight")
    dense = isinstance(table, (nn.Embedding, nn.Linear)) and isinstance(weight, Tensor) and weight.is_floating_point()
    if not dense or weight is None:
        raise TargetError(
            f"trainable_token_indices names {path!r}, a {type(table).__name__}; rows can be trained of an nn.Embedding "
            "and of an nn.Linear head with a weight of floats."
        )
    numbers = list(indices)
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in numbers)
    if not numbers or not whole or len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"trainable_token_indices of {path} is {numbers[:8]!r}; it must be different whole numbers, at least one."
        )
    odd = [i for i in numbers if not 0 <= i < weight.shape[0]]
    if odd:
        raise ConfigError(
            f"trainable_token_indices of {path} holds {odd[0]}, and the table has rows 0 to {weight.shape[0] - 1:,}. "
            "For tokens that were added, call model.resize_token_embeddings first."
        )
    return tuple(numbers)


def _groups(named: Mapping[str, tuple[int, ...]], index: AdapterIndex, config: LoraConfig) -> list[ChosenRows]:
    """Tables that share a weight and are named with the same rows, or not at all, are one; the embedding leads."""
    groups: list[ChosenRows] = []
    followers: set[str] = set()
    leading = sorted(named, key=lambda path: not isinstance(table_at(index, path), nn.Embedding))
    for path in leading:
        if path in followers:
            continue
        tied: list[str] = []
        if isinstance(table_at(index, path), nn.Embedding):
            shared = sharers(index, path)
            apart = [other for other in shared if named.get(other, named[path]) != named[path]]
            if apart and config.ensure_weight_tying:
                raise ConfigError(
                    "Cannot ensure weight tying when different token indices are specified for tied layers: "
                    f"{path}: {list(named[path])}, {apart[0]}: {list(named[apart[0]])}. Name the same rows, or "
                    "set ensure_weight_tying=False."
                )
            tied = [other for other in shared if other not in apart]
        followers.update(tied)
        groups.append(ChosenRows(path, named[path], tuple(tied)))
    return groups


def _check_free(
    path: str, index: AdapterIndex, config: LoraConfig, sites: Collection[str], saved: Collection[str]
) -> None:
    if any(path == other or path.startswith(other + ".") for other in saved):
        raise TargetError(
            f"The embedding layer is already marked to be trained fully: {path} is copied whole (modules_to_save), and "
            "trainable_token_indices trains some of its rows. Name it in one of the two."
        )
    standing = index.modules[path]
    if path in sites or (standing is not table_at(index, path) and not isinstance(standing, TrainableTokens)):
        raise TargetError(
            f"trainable_token_indices cannot be applied to {path}: an adapter has factors or a copy there. Take it out "
            "of target_modules or modules_to_save, or give the adapters a model each."
        )


def _check_standing(group: ChosenRows, index: AdapterIndex) -> None:
    """Refuse another grouping than that of adapters that are here already."""
    leader = index.modules[group.path]
    wrong = [group.path] if isinstance(leader, TrainableTokens) and leader.follows else []
    for path in group.tied:
        standing = index.modules[path]
        together = isinstance(leader, TrainableTokens) and isinstance(standing, TrainableTokens) and standing.follows
        fresh = not isinstance(leader, TrainableTokens) and not isinstance(standing, TrainableTokens)
        wrong += [] if together or fresh else [path]
    if wrong:
        raise ConfigError(
            f"trainable_token_indices: rows of another adapter at {wrong[0]} are tied otherwise than these. Name the "
            "same tables in both adapters, or give them a model each."
        )
