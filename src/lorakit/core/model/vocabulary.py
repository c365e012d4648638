"""A vocabulary that grows: the tables with a row per token, rows appended to them, adapters that train these alone.

New tokens: adapters that were trained after the vocabulary grew, and bases that have not grown yet.

An adapter that brings every new row by itself (`trainable_token_indices`, or a copy of the whole table) needs none of
them from the base, so the loader appends rows for it to fill, and compares the base without them. It knows what an
adapter's files say, and no file itself.

Which rows of which tables an adapter trains: `trainable_token_indices` against a model, and what is tied to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import ChosenRows, TrainableTokens
from lorakit.core.model.base_view import base_tensors
from lorakit.core.model.fingerprint import (
    DIFFERENT,
    Fingerprint,
    compare,
    fingerprint,
    sampled_positions,
    vocabulary_of,
)
from lorakit.core.model.index import AdapterIndex
from lorakit.errors import OVERRIDE, ConfigError, ModelError, NoTargetError, TargetError, nearest, warn_caller
from lorakit.targets import names_path


def grow_vocabulary(model: nn.Module, rows: int) -> None:
    """Append rows to the embedding, and to the head, until there are so many; each is the mean of those there.

    Args:
        model: A base without adapters, changed in place; one that has as many already is left as it is.
        rows: How many there shall be.

    Raises:
        ModelError: The model does not say which its embedding is, or has more with a place per token than its tables.
    """
    tables = check_growth(model, rows)
    if tables:
        Growth().append(model, tables, rows)


def check_growth(model: nn.Module, rows: int) -> list[nn.Module]:
    """Whether a base can have so many rows per table; nothing is changed.

    Args:
        model: A base without adapters; its numbers are not needed.
        rows: How many there shall be.

    Returns:
        The tables that lack some.

    Raises:
        ModelError: As `grow_vocabulary`.
    """
    present = vocabulary_of(model)
    if 0 < rows <= present:
        return []
    index = AdapterIndex.of(model)
    path = _embedding(index)
    tables = [table_at(index, table) for table in (path, *tables_per_token(index, path))]
    dense = all(isinstance(table, (nn.Embedding, nn.Linear)) and table.weight.is_floating_point() for table in tables)
    if not dense or _is_odd(index, present):
        raise ModelError(
            f"Tokens cannot be added to this {type(model).__name__}: beside plain embeddings it has something else "
            "with a place per token, which only the model itself can enlarge. Call model.resize_token_embeddings, save "
            "it, and train on that."
        )
    return tables


def with_trained_rows(config: LoraConfig, model: nn.Module, rows: Sequence[int]) -> LoraConfig:
    """A copy of a config that trains some rows of every table with a row per token: the embedding's and the head's.

    Args:
        config: The config.
        model: The base; only read, and its numbers are not needed.
        rows: Numbers of the rows.

    Raises:
        ModelError: The model does not say which its embedding is.
    """
    index = AdapterIndex.of(model)
    path = _embedding(index)
    tied = sharers(index, path)
    apart = [table for table in tables_per_token(index, path) if table not in tied]
    asked: Any = {table: list(rows) for table in (path, *apart)} if apart else list(rows)
    return config.with_fields(trainable_token_indices=asked)


def begin_rows(model: nn.Module, name: str, pieces: Mapping[int, Sequence[int]]) -> None:
    """Let trained rows begin as the mean of the rows of the tokens that their text was until now.   [docs/math.md (93)]

    Args:
        model: An adapted model; the base stays as it is.
        name: The adapter.
        pieces: Number of a trained row -> numbers of the rows of its pieces; others begin as they are.
    """
    for _, module in AdapterIndex.of(model).every(TrainableTokens):
        if module.follows or name not in module:
            continue
        trained, rows = module.token_adapter.rows(name)
        table = module.token_adapter.original()
        with torch.no_grad():
            for place, number in enumerate(trained.tolist()):
                if pieces.get(number):
                    rows[place] = table[list(pieces[number])].to(rows.dtype).mean(0)


def _embedding(index: AdapterIndex) -> str:
    path = input_embedding(index)
    if path is None:
        raise ModelError(
            f"This {type(index.model).__name__} does not say which module is its input embedding, so no token can be "
            "added."
        )
    return path


def tables_per_token(index: AdapterIndex, path: str) -> list[str]:
    """Return paths of the other tables with a row per token: those that share the embedding's weight, and the head."""
    getter = getattr(index.model, "get_output_embeddings", None)
    try:
        head = getter() if getter is not None else None
    except (AttributeError, NotImplementedError):  # models without one differ in how they say so
        head = None
    heads = [p for p, standing in index.modules.items() if head is not None and standing is head and p != path]
    return list(dict.fromkeys([*sharers(index, path), *heads]))


