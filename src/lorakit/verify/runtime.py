"""The interface of a runtime in which an adapter is open, and what is needed to open one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorakit.choices import GgufType
from lorakit.core import common_form
from lorakit.export.formats import export
from lorakit.export.request import ExportRequest
from lorakit.registry import name_of
from lorakit.session import SessionSpec
from lorakit.verify.prompts import Prompt

BASE = "base"
"""Name of the base among the other models of a runtime."""


class Runtime(Protocol):
    """An adapter that is open in a runtime.

    Attributes:
        others: Names of the other models that it can ask.
        parallel: Number of requests that it answers at a time, in as many threads.
    """

    title: str
    dtype: str
    versions: Mapping[str, str]
    others: Sequence[str]
    parallel: int

    def encode(self, prompt: Prompt) -> list[int] | None:
        """Return the token ids of a rendered prompt; None if the runtime does not tell them."""

    def log_probabilities(self, ids: Sequence[int], other: str | None = None) -> list[float]:
        """Return the log-probability of each token but the first, given those before it.

        `other` names one of the other models; None means the adapter.
        """

    def greedy(self, ids: Sequence[int], count: int) -> list[int] | None:
        """Return up to `count` most likely tokens that follow; None if the runtime does not tell their ids."""


@dataclass(frozen=True)
class RuntimeRequest:
    """The adapter and the settings with which runtimes open it.

    Attributes:
        spec: The base with the one adapter, in the dtype of the comparison.
        workspace: Empty directory for files that a runtime reads; removed afterwards.
        dtype: Name of the dtype in which lorakit computes, and runtimes that can be told.
        end_ids: Ids of the tokens that end an answer.
        added_ids: Ids of all added tokens, among them those that end texts.
        base_gguf: The base as a GGUF file, for llama.cpp.
        outtype: How merged weights are stored in GGUF files.
        served_model: Name of the adapter on a server; None selects the one that is named like the adapter.
        key: API key of the server.
        timeout: Longest time for one answer of a server in seconds.
        context: Largest number of tokens in one request.
    """

    spec: SessionSpec
    workspace: Path
    dtype: str
    end_ids: frozenset[int]
    added_ids: frozenset[int]
    context: int
    base_gguf: Path | None = None
    outtype: GgufType = "F32"
    served_model: str | None = None
    key: str | None = None
    timeout: float = 60.0

    @property
    def folder(self) -> Path:
        """Directory of the adapter."""
        return self.spec.files[0].folder

    def export(self, name: str) -> Path:
        """Export the adapter in a format to the workspace, and return its directory."""
        request = ExportRequest(
            common_form(self.folder),
            name_of(self.folder),
            self.spec.source,
            served_base=self.spec.source.base_name,
            allow_untested=True,
            allow_mismatch="base_mismatch" in self.spec.options.allow,
            base_gguf=self.base_gguf,
            outtype=self.outtype,
        )
        return export(name, request, self.workspace / name)[1]
