"""Convert targets of models with experts from the names of transformers 4, and report weights that targets leave out.

In transformers 4, each expert had modules of its own, such as `experts.3.w1`, and the router was a Linear. In
transformers 5, the experts of a layer share the parameters `gate_up_proj` and `down_proj`. As in PEFT, a config that
names the modules, or "all-linear", then targets these parameters and the router's weight; a fused parameter gets the
sum of the ranks and alphas of its parts. Names without a dot apply to all layers with experts and, as in PEFT, no
longer to dense modules with the same name. Paths and regular expressions select exactly what they name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lorakit.architectures.families import EXPERTS_BY_TYPE, TUPLE_ROUTER_BY_TYPE
from lorakit.architectures.layouts import BLOCK, ExpertsLayout
from lorakit.choices import DENSE, EMBEDDING
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError, TargetError
from lorakit.targets.patterns import compiled, names_path
from lorakit.targets.resolving import (
    ALL_LINEAR,
    BareParameter,
    Candidate,
    Note,
    Resolution,
    match_path,
    saved_modules,
    selects,
)

LEFT_OUT = "left_out"
"""`Note.kind` of the note about weights that targets leave out."""


@dataclass
class _Found:
    """Weights of experts and routers that a config names.

    Attributes:
        parts: Path of a parameter -> old names of its parts that the config names.
        numbers: Path of a parameter and old name -> numbers of the experts that the config names one by one.
        modules: Targets that are modules now, too.
    """

    parts: dict[str, set[str]] = field(default_factory=dict)
    numbers: dict[tuple[str, str], set[int]] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)


def with_current_names(
    config: LoraConfig, model_type: str, candidates: Sequence[Candidate], parameters: Sequence[BareParameter]
) -> LoraConfig:
    """Return a config whose targets are modules and parameters of transformers 5: itself if it needs no conversion.

    A ConfigError if only a part of a fused parameter or only some experts are named, a TargetError for unknown experts.
    """
    config = with_routers_as_parameters(config, model_type, parameters)
    layout = EXPERTS_BY_TYPE.get(model_type)
    wanted = config.target_modules
    if layout is None or not wanted:
        return config
    of_experts = _held(layout, parameters)
    if not isinstance(wanted, str):
        named = _named(layout, of_experts, wanted, candidates)
    elif wanted.lower() == ALL_LINEAR:
        named = _every(layout, of_experts, config, candidates)
    else:
        named = _matched(layout, of_experts, wanted, candidates)
    if not named.parts:
        return config
    _check(layout, config, named, {parameter.path: parameter for parameter in of_experts})
    return _converted(layout, config, named, of_experts)


def with_routers_as_parameters(config: LoraConfig, model_type: str, parameters: Sequence[BareParameter]) -> LoraConfig:
    """Return a config that targets the weights, not the modules, of routers that return tuples, which take no B·A."""
    name, wanted = TUPLE_ROUTER_BY_TYPE.get(model_type), config.target_modules
    if name is None or not wanted or isinstance(wanted, str):
        return config
    routers = [p.path for p in parameters if p.name == "weight" and p.module.rpartition(".")[2] == name]
    moved = {entry for entry in wanted if any(names_path(f"{entry}.weight", path) for path in routers)}
    if not moved:
        return config
    named = [*(config.target_parameters or ()), *sorted(f"{entry}.weight" for entry in moved)]
    rest = [entry for entry in wanted if entry not in moved]
    return dataclasses.replace(config, target_modules=rest, target_parameters=list(dict.fromkeys(named)))


def with_fused_targets(
    config: LoraConfig,
    layout: ExpertsLayout,
    parts: Mapping[str, set[str]],
    modules: Collection[str],
    parameters: Sequence[BareParameter],
) -> LoraConfig:
    """Return a config that targets parameters, by their old names, and modules; no pattern is evaluated."""
    limits = {name: getattr(config, name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")}
    plain = dataclasses.replace(config, exclude_modules=None, layers_to_transform=None, layers_pattern=None)
    converted = _converted(layout, plain, _Found(dict(parts), modules=set(modules)), _held(layout, parameters))
    return dataclasses.replace(converted, **limits)


def _held(layout: ExpertsLayout, parameters: Sequence[BareParameter]) -> list[BareParameter]:
    """Return the model's parameters with experts and routers, or [] if it has no experts."""
    names = set(layout.parameters.values())
    of_experts = [p for p in parameters if any(names_path(name, p.path) for name in names)]
    return of_experts if any(len(p.shape) == 3 for p in of_experts) else []


