"""Convert adapters that were made under transformers 4, where each expert was a separate module.

In transformers 5, the experts of a layer share one parameter, and gate and up are fused. The A of fused parts are
concatenated along the rank and their B become blocks on a diagonal, so that the update of the parameter is exactly that
of its parts. The sites are derived from the names of the tensors; no pattern in a file is evaluated.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.architectures.families import OLD_EXPERTS_BY_TYPE
from lorakit.architectures.layouts import ExpertsLayout
from lorakit.config import LoraConfig, scale
from lorakit.core.files.adapter_folder import AdapterFiles, Sidecar, alpha_at
from lorakit.core.files.tensors import TensorFile, by_site, endings_of, parse
from lorakit.core.kinds.parameter import joined_A, joined_B
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.target_weights import bare_parameters, model_type_of, named_targets
from lorakit.errors import AdapterFileError, ShapeMismatchError
from lorakit.tables import format_some
from lorakit.targets.experts import current_path, parts_at, with_fused_targets, with_routers_as_parameters
from lorakit.targets.patterns import literal_value, names_path
from lorakit.targets.resolving import BareParameter
from lorakit.tensor_headers import PREFIX

_EXPERT = re.compile(r"(?P<around>(?:.+\.)?experts)\.(?P<number>\d{1,6})\.(?P<old>\w+)", re.ASCII)

Sites = dict[str, dict[int, str]]
"""Old name of a part -> number of an expert -> path of its site in the file; the router has the number 0."""


@dataclass
class _OldSites:
    """Sites of an adapter's file: path of a parameter -> the sites that it replaces, and current paths of modules."""

    fused: dict[str, Sites] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)


def with_fused_experts(files: AdapterFiles, index: AdapterIndex, *, rescales_B: bool = False) -> AdapterFiles:
    """Return an adapter's files with the experts of each layer fused; other tensors are returned unchanged.

    Routers that return tuples become parameters in the config; their tensors have the same names. `rescales_B` is
    whether the tensors are meant for an adapter whose scales at fused parameters are those that its config gives (see
    `fused_B`); otherwise, the returned config has the alphas that fit the tensors.

    Raises:
        AdapterFileError: The file lacks an expert or has one too many, a part of a fused parameter is missing or has
            another scale than the other part, or a site has tensors other than A and B.
        ShapeMismatchError: The experts of a layer have tensors of different shapes.
    """
    model_type = model_type_of(index.model)
    files = dataclasses.replace(
        files, config=with_routers_as_parameters(files.config, model_type, bare_parameters(index))
    )
    layout = OLD_EXPERTS_BY_TYPE.get(model_type)
    if layout is None:
        return files
    present = by_site(files.file.tensors)
    bare = {parameter.path: parameter for parameter in bare_parameters(index)}
    old_sites = _sites(layout, files, present, bare)
    if not old_sites.fused:
        return files
    parts = {path: set(sites) for path, sites in old_sites.fused.items()}
    config = with_fused_targets(_without_old_keys(layout, files.config), layout, parts, [], list(bare.values()))
    fused: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, sites in old_sites.fused.items():
        factors = _factors(layout, files, present, bare[path], sites)
        ranks[path] = sum(A.shape[0] for (A, _), *_ in factors)
        alphas[path] = _alpha(files, present, path, sites, ranks[path])
        fused[path] = _fused(factors, bare[path], rescales_B and config.use_rslora)
    config.target_modules = _modules(layout, files.config, old_sites)
    config.rank_pattern = {k: int(v) for k, v in _patterns(layout, config.rank_pattern, ranks, config.r).items()}
    config.alpha_pattern = _patterns(layout, config.alpha_pattern, alphas, config.lora_alpha)
    warnings = [*files.warnings, *_without_dropout(files, config, bare, old_sites)]
    taken = {site for sites in old_sites.fused.values() for at in sites.values() for site in at.values()}
    keys = {name: parse(name) for name in files.file.tensors}
    left = [name for name, key in keys.items() if key is None or key.path not in taken]
    tensors = {current_path(layout, name): files.file.tensors[name] for name in left}
    for site, target in named_targets(index, config).items():
        if target.pattern_path in fused:
            ending_A, ending_B = endings_of(target.kind)
            A, B = fused[target.pattern_path]
            tensors |= {f"{PREFIX}{site}{ending_A}": A, f"{PREFIX}{site}{ending_B}": B}
    file = dataclasses.replace(files.file, tensors=tensors)
    return dataclasses.replace(files, config=config, file=file, config_is_ours=False, warnings=tuple(warnings))


