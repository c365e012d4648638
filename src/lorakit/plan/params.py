"""Count trainable parameters exactly, by site, shape, kind and rank; `lorakit.targets` selects the sites.

Trainable token rows are included; those of tied weights are counted once. This module does not handle bytes or time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lorakit.architectures.layouts import is_inside, role, short_roles
from lorakit.architectures.shapes import ModelShape, SiteShape, replicated
from lorakit.choices import EMBEDDING, LINEAR, PARAMETER
from lorakit.config import HEADS_BY_TASK, LoraConfig, scale
from lorakit.config.variants import costs_of
from lorakit.errors import ConfigError, TargetError, UsageError
from lorakit.plan.optimizer_state import OPTIMIZERS
from lorakit.targets.experts import note_on_rest, with_current_names
from lorakit.targets.patterns import names_path
from lorakit.targets.resolving import ALL_LINEAR, BareParameter, Candidate, Match, Note, Unmatched, match_path, resolve


def trained_rows(shape: ModelShape, config: LoraConfig, adapted: Collection[str]) -> dict[str, int]:
    """Return the number of parameters in the token rows that a config trains, by path of the embedding or output head.

    Raises:
        TargetError: A name matches no embedding or head, or a matching module is one of `adapted`, the sites with
            factors.
    """
    named = _named(shape, config.trainable_token_indices)
    counts: dict[str, int] = {}
    leaders: dict[str, Sequence[int]] = {}
    for site, indices in sorted(named, key=lambda pair: pair[0].kind != EMBEDDING):
        weight = site.tied_to or site.path
        if site.path in adapted or weight in adapted:
            text = (
                f"trainable_token_indices cannot be applied to {site.path}, which has LoRA weights; remove it "
                "from target_modules."
            )
            raise TargetError(text, where=site.path, field="trainable_token_indices")
        if leaders.get(weight) != indices:
            leaders.setdefault(weight, indices)
            counts[site.path] = len(indices) * (site.out_features if site.kind == EMBEDDING else site.in_features)
    return counts


def with_new_tokens(shape: ModelShape, config: LoraConfig, tokens: int) -> LoraConfig:
    """Return a config that also trains the rows of tokens that are added to a model of this shape (`--new-tokens`).

    Raises:
        TargetError: The model has no embedding.
    """
    (embedding, _), *_ = _named(shape, [])
    rows = list(range(embedding.in_features, embedding.in_features + tokens))
    heads = [s for s in shape.sites if s.kind == LINEAR and not s.dense and s.out_features == embedding.in_features]
    apart = [head.path for head in heads if head.tied_to != embedding.path]
    asked = dict.fromkeys((embedding.path, *apart), rows) if apart else rows
    return config.with_fields(trainable_token_indices=asked)


def with_full_modules(config: LoraConfig, paths: Iterable[str]) -> LoraConfig:
    """Return a config that also trains these modules in full, except for the heads that its task type selects."""
    heads = HEADS_BY_TASK.get(config.task_type, ())
    extra = [path for path in paths if not any(names_path(head, path) for head in heads)]
    if not extra:
        return config
    return config.with_fields(modules_to_save=sorted({*(config.modules_to_save or ()), *extra}))


def for_task(config: LoraConfig, shape: ModelShape) -> LoraConfig:
    """Return a config that also trains what the task trains in full; "all-linear" leaves out layers without effect."""
    config = with_full_modules(config, shape.full_modules)
    left_out = config.exclude_modules or []
    is_all = isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    if not is_all or isinstance(left_out, str) or not shape.unused_modules:
        return config
    return config.with_fields(exclude_modules=sorted({*left_out, *shape.unused_modules}))


def read_out(shape: ModelShape, rows: Mapping[str, int]) -> int:
    """Return the number of parameters in token rows of heads and of embeddings tied to one, which all states meet."""
    heads = {path for s in shape.sites if s.kind != EMBEDDING for path in (s.path, s.tied_to)}
    return sum(count for path, count in rows.items() if path in heads)


def _named(
    shape: ModelShape, asked: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> list[tuple[SiteShape, Sequence[int]]]:
    if asked is None:
        return []
    field = "trainable_token_indices"
    tables = [site for site in shape.sites if site.kind in (EMBEDDING, LINEAR)]
    if not isinstance(asked, Mapping):
        inputs = [site for site in tables if site.kind == EMBEDDING]
        of_tokens = [site for site in inputs if site.in_features == shape.vocab] or inputs
        if not of_tokens:
            raise TargetError(f"{field}: this model has no embedding.", field=field)
        return [(of_tokens[0], asked)]
    pairs = []
    for name, indices in asked.items():
        sites = [site for site in tables if names_path(name, site.path)]
        if not sites:
            raise TargetError(f"{field}: the model has no embedding or head named {name!r}.", what=name, field=field)
        pairs += [(site, indices) for site in sites]
    return pairs


@dataclass(frozen=True)
class SiteCount:
    """Trainable parameters of one site.

    Attributes:
        kind: "Linear", "Conv1D", "Embedding", or "Parameter" for a parameter named in `target_parameters`.
        out_features: Number of rows of the (out, in) weight, or of each expert's weight.
        scale: Scale of B·A at this site.
        entry: The target entry that matched the site.
        factors: Number of elements in A and B: experts × rank × (in + out).
        own_numbers: Number of values that the variant trains in addition to A and B; negative if its A and B are
            smaller than those of plain LoRA.
        reads_weight: Whether the variant trains one value per output feature and reads the weight in each forward pass,
            as DoRA does.
        frozen_factors: A with LoRA-FA (B of an embedding), B if the init freezes B (MiCA), and those that the variant
            freezes.
        smaller_factor: The factor that is smaller if `own_numbers` is negative; "" if none is.
        experts: Number of matrices in the parameter, each with its own factors.
        bias: Number of elements in the bias of B (`lora_bias`).
        random_numbers: Number of fp32 values that the variant draws in a forward pass and saves for the backward pass.
    """

    path: str
    kind: str
    out_features: int
    in_features: int
    rank: int
    scale: float
    entry: str
    factors: int
    own_numbers: int = 0
    reads_weight: bool = False
    frozen_factors: frozenset[str] = frozenset()
    smaller_factor: str = ""
    experts: int = 1
    is_plain: bool = True
    bias: int = 0
    random_numbers: int = 0

    @property
    def is_bare_matrix(self) -> bool:
        """Return whether the site is a single matrix named in `target_parameters`; B·A is added to it directly."""
        return self.kind == PARAMETER and self.experts == 1

    @property
    def magnitudes(self) -> int:
        """Return the number of elements in DoRA's magnitude vector: out_features, or 0 without DoRA."""
        return self.own_numbers if self.reads_weight else 0

    @property
    def needs_input(self) -> bool:
        """Return whether the backward pass needs the input of A, that is, whether A is trained."""
        return "A" not in self.frozen_factors

    @property
    def frozen(self) -> int:
        """Return the number of elements in the frozen factors, over all experts."""
        return self.frozen_products + (self.own_numbers if self.smaller_factor in self.frozen_factors else 0)

    @property
    def frozen_products(self) -> int:
        """Return the number of elements in the matrices that are multiplied in place of the frozen factors."""
        columns = {"A": self.in_features, "B": self.out_features}
        return self.experts * self.rank * sum(columns[factor] for factor in self.frozen_factors)

    @property
    def trainable(self) -> int:
        """Return the number of trainable parameters at this site."""
        return self.factors + self.own_numbers + self.bias - self.frozen


