"""The merged state dict, tensor by tensor; the model is not modified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lorakit.core.layers.adapter_component import MergeOptions
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.merging.merging import leaders_of, names_to_merge
from lorakit.core.model.base_view import QuantizedWeight, base_tensors, float_dtype, quantized_weights
from lorakit.core.model.index import AdapterIndex


def merged_state_dict(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """Return the state dict of the base with adapters merged, under the base's own names; the model is not modified.

    Args:
        model: An adapted model.
        names: Adapters; none means those of the default route.

    Returns:
        Name -> tensor (…) in the base's dtype. Tensors without an adapter are the model's own, not copies. A weight
        that is tied in the model and adapted in one module appears under both names, with different values. Quantized
        weights are dequantized, in the dtype of their matmuls: the state dict is that of the plain base.

    Raises:
        MergeError: An adapter cannot be merged.
        AdapterError: There is no such adapter.
    """
    index = AdapterIndex.of(model)
    chosen = names_to_merge(index, names)
    for path, part in index.components.items():
        part.check_mergeable(path, chosen)
    merged = _Merged(index, chosen)
    quantized = {weight.packed: weight for weight in quantized_weights(index)}
    options = MergeOptions(in_place=False, dense=float_dtype(index) if quantized else None)
    found: dict[str, Tensor] = {}
    for name, tensor, module in base_tensors(index):
        if name in quantized:
            found |= merged.dequantized(quantized[name], options)
        else:
            found[name] = merged.tensor(name, module, tensor)
    return found


class _Merged:
    """The tensors of the base that adapters change, computed on demand."""

    def __init__(self, index: AdapterIndex, names: Sequence[str]) -> None:
        self._names, self._options = names, MergeOptions(in_place=False)
        led = leaders_of(index, names)
        self._sites = {  # a module's id and a name in it -> the layer whose weight that is; one weight, bit for bit
            (id(layer.source), layer.slot.parameter): led.get(layer, layer) for _, layer in index.layers_of(names)
        }
        self._layers = {(id(layer.source), "bias"): layer for _, layer in index.layers_of(names)}
        self._tensors: dict[str, Tensor] = {}  # of saved modules and trainable tokens
        for path, component in (*index.every(ModulesToSave), *index.every(TrainableTokens)):
            tensors = component.merged_tensors(names, self._options)
            self._tensors |= {f"{path}.{leaf}": tensor for leaf, tensor in tensors.items()}
        self._biases: dict[tuple[int, str], Tensor] = {}
        for patch in (patch for patches in index.patches.values() for patch in patches):
            tensors = patch.merged_tensors(names, self._options)
            self._biases |= {(id(patch.module), leaf): tensor for leaf, tensor in tensors.items()}

    def tensor(self, name: str, module: nn.Module, tensor: Tensor) -> Tensor:
        """Return a tensor of the base, (…), with adapters merged; without any it is the base's own, detached."""
        place = (id(module), name.rpartition(".")[2])
        if place in self._sites:
            return self._sites[place].merged_tensors(self._names, self._options)[place[1]]
        bias = self._layers[place].merged_bias(self._names) if place in self._layers else None
        if bias is not None:
            return bias
        return self._tensors[name] if name in self._tensors else self._biases.get(place, tensor.detach())

    def dequantized(self, weight: QuantizedWeight, options: MergeOptions) -> Iterator[tuple[str, Tensor]]:
        """Yield name and tensor, (…), of a quantized weight as the plain base has it; also its bias."""
        of_bias, bias = weight.name.removesuffix("weight") + "bias", weight.plain_bias
        merged = {} if weight.layer is None else weight.layer.merged_tensors(self._names, options)
        if weight.name in self._tensors:  # an adapter's copy of the whole module replaces it
            yield weight.name, self._tensors[weight.name]
            bias = self._tensors.get(of_bias) if bias is not None else None
        elif merged:
            yield weight.name, merged["weight"]
            bias = None if bias is None else merged.get("bias", bias)
        else:
            yield weight.name, weight.dequantized(options.dense or torch.float32)._parameters["weight"].detach()  # type: ignore[union-attr]
        if bias is not None:
            yield of_bias, bias.detach()
