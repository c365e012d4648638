"""Rules of docstrings and of the test tree: contents and references of docstrings, and locations of tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from .imports import FLOORS
from .reading import (
    Breach,
    Sources,
    arguments_of,
    evaluated,
    last_name,
    module_of,
    modules_of,
    nodes,
    own_nodes,
    parsed,
    public,
)

SHAPE = re.compile(r"\((?:[^(),\n]+,)+[^(),\n]*\)|\(\)|\bany shape\b|\bscalar\b", re.IGNORECASE)
CONTAINERS = {"dict", "Mapping", "MutableMapping", "list", "Sequence", "Iterable", "Iterator", "Callable", "Collection"}
CONTAINERS |= {"Generator", "AbstractContextManager", "Literal"}
DOTTED = re.compile(r"(?<![\w./])lorakit(?:\.\w+)+")
FILE = re.compile(r"(?<![\w./<*-])(?:\w+/)+\w+\.py\b")
FILES_ON_DISK = {"lorakit.json"}


def undocumented(sources: Sources) -> Iterator[Breach]:
    """Find modules and public names without a docstring."""
    for path, tree in parsed(sources):
        if sources[path].strip() and not ast.get_docstring(tree):
            yield Breach(path, "module", "the module has no docstring")
        for name, node in public(tree):
            if not ast.get_docstring(node):
                yield Breach(path, name, f"{name} has no docstring", node.lineno)


def shapeless(sources: Sources) -> Iterator[Breach]:
    """Find public functions over tensors whose docstring states no shape such as (tokens, rank)."""
    for path, tree in parsed(sources):
        for name, node in public(tree):
            if isinstance(node, ast.ClassDef):
                continue
            arguments = [*arguments_of(node), *([node.args.vararg] if node.args.vararg else [])]
            annotations = [argument.annotation for argument in arguments] + [node.returns]
            if any(_holds_tensor(item) for item in annotations) and not SHAPE.search(ast.get_docstring(node) or ""):
                yield Breach(path, name, f"{name} takes or returns a Tensor and states no shape", node.lineno)


def unnamed_errors(sources: Sources) -> Iterator[Breach]:
    """Find public functions that raise and whose `Raises:` section does not name the exception."""
    for path, tree in parsed(sources):
        for name, node in public(tree):
            if isinstance(node, ast.ClassDef):
                continue
            raised = {last_name(item.exc) for item in own_nodes(node) if isinstance(item, ast.Raise) and item.exc}
            section = (ast.get_docstring(node) or "").partition("Raises:")[2]
            for error in sorted(error for error in raised if error[:1].isupper()):
                if not re.search(rf"\b{error}\b", section):
                    message = f"{name} raises {error} and its Raises: section does not name it"
                    yield Breach(path, f"{name}: {error}", message, node.lineno)


def dangling_references(sources: Sources) -> Iterator[Breach]:
    """Find docstrings that name a module of lorakit, or a file of the package or its tests, that does not exist."""
    names = {module_of(path): _names(tree) for path, tree in parsed(sources)}
    for path, tree in parsed(sources):
        for text, line in _docstrings(tree):
            for dotted in DOTTED.findall(text):
                if not _exists(dotted, names):
                    yield Breach(path, dotted, f"a docstring names {dotted}, which does not exist", line)
            for file in FILE.findall(text):
                is_ours = file.startswith("tests/") or file.split("/")[0] in FLOORS
                if is_ours and file not in sources:
                    yield Breach(path, file, f"a docstring names {file}, which does not exist", line)


def misplaced_tests(sources: Sources) -> Iterator[Breach]:
    """Find files tests/<part>/test_x.py without a module x of that part.

    x may also be the name of the folder, for its `__init__`. If the tests of x fill several files, these are named
    test_x_<aspect>.py.
    """
    targets = {path.removesuffix("/__init__.py").removesuffix(".py") for path in modules_of(sources).values()}
    for path in sorted(path for path in sources if path.startswith("tests/")):
        folder, name = Path(path).parent.relative_to("tests"), Path(path).stem
        if folder.parts[:1] == () or folder.parts[0] not in FLOORS or not name.startswith("test_"):
            continue
        words = name.removeprefix("test_").split("_")
        stems = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
        tested = {(folder / stem).as_posix() for stem in stems if stem != folder.name}
        tested |= {folder.as_posix()} if folder.name in stems else set()
        if not targets & tested:
            message = f"{folder}/{stems[-1]}.py does not exist; name tests after the module that they test"
            yield Breach(path, "no module", message)


def _holds_tensor(annotation: ast.AST | None) -> bool:
    """Return whether an annotation is a tensor, perhaps optional or in a tuple; a container of many has no one shape."""
    node = evaluated(annotation)
    if isinstance(node, ast.Subscript) and last_name(node.value) in CONTAINERS:
        return False
    if isinstance(node, ast.Subscript) and last_name(node.value) == "Annotated":
        return _holds_tensor(next(ast.iter_child_nodes(node.slice), None))
    if isinstance(node, (ast.Name, ast.Attribute)):
        return last_name(node) == "Tensor"
    return node is not None and any(_holds_tensor(child) for child in ast.iter_child_nodes(node))


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the strings that are statements: docstrings, and those below an attribute."""
    for node in nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value, node.lineno


def _names(tree: ast.Module) -> set[str]:
    """Return what a module defines, imports, or lists in a table of strings."""
    found = set()
    for node in nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 4000:
            found |= set(node.value.replace("/", ".").split())
    return found


def _exists(dotted: str, names: Mapping[str, set[str]]) -> bool:
    """Return whether a dotted name is a module, or a name of the longest prefix that is one."""
    if dotted in names or dotted in FILES_ON_DISK:
        return True
    module = dotted
    while module not in names:
        module = module.rpartition(".")[0]
        if not module:
            return False
    rest = dotted[len(module) + 1 :]
    if module == "lorakit.peft" and rest in names.get("lorakit.peft.paths", set()):
        return True
    return rest.split(".")[0] in names[module]
