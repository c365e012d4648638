"""`stand_in`: from the call on, `import peft` in this process means `lorakit.peft`.

One finder at the head of `sys.meta_path` answers for `peft` and everything below it with the modules of `lorakit.peft`
themselves, so that no class exists twice, and for the distribution of that name, whose version programs ask for.
Nothing is written to the disk, nothing of other packages is changed, and a package `peft` that is installed stays as it
is. Not covered: processes started with `spawn`, which begin anew and must call it themselves.
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

NAME, OURS = "peft", "lorakit.peft"

BIND_AT_IMPORT = ("transformers.trainer", "transformers.trainer_utils", "trl", "diffusers", "sentence_transformers")
"""Modules that look for `peft` once, when they are imported, and keep what they found."""

_ASKED_ONCE = ("is_peft_available", "is_peft_greater_or_equal", "_package_distribution_mapping")
"""Questions of transformers about installed packages whose answers it remembers."""


def stand_in() -> None:
    """Let `import peft`, here and in every other package of this process, mean `lorakit.peft`; for good.

    Call it first, before transformers' trainer, trl, diffusers or sentence-transformers are imported. A second call
    does nothing.

    Raises:
        UsageError: The real `peft`, or a package that has looked for it already, is imported.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    late = [name for name in (NAME, *BIND_AT_IMPORT) if name in sys.modules]
    if late:
        raise UsageError(
            f"stand_in() comes too late: {', '.join(late)} {'is' if len(late) == 1 else 'are'} imported already and "
            f"would go on with what was found then. Call it before {', '.join((NAME, *BIND_AT_IMPORT))} are imported."
        )
    sys.meta_path.insert(0, _Finder())
    importlib.invalidate_caches()
    _ask_again()


class _Finder(importlib.metadata.DistributionFinder, importlib.abc.MetaPathFinder):
    """Answers for `peft` and what lies below it; for every other name it has no answer."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec whose loader hands out the module of `lorakit.peft`; None for what that does not have."""
        if fullname.partition(".")[0] != NAME:
            return None
        own = importlib.util.find_spec(OURS + fullname.removeprefix(NAME))
        if own is None:
            return None
        return ModuleSpec(
            fullname, _Loader(own.name), origin=own.origin, is_package=own.submodule_search_locations is not None
        )

    def find_distributions(
        self,
        context: importlib.metadata.DistributionFinder.Context = importlib.metadata.DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[importlib.metadata.Distribution]:
        """The distribution `peft` where it, or everything, is asked for."""
        return [_Distribution()] if context.name in (None, NAME) else []


class _Loader(importlib.abc.Loader):
    """Loads one module of `lorakit.peft` under its own name and hands the same object out."""

    def __init__(self, own: str) -> None:
        self._own = own
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself, run already."""
        module = importlib.import_module(self._own)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is run twice; the import system has just written its spec over the module's own, which returns."""
        module.__spec__ = self._spec


class _Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata` tells of the distribution `peft`."""

    def read_text(self, filename: str) -> str | None:
        """One of the two files that programs read."""
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {API_LEVEL}\nSummary: lorakit, standing in\n",
            "top_level.txt": f"{NAME}\n",
        }.get(filename)

    def locate_file(self, path: object) -> Path:
        """Where a file of the package lies."""
        return Path(__file__).parent / str(path)


def _ask_again() -> None:
    """Have transformers forget what it may have been told of `peft` before; its caches offer that themselves."""
    questions = sys.modules.get("transformers.utils.import_utils")
    for name in _ASKED_ONCE:
        forget = getattr(getattr(questions, name, None), "cache_clear", None)
        if forget is not None:
            forget()