def _is_odd(index: AdapterIndex, vocabulary: int) -> bool:
    """Return whether something else of the model has a place per token, which only the model itself can enlarge."""
    buffers = (buffer for module in index.everything.values() for buffer in module._buffers.values())
    return any(vocabulary in buffer.shape for buffer in buffers if buffer is not None and buffer.ndim > 1)


class Growth:
    """Rows that were appended to tables, and how to take them off again."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, dict[str, Any]]] = []
        self._made: dict[int, nn.Parameter] = {}

    def append(self, model: nn.Module, tables: Collection[nn.Module], rows: int) -> None:
        """Append rows to tables until they have so many, each the mean of those there; the config says so too."""
        for table in tables:
            self._enlarge(table, rows)
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        for thing in (text, model):
            if isinstance(getattr(thing, "vocab_size", None), int):
                self._change(thing, vocab_size=rows)

    def undo(self) -> None:
        """Give everything back as it was."""
        for thing, values in reversed(self._before):
            for name, value in values.items():
                setattr(thing, name, value)

    def _enlarge(self, table: Any, rows: int) -> None:
        old, missing = table.weight, rows - table.weight.shape[0]
        if missing <= 0:  # a head that was padded further than its embedding
            return
        if id(old) not in self._made:
            new = old.detach().float().mean(0, keepdim=True).to(old.dtype).expand(missing, -1)
            self._made[id(old)] = nn.Parameter(torch.cat([old.detach(), new]), old.requires_grad)
        size = "num_embeddings" if isinstance(table, nn.Embedding) else "out_features"
        self._change(table, weight=self._made[id(old)], **{size: rows})
        if getattr(table, "bias", None) is not None:
            bias = torch.cat([table.bias.detach(), table.bias.new_zeros(missing)])
            self._change(table, bias=nn.Parameter(bias, table.bias.requires_grad))

    def _change(self, thing: Any, **values: Any) -> None:
        self._before.append((thing, {name: getattr(thing, name) for name in values}))
        for name, value in values.items():
            setattr(thing, name, value)


@contextlib.contextmanager
def room_for(index: AdapterIndex, config: LoraConfig, known: Fingerprint | None) -> Iterator[list[str]]:
    """A block in which a model has the rows that an adapter brings; they stay, unless the block fails.

    Args:
        index: The base's index.
        config: The adapter's config.
        known: The fingerprint of the base it was trained on, or None.

    Yields:
        Sentences about what was appended; if there are some, an index has to be made again.
    """
    present = vocabulary_of(index.model)
    wanted = known.vocabulary if known is not None else 1 + max(_all_rows(config), default=-1)
    tables = _tables_to_fill(index, config, range(present, wanted)) if 0 < present < wanted else []
    growth = Growth()
    if tables:
        growth.append(index.model, tables, wanted)
    try:
        yield [_sentence(present, wanted)] if tables else []
    except BaseException:
        growth.undo()
        raise


def _sentence(present: int, wanted: int) -> str:
    return (
        f"The base has {present:,} tokens and the adapter was trained with {wanted:,}: {wanted - present:,} rows were "
        "appended, which the adapter fills."
    )


def way_out(known: Fingerprint | None, present: Fingerprint) -> str:
    """Return what to do about an adapter that was made on another base; holds `OVERRIDE`."""
    if known is None or known.vocabulary <= present.vocabulary or known.architecture != present.architecture:
        return f"Load its own base, or {OVERRIDE}."
    return (
        f"New tokens were added before it was trained, and the adapter does not bring all their rows: call "
        f"model.resize_token_embeddings({known.vocabulary}) as then, and {OVERRIDE}; or train it with "
        "trainable_token_indices (or modules_to_save) for the new rows, so that it brings them."
    )


def without_brought_rows(
    index: AdapterIndex, config: LoraConfig, known: Fingerprint | None
) -> tuple[Fingerprint | None, Fingerprint]:
    """Two fingerprints to compare, without the numbers that the adapter brings by itself.

    A model that has more tokens is compared as it was before they were added; where it was another even so, as it is.

    Args:
        index: The base's index.
        config: The adapter's config.
        known: The fingerprint of the base it was trained on, or None.

    Returns:
        That one and the model's, with those numbers blank in both.
    """
    cut = _newer_rows(index, known)
    if cut:
        before = _blanked_pair(index, config, known, cut)
        if compare(*before)[0] != DIFFERENT:
            return before
    return _blanked_pair(index, config, known, {})


def _blanked_pair(
    index: AdapterIndex, config: LoraConfig, known: Fingerprint | None, cut: Mapping[int, int]
) -> tuple[Fingerprint | None, Fingerprint]:
    present = fingerprint(index, cut=cut, like=known, with_files=known is not None and bool(known.files))
    if known is None or (config.trainable_token_indices is None and not config.modules_to_save):
        return known, present
    path = input_embedding(index)
    asked = _asked(config, path)
    replaced: dict[int, Collection[int]] = {}
    for table, rows in asked.items():
        for named in [p for p in index.modules if names_path(table, p)]:
            replaced[id(table_at(index, named)._parameters.get("weight"))] = rows
    for named in _saved(config, index) if path is not None else ():
        weight = table_at(index, named)._parameters.get("weight")
        if weight is not None and named in {path, *tables_per_token(index, path or "")}:
            replaced[id(weight)] = range(weight.shape[0])
    blank = {
        name: _blanks(present, name, (cut.get(id(tensor), tensor.shape[0]), *tensor.shape[1:]), replaced[id(tensor)])
        for name, tensor, _ in base_tensors(index)
        if id(tensor) in replaced
    }
    copied = tuple(f"{named}." for named in _saved(config, index))
    brought = [name for name in {**present.samples, **present.buffers} if name.startswith(copied)]
    return _blanked(known, blank).without(brought), _blanked(present, blank).without(brought)


def _newer_rows(index: AdapterIndex, known: Fingerprint | None) -> dict[int, int]:
    """Ids of the tensors with a row per token, where a model has more of them than an adapter's base -> that many."""
    if known is None or not 0 < known.vocabulary < vocabulary_of(index.model):
        return {}
    path = input_embedding(index)
    tables = [] if path is None else [path, *tables_per_token(index, path)]
    held = [p for table in tables for p in table_at(index, table)._parameters.values() if p is not None]
    return {id(p): known.vocabulary for p in held}


