"""Which merges cannot be done, found before the first change, and which sites share a weight with another module.

It reads the model and changes nothing; what a merge writes is `merging`'s business.

Whether a merge is exact: whether the merged model says what base and adapters say, but for roundings.

It reads the model and changes nothing. What a merge that is not exact loses, `SiteMerge` measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lorakit.core.layers.bias import check_place
from lorakit.core.layers.merged_weight import keeps_base
from lorakit.core.merging.token_tables import check_rows
from lorakit.core.model.base_view import holders, identity, set_aside
from lorakit.core.model.checks import check_known
from lorakit.core.model.index import copies, layers, state_of
from lorakit.core.model.ties import of_one_weight, untied_copies
from lorakit.core.quantization import NOT_WRITTEN
from lorakit.core.variants import variant_named
from lorakit.errors import MergeError

ONE_COPY = (
    "{one} and {other} each have their own copy of {path} (modules_to_save), and only one can stand in its place. "
    "Merge one of the two adapters."
)


def check_unmergeable(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse to unmerge where the base's bits were given up.

    Raises:
        MergeError: The message names the adapter and a site.
    """
    for path, layer in layers(model):
        lost = [name for name in names if name in layer.merged_adapters]
        if lost and not keeps_base(layer):
            raise MergeError(
                f"Adapter {lost[0]!r} was merged with keep_base=False, so the bits of {path} are gone. "
                "Load the base anew.",
                what=lost[0],
                where=path,
            )


def check_mergeable(model: nn.Module, names: Sequence[str], untie: bool) -> None:
    """Refuse a merge that cannot be done; rows of tables are `merging_rows`'s to check.

    Args:
        model: An adapted model.
        names: Adapters to merge.
        untie: As in `merge`.

    Raises:
        MergeError: Merged already, not mergeable, or a weight is shared.
    """
    check_variants(model, names)
    if not names:
        raise MergeError("No adapter is active, so there is nothing to merge. Name the adapters.")
    for path, layer in layers(model):
        here = [name for name in names if name in layer.r]
        twice = [name for name in here if name in layer.merged_adapters]
        if twice:
            raise MergeError(f"Adapter {twice[0]!r} is merged already. Unmerge it first.", what=twice[0])
        if here and not layer.base.written:
            raise MergeError(NOT_WRITTEN.format(parameter=layer.slot.parameter, type=type(layer.owner).__name__))
        if here and layer.merged_adapters and not keeps_base(layer):
            raise MergeError(
                f"{path} holds {', '.join(layer.merged_adapters)}, merged with keep_base=False, so its base is gone. "
                "Load the base anew and merge all adapters in one call.",
                where=path,
            )
    for path, holder in copies(model):
        new = next((name for name in names if name in holder.modules_to_save), None)
        if new is not None and new == holder.merged_adapter:
            raise MergeError(f"Adapter {new!r} is merged already. Unmerge it first.", what=new)
        if new is not None and holder.merged_adapter is not None:
            raise MergeError(ONE_COPY.format(one=holder.merged_adapter, other=new, path=path))
    for path, other in tied_sites(model, names) if not untie else ():
        raise MergeError(
            f"{path} shares its weight with {other}; a merge would change both. Merge with untie=True to give "
            f"{path} a weight of its own (and save with tie_word_embeddings=False), or do not adapt it.",
            what=other,
            where=path,
            override="untie",
        )


def tied_sites(model: nn.Module, names: Sequence[str]) -> list[tuple[str, str]]:
    """The sites of some adapters whose weight another module shares, each with the name of the other."""
    held, found = holders(model), []
    led = {id(layer): leader for layer, leader in of_one_weight(model, names)}
    one: dict[int, set[int]] = {}  # id of a leading layer -> ids of all modules that are one with its module
    for _, layer in layers(model):
        leader = led.get(id(layer), layer)
        one.setdefault(id(leader), set()).add(id(layer.owner))
    for path, layer in layers(model):
        if any(name in layer.r for name in names):
            parameter = layer.owner._parameters.get(layer.slot.parameter)
            those = one[id(led.get(id(layer), layer))]
            shared = [name for name, module in held.get(identity(parameter), ()) if id(module) not in those]
            found += [(path, shared[0])] if shared else []
    return found + untied_copies(model, names, held)


def sites_apart(model: nn.Module, untie: bool) -> set[int]:
    """The ids of layers that a merge gives a weight of their own: theirs is another's, or comes back to one."""
    held, aside, found = holders(model), set_aside(model), set()
    for _, layer in layers(model):
        parameter = layer.source._parameters.get(layer.slot.parameter)
        shared = any(module is not layer.source for _, module in held.get(identity(parameter), ()))
        if id(parameter) in aside or (untie and shared):
            found.add(id(layer))
    return found


def check_variants(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse adapters that cannot be written into a base, whatever is merged into it now.

    Raises:
        MergeError: The message names the adapter and the site.
    """
    for path, layer in layers(model):
        for name in names:
            if name in layer.r and not variant_named(layer.variant[name]).mergeable:
                raise MergeError(
                    f"Adapter {name!r} at {path} is {layer.variant[name]}, which cannot be merged: what it adds "
                    "depends on where a token stands. Keep it beside the base.",
                    what=name,
                    where=path,
                )
        check_place(path, layer, names)
    for path, holder in copies(model):
        here = [name for name in names if name in holder.modules_to_save]
        if len(here) > 1:
            raise MergeError(ONE_COPY.format(one=here[0], other=here[1], path=path))


WIDE = (torch.float32, torch.float64)
"""The dtypes of a base in which a merge is exact: those in which its sum is made anyway."""


def explain_inexact_merge(model: nn.Module, *names: str) -> str | None:
    """Why merging adapters would change what the model says, or None where the merge is exact.   [docs/math.md (12)]

    Exact means: in eval mode, outputs are equal within roundings of the dtype in which the base computes. (W + ΔW)·x
    and W·x + ΔW·x are then the same sum in another order. That is so where every weight with a factor of these
    adapters is a plain one in fp32 or wider, so that the sum of (11), which is made in that dtype, is stored as it is.
    In bf16 and fp16 the stored weight loses what lies below its own roundings, and a quantised one far more. It does
    not hold for products that round the weight once more, as under autocast or with TF32.

    Args:
        model: An adapted model; it is left alone.
        names: Adapters; none means those of the default route.

    Returns:
        A sentence that names the site and the dtype, or why there can be no merge at all; None where it is exact.

    Raises:
        AdapterError: There is no such adapter.
    """
    state = state_of(model)
    chosen = tuple(names or state.default.names)
    check_known(state, chosen)
    try:
        check_mergeable(model, chosen, untie=False)
        check_rows(model, chosen, untie=False)
    except MergeError as refusal:
        return str(refusal)
    for path, layer in layers(model):
        if not any(name in layer.r for name in chosen):
            continue
        if layer.base.quantised:
            return (
                f"{path} is stored as {layer.base.name}, and storing the merged weight so would lose most of what an "
                "adapter adds."
            )
        dtype = layer.original().dtype
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