_SHARED = ("kind", "out_features", "in_features", "rank", "scale", "entry", "experts")
"""Attributes that are the same for all sites of a `Group`."""


@dataclass(frozen=True)
class Group:
    """Sites that differ only in the layer they belong to; `label` is the shortest unambiguous suffix of their paths.

    `each` is the number of trainable parameters per site, `experts` the number of matrices per site.
    """

    label: str
    kind: str
    out_features: int
    in_features: int
    rank: int
    scale: float
    entry: str
    sites: int
    each: int
    experts: int = 1

    @classmethod
    def of(cls, label: str, members: Sequence[SiteCount]) -> Group:
        """Return a group of the given sites, which must differ only in their layer."""
        shared = {name: getattr(members[0], name) for name in _SHARED}
        return cls(label=label, sites=len(members), each=members[0].trainable, **shared)

    @property
    def trainable(self) -> int:
        """Return the number of trainable parameters at all sites of the group."""
        return self.sites * self.each


@dataclass(frozen=True)
class Count:
    """Trainable parameters of an adapter in a model.

    Attributes:
        base: Number of parameters in the base; shared parameters count once.
        saved: Path -> number of parameters, for each saved module (`modules_to_save`).
        biases: Number of parameters in trainable biases of the base.
        rows: Path of an embedding or output head -> number of parameters in its trainable token rows; tied rows count
            once.
        missing: Target entries that match nothing, if `count` was called with `allow_partial`.
    """

    base: int
    sites: tuple[SiteCount, ...]
    saved: dict[str, int]
    biases: int
    rows: dict[str, int]
    missing: tuple[Unmatched, ...]
    notes: tuple[Note, ...]

    @property
    def factors(self) -> int:
        """Return the total number of elements in A and B."""
        return sum(site.factors for site in self.sites)

    @property
    def frozen(self) -> int:
        """Return the number of elements in frozen factors."""
        return sum(site.frozen for site in self.sites)

    @property
    def magnitudes(self) -> int:
        """Return the number of elements in all DoRA magnitudes."""
        return sum(site.magnitudes for site in self.sites)

    @property
    def own_numbers(self) -> int:
        """Return the number of values that the variant trains in addition to A and B."""
        return sum(site.own_numbers for site in self.sites)

    @property
    def factor_biases(self) -> int:
        """Return the number of parameters in the biases of all B (`lora_bias`)."""
        return sum(site.bias for site in self.sites)

    @property
    def copied(self) -> int:
        """Return the number of parameters in saved modules."""
        return sum(self.saved.values())

    @property
    def trainable(self) -> int:
        """Return the number of trainable parameters, with saved modules, biases and token rows. [docs/math.md (10)]"""
        return sum(site.trainable for site in self.sites) + self.copied + self.biases + self.row_parameters

    @property
    def row_parameters(self) -> int:
        """Return the number of parameters in trainable token rows."""
        return sum(self.rows.values())

    @property
    def saved_parameters(self) -> int:
        """Return the number of parameters in the adapter's file: trainable parameters and frozen factors."""
        return self.trainable + self.frozen

    @property
    def share(self) -> float:
        """Return the number of trainable parameters as a fraction of the base's parameters."""
        return self.trainable / self.base if self.base else 0.0

    def groups(self) -> list[Group]:
        """Return the sites grouped by everything except their layer, in model order."""
        labels = short_roles(site.path for site in self.sites)
        gathered: dict[tuple[object, ...], list[SiteCount]] = {}
        for site in self.sites:
            size = (site.out_features, site.in_features, site.experts, site.own_numbers)
            gathered.setdefault((labels[role(site.path)], size, site.rank, site.scale, site.entry), []).append(site)
        return [Group.of(labels[role(members[0].path)], members) for members in gathered.values()]


