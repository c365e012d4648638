"""Resize a model's embeddings, and select individual rows to train (`trainable_token_indices`).

If an adapter contains the rows of all new tokens (as trainable token rows, or in a saved copy of the whole embedding),
the base does not need to have those rows. The loader then appends rows to the base for the adapter to fill, and ignores
the appended rows when it compares the base with the one that the adapter was trained on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from lorakit.config import LoraConfig
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
from lorakit.core.model.index import AdapterIndex, embedding_of
from lorakit.core.model.ties import input_embedding, sharers, table_at
from lorakit.errors import OVERRIDE, ConfigError, ModelError, NoTargetError, TargetError, nearest, warn_caller
from lorakit.targets.patterns import names_path


def grow_vocabulary(model: nn.Module, rows: int) -> None:
    """Extend the embedding and the head of a base without adapters, in place, to at least this number of rows.

    Each new row is the mean of the existing rows.

    Raises:
        ModelError: The model does not expose its input embedding, or has vocabulary-sized tensors other than plain
            embeddings.
    """
    tables = check_growth(model, rows)
    if tables:
        with contextlib.ExitStack() as undo:
            _append_rows(model, tables, rows, undo)
            undo.pop_all()


def check_growth(model: nn.Module, rows: int) -> list[nn.Module]:
    """Return the modules that `grow_vocabulary` would extend, or raise its ModelError; values are not read."""
    present = vocabulary_of(model)
    if 0 < rows <= present:
        return []
    index = AdapterIndex.of(model)
    tables = [table_at(index, path) for path in token_tables(index, _named_embedding(index))]
    dense = all(isinstance(table, (nn.Embedding, nn.Linear)) and table.weight.is_floating_point() for table in tables)
    if not dense or _has_other_tables(index, present):
        raise ModelError(
            f"Tokens cannot be added to this {type(model).__name__}: in addition to plain embeddings, it has "
            "vocabulary-sized tensors that only the model itself can resize. Call model.resize_token_embeddings, "
            "save the model, and train on the saved model.",
            what=type(model).__name__,
        )
    return tables


def with_trained_rows(config: LoraConfig, model: nn.Module, rows: Sequence[int]) -> LoraConfig:
    """Return a copy of a config that also trains the given rows of the token embedding and of any untied head."""
    index = AdapterIndex.of(model)
    path = _named_embedding(index)
    tied = sharers(index, path)
    apart = [table for table in token_tables(index, path) if table not in tied]
    indices = {table: list(rows) for table in apart} if len(apart) > 1 else list(rows)
    return config.with_fields(trainable_token_indices=indices)


def initialize_rows(model: nn.Module, name: str, pieces: Mapping[int, Sequence[int]]) -> None:
    """Set each new token's embedding in an adapter to a mean of existing embeddings. [docs/math.md (93)]

    `pieces` maps the index of a new token to the tokens that previously encoded its text, over which the mean is taken.
    All other rows are left unchanged.
    """
    for _, module in AdapterIndex.of(model).every(TrainableTokens):
        if module.follows or name not in module:
            continue
        trained, rows = module.token_adapter.rows(name)
        table = module.token_adapter.original()
        with torch.no_grad():
            for position, index in enumerate(trained.tolist()):
                if pieces.get(index):
                    rows[position] = table[list(pieces[index])].to(rows.dtype).mean(0)


def _named_embedding(index: AdapterIndex) -> str:
    path = input_embedding(index)
    if path is None:
        model = type(index.model).__name__
        raise ModelError(f"This {model} does not expose its input embedding, so no tokens can be added.", what=model)
    return path


def token_tables(index: AdapterIndex, path: str | None) -> list[str]:
    """Return the paths of the input embedding at `path`, of the modules tied to it, and of the head; or none."""
    if path is None:
        return []
    head = embedding_of(index.model, "output")
    heads = [p for p, module in index.modules.items() if head is not None and module is head]
    return list(dict.fromkeys([path, *sharers(index, path), *heads]))


def _has_other_tables(index: AdapterIndex, vocabulary: int) -> bool:
    """Return whether the model has a vocabulary-sized buffer with two or more dimensions, which cannot be resized."""
    buffers = (buffer for module in index.everything.values() for buffer in module._buffers.values())
    return any(vocabulary in buffer.shape for buffer in buffers if buffer is not None and buffer.ndim > 1)


def _append_rows(model: nn.Module, tables: Iterable[nn.Module], rows: int, undo: contextlib.ExitStack) -> None:
    """Append copies of the mean row to embeddings and heads, and update the config; `undo` restores the model."""

    def change(owner: object, name: str, value: nn.Parameter | int) -> None:
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    extended: dict[nn.Parameter, nn.Parameter] = {}  # tied modules stay tied
    for table in tables:
        old = table._parameters.get("weight")
        missing = 0 if old is None else rows - old.shape[0]
        if old is None or missing <= 0:  # a head can have more padding rows than the embedding
            continue
        if old not in extended:
            new = old.detach().float().mean(0, keepdim=True).to(old.dtype).expand(missing, -1)
            extended[old] = nn.Parameter(torch.cat([old.detach(), new]), old.requires_grad)
        change(table, "weight", extended[old])
        change(table, "num_embeddings" if isinstance(table, nn.Embedding) else "out_features", rows)
        bias = table._parameters.get("bias")
        if bias is not None:
            longer = torch.cat([bias.detach(), bias.new_zeros(missing)])
            change(table, "bias", nn.Parameter(longer, bias.requires_grad))
    config = getattr(model, "config", None)
    for owner in (getattr(config, "get_text_config", lambda: config)(), model):
        if owner is not None and isinstance(getattr(owner, "vocab_size", None), int):
            change(owner, "vocab_size", rows)


@contextlib.contextmanager
def appended_rows(index: AdapterIndex, config: LoraConfig, known: Fingerprint | None) -> Iterator[list[str]]:
    """Append rows for an adapter's new tokens, and remove the rows again if the `with` block fails.

    `known` is the fingerprint of the base that the adapter was trained on, or None. Yield messages about the appended
    rows; if there are any, the index is out of date.
    """
    present = vocabulary_of(index.model)
    path = input_embedding(index)
    trained_rows = [row for rows in _rows_by_table(config, path).values() for row in rows]
    wanted = known.vocabulary if known is not None else 1 + max(trained_rows, default=-1)
    if not 0 < present < wanted or not _brings_all(index, config, path, range(present, wanted)):
        yield []
        return
    with contextlib.ExitStack() as undo:
        _append_rows(index.model, [table_at(index, table) for table in token_tables(index, path)], wanted, undo)
        yield [
            f"The base has {present:,} tokens, but the adapter was trained with {wanted:,}, so rows were appended for "
            f"the adapter to fill (new rows: {wanted - present:,})."
        ]
        undo.pop_all()


def base_mismatch_advice(known: Fingerprint | None, present: Fingerprint) -> str:
    """Return advice for loading an adapter that was trained on another base; the advice includes `OVERRIDE`."""
    if known is None or known.vocabulary <= present.vocabulary or known.architecture != present.architecture:
        return f"Load the base that the adapter was trained on, or {OVERRIDE}."
    return (
        f"New tokens were added before training, and the adapter does not contain all of their rows: call "
        f"model.resize_token_embeddings({known.vocabulary}), as was done before training, and {OVERRIDE}; or train the "
        "adapter with trainable_token_indices (or modules_to_save), so that it contains the new rows."
    )


def without_brought_rows(
    index: AdapterIndex, config: LoraConfig, known: Fingerprint | None
) -> tuple[Fingerprint | None, Fingerprint]:
    """Return the fingerprints of an adapter's base and a model's base, without the values that the adapter replaces.

    These are set to zero or omitted. A model with more tokens than the adapter's base is first compared without the
    additional rows, and then at its current size if the first comparison finds a difference.
    """
    if known is not None and 0 < known.vocabulary < vocabulary_of(index.model):
        tables = [table_at(index, path) for path in token_tables(index, input_embedding(index))]
        cut = {id(p): known.vocabulary for table in tables for p in table._parameters.values() if p is not None}
        if cut:
            before = _blanked_pair(index, config, known, cut)
            if compare(*before).verdict != DIFFERENT:
                return before
    return _blanked_pair(index, config, known, {})


def _blanked_pair(
    index: AdapterIndex, config: LoraConfig, known: Fingerprint | None, cut: Mapping[int, int]
) -> tuple[Fingerprint | None, Fingerprint]:
    present = fingerprint(index, cut=cut, like=known, with_files=known is not None and bool(known.files))
    if known is None or (config.trainable_token_indices is None and not config.modules_to_save):
        return known, present
    path, saved = input_embedding(index), _saved(config, index)
    replaced: dict[int, Collection[int]] = {}
    for name, rows in _rows_by_table(config, path).items():
        for table in [p for p in index.modules if names_path(name, p)]:
            replaced[id(table_at(index, table)._parameters.get("weight"))] = rows
    for table in [p for p in token_tables(index, path) if p in saved]:
        weight = table_at(index, table)._parameters.get("weight")
        if weight is not None:
            replaced[id(weight)] = range(weight.shape[0])
    blank = {}
    for name, tensor, _ in base_tensors(index):
        if id(tensor) in replaced:
            taken, width = set(replaced[id(tensor)]), math.prod(tensor.shape[1:])
            sampled = sampled_positions(present, name, (cut.get(id(tensor), tensor.shape[0]), *tensor.shape[1:]))
            blank[name] = [number for number, position in enumerate(sampled) if position // width in taken]
    copied = tuple(f"{table}." for table in saved)
    brought = [name for name in {**present.samples, **present.buffers} if name.startswith(copied)]
    return _blanked(known, blank).without(brought), _blanked(present, blank).without(brought)


def _blanked(mark: Fingerprint, blank: Mapping[str, Collection[int]]) -> Fingerprint:
    samples = {name: sample.without(blank.get(name, ())) for name, sample in mark.samples.items()}
    return dataclasses.replace(mark, samples=samples)


def _rows_by_table(config: LoraConfig, path: str | None) -> dict[str, list[int]]:
    """Return a dict from embedding name to the indices of the embedding's rows that an adapter contains."""
    indices = config.trainable_token_indices
    table = indices if isinstance(indices, Mapping) else {path or "": indices or []}
    return {name: [i for i in rows if isinstance(i, int)] for name, rows in table.items()}


