"""Rules of names: annotations of central names, names of kinds and variants, file names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from .reading import (
    Breach,
    Definition,
    Function,
    Sources,
    arguments_of,
    evaluated,
    imports,
    last_name,
    module_of,
    nodes,
    parsed,
    within,
)

TYPED = {"layer", "module", "model", "state", "route", "factor", "slot", "kind", "index"}
VARIANT_ROWS = "core/variants"
ROWS = ("core/kinds", VARIANT_ROWS)  # folders whose calls of Kind, Variant and replace make rows with a name
ROW_MAKERS = {"Kind", "Variant", "replace"}
VARIANT_FIELDS = {  # field of the config -> the file of its variant; rows that state their `field` add to these
    "use_dora": "core/variants/dora.py",
    "alora_invocation_tokens": "core/variants/alora.py",
}
NAME_HOMES = ("targets/layer_types.py", "config", "peft")
FIELD_HOMES = (
    "config",
    "peft",
    "cli",
    "train/settings/settings.py",
    "train/settings/sources.py",
    "train/settings/defaults.py",
)
ROW_NAMES = ("name", "kind_name", "variant")
BANNED_STEMS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}


def loosely_typed(sources: Sources) -> Iterator[Breach]:
    """Find parameters and attributes with a central name (layer, model, state …) that are annotated as Any."""
    for path, tree in parsed(sources):
        for node in nodes(tree):
            if isinstance(node, Function):
                found = [(a.arg, a.annotation, a.lineno) for a in arguments_of(node)]
                yield from _loose(path, f"{node.name}: ", found)
            elif isinstance(node, ast.ClassDef):
                fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
                found = [(last_name(one.target), one.annotation, one.lineno) for one in fields]
                yield from _loose(path, f"{node.name}.", found)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Attribute):
                yield from _loose(path, "self.", [(node.target.attr, node.annotation, node.lineno)])


def row_names(sources: Sources) -> Iterator[Breach]:
    """Find strings that equal the name of a kind or variant where code decides by them: ==, in, sets, tuples, keys."""
    rows = _rows(sources)
    for path, tree in parsed(sources):
        if within(path, NAME_HOMES):
            continue
        faces = {id(node.value) for node in nodes(tree) if isinstance(node, ast.Assign) and _is_face(node)}
        for node in (one for parent in nodes(tree) if id(parent) not in faces for one in _decisive(parent)):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            homes = rows.get(node.value, set())
            if within(path, FIELD_HOMES) and all(home.startswith(VARIANT_ROWS) for home in homes):
                continue  # configs, flags and settings may name variants, though no kinds
            if homes and path not in homes:
                message = f"{node.value!r} names a kind or variant; read an attribute of its row instead"
                yield Breach(path, repr(node.value), message, node.lineno)


def variant_fields(sources: Sources) -> Iterator[Breach]:
    """Find fields of a variant used outside its file, as an attribute, keyword argument or string."""
    fields = VARIANT_FIELDS | _fields(sources)
    for path, tree in parsed(sources):
        if within(path, FIELD_HOMES):
            continue
        for node in nodes(tree):
            name = ""
            if isinstance(node, ast.Attribute):
                name = node.attr
            elif isinstance(node, ast.keyword):
                name = node.arg or ""
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value
            elif isinstance(node, ast.AnnAssign):
                name = last_name(node.target)
            if name in fields and path != fields[name]:
                message = f"{name} belongs to {fields[name]}; ask the row of VARIANTS"
                yield Breach(path, name, message, getattr(node, "lineno", 0))


def name_comparisons(sources: Sources) -> Iterator[Breach]:
    """Find comparisons of the name of a kind or variant, also with another name; code reads a row's attributes."""
    for path, tree in parsed(sources):
        if within(path, (*NAME_HOMES, *ROWS)):
            continue
        for node in nodes(tree):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq, ast.In, ast.NotIn)):
                found = next((name for name in map(_name_of_row, (node.left, *node.comparators)) if name), "")
                if found:
                    message = f"{found} is compared; read an attribute of the kind or variant instead"
                    yield Breach(path, found, message, node.lineno)


