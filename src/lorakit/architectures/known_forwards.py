"""The forward methods in transformers that fused ones are known to equal, from `known_forwards.json`.

`python scripts/known_forwards.py` generates the file from wheels of transformers. Changes to the file are reviewed:
each new digest is new source.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, resources

FILE = "known_forwards.json"


@dataclass(frozen=True)
class KnownForwards:
    """Source that is known, in `releases` of transformers, oldest first.

    Attributes:
        roles: Dict from the digest of a class (`lorakit.identity.identities`) to its roles: names of fused `forward`
            methods, or "part", "model", "loss" or "experts …".
    """

    releases: tuple[str, ...]
    roles: Mapping[str, frozenset[str]]

    def knows(self, digest: str, role: str) -> bool:
        """Return whether a class with a digest, or "", has a role: the name of a fused `forward`, or "part"."""
        roles = self.roles.get(digest, frozenset())
        return bool(roles) if role == PART else role in roles

    def covers(self, release: str) -> bool:
        """Return whether the table was generated from a release, such as "5.24.0", with the same first two numbers."""
        return release.split(".")[:2] in [one.split(".")[:2] for one in self.releases]

    @property
    def span(self) -> str:
        """Return the oldest and newest releases, such as "5.0.0 to 5.24.0"."""
        return f"{self.releases[0]} to {self.releases[-1]}"


PART = "part"
"""Role of a class that only fused `forward` methods of other classes bypass."""

MODEL, LOSS = "model", "loss"
"""Roles of the `forward` of a model whose logits are not computed, and of a loss function that is reproduced."""

EXPERTS = "experts"
"""Start of the roles of fused experts; their settings follow (`lorakit.core.layers.experts.role_of`)."""


@functools.cache
def known_forwards() -> KnownForwards:
    """Read the table of known forward methods."""
    content = json.loads(resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8"))
    roles = {digest: frozenset(row["roles"]) for digest, row in content["forwards"].items()}
    return KnownForwards(tuple(content["releases"]), roles)


def unknown_release(forwards: KnownForwards) -> str:
    """Return the installed version of transformers if the table was not generated from such a release, or ""."""
    try:
        installed = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return ""
    return "" if forwards.covers(installed) else installed
