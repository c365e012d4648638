"""Match a config's targets against the module and parameter paths of a model or a plan.

The rules are PEFT's. A list entry is a path or a dotted suffix of one; a string is a regular expression that must match
the whole path; "all-linear" selects every dense layer except the output head. `exclude_modules` takes precedence.
`target_parameters` takes paths or dotted suffixes, never a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lorakit.choices import PARAMETER, PLANNED
from lorakit.config import HEADS_BY_TASK, LoraConfig
from lorakit.config.checks import check_built
from lorakit.errors import ConfigError, NoTargetError, TargetError, nearest
from lorakit.targets.patterns import compiled, first_match, key_fits, names_path

ALL_LINEAR = "all-linear"

SEVERAL_MODULES, LARGE_RANK = "several_modules", "large_rank"
"""Values of `Note.kind` for notes about targets."""


@dataclass(frozen=True)
class Candidate:
    """A module that a target entry may name.

    Attributes:
        kind: Kind of site ("Linear", "Conv1D", "Embedding", ...), or None if LoRA does not support the module.
        dense: Whether "all-linear" selects the module (a dense layer that is not the output head).
        in_features: Input width (for an embedding, the number of embeddings), or 0 if the module has none.
    """

    path: str
    kind: str | None
    type_name: str = ""
    dense: bool = False
    out_features: int = 0
    in_features: int = 0


@dataclass(frozen=True)
class BareParameter:
    """A parameter that `target_parameters` may name, such as a tensor that holds all experts of a layer.

    Attributes:
        module: Path of the module that holds the parameter; "" for the model itself.
        experts: Number of experts of the module, as transformers sets it; 0 if there are none.
    """

    module: str
    name: str
    shape: tuple[int, ...]
    experts: int = 0

    @property
    def path(self) -> str:
        """Dotted path of the parameter in the model."""
        return f"{self.module}.{self.name}" if self.module else self.name


@dataclass(frozen=True)
class Match:
    """A module or parameter that the config targets, with its rank and alpha.

    Attributes:
        entry: The config entry that matches the module or parameter.
        parameter: Name of the targeted parameter within the module, or "" if the kind determines the parameter.
    """

    path: str
    kind: str
    rank: int
    alpha: float
    entry: str
    parameter: str = ""


@dataclass(frozen=True)
class Unmatched:
    """A config entry that matches nothing.

    Attributes:
        text: Message about the entry, which suggests similar names.
    """

    field: str
    entry: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Note:
    """A remark for the user; its kind is "several_modules", "large_rank", or a subject that another package defines."""

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Resolution:
    """Result of matching a config against a model.

    Attributes:
        matches: The targeted sites, in model order.
        saved: Paths of the modules that `modules_to_save` or the task type selects.
        missing: Config entries that match nothing; empty unless partial matches are allowed.
    """

    matches: tuple[Match, ...]
    saved: tuple[str, ...]
    missing: tuple[Unmatched, ...]
    notes: tuple[Note, ...]


def resolve(
    candidates: Sequence[Candidate],
    config: LoraConfig,
    *,
    allow_partial: bool = False,
    parameters: Sequence[BareParameter] | None = None,
) -> Resolution:
    """Find the sites that a config targets, at least one.

    The candidates and parameters are all named ones of the model, in order, with containers. Without parameters,
    `target_parameters` is ignored. `allow_partial` returns unmatched entries in `missing` instead of raising an error.

    Raises:
        NoTargetError: No target modules were found in the model.
        TargetError: An entry matches nothing, or LoRA does not support a targeted module.
        ConfigError: A pattern is not a valid regular expression, or no targets are given.
        NotYetSupported: The config uses an unsupported feature.
    """
    check_built(config)
    saved, missing = saved_modules(candidates, config)
    selected = _targeted(candidates, config, saved)
    bare = targeted_parameters(parameters or (), config, saved)
    missing += _unmatched(candidates, config, selected, bare)
    if parameters is not None:
        missing += _unmatched_parameters(parameters, config, bare)
    if not selected and not bare:
        raise _nothing(candidates, config, missing)
    if missing and not allow_partial:
        text, first = " ".join(map(str, missing)), missing[0]
        raise TargetError(text, what=first.entry, field=first.field, override="partial_targets")
    _check_kinds(selected)
    matches = (*(_match(config, candidate.path, candidate.kind or "", entry) for candidate, entry in selected), *bare)
    notes = (*_notes_on_names(selected), *_notes_on_ranks(selected, parameters or (), matches))
    return Resolution(matches, tuple(saved), tuple(missing), notes)


def _match(config: LoraConfig, module: str, kind: str, entry: str, parameter: str = "") -> Match:
    path = f"{module}.{parameter}" if parameter else module
    rank = first_match(config.rank_pattern, path, config.r)
    return Match(module, kind, rank, first_match(config.alpha_pattern, path, config.lora_alpha), entry, parameter)


def _matcher(name: str, value: Collection[str] | str) -> Callable[[Candidate], str | None]:
    """Return a function that maps a candidate to the entry that selects the candidate, or to None."""
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return lambda candidate: ALL_LINEAR if candidate.dense else None
        pattern = compiled(value, name)
        return lambda candidate: value if pattern.fullmatch(candidate.path) else None
    entries = frozenset(value)

    def entry_of(candidate: Candidate) -> str | None:
        rest = candidate.path
        while rest:  # the path itself, then each shorter dotted suffix
            if rest in entries:
                return rest
            _, _, rest = rest.partition(".")
        return None

    return entry_of


def saved_modules(candidates: Sequence[Candidate], config: LoraConfig) -> tuple[list[str], list[Unmatched]]:
    """Return the paths that `modules_to_save` or the task type selects, and the entries that match nothing."""
    heads = HEADS_BY_TASK.get(config.task_type, ())
    entries = [entry for entry in config.modules_to_save or [] if entry not in heads]
    paths = [c.path for c in candidates if any(names_path(entry, c.path) for entry in (*entries, *heads))]
    outermost = [p for p in paths if not any(p.startswith(other + ".") for other in paths)]
    missing = [
        _matches_none("modules_to_save", entry, f"no module{_hint(entry, candidates)}")
        for entry in entries
        if not any(names_path(entry, path) for path in paths)
    ]
    return outermost, missing


def targeted_parameters(
    parameters: Sequence[BareParameter], config: LoraConfig, saved: Collection[str] = ()
) -> list[Match]:
    """Return the parameters that `target_parameters` names by a path or a dotted suffix, except those in saved modules.

    A TargetError if one belongs to the top-level module, or does not have two or three axes.
    """
    inside = tuple(path + "." for path in saved)
    matches = []
    for parameter in parameters if config.target_parameters else ():
        path = parameter.path
        entry = next((entry for entry in sorted(config.target_parameters or ()) if names_path(entry, path)), None)
        if entry is None or path.startswith(inside):
            continue
        if not parameter.module:
            text = f"Targeting an nn.Parameter on the top-level module is not supported (parameter {parameter.name!r})."
            raise TargetError(text, what=parameter.name, field="target_parameters")
        if len(parameter.shape) not in {2, 3}:
            text = f"parameter {path!r} has shape {parameter.shape}; LoRA requires a parameter with two or three axes."
            raise TargetError(text, what=entry, where=path, field="target_parameters")
        matches.append(_match(config, parameter.module, PARAMETER, entry, parameter.name))
    return matches


def match_path(match: Match) -> str:
    """Return the path that rank and alpha patterns must match: the path of the module or of the targeted parameter."""
    return f"{match.path}.{match.parameter}" if match.parameter else match.path


def _unmatched_parameters(
    parameters: Sequence[BareParameter], config: LoraConfig, matches: Sequence[Match]
) -> list[Unmatched]:
    """Return the entries of `target_parameters` that match nothing, with similar names as suggestions."""
    unmatched = []
    for entry in sorted(config.target_parameters or ()):
        if not any(names_path(entry, match_path(match)) for match in matches):
            hint = _nearest(entry.rpartition(".")[2], {p.name for p in parameters if len(p.shape) > 1})
            unmatched.append(_matches_none("target_parameters", entry, f"no parameter{hint}"))
    return unmatched


def _targeted(candidates: Sequence[Candidate], config: LoraConfig, saved: Sequence[str]) -> list[tuple[Candidate, str]]:
    if config.target_modules is None and config.target_parameters:
        return []
    if config.target_modules is None:
        text = "target_modules is not set; name the modules to adapt, or use 'all-linear'."
        raise ConfigError(text, field="target_modules")
    entry_of = _matcher("target_modules", config.target_modules)
    is_selected = selects(config)
    inside = tuple(path + "." for path in saved)
    selected = []
    for candidate in candidates:
        entry = entry_of(candidate)
        if entry is None or candidate.path in saved or candidate.path.startswith(inside):
            continue
        if is_selected(candidate):
            selected.append((candidate, entry))
    return selected


def selects(config: LoraConfig) -> Callable[[Candidate], bool]:
    """Return a function that tells whether a module is in the selected layers and not excluded."""
    excluded = _matcher("exclude_modules", config.exclude_modules) if config.exclude_modules else lambda _: None
    in_layer = _layer_filter(config)
    return lambda candidate: excluded(candidate) is None and in_layer(candidate.path)


def _layer_filter(config: LoraConfig) -> Callable[[str], bool]:
    if config.layers_to_transform is None:
        return lambda _: True
    wanted = config.layers_to_transform
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    lists = config.layers_pattern or r"[^.]+"
    names = [lists] if isinstance(lists, str) else lists
    patterns = [compiled(rf"(?:^|.*?\.)(?:{name})\.(?P<index>\d+)(?:\.|$)", "layers_pattern", name) for name in names]

    def in_layer(path: str) -> bool:
        match = next(filter(None, (pattern.match(path) for pattern in patterns)), None)
        return match is not None and int(match["index"]) in indices

    return in_layer


def _unmatched(
    candidates: Sequence[Candidate],
    config: LoraConfig,
    selected: Sequence[tuple[Candidate, str]],
    bare: Sequence[Match],
) -> list[Unmatched]:
    targeted = [candidate.path for candidate, _ in selected]
    everything = [candidate.path for candidate in candidates]
    used = {entry for _, entry in selected}  # matched entries need not be compared with every path
    unmatched = []
    for field, paths in (("target_modules", targeted), ("exclude_modules", everything)):
        entries = getattr(config, field)
        for entry in () if isinstance(entries, str) else sorted(entries or ()):
            if entry not in used and not any(names_path(entry, path) for path in paths):
                is_elsewhere = any(names_path(entry, path) for path in everything)
                what = "only modules that are excluded or in other layers" if is_elsewhere else None
                unmatched.append(_matches_none(field, entry, what or f"no module{_hint(entry, candidates)}"))
    adapted = [*targeted, *map(match_path, bare)]
    for field in ("rank_pattern", "alpha_pattern") if adapted else ():
        unmatched += unfitting_keys(field, getattr(config, field), adapted)
    return unmatched


def unfitting_keys(field: str, keys: Collection[str], paths: Sequence[str]) -> list[Unmatched]:
    """Return the patterns of a field that match none of the adapted modules, with similar names as suggestions."""
    unmatched = []
    for key in keys:
        if not any(key_fits(key, path) for path in paths):
            hint = _nearest(key.rpartition(".")[2], {path.rpartition(".")[2] for path in paths})
            text = f"{field} key {key!r} matches none of the adapted modules ({len(paths)} in total){hint}."
            unmatched.append(Unmatched(field, key, text))
    return unmatched


def _matches_none(field: str, entry: str, what: str) -> Unmatched:
    return Unmatched(field, entry, f"{field} entry {entry!r} matches {what}.")


def _hint(entry: str, candidates: Sequence[Candidate]) -> str:
    return _nearest(entry, {c.path.rpartition(".")[2] for c in candidates if not c.path[-1:].isdigit()})


def _nearest(word: str, names: Collection[str]) -> str:
    words = nearest(word, sorted(names))
    return f"; nearest: {', '.join(words)}" if words else ""


def _nothing(candidates: Sequence[Candidate], config: LoraConfig, missing: Sequence[Unmatched]) -> TargetError:
    """Return the error for a config that matches neither a module nor a parameter of the model."""
    wanted = config.target_modules
    if not wanted:
        text = (
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
            f"arguments.{''.join(f' {unmatched}' for unmatched in missing)}"
        )
        return TargetError(text, what=sorted(config.target_parameters or ()), field="target_parameters")
    shown = repr(wanted) if isinstance(wanted, str) else repr(sorted(wanted or ()))
    adaptable = sorted({c.path.rsplit(".", 1)[-1] for c in candidates if c.kind})
    hints = [_hint(entry, candidates) for entry in ([] if isinstance(wanted, str) else sorted(wanted or ()))]
    text = (
        f"Target modules {shown} not found in the base model{''.join(hints[:3])}. "
        f"Supported modules of this model: {', '.join(adaptable[:12]) or 'none'}."
    )
    return NoTargetError(text, what=shown, field="target_modules", allowed=adaptable)


def _check_kinds(selected: Sequence[tuple[Candidate, str]]) -> None:
    bad = [(candidate, entry) for candidate, entry in selected if candidate.kind is None]
    if not bad:
        return
    candidate, entry = bad[0]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    what = f"{candidate.path}{more}, named by {entry!r}, is a {candidate.type_name or 'module'}"
    text = f"{what}, which LoRA does not support; target its Linear, Conv1D or Embedding submodules."
    raise TargetError(text, what=entry, where=candidate.path, field="target_modules", allowed=PLANNED)


def _notes_on_names(selected: Sequence[tuple[Candidate, str]]) -> list[Note]:
    """Return notes about names that match several different modules."""
    templates: dict[str, dict[str, list[Candidate]]] = {}
    for candidate, entry in selected:
        if entry != ALL_LINEAR and not any(char in entry for char in r"*+?|()[]\^$"):
            template = re.sub(r"\.\d+(?=\.|$)", ".*", candidate.path)
            templates.setdefault(entry, {}).setdefault(template, []).append(candidate)
    notes = []
    for entry, groups in sorted(templates.items()):
        if len(groups) > 1:
            parts = [
                f"{template} ({members[0].in_features}→{members[0].out_features}, ×{len(members)})"
                for template, members in groups.items()
            ]
            text = f"{entry!r} matches {len(groups)} different modules: {' and '.join(parts)}."
            notes.append(Note(SEVERAL_MODULES, text))
    return notes


def _notes_on_ranks(
    selected: Sequence[tuple[Candidate, str]], parameters: Sequence[BareParameter], matches: Sequence[Match]
) -> list[Note]:
    """Return notes about ranks that are larger than the smaller dimension of the adapted weight."""
    sides = {c.path: min(c.out_features, c.in_features) for c, _ in selected}
    sides |= {parameter.path: min(parameter.shape[-2:], default=0) for parameter in parameters}
    notes = []
    for match in matches:
        path = match_path(match)
        if 0 < sides[path] < match.rank:
            text = f"{path}: rank {match.rank} is larger than the smaller dimension of its weight, {sides[path]}."
            notes.append(Note(LARGE_RANK, text))
    return notes
