#!/usr/bin/env python3
"""Measure the structure of a source tree: sizes, cycles, types, variants, imports and walks.

    python scripts/structure.py                        # a Markdown table for src/lorakit
    python scripts/structure.py --src ../old/src/lorakit --json
    python scripts/structure.py --list any             # file:line of each `Any` in an annotation
    python scripts/structure.py --runtime              # adds walks and modules entered per public call

The measurements of the source need only the standard library and import nothing of the measured tree. `--runtime`
imports it, with torch and transformers (scripts/structure_runtime.py).
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import json
import re
import statistics
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Location = tuple[str, int]
VARIANTS = "core/variants/"
HOMES = re.compile(r"core/variants/__init__\.py|(?:config|peft|cli)/.*|train/settings/.*")
"""Modules that may name any variant: the table VARIANTS, configs, the PEFT-compatible API, flags and settings."""


@dataclasses.dataclass(frozen=True)
class Source:
    """One module.

    Attributes:
        path: Path below the tree's root, such as "core/kinds/kind.py".
        text: Source text.
        tree: Syntax tree.
        tokens: Tokens of the code: neither layout, comments nor docstrings.
        comments: Comments.
    """

    path: str
    text: str
    tree: ast.Module
    tokens: tuple[tokenize.TokenInfo, ...]
    comments: tuple[tokenize.TokenInfo, ...]

    @property
    def is_package(self) -> bool:
        """Return whether the module is an `__init__.py`."""
        return self.path.rpartition("/")[2] == "__init__.py"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One figure of the table, with the locations that it counts."""

    label: str
    value: float
    locations: tuple[str, ...] = ()


def read_tree(root: Path) -> list[Source]:
    """Read every module below a directory, sorted by path."""
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [read_source(path, (root / path).read_text(encoding="utf-8")) for path in paths]


def read_source(path: str, text: str) -> Source:
    """Parse one module; any string that is a statement counts as a docstring."""
    tree = ast.parse(text, path)
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and _text(node.value)]
    spans = [(node.lineno, node.col_offset, node.end_lineno or 0, node.end_col_offset or 0) for node in strings]
    tokens, comments = [], []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.append(token)
        elif token.type not in LAYOUT and not (
            token.type == tokenize.STRING and any(span[:2] <= token.start < span[2:] for span in spans)
        ):
            tokens.append(token)
    return Source(path, text, tree, tuple(tokens), tuple(comments))


# --- sizes ------------------------------------------------------------------------------------------------------


def code_lines(source: Source) -> int:
    """Count lines that hold code: no blank lines, comments or docstrings."""
    numbers = {number for token in source.tokens for number in range(token.start[0], token.end[0] + 1)}
    lines = source.text.split("\n")
    return sum(bool(lines[number - 1].strip()) for number in numbers)


def sizes(sources: Sequence[Source]) -> dict[str, Measurement]:
    """Measure the number of modules, their lines of code, and the median and largest file."""
    lines = {source.path: source.text.count("\n") for source in sources}
    code = {source.path: code_lines(source) for source in sources}
    largest = max(lines, key=lambda path: lines[path])
    return {
        "modules": Measurement("modules", len(sources)),
        "code_lines": Measurement("code lines", sum(code.values())),
        "median_file": Measurement("median file, lines", statistics.median(lines.values())),
        "median_code": Measurement("median file, code lines", statistics.median(code.values())),
        "largest_file": Measurement("largest file, lines", lines[largest], (largest,)),
        "over_400": _count("files above 400 lines", [f"{path}: {n}" for path, n in lines.items() if n > 400]),
    }


# --- imports ----------------------------------------------------------------------------------------------------


def imports(sources: Sequence[Source], package: str) -> dict[str, set[str]]:
    """Map each module's path to the paths of the modules it imports, wherever the import is in the file.

    Counted are import statements, also those for type checkers alone, and tables of lazy names: strings with a dot that
    name a module, with or without the package, and in a file that calls `import_module(f"lorakit.{home}")` strings that
    complete the prefix to a module's name.
    """
    paths = {_dotted(source.path, package): source.path for source in sources}
    found = {}
    for source in sources:
        names = {*_imported(source, package, paths), *_imported_by_name(source, package)}
        found[source.path] = {paths[name] for name in names if name in paths} - {source.path}
    return found


def _dotted(path: str, package: str) -> str:
    return ".".join([package, *path.removesuffix(".py").removesuffix("__init__").strip("/").split("/")]).rstrip(".")


