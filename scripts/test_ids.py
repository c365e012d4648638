#!/usr/bin/env python3
"""Map the ids of tests from one state of the repository to another, and report cases that were lost or added.

    python scripts/test_ids.py 6efc1e1                    # from a commit to the working tree
    python scripts/test_ids.py 6efc1e1 HEAD --cases       # also print each id whose name changed
    python scripts/test_ids.py old.txt new.txt --since 6efc1e1
    python scripts/test_ids.py 6efc1e1 --write tests/renamed.tsv

A state is a commit or a file that holds the output of `pytest --collect-only -q`. A commit is collected in a temporary
worktree, with the Python that runs this script. A case keeps its identity in this order:

1. the same function and parameters in the file that git says the old file was renamed to, or in the same file; names of
   test files in the parameters follow the renames;
2. the same function and parameters in another file;
3. the case that the table of reasons names, or its function: with the same parameters, else in order;
4. the same function in the renamed file with other parameters, in order, since ids contain the texts of messages.

Cases whose function or parameters differ are counted as changed; `--cases` prints them. Whatever is left is lost, which
is an error unless the table of reasons explains it. That table, tests/renamed_reasons.tsv, has three columns: the old
`file::function`, with or without `[parameters]`; the new one, or `-` if the case was given up; and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REASONS = ROOT / "tests" / "renamed_reasons.tsv"
CASE = re.compile(r"(?P<file>[^\s:]+\.py)::(?P<function>[^\[]+)(?:\[(?P<parameters>.*)\])?$", re.DOTALL)
FILE = re.compile(r"[\w/]*test_\w+\.py")
NONE = "-"
Key = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One test case, as pytest names it.

    Attributes:
        file: Path of the test file from the root of the repository.
        function: Name of the function, with the class if it is a method.
        parameters: Text in the brackets, empty if there are none.
    """

    file: str
    function: str
    parameters: str = ""

    def __str__(self) -> str:
        """Return the id."""
        return f"{self.file}::{self.function}" + (f"[{self.parameters}]" if self.parameters else "")


@dataclasses.dataclass(frozen=True)
class Reason:
    """One row of the table of reasons."""

    new: str
    why: str


@dataclasses.dataclass
class Comparison:
    """Cases of two states.

    Attributes:
        kept: Each old case that still exists, and its new case.
        lost: Old cases without a new one.
        added: New cases without an old one.
    """

    kept: dict[Case, Case]
    lost: list[Case]
    added: list[Case]

    @property
    def changed(self) -> dict[Case, Case]:
        """Return the kept cases that have another function or other parameters now."""
        return {old: new for old, new in self.kept.items() if _named(old) != _named(new)}


def cases(lines: Iterable[str]) -> list[Case]:
    """Return the cases that the output of `pytest --collect-only -q` lists, in its order."""
    found = (CASE.fullmatch(line.rstrip("\r\n")) for line in lines)
    return [Case(match["file"], match["function"], match["parameters"] or "") for match in found if match]


def read_reasons(text: str) -> dict[str, Reason]:
    """Return the table of reasons by old name.

    Raises:
        ValueError: If a row does not have three columns.
    """
    reasons = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        columns = line.split("\t")
        if len(columns) != 3 or not all(column.strip() for column in columns):
            raise ValueError(f"row {number} of the reasons needs three columns, separated by tabs: old, new, why")
        reasons[columns[0]] = Reason(columns[1], columns[2])
    return reasons


def reason_of(case: Case, reasons: Mapping[str, Reason]) -> Reason | None:
    """Return the reason given for a case, else for all cases of its function."""
    return reasons.get(str(case)) or reasons.get(f"{case.file}::{case.function}")


def compare(
    old: Iterable[Case], new: Iterable[Case], renames: Mapping[str, str], reasons: Mapping[str, Reason]
) -> Comparison:
    """Match old and new cases, each with at most one.

    Args:
        old: Cases before.
        new: Cases now.
        renames: Old test file -> new test file.
        reasons: Table of reasons, by old name.
    """
    stems = {_below_tests(before): _below_tests(after) for before, after in renames.items()}

    def renamed(text: str) -> str:
        return FILE.sub(lambda found: stems.get(found[0], renames.get(found[0], found[0])), text)

    def moved(case: Case) -> Key:
        return (f"{renames.get(case.file, case.file)}::{case.function}",)

    def explained(case: Case) -> Key:
        reason = reason_of(case, reasons)
        return (reason.new,) if reason else ()

    result = Comparison({}, list(dict.fromkeys(old)), list(dict.fromkeys(new)))
    _match(result, lambda case: (*moved(case), case.parameters), _place)
    _match(result, lambda case: (*moved(case), renamed(case.parameters)), _place)
    _match(result, lambda case: () if explained(case) else _named(case), _named)
    _match(result, explained, lambda case: (str(case),))
    _match(result, lambda case: (*explained(case), _unnumbered(case)), _unnumbered_place)
    _match(result, explained, _function)
    _match(result, lambda case: () if explained(case) else moved(case), _function)
    return result


def _match(result: Comparison, old_key: Callable[[Case], Key], new_key: Callable[[Case], Key]) -> None:
    """Match cases that are left and have equal keys, in order; an empty key matches nothing."""
    waiting: defaultdict[Key, deque[Case]] = defaultdict(deque)
    for case in result.added:
        waiting[new_key(case)].append(case)
    for case in result.lost:
        key = old_key(case)
        if key and waiting[key]:
            result.kept[case] = waiting[key].popleft()
    taken = set(result.kept.values())
    result.lost = [case for case in result.lost if case not in result.kept]
    result.added = [case for case in result.added if case not in taken]


def _place(case: Case) -> Key:
    """Return file, function and parameters."""
    return f"{case.file}::{case.function}", case.parameters


