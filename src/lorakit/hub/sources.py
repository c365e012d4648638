"""Resolve a model name to a path, a packaged model or a Hub model, reporting errors early; upload folders to the Hub.

`resolve` contacts the Hub only for a Hub id, and loads weights and torch only to convert a packaged model. Folders are
uploaded only on explicit request.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from lorakit.errors import LorakitError, ModelError, nearest
from lorakit.hub.gguf_files import SUFFIX, GgufHeader, check_architecture, read_header, reading, tokenizer_warning
from lorakit.hub.packaged import PACKAGED, packaged_directory
from lorakit.hub_cache import offline, split_revision

Loaded = TypeVar("Loaded")

HUB_TIMEOUT_SECONDS = 10.0
"""Timeout, in seconds, for the request that checks whether the Hub has a model."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
WEIGHTS, WEIGHT_INDEX = "model.safetensors", "model.safetensors.index.json"
"""Names of the file with all weights, and of the list of several such files."""

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The source of a model.

    Attributes:
        kind: "config" is only a config.json, which gives shapes but no weights.
        given: The model as given by the user.
        path_or_id: Argument for transformers: a directory, a config file, a GGUF file or a Hub id.
        recorded_name: Value of `base_model_name_or_path` in adapters: the model as given, or the directory of a
            packaged model in the cache, which any program can load.
        base_name: Display name, which is also written to `lorakit.json`.
        header: Header of a GGUF file, else None.
        revision: Branch, tag or commit on the Hub; None selects the default branch.
        say: Function that is called with messages about a conversion.
    """

    kind: Literal["directory", "config", "gguf", "packaged", "hub"]
    given: str
    path_or_id: str
    recorded_name: str
    base_name: str
    header: GgufHeader | None = None
    revision: str | None = None
    say: Callable[[str], None] = field(default=lambda text: None, compare=False, repr=False)

    def error(self, problem: str) -> ModelError:
        """Return an error about this model, with what is wrong and what to do about it."""
        return ModelError(f"{self.given}: {problem}", where=self.given)


def resolve(model: str | os.PathLike[str] | ModelSource, say: Callable[[str], None] | None = None) -> ModelSource:
    """Resolve a model name: an existing path, else a packaged name, else a Hub id.

    On first use, a packaged model is converted into the user's cache; the conversion takes about 20 seconds.

    Args:
        model: A directory, a `config.json`, a GGUF file, a packaged name such as "smollm2", or a Hub id. The Hub id may
            include a revision, "owner/name@revision". A `ModelSource` is returned unchanged.
        say: Function that is called with messages about a conversion or a GGUF file, or None.

    Raises:
        ModelError: The model was not found, the path does not contain a model, the GGUF file cannot be used, or the Hub
            cannot be reached.
        MissingExtra: A packaged model or a GGUF file needs a package that is not installed.
        DiskError: The cache cannot be written.
    """
    if isinstance(model, ModelSource):
        return model
    given = os.fspath(model)
    path = Path(given).expanduser()
    if given and path.exists():
        return _local(given, path, say)
    name, revision = split_revision(given)
    if name in PACKAGED and revision is not None:
        text = f"{given!r}: {name} is a packaged model, which has no revisions; pass {name}."
        raise ModelError(text, what=revision, where=given, field="revision")
    if given in PACKAGED:
        folder = str(packaged_directory(given, say=say))
        return ModelSource("packaged", given, folder, folder, given)
    is_file = path.suffix.lower() == SUFFIX
    if is_file or not _HUB_ID.fullmatch(name) or (name.count("/") == 1 and path.parent.is_dir()):
        kind = "GGUF file" if is_file else "model directory"
        raise ModelError(f"{given!r}: {kind} not found.{_neighbors(given, path)}", where=given)
    source = ModelSource("hub", given, name, name, name, revision=revision)
    _ask_hub(source, path)
    return source


def require(source: ModelSource, *, weights: bool = True, tokenizer: bool = False) -> None:
    """Check by file name, without network access, that a model has the files needed to load it.

    Raises:
        ModelError: A required file is missing; the message names the model and the files that are accepted.
    """
    if source.kind == "hub":
        return
    if source.kind == "config":
        raise source.error("a config file has shapes but no weights; pass the model's directory.")
    if source.header is not None:
        if tokenizer and not source.header.has_tokenizer:
            raise source.error("the GGUF file has no tokenizer; pass one that has, or the model's directory.")
        return
    folder = Path(source.path_or_id)
    if weights and (folder / "adapter_config.json").is_file():
        raise source.error(
            "the directory contains both a model and an adapter (adapter_config.json), and transformers would load "
            "both; move the adapter to its own directory."
        )
    if weights and not any((folder / name).is_file() for name in (WEIGHTS, WEIGHT_INDEX)):
        raise source.error(_no_weights(folder))
    if tokenizer and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise source.error(
            "the model directory has no tokenizer file (such as tokenizer.json); copy the model's tokenizer files into "
            "it, or save them there with tokenizer.save_pretrained(...)."
        )


def call_loader(source: ModelSource, load: Callable[..., Loaded], *, for_config: bool = False) -> Loaded:
    """Call a transformers loader without running custom code; `config_of` completes what it loads `for_config`.

    Raises:
        ModelError: The loader raised an exception, which the message gives on a single line, or transformers cannot
            read the architecture of a GGUF file.
    """
    if source.header is not None:
        check_architecture(source.header)
    try:
        if source.header is None:
            pinned = {} if source.revision is None else {"revision": source.revision}
            return load(source.path_or_id, trust_remote_code=False, local_files_only=source.kind != "hub", **pinned)
        with reading(source.header, for_config=for_config) as (location, options):
            return load(location, trust_remote_code=False, local_files_only=True, **options)
    except LorakitError:
        raise
    except Exception as cause:  # loaders of third-party files may raise anything
        if _brings_own_code(cause):
            reason = "it requires its own Python code, and code from a model's directory is never run"
        else:
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:240]}"
        raise source.error(f"the model cannot be loaded ({reason}).") from cause


def _brings_own_code(cause: Exception) -> bool:
    """Return whether transformers rejected a model because it would have to run the model's custom code.

    The message is parsed because the error is a plain ValueError without attributes, and checking the config is not
    enough: a model with custom code may also load without that code.
    """
    return isinstance(cause, ValueError) and "trust_remote_code" in str(cause)


def base_named(recorded: str | None, base_name: object = None, folder: Path | None = None) -> str | None:
    """Return the base that an adapter in `folder` names, as an argument for `resolve`, or None.

    A packaged model is recorded as a directory of the cache, and by earlier versions only as `base_name`; its own name
    also works where that directory is missing. A relative path is that of the working directory of the run; if it does
    not exist, it is looked up in the adapter's directory and those above it.
    """
    for name, model in PACKAGED.items():
        if Path(recorded).name == model.folder if recorded else base_name == name:
            return name
    if recorded and folder is not None and not Path(recorded).exists():
        here = folder.absolute()
        places = (parent / recorded for parent in (here, *here.parents))
        return next((str(path) for path in places if path.is_file() or (path / "config.json").is_file()), recorded)
    return recorded or None


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id and is not the path of an existing file or directory."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def downloaded(model_id: str) -> Path | None:
    """Return the directory of "owner/name" in the Hub's cache, or None; the network is not used."""
    import huggingface_hub

    if not _HUB_ID.fullmatch(model_id):
        return None
    try:
        return Path(huggingface_hub.snapshot_download(model_id, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not a Hub id
        return None


def _local(given: str, path: Path, say: Callable[[str], None] | None) -> ModelSource:
    if path.is_file() and path.suffix.lower() == SUFFIX:
        header = read_header(path)
        for note in (header.describe(), tokenizer_warning(header)):
            if say and note:
                say(note)
        return ModelSource("gguf", given, str(path), given, given, header, say=say or (lambda text: None))
    source = ModelSource("config" if path.is_file() else "directory", given, str(path), given, given)
    if path.is_file() and path.suffix != ".json":
        raise source.error(
            "this is a file; pass a directory with a config.json, a .gguf file or, for planning, the config.json."
        )
    if not path.is_file() and not (path / "config.json").is_file():
        raise source.error(f"no config.json, so this is not a model directory.{_what_else(path)}")
    return source


def _what_else(path: Path) -> str:
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None  # the message simply omits the base's name
        shown = f" Its base is {base!r}." if isinstance(base, str) else ""
        return f" It is an adapter: pass it as --adapter, and its base as --model.{shown}"
    if _ggufs(path):
        return f" It contains GGUF files; pass one of them: {', '.join(_ggufs(path))}."
    below = sorted(entry.name for entry in path.iterdir() if (entry / "config.json").is_file())
    return f" Subdirectories with models: {', '.join(below[:4])}." if below else ""


def _no_weights(folder: Path) -> str:
    pickles = [name for name in _PICKLES if (folder / name).is_file()]
    if pickles:
        return (
            f"pickle weights are not loaded ({pickles[0]}), because a pickle can run code; re-save them as "
            "safetensors: load the model in an environment you trust and call save_pretrained."
        )
    if _ggufs(folder):
        return f"the model directory has no safetensors weights; pass a GGUF file in it: {', '.join(_ggufs(folder))}."
    return "the model directory has no weights; add model.safetensors (or an index and its shards)."


def _ggufs(folder: Path) -> list[str]:
    """Return the paths of up to four GGUF files in a directory."""
    return sorted(str(entry) for entry in folder.iterdir() if entry.suffix.lower() == SUFFIX)[:4]


def _is_model(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() == SUFFIX


def _neighbors(given: str, path: Path) -> str:
    """Return text that suggests similar names from the path's directory and from all known models."""
    from lorakit.plan import catalogue

    names = [*PACKAGED, *catalogue.aliases()]
    if path.parent.is_dir():
        names += [str(path.parent / entry.name) for entry in path.parent.iterdir() if _is_model(entry)]
    elif not _HUB_ID.fullmatch(given):
        return f" The directory {path.parent} does not exist either."
    near = nearest(given, sorted(set(names) - {given}))
    return f" Similar: {', '.join(near)}." if near else ""


def _ask_hub(source: ModelSource, path: Path) -> None:
    """Check that a model exists in the Hub's cache or on the Hub."""
    import huggingface_hub

    # check the cache first: a cached model needs no network
    name, revision = source.path_or_id, source.revision
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    missing = f"not a directory or a packaged model ({', '.join(PACKAGED)})"
    variable = offline()
    if variable:
        raise source.error(
            f"{missing}, and not in the Hub's cache. Network access is off ({variable} is set): unset it, or pass a "
            f"directory.{_neighbors(source.given, path)}"
        )
    try:
        info = huggingface_hub.model_info(name, revision=revision, timeout=HUB_TIMEOUT_SECONDS)
    except huggingface_hub.errors.GatedRepoError:
        raise source.error(
            "access to this Hub model is restricted; request access on the model's page, then log in with "
            "`hf auth login`."
        ) from None
    except huggingface_hub.errors.RevisionNotFoundError:
        raise source.error(
            f"the Hub has no revision {revision!r} of this model; pass a branch, a tag or a commit."
        ) from None
    except huggingface_hub.errors.RepositoryNotFoundError:
        near = _neighbors(source.given, path)
        raise source.error(f"{missing}, and the Hub has no model with that name that you can access.{near}") from None
    except Exception as cause:  # the Hub client's exceptions depend on its transport
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:120]}"
        raise source.error(
            f"{missing}, and the Hub cannot be reached ({reason}). Pass a directory, or try again with a network "
            f"connection.{_neighbors(source.given, path)}"
        ) from cause
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if "config.json" not in files:
        raise source.error("not a transformers model on the Hub (no config.json).")
    if not files.intersection((WEIGHTS, WEIGHT_INDEX)):
        raise source.error("the Hub has no safetensors weights for this model; other formats are not loaded.")


def check_upload() -> None:
    """Raise a ModelError if network access is off, or if there is no Hub token."""
    import huggingface_hub

    variable = offline()
    if variable:
        text = f"network access is off ({variable} is set), so nothing can be uploaded; unset it."
        raise ModelError(text, what=variable, field=variable)
    if huggingface_hub.get_token() is None:
        message = "no Hub token found, so nothing can be uploaded; log in with `hf auth login`, or set HF_TOKEN."
        raise ModelError(message, what="token", field="HF_TOKEN")


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
    """Upload a folder to a Hub repository, created if it does not exist, and return the URL of the commit.

    None selects the Hub's default for `private`, the stored token and the default branch; another branch is created.

    Raises:
        ModelError: The Hub rejects the upload, or cannot be reached.
    """
    import huggingface_hub

    client = huggingface_hub.HfApi(token=token)
    try:
        target = client.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            client.create_branch(target, branch=revision, exist_ok=True)
        commit = client.upload_folder(
            repo_id=target, folder_path=folder, commit_message=message, revision=revision, create_pr=as_pull_request
        )
    except Exception as cause:  # the Hub client's exceptions depend on its transport
        raise ModelError(
            f"uploading to {repository!r} on the Hub failed ({type(cause).__name__}: {cause}). Check the name, the "
            "token and the network connection.",
            where=repository,
        ) from cause
    return str(commit)
