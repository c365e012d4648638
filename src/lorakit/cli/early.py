"""Argument checks that need neither torch nor a model, so that usage errors are reported before anything is loaded.

These checks are repeated when the values are used; checks that need torch or a model run only then. Adapters on the Hub
are downloaded here, after the other arguments were checked.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lorakit.choices import SAMPLING_RULES
from lorakit.errors import ConfigError, DataError, ModelError, UsageError, similar_path
from lorakit.hub_cache import adapter_from_hub, find_adapter, is_on_hub, with_revision
from lorakit.machine import DEVICE_FORM, is_device_name

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_model(given: str, revision: str | None = None) -> str:
    """Return the name of a model with its revision; a path must exist, and other names are looked up later.

    Raises:
        ConfigError: A revision is given for a path.
        ModelError: The path does not exist.
    """
    if given[:1] in (".", "/", "~") and not Path(given).expanduser().exists():
        similar = similar_path(Path(given).expanduser())
        raise ModelError(f"{given!r}: model directory not found.{similar}", what=given, field="model")
    return with_revision(given, revision)


def check_base(given: str | None, revision: str | None, adapters: Sequence[str] | None) -> str | None:
    """Return the name of a base with its revision, or None if the adapters name it.

    Raises:
        UsageError: Neither a model nor an adapter is given.
        ConfigError: A revision is given for a path.
        ModelError: The path does not exist.
    """
    if given is not None:
        return check_model(given, revision)
    if not adapters:
        raise UsageError("model is missing; pass --model, or --adapter, which names its base.", field="model")
    return None


def check_data(names: Iterable[str]) -> None:
    """Check that data files exist; the contents of directories, patterns and Hub data sets are checked later.

    Raises:
        DataError: A file does not exist.
    """
    for name in names:
        if not Path(name).exists() and not name.startswith("hf:") and not glob.has_magic(name):
            raise DataError.missing(Path(name))


def adapter_folders(given: Sequence[str]) -> dict[str, str]:
    """Return a dict from the name of each adapter, for messages, to its directory.

    An adapter is given as its directory, a run directory, or a Hub id ("owner/name" or "owner/name@revision"). All
    names are checked before adapters on the Hub are downloaded.

    Raises:
        UsageError: An adapter is given twice.
        AdapterFileError: A directory does not exist or contains no adapter.
        ModelError: An adapter is on the Hub and cannot be downloaded.
    """
    found: dict[str, Path] = {}
    for name in given:
        folder = find_adapter(name)
        if folder.resolve() in {other.resolve() for other in found.values()}:
            raise UsageError(f"--adapter lists {name} twice; pass it once.", what=name, field="adapter")
        found[name if folder == Path(name) else str(folder)] = folder
    hub = {name: adapter_from_hub(name, has_tokenizer=True) for name in found if is_on_hub(name)}
    return {name: str(hub[name]) if name in hub else name for name in found}


def check_repository(name: str) -> str:
    """Return the name of a Hub repository, owner/name, if it is valid, else raise a UsageError."""
    if not _REPOSITORY.fullmatch(name):
        text = f"{name!r} is not the name of a Hub repository; pass owner/name."
        raise UsageError(text, what=name, field="repository")
    return name


def check_new_directory(target: Path) -> None:
    """Check that the directory of `--output-dir` does not exist yet, or is empty.

    Raises:
        UsageError: The path is a file, or a directory that is not empty.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; pass a new directory as --output-dir.", where=target)
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"{target}: is not empty and will not be overwritten; pass a new --output-dir.", where=target)


def check_new_file(target: Path | None) -> None:
    """Raise UsageError if the file of `--output-file` exists."""
    if target is not None and target.exists():
        text = f"{target}: the file exists and will not be overwritten; pass a new --output-file."
        raise UsageError(text, where=target, field="output_file")


def check_choice(name: str, value: str | None, allowed: Sequence[str]) -> None:
    """Raise ConfigError if a setting is given, but does not have one of its allowed values."""
    if value is not None and value not in allowed:
        raise ConfigError.of(name, value, allowed=allowed)


def check_device(word: str) -> None:
    """Raise ConfigError if a text is not the name of a device; its availability is not checked."""
    if not is_device_name(word):
        raise ConfigError.of("device", word, DEVICE_FORM)


def check_at_least(name: str, value: int | None, least: int) -> None:
    """Raise ConfigError if a setting is given, but is below its minimum."""
    if value is not None and value < least:
        raise ConfigError.of(name, value, f"at least {least}")


def check_sampling(**values: float) -> None:
    """Raise ConfigError if a setting of `lorakit.generate.Sampling`, given by name, is out of range."""
    for name, value in values.items():
        is_allowed, rule = SAMPLING_RULES[name]
        if not is_allowed(value):
            raise ConfigError.of(name, value, rule)
