"""Choose the linear layers to multiply in int8, and measure their inputs on calibration batches.

The batches run on the base, without adapters and in evaluation mode. The model is unchanged afterwards. The pages of a
weight that is in a mapped file are given back after each use, so that the original weights are not all in memory at
once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.allocator import release_pages
from lorakit.choices import CONV1D, LINEAR
from lorakit.core.clones import has_observers
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.model.activation import without_adapters
from lorakit.core.model.index import AdapterIndex, embedding_of
from lorakit.core.quantization import is_computed
from lorakit.core.statistics.collecting import Forward, at_least_one, first_input, hooked, in_mode
from lorakit.errors import NotYetSupported
from lorakit.identity.identities import original_class

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Config fields with the number of experts, which is the number of outputs of a router."""

TRAINED = "requires gradients"


@dataclass
class Target:
    """A linear layer to quantize.

    Attributes:
        module: The `nn.Linear` or `Conv1D`.
        absmax: Largest |x| of each input channel, (in,), fp32.
        group: Number of the group of layers that share an input; -1 until the layer has run.
    """

    path: str
    module: nn.Module
    absmax: Tensor
    group: int = -1

    @property
    def weight(self) -> Tensor:
        """Return the weight (out, in)."""
        W = cast(Tensor, self.module.weight).detach()
        return W.t() if type(self.module).__name__ == CONV1D else W

    def release(self) -> None:
        """Give back the memory of the weight if it can be read from its file again."""
        release_mapped(cast(Tensor, self.module.weight))


def release_mapped(tensor: Tensor) -> bool:
    """Give back the memory of a weight (out, in) if it is in a mapped file and unmodified; return whether it is."""
    size = tensor.numel() * tensor.element_size()
    return tensor.device.type == "cpu" and release_pages(tensor.data_ptr(), size)


def choose_targets(index: AdapterIndex) -> tuple[list[Target], dict[str, str]]:
    """Return the layers to quantize, and the linear layers that keep their dtype with the reasons."""
    targets, skipped = [], {}
    blocks = _blocks(index)
    for candidate in index.candidates:
        if candidate.kind not in (LINEAR, CONV1D):
            continue
        module = index.base(candidate.path)
        why = _why_not(index, candidate.path, module, blocks)
        if why:
            skipped[candidate.path] = why
        else:
            weight = cast(Tensor, module.weight)
            targets.append(Target(candidate.path, module, torch.zeros(candidate.in_features, device=weight.device)))
    return targets, skipped


def _blocks(index: AdapterIndex) -> tuple[str, ...]:
    """Return the first part of the paths in the model's lists of blocks; ("",) if it has no such lists."""
    return tuple(f"{path}." for path, module in index.modules.items() if isinstance(module, nn.ModuleList)) or ("",)


def _why_not(index: AdapterIndex, path: str, module: nn.Module, blocks: tuple[str, ...]) -> str:
    """Return why a linear layer keeps its dtype, or ""."""
    layer = index.modules[path]
    parameters = [p for p in module._parameters.values() if p is not None]
    reasons = {
        "output head": module is embedding_of(index.model, "output"),
        "outside the model's blocks": not path.startswith(blocks),
        "a saved module": _is_inside_copy(index, path),
        "adapted through its weight": isinstance(layer, LoraLayer) and layer.kind.acts_on != "input",
        "its weight is computed": is_computed(module),
        "its class is not nn.Linear": not _is_plain(module),
        "inside an adapter": any(word.startswith("lora_") for word in path.split(".")),
        "an expert": ".experts." in f".{path}.",
        "a router": _is_router(index.model, module),
        "tied weight": any(index.names_elsewhere(p, {id(module)}) for p in parameters),
        TRAINED: any(p.requires_grad for p in parameters),
        "it has hooks": has_observers(module),
    }
    return next((why for why, is_true in reasons.items() if is_true), "")


def _is_plain(module: nn.Module) -> bool:
    kind = original_class(module)
    return kind is nn.Linear or (kind.__name__ == CONV1D and kind.__module__ == "transformers.pytorch_utils")


def _is_inside_copy(index: AdapterIndex, path: str) -> bool:
    copies = [at for at, _ in index.every(ModulesToSave)]
    return any(f"{path}.".startswith(f"{at}.") for at in copies)


def _is_router(model: nn.Module, module: nn.Module) -> bool:
    config = getattr(model, "config", None)
    counts = {getattr(config, name, None) for name in EXPERT_COUNTS} - {None}
    return getattr(module, "out_features", None) in counts


