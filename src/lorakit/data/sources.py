"""Find the files and data sets that the names given by the user stand for.

A name is a file, a directory (all data files in it), a glob pattern such as `data/*.jsonl`, or a data set on the Hub
with the prefix `hf:`, optionally with a split, a revision and a configuration, as in `hf:owner/name:train@main#config`.
A split can be a slice, such as `train[:1000]`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import ConfigError, DataError

TEXT = (".txt", ".md")
"""Suffixes of files that are read as one document each."""

LINES = (".jsonl", ".ndjson")
"""Suffixes of files with one JSON object per line."""

DELIMITED = (".csv", ".tsv")
"""Suffixes of files with one row of cells per line, below a row of column names."""

TABLES = (".parquet", ".arrow")
"""Suffixes of files that the package `datasets` reads."""

SUFFIXES = (*TEXT, *LINES, ".json", *DELIMITED, *TABLES)
"""Suffixes of all data files."""

HUB = "hf:"
"""Prefix of the name of a Hub data set."""

_HUB = re.compile(
    r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<split>[\w.+%\[\]:-]+))?(?:@(?P<revision>[\w./-]+))?(?:#(?P<config>[\w.-]+))?"
)

_ABOUT_DATA = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files that `Dataset.save_to_disk` writes next to the data."""


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hub, such as "owner/name"; the split may be a slice, and None selects the default."""

    name: str
    split: str = "train"
    revision: str | None = None
    config: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{HUB}{self.name}:{self.split}{revision}" + ("" if self.config is None else f"#{self.config}")


def expand(names: Iterable[str | os.PathLike[str]]) -> list[Path | HubSource]:
    """Return the files and Hub data sets that names stand for, in order.

    Raises:
        DataError: There are no names, or a directory or pattern contains no data files.
    """
    sources = [source for name in names for source in _expanded(os.fspath(name))]
    if not sources:
        raise DataError("No data was given; pass at least one file, directory or Hub data set.", field="data")
    return sources


def weights_of(names: Iterable[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of each file or Hub data set, by `Record.source`; empty if no weights were given.

    Names that `weights` does not have get the weight 1.

    Raises:
        ConfigError: A name in `weights` is not one of `names`.
        DataError: Two names with different weights stand for the same file.
    """
    known = list(names)
    for name in weights:
        if name not in known:
            raise ConfigError.of("data_weights", name, allowed=known)
    weight_of = dict[str, float]()
    for name in known if weights else ():
        weight = weights.get(name, 1.0)
        for source in map(str, _expanded(name)):
            if weight_of.setdefault(source, weight) != weight:
                text = f"{source}: two names in --data with different weights stand for this file; omit one of them."
                raise DataError(text, where=source, field="data_weights")
    return weight_of


def _expanded(name: str) -> list[Path | HubSource]:
    path = Path(name)
    if name.startswith(HUB):
        return [_hub_source(name)]
    if path.is_dir():
        return _nonempty(name, [entry for entry in path.rglob("*") if not _is_hidden(entry.relative_to(path))])
    if glob.has_magic(name) and not path.exists():
        return _nonempty(name, [Path(entry) for entry in glob.glob(name, recursive=True)])  # noqa: PTH207 - absolute ones
    return [path]


def _hub_source(name: str) -> HubSource:
    match = _HUB.fullmatch(name.removeprefix(HUB))
    if match is None:
        raise DataError(f"{name}: not the name of a Hub data set, such as hf:owner/name:train@main.", where=name)
    return HubSource(match["name"], match["split"] or "train", match["revision"], match["config"])


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _nonempty(name: str, paths: Iterable[Path]) -> list[Path | HubSource]:
    known = (path for path in paths if path.suffix.lower() in SUFFIXES and path.name not in _ABOUT_DATA)
    files = sorted(path for path in known if path.is_file())
    if not files:
        raise DataError(f"{name}: no data files found; their names must end in {', '.join(SUFFIXES)}.", where=name)
    return [*files]
