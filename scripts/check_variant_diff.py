#!/usr/bin/env python3
"""Check that a commit that adds a variant changes only what knows of variants.

    python scripts/check_variant_diff.py COMMIT [COMMIT ...]

Such a commit adds exactly one file in src/lorakit/core/variants/, and enters it in the table there by adding lines to
`__init__.py`. It may also change src/lorakit/config/, PEFT's table of names (src/lorakit/peft/paths.py),
documentation and tests. Every other path is printed, and the exit status is 1. If a variant needs more, the table of
variants lacks a hook, which belongs in a separate commit.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = "src/lorakit/core/variants/"
TABLE = VARIANTS + "__init__.py"
ALLOWED = re.compile(r"src/lorakit/config/[^/]+\.py|src/lorakit/peft/paths\.py|(docs|tests)/.+|[^/]+\.md")
ENTRY = re.compile(
    r"from lorakit\.core\.variants\.\w+ import .+|VARIANTS: tuple\[Variant, \.\.\.\] = .+|    [A-Z]\w*,|\)"
)


def breaches(changes: Sequence[tuple[str, str]], table: Sequence[str]) -> list[str]:
    """Return what a commit does beyond adding one variant, one message per breach.

    Args:
        changes: Git's letter for each file, such as "A" or "M", and its path from the root of the repository.
        table: The lines that the commit adds to or takes from the table's module, without their sign.
    """
    new = [path for status, path in changes if status == "A" and path.startswith(VARIANTS)]
    found = [] if len(new) == 1 else [f"{len(new)} new files in {VARIANTS}: {', '.join(new) or 'none'}"]
    found += [
        f"{path}: {status}" for status, path in changes if path not in (*new, TABLE) and not ALLOWED.fullmatch(path)
    ]
    if TABLE not in [path for _, path in changes]:
        found.append(f"{TABLE}: no entry")
    found += [f"{TABLE}: more than an entry: {line.strip()}" for line in table if line and not ENTRY.fullmatch(line)]
    return found


def of_commit(commit: str, root: Path = ROOT) -> list[str]:
    """Return what a commit does beyond adding one variant, one message per breach.

    Args:
        commit: Its name, which git resolves.
        root: The repository.
    """
    names = _git(root, "diff-tree", "--root", "--no-commit-id", "--name-status", "--no-renames", "-r", commit)
    changes = [(line.split("\t")[0], line.split("\t")[1]) for line in names.splitlines()]
    patch = _git(root, "show", "--format=", "--unified=0", commit, "--", TABLE)
    lines = [line for line in patch.splitlines() if line.startswith(("+", "-")) and not line.startswith(("+++", "---"))]
    return breaches(changes, [line[1:] for line in lines])


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout


def main() -> int:
    """Print the breaches of the commits on the command line.

    Returns:
        1 if there are some, 2 without a commit, else 0.
    """
    commits = sys.argv[1:]
    if not commits:
        print(__doc__)
        return 2
    found = [f"{commit}: {breach}" for commit in commits for breach in of_commit(commit)]
    print("\n".join(found) or "only a variant")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
