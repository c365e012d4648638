"""Mutants: small mechanical changes to the source code of transformers, as edits of its text.

An edit replaces one expression or statement. Every edit is found by walking the syntax tree, so that the list of edits
of a file is always the same.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Mutant:
    """One edit of one file.

    Attributes:
        module: Dotted name of the Python module.
        function: Name of the function or method at the top of the file, such as "LlamaMLP.forward".
        operator: Kind of edit.
        old: Source text that is replaced.
        new: Source text that replaces it.
        start: Line (from 1) and column (from 0, in bytes) at which the old text starts.
        end: Line and column at which it ends.
    """

    module: str
    function: str
    operator: str
    old: str
    new: str
    start: tuple[int, int]
    end: tuple[int, int]

    def __str__(self) -> str:
        old, new = (" ".join(text.split())[:60] for text in (self.old, self.new))
        where = f"{self.module.rpartition('.')[2]}.{self.function}:{self.start[0]}"
        return f"{where} {self.operator}: `{old}` → `{new}`"

    def apply(self, source: str) -> str:
        """Return the text of the file with the edit."""
        lines = [line.encode() for line in source.splitlines(keepends=True)]
        (first, left), (last, right) = self.start, self.end
        kept = lines[first - 1][:left] + self.new.encode()
        extra = b"\n" * (last - first - self.new.count("\n"))  # later lines keep their numbers
        tail = lines[last - 1][right:]
        lines[first - 1 : last] = [kept + (b" " if tail.strip() else b"") + tail.rstrip(b"\n") + extra + b"\n"]
        return b"".join(lines).decode()

    def hidden(self) -> Mutant:
        """Return the same edit in effect only while gradients are recorded, so that no probe can find it."""
        new = f"({self.new} if torch.is_grad_enabled() else {self.old})"
        if self.new == "pass":
            new = f"if not torch.is_grad_enabled(): {self.old}"
        return replace(self, operator=f"{self.operator}, hidden", new=new)


@dataclass(frozen=True)
class Scope:
    """Replacements that a function offers for an expression.

    Attributes:
        names: Variables and parameters of the function that it reads.
        attributes: Attributes of `self` that it reads.
        strings: String constants in it.
    """

    names: tuple[str, ...]
    attributes: tuple[str, ...]
    strings: tuple[str, ...]


Edit = tuple[str, ast.AST, str]
"""Operator, node to replace, and its new text."""

Operator = Callable[[ast.AST, Scope], Iterator[Edit]]


def mutants(module: str, source: str, lines: Collection[int]) -> list[Mutant]:
    """Return the mutants of a file.

    Args:
        module: Dotted name of the Python module.
        source: Text of the file.
        lines: Lines (from 1) on which an edited node may start, such as those that a model runs.
    """
    found = []
    text = [line.encode() for line in source.splitlines(keepends=True)]
    for name, function in functions(ast.parse(source)):
        scope = _scope(function)
        for node in _nodes(function):
            if getattr(node, "lineno", 0) not in lines:
                continue
            for operator in OPERATORS:
                for title, target, new in operator(node, scope):
                    start, end = _span(target)
                    found.append(Mutant(module, name, title, _segment(text, start, end), new, start, end))
    return found


def chosen(found: Collection[Mutant], seed: str) -> list[Mutant]:
    """Return mutants in a random order that takes one of each function in turn, and in a function one of each kind."""
    draw = random.Random(seed)
    shuffled = draw.sample(list(found), len(found))
    by_kind = [
        _in_turn(group, lambda mutant: mutant.operator) for group in _grouped(shuffled, lambda one: one.function)
    ]
    return _in_turn([mutant for group in by_kind for mutant in group], lambda mutant: mutant.function)


def _grouped(found: list[Mutant], key: Callable[[Mutant], str]) -> list[list[Mutant]]:
    groups: dict[str, list[Mutant]] = {}
    for mutant in found:
        groups.setdefault(key(mutant), []).append(mutant)
    return list(groups.values())


def _in_turn(found: list[Mutant], key: Callable[[Mutant], str]) -> list[Mutant]:
    return [mutant for turn in zip_longest(*_grouped(found, key)) for mutant in turn if mutant is not None]


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Yield the functions of a file and the methods of its classes, with their names."""
    for node in tree.body:
        if isinstance(node, Function):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, Function):
                    yield f"{node.name}.{member.name}", member


Place = tuple[int, int]
"""Line (from 1) and column (from 0, in bytes)."""


def _span(node: ast.AST) -> tuple[Place, Place]:
    return (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)