def _imported(source: Source, package: str, paths: Mapping[str, str]) -> Iterator[str]:
    own = _dotted(source.path, package)
    parent = own if source.is_package else own.rpartition(".")[0]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parent.split(".")[: len(parent.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if inner in paths else module


def _imported_by_name(source: Source, package: str) -> Iterator[str]:
    texts = {_text(node) for node in ast.walk(source.tree)} - {""}
    yield from (name for text in texts if "." in text for name in (text, f"{package}.{text}"))
    for call in ast.walk(source.tree):
        if isinstance(call, ast.Call) and _last(call.func) == "import_module" and call.args:
            name = call.args[0]
            if isinstance(name, ast.JoinedStr) and _text(name.values[0]):
                yield from (_text(name.values[0]) + text for text in texts)


def one_importer(sources: Sequence[Source], edges: Mapping[str, set[str]]) -> Measurement:
    """Count modules that exactly one other module imports; `__init__.py` files are left out."""
    importers: dict[str, list[str]] = {source.path: [] for source in sources if not source.is_package}
    for path, targets in edges.items():
        for target in targets & importers.keys():
            importers[target].append(path)
    single = [f"{path} <- {users[0]}" for path, users in importers.items() if len(users) == 1]
    return _count("modules with one importer", single)


def folder_cycles(edges: Mapping[str, set[str]]) -> dict[str, Measurement]:
    """Count the folders inside packages that import each other in a cycle, and the edges within those cycles.

    Nodes are the children of each directory below the root: folders, and files next to them. A cycle counts if a
    folder is part of it; its files are listed, but not counted as folders.
    """
    folders, links, modules = [], [], 0
    for parent in sorted({path.rpartition("/")[0] for path in edges} - {""}):
        graph: dict[str, set[str]] = {}
        for path, targets in edges.items():
            node = _child(path, parent)
            if node:
                graph.setdefault(node, set()).update({_child(target, parent) for target in targets} - {"", node})
        for ring in _components(graph):
            inside = [node for node in ring if not node.endswith(".py")]
            if len(ring) > 1 and inside:
                folders += inside
                modules += sum(path.startswith(f"{folder}/") for folder in inside for path in edges)
                links += [f"{node} -> {other}" for node in sorted(ring) for other in sorted(graph[node] & ring)]
    return {
        "cyclic_folders": _count("folders in cycles inside packages", sorted(folders)),
        "cyclic_edges": _count("edges within those cycles", links),
        "cyclic_modules": Measurement("modules of those folders", modules),
    }


def _child(path: str, parent: str) -> str:
    """Return the child of `parent` that holds the module, or "" if none does."""
    if not path.startswith(f"{parent}/"):
        return ""
    return f"{parent}/{path.removeprefix(f'{parent}/').split('/')[0]}"


def _components(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components, by reachability: the graphs are small."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reached[start] = seen
    rings: list[set[str]] = []
    for node in graph:
        if not any(node in ring for ring in rings):
            rings.append({node, *(other for other in reached[node] if node in reached.get(other, set()))})
    return rings


# --- types ------------------------------------------------------------------------------------------------------


def types(sources: Sequence[Source]) -> dict[str, Measurement]:
    """Count `Any` and `object` in annotations, calls of `typing.cast`, and `type: ignore` comments."""
    used: dict[str, list[Location]] = {"Any": [], "object": []}
    alone, casts, ignored = [], [], []
    for source in sources:
        cast = _cast_names(source.tree)
        for node in ast.walk(source.tree):
            location = source.path, getattr(node, "lineno", 0)
            annotation = _annotation(node)
            for name in _names_of(annotation):
                if name in used:
                    used[name].append(location)
            if annotation is not None and ast.unparse(annotation).strip("'\"") in ("Any", "typing.Any"):
                alone.append(location)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in cast:
                casts.append(location)
        marked = [token for token in source.comments if re.search(r"#\s*type:\s*ignore", token.string)]
        ignored += [(source.path, token.start[0]) for token in marked]
    return {
        "any": _count("`Any` in annotations", _sorted(used["Any"])),
        "any_alone": _count("annotations that are `Any` alone", _sorted(alone)),
        "object": _count("`object` in annotations", _sorted(used["object"])),
        "cast": _count("calls of `cast`", _sorted(casts)),
        "type_ignore": _count("`type: ignore` comments", _sorted(ignored)),
    }


def _annotation(node: ast.AST) -> ast.expr | None:
    if isinstance(node, (ast.arg, ast.AnnAssign)):
        return node.annotation
    return node.returns if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


def _names_of(node: ast.AST | None) -> Iterator[str]:
    """Yield each name of an annotation, also inside quotes; values of Literal and notes of Annotated are not types."""
    if node is None:
        return
    if _text(node):
        try:
            yield from _names_of(ast.parse(_text(node), mode="eval").body)
        except SyntaxError:
            return
    elif isinstance(node, (ast.Name, ast.Attribute)):
        yield _last(node)
    elif isinstance(node, ast.Subscript) and _last(node.value) == "Literal":
        yield "Literal"
    elif isinstance(node, ast.Subscript) and _last(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
        yield from _names_of(node.slice.elts[0])
    else:
        for child in ast.iter_child_nodes(node):
            yield from _names_of(child)


def _cast_names(tree: ast.Module) -> set[str]:
    names = {"typing.cast"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("typing", "typing_extensions"):
            names |= {alias.asname or alias.name for alias in node.names if alias.name == "cast"}
        elif isinstance(node, ast.Import):
            names |= {f"{alias.asname}.cast" for alias in node.names if alias.name == "typing" and alias.asname}
    return names


# --- variants and walks -----------------------------------------------------------------------------------------


def variant_rows(sources: Sequence[Source]) -> dict[str, tuple[str, ...]]:
    """Map the file of each row of VARIANTS to the names to look for: the row's name and its config field.

    The row of LoRA itself is left out, because every part of the package is about LoRA.
    """
    rows: dict[str, tuple[str, ...]] = {}
    for source in sources:
        if not source.path.startswith(VARIANTS):
            continue
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and _last(node.func) == "Variant":
                given = {word.arg: _text(word.value) for word in node.keywords}
                texts = tuple(given[key] for key in ("name", "field") if given.get(key))
                if texts and texts[0] not in ("plain", "lora"):
                    rows[source.path] = (*rows.get(source.path, ()), *texts)
    return rows


def variant_lines(sources: Sequence[Source]) -> dict[str, Measurement]:
    """Count lines whose identifiers or strings name a variant outside the modules that may."""
    locations = []
    for path, names in variant_rows(sources).items():
        # a name has to start a part of an identifier: "use_dora", "DoraLayer", "isDora", but not "alora" in "datalora"
        text = "|".join(re.escape(name) for name in names)
        capital = "|".join(re.escape(name.capitalize()) for name in names)
        pattern = re.compile(rf"(?<![A-Za-z])(?i:{text})|(?<=[a-z])(?:{capital})")
        for source in sources:
            if source.path == path or HOMES.fullmatch(source.path):
                continue
            for token in source.tokens:
                lines = token.string.split("\n")
                locations += [(source.path, token.start[0] + n) for n, line in enumerate(lines) if pattern.search(line)]
    return {
        "variants": _count("lines that name a variant outside its home", _sorted(set(locations))),
        "variant_files": _count("files with such lines", sorted({path for path, _ in locations})),
    }


def walks(sources: Sequence[Source]) -> dict[str, Measurement]:
    """Count calls that walk a model: `named_modules(…)`, `.modules()` and `_modules.items()`."""
    locations = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of_modules = _last(node.func.value) == "_modules" and node.func.attr in ("items", "values")
                if of_modules or node.func.attr == "named_modules" or (node.func.attr == "modules" and not node.args):
                    locations.append((source.path, node.lineno))
    return {
        "walks": _count("calls that walk a model", _sorted(locations)),
        "walk_files": _count("files with such calls", sorted({path for path, _ in locations})),
    }


# --- the table --------------------------------------------------------------------------------------------------


def measure(sources: Sequence[Source], package: str) -> dict[str, Measurement]:
    """Return every measurement of the source, by key, in the order of the table."""
    edges = imports(sources, package)
    return {
        **sizes(sources),
        **folder_cycles(edges),
        **types(sources),
        **variant_lines(sources),
        "one_importer": one_importer(sources, edges),
        **walks(sources),
    }


def table(rows: Mapping[str, Measurement]) -> str:
    """Return a Markdown table of two columns."""
    lines = ["| measurement | value |", "|---|---:|"]
    for key, row in rows.items():
        note = f" (`{row.locations[0]}`)" if key == "largest_file" else ""
        lines.append(f"| {row.label}{note} | {row.value:,} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the measurements; return 0, or 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--src", type=Path, default=ROOT / "src" / "lorakit", help="package directory to measure")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--list", metavar="KEY", help="list the locations that a measurement counts, by its JSON key")
    parser.add_argument("--runtime", action="store_true", help="also run public calls on small models (needs torch)")
    options = parser.parse_args(arguments)
    root = options.src.resolve()
    if not (root / "__init__.py").is_file():
        parser.error(f"{options.src} is not a package: it has no __init__.py")
    rows = measure(read_tree(root), root.name)
    if options.list is not None:
        if options.list not in rows:
            parser.error(f"unknown measurement {options.list!r}; choose from {', '.join(rows)}")
        print("\n".join(rows[options.list].locations))
        return 0
    values: dict[str, object] = {key: row.value for key, row in rows.items()}
    tables = [table(rows)]
    if options.runtime:
        import structure_runtime

        calls = structure_runtime.measure(root)
        values |= {name: call.counts() for name, call in calls.items()}
        tables.append(structure_runtime.table(calls))
    print(json.dumps(values, indent=2) if options.json else "\n\n".join(tables))
    return 0


def _sorted(locations: Iterable[Location]) -> list[str]:
    return [f"{path}:{line}" for path, line in sorted(locations)]


def _count(label: str, locations: Sequence[str]) -> Measurement:
    return Measurement(label, len(locations), tuple(locations))


def _text(node: ast.AST) -> str:
    """Return the value of a string, or "" for any other node."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _last(node: ast.expr) -> str:
    """Return the last part of a dotted name, or "" for any other expression."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


if __name__ == "__main__":
    sys.exit(main())