def _saved(config: LoraConfig, index: AdapterIndex) -> list[str]:
    return [path for path in index.modules if any(names_path(entry, path) for entry in config.modules_to_save or ())]


def _brings_all(index: AdapterIndex, config: LoraConfig, path: str | None, rows: range) -> bool:
    """Return whether every embedding and head can be resized and the adapter supplies the given rows for each."""
    if path is None or index.state is not None or _has_other_tables(index, rows.start):
        return False
    named, saved = _rows_by_table(config, path), set(_saved(config, index))
    for table in token_tables(index, path):
        tied = {table, *sharers(index, table)}
        if table in saved or (config.ensure_weight_tying and saved & tied):
            continue
        brought = {i for name, indices in named.items() for p in tied if names_path(name, p) for i in indices}
        if not brought.issuperset(rows):
            return False
    return True


USUAL_NAME = "embed_tokens"
"""Name of the embedding that a plain list of indices refers to if the model does not expose its input embedding."""


def chosen_rows(
    index: AdapterIndex, config: LoraConfig, sites: Collection[str], saved: Collection[str]
) -> list[ChosenRows]:
    """Return the token rows that a config selects for training: one entry per embedding or head.

    Tied modules with the same rows share an entry. `sites` and `saved` are the paths of the adapter's sites and saved
    modules.

    Raises:
        TargetError: A name matches no module, or a named module is already adapted in another way.
        ConfigError: Indices are not valid for their module, or conflict with weight tying.
    """
    named = _named(index, config)
    groups = _groups(named, index, config)
    for group in groups:
        for path in (group.path, *group.tied):
            _check_free(path, index, sites, saved)
        _check_same_ties(group, index)
    if config.ensure_weight_tying and named and not any(group.tied for group in groups):
        warn_caller(
            "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). Weight "
            "tying will not be applied for trainable_token_indices."
        )
    return groups


