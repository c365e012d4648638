"""Find adapters in directories and on the Hugging Face Hub; if network access is disabled, use only its local cache.

This module is separate from `lorakit.hub` so that `lorakit.config` and `lorakit.core` can read an adapter by Hub id.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lorakit.errors import AdapterFileError, ConfigError, ModelError, similar_path

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Environment variables that forbid network access in the Hugging Face libraries."""

CONFIG_FILE = "adapter_config.json"

ADAPTER_FILES = (CONFIG_FILE, "adapter_model.safetensors", "lorakit.json", "lorakit_initial.safetensors")
"""Names of the files to download; none of their formats can contain code."""

CARD = "README.md"
"""Name of an adapter's model card."""

MAX_CARD_BYTES = 1 << 20

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "chat_template*", "*.model")
"""Glob patterns for the names of tokenizer files."""

CHAT_TEMPLATES = "additional_chat_templates/*"
"""Glob pattern for the chat templates of a tokenizer that has several."""


def offline(*more: str) -> str | None:
    """Return the environment variable, of `OFFLINE_VARIABLES` and others, that forbids network access, or None."""
    for name in (*OFFLINE_VARIABLES, *more):
        if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on"):
            return name
    return None


@dataclass(frozen=True)
class HubOptions:
    """Arguments of a download from the Hub; the names are those of the Hub client.

    Attributes:
        revision: Branch, tag or commit; None selects the default branch.
        subfolder: The adapter's folder in the repository.
        token: Hub token; True uses the stored token, False none, and None the stored token if there is one.
        cache_dir: Cache directory; None selects the Hub client's.
        local_files_only: Whether to use only the cache.
        force_download: Whether to download files that are in the cache again.
    """

    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def taken_from(cls, options: MutableMapping[str, Any]) -> HubOptions:
        """Remove the arguments from a call's options, and return them; `token` was once called `use_auth_token`."""
        former = options.pop("use_auth_token", None)
        arguments = {each.name: value for each in fields(cls) if (value := options.pop(each.name, None)) is not None}
        return cls(**{"token": former, **arguments})

    def for_client(self) -> dict[str, Any]:
        """Return the arguments that are not at their default, without `subfolder`, for a call of the Hub client."""
        values = {each: getattr(self, each.name) for each in fields(self) if each.name != "subfolder"}
        return {each.name: value for each, value in values.items() if value != each.default}

    def for_base(self, revision: str | None) -> dict[str, Any]:
        """Return the arguments for loading the adapter's base, which has its own revision."""
        return {**self.for_client(), "revision": revision}


NO_OPTIONS = HubOptions()


def split_revision(name: str) -> tuple[str, str | None]:
    """Split "owner/name@revision" into the Hub id and the revision, which is None if it is not given."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def looks_like_a_hub_id(name: str | os.PathLike[str]) -> bool:
    """Return whether a name has the form of a Hub id, "owner/name" or "owner/name@revision"; paths are not checked."""
    word, _ = split_revision(str(name))
    return word.count("/") == 1 and not word.startswith((".", "/", "~")) and CONFIG_FILE not in word


def is_on_hub(name: str | os.PathLike[str]) -> bool:
    """Return whether a name is a Hub id, "owner/name" or "owner/name@revision", rather than a path.

    A name is a path if it exists, or if it is in a directory that exists and thus is likely to be misspelled.
    """
    path = Path(name)
    return looks_like_a_hub_id(name) and not path.exists() and not path.parent.is_dir()


def adapter_directory(folder: str | os.PathLike[str]) -> Path:
    """Return an adapter's directory; a run directory of `lorakit train` stands for the adapter in it."""
    path = Path(folder)
    inside = path / "adapter"
    return inside if not (path / CONFIG_FILE).exists() and (inside / CONFIG_FILE).is_file() else path


def find_adapter(name: str, field: str = "adapter") -> Path:
    """Return the directory of an adapter or a run, or the Hub id of an adapter, which is not looked up.

    Raises:
        AdapterFileError: The directory does not exist or contains no adapter.
    """
    if is_on_hub(name):
        return Path(name)
    folder = adapter_directory(Path(name).expanduser())
    if not folder.is_dir():
        text = f"{name}: adapter directory not found; it must contain {CONFIG_FILE}.{similar_path(folder)}"
        raise AdapterFileError(text, where=name, field=field)
    if not (folder / CONFIG_FILE).exists():
        text = f"{name}: no {CONFIG_FILE}, so this is not an adapter directory.{_contained(folder)}"
        raise AdapterFileError(text, where=name, field=field)
    return folder


