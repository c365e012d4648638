"""Rules that neither import-linter (`.importlinter`), ruff nor mypy (`pyproject.toml`) has.

A rule takes {path below src/lorakit: source}, with the tests as "tests/…" without text, and yields breaches. Nothing of
lorakit is imported.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import grimp

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "lorakit"
Sources = dict[str, str]
Tree = tuple[ast.AST, ...]  # every node of a file
Found = Iterator[tuple[ast.AST, str, str]]  # a node, what breaks the rule there, and a message
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


class Breach(NamedTuple):
    """A violation: the file below src/lorakit, what breaks the rule there (for the list), the line, what is wrong."""

    path: str
    subject: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


Rule = Callable[[Sources], Iterator[Breach]]
RULES: list[Rule] = []


def package_sources() -> Sources:
    """Return the sources of the package, and the paths of the tests without their text."""
    sources = {p.relative_to(PACKAGE).as_posix(): p.read_text("utf-8") for p in PACKAGE.rglob("*.py")}
    return sources | {p.relative_to(ROOT).as_posix(): "" for p in (ROOT / "tests").rglob("*.py")}


@functools.cache
def nodes(path: str, source: str) -> Tree:
    """Return every node of a file; the rules share the result."""
    return tuple(ast.walk(ast.parse(source, path)))


def within(path: str, homes: Iterable[str]) -> bool:
    """Return whether a file is one of `homes`, or in one; each is a directory or a file."""
    return path in homes or path.startswith(tuple(f"{home}/" for home in homes))


def of_nodes(rule: Callable[..., Found]) -> Rule:
    """Make a rule from a function of one file."""

    @functools.wraps(rule)
    def of_files(sources: Sources) -> Iterator[Breach]:
        for path in sorted(path for path in sources if not path.startswith("tests/")):
            for node, subject, message in rule(path, nodes(path, sources[path]), sources):
                yield Breach(path, subject, getattr(node, "lineno", 1), message)

    RULES.append(of_files)
    return of_files


def last_name(node: ast.AST | None) -> str:
    """Return the last name of an expression: "c" for a.b.c and for a.b.c(…), "" if it has none."""
    if isinstance(node, ast.Call):
        return last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def string(node: ast.AST | None) -> str:
    """Return the value of a string, also the constant beginning of an f-string, or ""."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return string(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def module_of(path: str) -> str:
    """Return the dotted name of a file below src/lorakit."""
    return f"lorakit/{path}".removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# --- imports ------------------------------------------------------------------------------------------------------

NAME_TABLES = ("__init__.py", "train/__init__.py", "peft/paths.py")  # lazy public names, PEFT's module paths


@of_nodes
def imports_by_name(path: str, tree: Tree, sources: Sources) -> Found:
    """Find modules of lorakit imported by a string, which import-linter does not see."""
    texts = {last_name(n.targets[0]): string(n.value) for n in tree if isinstance(n, ast.Assign) and string(n.value)}
    for node in tree:
        if isinstance(node, ast.Call) and last_name(node) in ("import_module", "__import__") and node.args:
            first = node.args[0].left if isinstance(node.args[0], ast.BinOp) else node.args[0]
            start = first.values[0] if isinstance(first, ast.JoinedStr) and first.values else first
            name = last_name(start.value if isinstance(start, ast.FormattedValue) else start)
            target = string(first) or texts.get(name, "")
            if re.match(r"lorakit(\.|$)", target) and path not in NAME_TABLES:
                yield node, target, f"import_module of {target}: import it by a statement"


@of_nodes
def lazy_names(path: str, tree: Tree, sources: Sources) -> Found:
    """Find public names imported from lorakit's lazy table instead of from their module."""
    for node in tree:
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.ImportFrom) and node.module == "lorakit" else []
        ):
            if name != "__version__" and not {f"{name}.py", f"{name}/__init__.py"} & sources.keys():
                yield node, name, f"{name} is imported from lorakit, not from its module"


