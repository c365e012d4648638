"""Shared parts of commands that take adapters: flags that override checks, loading, and tokenizers.

This module does not depend on what a command does with the adapters.
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
    from torch import nn

    from lorakit.core.files.adapter_folder import AdapterFiles
    from lorakit.hub import ModelSource
    from lorakit.plan.quantized import Quantization


@dataclass(frozen=True)
class Allowances:
    """Checks that the user overrides, one flag each."""

    allow_base_mismatch: Annotated[bool, Parameter(negative=(), help="Accept an adapter of another base.")] = False
    allow_key_mismatch: Annotated[
        bool, Parameter(negative=(), help="Load the tensors that fit, and skip the others.")
    ] = False
    allow_nonfinite: Annotated[bool, Parameter(negative=(), help="Accept an adapter with NaN or infinity.")] = False
    allow_odd_scale: Annotated[
        bool, Parameter(negative=(), help="Accept an adapter whose scale is 0, negative or above 1000.")
    ] = False

    def names(self) -> tuple[str, ...]:
        """Return the overridden checks by their names in `lorakit.core`."""
        return tuple(field.name.removeprefix("allow_") for field in fields(self) if getattr(self, field.name))


def read_adapters(folders: Sequence[str]) -> list[AdapterFiles]:
    """Read adapters before a base is loaded, so that errors in their files are reported immediately.

    Args:
        folders: Folders as given by the user.

    Returns:
        One per folder.

    Raises:
        UsageError: A folder is given twice.
        AdapterFileError: A folder is missing or damaged.
    """
    check_adapters(folders)
    from lorakit.core.files.adapter_folder import read_adapter

    return [read_adapter(folder) for folder in folders]


def load_adapters(model: nn.Module, adapters: Sequence[AdapterFiles], allow: Collection[str]) -> list[str]:
    """Load adapters into a model; those with new tokens come first, because only a base without adapters can grow.

    Args:
        model: The base.
        adapters: The adapters' files.
        allow: Names from `Allowances.names`.

    Returns:
        The adapters' names on the model, in order.

    Raises:
        LorakitError: As in `core.load_adapter`; a check that can be overridden is named by its flag.
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
        LorakitError: An error of the class raised inside.
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
"""Files of a tokenizer in an adapter's folder."""


@contextlib.contextmanager
def new_adapter_folder(target: Path) -> Iterator[Path]:
    """Build an adapter's folder under a temporary name; it is published when the block ends without an error.

    Args:
        target: The folder to create.

    Yields:
        An empty folder to write to.

    Raises:
        UsageError: The target exists.
        DiskError: The disk is full or writing failed; nothing is left behind.
    """
    from lorakit.durable import publish_directory

    check_new_directory(target)
    with publish_directory(target) as folder:
        yield folder


def copy_tokenizer(adapters: Sequence[AdapterFiles], folder: Path) -> bool:
    """Copy the tokenizer of the adapters to the adapter made from them, if all have the same one.

    Args:
        adapters: The adapters' files.
        folder: The new adapter.

    Returns:
        Whether a tokenizer was copied.
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
    """Return the tokenizer to use: preferably the one saved with the adapters, which they were trained with.

    Args:
        source: The base.
        adapters: The adapters.

    Returns:
        A transformers tokenizer: that of the adapters if all adapters with a tokenizer agree, or if one tokenizer has
            all tokens of the others; else the model's own.

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
    """Return the tokenizer with all tokens of the others under the same ids and the same chat template, or None."""
    if not tokenizers:
        return None
    words = [set(tokenizer.get_vocab().items()) for tokenizer in tokenizers]
    most = max(range(len(words)), key=lambda number: len(words[number]))
    template = tokenizers[most].chat_template
    fits = all(word <= words[most] for word in words) and all(t.chat_template == template for t in tokenizers)
    return tokenizers[most] if fits else None


def report_training_quantization(adapters: Sequence[AdapterFiles], wanted: Quantization | None) -> None:
    """Print a line for each adapter whose base was quantized differently; it works here, a little less exactly.

    Args:
        adapters: The adapters.
        wanted: Quantization of the base now, or None.
    """
    now = "not quantized" if wanted is None else f"quantized as {wanted.name}"
    for files in adapters:
        training = files.sidecar.facts.get("training")
        stored = training.get("quantization") if isinstance(training, dict) else None
        method = stored.get("method") if isinstance(stored, dict) else None
        if method is not None and (wanted is None or method != wanted.name):
            console.note(
                f"{files.folder}: trained on a base quantized as {method}, which is {now} here; "
                f"--quantization {method} gives the weights of training."
            )
