"""Rules of practice: texts of exceptions, walks over a model, process-wide state, adapter components, C memory."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from .reading import Breach, Definition, Function, Sources, arguments_of, evaluated, last_name, nodes, parsed, within

WALKERS = {"core/model/index.py": "AdapterIndex: the one walk of a public call"}
CONTEXT_VARIABLES = ("core/routing/state.py", "ops/choices.py", "terminal.py")
MODULE_TABLES = ("peft/paths.py",)  # may write to sys.modules and sys.meta_path
FOREIGN_MEMORY = ("ops/kernels", "allocator", "durable", "mapped_files")  # may import ctypes
KERNELS, KERNELS_OF_TRITON = "ops/kernels", "ops/kernels/triton"
GATEWAY = {"pointer", "_pointer", "optional", "_optional"}
WRITERS = {
    "terminal.py": "the one writer of text to terminals",
    "startup.py": "flushes both streams when the process ends",
    "peft/weighted.py": "print is PEFT's default for an argument",
}
READS_STREAM = {"flush", "fileno", "isatty", "encoding"}  # attributes of a stream that write nothing
TAKES_STREAM = {"colored", "is_animated", "screen_width", "progress_for", "write_line", "redirect_stdout", "cast"}
DRAWS = {"Live", "Status", "Console", "Bar"}  # of rich; all but Console must be given the console of terminal.py
CHECKED = ("dtype", "shape", "is_contiguous")  # what the gateway compares before it takes an address
INSPECTING = {"startswith", "endswith", "removeprefix", "find", "rfind", "index", "rindex", "partition", "rpartition"}
MATCHING = {"search", "match", "fullmatch", "findall", "finditer", "sub", "subn"}
KEEPS_TEXT = {"lower", "upper", "casefold", "strip", "lstrip", "rstrip", "split", "splitlines", "removesuffix"}
KEEPS_TEXT |= {"replace", "removeprefix", "partition", "rpartition"}
PROTOCOL, MARK = "AdapterComponent", "available_adapters"


def exception_texts(sources: Sources) -> Iterator[Breach]:
    """Find code that decides by the text of an exception; a cause is an exception class or attribute."""
    for path, tree in parsed(sources):
        functions = {node.name: node for node in nodes(tree) if isinstance(node, Function)}
        for scope in _scopes(tree):
            texts = _Texts(_exceptions(scope), functions)
            for node in texts.inspected(scope):
                name = scope.name if isinstance(scope, (Function, ast.ClassDef)) else "module"
                message = f"{name} reads the text of an exception ({ast.unparse(node)[:60]}); use its class or fields"
                yield Breach(path, name, message, node.lineno)


def fieldless(sources: Sources) -> Iterator[Breach]:
    """Find errors of lorakit that are raised with a message alone, without a field such as `what` or `where`."""
    trees = dict(parsed(sources))
    own = trees["errors.py"].body if "errors.py" in trees else []
    errors = {node.name for node in own if isinstance(node, ast.ClassDef)}
    for path, tree in trees.items():
        for node in nodes(tree):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and call.args and not call.keywords and last_name(call) in errors:
                message = f"{last_name(call)} carries a message alone; add what, where, field or allowed"
                yield Breach(path, last_name(call), message, call.lineno)


def walks(sources: Sources) -> Iterator[Breach]:
    """Find walks over a model: named_modules(), modules(), _modules.items()."""
    for path, tree in parsed(sources):
        if within(path, WALKERS):
            continue
        for node in nodes(tree):
            call = _walk(node)
            if call:
                message = f"{call} walks the model; take what is needed from the AdapterIndex of the call"
                yield Breach(path, call, message, getattr(node, "lineno", 0))


def process_state(sources: Sources) -> Iterator[Breach]:
    """Find context variables, and writes to sys.modules and sys.meta_path, outside their files."""
    for path, tree in parsed(sources):
        for node in nodes(tree):
            if _is_context_variable(node) and not within(path, CONTEXT_VARIABLES):
                message = f"ContextVar outside {_either(CONTEXT_VARIABLES)}"
                yield Breach(path, "ContextVar", message, getattr(node, "lineno", 0))
            table = _table_written(node)
            if table and not within(path, MODULE_TABLES):
                yield Breach(path, table, f"{table} outside {_either(MODULE_TABLES)}", getattr(node, "lineno", 0))


def incomplete_components(sources: Sources) -> Iterator[Breach]:
    """Find classes with `available_adapters` that lack other methods of AdapterComponent; inherited ones count."""
    classes = [(path, node) for path, tree in parsed(sources) for node in nodes(tree) if isinstance(node, ast.ClassDef)]
    by_name = {node.name: node for _, node in classes}
    protocol = by_name.get(PROTOCOL)
    if protocol is None:
        return
    bases = {last_name(base) for _, node in classes for base in node.bases}
    carriers = {node.name for _, node in classes if MARK in _methods(node, by_name)} - {PROTOCOL}
    carriers -= {name for name in carriers & bases if _is_abstract(by_name[name])}
    for path, node in classes:
        if node.name not in carriers or (MARK not in _methods(node) and carriers & set(map(last_name, node.bases))):
            continue
        for name in sorted(_methods(protocol) - _methods(node, by_name)):
            message = f"{node.name} has {MARK} and lacks {name} of {PROTOCOL}"
            yield Breach(path, f"{node.name}.{name}", message, node.lineno)


def foreign_memory(sources: Sources) -> Iterator[Breach]:
    """Find ctypes outside its files, and addresses of tensors in the kernels that the gateway has not checked."""
    for path, tree in parsed(sources):
        if not within(path, FOREIGN_MEMORY):
            for node in nodes(tree):
                if _imports_ctypes(node):
                    message = f"ctypes outside {_either(FOREIGN_MEMORY)}"
                    yield Breach(path, "ctypes", message, getattr(node, "lineno", 0))
        if within(path, (KERNELS,)) and not within(path, (KERNELS_OF_TRITON,)):
            for function in (node for node in nodes(tree) if isinstance(node, Function)):
                yield from _unchecked_addresses(path, function)


def writers(sources: Sources) -> Iterator[Breach]:
    """Find writers to terminals outside terminal.py: print, the streams of sys used otherwise, consoles of rich."""
    for path, tree in parsed(sources):
        if within(path, WRITERS):
            continue
        allowed = set[int]()
        for node in nodes(tree):
            if isinstance(node, ast.Attribute) and node.attr in READS_STREAM:
                allowed.add(id(node.value))
            elif isinstance(node, ast.Call) and last_name(node) in TAKES_STREAM:
                given = [*node.args, *(keyword.value for keyword in node.keywords)]
                allowed |= {id(part) for one in given for part in ast.walk(one)}
        for node in nodes(tree):
            what = _written(node)
            if what and id(node) not in allowed:
                message = f"{what} outside terminal.py; write with lorakit.terminal or lorakit.cli.console"
                yield Breach(path, what, message, getattr(node, "lineno", 0))


def _written(node: ast.AST) -> str:
    """Return a name of what writes to a terminal, or ""."""
    if isinstance(node, ast.Attribute) and node.attr.strip("_") in {"stdout", "stderr"}:
        return f"sys.{node.attr}" if isinstance(node.value, ast.Name) and node.value.id == "sys" else ""
    if isinstance(node, ast.Name) and node.id in {"print", "pprint"}:
        return node.id
    if not isinstance(node, ast.Call):
        return ""
    name = last_name(node)
    has_console = any(keyword.arg == "console" for keyword in node.keywords)
    return name if name == "Console" or (name in DRAWS and not has_console) else ""


class _Texts:
    """Expressions of one scope that hold the text of an exception."""

    def __init__(self, exceptions: set[str], functions: Mapping[str, Function], texts: frozenset[str] = frozenset()):
        self.exceptions, self.functions, self.names = exceptions, functions, set(texts)

    def inspected(self, scope: ast.AST) -> list[ast.expr]:
        """Return the expressions that compare, search or split such a text."""
        if not self.exceptions and not self.names:
            return []
        inside = _inside(scope)
        for _ in range(2):  # a name may be bound to another one that is bound further down
            for node in inside:
                self._bind(node)
        return [node for node in inside if isinstance(node, ast.expr) and self._decides(node)]

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            pairs = [(node.target, node.value)]
        elif isinstance(node, (ast.For, ast.comprehension)):
            pairs = [(node.target, node.iter)]
        else:
            return
        for target, value in pairs:
            if self._is_text(value):
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                self.names |= {one.id for one in names if isinstance(one, ast.Name)}

    def _decides(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Compare):
            by_value = any(isinstance(op, (ast.Eq, ast.NotEq, ast.In, ast.NotIn)) for op in node.ops)
            return by_value and any(self._is_text(one) for one in (node.left, *node.comparators))
        if not isinstance(node, ast.Call):
            return False
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        if isinstance(node.func, ast.Attribute):
            if node.func.attr in INSPECTING and self._is_text(node.func.value):
                return True
            return node.func.attr in MATCHING and any(self._is_text(one) for one in given)
        return self._is_inspected_by(node)

    def _is_inspected_by(self, call: ast.Call) -> bool:
        """Return whether a text goes to a function of the file that inspects the argument it is given as."""
        function = self.functions.get(last_name(call.func))
        if function is None:
            return False
        names = [argument.arg for argument in arguments_of(function)]
        taken = {name for name, value in zip(names, call.args, strict=False) if self._is_text(value)}
        taken |= {keyword.arg for keyword in call.keywords if keyword.arg and self._is_text(keyword.value)}
        return bool(taken) and bool(_Texts(set(), {}, frozenset(taken)).inspected(function))

    def _is_text(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Name):
            return node.id in self.names
        if isinstance(node, ast.Attribute):
            return node.attr == "args" and self._is_exception(node.value)
        if isinstance(node, ast.Subscript):
            return self._is_text(node.value)
        if isinstance(node, ast.JoinedStr):
            values = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
            return any(self._is_text(value) or self._is_exception(value) for value in values) and len(node.values) == 1
        if not isinstance(node, ast.Call):
            return False
        if isinstance(node.func, ast.Name) and node.func.id in ("str", "repr") and node.args:
            return self._is_exception(node.args[0])
        if isinstance(node.func, ast.Attribute):
            if node.func.attr == "join":
                return any(self._is_text(one) for one in node.args)
            return node.func.attr in KEEPS_TEXT and self._is_text(node.func.value)
        return False

    def _is_exception(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and node.attr in ("__cause__", "__context__"):
            return self._is_exception(node.value)
        return isinstance(node, ast.Name) and node.id in self.exceptions


def _scopes(tree: ast.Module) -> list[ast.AST]:
    """Return the module's functions and methods, a nested one with its outer one, and the rest as the module."""
    methods = [one for node in tree.body if isinstance(node, ast.ClassDef) for one in node.body]
    return [tree, *(one for one in (*tree.body, *methods) if isinstance(one, Function))]


