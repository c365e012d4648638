"""Replacement of the Hub: repositories are local directories, and every download is recorded."""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest


class StoredHub:
    """Repositories by name; a download copies the files that its patterns select, as `snapshot_download` does.

    Attributes:
        calls: The repository and the arguments of each download.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self._folders: dict[str, Path] = {}
        self._cache = cache
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def add(self, repository: str, folder: Path) -> None:
        """Make a directory available as a repository."""
        self._folders[repository] = folder

    def remove(self, repository: str) -> None:
        """Make a repository unavailable."""
        del self._folders[repository]

    def download(self, repository: str, *, allow_patterns: list[str], **arguments: Any) -> str:
        """Copy files to the cache, and return the directory."""
        self.calls.append((repository, {**arguments, "allow_patterns": allow_patterns}))
        if repository not in self._folders:
            raise FileNotFoundError(repository)
        source = self._folders[repository]
        target = self._cache / repository.replace("/", "--") / str(len(self.calls))
        for path in source.rglob("*"):
            name = str(path.relative_to(source))
            if path.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
        return str(target)

    @property
    def last(self) -> dict[str, Any]:
        """The arguments of the last download that are not at their default."""
        return {name: value for name, value in self.calls[-1][1].items() if name != "allow_patterns" and value}
