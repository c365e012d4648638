"""Read the source of a live function: its syntax tree, a hash of the tree, and the names that the tree reads.

The hash covers what a call computes, not comments, docstrings, annotations, decorators or the function's own name; a
decorator's wrapper is a function of its own. It is the same in every Python version.

Source that does not match the live code is rejected: the file is compiled again, and the two code objects are compared.
A function that was assembled at runtime, or whose file has changed since its import, has no readable source.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType

NOT_COMPUTED = ("decorator_list", "returns", "annotation", "type_params", "type_comment", "kind", "ctx")
"""Fields of syntax nodes that do not affect what a call computes."""

COMPARED = (
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_posonlyargcount"),
    *("co_kwonlyargcount", "co_exceptiontable"),
)
"""Attributes of code objects that must be equal. Python 3.10 has no exception table."""

SIGNATURE = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
"""Flags of code objects that must be equal."""

CONFIG = "config"
"""Name of variables and attributes that contain the config of a model."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """Source of a function.

    Attributes:
        attributes: The attributes that are read from variables, as (variable, attribute); `super()` is a variable.
        words: All attributes and string constants. Among them are the names of all attributes that the function reads,
            such as "name" in `getattr(self, "name")`.
    """

    hash: str
    variables: frozenset[str]
    attributes: frozenset[tuple[str, str]]
    words: frozenset[str]
    fields: frozenset[str]


def source_of(function: FunctionType) -> Source | None:
    """Return the source of a Python function, or None if it is not available or does not match the live code."""
    code = function.__code__
    return _source(code, code.co_filename)


@functools.lru_cache(maxsize=4096)  # equal code from the same place has the same source
def _source(code: CodeType, file: str) -> Source | None:
    try:
        lines, _ = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        compiled = _compiled(file, "".join(linecache.getlines(file)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    if len(tree.body) != 1 or not isinstance(tree.body[0], Definition):
        return None  # for example a lambda
    codes = [one for one in _codes(compiled, code.co_name) if one.co_firstlineno == code.co_firstlineno]
    is_live = any(_is_same_code(one, code) for one in codes)
    return Source(hash_of(tree.body[0]), *_names(tree.body[0])) if is_live else None


@functools.lru_cache(maxsize=64)
def _compiled(file: str, text: str) -> CodeType:
    compiled: CodeType = compile(text, file, "exec", dont_inherit=True)
    return compiled


def hash_of(definition: Definition) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 hash of a function's parameters and body."""
    text = _text(definition.args) + _text(_without_docstring(definition.body))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    is_docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if is_docstring else body


def _text(node: object) -> str:
    """Return a node and everything below it as text, which does not depend on the Python version."""
    if isinstance(node, ast.AnnAssign):  # an annotation of a local variable is not evaluated
        node = ast.Assign([node.target], node.value) if node.value is not None else ast.Pass()
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: getattr(node, name, None) for name in node._fields if name not in NOT_COMPUTED}
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        fields["body"] = _without_docstring(node.body)
    set_fields = [f"{name}={_text(value)}" for name, value in fields.items() if value not in (None, [])]
    return f"{type(node).__name__}({','.join(set_fields)})"


def _names(definition: Definition) -> tuple[frozenset[str], frozenset[tuple[str, str]], frozenset[str], frozenset[str]]:
    """Return the variables, attributes, words and fields (see `Source`) of a function's parameters and body."""
    variables, attributes, words, fields = set[str](), set[tuple[str, str]](), set[str](), set[str]()
    for part in (*definition.args.defaults, *definition.args.kw_defaults, *definition.body):
        for node in ast.walk(part) if part is not None else ():
            if isinstance(node, ast.Name):
                variables.add(node.id)
            elif isinstance(node, ast.Attribute):
                words.add(node.attr)
                if isinstance(node.value, ast.Name):
                    attributes.add((node.value.id, node.attr))
                elif _is_super(node.value):
                    attributes.add(("super", node.attr))
                if _last_name(node.value) == CONFIG:
                    fields.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
            elif isinstance(node, ast.Call) and len(node.args) > 1 and _last_name(node.args[0]) == CONFIG:
                fields |= {
                    one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)
                }
    return frozenset(variables), frozenset(attributes), frozenset(words), frozenset(fields)


def _last_name(node: ast.expr) -> str:
    """Return the name of a variable, or the last name in a chain of attributes."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _codes(code: CodeType, name: str) -> Iterator[CodeType]:
    """Yield all functions with a name inside a code object."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_name == name:
                yield inner
            yield from _codes(inner, name)


def _is_same_code(code: CodeType, other: CodeType) -> bool:
    if any(getattr(code, name, None) != getattr(other, name, None) for name in COMPARED):
        return False
    if (code.co_flags ^ other.co_flags) & SIGNATURE or len(code.co_consts) != len(other.co_consts):
        return False
    return all(map(_is_same_constant, code.co_consts, other.co_consts))


def _is_same_constant(one: object, other: object) -> bool:
    if isinstance(one, CodeType) and isinstance(other, CodeType):
        return _is_same_code(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same_constant, one, other))
    if isinstance(one, str) and "<locals>" in one:  # Python 3.10 stores the qualified name of an inner function
        return True
    return one == other if isinstance(one, frozenset) else repr(one) == repr(other)
