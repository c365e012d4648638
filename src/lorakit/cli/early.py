"""Argument checks that need neither torch nor a model, so that usage errors are reported before anything is loaded.

These checks are repeated when the values are used; checks that need torch or a model run only then. Adapters on the Hub
are downloaded here, after the other arguments were checked.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from lorakit.errors import AdapterFileError, ConfigError, DataError, ModelError, UsageError, nearest
from lorakit.hub_cache import adapter_from_hub, is_on_hub, with_revision
from lorakit.machine import DEVICE_FORM, is_device_name


def check_model(given: str, revision: str | None = None) -> str:
    """Return the name of a model with its revision; a path must exist, and other names are looked up later.

    Raises:
        ConfigError: A revision is given for a path.
        ModelError: The path does not exist.
    """
    if given[:1] in (".", "/", "~") and not Path(given).expanduser().exists():
        similar = _similar(Path(given).expanduser())
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


def check_start(given: str) -> None:
    """Check that the adapter of `--from-adapter` exists if it is a path; Hub ids are looked up later.

    Raises:
        AdapterFileError: The path does not exist.
    """
    path = Path(given).expanduser()
    if given[:1] in (".", "/", "~") and not path.exists():
        text = f"{given!r}: adapter directory not found.{_similar(path)}"
        raise AdapterFileError(text, where=given, field="from_adapter")


def check_data(names: Iterable[str]) -> None:
    """Check that data files exist; the contents of directories, patterns and Hub data sets are checked later.

    Raises:
        DataError: A file does not exist.
    """
    for name in names:
        path = Path(name)
        if not path.exists() and not name.startswith("hf:") and not glob.has_magic(name):
            hub = f" For a data set on the Hub, write hf:{name}." if not path.suffix and len(path.parts) == 2 else ""
            raise DataError(f"{name}: data file not found.{_similar(path)}{hub}", where=path, field="data")


def adapter_folders(given: Sequence[str]) -> dict[str, str]:
    """Return a dict from the name of each adapter, for messages, to its directory.

    An adapter is given as its directory, a run directory, or a Hub id ("owner/name" or "owner/name@revision"). All
    names are checked before adapters on the Hub are downloaded.

    Raises:
        UsageError: An adapter is given twice.
        AdapterFileError: A directory does not exist or contains no adapter.
        ModelError: An adapter is on the Hub and cannot be downloaded.
    """
    if not given:
        return {}
    from lorakit.config import CONFIG_FILE, adapter_directory

    found: dict[str, Path] = {}
    for name in given:
        folder = Path(name) if is_on_hub(name) else adapter_directory(name)
        if folder.resolve() in {other.resolve() for other in found.values()}:
            raise UsageError(f"--adapter lists {name} twice; pass it once.", what=name, field="adapter")
        if not is_on_hub(name) and not folder.is_dir():
            raise AdapterFileError(
                f"{name}: adapter directory not found; it must contain {CONFIG_FILE}.{_similar(folder)}", where=name
            )
        if not is_on_hub(name) and not (folder / CONFIG_FILE).exists():
            raise AdapterFileError(
                f"{name}: no {CONFIG_FILE}, so this is not an adapter directory.{_contained(folder)}", where=name
            )
        found[name if folder == Path(name) else str(folder)] = folder
    hub = {name: adapter_from_hub(name, has_tokenizer=True) for name in found if is_on_hub(name)}
    return {name: str(hub[name]) if name in hub else name for name in found}


def _contained(folder: Path) -> str:
    """Return a sentence with the adapters, checkpoints and runs in a directory, the newest first, or ""."""
    from lorakit.config import CONFIG_FILE

    folders = [path for pattern in ("*", "*/adapter") for path in folder.glob(f"{pattern}/{CONFIG_FILE}")]
    folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    names = [str(path.parent.parent if path.parent.name == "adapter" else path.parent) for path in folders[:3]]
    more = f" or one of {len(folders) - len(names)} more" if len(folders) > len(names) else ""
    return f" It contains adapters; pass {', '.join(names)}{more}." if names else ""


def check_new_directory(target: Path) -> None:
    """Check that the directory of `--output-dir` does not exist yet, or is empty.

    Raises:
        UsageError: The path is a file, or a directory that is not empty.
    """
    if target.exists() and not target.is_dir():
        raise UsageError(f"{target}: is a file; pass a new directory as --output-dir.", where=target)
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"{target}: is not empty and will not be overwritten; pass a new --output-dir.", where=target)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ConfigError if a setting does not have one of its allowed values."""
    if value not in allowed:
        raise ConfigError.of(name, value, allowed=allowed)


def check_device(word: str) -> None:
    """Raise ConfigError if a text is not the name of a device; its availability is not checked."""
    if not is_device_name(word):
        raise ConfigError.of("device", word, DEVICE_FORM)


def check_at_least(name: str, value: int, least: int) -> None:
    """Raise ConfigError if a setting is below its minimum."""
    if value < least:
        raise ConfigError.of(name, value, f"at least {least}")


def check_sampling(temperature: float, top_p: float, top_k: int, seed: int) -> None:
    """Check sampling settings: temperature >= 0, 0 < top_p <= 1, top_k >= 0, 0 <= seed < 2**63.

    Raises:
        ConfigError: A value is out of range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError.of("temperature", temperature, "0 (greedy) or a number above 0, such as 0.7")
    if not 0 < top_p <= 1:
        raise ConfigError.of("top_p", top_p, "above 0 and at most 1 (all tokens)")
    if top_k < 0:
        raise ConfigError.of("top_k", top_k, "0 (all tokens) or an integer above 0")
    if not 0 <= seed < 2**63:
        raise ConfigError.of("seed", seed, "an integer from 0 to 2**63 - 1")


def _similar(path: Path) -> str:
    """Return text that suggests similar names in the same directory, or an empty string."""
    try:
        names = nearest(path.name, [other.name for other in path.parent.iterdir()])
    except OSError:
        return f" {path.parent} does not exist either."
    return f" Did you mean {' or '.join(str(path.with_name(name)) for name in names)}?" if names else ""
