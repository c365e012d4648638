"""Resolve which modules and parameters a config targets, by matching paths; for live models and plans.

The rules are PEFT's. A list entry is a path or a dotted suffix of one; a string is a regular expression for the whole
path; "all-linear" is every dense layer except the output head. `exclude_modules` wins. `target_parameters` takes paths
or dotted suffixes, never a pattern. This module does not use torch: it works on names, kinds and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from lorakit.config import HEADS_BY_TASK, LoraConfig, TaskType, check_built
from lorakit.errors import ConfigError, NoTargetError, TargetError, nearest
from lorakit.targets.layer_types import PARAMETER, PLANNED
from lorakit.targets.words import (
    LARGE_RANK,
    SEVERAL_MODULES,
    BareParameter,
    Candidate,
    Match,
    Note,
    Resolution,
    Unmatched,
    compiled,
    first_match,
    key_fits,
    names_path,
)


def targeted_parameters(
    parameters: Sequence[BareParameter], config: LoraConfig, saved: Collection[str] = ()
) -> list[Match]:
    """Return the parameters that `target_parameters` names by a path or a dotted suffix.

    Args:
        parameters: Every named parameter, in the order in which modules define them.
        config: The config; it is only read.
        saved: Paths of modules saved in full; parameters inside them are skipped.

    Raises:
        TargetError: A parameter is on the top-level module, or does not have two or three axes.
    """
    inside = tuple(path + "." for path in saved)
    matches = []
    for parameter in parameters if config.target_parameters else ():
        path = parameter.path
        entry = next((entry for entry in sorted(config.target_parameters or ()) if names_path(entry, path)), None)
        if entry is None or path.startswith(inside):
            continue
        if not parameter.module:
            raise TargetError(
                f"Targeting an nn.Parameter on the top-level module is not supported (parameter {parameter.name!r}): "
                "LoRA wraps the module that holds it. Put the model into another module.",
                what=parameter.name,
                field="target_parameters",
            )
        if len(parameter.shape) not in {2, 3}:
            raise TargetError(
                f"parameter {path!r} has shape {parameter.shape}; LoRA on a parameter needs two or three axes.",
                what=entry,
                where=path,
                field="target_parameters",
            )
        rank = first_match(config.rank_pattern, path, config.r)
        alpha = first_match(config.alpha_pattern, path, config.lora_alpha)
        matches.append(Match(parameter.module, PARAMETER, rank, alpha, entry, parameter.name))
    return matches


def match_path(match: Match) -> str:
    """Return the path that rank and alpha patterns are matched against: the module's, or the parameter's."""
    return f"{match.path}.{match.parameter}" if match.parameter else match.path


def unmatched_parameters(
    parameters: Sequence[BareParameter], config: LoraConfig, found: Sequence[Match]
) -> list[Unmatched]:
    """Return the entries of `target_parameters` that name nothing, with the nearest names.

    Args:
        parameters: As in `targeted_parameters`.
        config: The config.
        found: Paths of the parameters it names.
    """
    unmatched = []
    for entry in sorted(config.target_parameters or ()):
        if not any(names_path(entry, match_path(match)) for match in found):
            hint = _nearest(entry.rpartition(".")[2], {p.name for p in parameters if len(p.shape) > 1})
            text = f"target_parameters entry {entry!r} matches no parameter{hint}."
            unmatched.append(Unmatched("target_parameters", entry, text))
    return unmatched


def no_parameter(config: LoraConfig, missing: Sequence[Unmatched]) -> TargetError:
    """Return the error for a config that names neither a module nor a parameter.

    Args:
        config: The config.
        missing: The entries that name nothing.
    """
    return TargetError(
        "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
        f"arguments.{''.join(f' {unmatched}' for unmatched in missing)}",
        what=sorted(config.target_parameters or ()),
        field="target_parameters",
    )


def too_large(match: Match, parameters: Sequence[BareParameter] | None) -> Note | None:
    """Return a note if a rank is larger than a matrix of its parameter, else None.

    Args:
        match: A parameter that was named.
        parameters: As in `targeted_parameters`.
    """
    shapes = {(p.module, p.name): p.shape for p in parameters or ()}
    smaller = min(shapes[match.path, match.parameter][-2:])
    if not 0 < smaller < match.rank:
        return None
    return Note(LARGE_RANK, f"{match_path(match)}: rank {match.rank} is larger than its smaller side, {smaller}.")


ALL_LINEAR = "all-linear"


def resolve(
    candidates: Sequence[Candidate],
    config: LoraConfig,
    *,
    allow_partial: bool = False,
    parameters: Sequence[BareParameter] | None = None,
) -> Resolution:
    """Find the sites that a config names.

    Args:
        candidates: Every named module of the model, in order, including containers.
        config: The config; it is only read.
        allow_partial: Whether unmatched entries go to `missing` instead of raising an error.
        parameters: Every named parameter, in order; None skips `target_parameters`.

    Returns:
        The resolution; `matches` is never empty.

    Raises:
        NoTargetError: No target module was found in the model.
        TargetError: An entry matches nothing, or a named module does not support LoRA.
        ConfigError: A pattern is not a regular expression, or no targets are given.
        NotYetSupported: The config uses an unsupported feature.
    """
    check_built(config)
    saved, unsaved = saved_modules(candidates, config)
    found = _targeted(candidates, config, saved)
    bare = [] if parameters is None else targeted_parameters(parameters, config, saved)
    missing = [*unsaved, *_unmatched(candidates, config, found, [match_path(match) for match in bare])]
    missing += [] if parameters is None else unmatched_parameters(parameters, config, bare)
    if not found and not bare:
        raise _nothing(candidates, config) if config.target_modules else no_parameter(config, missing)
    if missing and not allow_partial:
        raise TargetError(
            " ".join(map(str, missing)),
            what=missing[0].entry,
            field=missing[0].field,
            override="partial_targets",
        )
    _check_kinds(found, config)
    matches = tuple(
        Match(
            path=candidate.path,
            kind=candidate.kind or "",
            rank=first_match(config.rank_pattern, candidate.path, config.r),
            alpha=first_match(config.alpha_pattern, candidate.path, config.lora_alpha),
            entry=entry,
        )
        for candidate, entry in found
    )
    notes = [*_notes(found, matches), *filter(None, (too_large(match, parameters) for match in bare))]
    return Resolution((*matches, *bare), tuple(saved), tuple(missing), tuple(notes))


def _matcher(name: str, value: Collection[str] | str) -> Callable[[Candidate], str | None]:
    """Return a function from a candidate to the entry that names it, or None."""
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
    """Return the paths that `modules_to_save` and the task name, and the entries that name nothing.

    Args:
        candidates: As in `resolve`.
        config: The config.
    """
    heads = HEADS_BY_TASK.get(config.task_type, ()) if isinstance(config.task_type, TaskType) else ()
    asked = [entry for entry in config.modules_to_save or [] if entry not in heads]
    paths = [c.path for c in candidates if any(names_path(entry, c.path) for entry in (*asked, *heads))]
    outermost = [p for p in paths if not any(p.startswith(other + ".") for other in paths)]
    missing = [
        _matches_none("modules_to_save", entry, f"no module{_hint(entry, candidates)}")
        for entry in asked
        if not any(names_path(entry, path) for path in paths)
    ]
    return outermost, missing


def _targeted(candidates: Sequence[Candidate], config: LoraConfig, saved: Sequence[str]) -> list[tuple[Candidate, str]]:
    if config.target_modules is None and config.target_parameters:
        return []
    if config.target_modules is None:
        raise ConfigError(
            "target_modules is not set; name the modules to adapt, or use 'all-linear'.", field="target_modules"
        )
    entry_of = _matcher("target_modules", config.target_modules)
    excluded = _matcher("exclude_modules", config.exclude_modules) if config.exclude_modules else lambda _: None
    in_layer = _layer_filter(config)
    inside = tuple(path + "." for path in saved)
    found = []
    for candidate in candidates:
        entry = entry_of(candidate)
        if entry is None or candidate.path in saved or candidate.path.startswith(inside):
            continue
        if excluded(candidate) is None and in_layer(candidate.path):
            found.append((candidate, entry))
    return found


def _layer_filter(config: LoraConfig) -> Callable[[str], bool]:
    if config.layers_to_transform is None:
        return lambda _: True
    wanted = config.layers_to_transform
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    lists = [config.layers_pattern] if isinstance(config.layers_pattern, str) else list(config.layers_pattern or ())
    names = "|".join(map(re.escape, lists)) if lists else r"[^.]+"
    pattern = re.compile(rf"(?:^|.*?\.)(?:{names})\.(\d+)(?:\.|$)")

    def in_layer(path: str) -> bool:
        found = pattern.match(path)
        return found is not None and int(found.group(1)) in indices

    return in_layer


def _unmatched(
    candidates: Sequence[Candidate],
    config: LoraConfig,
    found: Sequence[tuple[Candidate, str]],
    bare: Sequence[str] = (),
) -> list[Unmatched]:
    unmatched = []
    if not isinstance(config.target_modules, str):
        used = {entry for _, entry in found}
        for entry in sorted(set(config.target_modules or ()) - used):
            if not any(names_path(entry, candidate.path) for candidate, _ in found):
                unmatched.append(_unmatched_entry("target_modules", entry, candidates))
    excluded = config.exclude_modules
    for entry in sorted(excluded) if excluded and not isinstance(excluded, str) else ():
        if not any(names_path(entry, candidate.path) for candidate in candidates):
            unmatched.append(_unmatched_entry("exclude_modules", entry, candidates))
    paths = [*(candidate.path for candidate, _ in found), *bare]
    for name in ("rank_pattern", "alpha_pattern") if paths else ():
        unmatched += unfitting_keys(name, getattr(config, name), paths)
    return unmatched


def unfitting_keys(field: str, keys: Collection[str], paths: Sequence[str]) -> list[Unmatched]:
    """Return the patterns that fit none of the adapted modules, with the nearest names.

    Args:
        field: Field that holds the patterns, such as "rank_pattern".
        keys: The patterns.
        paths: Dotted paths of the adapted modules.

    Raises:
        ConfigError: A key is not a regular expression.
    """
    unmatched = []
    for key in keys:
        if not any(key_fits(key, path) for path in paths):
            hint = _nearest(key.rpartition(".")[2], {path.rpartition(".")[2] for path in paths})
            text = f"{field} key {key!r} matches none of the {len(paths)} adapted modules{hint}."
            unmatched.append(Unmatched(field, key, text))
    return unmatched


def _unmatched_entry(field: str, entry: str, candidates: Sequence[Candidate]) -> Unmatched:
    if any(names_path(entry, candidate.path) for candidate in candidates):
        return _matches_none(field, entry, "only modules that are excluded or in other layers")
    return _matches_none(field, entry, f"no module{_hint(entry, candidates)}")


def _matches_none(field: str, entry: str, what: str) -> Unmatched:
    return Unmatched(field, entry, f"{field} entry {entry!r} matches {what}.")


def _hint(entry: str, candidates: Sequence[Candidate]) -> str:
    return _nearest(entry, {c.path.rpartition(".")[2] for c in candidates if not c.path[-1:].isdigit()})


def _nearest(word: str, names: Collection[str]) -> str:
    words = nearest(word, sorted(names))
    return f"; nearest: {', '.join(words)}" if words else ""


def _nothing(candidates: Sequence[Candidate], config: LoraConfig) -> NoTargetError:
    wanted = config.target_modules
    shown = repr(wanted) if isinstance(wanted, str) else repr(sorted(wanted or ()))
    adaptable = sorted({c.path.rsplit(".", 1)[-1] for c in candidates if c.kind})
    hints = [_hint(entry, candidates) for entry in ([] if isinstance(wanted, str) else sorted(wanted or ()))]
    return NoTargetError(
        f"Target modules {shown} not found in the base model{''.join(hints[:3])}. "
        f"Supported modules of this model: {', '.join(adaptable[:12]) or 'none'}.",
        what=shown,
        field="target_modules",
        allowed=adaptable,
    )


def _check_kinds(found: Sequence[tuple[Candidate, str]], config: LoraConfig) -> None:
    bad = [(candidate, entry) for candidate, entry in found if candidate.kind is None]
    if not bad:
        return
    candidate, entry = bad[0]
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    raise TargetError(
        f"{candidate.path}{more}, named by {entry!r}, is a {candidate.type_name or 'module'}, which LoRA does not "
        "support; target its Linear, Conv1D or Embedding submodules.",
        what=entry,
        where=candidate.path,
        field="target_modules",
        allowed=PLANNED,
    )


def _notes(found: Sequence[tuple[Candidate, str]], matches: Sequence[Match]) -> list[Note]:
    """Return notes about names that match different modules, and about ranks that are too large."""
    templates: dict[str, dict[str, list[Candidate]]] = {}
    for candidate, entry in found:
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
            text = f"{entry!r} names {len(groups)} different modules: {' and '.join(parts)}."
            notes.append(Note(SEVERAL_MODULES, text))
    for (candidate, _), match in zip(found, matches, strict=True):
        smaller = min(candidate.out_features, candidate.in_features)
        if 0 < smaller < match.rank:
            text = f"{match.path}: rank {match.rank} is larger than the module's smaller side, {smaller}."
            notes.append(Note(LARGE_RANK, text))
    return notes
