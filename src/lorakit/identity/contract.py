"""Contracts: what the fast path of a module assumes, compared before each call."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, FunctionType

from torch import nn
from torch.nn.modules import module as torch_modules

from lorakit.identity.identities import MISSING, Fact, Identities, contents_of, is_stored_function, kernel_functions

SETTINGS = (bool, int, float, str, type(None))
"""Types of the attributes whose values are compared."""

ASKED = frozenset({"training", "gradient_checkpointing", "p", "dropout", "attention_dropout"})
"""Attributes that are not compared: fused `forward` methods read them at each call, or no `forward` uses them."""

IN_CONFIG = ("_attn_implementation_internal", "_experts_implementation_internal", "is_causal")
"""Config fields that are read by functions that a `forward` calls, rather than by the `forward` itself."""


Entries = tuple[Mapping[str, object], Callable[[Mapping[str, object]], tuple[object, ...]], tuple[object, ...]]
"""Entries of one dictionary: the dictionary, a function that reads the values, and the values that are expected."""

CODE = operator.attrgetter("__code__", "__defaults__", "__kwdefaults__")
"""Reads those attributes of a function that determine what a call computes and that can be assigned."""

CONTENTS = operator.attrgetter("cell_contents")
"""Reads the current value of a variable of an enclosing function; raises ValueError if it has none."""


@dataclass(frozen=True, eq=False)
class Contract:
    """Values that a fused `forward` relies on: settings are compared by type and value, all others by identity.

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
        return self.is_unchanged() and not torch_modules._has_any_global_hook()

    def is_unchanged(self) -> bool:
        """Return whether nothing has changed."""
        for table, read, values in self.present:
            try:
                current = read(table)
            except KeyError:
                return False
            if not all(map(operator.is_, current, values)) and not all(map(_is_same, current, values)):
                return False
        for table, name in self.absent:
            if name in table:
                return False
        for function, values in self.functions:
            if not all(map(operator.is_, CODE(function), values)):
                return False
        return not (self.cells and self._is_assigned())

    def _is_assigned(self) -> bool:
        """Return whether a variable in `cells` has been assigned or deleted."""
        try:
            return not all(map(operator.is_, map(CONTENTS, self.cells), self.contents))
        except ValueError:
            return True


def contract_of(facts: Sequence[Fact], functions: Sequence[FunctionType]) -> Contract:
    """Group facts by dictionary, of equal keys the last, and keep the code, defaults and closures of functions."""
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
    by_id = {id(cell): cell for function, _ in live.values() for cell in function.__closure__ or ()}
    cells = tuple(by_id.values())
    return Contract(tuple(present), tuple(absent), tuple(live.values()), cells, tuple(map(contents_of, cells)))


def facts_of(module: nn.Module, identities: Identities) -> Iterator[Fact]:
    """Yield the dictionary entries that a module's own `forward` depends on, apart from its children."""
    identity, attributes = identities.of(module), vars(module)
    yield from identity.facts
    for name, value in attributes.items():
        is_setting = name[0] != "_" and name not in ASKED and isinstance(value, SETTINGS)
        if is_setting or is_stored_function(identity, name, value):
            yield attributes, name, value
    for function in kernel_functions(module).values():
        yield vars(function), "forward", MISSING
    config = attributes.get("config")
    if config is not None:
        yield attributes, "config", config
        fields = vars(config)
        for name in {*IN_CONFIG, *identity.fields}:
            yield fields, name, fields.get(name, MISSING)


def _is_same(current: object, value: object) -> bool:
    return current is value or (type(current) is type(value) and isinstance(value, SETTINGS) and bool(current == value))
