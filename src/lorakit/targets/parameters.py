"""Which bare parameters a config names: `target_parameters`, paths or dotted suffixes, never a pattern."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lorakit.config import LoraConfig
from lorakit.errors import TargetError, nearest
from lorakit.targets.words import BareParameter, Match, first_match, names_path


def targeted_parameters(
    parameters: Sequence[BareParameter], config: LoraConfig, saved: Collection[str] = ()
) -> list[Match]:
    """The bare parameters that `target_parameters` names: each entry is a path or a dotted suffix of one.

    Args:
        parameters: Every named parameter, in the order in which modules define them.
        config: The config; it is only read.
        saved: Paths of the modules that are copied whole; what is inside is left to the copy.

    Raises:
        TargetError: One lies on the model itself, or in a module that has no matrix of that name.
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
                "a layer has to stand around the module that holds it. Put the model into another module."
            )
        if len(parameter.shape) not in {2, 3}:
            raise TargetError(
                f"The parameter {path!r} has shape {parameter.shape}; LoRA on a parameter needs two axes or three."
            )
        rank = first_match(config.rank_pattern, path, config.r)
        alpha = first_match(config.alpha_pattern, path, config.lora_alpha)
        matches.append(Match(parameter.module, "Parameter", rank, alpha, entry, parameter.name))
    return matches


def match_path(match: Match) -> str:
    """What the patterns of ranks and alphas are held against: the module's path, or the parameter's."""
    return f"{match.path}.{match.parameter}" if match.parameter else match.path


def unmatched_parameters(parameters: Sequence[BareParameter], config: LoraConfig, found: Sequence[Match]) -> list[str]:
    """A sentence for each entry of `target_parameters` that names nothing, with the nearest names.

    Args:
        parameters: As `targeted_parameters`; so is the next.
        config: The config.
        found: What it names.
    """
    sentences = []
    for entry in sorted(config.target_parameters or ()):
        if not any(names_path(entry, match_path(match)) for match in found):
            words = nearest(entry.rpartition(".")[2], sorted({p.name for p in parameters if len(p.shape) > 1}))
            hint = f"; nearest: {', '.join(words)}" if words else ""
            sentences.append(f"target_parameters entry {entry!r} matches no parameter{hint}.")
    return sentences


def no_parameter(missing: Sequence[str]) -> str:
    """The sentence where neither a module nor a parameter is named.

    Args:
        missing: Sentences about the entries that name nothing.
    """
    return " ".join(
        (
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
            "arguments.",
            *missing,
        )
    )


def too_large(match: Match, parameters: Sequence[BareParameter] | None) -> str:
    """A sentence where a rank is larger than a matrix of its parameter; empty where it is not.

    Args:
        match: A parameter that was named.
        parameters: As `targeted_parameters`.
    """
    shapes = {(p.module, p.name): p.shape for p in parameters or ()}
    smaller = min(shapes[match.path, match.parameter][-2:])
    if not 0 < smaller < match.rank:
        return ""
    return f"{match_path(match)}: rank {match.rank} is larger than its smaller side, {smaller}."
