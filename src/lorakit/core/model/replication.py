"""`layer_replication`: a model's layers stacked anew, so that some stand several times and share their weights.

Each copy is a module of its own over the same parameters, so that adapters can differ from copy to copy (Kim et al.
2023, arXiv:2312.15166, stack layers so). The list of layers is put in place for the first adapter that asks for
it and given back with the last; the state remembers it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.model.index import AdapterIndex, find_state
from lorakit.core.routing.state import AdapterState
from lorakit.errors import ConfigError

WRAPPERS = ("model", "bert", "transformer")
"""Attributes under which architectures keep the part that holds the layers."""

LISTS = (("layers",), ("encoder", "layer"), ("h",))
"""Where that part holds them: as Llama, as BERT, as Falcon."""

PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")
"""Fields of a config that hold one entry per layer."""

NUMBER = "layer_idx"
"""Attribute in which a part of a layer remembers its place, for the cache."""


@dataclass(frozen=True)
class Setting:
    """A field of the model's config that says how many layers there are, or says something of each."""

    config: Any
    name: str
    before: Any
    after: Any


@dataclass
class Replication:
    """How a model's layers were stacked anew.

    Attributes:
        ranges: The layers that stand there now, as ranges of the original ones, ends excluded.
        holder: The module that holds the list.
        attribute: Its name there.
        original: The list that was there.
        stacked: The list that is there now.
        settings: Fields of the model's config that follow.
        dtype: dtype of the first layer's first weight when the list was built.
    """

    ranges: tuple[tuple[int, int], ...]
    holder: nn.Module
    attribute: str
    original: nn.ModuleList
    stacked: nn.ModuleList
    settings: tuple[Setting, ...]
    dtype: torch.dtype

    def put(self) -> None:
        """Put the new list in place."""
        self.holder._modules[self.attribute] = self.stacked
        for setting in self.settings:
            setattr(setting.config, setting.name, setting.after)

    def undo(self) -> None:
        """Put the original list back; no adapter may sit on the new one any more."""
        order = _order(self.ranges)
        for number, layer in enumerate(self.original):
            if number in order:
                _follow(layer, self.stacked[order.index(number)])
            else:  # it stood nowhere, so what moved or cast the model has passed it by
                now = next(self.stacked.parameters())
                layer.to(device=now.device, dtype=now.dtype if now.dtype != self.dtype else None)
        self.holder._modules[self.attribute] = self.original
        for setting in self.settings:
            setattr(setting.config, setting.name, setting.before)

    def untie(self) -> None:
        """Give every copy parameters of its own, so that the stacked model can be saved like any other."""
        seen: set[int] = set()
        for layer in self.stacked:
            own: dict[int, nn.Parameter] = {}
            for module in layer.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and id(parameter) in seen:
                        duplicate = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                        module._parameters[name] = own.setdefault(id(parameter), duplicate)
            seen |= {id(parameter) for parameter in layer.parameters()}


@contextlib.contextmanager
def stacked_for(index: AdapterIndex, config: LoraConfig) -> Iterator[AdapterIndex]:
    """Open a block that puts an adapter on a model whose layers are stacked as its config says; undone if it fails.

    Args:
        index: The model's index.
        config: The adapter's config.

    Yields:
        The model's index: the given one, or another if layers were stacked.

    Raises:
        ConfigError: The ranges do not fit, or adapters on the model ask for other ones.
    """
    model, state = index.model, index.state
    ranges = tuple((int(start), int(end)) for start, end in config.layer_replication or ())
    if state is not None:
        there = state.replication.ranges if state.replication is not None else ()
        if ranges != there:
            raise ConfigError(
                f"layer_replication is {_shown(ranges)}, and the adapters on this model have {_shown(there)}: the "
                "layers of one model can be stacked in one way. Detach them first, or give the same ranges."
            )
        yield index
        return
    if not ranges:
        yield index
        return
    replication = _built(model, ranges)
    replication.put()
    done: AdapterState | None = None
    try:
        yield index.again()
        done = find_state(model)
    finally:
        if done is None:
            replication.undo()
        else:
            done.replication = replication


def _built(model: nn.Module, ranges: Sequence[tuple[int, int]]) -> Replication:
    holder, attribute, original = _find(model)
    count = len(original)
    for start, end in ranges:
        if not 0 <= start < end <= count:
            raise ConfigError(
                f"layer_replication holds ({start}, {end}); the model has layers 0 to {count - 1}, and a range is "
                "(first, last + 1)."
            )
    order = _order(ranges)
    stacked = nn.ModuleList([_copy(original[number], index) for index, number in enumerate(order)])
    stacked.training = original.training
    dtype = next(stacked.parameters()).dtype
    settings = _settings(getattr(holder, "config", getattr(model, "config", None)), count, order)
    return Replication(tuple(ranges), holder, attribute, original, stacked, tuple(settings), dtype)


def _order(ranges: Sequence[tuple[int, int]]) -> list[int]:
    return [number for start, end in ranges for number in range(start, end)]


def _find(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    part = model
    while True:
        inner = next((part._modules[name] for name in WRAPPERS if part._modules.get(name) is not None), None)
        if inner is None:
            break
        part = inner
    for *around, attribute in LISTS:
        holder: nn.Module | None = part
        for name in around:
            holder = holder._modules.get(name) if holder is not None else None
        found = holder._modules.get(attribute) if holder is not None else None
        if holder is not None and isinstance(found, nn.ModuleList):
            return holder, attribute, found
    raise ConfigError(
        f"layer_replication: Could not locate the layers attribute in the model, a {type(model).__name__}. Expected "
        "Llama, Bert or Falcon compatible architectures: an nn.ModuleList `layers`, `encoder.layer` or `h`."
    )


def _settings(config: Any, count: int, order: Sequence[int]) -> Iterator[Setting]:
    """The fields that follow: the number of layers, and lists with one entry per layer."""
    if getattr(config, "num_hidden_layers", None) == count:
        yield Setting(config, "num_hidden_layers", count, len(order))
    for name, value in list(getattr(config, "__dict__", {}).items()):
        if name in PER_LAYER and isinstance(value, list) and len(value) == count:
            yield Setting(config, name, value, [value[number] for number in order])


def _copy(module: nn.Module, index: int) -> nn.Module:
    """A module over the same parameters and buffers, whose parts remember another place."""
    if "forward" in module.__dict__:
        raise ConfigError(
            f"layer_replication: a {type(module).__name__} carries a forward of its own instance (a dispatched or "
            "compiled model), which would run the original layer. Replicate the layers before that."
        )
    copied = module.__new__(type(module))
    own = {name: type(value)(value) for name, value in module.__dict__.items() if _is_table(name, value)}
    copied.__dict__ = {**module.__dict__, **own}
    copied._modules = {n: None if child is None else _copy(child, index) for n, child in module._modules.items()}
    if hasattr(copied, NUMBER):
        setattr(copied, NUMBER, index)
    return copied


def _is_table(name: str, value: Any) -> bool:
    """Whether an attribute is one of torch's own tables, of which each module needs one of its own."""
    return isinstance(value, dict) and (name in {"_parameters", "_buffers"} or name.endswith("_hooks"))


def _follow(layer: nn.Module, copied: nn.Module) -> None:
    """What a layer's copy has that is not shared with it: buffers that were moved, and the mode."""
    for one, other in zip(layer.modules(), copied.modules(), strict=True):
        one._buffers.update(other._buffers)
        one.training = other.training


def _shown(ranges: Sequence[tuple[int, int]]) -> str:
    return str([list(pair) for pair in ranges]) if ranges else "none"
