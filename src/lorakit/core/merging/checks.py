"""What merging asks of several components at once: ties, shared weights, and whether a merge is exact.

The model is only read. What one component cannot take, its own `check_merge` rejects.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lorakit.core.layers.adapter_component import MergeOptions
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.checks import check_known
from lorakit.core.model.index import AdapterIndex, identity
from lorakit.core.model.ties import leaders_of, untied_copies
from lorakit.errors import MergeError


def names_to_merge(index: AdapterIndex, names: Sequence[str]) -> tuple[str, ...]:
    """Return the adapters that a call means: those that it names, or those of the default route.

    Raises:
        AdapterError: There is no such adapter, or the model has none.
    """
    state = index.known_state()
    chosen = tuple(names or state.default.names)
    check_known(state, chosen)
    return chosen


def check_mergeable(index: AdapterIndex, names: Sequence[str], untie: bool, options: MergeOptions) -> None:
    """Reject a merge that cannot be done; nothing is computed.

    Args:
        index: The model's index.
        names: Adapters to merge.
        untie: As in `merge`.
        options: How they are merged.

    Raises:
        MergeError: Merged already, not mergeable, or a weight is shared.
    """
    if not names:
        raise MergeError("No adapter is active, so there is nothing to merge. Name the adapters.")
    for path, module in index.components.items():
        module.check_merge(path, names, options)
    if untie:
        return
    for path, other in shared_sites(index, names):
        raise MergeError(
            f"{path} shares its weight with {other}; a merge would change both. Merge with untie=True to give "
            f"{path} a weight of its own (and save with tie_word_embeddings=False), or do not adapt it.",
            what=other,
            where=path,
            override="untie",
        )
    leading = leading_tables(index)
    for path, table in index.every(TrainableTokens):
        here = table in leading and any(name in table for name in names)
        sharing = shared_table(index, table, leading[table]) if here else None
        if sharing is not None:
            raise MergeError(
                f"{path} shares its weight with {sharing}, whose rows are not the same; a merge would change both. "
                f"Merge with untie=True to give {path} a weight of its own (and save with tie_word_embeddings=False).",
                what=sharing,
                where=path,
                override="untie",
            )


def tied_sites(model: nn.Module, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the sites of some adapters whose weight another module shares, each with the name of the other.

    Args:
        model: An adapted model.
        names: Adapters.
    """
    return shared_sites(AdapterIndex.of(model), names)


def shared_sites(index: AdapterIndex, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the sites of some adapters whose weight another module shares, each with the name of the other.

    Args:
        index: The model's index.
        names: Adapters.
    """
    led, sites = leaders_of(index, names), []
    one: dict[int, set[int]] = {}  # id of a leading layer -> ids of all modules that are one with its module
    owners = [(path, layer, layer.owner) for path, layer in index.layers()]
    for _, layer, owner in owners:
        one.setdefault(id(led.get(layer, layer)), set()).add(id(owner))
    for path, layer, owner in owners:
        if any(name in layer.r for name in names):
            those = one[id(led.get(layer, layer))]
            holders = index.holders.get(identity(owner._parameters.get(layer.slot.parameter)), ())
            shared = [name for name, module in holders if id(module) not in those]
            sites += [(path, shared[0])] if shared else []
    return sites + untied_copies(index, names)


def leading_tables(index: AdapterIndex) -> dict[TrainableTokens, list[TrainableTokens]]:
    """Return the tables with trained rows that lead -> those that follow their rows."""
    tables = [table for _, table in index.every(TrainableTokens)]
    return {table: [other for other in tables if table.leads(other)] for table in tables if not table.follows}


def shared_table(index: AdapterIndex, table: TrainableTokens, followers: Sequence[TrainableTokens]) -> str | None:
    """Return the name of a tensor that is a table's weight and does not follow its rows, or None.

    Args:
        index: The model's index.
        table: A table that leads.
        followers: The tables that follow its rows.
    """
    held = table.token_adapter.weight_here
    members = [module.token_adapter for module in (table, *followers)]
    tied = {id(member.base_layer) for member in members if member.weight_here is held}
    return next((name for name, module in index.holders.get(identity(held), ()) if id(module) not in tied), None)


def components_apart(index: AdapterIndex, names: Sequence[str], untie: bool) -> frozenset[int]:
    """Return the ids of components that a merge of some adapters gives a parameter of their own.

    Theirs is another module's too, or comes back to one when what was merged with `untie` is unmerged.

    Args:
        index: The model's index.
        names: The adapters.
        untie: As in `merge`; a table whose weight is shared parts in any case.
    """
    apart = set()
    tables = [table.token_adapter for _, table in index.every(TrainableTokens)]
    untied = {id(layer.tied_weight) for _, layer in index.layers() if layer.tied_weight is not None}
    untied |= {id(held) for table in tables for held in table.tied_weight}
    for _, layer in index.layers_of(names) if untie or untied else ():
        parameter = layer.source._parameters.get(layer.slot.parameter)
        shared = any(module is not layer.source for _, module in index.holders.get(identity(parameter), ()))
        if id(parameter) in untied or (untie and shared):
            apart.add(id(layer))
    for table, followers in leading_tables(index).items():
        if any(name in table for name in names):
            comes_back = id(table.token_adapter.weight_here) in untied
            if comes_back or shared_table(index, table, followers) is not None:
                apart.add(id(table))
    return frozenset(apart)


WIDE = (torch.float32, torch.float64)
"""The dtypes of a base in which a merge is exact: those in which its sum is made anyway."""


def explain_inexact_merge(model: nn.Module, *names: str) -> str | None:
    """Say why merging adapters would change the model's outputs; None if the merge is exact.   [docs/math.md (12)]

    Exact means: in eval mode, outputs are equal within roundings of the dtype in which the base computes. (W + ΔW)·x
    and W·x + ΔW·x are then the same sum in another order. That holds if every weight with a factor of these adapters
    is a plain one in fp32 or wider, so that the sum of (11), which is made in that dtype, is stored as it is. In bf16
    and fp16 the stored weight loses what is below its own roundings, and a quantized one far more. It does not hold
    for matmuls that round the weight once more, as under autocast or with TF32.

    Args:
        model: An adapted model; it is not changed.
        names: Adapters; none means those of the default route.

    Returns:
        A message that names the site and the dtype, or why there can be no merge at all; None if the merge is exact.

    Raises:
        AdapterError: There is no such adapter.
    """
    index = AdapterIndex.of(model)
    chosen = names_to_merge(index, names)
    try:
        check_mergeable(index, chosen, False, MergeOptions())
    except MergeError as refusal:
        return str(refusal)
    for path, layer in index.layers_of(chosen):
        if layer.base.quantized:
            return (
                f"{path} is stored as {layer.base.name}, and storing the merged weight so would lose most of what an "
                "adapter adds."
            )
        dtype = layer.base.tensors(layer.original())[0].dtype
        if dtype not in WIDE:
            return (
                f"{path} is {str(dtype).removeprefix('torch.')}, and a merged weight loses what lies below the "
                "roundings of that precision. In float32 a merge is exact."
            )
        if layer.slot.groups > 1:
            return (
                f"{path} is a convolution of {layer.slot.groups} groups, whose weight has no place for what its "
                "adapter adds."
            )
    return None
