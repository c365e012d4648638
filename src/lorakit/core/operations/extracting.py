"""Extract an adapter from a fully fine-tuned model and its base: the nearest low-rank update at each site.

Weights are read one pair at a time. What the adapter does not hold is reported: the energy that a site's rank leaves
out, and every change outside the sites.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.bases import base_of
from lorakit.core.files.fingerprinting import fingerprint
from lorakit.core.files.keys import PREFIX
from lorakit.core.kinds import Kind
from lorakit.core.layering.sitemap import Place, SiteMap, survey
from lorakit.core.layering.underlying import base_tensors
from lorakit.core.making.attaching import with_targets
from lorakit.core.making.checks import check_allowances
from lorakit.core.operations.loose import LooseAdapter, LooseFactor, described
from lorakit.core.operations.lowrank import Cut, dense_spectrum, truncated
from lorakit.core.operations.placing import put, write
from lorakit.core.operations.sources import TensorSource, source_of_model
from lorakit.errors import ConfigError, ModelError, NotYetSupported
from lorakit.targets import resolve


@dataclass(frozen=True)
class SiteExtracted:
    """One site.

    Attributes:
        path: Where.
        r: The rank taken.
        norm: Frobenius norm of the change of the weight.
        energy_lost: Share of that norm's square that the rank leaves out, in [0, 1].
    """

    path: str
    r: int
    norm: float
    energy_lost: float


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
class ExtractReport:
    """What extracting gave.

    Attributes:
        name: The new adapter, or its folder.
        config: Its config.
        sites: Its sites.
        copied: Modules that it holds whole (`modules_to_save`).
        outside: What changed besides, largest first.
        facts: How it came about, for `save_adapter(..., facts=...)`; a folder has them in `lorakit.json`.
    """

    name: str
    config: LoraConfig
    sites: tuple[SiteExtracted, ...]
    copied: tuple[str, ...]
    outside: tuple[OutsideChange, ...]
    facts: dict[str, Any]

    @property
    def captured(self) -> float:
        """Share of the energy of all changes, inside the sites and outside, that the adapter holds; 1 if none."""
        inside = sum(site.norm**2 for site in self.sites)
        held = sum(site.norm**2 * (1 - site.energy_lost) for site in self.sites)
        whole = inside + sum(change.norm**2 for change in self.outside if change.norm is not None)
        return held / whole if whole else 1.0


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
        config: Which sites (targets), and which modules are taken over whole (`modules_to_save`).
        name: The new adapter's name.
        rank: Largest rank of a site.
        energy: Or the share of each site's change that must be held, in (0, 1].

    Returns:
        What is held and what is not.

    Raises:
        ModelError: The two are not models of one architecture.
        ConfigError: Rank and energy are both given or both missing, or the config asks for what cannot be extracted.
        TargetError: A target matches nothing.
        NotYetSupported: A site's kind has no update that can be taken apart.
        AdapterError: The name is taken or cannot be used.
    """
    after = tuned if isinstance(tuned, TensorSource) else source_of_model(tuned, "the fine-tuned model")
    found, report = extract_loose(model, source_of_model(model, "the base"), after, config, Cut(rank, energy))
    put(model, found, name)
    return report(name)


def extract_to_folder(
    model: nn.Module,
    base: TensorSource,
    tuned: TensorSource,
    config: LoraConfig,
    output: str | os.PathLike[str],
    *,
    cut: Cut,
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
    found, report = extract_loose(model, base, tuned, config, cut)
    write(found, output, allow=allow)
    return report(str(output))


def extract_loose(
    model: nn.Module, base: TensorSource, tuned: TensorSource, config: LoraConfig, cut: Cut
) -> tuple[LooseAdapter, Callable[[str], ExtractReport]]:
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
    if config.use_dora or config.bias != "none":
        raise ConfigError("What is extracted is plain LoRA: leave use_dora off and bias at 'none'.")
    config = with_targets(config, model)
    site_map = survey(model)
    resolved = resolve(site_map.candidates, config)
    factors: dict[str, LooseFactor] = {}
    sites = []
    aliases, taken = _aliases(model), set[str]()
    with torch.no_grad():
        for match in sorted(resolved.matches, key=lambda match: match.path):
            for place in site_map.places(match.path, site_map.kind(match.kind)):
                weight = ".".join(filter(None, (place.outer, place.child, place.slot.parameter)))
                factors[place.path], site = _site(site_map, place, base, tuned, cut, aliases[weight])
                sites.append(site)
                taken.add(weight)
        inside = [name for name in aliases for path in resolved.saved if name.startswith(f"{path}.")]
        copies = {name: _weight(tuned, aliases[name]) for name in inside}
        outside = _outside(aliases, base, tuned, {*inside, *taken})
    ranks = {path: factor.r for path, factor in factors.items()}
    made = described(config, ranks, config.target_modules if not isinstance(config.target_modules, list) else None)
    limit = {"rank": cut.rank} if cut.rank is not None else {"energy": cut.energy}
    facts = {"operation": {"name": "extract", **limit}}
    meta = any(parameter.is_meta for parameter in model.parameters())
    known = fingerprint(model, (lambda name: _weight(base, aliases[name])) if meta else None)
    others = {PREFIX + name: tensor for name, tensor in copies.items()}
    adapter = LooseAdapter("extracted", made, factors, others, known, facts)
    return adapter, lambda name: ExtractReport(name, made, tuple(sites), resolved.saved, outside, facts)


def _site(
    site_map: SiteMap, place: Place, base: TensorSource, tuned: TensorSource, cut: Cut, names: Sequence[str]
) -> tuple[LooseFactor, SiteExtracted]:
    slot, holder = place.slot, site_map.holder(place)
    before, after = _weight(base, names), _weight(tuned, names)
    if before.shape != after.shape:
        raise ModelError(
            f"{names[0]} is {tuple(before.shape)} in {base.label} and {tuple(after.shape)} in {tuned.label}: these are "
            "not a base and its fine-tuned form. Take the module into modules_to_save, or out of the targets."
        )
    if slot.experts or slot.groups > 1:
        raise NotYetSupported(f"{names[0]} holds several matrices (experts or groups), which are not taken apart yet.")
    row = base_of(holder, slot.parameter)
    delta = row.read(holder, after).flatten(1) - row.read(holder, before).flatten(1)
    found, whole = dense_spectrum(delta, cut.rank)
    product = truncated(found, cut.of(found.S))
    r = product.rank
    kept = float(found.S[:, :r].double().square().sum())
    A, B = (t.view(shape) for t, shape in zip((product.A, product.B), place.kind.shapes(slot, r), strict=True))
    lost = max(0.0, 1 - kept / whole) if whole else 0.0
    return LooseFactor(A, B, 1.0, _endings(place.kind)), SiteExtracted(place.path, r, whole**0.5, lost)


def _weight(source: TensorSource, names: Sequence[str]) -> Tensor:
    under = source.under(names)
    if under is None:
        raise ModelError(f"{source.label} has no {names[0]}, so nothing can be extracted there.")
    return source.read(under)


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
