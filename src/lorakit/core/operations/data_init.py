"""Look at data for the inits that need it: EVA and CorDA at what sites receive, LoRA-GA at gradients.

Sites are looked at a few at a time, and what was collected of each is reduced at once to the small tensors that its
init needs, so memory is bounded whatever the model's size; the batches are gone through once for each such group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import EvaConfig, LoraConfig
from lorakit.core.attachment.attaching import with_targets
from lorakit.core.attachment.residual_base import check_can_move, init_context_for
from lorakit.core.inits import Init, InitContext, init_for, init_named
from lorakit.core.kinds import kind_named
from lorakit.core.model.activation import disable
from lorakit.core.model.fingerprint import fingerprint
from lorakit.core.model.index import AdapterIndex, TargetWeight, find_state
from lorakit.core.model.target_weights import bare_parameters
from lorakit.core.operations.rank_allocation import by_explained_variance, in_groups, with_ranks
from lorakit.core.statistics.collecting import Forward, TakeRows, collect_gradients, collect_inputs
from lorakit.core.statistics.moments import Statistics
from lorakit.errors import ConfigError, DataError
from lorakit.targets import Match, match_path, resolve


@dataclass(frozen=True)
class DataSites:
    """The sites of a config whose init uses data.

    Attributes:
        init: The config's init.
        config: The config, with the default targets of the architecture if it names none.
        index: Index of the base.
        matches: The sites with their ranks.
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
        """Resolve the targets of a config and check that its init supports them.

        Args:
            model: The base; only read.
            config: Targets, ranks and init; only read.
            allow: "partial_targets" allows entries of the config that match nothing.
            only: Selects matches; the others are left out.

        Raises:
            ConfigError: The init uses no data, or does not support a site.
            TargetError: The config names nothing.
        """
        init = init_named(config.init_lora_weights)
        if init.digest is None:
            raise ConfigError(
                f"init_lora_weights is {config.init_lora_weights!r}, which looks at no data. Attach it as it is.",
                what=config.init_lora_weights,
                field="init_lora_weights",
            )
        if config.layer_replication:
            raise ConfigError(
                "layer_replication stacks layers that are not there while data is collected. Use another init."
            )
        config, index = with_targets(config, model), AdapterIndex.of(model)
        bare = bare_parameters(index) if config.target_parameters else None
        found = resolve(index.candidates, config, allow_partial="partial_targets" in allow, parameters=bare)
        matches = [match for match in found.matches if only(match)]
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
        """Collect what the init needs, a few sites at a time; adapters on the model do not act meanwhile.

        Args:
            model: The base; it is left as it was.
            batches: What `forward` takes; a list if all sites together need too much memory.
            forward: Runs the model on a batch; for "lora_ga" it returns the loss, a scalar.
            keep: As in `collect_inputs`; not for "lora_ga".

        Returns:
            Path -> name -> tensor (…), as the init defines them.

        Raises:
            ConfigError: The base cannot be changed by this init, or a rank is too large.
            DataError: There is no batch, a mask does not fit, or no data reached a site.
        """
        blanks = self._blanks()
        sites: dict[str, dict[str, Tensor]] = {}
        groups = in_groups(list(blanks), lambda path: _size_bytes(self.init, blanks[path]))
        if len(groups) > 1 and isinstance(batches, Iterator):
            raise DataError(
                f"The batches are gone through {len(groups)} times to bound memory. Give a list, no iterator."
            )
        with contextlib.nullcontext() if find_state(model) is None else disable(model):
            for group in groups:
                sites |= _looked_at(model, self.init, {path: blanks[path] for path in group}, batches, forward, keep)
        return sites

    @torch.no_grad()
    def reduce(self, model: nn.Module, collected: Mapping[str, Any]) -> Statistics:
        """Reduce what was collected elsewhere to statistics for `attach`.

        Args:
            model: The base; only read.
            collected: Path -> `InputStatistics` or `GradientStatistics`; sites that are not in it are left out.

        Raises:
            ConfigError: The base cannot be changed by this init, or a rank is too large.
        """
        found = {
            path: self.init.digest(blank, collected[path])  # type: ignore[misc]
            for path, blank in self._blanks().items()
            if path in collected
        }
        return Statistics(self.config, found, base=fingerprint(model))

    def _blanks(self) -> dict[str, InitContext]:
        blanks: dict[str, InitContext] = {}
        for match in self.matches:
            place = _only_place(self.index.places(match.path, kind_named(match.kind)), self.config)
            if self.init.changes_base:
                check_can_move(self.index, place, self.init)
            blanks[place.path] = init_context_for(self.index, self.config, match, place)
        return blanks