def _named(index: AdapterIndex, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    indices_by_name = config.trainable_token_indices
    if indices_by_name is None:
        return {}
    if not isinstance(indices_by_name, Mapping):
        indices_by_name = {input_embedding(index) or USUAL_NAME: indices_by_name}
    named: dict[str, tuple[int, ...]] = {}
    for name, indices in indices_by_name.items():
        paths = [path for path in index.modules if names_path(name, path)]
        if not paths:
            names = nearest(name, [p.rpartition(".")[2] for p in index.modules], 1)
            raise NoTargetError(
                f"Target modules {{{name!r}}} not found in the base model. The name comes from trainable_token_indices"
                + (f"; nearest: {names[0]}." if names else "."),
                what=name,
                field="trainable_token_indices",
            )
        for path in paths:
            named[path] = _checked(index, path, indices)
    return named


def _checked(index: AdapterIndex, path: str, indices: Sequence[int]) -> tuple[int, ...]:
    table = table_at(index, path)
    weight = table._parameters.get("weight")
    if weight is None or not isinstance(table, (nn.Embedding, nn.Linear)) or not weight.is_floating_point():
        text = (
            f"trainable_token_indices names {path!r}, a {type(table).__name__}; only rows of an nn.Embedding or an "
            "nn.Linear head with floating-point weights can be trained."
        )
        raise TargetError(text, what=type(table).__name__, where=path, field="trainable_token_indices")
    numbers = list(indices)
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in numbers)
    if not numbers or not whole or len(set(numbers)) < len(numbers):
        text = f"trainable_token_indices for {path} is {numbers[:8]!r}; expected one or more distinct integers."
        raise ConfigError(text, what=numbers[:8], where=path, field="trainable_token_indices")
    outside = next((i for i in numbers if not 0 <= i < weight.shape[0]), None)
    if outside is not None:
        text = (
            f"trainable_token_indices for {path} contains {outside}, but the weight has rows 0 to "
            f"{weight.shape[0] - 1:,}. For added tokens, call model.resize_token_embeddings first."
        )
        raise ConfigError(text, what=outside, where=path, field="trainable_token_indices")
    return tuple(numbers)


