"""Repeat some layers of a model (`layer_replication`); the copies share the weights of the original layers.

Each copy is a separate module with the same parameters, so that each copy can have different factors (Kim et al. 2023,
arXiv:2312.15166, stack layers this way). Attaching the first adapter with this setting replaces the list of layers, and
detaching the last adapter restores the original list, to which the new list refers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.clones import clone_with
from lorakit.core.model.index import REPLICATION, AdapterIndex, find_state
from lorakit.errors import ConfigError

WRAPPERS = ("model", "bert", "transformer")
"""Names that different architectures use for the submodule that contains the layers."""

LISTS = (("", "layers"), ("encoder", "layer"), ("", "h"))
"""Submodule and attribute that hold the list of layers in Llama, BERT and Falcon models, in this order."""

PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")
"""Config fields with one entry per layer."""

NUMBER = "layer_idx"
"""Attribute with a layer's position, which the key-value cache uses as an index."""

Settings = Mapping[str, tuple[int | list[str], int | list[str]]]
"""Config fields that depend on the number of layers, each with its values before and after replication."""


@dataclass
class Replication:
    """A model's replicated layers.

    Attributes:
        ranges: Ranges of original layers that make up the replicated list, with exclusive ends.
        holder: The module that holds the list of layers.
        attribute: Name of the attribute that holds the list of layers.
        original: The original list of layers.
        stacked: The list of layers after replication.
        dtype: The dtype of the first layer's first weight when `stacked` was built.
    """

    ranges: tuple[tuple[int, int], ...]
    holder: nn.Module
    attribute: str
    original: nn.ModuleList
    stacked: nn.ModuleList
    config: object
    settings: Settings
    dtype: torch.dtype

    def put(self) -> None:
        """Replace the model's original list of layers with the stacked list."""
        self._set(self.stacked, is_replicated=True)

    def undo(self) -> None:
        """Restore the original list of layers; the stacked layers must not have adapters."""
        order = _order(self.ranges)
        for number, layer in enumerate(self.original):
            if number in order:  # a copy has its own training flag, and its own buffers if they were moved
                for old, new in zip(layer.modules(), self.stacked[order.index(number)].modules(), strict=True):
                    old._buffers.update(new._buffers)
                    old.training = new.training
            else:  # the layer was not in the model when other layers were moved or cast
                now = next(self.stacked.parameters())
                layer.to(device=now.device, dtype=now.dtype if now.dtype != self.dtype else None)
        self._set(self.original, is_replicated=False)
        self.stacked.__dict__.pop(REPLICATION, None)

    def _set(self, layers: nn.ModuleList, is_replicated: bool) -> None:
        self.holder._modules[self.attribute] = layers
        for name, values in self.settings.items():
            setattr(self.config, name, values[is_replicated])

    def untie(self) -> None:
        """Give every copy separate parameters, so that the model can be saved like any other."""
        self.stacked.__dict__.pop(REPLICATION, None)
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
    """Replicate a model's layers for a `with` block that adds an adapter; undo the replication if the block fails.

    Yield the given index, or a new one if layers were replicated.

    Raises:
        ConfigError: The ranges are not valid for the model, or adapters on the model have different ranges.
    """
    model, state = index.model, index.state
    ranges = tuple((int(start), int(end)) for start, end in config.layer_replication or ())
    if state is not None:
        replication = replication_of(index)
        present = replication.ranges if replication is not None else ()
        if ranges != present:
            text = (
                f"layer_replication is {_shown(ranges)}, but the adapters on this model have {_shown(present)}; all "
                "adapters on a model share its layers. Detach those adapters first, or pass the same ranges."
            )
            raise ConfigError(text, what=_shown(ranges), field="layer_replication", allowed=(_shown(present),))
    if state is not None or not ranges:
        yield index
        return
    replication = _built(model, ranges)
    with contextlib.ExitStack() as undo:
        undo.callback(replication.undo)
        replication.put()
        yield index.again()
        if find_state(model) is not None:
            replication.stacked.__dict__[REPLICATION] = replication
            undo.pop_all()


def replication_of(index: AdapterIndex) -> Replication | None:
    """Return how the layers of a model were replicated for its adapters, or None."""
    replications = (module.__dict__.get(REPLICATION) for module in index.everything.values())
    return next((one for one in replications if one is not None), None)


def _built(model: nn.Module, ranges: Sequence[tuple[int, int]]) -> Replication:
    holder, attribute, original = _find(model)
    count = len(original)
    for start, end in ranges:
        if not 0 <= start < end <= count:
            text = f"layer_replication contains ({start}, {end}); give (first, last + 1) of layers 0 to {count - 1}."
            raise ConfigError(text, what=(start, end), field="layer_replication")
    order = _order(ranges)
    stacked = nn.ModuleList([_copy(original[number], index) for index, number in enumerate(order)])
    stacked.training = original.training
    dtype = next(stacked.parameters()).dtype
    config = getattr(holder, "config", getattr(model, "config", None))
    settings = _settings(config, count, order)
    return Replication(tuple(ranges), holder, attribute, original, stacked, config, settings, dtype)


def _order(ranges: Sequence[tuple[int, int]]) -> list[int]:
    return [number for start, end in ranges for number in range(start, end)]


def _find(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    part = model
    while True:
        inner = next((part._modules[name] for name in WRAPPERS if part._modules.get(name) is not None), None)
        if inner is None:
            break
        part = inner
    for parent, attribute in LISTS:
        holder = part._modules.get(parent) if parent else part
        layers = None if holder is None else holder._modules.get(attribute)
        if holder is not None and isinstance(layers, nn.ModuleList):
            return holder, attribute, layers
    text = (
        f"layer_replication: Could not locate the layers attribute in the model, a {type(model).__name__}. Expected "
        "Llama, Bert or Falcon compatible architectures: an nn.ModuleList named `layers`, `encoder.layer` or `h`."
    )
    raise ConfigError(text, what=type(model).__name__, field="layer_replication")


def _settings(config: object, count: int, order: Sequence[int]) -> Settings:
    settings: dict[str, tuple[int | list[str], int | list[str]]] = {}
    if getattr(config, "num_hidden_layers", None) == count:
        settings["num_hidden_layers"] = count, len(order)
    for name in PER_LAYER:
        value = getattr(config, "__dict__", {}).get(name)
        if isinstance(value, list) and len(value) == count:
            settings[name] = value, [value[number] for number in order]
    return settings


def _copy(module: nn.Module, index: int) -> nn.Module:
    """Return a copy of a module with the same parameters and buffers but a different layer position."""
    if "forward" in module.__dict__:
        text = (
            f"layer_replication: this {type(module).__name__} has an instance-level forward method (from dispatching "
            "or compiling the model), which would run the original layer. Replicate the layers before dispatching or "
            "compiling the model."
        )
        raise ConfigError(text, what=type(module).__name__, field="layer_replication")
    copied = clone_with(module, {})
    for name, value in module.__dict__.items():
        if isinstance(value, dict) and (name == "_buffers" or name.endswith("_hooks")):
            copied.__dict__[name] = value.copy()
    copied._modules = {n: None if child is None else _copy(child, index) for n, child in module._modules.items()}
    if hasattr(copied, NUMBER):
        setattr(copied, NUMBER, index)
    return copied


def _shown(ranges: Sequence[tuple[int, int]]) -> str:
    return str([list(pair) for pair in ranges]) if ranges else "none"
