"""The forward methods in transformers that fused ones are known to equal, from `known_forwards.json`.

`python scripts/known_forwards.py` generates the file from wheels of transformers. Every entry was compared with the
fused `forward`. Changes to the file are reviewed: each new digest is new source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

FILE = "known_forwards.json"


@dataclass(frozen=True)
class KnownForwards:
    """Source that is known.

    Attributes:
        releases: Releases of transformers, oldest first.
        roles: Dict from the digest of a class (`lorakit.speed.identity`) to its roles: names of fused `forward`
            methods, or "part" for a class that a fused `forward` bypasses.
    """

    releases: tuple[str, ...]
    roles: Mapping[str, frozenset[str]]

    def knows(self, digest: str, role: str) -> bool:
        """Return whether a class with a digest may have a role.

        Args:
            digest: Digest of the class, or "".
            role: Name of a fused `forward`, or "part".
        """
        roles = self.roles.get(digest, frozenset())
        return bool(roles) if role == PART else role in roles


PART = "part"
"""Role of a class that only fused `forward` methods of other classes bypass."""


def known_forwards() -> KnownForwards:
    """Read the table of known forward methods."""
    content = json.loads(resources.files(__package__).joinpath(FILE).read_text())
    rows = content["forwards"]
    return KnownForwards(tuple(content["releases"]), {digest: frozenset(row["roles"]) for digest, row in rows.items()})
