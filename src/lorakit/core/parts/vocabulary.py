"""New tokens: adapters that were trained after the vocabulary grew, and bases that have not grown yet.

An adapter that brings every new row by itself (`trainable_token_indices`, or a copy of the whole table) needs none of
them from the base, so the loader appends rows for it to fill, and compares the base without them. It knows what an
adapter's files say, and no file itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.files.fingerprinting import (
    DIFFERENT,
    Fingerprint,
    compare,
    fingerprint,
    sampled_positions,
    vocabulary_of,
)
from lorakit.core.layering.sitemap import SiteMap, find_state, survey
from lorakit.core.layering.underlying import base_tensors
from lorakit.core.parts.growing import Growth, is_odd, tables_per_token
from lorakit.core.parts.row_choice import input_embedding, sharers, table_at
from lorakit.targets import names_path


@contextlib.contextmanager
def room_for(model: nn.Module, config: LoraConfig, known: Fingerprint | None) -> Iterator[list[str]]:
    """A block in which a model has the rows that an adapter brings; they stay, unless the block fails.

    Args:
        model: The base.
        config: The adapter's config.
        known: The fingerprint of the base it was trained on, or None.

    Yields:
        Sentences about what was appended.
    """
    present = vocabulary_of(model)
    wanted = known.vocabulary if known is not None else 1 + max(_all_rows(config), default=-1)
    tables = _tables_to_fill(model, config, range(present, wanted)) if 0 < present < wanted else []
    growth = Growth()
    if tables:
        growth.append(model, tables, wanted)
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
    """What to do about an adapter that was made on another base."""
    if known is None or known.vocabulary <= present.vocabulary or known.architecture != present.architecture:
        return "Load its own base, or allow 'base_mismatch'."
    return (
        f"New tokens were added before it was trained, and the adapter does not bring all their rows: call "
        f"model.resize_token_embeddings({known.vocabulary}) as then, and allow 'base_mismatch'; or train it with "
        "trainable_token_indices (or modules_to_save) for the new rows, so that it brings them."
    )


def without_brought_rows(
    model: nn.Module, config: LoraConfig, known: Fingerprint | None
) -> tuple[Fingerprint | None, Fingerprint]:
    """Two fingerprints to compare, without the numbers that the adapter brings by itself.

    A model that has more tokens is compared as it was before they were added; where it was another even so, as it is.

    Args:
        model: The base.
        config: The adapter's config.
        known: The fingerprint of the base it was trained on, or None.

    Returns:
        That one and the model's, with those numbers blank in both.
    """
    cut = _newer_rows(model, known)
    if cut:
        before = _blanked_pair(model, config, known, cut)
        if compare(*before)[0] != DIFFERENT:
            return before
    return _blanked_pair(model, config, known, {})


def _blanked_pair(
    model: nn.Module, config: LoraConfig, known: Fingerprint | None, cut: Mapping[int, int]
) -> tuple[Fingerprint | None, Fingerprint]:
    present = fingerprint(model, cut=cut, like=known, with_files=known is not None and bool(known.files))
    if known is None or (config.trainable_token_indices is None and not config.modules_to_save):
        return known, present
    site_map = survey(model)
    path = input_embedding(model, site_map)
    asked = _asked(config, path)
    replaced: dict[int, Collection[int]] = {}
    for table, rows in asked.items():
        for named in [p for p in site_map.modules if names_path(table, p)]:
            replaced[id(table_at(site_map, named)._parameters.get("weight"))] = rows
    for named in _saved(config, site_map) if path is not None else ():
        weight = table_at(site_map, named)._parameters.get("weight")
        if weight is not None and named in {path, *tables_per_token(model, site_map, path or "")}:
            replaced[id(weight)] = range(weight.shape[0])
    blank = {
        name: _blanks(present, name, (cut.get(id(tensor), tensor.shape[0]), *tensor.shape[1:]), replaced[id(tensor)])
        for name, tensor, _ in base_tensors(model)
        if id(tensor) in replaced
    }
    return _blanked(known, blank), _blanked(present, blank)


def _newer_rows(model: nn.Module, known: Fingerprint | None) -> dict[int, int]:
    """Ids of the tensors with a row per token, where a model has more of them than an adapter's base -> that many."""
    if known is None or not 0 < known.vocabulary < vocabulary_of(model):
        return {}
    site_map = survey(model)
    path = input_embedding(model, site_map)
    tables = [] if path is None else [path, *tables_per_token(model, site_map, path)]
    held = [p for table in tables for p in table_at(site_map, table)._parameters.values() if p is not None]
    return {id(p): known.vocabulary for p in held}


def _all_rows(config: LoraConfig) -> list[int]:
    return [row for rows in _asked(config, None).values() for row in rows]


def _tables_to_fill(model: nn.Module, config: LoraConfig, rows: range) -> list[nn.Module]:
    """The tables that lack some rows, if an adapter brings these for all of them; otherwise none."""
    site_map = survey(model)
    path = input_embedding(model, site_map)
    if path is None or find_state(model) is not None or is_odd(model, rows.start):
        return []
    asked, paths = _asked(config, path), [path, *tables_per_token(model, site_map, path)]
    brought = all(_brings(config, asked, site_map, table, rows) for table in paths)
    return [table_at(site_map, table) for table in paths] if brought else []


def _asked(config: LoraConfig, path: str | None) -> dict[str, tuple[int, ...]]:
    """Name of a table -> numbers of the rows that an adapter brings."""
    asked = config.trainable_token_indices
    if asked is None:
        return {}
    table = asked if isinstance(asked, Mapping) else {path or "": asked}
    return {name: tuple(i for i in rows if isinstance(i, int)) for name, rows in table.items()}


def _saved(config: LoraConfig, site_map: SiteMap) -> list[str]:
    return [path for path in site_map.modules if any(names_path(entry, path) for entry in config.modules_to_save or ())]


def _brings(
    config: LoraConfig,
    asked: Mapping[str, Collection[int]],
    site_map: SiteMap,
    table: str,
    rows: range,
) -> bool:
    """Whether an adapter brings these rows of a table, by itself or through the table it is tied to."""
    together = {table, *sharers(site_map, table)}
    if any(path in together for path in _saved(config, site_map)) and (
        config.ensure_weight_tying or table in _saved(config, site_map)
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
