"""Collect the data that inits need: site inputs for EVA and CorDA, and weight gradients for LoRA-GA.

To bound memory, sites are processed in groups, whose statistics are immediately reduced to the small tensors that the
init needs. All batches are run once for each group.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import EvaConfig, LoraConfig
from lorakit.core.attachment.attaching import with_targets
from lorakit.core.attachment.residual_base import init_context_for
from lorakit.core.inits import Init, InitContext, init_for, init_named
from lorakit.core.kinds import kind_named
from lorakit.core.model.activation import without_adapters
from lorakit.core.model.checks import check_can_move
from lorakit.core.model.fingerprint import fingerprint
from lorakit.core.model.index import AdapterIndex
from lorakit.core.model.target_weights import matched
from lorakit.core.operations.rank_allocation import by_explained_variance, in_groups, with_ranks
from lorakit.core.operations.tensor_sources import PLAIN_TARGETS
from lorakit.core.statistics.collecting import Forward, TakeRows, collect_gradients, collect_inputs
from lorakit.core.statistics.moments import GradientStatistics, InputStatistics, Statistics
from lorakit.errors import ConfigError, DataError
from lorakit.targets import Match, match_path


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
