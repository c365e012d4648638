"""Allocate ranks to sites within a fixed number of trainable parameters, by gradients or inputs of the base model.

The ranks are stored in a config's patterns, with alphas that preserve the scale of every site.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.attachment.attaching import with_targets
from lorakit.core.kinds import Fits, Kind, fits
from lorakit.core.kinds.kind import only_dense
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.target_weights import matched
from lorakit.core.quantization import weight_format_of
from lorakit.core.statistics.collecting import Forward, collect_gradients, collect_inputs
from lorakit.errors import ConfigError, DataError
from lorakit.targets import Match, exact_key

Criterion = Literal["gradients", "inputs"]

LEAST, MOST = 0.5, 4.0
"""Bounds on a site's rank, relative to the rank in the config, as in GoRA (4 and 32 for a reference rank of 8)."""

MAX_BYTES = 2 << 30
"""Limit in bytes on the statistics held at one time; this limit determines the number of passes over the batches."""


@dataclass(frozen=True)
class Allocation:
    """The result of a rank allocation.

    Attributes:
        budget: Total number of elements in the factors of all sites at the ranks in the original config.
        evidence: Dict from path to the value of the criterion: the sensitivity of the weight, or the fraction of the
            input variance that the site's rank explains. Sites that the criterion does not support keep their rank and
            have no entry.
    """

    ranks: Mapping[str, int]
    config: LoraConfig
    parameters: int
    budget: int
    evidence: Mapping[str, float]


def allocate(
    model: nn.Module,
    config: LoraConfig,
    batches: Sequence[Any],
    forward: Forward,
    *,
    by: Criterion = "gradients",
    allow: Collection[str] = (),
) -> Allocation:
    """Propose new ranks for a config's sites without exceeding the number of parameters that the config requires.

    "gradients" uses `by_sensitivity` and supports dense sites and embeddings; "inputs" uses `by_explained_variance` and
    supports dense sites. Other sites keep their rank. All batches are run once for each group of sites whose statistics
    fit in `MAX_BYTES`. `forward` returns the loss, a scalar. `allow`
    can hold "partial_targets", for entries that match nothing. A ConfigError if `by` is unknown.
    """
    if by not in RANKED:
        raise ConfigError.of("by", by, allowed=RANKED)
    config, site_map = with_targets(config, model), AdapterIndex.of(model)
    targeted = matched(site_map, config, "partial_targets" in allow).matches
    matches = [match for match in targeted if not match.parameter]
    modules = {match.path: site_map.base(match.path) for match in matches}
    sizes = {c.path: (c.out_features, c.in_features) for c in site_map.candidates if c.path in modules}
    chosen = [match for match in matches if fits(RANKED[by], site_map.kind(match.kind))]
    before = {match.path: match.rank for match in chosen}
    costs = {path: sum(size) for path, size in sizes.items()}
    evidence: dict[str, float] = {}
    if by == "gradients" and chosen:
        for group in in_groups(list(before), lambda path: 4 * math.prod(sizes[path])):
            for path, statistics in collect_gradients(model, group, batches, forward).items():
                evidence[path] = sensitivity(modules[path], statistics.mean()) if statistics.calls else 0.0
        ranks = by_sensitivity(evidence, costs, before, {path: min(sizes[path]) for path in before})
    else:  # also reached if no sites are supported and there are no ranks to allocate
        ratios: dict[str, list[float]] = {}
        for group in in_groups(list(before), lambda path: 4 * sizes[path][1] ** 2):
            for path, inputs in collect_inputs(model, group, batches, forward).items():
                most = min(round(MOST * before[path]), *sizes[path])
                ratios[path] = inputs.principal(most).ratios.tolist() if inputs.rows else []
        ranks = by_explained_variance(ratios, costs, sum(before[path] * costs[path] for path in before))
        evidence = {path: sum(values[: ranks[path]]) for path, values in ratios.items()}
    spread = {match.path: ranks.get(match.path, match.rank) for match in matches}
    return Allocation(
        spread,
        with_ranks(config, matches, spread),
        sum(rank * costs[path] for path, rank in spread.items()),
        sum(match.rank * costs[match.path] for match in matches),
        evidence,
    )


def _is_dense_or_table(kind: Kind) -> bool:
    return kind.is_dense or (kind.acts_on == "input" and not kind.drops)


RANKED: Mapping[str, Fits] = {"inputs": only_dense, "gradients": _is_dense_or_table}
"""Dict from each criterion to a function that returns whether the criterion supports a kind of site."""


