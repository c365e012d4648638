"""Extract an adapter from a fully fine-tuned model and its base: the nearest low-rank update at each site.

Weights are read one pair at a time, experts that lie in one parameter one by one. What the adapter does not hold is
reported: the energy that a site's rank leaves out, and every change outside the sites.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.attachment.attaching import with_targets
from lorakit.core.files.tensor_names import PREFIX
from lorakit.core.kinds import Kind
from lorakit.core.linalg import Product, RankLimit, dense_spectrum, factors_of, truncated
from lorakit.core.model.base_view import base_tensors
from lorakit.core.model.checks import check_allowances
from lorakit.core.model.fingerprint import fingerprint
from lorakit.core.model.index import AdapterIndex, TargetWeight, defined_parameters, find_state
from lorakit.core.model.target_weights import bare_parameters, places_of
from lorakit.core.operations.tensor_sources import AdapterWeights, BareSite, SiteFactors, TensorSource, source_of_model
from lorakit.core.operations.writing import OperationReport, SiteOperation, described, put, write
from lorakit.core.quantization import weight_format_of
from lorakit.core.variants import variants_of
from lorakit.errors import ConfigError, ModelError, NotYetSupported
from lorakit.targets import resolve


@dataclass(frozen=True)
class OutsideChange:
    """A tensor that changed and is not in the adapter.

    Attributes:
        name: Its name in the model.
        norm: Frobenius norm of the change, or None where the tensors cannot be compared.
        why: In words: changed, another shape, only in one of the models.
    """

    name: str
    norm: float | None
    why: str


@dataclass(frozen=True)
class ExtractReport(OperationReport):
    """What extracting gave.

    Attributes:
        copied: Modules that it holds whole (`modules_to_save`).
        outside: What changed besides, largest first.
    """

    copied: tuple[str, ...]
    outside: tuple[OutsideChange, ...]

    @property
    def captured(self) -> float:
        """Share of the energy of all changes, inside the sites and outside, that the adapter holds; 1 if none."""
        inside = sum(site.norm**2 for site in self.sites)
        held = sum(site.norm**2 * (1 - site.energy_lost) for site in self.sites)
        whole = inside + sum(change.norm**2 for change in self.outside if change.norm is not None)
        return held / whole if whole else 1.0

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, without the name."""
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
    """Put the low-rank part of what fine-tuning changed onto the base, as an adapter; it is frozen.

    Args:
        model: The base, with or without adapters; the adapter is put on it.
        tuned: The fine-tuned model.
        config: Which sites (`target_modules`, `target_parameters`), and which modules are taken over whole
            (`modules_to_save`).
        name: The new adapter's name.
        rank: Largest rank of a site.
        energy: Or the share of each site's change that must be held, in (0, 1].

    Returns:
        What is held and what is not.

    Raises:
        ModelError: The two are not models of one architecture.
        ConfigError: Rank and energy are both given or both missing, the config asks for what cannot be extracted, or
            the base's layers are stacked anew (`layer_replication`).
        TargetError: A target matches nothing.
        NotYetSupported: A site's kind has no update that can be taken apart.
        AdapterError: The name is taken or cannot be used.
    """
    after = tuned if isinstance(tuned, TensorSource) else source_of_model(tuned, "the fine-tuned model")
    found, report = extract_weights(model, source_of_model(model, "the base"), after, config, RankLimit(rank, energy))
    put(model, found, name)
    return report(name)


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
    """Write the low-rank part of what fine-tuning changed as an adapter's folder.

    Args:
        model: The base's modules; their numbers are not read, so they may be on the meta device.
        base: The base's tensors.
        tuned: Those of the fine-tuned model.
        config: As `extract`.
        output: The folder to make; nothing may stand there.
        cut: How much of each site.
        allow: Refusals to lift: "nonfinite".

    Returns:
        What is held and what is not.

    Raises:
        ModelError: As `extract`.
        ConfigError: As `extract`.
        TargetError: As `extract`.
        DiskError: The folder cannot be written.
    """
    check_allowances(allow)
    found, report = extract_weights(model, base, tuned, config, cut)
    write(found, output, allow=allow)
    return report(str(output))


