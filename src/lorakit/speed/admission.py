"""Tell if a tensor was changed in place since something about it was remembered.

What is remembered is kept in the tensor's own `__dict__`, so it goes with the tensor, and no other one with the same
`id` is taken for it.

Decide which modules of a model may run a fast forward: by structure, by class, and by probes.

A module keeps its own forward if its class, or one below it, replaces a method of a known class; if a probe at one of
several lengths differs or raises; or if that happened to a module that its fast forward would run without calling it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.speed import linear
from lorakit.speed.comparing import Branches, Verdict, judged, judged_branches
from lorakit.speed.contract import is_own_forward
from lorakit.speed.probe import Call, attempt, first_calls


def version_of(x: Tensor) -> int | Tensor:
    """Return what `is_version` compares later: the count of changes, or a copy of an inference tensor, which has none.

    Args:
        x: A tensor of any shape (…).
    """
    return x.clone() if x.is_inference() else x._version


def is_version(x: Tensor, version: int | Tensor) -> bool:
    """Return whether a tensor is as it was.

    Args:
        x: The tensor, of any shape (…).
        version: What `version_of` returned for it.
    """
    if isinstance(version, Tensor):
        return torch.equal(x, version)
    return not x.is_inference() and version == x._version


LENGTHS = (1, 33)
"""Tokens of one row in the further probes, each of one module per kind."""

KNOWN = frozenset({"torch", "transformers", "peft", "lorakit"})
"""Packages whose classes the structure checks were written for."""

HARMLESS = frozenset({"extra_repr"})
"""Methods that a class may replace without changing what a module computes."""

CALLED = frozenset({"__call__", "__getattr__", "__getattribute__"})
"""Special methods that take part in a call of a module."""


@dataclass(frozen=True)
class Recipe:
    """A fast forward.

    Attributes:
        name: Said in the report.
        fits: Module -> None where it has the structure, else why not, as a short phrase.
        run: Module and the arguments of a call -> the output, or None where the module's own forward has to run.
        concerns: Whether a module that does not fit is reported as left.
        whole: It runs all that is inside by itself, of which nothing is reported then.
        residual: The output is the input plus a branch.
        calls: Module -> names of the children that the fast forward calls as modules.
        traced: Module -> paths below it of the modules whose calls `branches` needs.
        branches: Pairs the branches that a residual or a norm behind it would hide, or None.
    """

    name: str
    fits: Callable[[nn.Module], str | None]
    run: Callable[..., Any]
    concerns: Callable[[nn.Module], bool]
    whole: bool = False
    residual: bool = False
    calls: Callable[[nn.Module], tuple[str, ...]] = lambda _: ()
    traced: Callable[[nn.Module], tuple[str, ...]] = lambda _: ()
    branches: Branches | None = None


@dataclass(frozen=True)
class Left:
    """A module that stays as it is.

    Attributes:
        path: Path in the model.
        kind: Its class.
        why: The reason, as a phrase.
    """

    path: str
    kind: str
    why: str


Parts = dict[str, tuple[nn.Module, Recipe]]
"""Path -> module and its recipe."""


def candidates(modules: Mapping[str, nn.Module], recipes: tuple[Recipe, ...]) -> tuple[Parts, list[Left]]:
    """Find the modules that have the structure and classes of a recipe.

    Args:
        modules: Path -> module.
        recipes: In order of preference.

    Returns:
        The candidates, and the modules of the same sort that are none.
    """
    wanted: Parts = {}
    left: list[Left] = []
    inside = {id(part) for layer in modules.values() if linear.is_adapted(layer) for part in _of_adapters(layer)}
    foreign: dict[type, bool] = {}
    for path, module in modules.items():
        if id(module) in inside:
            continue
        reasons = []
        for recipe in recipes:
            why = recipe.fits(module)
            stranger = None if why is not None else _stranger(module, recipe, foreign)
            if stranger is not None:
                reasons.append(f"{stranger} replaces methods of a known class, or is none")
            elif why is None:
                wanted[path] = (module, recipe)
                break
            elif recipe.concerns(module):
                reasons.append(why)
        else:
            left += [Left(path, type(module).__name__, reason) for reason in reasons[:1]]
    return wanted, left


def recorded(parts: Parts) -> dict[str, nn.Module]:
    """Collect the modules whose calls the probes of these parts need.

    Args:
        parts: The parts.

    Returns:
        Path -> module, of the parts and of what their branches need.
    """
    found = {path: module for path, (module, _) in parts.items()}
    for path, (module, recipe) in parts.items():
        found |= {f"{path}.{below}": module.get_submodule(below) for below in recipe.traced(module)}
    return found


def admitted(model: nn.Module, wanted: Parts, found: Mapping[str, Call]) -> tuple[Parts, list[Left]]:
    """Probe candidates; the caller sees to `at_rest`.

    Args:
        model: The model.
        wanted: The candidates, parents before children.
        found: Their calls in a first forward, and those that their branches need.

    Returns:
        The candidates that may run their fast forward, and the others.
    """
    firsts, first_of = _one_of_each(wanted, found)
    at_lengths = _at_lengths(model, firsts)
    verdicts: dict[str, Verdict] = {}
    differing: list[str] = []
    for path in reversed(wanted):  # children before parents
        module, recipe = wanted[path]
        child = _fused_among(differing, path, module, recipe)
        verdict = None
        if child is not None:
            verdict = Verdict(f"its {child[len(path) + 1 :]}: {verdicts[child].why}", differs=True)
        verdict = verdict or _verdict(path, module, recipe, found)
        verdicts[path] = verdict if verdict.differs else at_lengths.get(first_of[path], verdict)
        if verdicts[path].differs:
            differing.append(path)
    fast = {path: part for path, part in wanted.items() if not verdicts[path].why}
    left = [
        Left(path, type(module).__name__, verdicts[path].why)
        for path, (module, recipe) in wanted.items()
        if verdicts[path].differs or (verdicts[path].why and recipe.concerns(module))
    ]
    return fast, left


def _of_adapters(layer: Any) -> list[nn.Module]:
    """The modules inside a layer that are an adapter's and not the base's."""
    base = {id(module) for module in layer.base_layer.modules()}
    return [module for module in layer.modules() if module is not layer and id(module) not in base]


def _stranger(module: nn.Module, recipe: Recipe, foreign: dict[type, bool]) -> str | None:
    """The class of a module that a fast forward would pass over without knowing it, or None.

    Args:
        module: The module that fits.
        recipe: Its recipe.
        foreign: Class -> whether it is one of those, as far as is known; added to.
    """
    called = recipe.calls(module)
    parts = [
        module,
        *(part for name, child in module.named_children() if name not in called for part in child.modules()),
    ]
    for kind in map(type, parts):
        if kind not in foreign:
            foreign[kind] = _is_foreign(kind)
        if foreign[kind]:
            return kind.__name__
    return None


def _is_foreign(kind: type) -> bool:
    """Return whether a class computes something that the structure checks were not written for.

    That is a forward from another package, also one that was set on a known class, or another method of a known class
    that a class from elsewhere replaces.
    """
    if not _is_known(getattr(kind, "forward", None)) or not is_own_forward(kind):
        return True
    for place, owner in enumerate(kind.__mro__):
        if _package(owner.__module__) in KNOWN:
            continue
        own = {name for name in vars(owner) if not name.startswith("__")} - HARMLESS | CALLED & vars(owner).keys()
        if any(
            name in vars(base) and not _is_known(vars(owner)[name])
            for name in own
            for base in kind.__mro__[place + 1 :]
        ):
            return True
    return False


def _is_known(method: Any) -> bool:
    """Return whether a method, and all that it decorates, was written in a known package.

    The globals of a function tell; a decorator copies its other names from what it decorates.
    """
    while method is not None:
        if _package(getattr(method, "__globals__", {}).get("__name__", "")) not in KNOWN:
            return False
        method = getattr(method, "__wrapped__", None)
    return True


def _package(module: str) -> str:
    return module.partition(".")[0]


def _one_of_each(wanted: Parts, found: Mapping[str, Call]) -> tuple[Parts, dict[str, str]]:
    """The first of the called modules that are alike but for their numbers; and path -> path of the first like it."""
    first: dict[Any, str] = {}
    first_of = {}
    for path, (module, recipe) in wanted.items():
        settings = [path in found, type(module), recipe.name]
        for name, part in (("", module), *module.named_children()):
            settings += [name, type(part), *sorted(_simple(part))]
        first_of[path] = first.setdefault(tuple(settings), path)
    return {path: wanted[path] for path in first.values() if path in found}, first_of


def _simple(module: nn.Module) -> list[str]:
    """The settings of a module that are plain values, as text, without its place in the model."""
    plain = (bool, int, float, str, type(None))
    return [f"{k}={v!r}" for k, v in vars(module).items() if isinstance(v, plain) and k != "layer_idx"]


def _at_lengths(model: nn.Module, firsts: Parts) -> dict[str, Verdict]:
    """The modules whose fast forward differs at another length than that of the first probe, with the verdict."""
    differing = {}
    for tokens in LENGTHS if firsts else ():
        found = attempt(lambda tokens=tokens: first_calls(model, recorded(firsts), tokens))  # type: ignore[misc]
        if isinstance(found, Exception):
            continue  # a model may have no such length
        for path, (module, recipe) in firsts.items():
            verdict = _verdict(path, module, recipe, found)
            if verdict.differs:
                differing[path] = Verdict(f"at length {tokens}, {verdict.why}", differs=True)
    return differing


def _verdict(path: str, module: nn.Module, recipe: Recipe, found: Mapping[str, Call]) -> Verdict:
    """Compare the fast forward of a module with its recorded calls."""
    call = found.get(path)
    if call is None:
        return Verdict("it was not called")
    verdict = judged(module, recipe.run, call, residual=recipe.residual)
    if verdict.why or recipe.branches is None:
        return verdict
    inside = {below: found[f"{path}.{below}"] for below in recipe.traced(module) if f"{path}.{below}" in found}
    return judged_branches(recipe.branches, module, call, inside)


def _fused_among(differing: list[str], path: str, module: nn.Module, recipe: Recipe) -> str | None:
    """The path of a module whose fast forward differs and that this one would run without calling it, or None."""
    below = [one for one in differing if one.startswith(f"{path}.")]
    called = tuple(f"{path}.{name}." for name in recipe.calls(module)) if below else ()
    return next((one for one in below if not f"{one}.".startswith(called or ("\0",))), None)
