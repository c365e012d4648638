"""Write a table between two markers of a page in docs/, or check that the page has it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

END = "<!-- End of the table. -->"


def begin(script: str) -> str:
    """Return the marker before the table that a script in scripts/ writes."""
    return f"<!-- Written by scripts/{Path(script).name}. -->"


def with_table(page: str, marker: str, text: str) -> str:
    """Return a page with this text between a marker and END."""
    before, _, rest = page.partition(marker)
    _, _, after = rest.partition(END)
    return f"{before}{marker}\n\n{text}\n{END}{after}"


def write(page: Path, marker: str, table: Callable[[], str]) -> int:
    """Write the table or, with `--check`, compare it with the page; return the exit status."""
    text = page.read_text(encoding="utf-8")
    new = with_table(text, marker, table())
    if "--check" in sys.argv:
        return 0 if new == text else 1
    page.write_text(new, encoding="utf-8")
    return 0