def misnamed(sources: Sources) -> Iterator[Breach]:
    """Find files whose name says nothing, and public names of a package that are also the name of a module next to it."""
    for path, tree in parsed(sources):
        if Path(path).stem in BANNED_STEMS:
            yield Breach(path, "file name", "a file's name says what is in it")
        if Path(path).name != "__init__.py":
            continue
        folder = module_of(path)
        modules = [module_of(other) for other in sources if not other.startswith("tests/")]
        siblings = {module.rpartition(".")[2] for module in modules if module.rpartition(".")[0] == folder}
        defined = {node.name for node in tree.body if isinstance(node, Definition)}
        defined |= {n for one in imports(path, tree) if one.target not in ("lorakit", folder) for n in one.names}
        for name in sorted(defined & siblings):
            yield Breach(path, name, f"{name} is also the name of a module")


def _loose(path: str, owner: str, found: list[tuple[str, ast.expr | None, int]]) -> Iterator[Breach]:
    for name, annotation, line in found:
        if name in TYPED and _is_any(annotation):
            message = f"{owner}{name} is annotated as Any; name its type, or a protocol of what is used of it"
            yield Breach(path, f"{owner}{name}", message, line)


def _is_any(annotation: ast.AST | None) -> bool:
    """Return whether an annotation is Any, a union with Any, or Any in Optional, ClassVar and similar."""
    node = evaluated(annotation)
    if isinstance(node, ast.BinOp):
        return _is_any(node.left) or _is_any(node.right)
    if isinstance(node, ast.Subscript) and last_name(node.value) in ("Optional", "Union", "ClassVar", "Final"):
        inside = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return any(_is_any(one) for one in inside)
    return last_name(node) == "Any"


def _rows(sources: Sources) -> dict[str, set[str]]:
    """Return {name of a row of KINDS or VARIANTS: files that make a row of that name}."""
    found: dict[str, set[str]] = {}
    for path, call in _row_calls(sources):
        for keyword in call.keywords:
            if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                found.setdefault(str(keyword.value.value), set()).add(path)
    return found


def _fields(sources: Sources) -> dict[str, str]:
    return {
        str(keyword.value.value): path
        for path, call in _row_calls(sources)
        for keyword in call.keywords
        if keyword.arg == "field" and isinstance(keyword.value, ast.Constant) and keyword.value.value
    }


def _row_calls(sources: Sources) -> Iterator[tuple[str, ast.Call]]:
    for path, tree in parsed(sources):
        if within(path, ROWS):
            calls = (node for node in nodes(tree) if isinstance(node, ast.Call))
            yield from ((path, call) for call in calls if last_name(call.func) in ROW_MAKERS)


def _decisive(node: ast.AST) -> list[ast.expr]:
    """Return the parts of a node by which code decides: what is compared, members of a collection, keys, cases."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, (ast.Set, ast.Tuple)):
        return list(node.elts)
    if isinstance(node, ast.List) and isinstance(node.ctx, ast.Load):
        return list(node.elts)
    if isinstance(node, ast.Dict):
        return [key for key in node.keys if key is not None]
    if isinstance(node, ast.Subscript):
        return [node.slice]
    return [node.value] if isinstance(node, ast.MatchValue) else []


def _is_face(node: ast.Assign) -> bool:
    return any(last_name(target) == "__all__" for target in node.targets)


def _name_of_row(node: ast.expr) -> str:
    """Return an operand that is the name of a kind or variant, as text; "" for any other.

    That is `x.kind_name` and `x.variant`, an entry of a table of these, and `.name` of a kind, a variant or a row
    written in capitals, such as PARAMETER.
    """
    while isinstance(node, ast.Subscript) or (isinstance(node, ast.Call) and last_name(node.func) == "get"):
        inner = node.value if isinstance(node, ast.Subscript) else node.func
        node = inner.value if isinstance(inner, ast.Attribute) and inner.attr == "get" else inner
    if not isinstance(node, ast.Attribute) or node.attr not in ROW_NAMES:
        return ""
    owner = last_name(node.value)
    if node.attr == "name" and owner not in ("kind", "variant") and not (owner.isupper() and len(owner) > 1):
        return ""
    return f"{owner}.{node.attr}" if owner else node.attr
