"""What a model's name stands for: a path, a packaged model, or a model of the hub; refused early and by name.

Looks at files, the hub's cache and, for a hub id only, at the network; loads no weights. Knows nothing of torch.

Adapters that live on a hub: fetched into the hub's own cache, only when a hub id was given.

Putting a folder onto a model hub, only when a person asks for it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit.errors import ModelError, nearest
from lorakit.hub.packaged import PACKAGED, packaged_directory

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
"""Environment variables of the field that forbid the network."""

HUB_TIMEOUT_SECONDS = 10.0
"""How long the hub may take to say whether it has a model."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        kind: "directory", "config" (a config.json alone: shapes, no weights), "packaged" or "hub".
        given: What the user wrote.
        path_or_id: What transformers loads: a directory, a file for "config", or a hub id.
        recorded_name: What an adapter records as `base_model_name_or_path`: what was given, but None for a packaged
            model, which is not the hub's model of that name.
        base_name: What people and `lorakit.json` call it.
    """

    kind: Literal["directory", "config", "packaged", "hub"]
    given: str
    path_or_id: str
    recorded_name: str | None
    base_name: str


def resolve(model: str | os.PathLike[str], say: Callable[[str], None] | None = None) -> ModelSource:
    """Find out what a model's name stands for: an existing path, else a packaged name, else a hub id.

    A packaged model is converted into the user's cache when it is not there yet (about 20 seconds, once).

    Args:
        model: A directory, a `config.json`, a packaged name such as "smollm2", or a hub id.
        say: Called with a sentence before anything that takes long.

    Returns:
        The source; what it names exists, or the hub has it.

    Raises:
        ModelError: Nothing is there, it is no model, or the hub cannot be asked; the message says which.
        MissingExtra: A packaged model needs a package that is not installed.
        DiskError: The cache cannot be written.
    """
    given = os.fspath(model)
    path = Path(given).expanduser()
    if given and path.exists():
        return _local(given, path)
    if given in PACKAGED:
        return ModelSource("packaged", given, str(packaged_directory(given, say=say)), None, given)
    if not _HUB_ID.fullmatch(given) or (given.count("/") == 1 and path.parent.is_dir()):
        raise ModelError(f"{given!r}: there is no such model directory.{_neighbours(given, path)}")
    _ask_hub(given, path)
    return ModelSource("hub", given, given, given, given)


def require(source: ModelSource, *, weights: bool = True, tokenizer: bool = False) -> None:
    """Check, by looking at file names only, that a model can be loaded; nothing is asked of the hub.

    Args:
        source: What `resolve` found.
        weights: Whether safetensors weights must be there.
        tokenizer: Whether a tokenizer must be there.

    Raises:
        ModelError: Something is missing; the message names the directory and what would have been taken.
    """
    if source.kind == "hub":
        return
    if source.kind == "config":
        raise ModelError(
            f"{source.given}: a config file gives shapes, not weights; give the model's directory.", where=source.given
        )
    folder = Path(source.path_or_id)
    if weights and (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{source.given}: the directory holds a model and an adapter (adapter_config.json), and transformers would "
            "load one on top of the other; move the adapter into a directory of its own.",
            where=source.given,
        )
    if weights and not any((folder / name).is_file() for name in _WEIGHTS):
        raise ModelError(_no_weights(source.given, folder))
    if tokenizer and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(
            f"{source.given}: the model directory has no tokenizer (such as tokenizer.json); copy the tokenizer files "
            "of the model into it, or save them there with tokenizer.save_pretrained(...).",
            where=source.given,
        )


def offline() -> str | None:
    """The environment variable that forbids the network, or None."""
    for name in OFFLINE_VARIABLES:
        if os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on"):
            return name
    return None


def downloaded(model_id: str) -> Path | None:
    """The folder of the hub's cache that holds a model, or None; the network is not asked.

    Args:
        model_id: Its id, "owner/name".
    """
    import huggingface_hub

    if not _HUB_ID.fullmatch(model_id):
        return None
    try:
        return Path(huggingface_hub.snapshot_download(model_id, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or no id of a hub
        return None


def _local(given: str, path: Path) -> ModelSource:
    if path.is_file():
        if path.suffix != ".json":
            raise ModelError(
                f"{given}: is a file; a model is a directory with a config.json (which alone is enough to plan).",
                where=given,
            )
        return ModelSource("config", given, str(path), given, given)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{given}: the directory has no config.json, so it is no model.{_what_else(path)}", where=given
        )
    return ModelSource("directory", given, str(path), given, given)


def _what_else(path: Path) -> str:
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None  # a damaged adapter is not what is asked about here
        told = f" Its base is {base!r}." if isinstance(base, str) else ""
        return f" It holds an adapter: give that as --adapter, and its base as --model.{told}"
    below = sorted(entry.name for entry in path.iterdir() if (entry / "config.json").is_file())
    return f" Below it, these are models: {', '.join(below[:4])}." if below else ""


def _no_weights(given: str, folder: Path) -> str:
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles:
        return (
            f"{given}: the weights are a pickle ({pickles[0]}), which can run code when it is opened; only safetensors "
            "are read. Load the model where you trust it and call save_pretrained on it."
        )
    ggufs = sorted(entry.name for entry in folder.glob("*.gguf"))
    if ggufs:
        return f"{given}: the weights are GGUF ({ggufs[0]}); a directory with model.safetensors is needed."
    return f"{given}: the model directory has no weights; model.safetensors (or its index and parts) is needed."


def _neighbours(given: str, path: Path) -> str:
    """Near names, of the folder where the path would lie and of all names that are known."""
    names = [*PACKAGED, *_catalogue()]
    if path.parent.is_dir():
        names += [str(path.parent / entry.name) for entry in path.parent.iterdir() if entry.is_dir()]
    elif not _HUB_ID.fullmatch(given):
        return f" The folder {path.parent} does not exist either."
    near = nearest(given, sorted(set(names) - {given}))
    return f" Near it: {', '.join(near)}." if near else ""


def _catalogue() -> list[str]:
    from lorakit.plan import catalogue

    return catalogue.aliases()


def _ask_hub(given: str, path: Path) -> None:
    """Raise unless the hub's cache or the hub itself has a model of this id."""
    import huggingface_hub

    # a look into the cache first: a model that is there needs no network
    if isinstance(huggingface_hub.try_to_load_from_cache(given, "config.json"), str):
        return
    missing = f"{given!r} is no directory here and no packaged model ({', '.join(PACKAGED)})"
    variable = offline()
    if variable:
        raise ModelError(
            f"{missing}, and the hub's cache does not have it. The network is off ({variable} is set): unset it, or "
            f"give a directory.{_neighbours(given, path)}"
        )
    try:
        info = huggingface_hub.model_info(given, timeout=HUB_TIMEOUT_SECONDS)
    except huggingface_hub.errors.GatedRepoError:
        raise ModelError(
            f"{given!r}: the hub asks for permission to read this model; ask for it on the model's page, then log in "
            "with `hf auth login`."
        ) from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        raise ModelError(
            f"{missing}, and the hub has no model of that name that you may read.{_neighbours(given, path)}"
        ) from None
    except Exception as cause:  # the hub's client changes its transport, and with it what it raises
        raise ModelError(
            f"{missing}, and the hub cannot be reached ({type(cause).__name__}: {_short(cause)}). Give a directory, "
            f"or try again with a network.{_neighbours(given, path)}"
        ) from cause
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if "config.json" not in files:
        raise ModelError(f"{given!r}: what the hub has under this name is no transformers model (no config.json).")
    if not files.intersection(_WEIGHTS):
        raise ModelError(f"{given!r}: the hub has no safetensors weights of this model, and only those are read.")


