"""The merged state dict, tensor by tensor; the model is not modified."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.core.layers.bias import BiasPatch, bias_for, brings_bias
from lorakit.core.layers.merged_weight import How, sum_of_updates
from lorakit.core.merging.checks import check_variants
from lorakit.core.merging.token_tables import merged_tables
from lorakit.core.model.base_view import QuantisedWeight, base_tensors, float_dtype, quantised_weights
from lorakit.core.model.checks import check_known
from lorakit.core.model.index import copies, layers, state_of
from lorakit.core.model.ties import of_one_weight

__all__ = ["iter_merged", "merged_state_dict"]


def merged_state_dict(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """The state dict of the base with adapters merged, under the base's own names; the model is left alone.

    Args:
        model: An adapted model.
        names: Adapters; none means those of the default route.

    Returns:
        Name -> tensor (…) in the base's dtype. Tensors without an adapter are the model's own, not copies. A weight
        that is tied in the model and adapted in one place appears under both names, no longer the same. Quantised
        weights are multiplied out, in the dtype of their products: the state dict is that of the plain base.

    Raises:
        MergeError: An adapter cannot be merged.
        AdapterError: There is no such adapter.
    """
    return dict(iter_merged(model, *names))


def iter_merged(model: nn.Module, *names: str) -> Iterator[tuple[str, Tensor]]:
    """`merged_state_dict`, one tensor at a time.

    Yields:
        Name and tensor (…).

    Raises:
        MergeError: An adapter cannot be merged.
        AdapterError: There is no such adapter.
    """
    state = state_of(model)
    chosen = tuple(names or state.default.names)
    check_known(state, chosen)
    check_variants(model, chosen)
    sites = {(id(layer.source), layer.slot.parameter): layer for _, layer in layers(model)}
    led = {id(layer): leader for layer, leader in of_one_weight(model, chosen)}
    replaced = _copied_tensors(model, chosen)
    biased = {(id(layer.source), "bias"): layer for layer in sites.values() if brings_bias(layer, chosen)}
    quantised = {weight.packed: weight for weight in quantised_weights(model)}
    how = How(False, float_dtype(model)) if quantised else How(False)
    for name, tensor, module in base_tensors(model):
        leaf = name.rpartition(".")[2]
        if name in quantised:
            yield from _multiplied_out(quantised[name], chosen, how, replaced)
            continue
        layer = sites.get((id(module), leaf))
        if layer is not None:
            layer = led.get(id(layer), layer)  # one weight, to the bit
            here = [n for n in chosen if n in layer.r]
            yield name, sum_of_updates(layer, here, How(False))[0] if here else tensor.detach()
        elif (id(module), leaf) in biased:
            layer = biased[id(module), leaf]
            bias = bias_for(layer, [n for n in chosen if n in layer.r])
            yield name, tensor.detach() if bias is None else bias
        elif name in replaced:
            yield name, replaced[name]
        else:
            biases = [s for s in BiasPatch.on(module) if s.adapter in chosen and leaf in s.originals]
            yield name, (module._parameters[leaf] if biases else tensor).detach()  # type: ignore[union-attr]


def _multiplied_out(
    weight: QuantisedWeight, names: Sequence[str], how: How, replaced: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """A quantised weight with adapters in it as the plain base has it: name and tensor; also a bias of its own."""
    here = [] if weight.layer is None else [name for name in names if name in weight.layer.r]
    bias, of_bias = weight.loose_bias, weight.name.removesuffix("weight") + "bias"
    if weight.name in replaced:  # an adapter's copy of the whole module stands in its place
        yield weight.name, replaced[weight.name]
        bias = replaced.get(of_bias) if bias is not None else None
    elif weight.layer is None or not here:
        yield weight.name, weight.multiplied_out(how.dense or torch.float32)._parameters["weight"].detach()  # type: ignore[union-attr]
    else:
        yield weight.name, sum_of_updates(weight.layer, here, how)[0]._parameters["weight"].detach()
        bias = bias if bias is None or not brings_bias(weight.layer, here) else bias_for(weight.layer, here)
    if bias is not None:
        yield of_bias, bias.detach()


def _copied_tensors(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Name in the base -> tensor (…) of the copy that an adapter trained in its place."""
    found: dict[str, Tensor] = {}
    for path, holder in copies(model):
        for name in names:
            if name in holder.modules_to_save:
                for leaf, tensor in holder.modules_to_save[name].state_dict().items():
                    found[f"{path}.{leaf}"] = tensor
    return found | {f"{path}.weight": table for path, table in merged_tables(model, names).items()}
