"""Trained rows of tables written into the base and out again, bit for bit: the part of a merge that is no sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.core.token_rows import TokenAdapter, TokenRows
from lorakit.core.underlying import holders
from lorakit.core.walking import walk
from lorakit.errors import MergeError


def row_tables(model: nn.Module) -> list[tuple[str, TokenRows]]:
    """The tables of which adapters train rows, each with its path; those that are tied to one of them are left out."""
    found = [(path, module) for path, module in walk(model) if isinstance(module, TokenRows)]
    return [(path, module) for path, module in found if not module.follows]


def check_rows(model: nn.Module, names: Sequence[str], untie: bool) -> None:
    """Refuse a merge of rows that cannot be done.

    Raises:
        MergeError: Merged already, the same row twice, not finite, or the table is shared with one that is not tied.
    """
    for path, table in row_tables(model):
        adapter = table.token_adapter
        here = [name for name in names if name in table]
        taken: dict[int, str] = {i: other for other in adapter.kept for i in adapter.token_indices[other]}
        for name in here:
            if name in adapter.kept:
                raise MergeError(f"Adapter {name!r} is merged already. Unmerge it first.")
            for index in adapter.token_indices[name]:
                if index in taken:
                    raise MergeError(
                        f"Token indices of adapter {name} are already defined and would result in undefined merging "
                        f"behavior: {taken[index]} trains row {index} of {path} too. Merge one of them."
                    )
            taken |= dict.fromkeys(adapter.token_indices[name], name)
            if not bool(torch.isfinite(adapter.trainable_tokens_delta[name]).all()):
                raise MergeError(f"Rows of {name} at {path} are NaN or infinite. Nothing was changed.")
        other = _shared(model, table) if here and not untie else None
        if other is not None:
            raise MergeError(
                f"{path} shares its weight with {other}, whose rows are not the same; a merge would change both. Merge "
                f"with untie=True to give {path} a weight of its own (and save with tie_word_embeddings=False)."
            )


def merge_rows(model: nn.Module, names: Sequence[str], keep: bool) -> None:
    """Write rows into their tables; `check_rows` has found nothing.

    Args:
        model: An adapted model.
        names: Adapters.
        keep: Remember the base's rows, so that `unmerge_rows` can put them back.
    """
    for _, table in row_tables(model):
        adapter = table.token_adapter
        here = [name for name in names if name in table]
        if here and _shared(model, table) is not None:
            _untie(adapter)
        for name in here:
            index, rows = adapter.rows(name)
            weight: nn.Parameter = adapter.base_layer.weight  # type: ignore[assignment]
            index = index.to(weight.device)
            adapter.kept[name] = weight.detach()[index].clone() if keep else None
            _write(weight, index, rows)


def unmerge_rows(model: nn.Module, names: Sequence[str]) -> None:
    """Put the base's rows back, where some adapters were merged; they were kept."""
    for _, table in row_tables(model):
        adapter = table.token_adapter
        for name in [name for name in adapter.kept if name in names]:
            index, rows = adapter.given_back(name)
            del adapter.kept[name]
            weight: nn.Parameter = adapter.base_layer.weight  # type: ignore[assignment]
            _write(weight, index.to(weight.device), rows)
        if not adapter.kept and adapter.tied_weight is not None:
            adapter.base_layer._parameters["weight"], adapter.tied_weight = adapter.tied_weight, None


def merged_names(model: nn.Module) -> set[str]:
    """The adapters whose rows are merged somewhere."""
    return {name for _, table in row_tables(model) for name in table.token_adapter.kept}


def kept_row_bytes(model: nn.Module) -> int:
    """Memory that the base's rows take that merges kept."""
    kept = [rows for _, table in row_tables(model) for rows in table.token_adapter.kept.values() if rows is not None]
    return sum(rows.numel() * rows.element_size() for rows in kept)


def merged_tables(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Tables as they are with some adapters' rows in them.

    Args:
        model: An adapted model; it is left alone.
        names: Adapters.

    Returns:
        Path -> the weight there, (V, d), also of modules that are tied.
    """
    found: dict[str, Tensor] = {}
    for path, module in walk(model):
        if isinstance(module, TokenRows) and any(name in module for name in names):
            found[path] = module.token_adapter.with_rows(names).detach()
    return found


def _write(weight: nn.Parameter, index: Tensor, rows: Tensor) -> None:
    with torch.no_grad():
        weight.index_copy_(0, index, rows.to(weight))


def _shared(model: nn.Module, table: TokenRows) -> str | None:
    """The name of a tensor that is the table's weight and does not follow its rows, or None."""
    base = table.original_module
    tied = {id(m.original_module) for _, m in walk(model) if isinstance(m, TokenRows) and table.leads(m)}
    named = holders(model).get(id(base._parameters["weight"]), ())
    return next((name for name, module in named if module is not base and id(module) not in tied), None)


def _untie(adapter: TokenAdapter) -> None:
    """Give a table a weight of its own; the other holder keeps the old one."""
    held: nn.Parameter = adapter.base_layer._parameters["weight"]  # type: ignore[assignment]
    adapter.tied_weight = held if adapter.tied_weight is None else adapter.tied_weight
    adapter.base_layer._parameters["weight"] = nn.Parameter(held.detach().clone(), held.requires_grad)