def _short(cause: Exception) -> str:
    return " ".join(str(cause).split())[:120]


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "lorakit.json")
"""What is fetched; nothing that could hold code."""


def adapter_from_hub(repository: str, *, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The local folder of an adapter on the hub.

    Args:
        repository: Its id, "owner/name".
        revision: Branch, tag or commit.
        subfolder: Folder of the adapter inside the repository.

    Returns:
        The repository's folder in the hub's cache, with the adapter's files.

    Raises:
        ModelError: There is no such repository, or it cannot be reached.
    """
    import huggingface_hub

    patterns = [f"{subfolder}/{name}" if subfolder else name for name in ADAPTER_FILES]
    variable = offline()
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=patterns, local_files_only=variable is not None
        )
    except Exception as cause:  # the hub's client changes its transport, and with it what it raises
        where = f"the hub's cache (the network is off: {variable} is set)" if variable else "the hub"
        raise ModelError(
            f"{repository!r} is no folder here, and {where} does not give it ({type(cause).__name__}). Check the name, "
            "or give a folder."
        ) from cause
    return Path(folder)


def push_folder(
    folder: Path,
    repository: str,
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    as_pull_request: bool = False,
) -> str:
    """Upload a folder's files; the repository is made where it is missing.

    Args:
        folder: What to upload.
        repository: Its id, "owner/name".
        message: Of the commit.
        private: A new repository is not public.
        token: Of the hub; None takes the stored one.
        revision: Branch to commit to.
        as_pull_request: Ask for a review instead.

    Returns:
        Where the commit can be seen.

    Raises:
        ModelError: The hub refuses, or cannot be reached.
    """
    import huggingface_hub

    client = huggingface_hub.HfApi(token=token)
    try:
        place = client.create_repo(repository, private=private, exist_ok=True).repo_id
        commit = client.upload_folder(
            repo_id=place, folder_path=folder, commit_message=message, revision=revision, create_pr=as_pull_request
        )
    except Exception as cause:  # the hub's client changes its transport, and with it what it raises
        raise ModelError(
            f"{repository!r} could not be written on the hub ({type(cause).__name__}: {cause}). Check the name, the "
            "token and the network."
        ) from cause
    return str(commit)
