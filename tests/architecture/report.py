"""Print warnings: files and a module count above their limits, and the number of listed breaches.

Run from the root of the repository: python -m tests.architecture.report
"""

from __future__ import annotations

import sys

from .known import read
from .reading import house
from .rules import WARNINGS


def report() -> str:
    """Return the warnings and the number of known breaches by rule, as text."""
    sources = house()
    lines = [f"warning: {breach}" for rule in WARNINGS for breach in rule(sources)]
    counts = {rule: sum(entry.count for entry in entries.values()) for rule, entries in read().items()}
    lines += [f"known breaches: {sum(counts.values())}"] if counts else []
    lines += [f"  {rule:<24}{count:>5}" for rule, count in sorted(counts.items(), key=lambda item: -item[1])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{report()}\n")
