"""Inits and ranks from data: site inputs for EVA and CorDA, weight gradients for LoRA-GA, both for a rank of each site.

To bound memory, sites are processed in groups, whose statistics are immediately reduced to the small tensors that the
init needs. All batches are run once for each group. Ranks are allocated within a fixed number of trainable parameters;
they are stored in a config's patterns, with alphas that preserve the scale of every site.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.config.nested import EvaConfig
from lorakit.core.attachment.attaching import with_targets
from lorakit.core.attachment.residual_base import init_context_for
from lorakit.core.inits import Init, InitContext, init_for, init_named
from lorakit.core.kinds import Fits, Kind, fits, kind_named
from lorakit.core.kinds.kind import only_dense
from lorakit.core.model.activation import without_adapters
from lorakit.core.model.checks import check_can_move
from lorakit.core.model.fingerprint import fingerprint
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.target_weights import matched
from lorakit.core.operations.tensor_sources import PLAIN_TARGETS
from lorakit.core.quantization import weight_format_of
from lorakit.core.statistics.collecting import Forward, TakeRows, collect_gradients, collect_inputs
from lorakit.core.statistics.moments import GradientStatistics, InputStatistics, Statistics
from lorakit.errors import ConfigError, DataError
from lorakit.targets.patterns import exact_key
from lorakit.targets.resolving import Match, match_path

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
        text = "No gradient reached any site, so ranks cannot be allocated; check that the loss depends on the sites."
        raise DataError(text, field="batches")
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


@dataclass(frozen=True)
class DataSites:
    """The sites targeted by a config whose init depends on data.

    Attributes:
        config: The config, with the architecture's default targets if no targets were specified.
    """

    init: Init
    config: LoraConfig
    index: AdapterIndex
    matches: Sequence[Match]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: LoraConfig,
        allow: Collection[str] = (),
        only: Callable[[Match], bool] = lambda _: True,
    ) -> DataSites:
        """Resolve the targets of a config, of those that `only` accepts, or raise a ConfigError if its init does not
        support them.

        `allow` can hold "partial_targets", for entries of the config that match nothing.
        """
        init = init_named(config.init_lora_weights)
        if init.digest is None:
            text = f"init_lora_weights is {config.init_lora_weights!r}, which uses no data; attach without statistics."
            raise ConfigError(text, what=config.init_lora_weights, field="init_lora_weights")
        if config.layer_replication:
            text = "layer_replication adds layers that do not exist yet when data is collected. Use another init."
            raise ConfigError(text, what=config.layer_replication, field="layer_replication")
        config, index = with_targets(config, model), AdapterIndex.of(model)
        matches = [match for match in matched(index, config, "partial_targets" in allow).matches if only(match)]
        for match in matches:
            init_for(config.init_lora_weights, index.kind(match.kind or ""), match_path(match))
        return cls(init, config, index, matches)

    def collect(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: Forward,
        keep: Callable[[Any], Tensor | TakeRows | None] | None = None,
    ) -> dict[str, dict[str, Tensor]]:
        """Collect what `Init.digest` returns, tensors (…) by path and name, one group of sites at a time, without
        adapters.

        The batches must be a list if there are several groups of sites. `forward` returns the loss, a scalar, for
        "lora_ga", which ignores `keep` (see `collect_inputs`). A DataError if a site received no data.
        """
        contexts = self._contexts()
        sites: dict[str, dict[str, Tensor]] = {}
        groups = in_groups(list(contexts), lambda path: self._size_bytes(contexts[path]))
        if len(groups) > 1 and isinstance(batches, Iterator):
            text = f"The batches are run {len(groups)} times to limit memory use; pass a list instead of an iterator."
            raise DataError(text, what=len(groups), field="batches")
        collected: dict[str, InputStatistics] | dict[str, GradientStatistics]
        with without_adapters(model):
            for group in groups:
                if self.init.needs == "gradients":
                    collected = collect_gradients(model, group, batches, forward)
                else:
                    even = self.init.name == "corda"
                    collected = collect_inputs(model, group, batches, forward, keep=keep, even=even)
                sites |= {path: self._digest(contexts[path], collected.pop(path)) for path in group}
        return sites

    def reduce(self, model: nn.Module, collected: Mapping[str, InputStatistics | GradientStatistics]) -> Statistics:
        """Reduce data that was collected elsewhere to statistics for `attach`; sites without data are left out."""
        contexts = self._contexts().items()
        digests = {path: self._digest(context, collected[path]) for path, context in contexts if path in collected}
        return Statistics(self.config, digests, base=fingerprint(model))

    @torch.no_grad()
    def _digest(self, context: InitContext, collected: InputStatistics | GradientStatistics) -> dict[str, Tensor]:
        try:
            return self.init.digest(context, collected)  # type: ignore[misc]
        except DataError as cause:
            raise DataError(f"{context.path}: {cause}", **{**cause.fields, "where": context.path}) from None

    def _contexts(self) -> dict[str, InitContext]:
        """Return a dict from site path to `InitContext`."""
        contexts: dict[str, InitContext] = {}
        for match in self.matches:
            targets = self.index.targets(match.path, kind_named(match.kind))
            for target in targets:
                init_for(self.config.init_lora_weights, target.kind, target.path)
            if self.init.changes_base:
                check_can_move(self.index, targets[0], self.init)
            contexts[targets[0].path] = init_context_for(self.index, self.config, match, targets[0])
        return contexts

    def _size_bytes(self, context: InitContext) -> int:
        """Return the size in bytes of the data collected at a site, before it is reduced."""
        n = math.prod(context.A_shape[1:])
        return 4 * n * (n if self.init.needs == "inputs" else context.spec.out_features)


def collect_for(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Any],
    forward: Forward,
    *,
    keep: Callable[[Any], Tensor | None] | None = None,
    allow: Collection[str] = (),
) -> Statistics:
    """Collect the statistics that a config's init needs; pass them to `attach` with their config, `found.config`.

    Adapters on the model are inactive during collection. For "eva" with rho above 1, the config's ranks are
    redistributed, and sites that get rank 0 are left out.

    Args:
        model: The base model; it is not changed.
        config: Targets, ranks and init of the adapter; it is not modified.
        batches: Batches to pass to `forward`; must be a list if the statistics of all sites exceed the memory limit.
        forward: Runs the model on a batch; for "lora_ga" it returns the loss, a scalar.
        keep: Function from a batch to a mask (rows, length) of the positions to use; ignored for "lora_ga".
        allow: "partial_targets" allows entries of the config that match nothing.
    """
    data_sites = DataSites.of(model, config, allow)
    config, sites = data_sites.config, data_sites.collect(model, batches, forward, keep)
    if data_sites.init.name == "eva":
        configured = {match.path: match.rank for match in data_sites.matches}
        ratios = {path: tensors["ratios"].tolist() for path, tensors in sites.items()}
        ranks = ranks_by_variance(config.eva_config or EvaConfig(), configured, ratios)
        if ranks != configured:
            config = redistributed(config, data_sites.matches, ranks)
            sites = {path: tensors for path, tensors in sites.items() if ranks[path]}
    return Statistics(config, sites, base=fingerprint(model))


def ranks_by_variance(
    settings: EvaConfig, ranks: Mapping[str, int], ratios: Mapping[str, Sequence[float]]
) -> dict[str, int]:
    """Return EVA's ranks: each of the largest variance fractions adds 1 to its site's rank, up to the config's total.

    `ratios` are the fractions of the variance that a site's directions explain, in descending order, one per possible
    rank.

    Source:
        Paischer et al. 2024, arXiv:2410.07170, section 3.3.
    """
    if settings.rho == 1:
        return dict(ranks)
    return by_explained_variance(ratios, dict.fromkeys(ratios, 1), sum(ranks.values()), least=0)


def redistributed(config: LoraConfig, matches: Sequence[Match], ranks: Mapping[str, int]) -> LoraConfig:
    """Return a copy of a config with the new ranks, dropping sites whose rank is 0.   [docs/math.md (64)]"""
    left = [match for match in matches if ranks[match.path]]
    changed = with_ranks(config, left, ranks)
    if not (config.eva_config or EvaConfig()).adjust_scaling_factors:
        changed = dataclasses.replace(changed, alpha_pattern=dict(config.alpha_pattern))
    if len(left) < len(matches):
        targets = {match.path for match in left}
        changed = dataclasses.replace(changed, target_modules=targets, **PLAIN_TARGETS)
    return changed
