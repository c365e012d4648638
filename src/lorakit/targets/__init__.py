"""Resolve which modules and parameters a config targets: pure matching over paths, for live models and plans."""

from lorakit.targets.resolving import (
    ALL_LINEAR,
    match_path,
    resolve,
    saved_modules,
    targeted_parameters,
    unfitting_keys,
)
from lorakit.targets.words import (
    LARGE_RANK,
    SEVERAL_MODULES,
    BareParameter,
    Candidate,
    Match,
    Note,
    Resolution,
    Unmatched,
    first_match,
    key_fits,
    names_path,
)

__all__ = [
    "ALL_LINEAR",
    "LARGE_RANK",
    "SEVERAL_MODULES",
    "BareParameter",
    "Candidate",
    "Match",
    "Note",
    "Resolution",
    "Unmatched",
    "first_match",
    "key_fits",
    "match_path",
    "names_path",
    "resolve",
    "saved_modules",
    "targeted_parameters",
    "unfitting_keys",
]
