#!/usr/bin/env python3
"""Report idioms and private terms in comments, docstrings, strings and Markdown, by the rules in `prose_rules.tsv`.

    python scripts/prose_check.py                  # the whole repository
    python scripts/prose_check.py -s src docs      # the summary only

Each finding is printed as `file:line: [rule] phrase -> suggestion`; rules marked with `?` are hints, which are often
fine. The exit status is 1 if there are problems (hints do not count), and 2 if a path does not exist.

Not checked: code, `backticked` text, expressions in f-strings, fenced blocks, URLs and link targets; strings without a
space, which are taken for identifiers; and lines that contain `prose-check: ok`, for text that must match PEFT.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "scripts" / "prose_rules.tsv"
SKIPPED = {".git", ".venv", "venv", "node_modules", "__pycache__", "build", "dist", "results", "runs"}
LEXER = re.compile(
    r"#[^\n]*"
    r"|[rRbBuUfF]{0,2}(?:\"\"\"(?:[^\"\\]|\\.|\"(?!\"\"))*\"\"\"|'''(?:[^'\\]|\\.|'(?!''))*'''"
    r"|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*')",
    re.DOTALL,
)
INLINE_CODE = re.compile(r"``[^`\x00]+``|`[^`\n\x00]*`")
IN_PARAGRAPH = r"(?:[^`\n]|\n(?![ \t]*\n))+"
MARKDOWN_CODE = re.compile(
    r"^(?P<fence> {0,3}(?:`{3,}|~{3,})).*?^(?P=fence)[^\n]*$"
    rf"|``{IN_PARAGRAPH}``|`{IN_PARAGRAPH}`|\]\([^)\s]*\)|https?://\S+|<!--.*?-->",
    re.DOTALL | re.MULTILINE,
)


class Rule(NamedTuple):
    """A row of the table; `kind` is problem or hint, `where` is prose, cased, raw or raw-cased."""

    name: str
    kind: str
    where: str
    literals: tuple[str, ...]
    pattern: re.Pattern[str]
    suggestion: str


def read_rules(table: Path = RULES) -> list[Rule]:
    """Read and compile the table of rules."""
    rules = []
    for line in table.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            name, kind, where, literals, pattern, suggestion = line.split("\t")
            flags = 0 if where.endswith("cased") else re.IGNORECASE
            compiled = re.compile(pattern.replace(" ", r"\s+"), flags)
            rules.append(Rule(name, kind, where, tuple(literals.split("|")), compiled, suggestion))
    return rules


def blank(text: str | re.Match[str]) -> str:
    """Replace everything but line breaks by a character that no pattern matches, so that offsets stay the same."""
    return re.sub(r"[^\n]", "\x00", text if isinstance(text, str) else text.group())


def python_prose(source: str) -> str:
    """Return the source with blanks for everything but the comments and strings that contain prose."""
    pieces, last = [], 0
    for match in LEXER.finditer(source):
        gap = source[last : match.start()]
        pieces += [gap if gap.isspace() else blank(gap), _prose_of(match.group())]
        last = match.end()
    return INLINE_CODE.sub(blank, "".join(pieces))


def _prose_of(token: str) -> str:
    """Return a comment or string with spaces for its marks, or blanks if it is a directive or an identifier."""
    if token[0] == "#":
        return blank(token) if "type: ignore" in token or "noqa" in token else f" {token[1:]}"
    quote = 3 if token.endswith(('"""', "'''")) and len(token) >= 6 else 1
    prefix = len(token) - len(token.lstrip("rRbBuUfF"))
    body = token[prefix + quote : -quote]
    if " " not in body and "\n" not in body:
        return blank(token)
    if "f" in token[:prefix].lower():
        body = re.sub(r"\{[^{}]*\}", blank, body)
    return " " * prefix + (f'"""{body}\x00\x00\x00' if quote == 3 else f" {body} ")


def check(path: str, source: str, rules: Sequence[Rule]) -> Iterator[tuple[int, Rule, str]]:
    """Yield the line, rule and phrase of each finding in one file, in the order of its text."""
    prose = python_prose(source) if path.endswith((".py", ".pyi")) else MARKDOWN_CODE.sub(blank, source)
    words, code = " ".join(prose.lower().split()), source.lower()
    found = []
    for rule in rules:
        is_raw = rule.where.startswith("raw")
        if any(text in (code if is_raw else words) for text in rule.literals):  # most rules need no search then
            found += [(*match.span(), rule) for match in rule.pattern.finditer(source if is_raw else prose)]
    lines = source.split("\n")
    for start, stop, rule in sorted(found, key=lambda item: item[:2]):
        number = source.count("\n", 0, start) + 1
        if "prose-check: ok" not in lines[number - 1]:
            yield number, rule, " ".join(source[start:stop].split())


def files(paths: Sequence[str]) -> Iterator[str]:
    """Yield the given files, and the .py and .md files of the given directories.

    Raises:
        FileNotFoundError: A path does not exist.
    """
    for path in paths:
        if not Path(path).exists():
            raise FileNotFoundError(path)
        yield from [path] if Path(path).is_file() else []
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if name not in SKIPPED)
            yield from (str(Path(folder, name)) for name in sorted(names) if name.endswith((".py", ".md")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings and a summary; return 1 if there are problems, 2 if a path does not exist, and 0 otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-s", "--summary", action="store_true", help="print the summary only")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files or directories; default: the repository")
    options = parser.parse_args(arguments)
    try:
        checked = list(files(options.paths or [os.path.relpath(ROOT)]))
    except FileNotFoundError as missing:
        parser.error(f"{missing} does not exist")
    rules, counts = read_rules(), Counter[Rule]()
    for path in checked:
        source = Path(path).read_bytes().decode("utf-8", errors="replace")
        for line, rule, phrase in check(path, source, rules):
            counts[rule] += 1
            if not options.summary:
                print(f"{path}:{line}: [{rule.name}{'?' * (rule.kind == 'hint')}] {phrase} -> {rule.suggestion}")
    hints = sum(count for rule, count in counts.items() if rule.kind == "hint")
    print(f"{counts.total() - hints} problems and {hints} hints in {len(checked)} files")
    for rule, count in counts.most_common():
        print(f"{count:6d}  {rule.name}{' (hint)' * (rule.kind == 'hint')}")
    return int(counts.total() > hints)


if __name__ == "__main__":
    sys.exit(main())