def _groups(named: Mapping[str, tuple[int, ...]], index: AdapterIndex, config: LoraConfig) -> list[ChosenRows]:
    """Return one entry per embedding or head; tied modules share an entry unless their rows differ."""
    groups: list[ChosenRows] = []
    followers: set[str] = set()
    embeddings_first = sorted(named, key=lambda path: not isinstance(table_at(index, path), nn.Embedding))
    for path in embeddings_first:
        if path in followers:
            continue
        tied: list[str] = []
        if isinstance(table_at(index, path), nn.Embedding):
            shared = sharers(index, path)
            apart = [other for other in shared if named.get(other, named[path]) != named[path]]
            if apart and config.ensure_weight_tying:
                text = (
                    "Cannot ensure weight tying when different token indices are specified for tied layers: "
                    f"{path}: {list(named[path])}, {apart[0]}: {list(named[apart[0]])}. Specify the same indices, or "
                    "set ensure_weight_tying=False."
                )
                raise ConfigError(text, where=path, field="trainable_token_indices")
            tied = [other for other in shared if other not in apart]
        followers.update(tied)
        groups.append(ChosenRows(path, named[path], tuple(tied)))
    return groups


def _check_free(path: str, index: AdapterIndex, sites: Collection[str], saved: Collection[str]) -> None:
    if any(path == other or path.startswith(other + ".") for other in saved):
        text = (
            f"The embedding layer is already marked to be trained fully: {path} is a saved module (modules_to_save), "
            "and trainable_token_indices trains some of its rows. Use only one of the two."
        )
        raise TargetError(text, where=path, field="trainable_token_indices")
    module = index.modules[path]
    if path in sites or (module is not table_at(index, path) and not isinstance(module, TrainableTokens)):
        text = (
            f"trainable_token_indices cannot be applied to {path}: an adapter applies LoRA to this module or saves a "
            "copy of it. Remove it from target_modules or modules_to_save, or load another model."
        )
        raise TargetError(text, where=path, field="trainable_token_indices")


def _check_same_ties(group: ChosenRows, index: AdapterIndex) -> None:
    """Check that a new group ties the same modules as the adapters already on the model."""
    leader = index.modules[group.path]
    wrong = [group.path] if isinstance(leader, TrainableTokens) and leader.follows else []
    for path in group.tied:
        other = index.modules[path]
        together = isinstance(leader, TrainableTokens) and isinstance(other, TrainableTokens) and other.follows
        unadapted = not isinstance(leader, TrainableTokens) and not isinstance(other, TrainableTokens)
        wrong += [] if together or unadapted else [path]
    if wrong:
        text = (
            f"trainable_token_indices: another adapter ties the rows of {wrong[0]} differently. Name the same "
            "modules for both adapters, or load a separate model for each adapter."
        )
        raise ConfigError(text, where=wrong[0], field="trainable_token_indices")
