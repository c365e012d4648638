"""Convert adapters that were made under transformers 4, where each expert was a separate module.

In transformers 5, the experts of a layer share one parameter, and gate and up are fused. The A of fused parts are
concatenated along the rank and their B become blocks on a diagonal, so that the update of the parameter is exactly that
of its parts. The sites are derived from the names of the tensors; no pattern in a file is evaluated.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.architectures.families import OLD_EXPERTS_BY_TYPE
from lorakit.architectures.layouts import ExpertsLayout
from lorakit.config import LoraConfig, scale
from lorakit.core.files.adapter_folder import AdapterFiles, Sidecar, alpha_at
from lorakit.core.files.tensors import PREFIX, TensorFile, by_site, endings_of
from lorakit.core.kinds.parameter import joined_A, joined_B
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.target_weights import bare_parameters, model_type_of, named_targets
from lorakit.errors import AdapterFileError, ShapeMismatchError
from lorakit.tables import format_some
from lorakit.targets import (
    BareParameter,
    current_path,
    literal_value,
    names_path,
    parts_at,
    with_fused_targets,
    with_routers_as_parameters,
)

_EXPERT = re.compile(r"(?P<around>(?:.+\.)?experts)\.(?P<number>\d{1,6})\.(?P<old>\w+)", re.ASCII)

Sites = dict[str, dict[int, str]]
"""Old name of a part -> number of an expert -> path of its site in the file; the router has the number 0."""


@dataclass
class _OldSites:
    """Sites of an adapter's file: path of a parameter -> the sites that it replaces, and path -> path of a module."""

    fused: dict[str, Sites] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)


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
    present = by_site({name: name for name in files.file.tensors})
    bare = {parameter.path: parameter for parameter in bare_parameters(index)}
    old_sites = _sites(layout, files, present, bare)
    if not old_sites.fused:
        return files
    parts = {path: set(sites) for path, sites in old_sites.fused.items()}
    config = with_fused_targets(_without_old_keys(layout, files.config), layout, parts, [], list(bare.values()))
    fused: dict[str, tuple[Tensor, Tensor]] = {}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for path, sites in old_sites.fused.items():
        olds = _check_experts(layout, files, bare[path], sites)
        factors = {old: {n: _factors(files, present, site) for n, site in sites[old].items()} for old in olds}
        ranks[path], alphas[path] = _rank_and_alpha(files, path, sites, factors)
        fused[path] = _fused(files, bare[path], factors, rescales_B and config.use_rslora)
    config.target_modules = _modules(layout, files.config, old_sites)
    config.rank_pattern = {k: int(v) for k, v in _patterns(layout, config.rank_pattern, ranks, config.r).items()}
    config.alpha_pattern = _patterns(layout, config.alpha_pattern, alphas, config.lora_alpha)
    warnings = [*files.warnings, *_without_dropout(files, config, bare, old_sites)]
    tensors = _renamed(layout, files.file.tensors, present, old_sites)
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
    present: Mapping[str, Mapping[str, str]],
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
            old_sites.modules[path] = site
            continue
        if parameter not in bare:
            text = f"{files.folder}: the adapter has tensors for {site}, but this model has no parameter {parameter}."
            raise AdapterFileError(text, what=site, where=files.folder)
        old_sites.fused.setdefault(parameter, {}).setdefault(old, {})[number] = site
    return old_sites


def _without_old_keys(layout: ExpertsLayout, config: LoraConfig) -> LoraConfig:
    """Return a copy of a config without ranks and alphas of old names, which are read from the file's sites."""
    names = layout.parameters
    ranks = {key: value for key, value in config.rank_pattern.items() if key.rpartition(".")[2] not in names}
    alphas = {key: value for key, value in config.alpha_pattern.items() if key.rpartition(".")[2] not in names}
    return dataclasses.replace(config, rank_pattern=ranks, alpha_pattern=alphas)