def _inside(scope: ast.AST) -> list[ast.AST]:
    if not isinstance(scope, ast.Module):
        return list(ast.walk(scope))
    loose = [node for node in scope.body if not isinstance(node, Definition)]
    return [inner for node in loose for inner in ast.walk(node)]


def _exceptions(scope: ast.AST) -> set[str]:
    """Return the names that are bound to an exception: by `except … as`, or a parameter annotated so."""
    found = set()
    for node in _inside(scope):
        if isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
        elif isinstance(node, ast.arg) and node.annotation is not None:
            annotation = evaluated(node.annotation)
            names = {last_name(one) for one in ast.walk(annotation)} if annotation is not None else set()
            if any(name.endswith(("Error", "Exception")) for name in names) and not names & {"type", "Type"}:
                found.add(node.arg)
    return found


def _walk(node: ast.AST) -> str:
    """Return the call by which a node walks a model, or ""."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return ""
    name, owner = node.func.attr, node.func.value
    if name in ("named_modules", "modules"):
        return f"{name}()"
    is_table = isinstance(owner, ast.Attribute) and owner.attr == "_modules"
    return f"_modules.{name}()" if is_table and name in ("items", "values") else ""


def _is_context_variable(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = node.func.value if isinstance(node.func, ast.Subscript) else node.func
    return last_name(called) == "ContextVar"


def _table_written(node: ast.AST) -> str:
    """Return the table of the interpreter that a node writes to, or ""."""
    if isinstance(node, ast.Attribute) and node.attr == "meta_path" and last_name(node.value) == "sys":
        return "sys.meta_path"
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)) and _is_modules(node.value):
        return "sys.modules"
    if isinstance(node, ast.Attribute) and node.attr in ("setdefault", "update", "pop") and _is_modules(node.value):
        return "sys.modules"
    return ""


def _is_modules(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "modules" and last_name(node.value) == "sys"


def _methods(node: ast.ClassDef, by_name: Mapping[str, ast.ClassDef] = MappingProxyType({})) -> set[str]:
    """Return the methods of a class, with those of its bases that `by_name` holds; the protocol has none to inherit."""
    found = {one.name for one in node.body if isinstance(one, Function)}
    for base in map(last_name, node.bases):
        if base in by_name and base not in (PROTOCOL, node.name):
            found |= _methods(by_name[base], by_name)
    return found


def _is_abstract(node: ast.ClassDef) -> bool:
    """Return whether a class leaves methods to its subclasses: abstract ones, or ones that only raise NotImplementedError."""
    for one in node.body:
        if isinstance(one, Function):
            if any(last_name(item) == "abstractmethod" for item in one.decorator_list):
                return True
            if isinstance(one.body[-1], ast.Raise) and last_name(one.body[-1].exc) == "NotImplementedError":
                return True
    return False


def _imports_ctypes(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] == "ctypes" for alias in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ctypes"


def _unchecked_addresses(path: str, function: Function) -> Iterator[Breach]:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    for call in calls:
        if last_name(call.func) != "data_ptr":
            continue
        before = [node for node in ast.walk(function) if getattr(node, "lineno", call.lineno) < call.lineno]
        compared = {node.attr for node in before if isinstance(node, ast.Attribute)}
        is_gateway = function.name in GATEWAY and set(CHECKED) <= compared
        is_checked = any(isinstance(node, ast.Call) and last_name(node.func) in GATEWAY for node in before)
        if not is_gateway and not is_checked:
            message = f"{function.name} reads data_ptr() before the gateway has checked dtype, shape and layout"
            yield Breach(path, function.name, message, call.lineno)


def _either(homes: tuple[str, ...]) -> str:
    return " and ".join(homes)
