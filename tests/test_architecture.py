"""The house rules that a machine can check, read from the source of lorakit with `ast`; nothing of lorakit is imported.

Every check takes {path below src/lorakit: source text} and returns sentences about breaches, so that the lower half of
this file can hand each of them a small bad house, which it must refuse, and a good one, which it must pass.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "lorakit"
Sources = dict[str, str]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

FLOORS = {
    "__init__": -2,
    "errors": -1,
    "allocator": 0,
    "durable": 0,
    "machine": 0,
    "config": 1,
    "default_targets": 1,
    "targets": 2,
}
FLOORS |= {"plan": 3, "report": 3, "ops": 3, "core": 4, "hub": 5, "data": 6, "speed": 6, "generate": 6, "peft": 6}
FLOORS |= {"train": 7, "serve": 7, "cli": 8, "__main__": 9}
TORCH_FREE = {
    "__init__",
    "__main__",
    "errors",
    "allocator",
    "durable",
    "machine",
    "config",
    "default_targets",
    "targets",
    "plan",
    "report",
}
LOWEST = {
    "torch": 0,
    "safetensors": 0,
    "numpy": 5,
    "pydantic": 5,
}  # packages without one door: the lowest floor for each
DOORS = {  # third-party package -> the files or folders that may import it
    "transformers": ("hub",),
    "tokenizers": ("hub",),
    "huggingface_hub": ("hub",),
    "gguf": ("hub",),
    "bitsandbytes": ("core/bases/bitsandbytes.py",),
    "torchao": ("core/bases/torchao.py",),
    "hqq": ("core/bases/hqq.py",),
    "matplotlib": ("report/plots.py",),
    "triton": ("ops/kernels/triton",),
    "cyclopts": ("cli",),
    "rich": ("train/progress.py", "cli"),
    "yaml": ("train/sources.py", "cli"),
}
KERNELS = "ops/kernels/triton/"  # what a kernel takes are pointers, sizes and constants, and no object can hold them
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_ARGUMENTS = 400, 60, 7
BANNED_STEMS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base"}
SHAPE = re.compile(r"\((?:[^(),\n]+,)+[^(),\n]*\)|\(\)|\bany shape\b|\bscalar\b", re.IGNORECASE)
CONTAINERS = {"dict", "Mapping", "MutableMapping", "list", "Sequence", "Iterable", "Iterator", "Callable", "Collection"}
CONTAINERS |= {"Generator", "AbstractContextManager", "Literal"}


def floor_breaches(sources: Sources) -> Iterator[str]:
    """Imports that go up, sideways, or through the table of lazy names."""
    for path, tree in _parsed(sources):
        part = _part(path)
        if part not in FLOORS:
            yield f"{path}: the part {part!r} has no floor"
            continue
        for target, names, _ in _imports(path, tree):
            if target == "lorakit":
                lazy = [name for name in names if name != "__version__" and name not in FLOORS]
                yield from (f"{path}: {name} is imported from lorakit, not from where it lives" for name in lazy)
            for other in _parts_of(target, names):
                if other != part and FLOORS.get(other, 99) >= FLOORS[part]:
                    yield f"{path}: {part} (floor {FLOORS[part]}) imports {other} (floor {FLOORS.get(other)})"


def door_breaches(sources: Sources) -> Iterator[str]:
    """Third-party packages imported elsewhere than through their door."""
    for path, tree in _parsed(sources):
        for target, _, _ in _imports(path, tree):
            package = target.split(".")[0]
            if package == "lorakit" or package in sys.stdlib_module_names:
                continue
            if package in LOWEST:
                allowed = FLOORS.get(_part(path), -2) >= LOWEST[package] and (
                    package not in ("torch", "safetensors") or _part(path) not in TORCH_FREE
                )
            else:
                allowed = any(
                    path in (door, f"{door}.py") or path.startswith(f"{door}/") for door in DOORS.get(package, ())
                )
            if not allowed:
                yield f"{path}: {package} is imported outside its door"


def import_cycles(sources: Sources) -> Iterator[str]:
    """Rings of modules that import one another; imports for type checkers alone do not count."""
    modules = {_module(path) for path in sources}
    edges: dict[str, set[str]] = {}
    for path, tree in _parsed(sources):
        found = edges.setdefault(_module(path), set())
        for target, names, typing_only in _imports(path, tree):
            if not typing_only:
                inner = {f"{target}.{name}" for name in names} & modules
                found |= inner or ({target} & modules)
    seen: set[str] = set()
    for start in sorted(edges):
        ring = _ring(start, edges, [], seen)
        if ring:
            yield " -> ".join(ring)
            return


def oversized(sources: Sources) -> Iterator[str]:
    """Files, functions and argument lists past their caps."""
    for path, tree in _parsed(sources):
        lines = sources[path].count("\n")
        if lines > MAX_FILE_LINES:
            yield f"{path}: {lines} lines, the cap is {MAX_FILE_LINES}"
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            doc = node.body[0] if ast.get_docstring(node) is not None else None
            length = _lines(node) - (_lines(doc) if doc else 0)
            if length > MAX_FUNCTION_LINES:
                yield f"{path}: {node.name} has {length} lines, the cap is {MAX_FUNCTION_LINES}"
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(arguments) - (arguments[:1] in (["self"], ["cls"]))
            if count > MAX_ARGUMENTS and _part(path) != "peft" and not path.startswith(KERNELS):
                yield f"{path}: {node.name} takes {count} arguments, the cap is {MAX_ARGUMENTS}"


def undocumented(sources: Sources) -> Iterator[str]:
    """Modules and public names without a docstring."""
    for path, tree in _parsed(sources):
        if sources[path].strip() and not ast.get_docstring(tree):
            yield f"{path}: the module has no docstring"
        for name, node in _public(tree):
            if not ast.get_docstring(node):
                yield f"{path}: {name} has no docstring"


def shapeless(sources: Sources) -> Iterator[str]:
    """Public functions over tensors whose docstring states no shape such as (tokens, rank)."""
    for path, tree in _parsed(sources):
        for name, node in _public(tree):
            if isinstance(node, ast.ClassDef):
                continue
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg)
            annotations = [argument.annotation for argument in arguments if argument] + [node.returns]
            if any(_holds_tensor(item) for item in annotations) and not SHAPE.search(ast.get_docstring(node) or ""):
                yield f"{path}: {name} takes or returns a Tensor and states no shape"


def unnamed_errors(sources: Sources) -> Iterator[str]:
    """Public functions that raise and whose `Raises:` section does not name what."""
    for path, tree in _parsed(sources):
        for name, node in _public(tree):
            if isinstance(node, ast.ClassDef):
                continue
            raised = {_last_name(item.exc) for item in _own_nodes(node) if isinstance(item, ast.Raise) and item.exc}
            section = (ast.get_docstring(node) or "").partition("Raises:")[2]
            for error in sorted(error for error in raised if error[:1].isupper()):
                if not re.search(rf"\b{error}\b", section):
                    yield f"{path}: {name} raises {error} and its Raises: section does not say so"


def misnamed(sources: Sources) -> Iterator[str]:
    """Files whose name says nothing, and names of a package's face that are also the name of a module beside it."""
    for path, tree in _parsed(sources):
        if Path(path).stem in BANNED_STEMS:
            yield f"{path}: a file's name says what is in it"
        if Path(path).name != "__init__.py":
            continue
        folder = _module(path)
        beside = {_module(other).rpartition(".")[2] for other in sources if _module(other).rpartition(".")[0] == folder}
        defined = {node.name for node in tree.body if isinstance(node, Definition)}
        defined |= {n for target, names, _ in _imports(path, tree) if target not in ("lorakit", folder) for n in names}
        yield from (f"{path}: {name} is also the name of a module" for name in sorted(defined & beside))