def extract_weights(
    model: nn.Module, base: TensorSource, tuned: TensorSource, config: LoraConfig, cut: RankLimit
) -> tuple[AdapterWeights, Callable[[str], ExtractReport]]:
    """Extract an adapter wherever the tensors come from.

    Args:
        model: The base's modules.
        base: Its tensors.
        tuned: Those of the fine-tuned model.
        config: As `extract`.
        cut: How much of each site.

    Returns:
        The adapter with scale 1, and what makes the report once it has a name.

    Raises:
        ModelError: The two are not models of one architecture.
        ConfigError: The config asks for what cannot be extracted.
        NotYetSupported: A site's kind has no update that can be taken apart.
    """
    _check_plain(config, model)
    config = with_targets(config, model)
    site_map = AdapterIndex.of(model)
    bare = bare_parameters(site_map) if config.target_parameters else None
    resolved = resolve(site_map.candidates, config, parameters=bare)
    factors: dict[str, SiteFactors] = {}
    sites = []
    aliases, taken = _aliases(model), set[str]()
    with torch.no_grad():
        places = [place for _, place in places_of(site_map, resolved.matches)]
        for place in sorted(places, key=lambda place: place.path):
            weight = ".".join(filter(None, (place.outer, place.child, place.slot.parameter)))
            factors[place.path], site = _site(site_map, place, (base, tuned), cut, aliases[weight])
            sites.append(site)
            taken.add(weight)
        inside = [name for name in aliases for path in resolved.saved if name.startswith(f"{path}.")]
        copies = {name: _weight(tuned, aliases[name]) for name in inside}
        outside = _outside(aliases, base, tuned, {*inside, *taken})
    named = config.target_modules
    made, factors = described(config, factors, named if not isinstance(named, list) else None)
    limit = {"rank": cut.rank} if cut.rank is not None else {"energy": cut.energy}
    facts = {"operation": {"name": "extract", **limit}}
    meta = any(parameter.is_meta for parameter in model.parameters())
    known = fingerprint(model, (lambda name: _weight(base, aliases[name])) if meta else None)
    others = {PREFIX + name: tensor for name, tensor in copies.items()}
    adapter = AdapterWeights("extracted", made, factors, others, known, facts)
    return adapter, lambda name: ExtractReport(name, made, tuple(sites), facts, resolved.saved, outside)


def _check_plain(config: LoraConfig, model: nn.Module) -> None:
    variant = next((variant for variant in variants_of(config) if not variant.is_held_as_lora), None)
    if variant is not None:
        raise ConfigError(f"What is extracted is plain LoRA: leave {variant.field} off.", field=variant.field)
    if config.bias != "none":
        raise ConfigError("What is extracted is plain LoRA: leave bias at 'none'.", what=config.bias, field="bias")
    state = find_state(model)
    if config.layer_replication or (state is not None and state.replication is not None):
        raise ConfigError(
            "layer_replication: nothing is extracted from layers that are stacked anew, since several of them share "
            "one weight of the base, which the fine-tuned model has once for each. Make the stacked model the base: "
            "attach a fresh adapter with that layer_replication, merge_and_unload(untie=True), and extract without it."
        )


def _site(
    site_map: AdapterIndex,
    place: TargetWeight,
    sources: tuple[TensorSource, TensorSource],
    cut: RankLimit,
    names: Sequence[str],
) -> tuple[SiteFactors, SiteOperation]:
    """The nearest low-rank change of one weight, of experts of each, and what it leaves out.   [docs/math.md (52)]"""
    slot, kind = place.slot, place.kind
    if slot.groups > 1:
        raise NotYetSupported(f"{names[0]} is that of a grouped convolution, whose change no product of its form is.")
    under = [_name_in(source, names) for source in sources]
    shapes = [source.shapes[name] for source, name in zip(sources, under, strict=True)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"{names[0]} is {shapes[0]} in {sources[0].label} and {shapes[1]} in {sources[1].label}: these are "
            "not a base and its fine-tuned form. Take the module into modules_to_save, or out of the targets."
        )
    rank = cut.rank
    if rank is None and slot.experts:  # they have one rank: all singular values first, then one change at a time again
        S = torch.stack([torch.linalg.svdvals(delta) for delta in _changes(site_map, place, sources, under)])
        rank = cut.of(S)
    parts, whole, kept = [], 0.0, 0.0
    for delta in _changes(site_map, place, sources, under):
        found, energy = dense_spectrum(delta, rank)
        part = truncated(found, cut.of(found.S) if rank is None else min(rank, *delta.shape))
        parts.append(part)
        whole += energy
        kept += float(found.S[:, : part.rank].double().square().sum())
    product = Product(torch.cat([part.A for part in parts]), torch.cat([part.B for part in parts]))
    like = [product.A.new_empty(shape, device="meta") for shape in kind.shapes(slot, product.rank)]
    A, B = factors_of(product, like[0], like[1], max(1, slot.experts))
    lost = max(0.0, 1 - kept / whole) if whole else 0.0
    made = SiteFactors(A, B, 1.0, _endings(kind), {}, _bare(site_map, place))
    return made, SiteOperation(place.path, made.r, min(delta.shape), whole**0.5, lost**0.5)


