"""Contracts: what a fused `forward` assumes about the modules that it bypasses.

A fused `forward` checks its contract on every call.

A fused `forward` is valid only while two conditions hold. First, the modules that it bypasses are the ones that were
probed. Second, nothing has changed in the settings of these modules, in their `forward` methods, or in the functions
that these methods call. This Python module does not depend on any particular fused `forward`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType

from torch import nn
from torch.nn.modules import module as torch_modules

from lorakit.speed.identity import MISSING, Fact, Identities, Identity, is_stored_function
from lorakit.speed.patching import children_of
from lorakit.targets.layer_types import CONV1D

SETTINGS = (bool, int, float, str, type(None))
"""Types of the attributes whose values are compared."""

ASKED = frozenset({"training", "gradient_checkpointing", "p", "dropout", "attention_dropout"})
"""Attributes that are not compared: fused `forward` methods read them at each call, or no `forward` uses them."""

IN_CONFIG = ("_attn_implementation_internal", "is_causal")
"""Config fields that are read by functions that a `forward` calls, rather than by the `forward` itself."""


Entries = tuple[Mapping[str, object], Callable[[Mapping[str, object]], tuple[object, ...]], tuple[object, ...]]
"""Entries of one dictionary: the dictionary, a function that reads the values, and the values that are expected."""

CODE = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
"""Reads those attributes of a function that determine what a call computes and that can be assigned."""


@dataclass(frozen=True, eq=False)
class Contract:
    """Values that a fused `forward` relies on.

    Settings are compared by type and value; all other values are compared by identity.

    Attributes:
        present: Dictionary entries that must not change, by dictionary.
        absent: Keys that must not appear in a dictionary.
        functions: Functions whose code and defaults must not change, each with these values.
    """

    present: tuple[Entries, ...]
    absent: tuple[tuple[Mapping[str, object], str], ...]
    functions: tuple[tuple[FunctionType, tuple[object, ...]], ...]

    def holds(self) -> bool:
        """Return whether nothing has changed and no global module hook is registered."""
        for table, read, values in self.present:
            try:
                found = read(table)
            except KeyError:
                return False
            if not all(map(operator.is_, found, values)) and not all(map(_is_same, found, values)):
                return False
        for table, name in self.absent:
            if name in table:
                return False
        for function, values in self.functions:
            if not all(map(operator.is_, CODE(function), values)):
                return False
        return not torch_modules._has_any_global_hook()


def contract_for(module: nn.Module, fused: Collection[int] | None, identities: Identities) -> Contract:
    """Collect what a module's fused `forward` currently relies on.

    Args:
        module: The module's replacement; it and the replacements of its children must already be installed.
        fused: The `id`s of the fused modules, or None if the fused `forward` bypasses everything inside the module.
        identities: What each module computes.
    """
    facts, functions = [*_of_module(module, identities)], [*identities.of(_base(module)).live]
    for holder, name, child in bypassed_modules(module, fused):
        functions += identities.of(_base(child)).live
        if is_operand(child):
            facts += identities.of(_base(child)).facts
        else:
            facts += [(holder._modules, name, child), *_of_module(child, identities)]
    return _contract(facts, functions)


def contract_of_model(model: nn.Module, found: Sequence[Identity], facts: Sequence[Fact]) -> Contract:
    """Collect what the loss without logits currently relies on.

    Args:
        model: The transformers model.
        found: Identities of the `forward` methods and functions that are partly bypassed.
        facts: Other dictionary entries that must not change.
    """
    whole = (*facts, *(fact for one in found for fact in one.facts))
    override = (vars(model), "forward", vars(model).get("forward", MISSING))
    return _contract((*whole, override), [function for one in found for function in one.live])


def _contract(facts: Sequence[Fact], functions: Sequence[FunctionType]) -> Contract:
    """Group facts by dictionary; of equal keys, the last counts."""
    tables: dict[int, tuple[Mapping[str, object], dict[str, object]]] = {}
    for table, name, value in facts:
        tables.setdefault(id(table), (table, {}))[1][name] = value
    present, absent = [], []
    for table, entries in tables.values():
        absent += [(table, name) for name, value in entries.items() if value is MISSING]
        names = [name for name, value in entries.items() if value is not MISSING]
        if names:  # itemgetter returns a tuple only for two or more names
            read = operator.itemgetter(*names, names[0])
            present.append((table, read, read(entries)))
    live = {id(function): (function, CODE(function)) for function in functions}
    return Contract(tuple(present), tuple(absent), tuple(live.values()))


def is_operand(module: nn.Module) -> bool:
    """Return whether a module is linear, with or without adapters.

    Fused `forward` methods look up linear modules on each call.

    Args:
        module: Any module.
    """
    return _is_around_base(module) or isinstance(module, nn.Linear) or type(module).__name__ == CONV1D


def bypassed_modules(module: nn.Module, fused: Collection[int] | None) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield (parent, name, child) for each module that the fused `forward` of a module bypasses.

    Args:
        module: The module.
        fused: The `id`s of the modules whose children are bypassed too, or None for all modules.
    """
    if _is_around_base(module):
        return
    for name, child in children_of(module).items():
        yield module, name, child
        if fused is None or id(child) in fused:
            yield from bypassed_modules(child, fused)


def _of_module(module: nn.Module, identities: Identities) -> Iterator[Fact]:
    found, own = identities.of(module), vars(module)
    yield from found.facts
    if _is_around_base(module):  # attaching or removing adapters changes the layer's settings
        yield from identities.of(_base(module)).facts
        return
    for name, value in own.items():
        is_setting = name[0] != "_" and name not in ASKED and isinstance(value, SETTINGS)
        if is_setting or is_stored_function(found, name, value):
            yield own, name, value
    config = own.get("config")
    if config is not None:
        yield own, "config", config
        fields = vars(config)
        for name in {*IN_CONFIG, *found.fields}:
            yield fields, name, fields.get(name, MISSING)


def _is_around_base(module: nn.Module) -> bool:
    """Return whether a module is an adapter layer around a base layer."""
    return "base_layer" in module._modules


def _base(module: nn.Module) -> nn.Module:
    """Return a module or, for an adapter layer, its innermost base layer."""
    while (base := module._modules.get("base_layer")) is not None:
        module = base
    return module


def _is_same(found: object, value: object) -> bool:
    return found is value or (type(found) is type(value) and isinstance(value, SETTINGS) and bool(found == value))
