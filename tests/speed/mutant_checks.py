"""Check whether an accelerated model follows a mutant.

A mutant of source code is installed in one of two ways. A fake release runs the edited file under the name of the real
module, and the model is built from its classes. A patch replaces one function or method of the real module, as
libraries do that patch transformers.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

import pytest
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from lorakit.speed import accelerate

from .mutant_models import FAMILIES, MOVED, TOLERANCE, Results, difference, noise, results, usual
from .mutants import Mutant, chosen, functions, mutants

HELPERS = (
    "transformers.activations",
    "transformers.integrations.sdpa_attention",
    "transformers.loss.loss_utils",
    "transformers.masking_utils",
    "transformers.pytorch_utils",
)
"""Python modules whose functions are used by the modeling files. They are patched, but have no fake release."""

TABLES: tuple[dict[str, Any], ...] = (
    AttentionInterface._global_mapping,
    AttentionMaskInterface._global_mapping,
    LOSS_MAPPING,
)
"""Tables from which transformers takes functions by name."""


# ---- the mutants of a family


def source_of(module: str) -> tuple[str, str]:
    """Return the path and the text of the file of a Python module."""
    path = importlib.import_module(module).__file__ or ""
    return path, Path(path).read_text()


@functools.cache
def mutants_of(family: str) -> tuple[Mutant, ...]:
    """Return the mutants of a family's modeling file and of its helpers, on lines that the model runs."""
    found = []
    for module, run in lines_run(family).items():
        found += mutants(module, source_of(module)[1], run)
    return tuple(mutant for mutant in found if not mutant.function.endswith("._init_weights"))


def lines_run(family: str) -> dict[str, set[int]]:
    """Return a dict from Python module to the lines that building and running a plain model executes."""
    modules = (FAMILIES[family].module, *HELPERS)
    found: dict[str, set[int]] = {source_of(module)[0]: set() for module in modules}

    def lines(frame: FrameType, event: str, _: object) -> Any:
        found[frame.f_code.co_filename].add(frame.f_lineno)
        return lines

    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: lines if frame.f_code.co_filename in found else None)
    try:
        results(FAMILIES[family].build())
    finally:
        sys.settrace(before)
    return {module: found[source_of(module)[0]] for module in modules}


# ---- installing a mutant


@contextmanager
def released(module: str, source: str, folder: Path) -> Iterator[ModuleType]:
    """Run a text under the name of a module of transformers, as a release with this text would.

    Args:
        module: Dotted name of the Python module.
        source: Text of its file.
        folder: Folder for the file.
    """
    real = importlib.import_module(module)
    path = folder.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    parent, _, name = module.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, made)
        patch.setattr(importlib.import_module(parent), name, made, raising=False)
        spec.loader.exec_module(made)
        yield made
    assert sys.modules[module] is real


@contextmanager
def patched(mutant: Mutant, folder: Path) -> Iterator[ModuleType]:
    """Replace one function or method by its mutant, wherever transformers refers to it."""
    module = importlib.import_module(mutant.module)
    path = folder / f"{mutant.module.rpartition('.')[2]}.py"
    path.write_text(mutant.apply(source_of(mutant.module)[1]))
    node = dict(functions(ast.parse(path.read_text())))[mutant.function]
    local: dict[str, Any] = {}
    exec(_compiled(node, path), vars(module), local)
    owner, _, name = mutant.function.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        if owner:
            patch.setattr(vars(module)[owner], name, local[name])
        else:
            _replace(patch, vars(module)[name], local[name])
        yield module


def _compiled(node: ast.AST, path: Path) -> CodeType:
    return compile(ast.Module([node], []), str(path), "exec")  # type: ignore[list-item]


def _replace(patch: pytest.MonkeyPatch, old: Any, new: Any) -> None:
    """Replace a function in the globals of all modules of transformers and in the tables of functions."""
    modules = [vars(one) for name, one in list(sys.modules.items()) if name.startswith("transformers.")]
    for table in (*modules, *TABLES):
        for name in [name for name, value in list(table.items()) if value is old]:
            patch.setitem(table, name, new)


# ---- what a mutant does

WAYS = ("released before", "patched before", "patched after")
"""Ways to install a mutant: as a fake release or as a patch, before or after the model is accelerated."""

Change = Callable[[Any], AbstractContextManager[Any]]
"""Function that changes a model, or the code that it runs, within a `with` block."""