def sensitivity(module: nn.Module, gradient: Tensor) -> float:
    """Return I = mean |W ∘ G|, the mean first-order change in the loss if an element is zeroed.   [docs/math.md (19)]

    W is the weight of a dense layer or an embedding, and G (out, in) the gradient of the loss for its canonical form.

    Source:
        He et al. 2025, arXiv:2502.12171 (GoRA), section 3.
    """
    base = weight_format_of(module)
    return float((base.read(module, base.stored(module, "weight")) * gradient).abs().mean())


def by_sensitivity(
    sensitivities: Mapping[str, float], costs: Mapping[str, int], ranks: Mapping[str, int], limits: Mapping[str, int]
) -> dict[str, int]:
    """Return clipped ranks proportional to I/√(in + out) that need no more parameters than the given ranks.

    This is GoRA's rule with a strict budget: the proportionality factor is the largest one for which the clipped ranks,
    `LEAST` to `MOST` times the given ones and within the limits, stay within the budget. The costs are in + out. A
    DataError if every sensitivity I, the mean magnitude of W ∘ G, is zero.

    Source:
        He et al. 2025, arXiv:2502.12171 (GoRA), section 3: ranks from normalized sensitivities, with cost √(in + out).
    """
    largest = max(sensitivities.values(), default=0.0)
    if not largest > 0:
        raise DataError(
            "No gradient reached any site, so ranks cannot be allocated; check that the loss depends on the sites.",
            field="batches",
        )
    weights = {path: value / largest / math.sqrt(costs[path]) for path, value in sensitivities.items()}
    least = {path: max(1, math.ceil(LEAST * ranks[path])) for path in weights}
    most = {path: max(least[path], min(math.floor(MOST * ranks[path]), limits[path])) for path in weights}
    budget = sum(ranks[path] * costs[path] for path in weights)

    def at(factor: float) -> dict[str, int]:
        return {path: min(max(int(factor * weights[path]), least[path]), most[path]) for path in weights}

    low, high = 0.0, 1e9 * max(most.values())  # sensitivities below a billionth of the largest are ignored
    for _ in range(100):
        middle = (low + high) / 2
        if sum(rank * costs[path] for path, rank in at(middle).items()) <= budget:
            low = middle
        else:
            high = middle
    return at(low)


def by_explained_variance(
    ratios: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, least: int = 1
) -> dict[str, int]:
    """Allocate ranks to the sites whose input directions explain the most variance, within a budget.

    The fractions of all sites are pooled and sorted; each selected fraction adds 1 to its site's rank. If all costs are
    1 and `least` is 0, this is EVA's redistribution.

    Args:
        ratios: Dict from path to the fractions of the variance that the site's principal directions explain, in
            descending order, with one fraction for each possible rank.
        costs: Dict from path to the cost of increasing the rank by 1: in + out parameters, or 1.
        budget: Maximum total cost.
        least: Minimum rank of each site; its cost is subtracted from the budget first.

    Source:
        Paischer et al. 2024, arXiv:2410.07170 (EVA), section 3.3.
    """
    ranks = dict.fromkeys(ratios, least)
    left = budget - sum(least * costs[path] for path in ratios)
    pooled = [(ratio, path) for path, values in ratios.items() for ratio in values[least:]]
    for _, path in sorted(pooled, key=lambda pair: -pair[0]):  # stable: the model's order breaks ties
        if costs[path] <= left:
            ranks[path] += 1
            left -= costs[path]
    return ranks


def with_ranks(config: LoraConfig, matches: Sequence[Match], ranks: Mapping[str, int]) -> LoraConfig:
    """Return a copy of a config with patterns that set each site's new rank and an alpha that preserves the scale.

    The keys of the patterns are full paths.
    """
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    paths = [match.path for match in matches]
    for match in matches:
        ratio = ranks[match.path] / match.rank
        alpha = match.alpha * (math.sqrt(ratio) if config.use_rslora else ratio)
        key = exact_key(match.path, paths)
        if ranks[match.path] != config.r:
            rank_pattern[key] = ranks[match.path]
        if alpha != config.lora_alpha:
            alpha_pattern[key] = alpha
    return dataclasses.replace(config, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)


def in_groups(paths: Sequence[str], size_bytes: Callable[[str], int]) -> list[list[str]]:
    """Divide paths into groups whose statistics fit in `MAX_BYTES`, with at least one path in each group."""
    groups: list[list[str]] = []
    room = 0
    for path in paths:
        if not groups or size_bytes(path) > room:
            groups.append([])
            room = MAX_BYTES
        groups[-1].append(path)
        room -= size_bytes(path)
    return groups
