"""What verbs that take adapters have in common: the flags that lift refusals, loading, and which tokenizer fits.

Knows nothing of what a verb does with the adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.early import check_adapters, check_new_directory
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.core.files.adapter_folder import AdapterFiles
    from lorakit.hub import ModelSource


@dataclass(frozen=True)
class Allowances:
    """Refusals that the user lifts, one flag each."""

    allow_base_mismatch: Annotated[bool, Parameter(negative=(), help="Take an adapter of another base.")] = False
    allow_key_mismatch: Annotated[
        bool, Parameter(negative=(), help="Take what fits of an adapter that fits in part.")
    ] = False
    allow_nonfinite: Annotated[bool, Parameter(negative=(), help="Take an adapter that holds NaN or infinity.")] = False
    allow_odd_scale: Annotated[
        bool, Parameter(negative=(), help="Take an adapter whose scale is 0, negative or above 1000.")
    ] = False

    def words(self) -> tuple[str, ...]:
        """What was lifted, in the words of `lorakit.core`."""
        return tuple(field.name.removeprefix("allow_") for field in fields(self) if getattr(self, field.name))


def read_adapters(folders: Sequence[str]) -> list[AdapterFiles]:
    """Read adapters before a base is loaded, so that what is wrong with their files is said at once.

    Args:
        folders: As the user gave them.

    Returns:
        One per folder.

    Raises:
        UsageError: A folder was given twice.
        AdapterFileError: A folder is missing or damaged.
    """
    check_adapters(folders)
    from lorakit.core.files.adapter_folder import read_adapter

    return [read_adapter(folder) for folder in folders]


def load_adapters(model: Any, adapters: Sequence[AdapterFiles], allow: Collection[str]) -> list[str]:
    """Put adapters on a model; those with new tokens come first, since a base without adapters can grow for them.

    Args:
        model: The base.
        adapters: As they were read.
        allow: Words of `Allowances.words`.

    Returns:
        The adapters' names on the model, in order.

    Raises:
        LorakitError: As `core.load_adapter`; what could be allowed is named by its flag.
    """
    from lorakit import core

    names = [f"adapter_{number}" for number, _ in enumerate(adapters, start=1)]
    with naming_flags():
        for name, files in sorted(zip(names, adapters, strict=True), key=lambda pair: -_vocabulary(pair[1])):
            core.load_adapter(model, files.folder, name, allow=allow)
    return names


def _vocabulary(files: AdapterFiles) -> int:
    return 0 if files.sidecar.base is None else files.sidecar.base.vocabulary


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
    """Enter a block whose errors name the flag that overrides the check.

    Raises:
        LorakitError: Of the class that was raised inside.
    """
    try:
        yield
    except LorakitError as error:
        name = f"allow_{error.override}"
        if error.advice is None or name not in {field.name for field in fields(Allowances)}:
            raise
        raise type(error)(error.text(f"give --{name.replace('_', '-')}"), **error.fields) from error


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files that a tokenizer may leave in an adapter's folder."""


@contextlib.contextmanager
def new_adapter_folder(target: Path) -> Iterator[Path]:
    """Build the folder of an adapter out of sight; it appears with everything in it when the block ends well.

    Args:
        target: The folder to make.

    Yields:
        An empty folder to write into.

    Raises:
        UsageError: Something is there already.
        DiskError: The disk is full or fails; nothing is left behind.
    """
    from lorakit.durable import publish_directory

    check_new_directory(target)
    with publish_directory(target) as folder:
        yield folder


def take_tokenizer(adapters: Sequence[AdapterFiles], folder: Path) -> bool:
    """Copy the tokenizer that lies with adapters beside what was made of them, where all have the same.

    Args:
        adapters: The adapters, as they were read.
        folder: The new adapter.

    Returns:
        Whether there was one.
    """
    from lorakit.durable import read_bytes, write_bytes

    found = []
    for files in adapters:
        there = [name for name in TOKENIZER_FILES if (files.folder / name).is_file()]
        found.append({name: read_bytes(files.folder / name, LARGEST_TOKENIZER_BYTES) for name in there})
    if not found[0] or any(other != found[0] for other in found[1:]):
        return False
    for name, content in found[0].items():
        write_bytes(folder / name, content)
    return True


LARGEST_TOKENIZER_BYTES = 256 << 20


def tokenizer_for(source: ModelSource, adapters: Sequence[AdapterFiles]) -> Any:
    """The tokenizer to use: the one that lies with the adapters, where it does, since they were trained with it.

    Args:
        source: The base.
        adapters: The adapters.

    Returns:
        A transformers tokenizer: that of the adapters' folders if all that have one agree, or if one of them has all
        tokens of the others; else the model's own.

    Raises:
        ModelError: Neither has a tokenizer, or it cannot be read.
    """
    from lorakit import hub

    own: dict[tuple[str, str | None], Any] = {}
    for files in adapters:
        if (files.folder / "tokenizer_config.json").is_file():
            place = str(files.folder)
            tokenizer = hub.load_tokenizer(hub.ModelSource("directory", place, place, None, place))
            own[hub.tokenizer_hash(tokenizer), hub.chat_template_hash(tokenizer)] = tokenizer
    widest = _widest(list(own.values()))
    if widest is not None:
        return widest
    tokenizer = hub.load_tokenizer(source)
    if len(own) > 1:
        console.warning("the adapters come with different tokenizers or chat templates; the model's own is used.")
    return tokenizer


def _widest(tokenizers: Sequence[Any]) -> Any | None:
    """The tokenizer that knows all tokens of the others under the same ids, and has the same chat template, or None."""
    if not tokenizers:
        return None
    words = [set(tokenizer.get_vocab().items()) for tokenizer in tokenizers]
    most = max(range(len(words)), key=lambda number: len(words[number]))
    template = tokenizers[most].chat_template
    fits = all(word <= words[most] for word in words) and all(t.chat_template == template for t in tokenizers)
    return tokenizers[most] if fits else None