# --- names --------------------------------------------------------------------------------------------------------

TYPED = {"layer", "module", "model", "state", "route", "factor", "slot", "kind", "index"}
ENTRIES = ("core/kinds", "core/variants")  # calls of Kind, Variant and replace in them make registry entries
FIELDS = {"use_dora": "core/variants/dora.py", "alora_invocation_tokens": "core/variants/alora.py"}
NAME_HOMES = ("choices.py", "config", "peft")
FIELD_HOMES = (
    "config",
    "peft",
    "cli",
    *(f"export/{name}.py" for name in ("facts", "conditions", "rules")),  # other programs read the fields
    *(f"train/settings/{name}.py" for name in ("data_and_adapter", "defaults", "conversion/__init__")),
)
BANNED_STEMS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}


@of_nodes
def loosely_typed(path: str, tree: Tree, sources: Sources) -> Found:
    """Find parameters and attributes with a central name (layer, model, state …) that are annotated as Any.

    ruff's ANN401 rejects every parameter that is Any, also where Any is right.
    """
    attributes = {id(n) for c in tree if isinstance(c, ast.ClassDef) for n in c.body if isinstance(n, ast.AnnAssign)}
    for node in tree:
        is_attribute = isinstance(node, ast.AnnAssign) and (id(node) in attributes or "." in ast.unparse(node.target))
        if not isinstance(node, ast.arg | ast.AnnAssign) or not (isinstance(node, ast.arg) or is_attribute):
            continue
        name = node.arg if isinstance(node, ast.arg) else last_name(node.target)
        text = ast.unparse(node.annotation) if node.annotation else ""
        while wrapped := re.fullmatch(r"(?:\w+\.)?(?:Optional|Union|ClassVar|Final)\[(.*)\]", text.strip("'")):
            text = wrapped[1]
        if name in TYPED and any(re.fullmatch(r"(typing\.)?Any", one.strip(" '")) for one in re.split(r"[|,]", text)):
            yield node, name, f"{name} is annotated as Any; name its type, or a protocol of what is used of it"


def entries(sources: Sources, keyword: str) -> dict[str, set[str]]:
    """Return {value of this keyword in a registry entry: files of these entries}."""
    found: dict[str, set[str]] = {}
    for path in sources:
        tree = nodes(path, sources[path]) if path.startswith(ENTRIES) else ()
        calls = [node for node in tree if isinstance(node, ast.Call)]
        for given in (k for call in calls if last_name(call) in ("Kind", "Variant", "replace") for k in call.keywords):
            if given.arg == keyword and string(given.value):
                found.setdefault(string(given.value), set()).add(path)
    return found