def _check_experts(
    layout: ExpertsLayout, files: AdapterFiles, parameter: BareParameter, sites: Sites
) -> tuple[str, ...]:
    """Check that each part of a parameter has one site per expert, and return the names of the parts in order."""
    olds = parts_at(layout, parameter.path)
    for old in olds:
        numbers = set(sites.get(old, ()))
        expected = set(range(parameter.shape[0] if len(parameter.shape) == 3 else 1))
        if numbers != expected:
            lacking, extra = sorted(expected - numbers), sorted(numbers - expected)
            shown = f"{'lacks' if lacking else 'has'} expert {format_some([*map(str, lacking or extra)])}"
            text = f"{files.folder}: {parameter.path} has {len(expected)} experts, but the adapter {shown} for {old}."
            raise AdapterFileError(text, what=(lacking or extra)[0], where=parameter.path, field="target_modules")
    return olds


def _factors(files: AdapterFiles, present: Mapping[str, Mapping[str, str]], site: str) -> tuple[Tensor, Tensor]:
    """Return A (r, in) and B (out, r) of a site."""
    other = sorted(set(present[site]) - {"A", "B"})
    if other or len(present[site]) != 2:
        text = f"the tensor {present[site][other[0]]}" if other else f"only one of A and B at {site}"
        raise AdapterFileError(
            f"{files.folder}: the adapter has {text}; each expert of transformers 4 must have A and B only.",
            what=site,
            where=files.folder,
        )
    A, B = (files.file.tensors[present[site][part]] for part in "AB")
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ShapeMismatchError(
            f"{files.folder}: A {tuple(A.shape)} and B {tuple(B.shape)} at {site} do not fit together.",
            what=site,
            where=files.folder,
        )
    return A, B


Factors = Mapping[str, Mapping[int, tuple[Tensor, Tensor]]]
"""Old name of a part -> number of an expert -> A (r, in) and B (out, r)."""


def _rank_and_alpha(files: AdapterFiles, path: str, sites: Sites, factors: Factors) -> tuple[int, float]:
    """Return the rank of a fused parameter, and the alpha with which its scale is that of its parts."""
    rslora = files.config.use_rslora
    rank = sum(at[0][0].shape[0] for at in factors.values())
    scales = {
        scale(factors[old][number][0].shape[0], alpha_at(files, site), rslora)
        for old, at in sites.items()
        for number, site in at.items()
    }
    if len(scales) > 1:
        text = (
            f"{files.folder}: the parts and experts of {path} have different scales: "
            f"{', '.join(f'{one:g}' for one in sorted(scales))}; a parameter has one scale."
        )
        raise AdapterFileError(text, what=sorted(scales), where=path, field="alpha_pattern")
    return rank, scales.pop() * (math.sqrt(rank) if rslora else rank)


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


def _fused(files: AdapterFiles, parameter: BareParameter, held: Factors, rescales_B: bool) -> tuple[Tensor, Tensor]:
    """Return A and B of a parameter in PEFT's layout."""
    for old, at in held.items():
        shapes = {(tuple(A.shape), tuple(B.shape)) for A, B in at.values()}
        if len(shapes) > 1:
            text = (
                f"{files.folder}: the experts at {parameter.path} have A and B of different shapes for {old}: "
                f"{', '.join(map(str, sorted(shapes)))}."
            )
            raise ShapeMismatchError(text, what=old, where=parameter.path)
    if len(parameter.shape) != 3:
        ((factors,),) = (tuple(at.values()) for at in held.values())
        return factors
    widths = {at[0][0].shape[1] for at in held.values()}
    if len(widths) > 1:
        text = f"{files.folder}: the parts of {parameter.path} have inputs of different widths: {sorted(widths)}."
        raise ShapeMismatchError(text, what=sorted(widths), where=parameter.path)
    numbers = range(parameter.shape[0])
    parts = [[at[number] for number in numbers] for at in held.values()]
    return fused_A([[A for A, _ in at] for at in parts]), fused_B([[B for _, B in at] for at in parts], rescales_B)


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


def _renamed(
    layout: ExpertsLayout, tensors: Mapping[str, Tensor], present: Mapping[str, Mapping[str, str]], old_sites: _OldSites
) -> dict[str, Tensor]:
    """Return the tensors that are not fused, under their current names."""
    taken = {
        name
        for sites in old_sites.fused.values()
        for at in sites.values()
        for site in at.values()
        for name in present[site].values()
    }
    return {current_path(layout, name): tensor for name, tensor in tensors.items() if name not in taken}
