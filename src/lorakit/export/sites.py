"""Checks of a base and of an adapter's sites on it, for runtimes that adapt only some modules of some bases."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from lorakit.errors import AdapterError, AdapterFileError, UsageError
from lorakit.export.conditions import CONDITIONS
from lorakit.export.facts import BaseFacts, adapter_facts, base_facts
from lorakit.export.rules import REMEDIES
from lorakit.tables import format_some

if TYPE_CHECKING:
    from lorakit.architectures.shapes import ModelShape
    from lorakit.core import CommonAdapter
    from lorakit.export.request import ExportRequest


def tested_base(request: ExportRequest, tested: Collection[str], runtime: str) -> BaseFacts:
    """Return the base of a request, if a runtime was tested with its `model_type` or the request allows others.

    Raises:
        UsageError: The architecture was not tested, or the base is not known.
        AdapterFileError: The file lacks some of the sites that the config selects in the base.
    """
    base = base_facts(request.known_base)
    if base.model_type not in tested and not request.allow_untested:
        given = request.known_base.given
        text = (
            f"{given}: {runtime} was tested with {', '.join(sorted(tested))}, not with {base.model_type!r}; pass "
            "--untested-architecture to export nevertheless, and compare it with `lorakit verify`."
        )
        raise UsageError(text, what=base.model_type, where=given, field="untested_architecture")
    folder = request.adapter.folder
    if missing := CONDITIONS["missing sites"].find(adapter_facts(folder, base)):
        raise AdapterFileError(f"{folder}: {missing}; {REMEDIES['retrain']}.", what=missing, where=folder)
    return base


MERGE = "Merge the adapter (lorakit merge)."


def check_sites(adapter: CommonAdapter, shape: ModelShape, runtime: str, if_tied: str = MERGE) -> None:
    """Check that an adapter's sites are linear layers and embeddings of its base that a runtime can adapt.

    `if_tied` is the advice if sites share their weight, or "" if that is allowed.

    Raises:
        AdapterError: Sites are something else, have other shapes or share their weight; it names all of them.
    """
    sites = {site.path: site for site in shape.sites}
    tied = {path for site in shape.sites if site.tied_to for path in (site.path, site.tied_to)}
    absent, other = "not a linear layer or embedding of the base", f"not of the shape that {shape.source} has"
    tied_to = "tied to each other, where the runtime adapts both"
    advice = {absent: MERGE, other: "Pass the base that the adapter was trained on as --model.", tied_to: if_tied}
    problems = dict[str, list[str]]()
    for path, factor in adapter.weights.factors.items():
        site = sites.get(path)
        if factor.bare is not None or site is None:
            problems.setdefault(absent, []).append(path)
        elif (factor.B.shape[0], *factor.A.shape[1:]) != (site.out_features, site.in_features):
            problems.setdefault(other, []).append(path)
        elif path in tied and if_tied:
            problems.setdefault(tied_to, []).append(path)
    if problems:
        found = "; ".join(f"{format_some(paths)}: {problem}" for problem, paths in problems.items())
        remedies = " ".join(dict.fromkeys(advice[problem] for problem in problems))
        text = f"{adapter.folder}: {runtime} cannot adapt {found}. {remedies}"
        raise AdapterError(text, what=next(iter(problems.values()))[0], where=adapter.folder)
