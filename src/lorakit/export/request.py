"""The specification of one export and its result, and the names under which other runtimes know an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.choices import GgufType
from lorakit.config import SIDECAR_FILE
from lorakit.core import CommonAdapter
from lorakit.durable import JsonObject
from lorakit.errors import UsageError
from lorakit.hub_cache import CARD
from lorakit.registry import files_hash, version_id

if TYPE_CHECKING:
    from lorakit.hub import ModelSource


@dataclass(frozen=True)
class ExportRequest:
    """One adapter to be exported.

    Attributes:
        base: The base, if it is known; formats that need its config reject a request without one.
        served_base: The base as the runtime is started with it: vLLM compares the string.
        allow_untested: Whether architectures that were not tested in the runtime are accepted.
        allow_mismatch: Whether `base_gguf` may have other values than the base that the adapter was trained on.
        base_gguf: The base as a GGUF file, into which the adapter is merged; None for a base that is one.
        outtype: How the merged weights are stored.
        verified: What `lorakit verify` reported, for `lorakit.json`; empty if it was not run.
        card: Function from the directory of the adapter, and the directory and the name of its export, to the README.
    """

    adapter: CommonAdapter
    name: str
    base: ModelSource | None = None
    served_base: str | None = None
    allow_untested: bool = False
    allow_mismatch: bool = False
    base_gguf: Path | None = None
    outtype: GgufType = "F16"
    verified: JsonObject = field(default_factory=dict)
    card: Callable[[Path, Path, str], str] | None = None

    @property
    def known_base(self) -> ModelSource:
        """The base; a UsageError if it is not known."""
        if self.base is None:
            text = f"{self.adapter.folder}: this format needs the config of the base; pass it."
            raise UsageError(text, where=self.adapter.folder, field="base")
        return self.base


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        name: `NAME@HASH12`, where the hash is that of everything that can change an answer.
        base: The base as the runtime is started with it.
        notes: Messages for the user.
    """

    name: str
    base: str
    notes: tuple[str, ...] = ()


def versioned(name: str, folder: Path) -> str:
    """Return `NAME@HASH12` for a directory, so that caches that are keyed by name never mix two contents.

    The hash is over the files that can change an answer, which `lorakit.json` and the README cannot.
    """
    files = (file for file in folder.iterdir() if file.is_file() and file.name not in (SIDECAR_FILE, CARD))
    return version_id(name, files_hash({file.name: file for file in files}))
