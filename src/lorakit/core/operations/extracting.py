"""Extract an adapter from a fully fine-tuned model and its base: the nearest low-rank update at each site.

Weights, and experts in a parameter, are read one pair at a time. The report covers what the adapter does not contain:
the energy beyond each site's rank, and every change outside the sites.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.attachment.attaching import with_targets
from lorakit.core.files.tensors import endings_of
from lorakit.core.linalg import Product, RankLimit, cut_dense, factors_of
from lorakit.core.model.base_view import base_tensors
from lorakit.core.model.checks import check_allowances
from lorakit.core.model.fingerprint import fingerprint
from lorakit.core.model.index import AdapterIndex, TargetWeight
from lorakit.core.model.replication import replication_of
from lorakit.core.model.target_weights import matched, targets_of
from lorakit.core.operations.tensor_sources import AdapterWeights, BareSite, SiteFactors, TensorSource, source_of_model
from lorakit.core.operations.writing import OperationReport, SiteOperation, described, put, write
from lorakit.core.quantization import weight_format_of
from lorakit.core.variants import PLAIN, variants_of
from lorakit.durable import JsonObject
from lorakit.errors import ConfigError, ModelError, NotYetSupported
from lorakit.tensor_headers import PREFIX


@dataclass(frozen=True)
class OutsideChange:
    """A tensor that differs between the two models and is not in the adapter.

    Attributes:
        norm: Frobenius norm of the change, or None if the tensors cannot be compared.
        why: "changed", or a message saying that the shapes differ or that only one of the models has the tensor.
    """

    name: str
    norm: float | None
    why: str


@dataclass(frozen=True)
class ExtractReport(OperationReport):
    """Report on an extracted adapter.

    Attributes:
        copied: Modules that the adapter saves in full (`modules_to_save`).
        outside: Changes that the adapter does not contain, largest first.
    """

    copied: tuple[str, ...]
    outside: tuple[OutsideChange, ...]

    @property
    def captured(self) -> float:
        """Energy in the adapter as a fraction of the energy of all changes to the model; 1 if nothing changed."""
        inside = sum(site.norm**2 for site in self.sites)
        in_adapter = sum(site.norm**2 * (1 - site.energy_lost) for site in self.sites)
        whole = inside + sum(change.norm**2 for change in self.outside if change.norm is not None)
        return in_adapter / whole if whole else 1.0

    def as_dict(self) -> JsonObject:
        """Return the report as plain JSON values, without the name."""
        more = {"captured": self.captured, "copied": list(self.copied), "outside": [asdict(c) for c in self.outside]}
        return {**super().as_dict(), **more}


def extract(
    model: nn.Module,
    tuned: nn.Module | TensorSource,
    config: LoraConfig,
    name: str = "extracted",
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> ExtractReport:
    """Extract the low-rank part of a fine-tuned model's changes into a frozen adapter on the base, and report what is
    left out.

    `config` selects the sites and the modules to copy in full (`modules_to_save`). `rank` is the maximum rank of a
    site; `energy`, its alternative, the fraction of each site's energy to keep, in (0, 1].
    """
    after = tuned if isinstance(tuned, TensorSource) else source_of_model(tuned, "the fine-tuned model")
    adapter, report = extract_weights(model, source_of_model(model, "the base"), after, config, RankLimit(rank, energy))
    put(model, adapter, name)
    return replace(report, name=name)


def extract_to_folder(
    model: nn.Module,
    base: TensorSource,
    tuned: TensorSource,
    config: LoraConfig,
    output: str | os.PathLike[str],
    *,
    cut: RankLimit,
    allow: Collection[str] = (),
) -> ExtractReport:
    """Extract the low-rank part of a fine-tuned model's changes as `extract` does, and write it to a new directory.

    Only the structure of the model is needed, so it may be on the meta device. `allow` can hold "nonfinite".
    """
    check_allowances(allow)
    adapter, report = extract_weights(model, base, tuned, config, cut)
    write(adapter, output, allow=allow)
    return replace(report, name=str(output))


def extract_weights(
    model: nn.Module, base: TensorSource, tuned: TensorSource, config: LoraConfig, cut: RankLimit
) -> tuple[AdapterWeights, ExtractReport]:
    """Extract an adapter with scale 1 from the tensors of two models; only the structure of `model` is needed."""
    _check_plain(config, model)
    config = with_targets(config, model)
    site_map = AdapterIndex.of(model)
    resolved = matched(site_map, config)
    factors: dict[str, SiteFactors] = {}
    sites = []
    aliases, taken = _aliases(model), set[str]()
    with torch.no_grad():
        targets = [target for _, target in targets_of(site_map, resolved.matches)]
        for target in sorted(targets, key=lambda target: target.path):
            weight = ".".join(filter(None, (target.outer, target.child, target.spec.parameter)))
            factors[target.path], site = _site(site_map, target, (base, tuned), cut, aliases[weight])
            sites.append(site)
            taken.add(weight)
        inside = [name for name in aliases for path in resolved.saved if name.startswith(f"{path}.")]
        others = {PREFIX + name: _weight(tuned, aliases[name]) for name in inside}
        outside = _outside(aliases, base, tuned, {*inside, *taken})
    named = config.target_modules
    described_config, factors = described(config, factors, named if not isinstance(named, list) else None)
    limit = {"rank": cut.rank} if cut.rank is not None else {"energy": cut.energy}
    facts = {"operation": {"name": "extract", **limit}}
    meta = any(parameter.is_meta for parameter in model.parameters())
    known = fingerprint(model, (lambda name: _weight(base, aliases[name])) if meta else None)
    adapter = AdapterWeights("extracted", described_config, factors, others, known, facts)
    return adapter, ExtractReport("", described_config, tuple(sites), facts, resolved.saved, outside)


def _check_plain(config: LoraConfig, model: nn.Module) -> None:
    variant = next((variant for variant in variants_of(config) if not variant.is_held_as_lora), None)
    if variant is not None:
        raise ConfigError(f"An extracted adapter is plain LoRA; leave {variant.field} out.", field=variant.field)
    if config.bias != "none":
        raise ConfigError.of("bias", config.bias, "'none', because an extracted adapter is plain LoRA")
    if config.layer_replication or replication_of(AdapterIndex.of(model)) is not None:
        raise ConfigError(
            "layer_replication: nothing can be extracted from replicated layers, because several of them share one "
            "base weight. Use a model with separate weights as the base: attach a new adapter with this "
            "layer_replication, call merge_and_unload(untie=True), and extract without layer_replication.",
            field="layer_replication",
        )


def _site(
    site_map: AdapterIndex,
    target: TargetWeight,
    sources: tuple[TensorSource, TensorSource],
    cut: RankLimit,
    names: Sequence[str],
) -> tuple[SiteFactors, SiteOperation]:
    """Compute a low-rank approximation of the change in a weight, or in each expert.   [docs/math.md (52)]"""
    spec, kind = target.spec, target.kind
    if spec.groups > 1:
        text = f"{names[0]} belongs to a grouped convolution, and extracting an adapter from it is not supported."
        raise NotYetSupported(text, where=names[0])
    under = [_name_in(source, names) for source in sources]
    shapes = [source.shapes[name] for source, name in zip(sources, under, strict=True)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"{names[0]} has shape {shapes[0]} in {sources[0].label} and {shapes[1]} in {sources[1].label}. Check that "
            "the second model is a fine-tuned version of the first, add the module to modules_to_save, or do not "
            "target it.",
            where=names[0],
        )
    if cut.rank is None and spec.experts:  # all experts get the same rank, from a first pass over their changes
        S = torch.stack([torch.linalg.svdvals(delta) for delta in _changes(site_map, target, sources, under)])
        cut = RankLimit(cut.of(S))
    parts, whole, kept = [], 0.0, 0.0
    for delta in _changes(site_map, target, sources, under):
        part, energy, energy_kept = cut_dense(delta, cut)
        parts.append(part)
        whole, kept = whole + energy, kept + energy_kept
    product = Product(torch.cat([part.A for part in parts]), torch.cat([part.B for part in parts]))
    like = [product.A.new_empty(shape, device="meta") for shape in kind.shapes(spec, product.rank)]
    A, B = factors_of(product, like[0], like[1], max(1, spec.experts))
    lost = max(0.0, 1 - kept / whole) if whole else 0.0
    bare = BareSite.of(site_map.holder(target), target.outer, spec) if kind.names_parameter else None
    factor = SiteFactors(A, B, 1.0, nn.Identity(), PLAIN, endings=endings_of(kind), bare=bare)
    return factor, SiteOperation(target.path, factor.r, min(delta.shape), whole**0.5, lost**0.5)


def _changes(
    site_map: AdapterIndex, target: TargetWeight, sources: tuple[TensorSource, TensorSource], names: Sequence[str]
) -> Iterator[Tensor]:
    """Yield the change in a weight, or in one expert at a time, as a matrix (out, n) in fp32 or wider."""
    spec, holder = target.spec, site_map.holder(target)
    row, pairs = weight_format_of(holder, spec.parameter, spec.as_stored), list(zip(sources, names, strict=True))
    if not spec.experts:
        before, after = (row.read(holder, source.read(name)).flatten(1) for source, name in pairs)
        yield after - before
    for expert in range(spec.experts):
        before, after = (row.read(holder, source.read_one(name, expert)) for source, name in pairs)
        yield (after - before).T if spec.in_first else after - before


def _name_in(source: TensorSource, names: Sequence[str]) -> str:
    under = source.under(names)
    if under is None:
        raise ModelError(f"{source.label} has no tensor {names[0]}, so no update can be extracted.", where=names[0])
    return under


def _weight(source: TensorSource, names: Sequence[str]) -> Tensor:
    return source.read(_name_in(source, names))


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return a dict from each tensor name to all names of that tensor, first the key; files store one of them."""
    ids = {name: id(tensor) for name, tensor, _ in base_tensors(model)}
    names: dict[int, list[str]] = {}
    for name, tensor in ids.items():
        names.setdefault(tensor, []).append(name)
    return {name: [name, *(other for other in names[tensor] if other != name)] for name, tensor in ids.items()}


