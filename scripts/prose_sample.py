#!/usr/bin/env python3
"""Print random passages of docstrings, comments, messages and documentation, to be read with fresh eyes.

    python scripts/prose_sample.py --seed 1            # 40 passages of src/ and the documentation
    python scripts/prose_sample.py -n 20 src/lorakit/core

The same seed on the same files gives the same passages.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = ("src", "docs", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
SHORTEST = 40  # characters; shorter passages do not show much of the language


def python_passages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each docstring, comment and message of an exception."""
    with tokenize.open(path) as file:
        source = file.read()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            messages = [text for text in node.exc.args[:1] if isinstance(text, ast.Constant | ast.JoinedStr)]
            yield from ((node.lineno, ast.unparse(message)) for message in messages)
    last, lines = 0, list[str]()
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type != tokenize.COMMENT:
            continue
        if lines and token.start[0] != last + 1:
            yield last - len(lines) + 1, " ".join(lines)
            lines = []
        lines.append(token.string.lstrip("# "))
        last = token.start[0]
    if lines:
        yield last - len(lines) + 1, " ".join(lines)


def markdown_passages(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of each paragraph that is neither code nor a table."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", lambda code: "\n" * code.group().count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    line = 1
    for paragraph in text.split("\n\n"):
        if paragraph.strip() and not paragraph.lstrip().startswith(("|", "<", "#")):
            yield line + len(paragraph) - len(paragraph.lstrip("\n")), paragraph.strip()
        line += paragraph.count("\n") + 2


def passages(paths: Sequence[Path]) -> list[str]:
    """Return the passages of the given files and folders, each with its location."""
    found = []
    for root in paths:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            readers = {".py": python_passages, ".md": markdown_passages}
            if path.suffix in readers:
                found += [f"{path}:{n}\n{text}" for n, text in readers[path.suffix](path) if len(text) >= SHORTEST]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the chosen passages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-n", "--number", type=int, default=40, help="how many passages to print")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice")
    parser.add_argument("paths", nargs="*", type=Path, help="files or folders; default: src and the documentation")
    options = parser.parse_args(arguments)
    found = passages(options.paths or [ROOT / path for path in PATHS])
    chosen = random.Random(options.seed).sample(found, min(options.number, len(found)))
    print("\n\n".join(f"[{i}] {text}" for i, text in enumerate(chosen, 1)))


if __name__ == "__main__":
    main()
