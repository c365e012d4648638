"""The result of a comparison with other runtimes, as values; it judges them, but does not know the runtimes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from lorakit.durable import JsonObject

JUDGED_DTYPE = "float32"
"""The dtype whose differences are judged; those of others are reported, because rounding explains any of them."""

CANARY_FACTOR = 2.0
"""Factor by which another model's log-probabilities must be farther than the adapter's, besides the bound."""

OWN_BASE = "lorakit's base"
"""Name of our own base among the models to which an adapter is compared."""


@dataclass(frozen=True)
class GreedyDifference:
    """The first greedy token of a prompt that a runtime chooses differently.

    Attributes:
        prompt: Index of the prompt.
        position: Index of the token in the answer.
        ours: Id of lorakit's token, or None if its answer ends here.
        theirs: Id of the runtime's token, or None if its answer ends here.
        gap: Difference of the two tokens' log-probabilities in lorakit, at least; infinite if one of them is unknown.
    """

    prompt: int
    position: int
    ours: int | None
    theirs: int | None
    gap: float


@dataclass(frozen=True)
class Comparison:
    """One runtime's answers, compared with lorakit's.

    Attributes:
        runtime: As given: a name or a URL.
        title: What computed the answers.
        versions: Package -> version.
        dtype: Dtype in which the runtime computes.
        bound: Largest allowed difference of log-probabilities in float32.
        tokens: Number of log-probabilities.
        other_tokens: Indices of the prompts with other token ids; None if the runtime does not tell its ids.
        difference: Largest difference of log-probabilities from lorakit's, with the adapter.
        distances: Other model of the runtime, or "base" -> largest difference of its log-probabilities from lorakit's
            with the adapter; "lorakit's base" is our own base.
        base_difference: Largest difference of the base from lorakit's base; None if the runtime has no base.
        greedy_same: Number of prompts with the same greedy tokens; None if the runtime does not tell its tokens.
        greedy_first: The first difference in greedy tokens, of the prompt where lorakit is least in doubt.
    """

    runtime: str
    title: str
    versions: Mapping[str, str]
    dtype: str
    bound: float
    prompts: int
    tokens: int
    other_tokens: tuple[int, ...] | None
    difference: float
    distances: Mapping[str, float]
    base_difference: float | None = None
    greedy_same: int | None = None
    greedy_first: GreedyDifference | None = None

    @property
    def is_judged(self) -> bool:
        """Return whether the differences must be within the bound."""
        return self.dtype == JUDGED_DTYPE

    @property
    def problems(self) -> list[str]:
        """Return what is wrong; empty if the runtime gives the adapter's answers."""
        found = []
        if self.other_tokens:
            listed = ", ".join(str(index + 1) for index in self.other_tokens[:5])
            found.append(f"token ids differ for {len(self.other_tokens)} of {self.prompts} prompts (first: {listed})")
        if self.is_judged and not self.difference <= self.bound:
            found.append(f"log-probabilities differ by {self.difference:.2g}, more than {self.bound:.0e}")
        if self.is_judged and self.base_difference is not None and not self.base_difference <= self.bound:
            found.append(f"the base differs by {self.base_difference:.2g} already, more than {self.bound:.0e}")
        first = self.greedy_first
        if self.is_judged and first is not None and first.gap > 2 * self.bound:
            where = f"prompt {first.prompt + 1}, token {first.position + 1}"
            found.append(f"greedy tokens differ at {where}: {first.theirs}, not {first.ours} (gap {first.gap:.2g})")
        for name, distance in self.distances.items():
            if not (distance > self.bound and distance > CANARY_FACTOR * self.difference):
                text = f"cannot tell the adapter from {name}: it is {distance:.2g} from it, {self.difference:.2g} from "
                found.append(text + "lorakit's adapter")
        return found

    def as_dict(self) -> JsonObject:
        """Return the comparison as JSON values; infinity and NaN are null."""
        values = asdict(self) | {"judged": self.is_judged, "problems": self.problems}
        return {name: _plain(value) for name, value in values.items()}


@dataclass(frozen=True)
class VerifyReport:
    """Comparisons of one adapter with lorakit's own answers.

    Attributes:
        adapter: The adapter as given.
        weights_sha256: Hash of its weights file.
        base: Display name of the base.
        dtype: Dtype in which lorakit computed.
        prompts: Where the prompts are from.
        effect: Largest change that the adapter makes to a log-probability of lorakit's base.
    """

    adapter: str
    weights_sha256: str
    base: str
    dtype: str
    prompts: str
    effect: float
    versions: Mapping[str, str]
    comparisons: Sequence[Comparison]

    def as_record(self) -> JsonObject:
        """Return what is recorded with the adapter and published: no path, no URL, no name of a server's other model.

        Each comparison has lorakit's version and the names of the data, because results of several runs are recorded
        together.
        """
        data = ", ".join(re.split(r"[\\/]", name)[-1] for name in self.prompts.split(", "))
        more = {"data": data, "lorakit": dict(self.versions)}
        rows = [{**_published(one).as_dict(), **more} for one in self.comparisons]
        return {"weights_sha256": self.weights_sha256, "comparisons": rows}

    @property
    def is_good(self) -> bool:
        """Return whether there are comparisons, and none has a problem."""
        return bool(self.comparisons) and not any(one.problems for one in self.comparisons)

    def as_dict(self) -> JsonObject:
        """Return the report as JSON values."""
        return {
            "adapter": self.adapter,
            "weights_sha256": self.weights_sha256,
            "base": self.base,
            "dtype": self.dtype,
            "prompts": self.prompts,
            "effect": self.effect,
            "versions": dict(self.versions),
            "good": self.is_good,
            "comparisons": [one.as_dict() for one in self.comparisons],
        }


def _published(one: Comparison) -> Comparison:
    """Return a comparison without the URL of its server and the names of the server's other models."""
    if "://" not in one.runtime:
        return one
    others = [value for name, value in one.distances.items() if name != OWN_BASE]
    nearest = (
        {"another model": min(others, key=lambda value: -math.inf if math.isnan(value) else value)} if others else {}
    )
    own = {OWN_BASE: one.distances[OWN_BASE]} if OWN_BASE in one.distances else {}
    return replace(one, runtime=next(iter(one.versions), "server"), distances={**own, **nearest})


def _plain(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