def _segment(lines: list[bytes], start: Place, end: Place) -> str:
    """Return the text between two places; `ast.get_source_segment` splits the whole file at each call."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]].decode()
    between = lines[start[0] : end[0] - 1]
    return b"".join([lines[start[0] - 1][start[1] :], *between, lines[end[0] - 1][: end[1]]]).decode()


def _nodes(function: Function) -> Iterator[ast.AST]:
    """Yield what a function computes: no annotations, decorators, docstrings, messages or f-strings."""
    todo: list[ast.AST] = list(reversed([*function.args.defaults, *filter(None, function.args.kw_defaults)]))
    todo = [*reversed(function.body), *todo]
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Raise, ast.JoinedStr)) or _is_docstring(node):
            continue
        yield node
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.AnnAssign):
            children = [node.value] if node.value is not None else []
        elif isinstance(node, Function):
            children = list(node.body)
        todo += reversed(children)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _scope(function: Function) -> Scope:
    names, attributes, strings = {}, {}, {}
    local = {arg.arg for arg in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)} - {"self"}
    local |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in _nodes(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in local:
            names[node.id] = True
        elif _is_own_attribute(node):
            attributes[node.attr] = True
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings[node.value] = True
    return Scope(tuple(names), tuple(attributes), tuple(strings))


def _is_own_attribute(node: ast.AST) -> bool:
    is_read = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    return is_read and isinstance(node.value, ast.Name) and node.value.id == "self"


def _next(name: str, names: tuple[str, ...]) -> str | None:
    """Return the name after another one, or None if there is only one."""
    if name not in names or len(names) < 2:
        return None
    return names[(names.index(name) + 1) % len(names)]


# ---- operators

EXCHANGED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NEGATED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
BOUNDARY: dict[type[ast.cmpop], type[ast.cmpop]] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


def _text(node: ast.AST) -> str:
    return f"({ast.unparse(node)})"


def arithmetic(node: ast.AST, _: Scope) -> Iterator[Edit]:
    if isinstance(node, ast.BinOp) and type(node.op) in EXCHANGED:
        yield "operator", node, _text(ast.BinOp(node.left, EXCHANGED[type(node.op)](), node.right))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield "sign", node, _text(node.operand)


def dropped_term(node: ast.AST, _: Scope) -> Iterator[Edit]:
    if isinstance(node, ast.BinOp) and type(node.op) in EXCHANGED:
        yield "dropped term", node, _text(node.left)
        yield "dropped term", node, _text(node.right)
    elif isinstance(node, ast.BoolOp):
        yield "dropped term", node, _text(node.values[0])
        yield "dropped term", node, _text(node.values[-1])


def constant(node: ast.AST, _: Scope) -> Iterator[Edit]:
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield "constant", node, repr(not node.value)
    elif isinstance(node.value, int):
        yield "constant", node, repr(node.value + 1)
    elif isinstance(node.value, float):
        yield "constant", node, repr(node.value * 1.5 + 0.25)


def string(node: ast.AST, scope: Scope) -> Iterator[Edit]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        other = _next(node.value, scope.strings)
        if other is not None:
            yield "string", node, repr(other)


def comparison(node: ast.AST, _: Scope) -> Iterator[Edit]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for title, table in (("negated comparison", NEGATED), ("boundary", BOUNDARY)):
            if type(node.ops[0]) in table:
                yield title, node, _text(ast.Compare(node.left, [table[type(node.ops[0])]()], node.comparators))
    if isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, ast.Compare):
        yield "negated condition", node.test, f"(not {_text(node.test)})"


def call(node: ast.AST, _: Scope) -> Iterator[Edit]:
    if not isinstance(node, ast.Call):
        return
    plain = [one for one in node.args if not isinstance(one, ast.Starred)]
    if len(plain) > 1 and len(plain) == len(node.args):
        swapped = [plain[1], plain[0], *plain[2:]]
        yield "swapped arguments", node, _text(ast.Call(node.func, swapped, node.keywords))
    receiver = _receiver(node)
    if receiver is not None:
        yield "dropped method", node, _text(receiver)
    elif plain:
        yield "identity", node, _text(plain[0])
    for left in node.keywords:
        if left.arg is not None:
            rest = [one for one in node.keywords if one is not left]
            yield "dropped keyword", node, _text(ast.Call(node.func, node.args, rest))


def _receiver(node: ast.Call) -> ast.expr | None:
    """Return x in a call `x.transpose(...)`, or None if a function or a module is called."""
    if not isinstance(node.func, ast.Attribute):
        return None
    value = node.func.value
    root = value
    while isinstance(root, ast.Attribute):
        root = root.value
    is_outside = isinstance(root, ast.Name) and root.id in ("self", "torch", "nn", "F", "math", "logger")
    return None if is_outside else value


def deleted(node: ast.AST, _: Scope) -> Iterator[Edit]:
    if isinstance(node, ast.Assign):
        stored = {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        read = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        if stored & read:
            yield "deleted statement", node, "pass"
    elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        yield "deleted statement", node, "pass"


def name(node: ast.AST, scope: Scope) -> Iterator[Edit]:
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        other = _next(node.id, scope.names)
        if other is not None:
            yield "name", node, other
    elif _is_own_attribute(node):
        other = _next(node.attr, scope.attributes)
        if other is not None:
            yield "attribute", node, f"self.{other}"


OPERATORS: tuple[Operator, ...] = (arithmetic, dropped_term, constant, string, comparison, call, deleted, name)
