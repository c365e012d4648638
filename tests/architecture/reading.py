"""Read the sources of lorakit with `ast`, for the rules of this directory; nothing of lorakit is imported.

A rule takes {path below src/lorakit: source} and yields breaches. The same dictionary lists the test files, as
"tests/…", for the rules that compare the two trees; `parsed` leaves them out.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "lorakit"
Sources = dict[str, str]
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Breach(NamedTuple):
    """A violation of a rule.

    Attributes:
        path: File below src/lorakit, or the test file.
        subject: What breaks the rule there; edits elsewhere in the file do not change it, so a list can name it.
        message: What is wrong and what to do.
        line: Line of the file, 0 for the whole file.
    """

    path: str
    subject: str
    message: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}" if self.line else f"{self.path}: {self.message}"


Rule = Callable[[Sources], Iterator[Breach]]


class Import(NamedTuple):
    """An import: the module, the names taken from it, and whether it is for type checkers only or by `import_module`."""

    target: str
    names: list[str]
    typing_only: bool
    dynamic: bool
    line: int


def house() -> Sources:
    """Return the sources of the package, and the paths of the tests without their text."""
    sources = {p.relative_to(PACKAGE).as_posix(): p.read_text("utf-8") for p in PACKAGE.rglob("*.py")}
    return sources | {p.relative_to(ROOT).as_posix(): "" for p in (ROOT / "tests").rglob("*.py")}


def parsed(sources: Sources) -> Iterator[tuple[str, ast.Module]]:
    """Yield the path and the syntax tree of each file of the package."""
    for path in sorted(sources):
        if not path.startswith("tests/"):
            yield path, _tree(path, sources[path])


@functools.cache
def _tree(path: str, source: str) -> ast.Module:
    return ast.parse(source, path)


@functools.cache
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """Return every node of a tree; the rules share the result."""
    return tuple(ast.walk(tree))


def within(path: str, homes: Iterable[str]) -> bool:
    """Return whether a file is one of `homes`, or in one; each is a directory, or a file with or without .py."""
    return any(path in (home, f"{home}.py") or path.startswith(f"{home.rstrip('/')}/") for home in homes)


def part_of(path: str) -> str:
    """Return the part of lorakit that a file belongs to: its first folder, or its stem."""
    return path.split("/")[0].removesuffix(".py")


def module_of(path: str) -> str:
    """Return the dotted name of a file below src/lorakit."""
    return ".".join(["lorakit", *path.removesuffix(".py").removesuffix("__init__").strip("/").split("/")]).rstrip(".")


def modules_of(sources: Sources) -> dict[str, str]:
    """Return {dotted module: path} of the package's files."""
    return {module_of(path): path for path in sources if not path.startswith("tests/")}


def imports(path: str, tree: ast.Module) -> list[Import]:
    """Return the imports of a file, those by `import_module` of a name that begins with "lorakit" included."""
    return list(_imports(path, tree))


@functools.cache
def _imports(path: str, tree: ast.Module) -> tuple[Import, ...]:
    package = module_of(path) if path.endswith("__init__.py") else module_of(path).rpartition(".")[0]
    guarded = [node for node in nodes(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    typing_only = {id(inner) for node in guarded for statement in node.body for inner in ast.walk(statement)}
    strings = module_strings(tree)
    found = []
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            found += [Import(a.name, [], id(node) in typing_only, False, node.lineno) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*above, *([node.module] if node.module else [])])
            found.append(Import(target, [a.name for a in node.names], id(node) in typing_only, False, node.lineno))
        elif isinstance(node, ast.Call) and last_name(node.func) in ("import_module", "__import__") and node.args:
            text, is_whole = text_prefix(node.args[0], strings)
            if text == "lorakit" or text.startswith("lorakit."):
                target = text if is_whole else text.rpartition(".")[0]
                found.append(Import(target, [], False, True, node.lineno))
    return tuple(found)


def module_strings(tree: ast.Module) -> dict[str, str]:
    """Return the module's names that are bound to a string constant."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {target.id: node.value.value for target in node.targets if isinstance(target, ast.Name)}
    return found


def text_prefix(node: ast.AST, strings: Mapping[str, str]) -> tuple[str, bool]:
    """Return the known beginning of a string, and whether it is the whole string."""
    if isinstance(node, ast.Constant):
        return (node.value, True) if isinstance(node.value, str) else ("", False)
    if isinstance(node, ast.Name):
        return strings.get(node.id, ""), node.id in strings
    if isinstance(node, ast.FormattedValue):
        return text_prefix(node.value, strings)
    parts = [node.left, node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) else []
    parts = list(node.values) if isinstance(node, ast.JoinedStr) else parts
    text, is_whole = "", bool(parts)
    for part in parts:
        more, is_whole = text_prefix(part, strings)
        text += more
        if not is_whole:
            break
    return text, is_whole


def import_edges(sources: Sources, at_start: bool = False) -> dict[str, set[str]]:
    """Return {module: modules of lorakit that it imports}.

    Args:
        sources: The package.
        at_start: Leave out imports for type checkers only, and imports by `import_module`.
    """
    modules = modules_of(sources)
    edges: dict[str, set[str]] = {}
    for path, tree in parsed(sources):
        found = edges.setdefault(module_of(path), set())
        for one in imports(path, tree):
            if not at_start or not (one.typing_only or one.dynamic):
                inner = {f"{one.target}.{name}" for name in one.names} & modules.keys()
                outer = {one.target} & modules.keys() if len(inner) < len(one.names) or not one.names else set()
                found |= (inner | outer) - {module_of(path)}
    return edges


def rings(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the groups of two or more nodes that reach one another (strongly connected components)."""
    reach = {start: reached(start, edges) for start in edges}
    groups = {frozenset(o for o in reach[start] if start in reach.get(o, ())) for start in edges}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def reached(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    """Return the nodes that a path leads to from one."""
    found: set[str] = set()
    waiting = list(edges.get(start, ()))
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += edges.get(one, ())
    return found


def way_round(ring: list[str], edges: Mapping[str, set[str]]) -> list[str]:
    """Return a shortest path from the first node of a ring back to it."""
    paths = [[ring[0]]]
    for path in paths:
        for other in sorted(edges[path[-1]] & set(ring)):
            if other == ring[0]:
                return [*path, other]
            if other not in path:
                paths.append([*path, other])
    return []


def lines_of(node: ast.stmt) -> int:
    """Return the number of lines of a statement."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def last_name(node: ast.AST | None) -> str:
    """Return the last name of an expression: "c" for a.b.c and for a.b.c(…), "" if it has none."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Yield public classes, functions and methods; a setter and an overload are documented by their other half."""
    for child in node.body:
        if not isinstance(child, Definition) or child.name.startswith("_"):
            continue
        if any(last_name(item) in ("setter", "deleter", "overload") for item in child.decorator_list):
            continue
        yield prefix + child.name, child
        if isinstance(child, ast.ClassDef):
            yield from public(child, f"{prefix}{child.name}.")


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function, without the functions and classes defined in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Definition):
            yield child
            yield from own_nodes(child)


def arguments_of(node: Function) -> list[ast.arg]:
    """Return the named arguments of a function."""
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def evaluated(annotation: ast.AST | None) -> ast.AST | None:
    """Return an annotation as an expression, also if it is written as a string."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return ast.parse(annotation.value, mode="eval").body
    return annotation
