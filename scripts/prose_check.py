#!/usr/bin/env python3
"""Report idioms and private terms in comments, docstrings, strings and Markdown.

    python scripts/prose_check.py                  # the whole repository
    python scripts/prose_check.py -s src docs      # the summary only

Each finding is printed as `file:line: [rule] phrase -> suggestion`; rules marked with `?` are hints, which are often
fine. The exit status is 1 if there are problems (hints do not count), and 2 if a path does not exist.

Not checked: code, `backticked` text, expressions in f-strings, fenced blocks, URLs and link targets; strings without a
space, which are taken for identifiers; released sections of a CHANGELOG.md, which are history; and lines that contain
`prose-check: ok`, for text that must match PEFT word for word.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RULES = ROOT / "scripts" / "prose_rules.tsv"
SKIPPED = {".git", ".venv", "venv", "node_modules", "__pycache__", "build", "dist", "results", "runs"}
HISTORY = {"CHANGELOG.md": re.compile(r"## \[?v?\d")}
"""File name -> headings of the sections in it that record the past and are not rewritten."""

LEXER = re.compile(
    r"#[^\n]*"
    r"|[rRbBuUfF]{0,2}(?:\"\"\"(?:[^\"\\]|\\.|\"(?!\"\"))*\"\"\"|'''(?:[^'\\]|\\.|'(?!''))*'''"
    r"|\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*')",
    re.DOTALL,
)
INLINE_CODE = re.compile(r"``[^`\x00]+``|`[^`\n\x00]*`")
BRACES = re.compile(r"\{[^{}]*\}")
IN_PARAGRAPH = r"(?:[^`\n]|\n(?![ \t]*\n))+"
MARKDOWN_CODE = re.compile(
    r"^(?P<fence> {0,3}(?:`{3,}|~{3,})).*?^(?P=fence)[^\n]*$"
    rf"|``{IN_PARAGRAPH}``|`{IN_PARAGRAPH}`|\]\([^)\s]*\)|https?://\S+|<!--.*?-->",
    re.DOTALL | re.MULTILINE,
)
STOP = "\x00"  # keeps a pattern from matching across two unrelated strings


class Rule(NamedTuple):
    """A rule of `prose_rules.tsv`, compiled.

    Attributes:
        name: Short name.
        is_hint: Whether its findings are often fine; they are counted separately.
        is_raw: Whether it is matched in the source, not in its prose alone.
        is_cased: Whether it distinguishes upper and lower case.
        literals: Texts; only if one occurs, the pattern is tried, because most rules need no search then.
        pattern: What to search for.
        suggestion: What to write instead.
        starts_word: Whether the character before a match must not belong to a name. A leading word boundary keeps `re`
            from searching for a literal prefix, so it is not part of the pattern.
    """

    name: str
    is_hint: bool
    is_raw: bool
    is_cased: bool
    literals: tuple[str, ...]
    pattern: re.Pattern[str]
    suggestion: str
    starts_word: bool


class Finding(NamedTuple):
    """A phrase that a rule found."""

    line: int
    rule: Rule
    phrase: str


class Prose(NamedTuple):
    """The prose of a file.

    Attributes:
        text: Comments and strings, with STOP for what is between them.
        starts: Where each piece of the text starts in it.
        sources: Where each piece starts in the source.
    """

    text: str
    starts: list[int]
    sources: list[int]

    def in_source(self, position: int) -> int:
        """Return where a character of the text is in the source."""
        piece = bisect_right(self.starts, position) - 1
        return self.sources[piece] + position - self.starts[piece]


def read_rules(table: Path = RULES) -> list[Rule]:
    """Read and compile the table of rules."""
    lines = table.read_text(encoding="utf-8").splitlines()
    return [_compiled(*line.split("\t")) for line in lines if not line.startswith("#")]


def _compiled(name: str, kind: str, where: str, literals: str, pattern: str, suggestion: str) -> Rule:
    is_raw, is_cased = where.startswith("raw"), where.endswith("cased")
    pieces = re.split(r"\|(?![^(]*\))", pattern)  # alternatives outside of groups
    starts_word = all(piece.startswith(r"\b") for piece in pieces)
    if starts_word:
        pattern = "|".join(piece[2:] for piece in pieces)
    if not is_raw and not is_cased:
        pattern = re.sub(r"(?<!\\)[A-Z]", lambda letter: letter.group().lower(), pattern)
    flags = re.IGNORECASE if is_raw and not is_cased else 0
    compiled = re.compile(pattern.replace(" ", r"\s+"), flags)
    return Rule(name, kind == "hint", is_raw, is_cased, tuple(literals.split("|")), compiled, suggestion, starts_word)


def blank(text: str) -> str:
    """Replace everything but line breaks, so that offsets and line numbers stay the same."""
    return "\n".join([STOP * len(line) for line in text.split("\n")])


def _blanked(found: re.Match[str]) -> str:
    return blank(found.group())


def python_prose(source: str) -> Prose:
    """Return the comments and strings of Python source that contain prose."""
    pieces: list[str] = []
    starts: list[int] = []
    sources: list[int] = []
    length = 0
    for piece, start in _python_pieces(source):
        pieces.append(piece)
        starts.append(length)
        sources.append(start)
        length += len(piece)
    return Prose(INLINE_CODE.sub(_blanked, "".join(pieces)), starts or [0], sources or [0])


def _python_pieces(source: str) -> Iterator[tuple[str, int]]:
    """Yield each comment, string and gap between them, and where it starts in the source."""
    last = 0
    for match in LEXER.finditer(source):
        gap = source[last : match.start()]
        if gap:
            yield gap if gap.isspace() else STOP, last
        last = match.end()
        text = match.group()
        if text[0] == "#":
            yield STOP if "type: ignore" in text or "noqa" in text else f" {text[1:]}", match.start()
        else:
            yield _string_prose(text), match.start()


def _string_prose(text: str) -> str:
    """Return a string literal with blanks for its prefix and quotes, or STOP if it is taken for an identifier."""
    quote = 3 if text.endswith(('"""', "'''")) and len(text) >= 6 else 1
    prefix = len(text) - len(text.lstrip("rRbBuUfF"))
    body = text[prefix + quote : -quote]
    if " " not in body and "\n" not in body:
        return STOP
    if "f" in text[:prefix].lower():
        body = BRACES.sub(_blanked, body)
    return " " * prefix + (f'"""{body}{STOP * 3}' if quote == 3 else f" {body} ")