def _contained(folder: Path) -> str:
    """Return a sentence with the adapters, checkpoints and runs in a directory, the newest first, or ""."""
    folders = [path for pattern in ("*", "*/adapter") for path in folder.glob(f"{pattern}/{CONFIG_FILE}")]
    folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    names = [str(path.parent.parent if path.parent.name == "adapter" else path.parent) for path in folders[:3]]
    more = f" or one of {len(folders) - len(names)} more" if len(folders) > len(names) else ""
    return f" It contains adapters; pass {', '.join(names)}{more}." if names else ""


def adapter_contents(folder: Path, *more: str) -> dict[str, Path]:
    """Return the files that an adapter consists of, by name in its directory; `more` has patterns of others.

    These are the config, the weights, lorakit's files, and the tokenizer with its chat templates.
    """
    patterns = (*ADAPTER_FILES, *TOKENIZER_FILES, CHAT_TEMPLATES, *more)
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    return {path.relative_to(folder).as_posix(): path for path in paths}


def adapter_from_hub(
    repository: str,
    options: HubOptions = NO_OPTIONS,
    *,
    files: Sequence[str] = ADAPTER_FILES,
    has_tokenizer: bool = False,
) -> Path:
    """Return the local folder of an adapter on the Hub, after downloading any files that are not cached.

    The repository is "owner/name" or "owner/name@revision". `has_tokenizer` downloads the tokenizer and its chat
    templates too, if there are any. The folder is below the repository's if the options have a subfolder.

    Raises:
        ConfigError: The name and the options have different revisions.
        ModelError: The repository was not found or cannot be reached.
    """
    import huggingface_hub

    requested, (repository, revision) = repository, split_revision(repository)
    if revision is not None and options.revision not in (None, revision):
        text = f"{requested!r} names a revision, but revision is {options.revision!r}; pass one of them."
        raise ConfigError(text, what=options.revision, where=requested, field="revision")
    inside = f"{options.subfolder}/" if options.subfolder else ""
    patterns = [inside + name for name in files]
    if has_tokenizer:  # transformers writes the tokenizer to the repository's root even if the adapter is in a folder
        wanted = (*TOKENIZER_FILES, CHAT_TEMPLATES)
        patterns += [where + name for where in dict.fromkeys((inside, "")) for name in wanted]
    variable = offline()
    arguments: dict[str, Any] = {**options.for_client(), "revision": revision or options.revision}
    if variable is not None:
        arguments["local_files_only"] = True
    try:
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=patterns, **arguments)
    except Exception as cause:  # the Hub client's exception types depend on its HTTP library
        raise _not_found(requested, arguments, variable, cause) from cause
    return Path(folder) / (options.subfolder or "")


def _not_found(name: str, arguments: Mapping[str, Any], variable: str | None, cause: Exception) -> ModelError:
    where = "on the Hub"
    if arguments.get("local_files_only"):
        reason = "local_files_only is set" if variable is None else f"network access is off: {variable} is set"
        where = f"in the Hub's cache ({reason})"
    text = (
        f"{name!r} is not a directory and was not found {where} ({type(cause).__name__}). Check the name, or pass a "
        "directory."
    )
    return ModelError(text, what=name, where=name, field=variable)


def tokenizer_folder(folder: Path, options: HubOptions = NO_OPTIONS) -> Path:
    """Return the directory with an adapter's tokenizer: the adapter's own, else the repository's root."""
    if options.subfolder and not (folder / "tokenizer_config.json").is_file():
        return folder.parents[len(Path(options.subfolder).parts) - 1]
    return folder


def local_adapter(
    name: str | os.PathLike[str], options: HubOptions = NO_OPTIONS, *, has_tokenizer: bool = False
) -> Path:
    """Return an adapter's directory, given or downloaded by its Hub id; the options' subfolder applies to both."""
    if looks_like_a_hub_id(name) and not Path(name).exists():
        return adapter_from_hub(str(name), options, has_tokenizer=has_tokenizer)
    return Path(name) / (options.subfolder or "")


def with_revision(model: str, revision: str | None) -> str:
    """Return a Hub id with a revision, "owner/name@revision"; a ConfigError for a path, or if it already names one."""
    if revision is None:
        return model
    if Path(model).expanduser().exists() or "@" in model:
        problem = "already names a revision" if "@" in model else "is a path, which has no revisions"
        text = f"revision is {revision!r}, but {model!r} {problem}; omit the revision, or pass a Hub id (owner/name)."
        raise ConfigError(text, what=revision, where=model, field="revision")
    return f"{model}@{revision}"