def decisive(node: ast.AST) -> list[ast.expr]:
    """Return the parts of a node by which code decides: what is compared, members of a collection, keys, cases."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Set | ast.Tuple) or (isinstance(node, ast.List) and isinstance(node.ctx, ast.Load)):
        return node.elts
    if isinstance(node, ast.Dict):
        return [key for key in node.keys if key is not None]
    return [node.slice] if isinstance(node, ast.Subscript) else [node.value] if isinstance(node, ast.MatchValue) else []


@of_nodes
def entry_names(path: str, tree: Tree, sources: Sources) -> Found:
    """Find code that decides by the name of a kind or variant: ==, in, sets, tuples, keys; it reads attributes."""
    public = {id(n.value) for n in tree if isinstance(n, ast.Assign) and last_name(n.targets[0]) == "__all__"}
    names = entries(sources, "name") if not within(path, NAME_HOMES) else {}
    for node in (part for one in tree if id(one) not in public for part in decisive(one)):
        homes = names.get(string(node), set()) if isinstance(node, ast.Constant) else set()
        may_name_variants = within(path, FIELD_HOMES) and all(home.startswith("core/variants") for home in homes)
        if homes and path not in homes and not may_name_variants:
            yield node, repr(string(node)), f"{string(node)!r} names a kind or variant; read an attribute of its entry"
    for node in tree if not within(path, (*NAME_HOMES, *ENTRIES)) else ():
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq | ast.In | ast.NotIn):
            for text in map(ast.unparse, (node.left, *node.comparators)):
                if re.search(r"(\.(kind_name|variant)|\b(kind|variant|[A-Z]{2,})\.name)(\[.*\]|\.get\(.*\))?$", text):
                    yield node, text, f"{text} is compared; read an attribute of the kind or variant instead"


@of_nodes
def variant_fields(path: str, tree: Tree, sources: Sources) -> Found:
    """Find fields of a variant used outside its file, as an attribute, keyword argument or string."""
    homes = FIELDS | {field: min(paths) for field, paths in entries(sources, "field").items()}
    for node in tree if not within(path, FIELD_HOMES) else ():
        name = (node.arg or "") if isinstance(node, ast.keyword) else string(node) or last_name(node)
        name = last_name(node.target) if isinstance(node, ast.AnnAssign) else name
        if path != homes.get(name, path) and not isinstance(node, ast.Call | ast.Name):
            yield node, name, f"{name} belongs to {homes[name]}; read the entry of VARIANTS"


@of_nodes
def misnamed(path: str, tree: Tree, sources: Sources) -> Found:
    """Find files whose name says nothing, and public names of a package that are also the name of a module in it."""
    if Path(path).stem in BANNED_STEMS:
        yield tree[0], "file name", "a file's name says what is in it"
    folder = module_of(path)
    public = {n.name for n in tree if isinstance(n, Definition)}
    public |= {
        a.name for n in tree if isinstance(n, ast.ImportFrom) and n.module not in ("lorakit", folder) for a in n.names
    }
    for name in sorted(public) if path.endswith("__init__.py") else ():
        if f"{folder}.{name}" in map(module_of, sources):
            yield tree[0], name, f"{name} is also the name of a module"


# --- practices ----------------------------------------------------------------------------------------------------

INSPECTING = re.compile(r"starts|ends|removeprefix|r?find|r?index|r?partition|search|(full)?match|finditer|subn?")
READS_STREAM = {"flush", "fileno", "isatty", "encoding"}  # attributes of a stream that write nothing
TAKES_STREAM = {"colored", "is_animated", "screen_width", "progress_for", "write_line", "redirect_stdout", "cast"}
CHECKED = {"dtype", "shape", "is_contiguous"}  # what the gateway compares before it takes an address
GATEWAY = {"pointer", "_pointer", "optional", "_optional"}


@of_nodes
def exception_texts(path: str, tree: Tree, sources: Sources) -> Found:
    """Find code that decides by the text of an exception (`except … as`, or a parameter); it has classes and fields."""
    functions = [node for node in tree if isinstance(node, Function)]
    inner = {id(node) for function in functions for node in ast.walk(function)}
    for scope in [*functions, [node for node in tree if id(node) not in inner]]:
        inside = list(ast.walk(scope)) if isinstance(scope, ast.AST) else scope
        caught = {n.name for n in inside if isinstance(n, ast.ExceptHandler) and n.name}
        caught |= {n.arg for n in inside if isinstance(n, ast.arg) and _is_exception(n.annotation)}
        texts = set[str]()
        for _ in range(2):  # a name may be bound to another one that is bound further down
            for node in inside:
                if isinstance(node, ast.Assign | ast.NamedExpr) and _has_text(node.value, caught, texts):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    texts |= {n.id for one in targets for n in ast.walk(one) if isinstance(n, ast.Name)}
        for node in inside:
            if _decides(node) and _has_text(node, caught, texts):
                name = scope.name if isinstance(scope, Function) else "module"
                yield node, name, f"{name} reads the text of an exception ({ast.unparse(node)[:60]}); use its class"


def _is_exception(annotation: ast.AST | None) -> bool:
    text = ast.unparse(annotation) if annotation else ""
    return bool(re.search(r"(Error|Exception)\b", text)) and not re.search(r"\b[tT]ype\[", text)


def _decides(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):
        return isinstance(node.ops[0], ast.Eq | ast.NotEq | ast.In | ast.NotIn)
    called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
    return bool(INSPECTING.fullmatch(called.removesuffix("with")))


def _has_text(tree: ast.AST, caught: set[str], texts: set[str]) -> bool:
    """Return whether an expression reads str(e), repr(e), f"{e}" or e.args, or a name that holds one."""
    for node in ast.walk(tree):
        of = (
            node.args[0]
            if isinstance(node, ast.Call) and last_name(node.func) in ("str", "repr") and node.args
            else None
        )
        if isinstance(node, ast.FormattedValue) or (isinstance(node, ast.Attribute) and node.attr == "args"):
            of = node.value
        of = of.value if isinstance(of, ast.Attribute) and of.attr in ("__cause__", "__context__") else of
        if (isinstance(of, ast.Name) and of.id in caught) or (isinstance(node, ast.Name) and node.id in texts):
            return True
    return False


@of_nodes
def fieldless(path: str, tree: Tree, sources: Sources) -> Found:
    """Find errors of lorakit that are raised with a message alone, without a field such as `what` or `where`."""
    errors = {n.name for n in nodes("errors.py", sources.get("errors.py", "")) if isinstance(n, ast.ClassDef)}
    for call in (node.exc for node in tree if isinstance(node, ast.Raise)):
        if isinstance(call, ast.Call) and call.args and not call.keywords and last_name(call) in errors:
            yield call, last_name(call), f"{last_name(call)} carries a message alone; add what, where, field or allowed"


@of_nodes
def walks(path: str, tree: Tree, sources: Sources) -> Found:
    """Find walks over a model; AdapterIndex is the one walk of a public call."""
    for node in tree if path != "core/model/index.py" else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            is_table = last_name(node.func.value) == "_modules" and name in ("items", "values")
            if is_table or name in ("named_modules", "modules"):
                call = f"_modules.{name}()" if is_table else f"{name}()"
                yield node, call, f"{call} walks the model; take what is needed from the AdapterIndex of the call"


@of_nodes
def module_table(path: str, tree: Tree, sources: Sources) -> Found:
    """Find writes to sys.modules; ruff could only forbid reading it too."""
    for node in tree if path != "peft/paths.py" else ():
        writes = isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
        writes |= isinstance(node, ast.Attribute) and node.attr in ("setdefault", "update", "pop")
        if writes and isinstance(node, ast.Subscript | ast.Attribute) and ast.unparse(node.value) == "sys.modules":
            yield node, "sys.modules", "only peft/paths.py writes to sys.modules"


@of_nodes
def unchecked_addresses(path: str, tree: Tree, sources: Sources) -> Found:
    """Find addresses of tensors in the C kernels that the gateway has not checked."""
    in_c = within(path, ["ops/kernels"]) and not within(path, ["ops/kernels/triton"])
    for function in (node for node in tree if in_c and isinstance(node, Function)):
        inside = list(ast.walk(function))
        for call in (node for node in inside if isinstance(node, ast.Call) and last_name(node) == "data_ptr"):
            before = [node for node in inside if getattr(node, "lineno", call.lineno) < call.lineno]
            compares = {node.attr for node in before if isinstance(node, ast.Attribute)} >= CHECKED
            passes = any(isinstance(node, ast.Call) and last_name(node) in GATEWAY for node in before)
            if not passes and not (function.name in GATEWAY and compares):
                yield call, function.name, f"{function.name} reads data_ptr() before the gateway has checked the tensor"


@of_nodes
def writers(path: str, tree: Tree, sources: Sources) -> Found:
    """Find streams of sys and consoles of rich outside terminal.py, the one writer to terminals; T20 finds print."""
    allowed = {id(node.value) for node in tree if isinstance(node, ast.Attribute) and node.attr in READS_STREAM}
    for node in (node for node in tree if isinstance(node, ast.Call) and last_name(node) in TAKES_STREAM):
        allowed |= {id(part) for one in (*node.args, *node.keywords) for part in ast.walk(one)}
    for node in tree if path not in ("terminal.py", "startup.py") else ():
        what = ast.unparse(node).replace("__", "") if isinstance(node, ast.Attribute) else ""
        if isinstance(node, ast.Call) and last_name(node) in ("Console", "Live", "Status", "Bar"):
            is_ours = last_name(node) != "Console" and any(keyword.arg == "console" for keyword in node.keywords)
            what = "" if is_ours else last_name(node)
        if what in ("sys.stdout", "sys.stderr", "Console", "Live", "Status", "Bar") and id(node) not in allowed:
            yield node, what, f"{what} outside terminal.py; write with lorakit.terminal or lorakit.cli.console"


# --- sizes --------------------------------------------------------------------------------------------------------

MAX_FUNCTION_LINES, MIN_MODULE_LINES = 60, 60


@of_nodes
def long_functions(path: str, tree: Tree, sources: Sources) -> Found:
    """Find functions with more lines of code than the limit; ruff counts statements and branches only."""
    for node in (node for node in tree if isinstance(node, Function)):
        docstring = node.body[:1] if ast.get_docstring(node) else []
        lines = (node.end_lineno or 0) - node.lineno + 1
        lines -= sum((one.end_lineno or 0) - one.lineno + 1 for one in docstring)
        if lines > MAX_FUNCTION_LINES:
            yield node, node.name, f"{node.name} has {lines} lines, the limit is {MAX_FUNCTION_LINES}"


def small_modules(graph: grimp.ImportGraph, sources: Sources) -> Iterator[Breach]:
    """Find modules of a few lines that one other module imports: they belong in it. Registry entries are left out."""
    homes = (*ENTRIES, "core/inits", "core/quantization")
    for path, text in sources.items():
        lines = text.count("\n")
        if lines < MIN_MODULE_LINES and not path.endswith("__init__.py") and not within(path, (*homes, "tests")):
            importers = graph.find_modules_that_directly_import(module_of(path))
            if len(importers) == 1:
                yield Breach(path, "single importer", 1, f"{lines} lines, imported by {min(importers)} only")


# --- docstrings and tests -----------------------------------------------------------------------------------------

SHAPE = re.compile(r"\((?:[^(),\n]+,)+[^(),\n]*\)|\(\)|\bany shape\b|\bscalar\b", re.IGNORECASE)
ONE_TENSOR = re.compile(r"(?:\w+\.)*Tensor")
MANY = re.compile(
    r"\w*(?:[dD]ict|Mapping|[lL]ist|Sequence|Iterable|Iterator|Callable|Collection|Generator|Manager|Literal)\["
)
DOTTED = re.compile(r"(?<![\w./])lorakit(?:\.\w+)+")
FILE = re.compile(r"(?<![\w./<*-])(?:\w+/)+\w+\.py\b")


def public_functions(tree: Tree) -> Iterator[Function]:
    """Yield the public functions and methods of public classes of a file."""
    waiting = [tree[0]]
    while waiting:
        for node in (child for child in waiting.pop().body if isinstance(child, Definition)):  # type: ignore[attr-defined]
            is_half = any(last_name(item) in ("setter", "deleter", "overload") for item in node.decorator_list)
            if not node.name.startswith("_") and not is_half:
                waiting += [node] if isinstance(node, ast.ClassDef) else []
                yield from [node] if isinstance(node, Function) else []


def _is_tensor(annotation: ast.AST | None) -> bool:
    """Return whether an annotation is a tensor, perhaps optional or in a tuple; containers of many have no one shape."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    text = ast.unparse(annotation) if annotation else ""
    if isinstance(annotation, ast.Subscript) and last_name(annotation.value) == "Annotated":
        return _is_tensor(annotation.slice.elts[0])  # type: ignore[attr-defined]
    if MANY.match(text) or not isinstance(annotation, ast.Subscript | ast.BinOp | ast.Tuple):
        return bool(ONE_TENSOR.fullmatch(text))
    return any(_is_tensor(child) for child in ast.iter_child_nodes(annotation))


