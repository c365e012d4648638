"""`lorakit pull`: download an adapter from the Hugging Face Hub to a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.early import check_new_directory, check_repository
from lorakit.errors import AdapterFileError
from lorakit.hub_cache import (
    ADAPTER_FILES,
    CARD,
    HubOptions,
    adapter_contents,
    adapter_from_hub,
    split_revision,
)
from lorakit.tables import format_bytes, format_count


def run(
    repository: Annotated[str, Parameter(help="Hub repository, owner/name or owner/name@revision.")],
    *,
    output_dir: Annotated[Path | None, Parameter(help="New directory for the adapter. Default: the name.")] = None,
    revision: Annotated[str | None, Parameter(help="Branch, tag or commit.")] = None,
    json: console.JsonFlag = False,
) -> None:
    """Download an adapter from the Hugging Face Hub, with its tokenizer and model card, and verify it.

    Only the adapter's own files are written, never code or pickles. Other commands also accept the name on the Hub
    itself.

    Raises:
        UsageError: The name of the repository is not valid, or the directory has files.
        ConfigError: The name and --revision give different revisions.
        ModelError: The repository was not found, or cannot be reached and is not in the Hub's cache.
        AdapterFileError: The repository has no adapter or no weights, or they are damaged.
    """
    name = check_repository(split_revision(repository)[0])
    target = output_dir or Path(name.partition("/")[2])
    check_new_directory(target)
    options = HubOptions(revision=revision)
    folder = adapter_from_hub(repository, options, files=(*ADAPTER_FILES, CARD), has_tokenizer=True)
    for needed in ADAPTER_FILES[:2]:
        if not (folder / needed).is_file():
            text = f"{name}: the repository has no {needed}, so it has no adapter that can be loaded."
            raise AdapterFileError(text, what=needed, where=name)
    from lorakit import core
    from lorakit.durable_folders import copy_files, publish_directory

    summary = core.inspect_adapter(folder)
    for problem in summary.findings:
        console.warning(problem)
    paths = adapter_contents(folder, CARD)
    with publish_directory(target) as draft:
        copy_files(paths, draft)
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    if json:
        console.emit_json({"repository": name, "revision": revision, "path": str(target), "files": sizes})
    else:
        total = f"{format_count(len(sizes), 'file')} ({format_bytes(sum(sizes.values()))})"
        base = summary.config.base_model_name_or_path or summary.facts.get("base_name") or "an unnamed base"
        console.say(f"{repository}: {total} in {target}; rank {summary.config.r}, for {base}")