def tensors_with_fused_experts(
    tensors: Mapping[str, Tensor], config: LoraConfig, model: nn.Module, label: str
) -> Mapping[str, Tensor]:
    """Return tensors (…), by name on disk, for an adapter on a model, with the experts of each layer fused.

    `label` says in messages what the tensors are; the errors are those of `with_fused_experts`.
    """
    if model_type_of(model) not in OLD_EXPERTS_BY_TYPE:
        return tensors
    file = TensorFile(dict(tensors), {}, "", 0)
    files = AdapterFiles(Path(label), config, file, Sidecar(), config_is_ours=False, warnings=())
    return with_fused_experts(files, AdapterIndex.of(model), rescales_B=True).file.tensors


def _sites(
    layout: ExpertsLayout,
    files: AdapterFiles,
    present: Iterable[str],
    bare: Mapping[str, BareParameter],
) -> _OldSites:
    old_sites, names = _OldSites(), layout.parameters
    targeted = files.config.target_parameters or ()
    for site in present:
        path = current_path(layout, site)
        expert, router = _EXPERT.fullmatch(path), path.removesuffix(layout.router) + names[layout.router]
        if expert is not None and expert["old"] in names:
            parameter, old, number = f"{expert['around']}.{names[expert['old']]}", expert["old"], int(expert["number"])
        elif names_path(layout.router, path) and not any(names_path(entry, router) for entry in targeted):
            parameter, old, number = router, layout.router, 0
        else:
            old_sites.modules.append(path)
            continue
        if parameter not in bare:
            raise _misfit(files, site, f"this model has no parameter {parameter}")
        old_sites.fused.setdefault(parameter, {}).setdefault(old, {})[number] = site
    return old_sites


def _without_old_keys(layout: ExpertsLayout, config: LoraConfig) -> LoraConfig:
    """Return a copy of a config without ranks and alphas of old names, which are read from the file's sites."""
    names = layout.parameters
    ranks = {key: value for key, value in config.rank_pattern.items() if key.rpartition(".")[2] not in names}
    alphas = {key: value for key, value in config.alpha_pattern.items() if key.rpartition(".")[2] not in names}
    return dataclasses.replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def _misfit(
    files: AdapterFiles, path: str, reason: str, error: type[AdapterFileError] = AdapterFileError
) -> AdapterFileError:
    """Return the error for tensors of a site or parameter that cannot be fused."""
    return error(f"{files.folder}: {path}: {reason}.", what=path, where=files.folder)