@of_nodes
def shapeless(path: str, tree: Tree, sources: Sources) -> Found:
    """Find public functions over tensors whose docstring states no shape such as (tokens, rank)."""
    for node in public_functions(tree):
        taken = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        taken += [node.args.vararg] if node.args.vararg else []
        is_tensor = any(_is_tensor(one) for one in (*(argument.annotation for argument in taken), node.returns))
        if is_tensor and not SHAPE.search(ast.get_docstring(node) or ""):
            yield node, node.name, f"{node.name} takes or returns a Tensor and states no shape"


@of_nodes
def unnamed_errors(path: str, tree: Tree, sources: Sources) -> Found:
    """Find public functions that raise and whose docstring does not name the exception; DOC501 wants `Raises:`."""
    for node in public_functions(tree):
        inner = {id(one) for child in ast.walk(node) if isinstance(child, Definition) and child is not node
                 for one in ast.walk(child)}  # fmt: skip
        raised = {last_name(n.exc) for n in ast.walk(node) if isinstance(n, ast.Raise) and id(n) not in inner}
        text = ast.get_docstring(node) or ""
        for error in sorted(raised):
            if error[:1].isupper() and not re.search(rf"\b{error}\b", text):
                yield node, f"{node.name}: {error}", f"{node.name} raises {error}, and its docstring does not name it"