def _all_rows(config: LoraConfig) -> list[int]:
    return [row for rows in _asked(config, None).values() for row in rows]


def _tables_to_fill(index: AdapterIndex, config: LoraConfig, rows: range) -> list[nn.Module]:
    """The tables that lack some rows, if an adapter brings these for all of them; otherwise none."""
    path = input_embedding(index)
    if path is None or index.state is not None or _is_odd(index, rows.start):
        return []
    asked, paths = _asked(config, path), [path, *tables_per_token(index, path)]
    brought = all(_brings(config, asked, index, table, rows) for table in paths)
    return [table_at(index, table) for table in paths] if brought else []


def _asked(config: LoraConfig, path: str | None) -> dict[str, tuple[int, ...]]:
    """Name of a table -> numbers of the rows that an adapter brings."""
    asked = config.trainable_token_indices
    if asked is None:
        return {}
    table = asked if isinstance(asked, Mapping) else {path or "": asked}
    return {name: tuple(i for i in rows if isinstance(i, int)) for name, rows in table.items()}


def _saved(config: LoraConfig, index: AdapterIndex) -> list[str]:
    return [path for path in index.modules if any(names_path(entry, path) for entry in config.modules_to_save or ())]


def _brings(
    config: LoraConfig,
    asked: Mapping[str, Collection[int]],
    index: AdapterIndex,
    table: str,
    rows: range,
) -> bool:
    """Whether an adapter brings these rows of a table, by itself or through the table it is tied to."""
    together = {table, *sharers(index, table)}
    if any(path in together for path in _saved(config, index)) and (
        config.ensure_weight_tying or table in _saved(config, index)
    ):
        return True
    named = [i for name, indices in asked.items() for p in together if names_path(name, p) for i in indices]
    return set(rows) <= set(named)


def _blanks(mark: Fingerprint, name: str, shape: tuple[int, ...], rows: Collection[int]) -> list[int]:
    """Return which of the samples of a tensor are in some rows of it."""
    size, taken = math.prod(shape[1:]), set(rows)
    places = sampled_positions(mark, name, shape)
    return [number for number, place in enumerate(places) if place // size in taken]


def _blanked(mark: Fingerprint, blank: Mapping[str, Collection[int]]) -> Fingerprint:
    samples = {name: sample.without(blank.get(name, ())) for name, sample in mark.samples.items()}
    return dataclasses.replace(mark, samples=samples)


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