def _changes(
    site_map: AdapterIndex, place: TargetWeight, sources: tuple[TensorSource, TensorSource], names: Sequence[str]
) -> Iterator[Tensor]:
    """The change of a weight as a matrix (out, n), in fp32 or wider; of experts one after the other."""
    slot, holder = place.slot, site_map.holder(place)
    row, pairs = weight_format_of(holder, slot.parameter, slot.as_stored), list(zip(sources, names, strict=True))
    if not slot.experts:
        before, after = (row.read(holder, source.read(name)).flatten(1) for source, name in pairs)
        yield after - before
    for expert in range(slot.experts):
        before, after = (row.read(holder, source.read_one(name, expert)) for source, name in pairs)
        yield (after - before).T if slot.in_first else after - before


def _bare(site_map: AdapterIndex, place: TargetWeight) -> BareSite | None:
    if not place.kind.names_parameter:
        return None
    order = defined_parameters(site_map.holder(place)).index(place.slot.parameter)
    return BareSite((place.pattern_path,), order, max(1, place.slot.experts))


def _name_in(source: TensorSource, names: Sequence[str]) -> str:
    under = source.under(names)
    if under is None:
        raise ModelError(f"{source.label} has no {names[0]}, so nothing can be extracted there.")
    return under


def _weight(source: TensorSource, names: Sequence[str]) -> Tensor:
    return source.read(_name_in(source, names))


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Every name of a model's tensors -> it and the others of the same tensor, since files hold one of them."""
    holders: dict[int, list[str]] = {}
    names = [(name, id(tensor)) for name, tensor, _ in base_tensors(model)]
    for name, tensor in names:
        holders.setdefault(tensor, []).append(name)
    return {name: [name, *(other for other in holders[tensor] if other != name)] for name, tensor in names}


def _endings(kind: Kind) -> tuple[str, str]:
    return f".{kind.names[0]}{kind.on_disk}", f".{kind.names[1]}{kind.on_disk}"


def _outside(
    aliases: Mapping[str, list[str]], base: TensorSource, tuned: TensorSource, taken: Collection[str]
) -> tuple[OutsideChange, ...]:
    """What changed and is not taken, each tensor once; and what only one of the two has."""
    found: list[OutsideChange] = []
    seen = {name for taken_name in taken for name in aliases[taken_name]}
    for name, names in aliases.items():
        here, there = base.under(names), tuned.under(names)
        if name in seen or (here is None and there is None):
            continue
        seen |= set(names)
        if here is None or there is None:
            found.append(OutsideChange(name, None, f"only in {(tuned if here is None else base).label}"))
        elif base.shapes[here] != tuned.shapes[there]:
            found.append(OutsideChange(name, None, f"{base.shapes[here]} before, {tuned.shapes[there]} after"))
        elif change := float(torch.linalg.vector_norm(tuned.read(there).double() - base.read(here).double())):
            found.append(OutsideChange(name, change, "changed"))
    for source, other in ((base, tuned), (tuned, base)):
        known = {source.under([name]) for name in aliases}
        left = [name for name in source.shapes if name not in known and name not in other.shapes]
        found += [OutsideChange(name, None, f"only in {source.label}") for name in left]
    return tuple(sorted(found, key=lambda change: -(change.norm or 0.0)))