@functools.cache
def names_of(path: str, source: str) -> frozenset[str]:
    """Return what a module defines, imports, or lists in a string."""
    tree = nodes(path, source)
    named = {
        getattr(n, "asname", "") or getattr(n, "name", "") or last_name(n) for n in tree if not isinstance(n, ast.Call)
    }
    return frozenset(named | {word for n in tree for word in string(n).replace("/", ".").split()})


@of_nodes
def dangling_references(path: str, tree: Tree, sources: Sources) -> Found:
    """Find docstrings that name a module or name of lorakit, or a file of it or its tests, that does not exist."""
    modules = {module_of(one): one for one in sources if not one.startswith("tests/")}
    parts = {"tests", *(one.split("/")[0] for one in sources)}
    for node in (node for node in tree if isinstance(node, ast.Expr) and string(node.value)):
        for name in DOTTED.findall(string(node.value)):
            module = next((m for m in (name.rsplit(".", n)[0] for n in range(name.count(".") + 1)) if m in modules), "")
            rest = name.removeprefix(module).lstrip(".")
            names = names_of(modules[module], sources[modules[module]]) if module else frozenset()
            if rest and name != "lorakit.json" and rest.split(".")[0] not in names:
                yield node, name, f"a docstring names {name}, which does not exist"
        for name in FILE.findall(string(node.value)):
            if name.split("/")[0] in parts and name not in sources:
                yield node, name, f"a docstring names {name}, which does not exist"


def misplaced_tests(sources: Sources) -> Iterator[Breach]:
    """Find files tests/<part>/test_x.py without a module x of that part; test_x_<aspect>.py and folders count too."""
    targets = {path.removesuffix("/__init__.py").removesuffix(".py") for path in sources}
    parts = {target.split("/")[0] for target in targets}
    for path in sorted(path for path in sources if path.startswith("tests/")):
        folder, words = Path(path).parent.relative_to("tests"), Path(path).stem.split("_")
        stems = ["_".join(words[1:count]) for count in range(2, len(words) + 1)]
        tested = {(folder if stem == folder.name else folder / stem).as_posix() for stem in stems}
        if words[0] == "test" and folder.parts[:1] and folder.parts[0] in parts and not targets & tested:
            yield Breach(path, "no module", 1, f"{folder}/{stems[-1]}.py does not exist; name tests after their module")


RULES.append(misplaced_tests)
