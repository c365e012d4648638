"""Write docs/chat-templates.md: what can be trained with each chat template that TRL ships.

    python scripts/template_table.py [--check]

The table comes from the lists in tests/data/test_chat_templates.py, which tests every cell.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "chat-templates.md"
COLUMNS = {
    "several turns": "two turns",
    "system prompt": "system",
    "tools": "tools without a call",
    "tool call, empty content": "call, content empty",
    "tool call with text": "call and text",
    "arguments as text": "call as text",
    "reasoning": "reasoning",
    "reasoning in several turns": "reasoning in two turns",
    "reasoning and a call": "reasoning and a call",
}
"""Column -> conversation of the tests."""

HEAD = """# Chat templates

What can be trained with each chat template that TRL ships, without changes. `python scripts/template_table.py` writes
this page. `tests/data/test_chat_templates.py` tests every cell: the ids equal those of `apply_chat_template`, and the
tokens with loss decode to the assistant's text, reasoning and calls, and nothing else. `tests/data/test_chat_oracle.py`
compares them, token by token, with the marks of TRL's training templates on generated conversations.

- **yes**: trained.
- **dropped**: the template leaves it out without saying so; lorakit raises an error before training.
- **rejected**: the template itself raises an error.
- \\*: a turn is excluded from the loss and counted, or an earlier turn loses its end marker; see [data](data.md#chats).

"""


def main() -> int:
    """Write the page, or compare it with the lists."""
    text = page()
    if "--check" in sys.argv:
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page() -> str:
    """Return the text of the page."""
    sys.path.insert(0, str(ROOT))
    from tests.data import test_chat_templates as tests

    rejected, dropped = tests.listed(tests.REFUSED), tests.listed(tests.DROPPED)
    limited = tests.listed(tests.EXCLUDED) | tests.OTHER_END
    rows = []
    for name in sorted(tests.FORMS):
        cells = []
        for scenario in COLUMNS.values():
            case = (name, scenario)
            cell = "rejected" if case in rejected else "dropped" if case in dropped else "yes"
            cells.append(f"{cell} \\*" if case in limited else cell)
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    header = f"| template | {' | '.join(COLUMNS)} |\n|{' --- |' * (1 + len(COLUMNS))}"
    return f"{HEAD}{header}\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
