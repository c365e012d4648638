"""`lorakit push`: upload an adapter to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.early import adapter_folders
from lorakit.errors import RunError, UsageError
from lorakit.hub_cache import ADAPTER_FILES
from lorakit.tables import format_bytes, format_count

if TYPE_CHECKING:
    from lorakit.core import AdapterSummary

CARD = "README.md"
MAX_CARD_BYTES = 1 << 20

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def run(
    adapter: Annotated[str, Parameter(help="Adapter directory (lorakit or PEFT), or run directory.")],
    repository: Annotated[str, Parameter(help="Hub repository, owner/name; created if it does not exist.")],
    *,
    private: Annotated[bool, Parameter(negative=(), help="Make a new repository private.")] = False,
    revision: Annotated[str | None, Parameter(help="Branch to upload to; created if it does not exist.")] = None,
    dry_run: Annotated[
        bool, Parameter(negative=(), help="List the files and print the model card; use no network.")
    ] = False,
    json: console.JsonFlag = False,
) -> None:
    """Upload an adapter to the Hugging Face Hub, with its tokenizer and a model card.

    Only the adapter's own files are uploaded, never checkpoints, optimizer state or data. The local directory does not
    change. The upload uses the token of `hf auth login` or HF_TOKEN.

    Raises:
        UsageError: The name of the repository is not valid.
        AdapterFileError: The directory contains no adapter, or the adapter is incomplete or damaged.
        ModelError: Network access is off, there is no token, or the Hub rejects the upload.
    """
    if not _REPOSITORY.fullmatch(repository):
        text = f"{repository!r} is not the name of a Hub repository; pass owner/name."
        raise UsageError(text, what=repository, field="repository")
    (adapter,) = adapter_folders([adapter]).values()
    from lorakit import core, hub

    if not dry_run:
        hub.check_upload()
    summary = core.inspect_adapter(adapter)
    for problem in summary.findings:
        console.warning(problem)
    files, card = adapter_files(Path(adapter)), _card(summary)
    said: dict[str, Any] = {"repository": repository, "revision": revision, "files": _sizes(files, card), "card": card}
    if not dry_run:
        said["url"] = _upload(files, card, repository, private=private, revision=revision)
    if json:
        console.emit_json(said)
    elif dry_run:
        rows = [[name, format_bytes(size)] for name, size in said["files"].items()]
        console.say("\n".join([console.table(["file", "size"], rows), "", card]))
        console.say(f"Not uploaded: omit --dry-run to upload these files to {repository}.")
    else:
        total = format_bytes(sum(said["files"].values()))
        console.say(f"Uploaded {format_count(len(said['files']), 'file')} ({total}): {said['url']}")


def adapter_files(folder: Path) -> list[Path]:
    """Return the files of an adapter to upload: weights, config, metadata and tokenizer; the model card is separate.

    Args:
        folder: The adapter's directory.
    """
    from lorakit import hub

    own = [folder / name for name in ADAPTER_FILES]
    return sorted({path for path in (*own, *hub.tokenizer_files(folder)) if path.is_file()})


def _card(summary: AdapterSummary) -> str:
    """Return the adapter's README with the metadata that the Hub reads; it is written if there is none."""
    from lorakit.durable import read_bytes
    from lorakit.train.model_card import model_card, published_base, updated_card
    from lorakit.train.run_folder import read_record

    folder = Path(summary.folder)
    if published_base(summary.config) is None:
        console.warning(
            f"{folder}: the config does not name a base on the Hub, so the model card does not link to one."
        )
    if (folder / CARD).is_file():
        return updated_card(read_bytes(folder / CARD, MAX_CARD_BYTES).decode("utf-8", "replace"), summary.config)
    record = None
    if folder.name == "adapter" or folder.name.startswith("checkpoint-"):
        with contextlib.suppress(RunError):  # the card has fewer rows without the record
            record = read_record(folder.parent)
    return model_card(folder, summary.parameters, record)


def _sizes(files: list[Path], card: str) -> dict[str, int]:
    return {**{path.name: path.stat().st_size for path in files}, CARD: len(card.encode())}


def _upload(files: list[Path], card: str, repository: str, *, private: bool, revision: str | None) -> str:
    """Upload the files and the card in one commit, and return the commit's URL."""
    from lorakit import hub
    from lorakit.durable import write_text

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in files:
            (folder / path.name).symlink_to(path.resolve())
        write_text(folder / CARD, card)
        message = "Upload adapter"
        return hub.push_folder(folder, repository, message=message, private=private or None, revision=revision)