def markdown_prose(source: str, history: re.Pattern[str] | None = None) -> Prose:
    """Return Markdown without its code and links, and without sections whose heading matches `history`."""
    text = MARKDOWN_CODE.sub(_blanked, source)
    if history is not None:
        sections = re.split(r"^(?=##? )", text, flags=re.MULTILINE)
        text = "".join([blank(section) if history.match(section) else section for section in sections])
    return Prose(text, [0], [0])


def spans(rule: Rule, text: str) -> Iterator[tuple[int, int]]:
    """Yield where a rule matches."""
    position = 0
    while match := rule.pattern.search(text, position):
        start, position = match.span()
        if rule.starts_word and start and (text[start - 1].isalnum() or text[start - 1] == "_"):
            position = start + 1
        else:
            yield start, position


def check(path: str, source: str, rules: Sequence[Rule]) -> list[Finding]:
    """Return the findings in one file, in the order of its text.

    Args:
        path: The file's name: its ending tells Python from Markdown.
        source: Its text.
        rules: The rules to apply.
    """
    is_python = path.endswith((".py", ".pyi"))
    prose = python_prose(source) if is_python else markdown_prose(source, HISTORY.get(Path(path).name))
    lower = prose.text.lower()
    lower = lower if len(lower) == len(prose.text) else prose.text  # a few letters change their length
    words, code = " ".join(lower.split()), source.lower()
    found: list[tuple[int, int, Rule]] = []
    for rule in rules:
        if not any(text in (code if rule.is_raw else words) for text in rule.literals):
            continue
        if rule.is_raw:
            found += [(start, stop, rule) for start, stop in spans(rule, source)]
        else:
            for start, stop in spans(rule, prose.text if rule.is_cased else lower):
                found.append((prose.in_source(start), prose.in_source(stop - 1) + 1, rule))
    return list(_findings(source, sorted(found, key=lambda item: item[:2])))


def _findings(source: str, found: Sequence[tuple[int, int, Rule]]) -> Iterator[Finding]:
    breaks = [-1, *(match.start() for match in re.finditer("\n", source)), len(source)]
    for start, stop, rule in found:
        number = bisect_right(breaks, start - 1)
        if "prose-check: ok" not in source[breaks[number - 1] + 1 : breaks[number]]:
            yield Finding(number, rule, " ".join(source[start:stop].split()))


def files(paths: Sequence[str]) -> list[str]:
    """Return the given files, and the .py and .md files of the given directories.

    Raises:
        FileNotFoundError: A path does not exist.
    """
    found = []
    for path in paths:
        if Path(path).is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(name for name in folders if name not in SKIPPED)
                found += [str(Path(folder, name)) for name in sorted(names) if name.endswith((".py", ".md"))]
        elif Path(path).exists():
            found.append(path)
        else:
            raise FileNotFoundError(path)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the findings and a summary; return 1 if there are problems, 2 if a path does not exist, and 0 otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-s", "--summary", action="store_true", help="print the summary only")
    parser.add_argument("paths", nargs="*", metavar="PATH", help="files or directories; default: the repository")
    options = parser.parse_args(arguments)
    try:
        checked = files(options.paths or [os.path.relpath(ROOT)])
    except FileNotFoundError as missing:
        print(f"prose_check: error: {missing} does not exist", file=sys.stderr)
        return 2
    rules, by_rule, by_kind = read_rules(), Counter[Rule](), Counter[str]()
    for path in checked:
        with Path(path).open(encoding="utf-8", errors="replace", newline="") as handle:
            found = check(path, handle.read(), rules)
        by_kind["Python" if path.endswith((".py", ".pyi")) else "Markdown"] += len(found)
        by_rule.update(finding.rule for finding in found)
        for line, rule, phrase in found if not options.summary else ():
            print(f"{path}:{line}: [{rule.name}{'?' if rule.is_hint else ''}] {phrase} -> {rule.suggestion}")
    hints = sum(count for rule, count in by_rule.items() if rule.is_hint)
    problems = by_rule.total() - hints
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(by_kind.items()) if count)
    print(f"{problems} problems and {hints} hints in {len(checked)} files{f' ({kinds})' if kinds else ''}")
    for rule, count in by_rule.most_common():
        print(f"{count:6d}  {rule.name}{' (hint)' if rule.is_hint else ''}")
    return int(problems > 0)


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)