def factor_parameters(rank: int, in_features: int, out_features: int) -> int:
    """Return the number of parameters in A (rank, in) and B (out, rank): rank × (in + out). [docs/math.md (10)]

    Source:
        Hu et al. 2021, arXiv:2106.09685, section 4.2.
    """
    return rank * (in_features + out_features)


def count(shape: ModelShape, config: LoraConfig, *, allow_partial: bool = False, optimizer: str = "adamw") -> Count:
    """Count exactly how many parameters an adapter trains in a model, if this optimizer (`Job.optimizer`) trains it.

    Raises:
        TargetError: A target matches nothing (without `allow_partial`), or a module that does not support LoRA.
        ConfigError: A pattern is invalid, there are no targets, or dropout is not possible at a target.
    """
    shape = replicated(shape, config.layer_replication)
    bare, in_first = _bare_parameters(shape), {other.path for other in shape.others if other.in_first}
    modules, original = candidates(shape), config
    config = with_current_names(config, shape.model_type, modules, bare)
    resolution = resolve(modules, config, allow_partial=allow_partial, parameters=bare)
    rest = note_on_rest(original, config, modules, bare, resolution, shape.parameters)
    notes = resolution.notes if rest is None else (*resolution.notes, rest)
    sizes = {parameter.path: _canonical(parameter.shape, parameter.module in in_first) for parameter in bare}
    sizes |= {site.path: (1, site.out_features, site.in_features) for site in shape.sites}
    sites = tuple(_site_count(match, sizes[match_path(match)], config, optimizer) for match in resolution.matches)
    _check_dropout(config, sites)
    saved = {path: _whole(shape, path) for path in resolution.saved}
    adapted = {site.path for site in sites}
    biases, rows = _biases(shape, config.bias, adapted, saved), trained_rows(shape, config, adapted)
    return Count(shape.parameters, sites, saved, biases, rows, resolution.missing, notes)