def _old_paths(layout: ExpertsLayout, parameter: BareParameter) -> Iterator[tuple[str, str]]:
    """Yield (old name, path) for each module that a parameter replaces; experts have the number 0."""
    for old, new in layout.parameters.items():
        if names_path(new, parameter.path):
            around = parameter.path.removesuffix(new)
            inside = "0." if len(parameter.shape) == 3 else ""
            before = re.sub(rf"\.{BLOCK}\.(?=[^0-9]*$)", f".{layout.block}.", around) if layout.block else around
            yield from ((old, path) for path in (f"{around}{old}", f"{around}{inside}{old}", f"{before}{inside}{old}"))


def _named(
    layout: ExpertsLayout,
    of_experts: Sequence[BareParameter],
    entries: Collection[str],
    candidates: Sequence[Candidate],
) -> _Found:
    selected = _Found()
    adaptable = [candidate.path for candidate in candidates if candidate.kind is not None]
    for entry in sorted(entries):
        parent, _, old = entry.rpartition(".")
        new = layout.parameters.get(old)
        is_module = bool(parent) and any(names_path(entry, path) for path in adaptable)
        around, number = _without_number(layout, parent)
        named = [p for p in of_experts if new and not is_module and names_path(f"{around}.{new}".lstrip("."), p.path)]
        if not named:
            selected.modules.add(entry)
        for parameter in named:
            selected.parts.setdefault(parameter.path, set()).add(old)
            if number is not None:
                selected.numbers.setdefault((parameter.path, old), set()).add(number)
    return selected


def current_path(layout: ExpertsLayout, path: str) -> str:
    """Return a path with the current name of the module around router and experts."""
    return ".".join(BLOCK if word and word == layout.block else word for word in path.split("."))


def _without_number(layout: ExpertsLayout, parent: str) -> tuple[str, int | None]:
    """Return the path of the module with the experts, with the block's current name, and the number of an expert."""
    words = current_path(layout, parent).split(".")
    number = int(words.pop()) if len(words) > 1 and words[-1].isdecimal() and words[-2] == "experts" else None
    return ".".join(words), number


def _every(
    layout: ExpertsLayout, of_experts: Sequence[BareParameter], config: LoraConfig, candidates: Sequence[Candidate]
) -> _Found:
    selected = _Found({p.path: {old for old, _ in _old_paths(layout, p)} for p in of_experts})
    if of_experts:
        saved, _ = saved_modules(candidates, config)
        inside = tuple(f"{path}." for path in saved)
        dense = [c.path for c in candidates if c.dense and c.path not in saved and not c.path.startswith(inside)]
        names = layout.parameters
        selected.modules = _shortest([path for path in dense if path.rpartition(".")[2] not in names], candidates)
    return selected


def _matched(
    layout: ExpertsLayout, of_experts: Sequence[BareParameter], pattern: str, candidates: Sequence[Candidate]
) -> _Found:
    selected, regex = _Found(), compiled(pattern, "target_modules")
    for parameter in of_experts:
        for old, path in _old_paths(layout, parameter):
            if regex.fullmatch(path):
                selected.parts.setdefault(parameter.path, set()).add(old)
    modules = [c.path for c in candidates if c.kind is not None and regex.fullmatch(c.path)]
    selected.modules = _shortest(modules, candidates)
    return selected


def _shortest(paths: Collection[str], candidates: Sequence[Candidate]) -> set[str]:
    """Return the last words of paths, or the paths themselves if the words would select other modules too."""
    words, wanted = {path.rpartition(".")[2] for path in paths}, set(paths)
    named = {c.path for c in candidates if any(names_path(word, c.path) for word in words)}
    return words if named == wanted else wanted


def _check(
    layout: ExpertsLayout, config: LoraConfig, selected: _Found, of_experts: Mapping[str, BareParameter]
) -> None:
    is_listed = not isinstance(config.target_modules, str)
    for path, olds in selected.parts.items():
        names, lacking = ", ".join(sorted(olds)), sorted(set(parts_at(layout, path)) - olds)
        if lacking:
            text = f"target_modules names {names} but not {', '.join(lacking)}, also in {path}. Name both, or neither."
            raise ConfigError(text, what=lacking[0], where=path, field="target_modules")
        both = next((entry for entry in sorted(config.target_parameters or ()) if names_path(entry, path)), None)
        if both is not None and is_listed:
            text = f"target_modules names {names}, now {path}, which target_parameters names, too. Use one name."
            raise ConfigError(text, what=both, where=path, field="target_parameters")
    for (path, old), numbers in selected.numbers.items():
        _check_numbers(path, old, numbers, of_experts[path].shape[0])


def _check_numbers(path: str, old: str, numbers: Collection[int], experts: int) -> None:
    missing = sorted(number for number in numbers if number >= experts)
    if missing:
        text = f"target_modules names expert {missing[0]} ({old}), but {path} has {experts} experts."
        raise TargetError(text, what=missing[0], where=path, field="target_modules")
    left = sorted(set(range(experts)) - set(numbers))
    if left:
        text = f"target_modules names some experts, but {path} is adapted as a whole. Name {old!r} without a number."
        raise ConfigError(text, what=left[0], where=path, field="target_modules")