def _function(case: Case) -> Key:
    """Return file and function."""
    return (f"{case.file}::{case.function}",)


def _unnumbered_place(case: Case) -> Key:
    """Return file, function and parameters without numbers."""
    return *_function(case), _unnumbered(case)


def _unnumbered(case: Case) -> str:
    """Return the parameters without the numbers that pytest gives to values without a name, such as values3."""
    return re.sub(r"(?<=[a-z])\d+\b", "", case.parameters)


def _named(case: Case) -> Key:
    """Return what names a case within its file."""
    return case.function, case.parameters


def _below_tests(file: str) -> str:
    """Return a path as the documentation writes it."""
    return file.removeprefix("tests/")


def table(result: Comparison, reasons: Mapping[str, Reason], title: str) -> str:
    """Return the map of files as tab-separated text, a row for each old file and each new file of its cases."""
    pairs = Counter((old.file, new.file) for old, new in result.kept.items())
    changed = Counter((old.file, new.file) for old, new in result.changed.items())
    now = Counter(case.file for case in (*result.kept.values(), *result.added))
    why = defaultdict(list)
    for old, new in result.changed.items():
        why[old.file, new.file].append(reason_of(old, reasons))
    rows = [(*pair, count, now[pair[1]], changed[pair], 0, _text(why[pair])) for pair, count in pairs.items()]
    lost = defaultdict(list)
    for case in result.lost:
        lost[case.file].append(reason_of(case, reasons))
    rows += [(file, NONE, len(given), 0, 0, len(given), _text(given)) for file, given in lost.items()]
    files = {new for _, new in pairs}
    rows += [(NONE, file, 0, count, 0, 0, "new") for file, count in now.items() if file not in files]
    header = f"# {title}\n# before: cases of the old file that are in the new one; after: all cases of the new file\n"
    columns = ("old file", "new file", "before", "after", "changed", "lost", "reason")
    return header + "".join("\t".join(map(str, row)) + "\n" for row in (columns, *sorted(rows)))


def _text(reasons: Iterable[Reason | None]) -> str:
    """Return the different reasons in one line."""
    return "; ".join(dict.fromkeys(reason.why for reason in reasons if reason))


def unexplained(result: Comparison, reasons: Mapping[str, Reason]) -> list[Case]:
    """Return the lost cases that the table of reasons does not give up."""
    given_up = {name for name, reason in reasons.items() if reason.new == NONE}
    return [case for case in result.lost if not {str(case), _function(case)[0]} & given_up]


def git(*words: str) -> str:
    """Return what a git command prints.

    Raises:
        subprocess.CalledProcessError: If git fails, for instance because a commit does not exist.
    """
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def renames_since(commit: str, until: str | None) -> dict[str, str]:
    """Return old -> new names of test files from a commit to another, or to the working tree, commit by commit."""
    options = ["-M", "--diff-filter=R", "--name-status", "-l0"]
    lines = git("log", "--reverse", "--format=", *options, f"{commit}..{until or 'HEAD'}", "--", "tests")
    if until is None:
        lines += git("diff", *options, "HEAD", "--", "tests")
    return chained(line.split("\t")[1:] for line in lines.splitlines() if line)


def chained(steps: Iterable[Sequence[str]]) -> dict[str, str]:
    """Return first -> last names of files that are renamed step by step."""
    first: dict[str, str] = {}  # name now -> first name
    for before, after in steps:
        first[after] = first.pop(before, before)
    return {old: now for now, old in first.items()}


def collected(tree: Path) -> list[Case]:
    """Return the cases that pytest collects in a tree.

    Raises:
        RuntimeError: If pytest fails.
    """
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pytest cannot collect the tests of {tree}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return cases(done.stdout.splitlines())


def state(name: str) -> list[Case]:
    """Return the cases of a file with collected ids, or of a commit.

    Raises:
        RuntimeError: If pytest fails.
    """
    if Path(name).is_file():
        return cases(Path(name).read_text("utf-8").splitlines())
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), name)
        try:
            return collected(tree)
        finally:
            git("worktree", "remove", "--force", str(tree))


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a case is lost without a reason."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", help="commit, or file with collected ids")
    parser.add_argument("new", nargs="?", help="commit, or file with collected ids (default: the working tree)")
    parser.add_argument("--since", help="commit after which to look for renames (default: old, if it is a commit)")
    parser.add_argument("--reasons", type=Path, default=REASONS, help="table of reasons")
    parser.add_argument("--write", type=Path, help="file to write the map of test files to")
    parser.add_argument("--cases", action="store_true", help="print all changed and added ids")
    given = parser.parse_args(words)
    old = state(given.old)
    new = state(given.new) if given.new else collected(ROOT)
    since = given.since or (None if Path(given.old).is_file() else given.old)
    until = given.new if given.new and not Path(given.new).is_file() else None
    reasons = read_reasons(given.reasons.read_text("utf-8")) if given.reasons.is_file() else {}
    result = compare(old, new, renames_since(since, until) if since else {}, reasons)
    text = table(result, reasons, f"Test files since {since or given.old}, written by scripts/test_ids.py")
    if given.write:
        given.write.write_text(text, "utf-8")
    else:
        print(text, end="")
    if given.cases:
        for before, after in result.changed.items():
            print(f"changed: {before} -> {after}")
        for case in result.added:
            print(f"added: {case}")
    lost = unexplained(result, reasons)
    for case in lost:
        print(f"lost: {case}", file=sys.stderr)
    counts = {"before": len(set(old)), "after": len(set(new)), "kept": len(result.kept), "changed": len(result.changed)}
    counts |= {"added": len(result.added), "lost": len(result.lost), "lost without a reason": len(lost)}
    print(", ".join(f"{name}: {count}" for name, count in counts.items()), file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
