"""docs/chat-templates.md is the table that the script makes from the tested lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..loading import load

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    pytest.importorskip("trl")
    assert load("scripts/template_table.py").page() == (ROOT / "docs" / "chat-templates.md").read_text(encoding="utf-8")