def order(family: str, way: str, seed: int) -> list[Mutant]:
    """Return the mutants of a family in the order in which they are tried.

    A fake release edits only the modeling file; a patch does not edit `__init__`, which calls `super()`. Half of the
    mutants that are installed before acceleration are hidden from probes.
    """
    found, module = mutants_of(family), FAMILIES[family].module
    if way == WAYS[0]:
        fitting = [mutant for mutant in found if mutant.module == module]
    else:
        fitting = [mutant for mutant in found if not mutant.function.endswith("__init__")]
    found = chosen(fitting, f"{family} {way} {seed}")
    draw = random.Random(seed)
    return [mutant.hidden() if way != WAYS[2] and draw.random() < 0.5 else mutant for mutant in found]


def unseen(family: str, way: str, mutant: Mutant, folder: Path) -> str | None:
    """Return "" if the accelerated model follows a mutant, otherwise what it does instead.

    Returns None if the mutant does not count: with it, the plain model fails, or its results are not finite or not
    different.

    Args:
        family: Name of the family.
        way: How the mutant is installed, one of `WAYS`.
        mutant: The mutant.
        folder: Folder for the edited file.
    """
    usual(family)  # not with the mutant
    if way != WAYS[0]:
        check = after if way == WAYS[2] else before
        return check(family, FAMILIES[family].build(), lambda _: patched(mutant, folder))
    source = mutant.apply(source_of(mutant.module)[1])
    with ExitStack() as stack:
        try:
            model = FAMILIES[family].build(stack.enter_context(released(mutant.module, source, folder)))
        except Exception:  # noqa: BLE001 - a mutant may fail in any way
            return None
        return before(family, model, lambda _: nullcontext())


class Expected(NamedTuple):
    """Results of the plain model with a mutant, and the largest relative difference from them."""

    results: Results
    allowed: float


def before(family: str, model: Any, change: Change) -> str | None:
    """Change a model, then accelerate it; see `unseen` for the result."""
    with ExitStack() as stack:
        expected = _expected(family, model, change, stack)
        if expected is None:
            return None
        return "; ".join(filter(None, (_accelerated(model, expected, logits) for logits in (True, False))))


def after(family: str, model: Any, change: Change) -> str | None:
    """Accelerate a model, then change it and take the change back; see `unseen` for the result."""
    with ExitStack() as stack:
        expected = _expected(family, model, change, stack)
    own = Expected(usual(family), TOLERANCE)
    if expected is None or _wrong(model, own, "plain, changed back"):
        return None
    wrong = []
    for logits in (True, False):
        acceleration = accelerate(model, logits=logits)
        wrong.append(_wrong(model, own, f"logits={logits}, unchanged"))
        with change(model):
            wrong.append(_wrong(model, expected, f"logits={logits}"))
        wrong.append(_wrong(model, own, f"logits={logits}, changed back"))
        acceleration.undo()
    return "; ".join(filter(None, wrong))


def _expected(family: str, model: Any, change: Change, stack: ExitStack) -> Expected | None:
    """Return the results of a changed plain model, or None if the change does not count."""
    try:
        stack.enter_context(change(model))
        theirs = results(model)
        moved = difference(theirs, usual(family))
        if moved <= MOVED * TOLERANCE or not all(bool(one.isfinite().all()) for one in theirs.values()):
            return None
        allowed = TOLERANCE + noise(model, theirs)
    except Exception:  # noqa: BLE001 - a mutant may fail in any way
        return None
    return Expected(theirs, allowed) if moved > MOVED * allowed else None


def _accelerated(model: Any, expected: Expected, logits: bool) -> str:
    try:
        acceleration = accelerate(model, logits=logits)
    except Exception as failed:  # noqa: BLE001 - reported
        return f"accelerate raised {type(failed).__name__}: {failed}"
    wrong = _wrong(model, expected, f"logits={logits}")
    acceleration.undo()
    return wrong


def _wrong(model: Any, expected: Expected, case: str) -> str:
    try:
        found = difference(results(model), expected.results)
    except Exception as failed:  # noqa: BLE001 - reported
        return f"{case}: {type(failed).__name__}: {failed}"
    return "" if found <= expected.allowed else f"{case}: differs by {found:.1e} (allowed {expected.allowed:.1e})"
