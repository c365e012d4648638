"""PEFT's module paths, such as `peft.tuners.lora.layer`: a module object for each path in `paths.json`.

Importing `lorakit.peft` adds these modules to `sys.modules`. The modules contain only names; the object behind a name
is imported from its defining module on first use (PEP 562). Importing a path first imports `lorakit.peft`, which
registers the path. Since `lorakit.peft` always imports this file, this file imports no slow modules and no other
lorakit modules.

`paths.json` has groups of names; `homes`, the names that each module of lorakit defines, where `alias=name` exports its
`name` as `alias`; and `paths`, the names that each path exports, where each package precedes its modules. `@group` and
`@module` stand for the names of a group or of a module in `homes`. Names without a home are placeholders.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader
else:
    Loader = object  # importlib.abc takes 12 ms to import

PACKAGE = "lorakit.peft"
PLACEHOLDERS = "lorakit.peft.placeholders"
"""Module that defines PEFT's errors and warnings, and placeholders for names that lorakit does not implement."""

PENALTY_METHODS: Mapping[str, str] = {"_get_kasa_loss": "kasa_config", "_get_monteclora_loss": "monteclora_config"}
"""Methods of PEFT's `LoraModel` that return a variant's penalty -> the config field that selects the variant."""

_FILE: Mapping[str, Mapping[str, list[str]]] = json.loads(Path(__file__).with_name("paths.json").read_text("utf-8"))
PATHS = _FILE["paths"]
"""Lines with the names that each path under `peft` exports."""

_PACKAGES = {path.rpartition(".")[0] for path in PATHS}
"""Paths that are packages, since they contain other modules in PEFT."""


def names_in(lines: Iterable[str]) -> Iterator[str]:
    """Yield the names in lines of `paths.json`, also those of the groups and modules that they mention."""
    for name in " ".join(lines).split():
        if name.startswith("@"):
            yield from names_in(_FILE["groups"].get(name[1:]) or _FILE["homes"][name[1:]])
        else:
            yield name


def lazy_names() -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Create `__getattr__` and `__dir__` for `lorakit.peft` itself, which imports its names on first use."""
    return lambda name: _find(PACKAGE, name), lambda: sorted(_names(PACKAGE))


def register() -> None:
    """Add a module to `sys.modules` for each path, and set the module as an attribute of its parent.

    The loader is also the finder for `__file__`, an entry in every package's `__path__`, so that the import system
    finds each module's spec, as `importlib.reload` and (in a new process) `importlib.util.find_spec` require.
    """
    loader = _PathLoader()
    sys.path_importer_cache[__file__] = loader
    if __file__ not in sys.modules[PACKAGE].__path__:
        sys.modules[PACKAGE].__path__.append(__file__)
    for path in PATHS:
        spec = loader.find_spec(f"{PACKAGE}.{path}")
        if spec is not None and spec.name not in sys.modules:  # reloading `lorakit.peft` keeps existing modules
            parent, _, child = spec.name.rpartition(".")
            sys.modules[spec.name] = loader.create_module(spec)
            setattr(sys.modules[parent], child, sys.modules[spec.name])


ORIGINALS = "_originals"


class _PathModule(ModuleType):
    """A module whose names are imported lazily. Creating two functions per module instead would slow the import."""

    def __getattr__(self, name: str) -> Any:
        """Import and return the object behind a name."""
        return dir(self) if name == "__all__" else _find(self.__name__, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a name here and, if it is listed, in the module that defines it, so that a replacement takes effect."""
        if home := _home(self, name):
            module = import_module(home[0])
            self.__dict__.setdefault(ORIGINALS, {}).setdefault(name, getattr(module, home[1]))
            setattr(module, home[1], value)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete a name that was set here; the module that defines it gets the original object again."""
        super().__delattr__(name)
        originals = self.__dict__.get(ORIGINALS, {})
        if name in originals and (home := _home(self, name)):
            setattr(import_module(home[0]), home[1], originals.pop(name))

    def __dir__(self) -> list[str]:
        """Return the names that `PATHS` lists for this module."""
        return sorted(_names(self.__name__))


class _PathLoader(Loader):
    """Finder and loader for the modules in `PATHS`."""

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the module spec for a name in `PATHS`, or None for any other name."""
        above, _, path = fullname.partition(f"{PACKAGE}.")
        if above or path not in PATHS:
            return None
        spec = ModuleSpec(fullname, self, origin=__file__, is_package=path in _PACKAGES)
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations.append(__file__)
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Create a module with all the attributes that the import system would set."""
        path = spec.name.removeprefix(f"{PACKAGE}.")
        module = _PathModule(spec.name, f"Names of `peft.{path}`; `lorakit.peft.paths` lists where each is defined.")
        module.__spec__, module.__loader__, module.__package__ = spec, self, spec.parent
        if spec.submodule_search_locations is not None:
            module.__path__ = spec.submodule_search_locations
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing, since the module's class looks up names on access."""


@cache
def _names(module: str) -> frozenset[str]:
    return frozenset(names_in(["@package"] if module == PACKAGE else PATHS[module.removeprefix(f"{PACKAGE}.")]))


@cache
def _homes() -> dict[str, tuple[str, str]]:
    """Return a dict from each exported name to its defining module and its name in that module."""
    entries = [(home, *entry.partition("=")) for home, lines in _FILE["homes"].items() for entry in names_in(lines)]
    return {name: (home, target or name) for home, name, _, target in entries}


def _home(module: ModuleType, name: str) -> tuple[str, str] | None:
    """Return the module that defines a listed name, and the name there; None for other names and placeholders."""
    is_listed = not name.startswith("__") or name == "__version__"
    return _homes().get(name) if is_listed and name in _names(module.__name__) else None


def _find(module: str, name: str) -> Any:
    """Import the object behind a name: an exported object, or a submodule such as `lorakit.peft.mapping`."""
    if name in _names(module):
        home, target = _homes().get(name, (PLACEHOLDERS, name))
        found = import_module(home)
        return found.placeholder(name) if home == PLACEHOLDERS else getattr(found, target)
    below = f"{module}.{name}"
    try:
        if not name.startswith("_"):
            return import_module(below)
    except ModuleNotFoundError as missing:
        if missing.name != below:
            raise
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
