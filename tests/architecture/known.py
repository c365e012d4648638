"""The list of known breaches, known.toml: each has a reason, and the list may only shrink.

A breach that is not listed fails, and so does an entry whose breach is gone. Run from the root of the repository:

    python -m tests.architecture.known             print what differs from the list
    python -m tests.architecture.known --write     write the list again, keeping the reasons

`--write` exists for moves of files, which change the paths of many entries at once, and to remove entries whose breach is fixed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

from .reading import Breach, Sources, house
from .rules import RULES

FILE = Path(__file__).with_name("known.toml")
COMMAND = "python -m tests.architecture.known --write"
NEW_REASON = "to be resolved in the restructuring"
TIMES = " ×"
HEADER = f"""# Known breaches of the rules: "path: subject" = "reason"; {TIMES.strip()}N: that subject N times in that file.
# The list may only shrink: fix a breach and remove its entry, by hand or with `{COMMAND}`.
"""


class Entry(NamedTuple):
    """One line of the list: how often a subject breaks a rule in a file, and the reason."""

    count: int
    reason: str


Known = dict[str, dict[str, Entry]]  # rule -> "path: subject" -> entry


def read(file: Path = FILE) -> Known:
    """Return the list of known breaches."""
    tables = tomllib.loads(file.read_text("utf-8")) if file.exists() else {}
    return {rule: dict(_entry(key, reason) for key, reason in table.items()) for rule, table in tables.items()}


def key_of(breach: Breach) -> str:
    """Return the key of a breach in the list; it does not change with line numbers."""
    return f"{breach.path}: {breach.subject}"


def differences(breaches: Iterable[Breach], known: Mapping[str, Entry]) -> list[str]:
    """Return the differences between the breaches of one rule and its list, as lines of text.

    Args:
        breaches: All breaches of the rule.
        known: Entries of the rule in the list.
    """
    found: dict[str, list[Breach]] = {}
    for breach in breaches:
        found.setdefault(key_of(breach), []).append(breach)
    said = []
    for key, same in found.items():
        listed = known[key].count if key in known else 0
        if len(same) > listed:
            note = f"  ({len(same)} of these, {listed} known)" if listed else ""
            said += [f"{breach}{note}" for breach in same]
    for key, entry in known.items():
        if len(found.get(key, ())) < entry.count:
            count = len(found.get(key, ()))
            is_there = f"{entry.count} are listed and {count} left" if count else "is listed and no longer there"
            said.append(f"{key}: {is_there}; remove it from the list: {COMMAND}")
    return said


def renewed(breaches: Iterable[Breach], known: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the list of one rule for its current breaches.

    An entry keeps its reason. A new one takes the reason of a gone one with the same subject, if their reasons agree:
    its file was moved.
    """
    counts = Counter(key_of(breach) for breach in breaches)
    moved: dict[str, set[str]] = {}
    for key, entry in known.items():
        if key not in counts:
            moved.setdefault(key.partition(": ")[2], set()).add(entry.reason)
    entries = {}
    for key, count in sorted(counts.items()):
        reasons = moved.get(key.partition(": ")[2], set())
        reason = next(iter(reasons)) if len(reasons) == 1 else NEW_REASON
        entries[key] = Entry(count, known[key].reason if key in known else reason)
    return entries


def as_toml(known: Known) -> str:
    """Return the text of known.toml."""
    lines = [HEADER]
    for rule, entries in known.items():
        if entries:
            lines.append(f"[{rule}]")
            for key, entry in sorted(entries.items()):
                times = f"{TIMES}{entry.count}" if entry.count > 1 else ""
                lines.append(f"{_quoted(key + times)} = {_quoted(entry.reason)}")
            lines.append("")
    return "\n".join(lines)


def breaches_of(rules: Iterable[Callable[[Sources], Iterable[Breach]]], sources: Sources) -> dict[str, list[Breach]]:
    """Return {rule: its breaches}."""
    return {rule.__name__: list(rule(sources)) for rule in rules}  # type: ignore[attr-defined]


def main(argv: list[str] | None = None) -> int:
    """Print the differences between the package and the list, or write the list."""
    parser = argparse.ArgumentParser(prog="python -m tests.architecture.known", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the current breaches to the list, keeping reasons")
    write = parser.parse_args(argv).write
    known, found = read(), breaches_of(RULES, house())
    said = [f"{rule}: {line}" for rule in found for line in differences(found[rule], known.get(rule, {}))]
    sys.stdout.write("".join(f"{line}\n" for line in said))
    if write:
        entries = {rule: renewed(found[rule], known.get(rule, {})) for rule in found}
        FILE.write_text(as_toml(entries), "utf-8")
        sys.stdout.write(f"{FILE.name}: {_total(known)} breaches before, {_total(entries)} now\n")
    return 0 if write or not said else 1


def _entry(key: str, reason: str) -> tuple[str, Entry]:
    name, times, count = key.rpartition(TIMES)
    return (name, Entry(int(count), reason)) if times and count.isdigit() else (key, Entry(1, reason))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _total(known: Known) -> int:
    return sum(entry.count for entries in known.values() for entry in entries.values())


if __name__ == "__main__":
    sys.exit(main())