Factors = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""For each part of a parameter and each expert, A (r, in) and B (out, r)."""


def _factors(
    layout: ExpertsLayout,
    files: AdapterFiles,
    present: Mapping[str, Mapping[str, Tensor]],
    parameter: BareParameter,
    sites: Sites,
) -> Factors:
    """Return the factors of a parameter, after checking that each part has one site per expert and one shape."""
    path, count = parameter.path, parameter.shape[0] if len(parameter.shape) == 3 else 1
    factors = []
    for old in parts_at(layout, path):
        at = sites.get(old, {})
        wrong = sorted(at.keys() ^ set(range(count)))
        if wrong:
            shown = f"{'has' if wrong[0] in at else 'lacks'} expert {format_some([*map(str, wrong)])}"
            raise _misfit(files, path, f"it has {count} experts, but the adapter {shown} for {old}")
        factors.append([_pair(files, present, at[number]) for number in range(count)])
        shapes = {(tuple(A.shape), tuple(B.shape)) for A, B in factors[-1]}
        if len(shapes) > 1:
            raise _misfit(files, path, f"the shapes of A and B for {old} differ: {sorted(shapes)}", ShapeMismatchError)
    widths = {A.shape[1] for (A, _), *_ in factors}
    if len(widths) > 1:
        raise _misfit(files, path, f"its parts have inputs of different widths: {sorted(widths)}", ShapeMismatchError)
    return factors


def _pair(files: AdapterFiles, present: Mapping[str, Mapping[str, Tensor]], site: str) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of a site."""
    if set(present[site]) != {"A", "B"}:
        given = ", ".join(sorted(present[site]))
        raise _misfit(files, site, f"an expert of transformers 4 must have A and B only, but has {given}")
    A, B = present[site]["A"], present[site]["B"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise _misfit(files, site, f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit together", ShapeMismatchError)
    return A, B


def _alpha(
    files: AdapterFiles, present: Mapping[str, Mapping[str, Tensor]], path: str, sites: Sites, rank: int
) -> float:
    """Return the alpha with which the scale of a fused parameter of this rank is that of its parts."""
    rslora = files.config.use_rslora
    olds = [site for at in sites.values() for site in at.values()]
    scales = {scale(len(present[site]["A"]), alpha_at(files, site), rslora) for site in olds}
    if len(scales) > 1:
        shown = ", ".join(f"{one:g}" for one in sorted(scales))
        raise _misfit(files, path, f"its parts and experts have different scales: {shown}; a parameter has one scale")
    return scales.pop() * (math.sqrt(rank) if rslora else rank)


def _patterns(
    layout: ExpertsLayout, old_patterns: Mapping[str, float], values: Mapping[str, float], default: float
) -> dict[str, float]:
    """Return patterns with which each parameter has its value: one key for all with the same name if they agree.

    PEFT uses the first key that matches, and saved keys are sorted, so no parameter may match two keys.
    """
    patterns = dict(old_patterns)
    for new in dict.fromkeys(layout.parameters.values()):
        at = {path: value for path, value in values.items() if names_path(new, path)}
        if not all(math.isclose(literal_value(patterns, path, default), value) for path, value in at.items()):
            key = rf".*\.{re.escape(new)}"
            patterns.pop(key, None)
            agree = math.isclose(min(at.values()), max(at.values()))
            patterns |= {key: min(at.values())} if agree else {f"^{re.escape(path)}": at[path] for path in at}
    return patterns


def _fused(factors: Factors, parameter: BareParameter, rescales_B: bool) -> tuple[Tensor, Tensor]:
    """Return A and B of a parameter in PEFT's layout."""
    if len(parameter.shape) != 3:
        ((pair,),) = factors
        return pair
    return fused_A([[A for A, _ in at] for at in factors]), fused_B([[B for _, B in at] for at in factors], rescales_B)


def fused_A(parts: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return the A (experts·r·parts, in) of a fused parameter, given each part's A (r, in) of each expert."""
    return joined_A(torch.stack([torch.cat(of_expert) for of_expert in zip(*parts, strict=True)]))


def fused_B(parts: Sequence[Sequence[Tensor]], use_rslora: bool = False) -> Tensor:
    """Return the B (out·parts, r·parts·experts) of a fused parameter, given each part's B (out, r) of each expert.

    With `use_rslora`, the parameter has the summed ranks and alphas of its parts and a scale of alpha/√r, which is
    √parts times the scale of a part; B is then divided by √parts.
    """
    B = joined_B(torch.stack([torch.block_diag(*of_expert) for of_expert in zip(*parts, strict=True)])).contiguous()
    return B / math.sqrt(len(parts)) if use_rslora else B


def _modules(layout: ExpertsLayout, config: LoraConfig, old_sites: _OldSites) -> set[str]:
    """Return the targets that are modules still: names that are not old ones, and the paths of other sites."""
    named, names = config.target_modules, layout.parameters
    kept = set() if named is None or isinstance(named, str) else set(named)
    kept = {entry for entry in kept if entry.rpartition(".")[2] not in names}
    return kept | {path for path in old_sites.modules if not any(names_path(entry, path) for entry in kept)}


def _without_dropout(
    files: AdapterFiles, config: LoraConfig, bare: Mapping[str, BareParameter], old_sites: _OldSites
) -> list[str]:
    """Set a config's dropout to 0 if a router is adapted, whose input is not accessible, and return the warning."""
    router = next((path for path in old_sites.fused if len(bare[path].shape) == 2), None)
    if router is None or not config.lora_dropout:
        return []
    dropout, config.lora_dropout = config.lora_dropout, 0.0
    return [f"{files.folder}: lora_dropout={dropout:g} is ignored, because the input of {router} is not accessible."]
