"""A vocabulary that grows: the tables with a row per token, rows appended to them, adapters that train these alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.files.fingerprinting import vocabulary_of
from lorakit.core.layering.sitemap import SiteMap, survey
from lorakit.core.layering.walking import walk
from lorakit.core.parts.row_choice import input_embedding, sharers, table_at
from lorakit.core.parts.token_rows import TokenRows
from lorakit.errors import ModelError


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
    site_map = survey(model)
    path = _embedding(model, site_map)
    tables = [table_at(site_map, table) for table in (path, *tables_per_token(model, site_map, path))]
    dense = all(isinstance(table, (nn.Embedding, nn.Linear)) and table.weight.is_floating_point() for table in tables)
    if not dense or is_odd(model, present):
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
    site_map = survey(model)
    path = _embedding(model, site_map)
    tied = sharers(site_map, path)
    apart = [table for table in tables_per_token(model, site_map, path) if table not in tied]
    asked: Any = {table: list(rows) for table in (path, *apart)} if apart else list(rows)
    return config.with_fields(trainable_token_indices=asked)


def begin_rows(model: nn.Module, name: str, pieces: Mapping[int, Sequence[int]]) -> None:
    """Let trained rows begin as the mean of the rows of the tokens that their text was until now.   [docs/math.md (93)]

    Args:
        model: An adapted model; the base stays as it is.
        name: The adapter.
        pieces: Number of a trained row -> numbers of the rows of its pieces; others begin as they are.
    """
    for _, module in walk(model):
        if not isinstance(module, TokenRows) or module.follows or name not in module:
            continue
        index, rows = module.token_adapter.rows(name)
        table = module.token_adapter.original()
        with torch.no_grad():
            for place, number in enumerate(index.tolist()):
                if pieces.get(number):
                    rows[place] = table[list(pieces[number])].to(rows.dtype).mean(0)


def _embedding(model: nn.Module, site_map: SiteMap) -> str:
    path = input_embedding(model, site_map)
    if path is None:
        raise ModelError(
            f"This {type(model).__name__} does not say which module is its input embedding, so no token can be added."
        )
    return path


def tables_per_token(model: Any, site_map: SiteMap, path: str) -> list[str]:
    """Paths of the other tables with a row per token: those that share the embedding's weight, and the head."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if getter is not None else None
    except (AttributeError, NotImplementedError):  # models without one differ in how they say so
        head = None
    heads = [p for p, standing in site_map.modules.items() if head is not None and standing is head and p != path]
    return list(dict.fromkeys([*sharers(site_map, path), *heads]))


def is_odd(model: nn.Module, vocabulary: int) -> bool:
    """Whether something else of the model has a place per token, which only the model itself knows how to enlarge."""
    return any(vocabulary in buffer.shape for buffer in model.buffers() if buffer.ndim > 1)


class Growth:
    """Rows that were appended to tables, and how to take them off again."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, dict[str, Any]]] = []
        self._made: dict[int, nn.Parameter] = {}

    def append(self, model: Any, tables: Collection[nn.Module], rows: int) -> None:
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