def parts_at(layout: ExpertsLayout, path: str) -> tuple[str, ...]:
    """Return the old names of the modules in a parameter of experts or a router, in the order of its rows."""
    return next(layout.parts(new) for new in layout.parameters.values() if names_path(new, path))


def _converted(
    layout: ExpertsLayout, config: LoraConfig, selected: _Found, of_experts: Sequence[BareParameter]
) -> LoraConfig:
    """Return the config with the found weights as `target_parameters`, and the ranks and alphas of fused parameters."""
    is_selected = selects(config)
    kept = {p.path for p in of_experts if p.path in selected.parts and is_selected(Candidate(p.module, None))}
    entries, ranks, alphas = set(config.target_parameters or ()), dict(config.rank_pattern), dict(config.alpha_pattern)
    for new in dict.fromkeys(layout.parameters.values()):
        of_name = {parameter.path for parameter in of_experts if names_path(new, parameter.path)}
        named = of_name.intersection(kept)
        entries |= {new} if named == of_name and named else named
        count = len(layout.parts(new))
        if named and count > 1:
            key = rf".*\.{re.escape(new)}"
            ranks.setdefault(key, config.r * count)
            alphas.setdefault(key, config.lora_alpha * count)
    return dataclasses.replace(
        config,
        target_modules=selected.modules,
        target_parameters=sorted(entries),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def note_on_rest(
    original: LoraConfig,
    config: LoraConfig,
    candidates: Sequence[Candidate],
    parameters: Sequence[BareParameter],
    resolution: Resolution,
    total: int,
) -> Note | None:
    """Return a note about the matrices that targets leave out, or None if there are none or the model has no experts.

    With default targets or "all-linear", these are all other matrices except embeddings and the output head, which
    "all-linear" never selects. With names, they are the modules that still have a name that now stands for experts.
    `original` has the targets as given; `parameters` are those with two or three axes, and `total` is the size of the
    model.
    """
    if not any(len(p.shape) == 3 and (p.experts or p.name != "weight") for p in parameters):
        return None
    is_named = _is_left_out(original, config)
    modules = {candidate.path: candidate for candidate in candidates}
    whole = {match.path for match in resolution.matches if not match.parameter}
    adapted = {match_path(match) for match in resolution.matches if match.parameter}
    inside = tuple(f"{path}." for path in resolution.saved)
    rest = [
        parameter
        for parameter in parameters
        if not (parameter.module in whole or parameter.path in adapted or parameter.path.startswith(inside))
        and _is_weight(modules, parameter)
        and is_named(parameter.module)
    ]
    if not rest:
        return None
    sizes: dict[str, int] = {}
    for parameter in rest:
        label = _label(parameter)
        sizes[label] = sizes.get(label, 0) + _size(modules, parameter)
    labels = ", ".join(sorted(sizes, key=lambda label: (-sizes[label], label)))
    fraction = sum(sizes.values()) / max(total, 1)
    text = (
        f"The targets leave out {labels}: {fraction:.2%} of the model's parameters, which are not weights of plain "
        "linear layers; name them in target_parameters to adapt them."
    )
    return Note(LEFT_OUT, text)


def _is_left_out(original: LoraConfig, config: LoraConfig) -> Callable[[str], bool]:
    """Return a function that tells whether a module that is not adapted must be reported."""
    named = original.target_modules
    if (named is None and config.target_modules is not None) or (
        isinstance(named, str) and named.lower() == ALL_LINEAR
    ):
        return lambda _: True
    if named is None or isinstance(named, str):
        return lambda _: False
    moved = set(named).difference(config.target_modules or ())
    return lambda path: any(names_path(entry, path) for entry in moved)


def _is_weight(modules: Mapping[str, Candidate], parameter: BareParameter) -> bool:
    """Return whether a parameter is a matrix, but not an embedding, the output head or a bias."""
    module = modules.get(parameter.module)
    is_outside = module is not None and (module.kind == EMBEDDING or (module.kind in DENSE and not module.dense))
    return len(parameter.shape) > 1 and "bias" not in parameter.name and not is_outside


def _size(modules: Mapping[str, Candidate], parameter: BareParameter) -> int:
    """Return the number of elements of a parameter; quantized weights have other shapes than their modules."""
    module = modules.get(parameter.module)
    known = module.out_features * module.in_features if module is not None and module.kind in DENSE else 0
    return known or math.prod(parameter.shape)


def _label(parameter: BareParameter) -> str:
    words = parameter.path.removesuffix(".weight").split(".")
    return ".".join(word for word in words[-2:] if not word.isdecimal())