def _check_dropout(config: LoraConfig, sites: Sequence[SiteCount]) -> None:
    """Reject dropout at matrices that are adapted as parameters, such as routers, because their input is unknown."""
    site = next((site for site in sites if site.is_bare_matrix), None) if config.lora_dropout else None
    if site is not None:
        text = (
            f"lora_dropout={config.lora_dropout:g} is not possible at {site.path}, because the input of this parameter "
            "is not accessible. Set lora_dropout=0, or leave the parameter out of the targets."
        )
        raise ConfigError(text, what=config.lora_dropout, where=site.path, field="lora_dropout")


def candidates(shape: ModelShape) -> list[Candidate]:
    """Return what a target entry may name: sites in model order, then unsupported modules, for error messages."""
    nameable = [Candidate(s.path, s.kind, s.kind, s.dense, s.out_features, s.in_features) for s in shape.sites]
    nameable += [Candidate(other.path, None, "module without a weight matrix") for other in shape.others]
    nameable += [Candidate(path, None, "container of modules") for path in shape.containers]
    return nameable


def _site_count(match: Match, size: tuple[int, int, int], config: LoraConfig, optimizer: str) -> SiteCount:
    """Count a site's parameters, given its size (experts, out, in); a single matrix counts as one expert."""
    experts, out_features, in_features = size
    costs = None if match.parameter else costs_of(config)
    where = (config, match_path(match), match.rank, out_features, in_features)
    return SiteCount(
        path=match_path(match),
        kind=match.kind,
        out_features=out_features,
        in_features=in_features,
        rank=match.rank,
        scale=scale(match.rank, match.alpha, config.use_rslora),
        entry=match.entry,
        factors=experts * factor_parameters(match.rank, in_features, out_features),
        own_numbers=0 if costs is None else costs.trained(*where),
        reads_weight=costs is not None and costs.reads_weight,
        frozen_factors=_frozen_factors(match.kind, config, optimizer)
        | (frozenset() if costs is None else costs.frozen),
        smaller_factor="" if costs is None else costs.smaller(config, match_path(match)),
        experts=experts,
        is_plain=config.is_plain_lora,
        bias=out_features if config.lora_bias and not match.parameter else 0,
        random_numbers=0 if costs is None else costs.drawn(*where),
    )


def _frozen_factors(kind: str, config: LoraConfig, optimizer: str) -> frozenset[str]:
    """Return the factors that the init or the optimizer freezes."""
    if config.trains_only_a:
        return frozenset({"B"})
    if not OPTIMIZERS[optimizer].freezes_factor:
        return frozenset()
    return frozenset({"B" if kind == EMBEDDING else "A"})