def base_losses(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], forward: Forward | None = None
) -> tuple[float, ...]:
    """Return the losses of the base, without adapters, on all batches in order, as `quantize_base` measures them."""
    return run_batches(model, batches, forward or run_batch, Calibration([]))[0]


def run_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Return the model's output for one batch of keyword arguments, without a key-value cache."""
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    return model(**batch, **({"use_cache": False} if takes_cache and "use_cache" not in batch else {}))


@dataclass
class _Input:
    """An input x (…, in) of layers, its group, and the largest |x| of each channel, (in,), at a version of x."""

    x: Tensor
    group: int
    largest: Tensor | None = None
    version: int = -1


class Calibration:
    """Records the largest input of each channel, and which layers get the same input.

    If padding cannot be told apart in the input of a layer, `needs_mask` makes this an error; otherwise, all positions
    of that input are used.
    """

    def __init__(self, targets: Sequence[Target], *, needs_mask: bool = False) -> None:
        self.targets, self.needs_mask = {target.path: target for target in targets}, needs_mask
        self.mask: Tensor | None = None
        self.inputs: list[_Input] = []
        self.groups = 0

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """Use the attention mask (rows, length) of a batch, if it has padding."""
        mask = batch.get("attention_mask")
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()) else None
        self.inputs.clear()

    def hooks(self) -> AbstractContextManager[None]:
        """Return a context manager in which each layer records its input, and gives back the memory of its weight."""
        return hooked({path: target.module for path, target in self.targets.items()}, self._hook)

    def _hook(self, path: str, module: nn.Module) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], __: Tensor) -> None:
            self._record(self.targets[path], first_input(args, kwargs))
            self.targets[path].release()

        return record

    def _record(self, target: Target, x: Tensor) -> None:
        """Record an input x (…, in) of a layer; the last two inputs are held, so that their ids are unique."""
        known = next((one for one in self.inputs if one.x is x), None)
        if known is None:
            self.groups += 1
            known = _Input(x, self.groups)
            self.inputs = [*self.inputs[-1:], known]
        version = -1 if x.is_inference() else x._version
        if known.largest is None or version < 0 or version != known.version:
            values = self._tokens(target, x.detach()).reshape(-1, x.shape[-1])
            empty = x.new_zeros(x.shape[-1], dtype=torch.float32)
            known.largest, known.version = values.abs().amax(0).float() if len(values) else empty, version
        if target.group < 0:
            target.group = known.group
        torch.maximum(target.absmax, known.largest.to(target.absmax.device), out=target.absmax)

    def _tokens(self, target: Target, x: Tensor) -> Tensor:
        """Return the input x (rows, length, …, in) or (rows · length, in) of a layer without padding."""
        if self.mask is None:
            return x
        if x.shape[:2] == self.mask.shape:
            return x[self.mask]
        if x.ndim == 2 and len(x) == self.mask.numel():
            return x[self.mask.flatten()]
        if self.needs_mask:
            text = f"{target.path}: the padding in an input {tuple(x.shape)} is unknown; pass batches without padding."
            raise NotYetSupported(text, what=tuple(x.shape), where=target.path, field="batches")
        return x


def run_batches(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], forward: Forward, calibration: Calibration
) -> tuple[tuple[float, ...], int]:
    """Run all batches on the base, or raise a DataError without any; return the losses and number of tokens."""
    losses, tokens = list[float](), 0
    with torch.no_grad(), in_mode(model, False), without_adapters(model), calibration.hooks():
        for batch in at_least_one(batches):
            calibration.begin(batch)
            output = forward(model, batch)
            loss = output if isinstance(output, Tensor) and output.ndim < 2 else getattr(output, "loss", None)
            losses += [] if loss is None else loss.reshape(-1).tolist()
            tokens += _tokens(batch)
            del output, loss
    calibration.inputs.clear()
    return tuple(losses), tokens


def _tokens(batch: Mapping[str, Tensor]) -> int:
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.sum())
    return ids.numel() if isinstance(ids, Tensor) else 0


def agree_on(targets: Sequence[Target], tokens: int) -> int:
    """Give all processes the largest inputs of any process; return the number of tokens of all processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and targets):
        return tokens
    joined = torch.cat([target.absmax.to(targets[0].absmax.device) for target in targets])
    joined.nan_to_num_(nan=torch.inf)  # whether a maximum with NaN is NaN depends on the backend
    distributed.all_reduce(joined, distributed.ReduceOp.MAX)
    for target, part in zip(targets, joined.split([len(target.absmax) for target in targets]), strict=True):
        target.absmax.copy_(part)
    count = torch.tensor([tokens], device=joined.device)
    distributed.all_reduce(count)
    return int(count)
