"""Trained rows of tables written into the base and out again, bit for bit: the part of a merge that is no sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.core.layers.merged_weight import give_back
from lorakit.core.layers.trainable_tokens import TokenAdapter, TrainableTokens
from lorakit.core.model.base_view import holders, identity, set_aside
from lorakit.core.model.index import walk
from lorakit.errors import MergeError


def row_tables(model: nn.Module) -> list[tuple[str, TrainableTokens]]:
    """The tables of which adapters train rows, each with its path; those that are tied to one of them are left out."""
    found = [(path, module) for path, module in walk(model) if isinstance(module, TrainableTokens)]
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
                raise MergeError(f"Adapter {name!r} is merged already. Unmerge it first.", what=name)
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
                f"with untie=True to give {path} a weight of its own (and save with tie_word_embeddings=False).",
                what=other,
                where=path,
                override="untie",
            )


@dataclass(frozen=True)
class BuiltRows:
    """A table with rows in it, ready to be put in place.

    Attributes:
        members: The table and those that follow its rows.
        weight: The table's weight, (V, d), in memory of its own.
        kept: Adapter -> the base's rows in place of its own, (n, d), or None where they are given up.
        own: A parameter of these tables' own, where they share theirs with others.
    """

    members: tuple[TokenAdapter, ...]
    weight: Tensor
    kept: dict[str, Tensor | None]
    own: nn.Parameter | None


def built_rows(model: nn.Module, names: Sequence[str], keep: bool) -> list[BuiltRows]:
    """Make ready what `merge_rows` puts in place; `check_rows` has found nothing.

    Args:
        model: An adapted model; it is left alone.
        names: Adapters.
        keep: Remember the base's rows, so that `unmerge_rows` can put them back.
    """
    ready, aside = [], set_aside(model)
    for _, table in row_tables(model):
        here = [name for name in names if name in table]
        if not here:
            continue
        held = _weight(table.token_adapter)
        weight, kept = held.detach().clone(), dict.fromkeys(here, None)  # others may look at the memory it lies in
        for name in here:
            index, rows = table.token_adapter.rows(name)
            index = index.to(weight.device)
            kept |= {name: weight[index] if keep else None}
            weight.index_copy_(0, index, rows.detach().to(weight))
        apart = _shared(model, table) is not None or id(held) in aside
        own = nn.Parameter(weight, held.requires_grad) if apart else None
        ready.append(BuiltRows(tuple(_members(model, table)), weight, kept, own))
    return ready


def merge_rows(ready: Sequence[BuiltRows]) -> None:
    """Put tables with rows in them in place; nothing here can refuse.

    Args:
        ready: What `built_rows` gave.
    """
    for built in ready:
        for adapter in built.members:
            if built.own is None:
                _weight(adapter).data = built.weight
            else:  # the other holders keep the old one
                back = any(rows is not None for rows in built.kept.values()) and not adapter.tied_weight
                adapter.tied_weight = (_weight(adapter),) if back else adapter.tied_weight
                adapter.base_layer._parameters["weight"] = built.own
        built.members[0].kept.update(built.kept)  # one table of what is kept for all of them


def unmerge_rows(model: nn.Module, names: Sequence[str]) -> None:
    """Put the base's rows back, where some adapters were merged; they were kept."""
    for _, table in row_tables(model):
        adapter = table.token_adapter
        for name in [name for name in adapter.kept if name in names]:
            index, rows = adapter.given_back(name)
            del adapter.kept[name]
            weight = _weight(adapter)
            with torch.no_grad():  # the memory is the table's own since the merge
                weight.index_copy_(0, index.to(weight.device), rows.to(weight))
        for member in _members(model, table) if not adapter.kept else ():
            for held in member.tied_weight:
                give_back(member.base_layer, "weight", held, _weight(member).detach())
            member.tied_weight = ()


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
        if isinstance(module, TrainableTokens) and any(name in module for name in names):
            found[path] = module.token_adapter.with_rows(names).detach()
    return found


def _weight(adapter: TokenAdapter) -> nn.Parameter:
    """The parameter, (V, d), that a table has now."""
    return adapter.base_layer._parameters["weight"]  # type: ignore[return-value]


def _members(model: nn.Module, table: TrainableTokens) -> list[TokenAdapter]:
    """A table, and those that follow its rows."""
    followers = [m for _, m in walk(model) if isinstance(m, TrainableTokens) and table.leads(m)]
    return [module.token_adapter for module in (table, *followers)]


def _shared(model: nn.Module, table: TrainableTokens) -> str | None:
    """The name of a tensor that is the table's weight and does not follow its rows, or None."""
    held = _weight(table.token_adapter)
    tied = {id(member.base_layer) for member in _members(model, table) if _weight(member) is held}
    return next((name for name, module in holders(model).get(identity(held), ()) if id(module) not in tied), None)
