"""`install_as_peft`: a function that makes `import peft` import `lorakit.peft` in this process.

A finder at the start of `sys.meta_path` returns the modules of `lorakit.peft` for `peft` and its submodules, so no
class exists twice, and a distribution named `peft`, whose version some programs check. It writes no files and changes
no other package, not even an installed `peft`. A process started with `spawn` must also call it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from lorakit.config import API_LEVEL
from lorakit.errors import UsageError
from lorakit.peft.paths import PACKAGE

NAME = "peft"

BIND_AT_IMPORT = ("transformers.trainer", "transformers.trainer_utils", "trl", "diffusers", "sentence_transformers")
"""Modules that check for `peft` only once, at import time."""

_CACHED_LOOKUPS = ("is_peft_available", "is_peft_greater_or_equal", "_package_distribution_mapping")
"""Functions in transformers that check for installed packages and cache the result."""


def install_as_peft() -> None:
    """Make `import peft` import `lorakit.peft` everywhere in this process, until it exits; a second call does nothing.

    Call this function before importing transformers' trainer, trl, diffusers or sentence-transformers.

    Raises:
        UsageError: The real `peft`, or a package that looks for `peft` at import time, has already been imported.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    early = (NAME, *BIND_AT_IMPORT)
    late = [name for name in early if name in sys.modules]
    if late:
        names = ", ".join(late)
        text = f"install_as_peft() was called too late: {names}. Call it before importing {', '.join(early)}."
        raise UsageError(text, what=names)
    sys.meta_path.insert(0, _Finder())
    importlib.invalidate_caches()
    _clear_lookups()


class _Finder(importlib.metadata.DistributionFinder, importlib.abc.MetaPathFinder):
    """Finder for `peft`, its submodules and its distribution; it ignores all other names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that loads the corresponding module of `lorakit.peft`, or None if there is no such module."""
        if fullname.partition(".")[0] != NAME:
            return None
        own = importlib.util.find_spec(PACKAGE + fullname.removeprefix(NAME))
        if own is None:
            return None
        return ModuleSpec(
            fullname, _Loader(own.name), origin=own.origin, is_package=own.submodule_search_locations is not None
        )

    def find_distributions(
        self,
        context: importlib.metadata.DistributionFinder.Context = importlib.metadata.DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[importlib.metadata.Distribution]:
        """Return the `peft` distribution if the context names `peft` or does not name any distribution."""
        return [_Distribution()] if context.name in (None, NAME) else []


class _Loader(importlib.abc.Loader):
    """Loader that returns an existing module of `lorakit.peft` instead of creating a new one."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the module and return it."""
        module = importlib.import_module(self._own)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import system has just replaced, without rerunning the module."""
        module.__spec__ = self._spec


class _Distribution(importlib.metadata.Distribution):
    """Metadata of the `peft` distribution for `importlib.metadata`."""

    def read_text(self, filename: str) -> str | None:
        """Return the text of METADATA or top_level.txt, or None for any other metadata file."""
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {API_LEVEL}\nSummary: lorakit as peft\n",
            "top_level.txt": f"{NAME}\n",
        }.get(filename)

    def locate_file(self, path: object) -> Path:
        """Return the path of a file in the package."""
        return Path(__file__).parent / str(path)


def _clear_lookups() -> None:
    """Clear the caches in which transformers may have recorded that `peft` is not installed."""
    lookups = sys.modules.get("transformers.utils.import_utils")
    for name in _CACHED_LOOKUPS:
        clear = getattr(getattr(lookups, name, None), "cache_clear", None)
        if clear is not None:
            clear()