CHECKS: list[Callable[[Sources], Iterator[str]]] = [
    floor_breaches,
    door_breaches,
    import_cycles,
    oversized,
    undocumented,
    shapeless,
    unnamed_errors,
    misnamed,
]


def _parsed(sources: Sources) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(sources):
        yield path, ast.parse(sources[path], path)


def _part(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def _module(path: str) -> str:
    return ".".join(["lorakit", *path.removesuffix(".py").removesuffix("__init__").strip("/").split("/")]).rstrip(".")


def _imports(path: str, tree: ast.Module) -> Iterator[tuple[str, list[str], bool]]:
    """Each import as (module, names taken from it, for type checkers alone)."""
    package = _module(path) if path.endswith("__init__.py") else _module(path).rpartition(".")[0]
    guarded = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    typing_only = {id(inner) for node in guarded for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, [], id(node) in typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*above, *([node.module] if node.module else [])])
            yield target, [alias.name for alias in node.names], id(node) in typing_only


def _parts_of(target: str, names: list[str]) -> list[str]:
    words = target.split(".")
    if words[0] != "lorakit":
        return []
    return words[1:2] or [name for name in names if name in FLOORS]


def _ring(module: str, edges: dict[str, set[str]], trail: list[str], seen: set[str]) -> list[str]:
    if module in trail:
        return [*trail[trail.index(module) :], module]
    if module in seen:
        return []
    for other in sorted(edges.get(module, ())):
        ring = _ring(other, edges, [*trail, module], seen)
        if ring:
            return ring
    seen.add(module)
    return []


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _public(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public classes, functions and methods; a setter and an overload are documented by their other half."""
    for child in node.body:
        if not isinstance(child, Definition) or child.name.startswith("_"):
            continue
        if any(_last_name(item) in ("setter", "deleter", "overload") for item in child.decorator_list):
            continue
        yield prefix + child.name, child
        if isinstance(child, ast.ClassDef):
            yield from _public(child, f"{prefix}{child.name}.")


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What is in a function, without the functions and classes defined in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Definition):
            yield child
            yield from _own_nodes(child)


def _last_name(node: ast.AST | None) -> str:
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _holds_tensor(annotation: ast.AST | None) -> bool:
    """Whether an annotation is a tensor, perhaps optional or in a tuple; a container of many has no one shape."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _holds_tensor(ast.parse(annotation.value, mode="eval").body)
    if isinstance(annotation, ast.Subscript) and _last_name(annotation.value) in CONTAINERS:
        return False
    if isinstance(annotation, ast.Subscript) and _last_name(annotation.value) == "Annotated":
        return _holds_tensor(next(ast.iter_child_nodes(annotation.slice), None))
    if isinstance(annotation, (ast.Name, ast.Attribute)):
        return _last_name(annotation) == "Tensor"
    return annotation is not None and any(_holds_tensor(child) for child in ast.iter_child_nodes(annotation))


# ---- the house as it stands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house() -> Sources:
    paths = sorted(path for path in PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in paths}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_the_rule(check: Callable[[Sources], Iterator[str]], house: Sources) -> None:
    breaches = list(check(house))
    assert not breaches, "\n".join(breaches)


def test_the_public_names_are_no_modules(house: Sources) -> None:
    tables = [node.value for node in ast.parse(house["__init__.py"]).body if isinstance(node, ast.Assign)]
    homes = next(ast.literal_eval(value) for value in tables if isinstance(value, ast.Dict))
    assert not set(homes) & set(FLOORS)
    assert set(homes.values()) <= set(FLOORS)


# ---- the checks can fail, and do not cry wolf -------------------------------------------------------------------

DOC = '"""Doc."""\n'
TALL = "def f():\n" + "    x = 1\n" * 61
BAD = [
    (floor_breaches, {"plan/a.py": "import lorakit.core"}, "plan (floor 3) imports core (floor 4)"),
    (floor_breaches, {"plan/a.py": "from lorakit import core"}, "plan (floor 3) imports core"),
    (floor_breaches, {"data/a.py": "from ..peft import x"}, "data (floor 6) imports peft (floor 6)"),
    (floor_breaches, {"core/a.py": "def f():\n    from lorakit.hub import x"}, "core (floor 4) imports hub"),
    (floor_breaches, {"train/a.py": "from lorakit import LoraConfig"}, "LoraConfig is imported from lorakit"),
    (floor_breaches, {"__init__.py": "from lorakit.errors import nearest"}, "__init__ (floor -2) imports errors"),
    (floor_breaches, {"attic/a.py": "x = 1"}, "'attic' has no floor"),
    (door_breaches, {"train/a.py": "import transformers.models"}, "transformers is imported outside"),
    (door_breaches, {"report/tables.py": "import matplotlib.pyplot as plt"}, "matplotlib is imported outside"),
    (door_breaches, {"plan/a.py": "import torch"}, "torch is imported outside"),
    (door_breaches, {"core/a.py": "import numpy as np"}, "numpy is imported outside"),
    (door_breaches, {"data/a.py": "def f():\n    import pandas"}, "pandas is imported outside"),
    (
        import_cycles,
        {"a.py": "from lorakit import b", "b.py": "import lorakit.a"},
        "lorakit.a -> lorakit.b -> lorakit.a",
    ),
    (
        import_cycles,
        {"a/b.py": "from .c import x", "a/c.py": "def f():\n    from . import b"},
        "lorakit.a.b -> lorakit.a.c",
    ),
    (oversized, {"a.py": "x = 1\n" * 401}, "401 lines"),
    (oversized, {"a.py": TALL}, "f has 62 lines"),
    (oversized, {"a.py": "class A:\n    def f(self, a, b, c, d, *, e, f, g, h): ..."}, "f takes 8 arguments"),
    (undocumented, {"a.py": "x = 1"}, "the module has no docstring"),
    (undocumented, {"a.py": DOC + "def f(): ..."}, "f has no docstring"),
    (undocumented, {"a.py": DOC + "class A:\n    'Doc.'\n    def f(self): ..."}, "A.f has no docstring"),
    (shapeless, {"a.py": "def f(x: torch.Tensor | None): 'Doc of x (a tensor).'"}, "f takes or returns a Tensor"),
    (shapeless, {"a.py": "def f() -> 'tuple[int, Tensor]': 'Doc.'"}, "f takes or returns a Tensor"),
    (unnamed_errors, {"a.py": "def f():\n    'Doc.'\n    raise DataError('x')"}, "f raises DataError"),
    (unnamed_errors, {"a.py": "def f():\n    'Raises:\\n RunError: x.'\n    raise errors.DataError('x')"}, "DataError"),
    (misnamed, {"core/utils.py": ""}, "a file's name says what is in it"),
    (
        misnamed,
        {"core/__init__.py": "from lorakit.core.merging.merging import merge", "core/merge.py": ""},
        "merge is also",
    ),
]
GOOD = [
    (floor_breaches, {"train/a.py": "from lorakit import __version__, core\nfrom .loop import x"}),
    (
        door_breaches,
        {"hub/a.py": "import transformers", "report/plots.py": "import matplotlib", "ops/a.py": "import torch"},
    ),
    (door_breaches, {"hub.py": "import gguf, json", "data/a.py": "import numpy"}),
    (import_cycles, {"a.py": "import lorakit.b", "b.py": "if TYPE_CHECKING:\n    import lorakit.a"}),
    (import_cycles, {"a/__init__.py": "from lorakit.a.b import x", "a/b.py": "from lorakit.a import c", "a/c.py": ""}),
    (
        oversized,
        {"a.py": "def f():\n    '''Doc." + "\n" * 70 + "'''", "peft/a.py": "def f(a, b, c, d, e, f, g, h): ..."},
    ),
    (undocumented, {"a.py": DOC + "def _f(): ...\nclass _A:\n    def f(self): ...", "b.py": ""}),
    (shapeless, {"a.py": "def f(x: Annotated[int, Parameter(help='A Tensor of no code')]): 'Doc.'"}),
    (shapeless, {"a.py": "def f(x: Tensor) -> Tensor: 'Rows, (tokens, rank).'\ndef g(x: dict[str, Tensor]): 'Doc.'"}),
    (
        unnamed_errors,
        {
            "a.py": "def f():\n    'Raises:\\n DataError: x.'\n    try: ...\n    except E as e: raise\n    raise DataError"
        },
    ),
    (
        misnamed,
        {
            "core/__init__.py": "from lorakit.core import merging\nfrom lorakit.core.merging.merging import merge",
            "core/merging/merging.py": "",
        },
    ),
]


@pytest.mark.parametrize(("check", "sources", "said"), BAD)
def test_a_check_catches_a_bad_house(check: Callable[[Sources], Iterator[str]], sources: Sources, said: str) -> None:
    assert said in "\n".join(check(sources))


@pytest.mark.parametrize(("check", "sources"), GOOD)
def test_a_check_passes_a_good_house(check: Callable[[Sources], Iterator[str]], sources: Sources) -> None:
    assert list(check(sources)) == []


def test_every_check_was_seen_to_fail() -> None:
    assert {check for check, _, _ in BAD} == set(CHECKS) == {check for check, _ in GOOD}
