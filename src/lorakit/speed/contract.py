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
from types import CellType, FunctionType

from torch import nn
from torch.nn.modules import module as torch_modules

from lorakit.speed.adapter_layers import is_adapted, is_peft_linear
from lorakit.speed.identity import MISSING, Fact, Identities, Identity, contents_of, is_stored_function
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

CONTENTS = operator.attrgetter("cell_contents")
"""Reads the current value of a variable of an enclosing function; raises ValueError if it has none."""


@dataclass(frozen=True, eq=False)
class Contract:
    """Values that a fused `forward` relies on.

    Settings are compared by type and value; all other values are compared by identity.

    Attributes:
        present: Dictionary entries that must not change, by dictionary.
        absent: Keys that must not appear in a dictionary.
        functions: Functions whose code and defaults must not change, each with these values.
        cells: Variables of enclosing functions that these functions refer to and that must not be assigned.
        contents: The value of each variable in `cells`.
    """

    present: tuple[Entries, ...]
    absent: tuple[tuple[Mapping[str, object], str], ...]
    functions: tuple[tuple[FunctionType, tuple[object, ...]], ...]
    cells: tuple[CellType, ...]
    contents: tuple[object, ...]

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
        return not (self.cells and self._is_assigned()) and not torch_modules._has_any_global_hook()

    def _is_assigned(self) -> bool:
        """Return whether a variable in `cells` has been assigned or deleted."""
        try:
            return not all(map(operator.is_, map(CONTENTS, self.cells), self.contents))
        except ValueError:
            return True


def contract_for(module: nn.Module, fused: Collection[int] | None, identities: Identities) -> Contract:
    """Collect what a module's fused `forward` currently relies on.

    Args:
        module: The module's replacement; it and the replacements of its children must already be installed.
        fused: The `id`s of the fused modules, or None if the fused `forward` bypasses everything inside the module.
        identities: What each module computes.
    """
    facts, functions = [*_of_module(module, identities)], [*_live(module, identities)]
    for holder, name, child in bypassed_modules(module, fused):
        functions += _live(child, identities)
        if is_operand(child):
            facts += (fact for one in _layers(child) for fact in identities.of(one).facts)
        else:
            facts += [(holder._modules, name, child), *_of_module(child, identities)]
    return _contract(facts, functions)


def _live(module: nn.Module, identities: Identities) -> Iterator[FunctionType]:
    """Yield the functions that a module runs or, for an adapter layer, those that its layers run."""
    return (function for one in _layers(module) for function in identities.of(one).live)


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
    held = {id(cell): cell for function, _ in live.values() for cell in function.__closure__ or ()}
    cells = tuple(held.values())
    return Contract(tuple(present), tuple(absent), tuple(live.values()), cells, tuple(map(contents_of, cells)))


def is_operand(module: nn.Module) -> bool:
    """Return whether a module is linear, with or without adapters.

    Fused `forward` methods look up linear modules on each call.

    Args:
        module: Any module.
    """
    return is_adapted(module) or isinstance(module, nn.Linear) or type(module).__name__ == CONV1D


def bypassed_modules(module: nn.Module, fused: Collection[int] | None) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield (parent, name, child) for each module that the fused `forward` of a module bypasses.

    Args:
        module: The module.
        fused: The `id`s of the modules whose children are bypassed too, or None for all modules.
    """
    if is_adapted(module):
        return
    for name, child in children_of(module).items():
        yield module, name, child
        if fused is None or id(child) in fused:
            yield from bypassed_modules(child, fused)


def _of_module(module: nn.Module, identities: Identities) -> Iterator[Fact]:
    found, own = identities.of(module), vars(module)
    yield from found.facts
    if is_adapted(module):  # attaching or removing adapters changes the layer's settings
        for layer in _layers(module):
            yield from identities.of(layer).facts
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


def _layers(module: nn.Module) -> list[nn.Module]:
    """Return a module or, for an adapter layer, its innermost base layer; before it, the layers around it from peft."""
    found = []
    while is_adapted(module):
        found += [module] if is_peft_linear(module) else []
        module = module.get_submodule("base_layer")
    return [*found, module]


def _is_same(found: object, value: object) -> bool:
    return found is value or (type(found) is type(value) and isinstance(value, SETTINGS) and bool(found == value))