def _bare_parameters(shape: ModelShape) -> list[BareParameter]:
    """Return what `target_parameters` may name: weights of sites, with their stored shapes, and other matrices."""
    matrices = []
    for site in shape.sites:
        rows = (site.out_features, site.in_features)
        matrices.append(BareParameter(site.path, "weight", rows if site.kind == LINEAR else rows[::-1]))
    matrices += [
        BareParameter(other.path, name, size, other.experts) for other in shape.others for name, size in other.matrices
    ]
    return matrices


def _canonical(size: tuple[int, ...], in_first: bool) -> tuple[int, int, int]:
    """Return a bare parameter's shape as (experts, out, in); a plain matrix (out, in) counts as one expert."""
    experts, first, second = size if len(size) == 3 else (1, *size)
    return (experts, second, first) if in_first and len(size) == 3 else (experts, first, second)


def _whole(shape: ModelShape, path: str) -> int:
    """Count the parameters of a saved module and its submodules; a tied weight counts too, since it is also copied."""
    in_sites = sum(s.weight_parameters + s.bias_parameters for s in shape.sites if is_inside(s.path, [path]))
    return in_sites + sum(o.parameters for o in shape.others if is_inside(o.path, [path]))


def _biases(shape: ModelShape, choice: str, adapted: Collection[str], saved: Collection[str]) -> int:
    """Return the number of parameters in trainable biases of the base, excluding those in saved modules."""
    if choice == "none":
        return 0
    trained = [s for s in shape.sites if (choice == "all" or s.path in adapted) and not is_inside(s.path, saved)]
    others = [o for o in shape.others if choice == "all" and not is_inside(o.path, saved)]
    return sum(s.bias_parameters for s in trained) + sum(o.biases for o in others)


@dataclass(frozen=True)
class RankRow:
    """Row of a rank table: all sites with the same shape; `each` has the parameters per site, by rank."""

    labels: tuple[str, ...]
    kind: str
    out_features: int
    in_features: int
    sites: int
    each: tuple[int, ...]


@dataclass(frozen=True)
class RankTable:
    """Number of trainable parameters by rank; totals include saved modules, token rows and biases."""

    ranks: tuple[int, ...]
    rows: tuple[RankRow, ...]
    totals: tuple[int, ...]
    shares: tuple[float, ...]


def rank_table(shape: ModelShape, config: LoraConfig, ranks: Sequence[int], optimizer: str = "adamw") -> RankTable:
    """Return the number of trainable parameters for each rank, which overrides `r` and `rank_pattern` of the config.

    Raises:
        UsageError: A rank is below 1, or `ranks` is empty.
        TargetError: A target matches nothing, or matches a module that does not support LoRA.
    """
    if not ranks or any(rank < 1 for rank in ranks):
        text = f"ranks must be one or more positive integers, such as 4,8,16,32; got {list(ranks)}."
        raise UsageError(text, what=list(ranks), field="ranks")
    configs = [dataclasses.replace(config, r=rank, rank_pattern={}) for rank in ranks]
    columns = [count(shape, each, optimizer=optimizer) for each in configs]
    rows: dict[tuple[str, int, int, tuple[int, ...]], list[Group]] = {}
    for same in zip(*(column.groups() for column in columns), strict=True):
        group = same[0]
        key = (group.kind, group.out_features, group.in_features, tuple(one.each for one in same))
        rows.setdefault(key, []).append(group)
    return RankTable(
        tuple(ranks),
        tuple(
            RankRow(tuple(dict.fromkeys(g.label for g in groups)), kind, out, inner, sum(g.sites for g in groups), each)
            for (kind, out, inner, each), groups in rows.items()
        ),
        tuple(column.trainable for column in columns),
        tuple(column.share for column in columns),
    )
