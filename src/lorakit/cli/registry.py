"""`lorakit adapters`: publish adapters in a registry under names, with versions that can be rolled back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from lorakit.cli import console
from lorakit.cli.adapters import NAME
from lorakit.cli.early import adapter_folders, check_at_least
from lorakit.cli.listing import adapter_facts
from lorakit.errors import LorakitError
from lorakit.tables import format_bytes, format_count

if TYPE_CHECKING:
    from lorakit.registry import Change, NameEntry, Registry

RegistryFlag = Annotated[
    Path, Parameter(name="--registry", env_var="LORAKIT_REGISTRY", help="Directory of the registry.")
]
NameArgument = Annotated[str, Parameter(help="Name of an adapter in the registry.")]
VersionArgument = Annotated[
    str, Parameter(help="NAME for its current version, or NAME@HASH with at least 12 digits, or NAME@TAG.")
]


def run_add(
    name: Annotated[str, Parameter(help="Name: up to 64 letters, digits, '.', '_' and '-'.")],
    adapter: Annotated[str, Parameter(help=f"{NAME}, of lorakit or PEFT.")],
    *,
    registry: RegistryFlag,
    json: console.JsonFlag = False,
) -> None:
    """Publish an adapter as the current version of a name.

    The adapter's files are checked and copied; the version is named NAME@HASH12 after their content. A server that uses
    the registry switches to it. Nothing changes if it is the current version already.

    Raises:
        UsageError: The name is not valid, or the registry's directory has other files.
        AdapterFileError: The adapter is incomplete or damaged, or has NaN or infinite values.
        DiskError: A file cannot be written.
    """
    (folder,) = adapter_folders([adapter]).values()
    _report(_opened(registry).add(name, folder), json)


def run_list(*, registry: RegistryFlag, json: console.JsonFlag = False) -> None:
    """List the names with their current versions, tags, bases and sizes.

    Raises:
        AdapterFileError: The directory is not a registry.
    """
    opened = _opened(registry)
    listing = opened.listing()
    found = [_described(opened, entry) for entry in listing.entries.values()]
    if json:
        console.emit_json([*found, *({"name": name, "error": str(one)} for name, one in listing.damaged.items())])
        return
    head = ["name", "version", "tags", "base", "rank", "size", "date"]
    rows = [
        [
            one["name"],
            one["hash"][:12],
            ", ".join(one["tags"]),
            Path(str(one.get("base_model") or "")).name,
            str(one.get("r", "")),
            format_bytes(one["size_bytes"]),
            _shown(one["date"]),
        ]
        for one in found
    ]
    console.say(console.table(head, rows) if rows else f"{registry}: no names.")
    for error in listing.damaged.values():
        console.warning(str(error))


def run_show(name: NameArgument, *, registry: RegistryFlag, json: console.JsonFlag = False) -> None:
    """Show the history and the tags of a name, and what its current version is.

    Raises:
        AdapterError: There is no such name.
        AdapterFileError: The directory is not a registry.
    """
    opened = _opened(registry)
    entry = opened.entry(name)
    about = _described(opened, entry)
    history = [vars(event) for event in entry.history]
    if json:
        console.emit_json({**about, "previous": list(entry.previous), "history": history})
        return
    console.say(f"{about['id']}: {format_count(about['versions'], 'version')}")
    known = {"base": about.get("base_model"), "rank": about.get("r"), "task": about.get("task")}
    facts = {**known, "size": format_bytes(about["size_bytes"]), "directory": about["folder"]}
    facts |= {"problem": about.get("error"), "before it": entry.previous[-1][:12] if entry.previous else None}
    for title, value in facts.items():
        if value is not None:
            console.say(f"  {title}: {console.inline(str(value))}")
    tags: dict[str, list[str]] = {entry.current: ["current"]}
    for tag, hash in entry.tags.items():
        tags.setdefault(hash, []).append(tag)
    rows = [
        [one.date[:19].replace("T", " "), one.action, one.hash[:12], ", ".join(tags.get(one.hash, ()))]
        for one in entry.history
    ]
    console.say(console.table(["date (UTC)", "action", "version", "tags"], rows))


def run_tag(
    version: VersionArgument,
    tag: Annotated[str, Parameter(help="Tag: as a name, but not 12 or more hexadecimal digits.")],
    *,
    registry: RegistryFlag,
    delete: Annotated[bool, Parameter(negative=(), help="Remove the tag of a NAME.")] = False,
    json: console.JsonFlag = False,
) -> None:
    """Give a version a tag, or move the tag to it.

    Raises:
        UsageError: The tag is not valid.
        AdapterError: There is no such name, version or, with --delete, tag.
    """
    if delete:
        _opened(registry).untag(version, tag)
        said, text = {"name": version, "removed": tag}, f"{version}: the tag {tag} was removed"
    else:
        tagged = _opened(registry).tag(version, tag)
        said, text = {"name": tagged.name, "id": tagged.id, "tag": tag}, f"{tagged.name}@{tag}: {tagged.id}"
    _say(said, text, json)


def run_rollback(version: VersionArgument, *, registry: RegistryFlag, json: console.JsonFlag = False) -> None:
    """Go back to the version that the current version of NAME replaced, or to NAME@HASH or NAME@TAG.

    Raises:
        AdapterError: There is no such name or version, or none before the current one.
        AdapterFileError: The version's files are missing or damaged.
    """
    _report(_opened(registry).rollback(version), json)


def run_remove(name: NameArgument, *, registry: RegistryFlag, json: console.JsonFlag = False) -> None:
    """Remove a name with its history and tags; `gc` removes the files.

    Raises:
        AdapterError: There is no such name.
    """
    _opened(registry).remove(name)
    _say({"removed": name}, f"{name}: removed; lorakit adapters gc removes its files", json)


def run_verify(*, registry: RegistryFlag, json: console.JsonFlag = False) -> int:
    """Hash the files of all versions again, and report what is damaged or missing (exit code 1).

    Raises:
        AdapterFileError: The directory is not a registry.
    """
    problems = _opened(registry).verify()
    said = {"problems": [{"where": str(one.where), "problem": one.text} for one in problems]}
    lines = [f"{one.where}: {one.text}" for one in problems] or [f"{registry}: no damage found"]
    _say(said, "\n".join(map(console.inline, lines)), json)
    return int(bool(problems))


def run_gc(
    *,
    registry: RegistryFlag,
    keep: Annotated[
        int | None,
        Parameter(
            help="Forget all but this many versions of each name, besides the current and tagged. Default: none."
        ),
    ] = None,
    json: console.JsonFlag = False,
) -> None:
    """Remove the versions that neither a name nor a running server uses, and what interrupted commands left.

    Raises:
        AdapterFileError: The directory is not a registry, or the file of a name is damaged; nothing is removed.
    """
    check_at_least("keep", keep, 0)
    found = _opened(registry).gc(keep)
    said = {"removed": list(found.removed), "in_use": list(found.in_use), "freed_bytes": found.freed_bytes}
    removed, spared = format_count(len(found.removed), "version"), format_count(len(found.in_use), "version")
    text = f"removed {removed} ({format_bytes(found.freed_bytes)})"
    _say(said, text + (f"; {spared} in use" if found.in_use else ""), json)


def _opened(folder: Path) -> Registry:
    from lorakit.registry import Registry

    return Registry(folder)


def _shown(date: str) -> str:
    """Return a date of the history without its zone, which is UTC."""
    return date[:19].replace("T", " ")


def _say(said: Mapping[str, Any], text: str, as_json: bool) -> None:
    console.emit_json(dict(said)) if as_json else console.say(text)


def _report(change: Change, as_json: bool) -> None:
    """Print the current version of a name after a change."""
    now, before = change.version, change.before
    said = {"name": now.name, "id": now.id, "hash": now.hash, "folder": str(now.folder), "changed": change.is_new}
    text = f"{now.id}: current" + (f", was {before.id}" if before and change.is_new else "")
    _say(said | {"before": before and before.id}, text if change.is_new else f"{now.id}: unchanged", as_json)


def _described(registry: Registry, entry: NameEntry) -> dict[str, Any]:
    """Return what is known of a name and its current version; "error" holds the reason if its files cannot be read."""
    version = registry.resolve(entry.name)
    found: dict[str, Any] = {
        "name": entry.name,
        "id": version.id,
        "hash": version.hash,
        "folder": str(version.folder),
        "tags": dict(entry.tags),
        "versions": len(entry.hashes),
        "date": entry.history[-1].date,
        "size_bytes": sum(path.stat().st_size for path in version.folder.rglob("*") if path.is_file()),
    }
    try:
        return {**adapter_facts(version.folder), **found}
    except LorakitError as cause:
        return {**found, "error": " ".join(str(cause).split())}
