"""`lorakit push`: upload an adapter to the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.early import adapter_folders, check_repository
from lorakit.hub_cache import CARD, MAX_CARD_BYTES, adapter_contents
from lorakit.tables import format_bytes, format_count

if TYPE_CHECKING:
    from lorakit.core import AdapterSummary


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
    check_repository(repository)
    (adapter,) = adapter_folders([adapter]).values()
    from lorakit import core, hub

    if not dry_run:
        hub.check_upload()
    summary = core.inspect_adapter(adapter)
    for problem in summary.findings:
        console.warning(problem)
    files, card = adapter_contents(Path(adapter)), _card(summary)
    written = {**_without_path(summary), CARD: card.encode()}
    sizes = {name: path.stat().st_size for name, path in files.items()} | {
        name: len(new) for name, new in written.items()
    }
    said: dict[str, Any] = {"repository": repository, "revision": revision, "files": sizes, "card": card}
    if not dry_run:
        said["url"] = _upload(files, written, repository, private=private, revision=revision)
    if json:
        console.emit_json(said)
    elif dry_run:
        rows = [[name, format_bytes(size)] for name, size in said["files"].items()]
        console.say("\n".join([console.table(["file", "size"], rows), "", card]))
        console.say(f"Not uploaded: omit --dry-run to upload these files to {repository}.")
    else:
        total = format_bytes(sum(said["files"].values()))
        console.say(f"Uploaded {format_count(len(said['files']), 'file')} ({total}): {said['url']}")


def _card(summary: AdapterSummary) -> str:
    """Return the adapter's README with the metadata that the Hub reads; it is written if there is none."""
    from lorakit.durable import read_bytes
    from lorakit.train.files.model_card import card_of, published_base, updated_card, with_results

    folder = Path(summary.folder)
    if published_base(summary.config) is None:
        console.warning(
            f"{folder}: the config does not name a base on the Hub, so the model card does not link to one."
        )
    if (folder / CARD).is_file():
        text = read_bytes(folder / CARD, MAX_CARD_BYTES).decode("utf-8", "replace")
        return updated_card(with_results(text, folder), summary.config)
    return card_of(folder, summary.parameters)


def _without_path(summary: AdapterSummary) -> dict[str, bytes]:
    """Return the config and `lorakit.json` without the path of a base that is not on the Hub; empty if there is none.

    `lorakit.json` still has the base's name, by which lorakit finds a packaged model.
    """
    from lorakit.config import CONFIG_FILE, SIDECAR_FILE
    from lorakit.durable import json_bytes, read_json, sealed, sha256_bytes, sha256_file
    from lorakit.train.files.model_card import published_base

    folder = Path(summary.folder)
    if not summary.config.base_model_name_or_path or published_base(summary.config) is not None:
        return {}
    config = json_bytes({**read_json(folder / CONFIG_FILE), "base_model_name_or_path": None})
    sidecar = read_json(folder / SIDECAR_FILE) if (folder / SIDECAR_FILE).is_file() else {}
    known = sidecar.get("config") or {}
    if known.get("sha256") != sha256_file(folder / CONFIG_FILE):  # the config was edited, which must stay visible
        return {CONFIG_FILE: config}
    about = {**sidecar, "config": {**known, "sha256": sha256_bytes(config)}}
    return {CONFIG_FILE: config, SIDECAR_FILE: json_bytes(sealed(about))}


def _upload(
    files: dict[str, Path], written: dict[str, bytes], repository: str, *, private: bool, revision: str | None
) -> str:
    """Upload the files, and those that were written for the upload, in one commit; return the commit's URL."""
    from lorakit import hub
    from lorakit.durable import write_bytes

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, path in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            if name not in written:
                (folder / name).symlink_to(path.resolve())
        for name, content in written.items():
            write_bytes(folder / name, content)
        message = "Upload adapter"
        return hub.push_folder(folder, repository, message=message, private=private or None, revision=revision)