def collect_for(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Any],
    forward: Forward,
    *,
    keep: Callable[[Any], Tensor | None] | None = None,
    allow: Collection[str] = (),
) -> Statistics:
    """What the init of a config needs of the data: `attach(model, found.config, statistics=found)` uses it.

    Adapters that sit on the model do not act meanwhile. For "eva" with rho above 1 the ranks of the config are
    redistributed, and a site that gets none is left out.

    Args:
        model: The base; it is left as it was.
        config: Where the adapter will sit, its ranks, its init; it is only read.
        batches: What `forward` takes; a list, where more is looked at than fits into memory at once.
        forward: Runs the model on a batch; for "lora_ga" it returns the loss, a scalar.
        keep: From a batch to a mask (rows, length) of the positions that count; not for "lora_ga".
        allow: "partial_targets" lets entries of the config name nothing.

    Returns:
        The statistics, with the config to attach.

    Raises:
        ConfigError: The init needs no data, or has no meaning at a site.
        TargetError: The config names nothing, or a site whose inputs are no rows of numbers.
        DataError: There is no batch, a mask does not fit, or nothing of the data reached a site.
    """
    found = DataSites.of(model, config, allow)
    config, sites = found.config, found.collect(model, batches, forward, keep)
    if found.init.name == "eva":
        given = {match.path: match.rank for match in found.matches}
        ratios = {path: tensors["ratios"].tolist() for path, tensors in sites.items()}
        ranks = ranks_by_variance(config.eva_config or EvaConfig(), given, ratios)
        if ranks != given:
            config = redistributed(config, found.matches, ranks)
            sites = {path: tensors for path, tensors in sites.items() if ranks[path]}
    return Statistics(config, sites, base=fingerprint(model))


def reduced(
    model: nn.Module, config: LoraConfig, collected: Mapping[str, Any], allow: Collection[str] = ()
) -> Statistics:
    """Statistics for `attach` from what was collected elsewhere.

    Args:
        model: The base; it is left as it was.
        config: As in `collect_for`; its ranks stay.
        collected: Path -> `InputStatistics` or `GradientStatistics`; sites that are not in it are left out.
        allow: As in `collect_for`.

    Raises:
        ConfigError: The init needs no data, or has no meaning at a site.
        TargetError: The config names nothing.
    """
    return DataSites.of(model, config, allow).reduce(model, collected)


def ranks_by_variance(
    settings: EvaConfig, ranks: Mapping[str, int], ratios: Mapping[str, Sequence[float]]
) -> dict[str, int]:
    """EVA's ranks: the pooled shares of variance, strongest first, until the ranks of the config are spent.

    Args:
        settings: With rho at 1 the ranks stay.
        ranks: Path -> rank in the config.
        ratios: Path -> share of the variance of each direction, strongest first, as many as its rank may be.

    Returns:
        Path -> rank, which may be 0.

    Source:
        Paischer et al. 2024, arXiv:2410.07170, section 3.3.
    """
    if settings.rho == 1:
        return dict(ranks)
    return by_explained_variance(ratios, dict.fromkeys(ratios, 1), sum(ranks.values()), least=0)


def redistributed(config: LoraConfig, matches: Sequence[Match], ranks: Mapping[str, int]) -> LoraConfig:
    """A config with other ranks, in which sites that get none are not named.   [docs/math.md (64)]

    Args:
        config: As it was given; its `eva_config` says whether scales stay as they were.
        matches: The sites with their ranks.
        ranks: Path -> new rank.

    Returns:
        The config.
    """
    left = [match for match in matches if ranks[match.path]]
    found = with_ranks(config, left, ranks)
    if not (config.eva_config or EvaConfig()).adjust_scaling_factors:
        found = dataclasses.replace(found, alpha_pattern=dict(config.alpha_pattern))
    if len(left) < len(matches):
        found = dataclasses.replace(
            found,
            target_modules={match.path for match in left},
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
        )
    return found


def _only_place(places: Sequence[TargetWeight], config: LoraConfig) -> TargetWeight:
    for place in places:
        init_for(config.init_lora_weights, place.kind, place.path)
    return places[0]


def _size_bytes(init: Init, blank: InitContext) -> int:
    """Memory of what is collected at a site until it is reduced."""
    n = math.prod(blank.A_shape[1:])
    return 4 * n * (n if init.needs == "inputs" else blank.spec.out_features)


def _looked_at(
    model: nn.Module,
    init: Init,
    blanks: dict[str, InitContext],
    batches: Iterable[Any],
    forward: Forward,
    keep: Callable[[Any], Tensor | TakeRows | None] | None,
) -> dict[str, dict[str, Tensor]]:
    paths = list(blanks)
    collected: Any
    if init.needs == "gradients":
        collected = collect_gradients(model, paths, batches, forward)
    else:
        collected = collect_inputs(model, paths, batches, forward, keep=keep, even=init.name == "corda")
    found = {}
    with torch.no_grad():
        for path in paths:
            if init.digest is not None:
                try:
                    found[path] = init.digest(blanks[path], collected.pop(path))
                except DataError as cause:
                    raise DataError(f"{path}: {cause}", **{**cause.fields, "where": path}) from None
    return found
