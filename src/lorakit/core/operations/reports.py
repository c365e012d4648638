"""What an operation on adapters says of the adapter that it made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lorakit.config import LoraConfig


@dataclass(frozen=True)
class SiteMade:
    """One site of an adapter that was made.

    Attributes:
        path: Where.
        r: Its rank; of experts in one parameter, that of each.
        r_before: Rank of what it stands for: the sum of the combined ones, the adapter as it was, the whole change.
        norm: Frobenius norm of what it stands for, scale included: Σ weight·Δ, Δ, or the change of the weight.
        deviation: How far it is from that, relative to the norm: ‖result − Δ‖ / ‖Δ‖; 0 where the norm is 0.
    """

    path: str
    r: int
    r_before: int
    norm: float
    deviation: float

    @property
    def energy_lost(self) -> float:
        """The square of the deviation: of the nearest of a rank, the share of ‖Δ‖² that the rank lacks."""
        return self.deviation**2


@dataclass(frozen=True)
class MadeReport:
    """What combining, compressing or extracting gave.

    Attributes:
        name: The new adapter, or its folder.
        config: Its config.
        sites: Its sites.
        facts: How it came about, for `save_adapter(..., facts=...)`; a folder has them in `lorakit.json`.
    """

    name: str
    config: LoraConfig
    sites: tuple[SiteMade, ...]
    facts: dict[str, Any]

    @property
    def deviation(self) -> float:
        """The largest deviation of a site."""
        return max((site.deviation for site in self.sites), default=0.0)

    @property
    def energy_lost(self) -> float:
        """Share of the whole adapter's energy that its sites lack."""
        whole = sum(site.norm**2 for site in self.sites)
        return sum(site.norm**2 * site.energy_lost for site in self.sites) / whole if whole else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, without the name."""
        return {
            "config": self.config.as_json(),
            "deviation": self.deviation,
            "energy_lost": self.energy_lost,
            "sites": [{**asdict(site), "energy_lost": site.energy_lost} for site in self.sites],
            **self.facts,
        }