def _outside(
    aliases: Mapping[str, list[str]], base: TensorSource, tuned: TensorSource, taken: Collection[str]
) -> tuple[OutsideChange, ...]:
    """Return one entry for each changed tensor not in `taken`, and for each tensor that only one model has."""
    changes: list[OutsideChange] = []
    seen = {name for taken_name in taken for name in aliases[taken_name]}
    for name, names in aliases.items():
        here, there = base.under(names), tuned.under(names)
        if name in seen or (here is None and there is None):
            continue
        seen |= set(names)
        if here is None or there is None:
            changes.append(OutsideChange(name, None, f"only in {(tuned if here is None else base).label}"))
        elif base.shapes[here] != tuned.shapes[there]:
            changes.append(OutsideChange(name, None, f"{base.shapes[here]} before, {tuned.shapes[there]} after"))
        elif change := float(torch.linalg.vector_norm(tuned.read(there).double() - base.read(here).double())):
            changes.append(OutsideChange(name, change, "changed"))
    for source, other in ((base, tuned), (tuned, base)):
        known = {source.under([name]) for name in aliases}
        left = [name for name in source.shapes if name not in known and name not in other.shapes]
        changes += [OutsideChange(name, None, f"only in {source.label}") for name in left]
    return tuple(sorted(changes, key=lambda change: -(change.norm or 0.0)))
