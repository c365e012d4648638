"""What an operation on adapters says of the adapter that it made.

Which sites of several adapters are one, and what a config says so that it names the sites of a result.

On disk a bare parameter has the path of its module, and of several the one that is defined last lies outermost; so one
path can mean different parameters in two adapters. Knows configs, paths and ranks, nothing of numbers.

Where the result of an operation goes: onto a model as a new adapter, or into a new folder.

On a model it passes the same checks and takes the same way as an adapter that is loaded. Knows nothing of operations.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig, scale
from lorakit.core.attachment.loading import place_adapter
from lorakit.core.files.adapter_folder import (
    FORMAT_VERSION,
    METADATA_KEY,
    AdapterFiles,
    SavedAdapter,
    Sidecar,
    write_files,
)
from lorakit.core.files.tensor_file import TensorFile, encode
from lorakit.core.kinds import PARAMETER, parameter_slot
from lorakit.core.linalg import Reading, padded
from lorakit.core.model.index import INSIDE, AdapterIndex, TargetWeight, defined_parameters
from lorakit.core.operations.tensor_sources import PLAIN_TARGETS, AdapterWeights, SiteFactors, outer_modules
from lorakit.core.quantization import weight_format_of
from lorakit.durable import json_bytes, publish_directory
from lorakit.errors import AdapterError, UsageError


@dataclass(frozen=True)
class SiteOperation:
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
class OperationReport:
    """What combining, compressing or extracting gave.

    Attributes:
        name: The new adapter, or its folder.
        config: Its config.
        sites: Its sites.
        facts: How it came about, for `save_adapter(..., facts=...)`; a folder has them in `lorakit.json`.
    """

    name: str
    config: LoraConfig
    sites: tuple[SiteOperation, ...]
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


_Parameter = tuple[int, tuple[str, ...]]
"""Order of definition, and what it may be called."""


def aligned(adapters: Sequence[AdapterWeights]) -> dict[str, list[SiteFactors | None]]:
    """The sites of several adapters together: path on disk of one that has them all -> each adapter's factor, or None.

    Args:
        adapters: Of one base.

    Raises:
        AdapterError: They name different parameters of a module, and it is not known which of them is defined first;
            or one adapts the whole of a module of which another names a parameter.
    """
    modules: dict[str, list[SiteFactors | None]] = {}
    bare: dict[str, dict[_Parameter, list[SiteFactors | None]]] = {}
    for number, adapter in enumerate(adapters):
        for path, factor in adapter.factors.items():
            if factor.bare is not None:
                inside = bare.setdefault(path.partition(INSIDE)[0], {})
                here = inside.setdefault((factor.bare.order, factor.bare.names), [None] * len(adapters))
            else:
                here = modules.setdefault(path, [None] * len(adapters))
            here[number] = factor
    whole = {path.partition(INSIDE)[0] for path in modules}
    for module, inside in bare.items():
        if module in whole:
            raise AdapterError(f"One adapter sits at {module}, and another at a parameter of it (target_parameters).")
        _check_told_apart(module, inside)
        for depth, key in enumerate(sorted(inside, reverse=True)):
            modules[module + INSIDE * depth] = inside[key]
    return dict(sorted(modules.items()))


def described(
    config: LoraConfig, factors: Mapping[str, SiteFactors], targets: set[str] | str | None = None
) -> tuple[LoraConfig, dict[str, SiteFactors]]:
    """A config for factors whose scale is 1, whatever their ranks: it says of every site what lies there.

    Args:
        config: All that has nothing to do with rank, scale and modules.
        factors: Path on disk -> factor.
        targets: What `target_modules` says, or None for the paths.

    Returns:
        A config without rsLoRA in which alpha equals the rank everywhere, so that any reader gets scale 1; and the
        factors, with one rank for parameters of one module that files cannot tell apart.
    """
    factors = _evened(factors)
    ranks = {name: factor.r for path, factor in factors.items() for name in factor.names or (path,)}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {_anchored(name, ranks): r for name, r in ranks.items() if r != usual}
    narrowed = {} if targets is not None else PLAIN_TARGETS
    made = dataclasses.replace(
        config,
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_rslora=False,
        init_lora_weights=True,
        target_modules=outer_modules(factors) if targets is None else targets,
        **narrowed,
    )
    return made, factors


def common_targets(adapters: Sequence[AdapterWeights]) -> set[str] | str | None:
    """What names exactly the modules of some adapters together, in their configs' words; None where only paths do.

    Args:
        adapters: Of one base.
    """
    first, *rest = (adapter.config for adapter in adapters)
    said = ("target_modules", *PLAIN_TARGETS)
    if all(getattr(first, name) == getattr(config, name) for config in rest for name in said):
        return _modules_named(first)
    found: set[str] = set()
    for config in (first, *rest):
        narrowed, known = any(getattr(config, name) is not None for name in PLAIN_TARGETS), _modules_named(config)
        if narrowed or not isinstance(known, set):
            return None
        found |= known
    return found


def _modules_named(config: LoraConfig) -> set[str] | str | None:
    """What `target_modules` says; on disk, none beside bare parameters means no module."""
    named = config.target_modules
    if named is None or isinstance(named, str):
        return set() if named is None and config.target_parameters else named
    return set(named)


def _check_told_apart(module: str, inside: Iterable[_Parameter]) -> None:
    orders, names = [order for order, _ in inside], {names for _, names in inside}
    known = len(set(orders)) == len(orders) and all(len(one) == 1 for one in names)
    if not known and len(names) > 1:
        raise AdapterError(
            f"The adapters sit on different parameters of {module} ({', '.join(sorted(set().union(*names)))}), and "
            "files do not say which of them is defined first. Load the adapters onto their model, and do it there."
        )


def _evened(factors: Mapping[str, SiteFactors]) -> dict[str, SiteFactors]:
    """The largest rank, filled with zeros, wherever a pattern cannot name one parameter and not another."""
    largest: dict[tuple[str, ...], int] = {}
    for factor in factors.values():
        if len(factor.names) > 1:
            largest[factor.names] = max(factor.r, largest.get(factor.names, 0))
    return {
        path: factor.holding(padded(factor.product(), largest[factor.names]), factor.scale)
        if factor.r < largest.get(factor.names, 0)
        else factor
        for path, factor in factors.items()
    }


def _anchored(path: str, paths: Mapping[str, int]) -> str:
    """A pattern that names one path and no other: some path may end with another."""
    ambiguous = any(other.endswith("." + path) for other in paths)
    return "^" + path.replace(".", r"\.") if ambiguous else path


def put(model: nn.Module, adapter: AdapterWeights, name: str) -> None:
    """Put an adapter on a model; it is frozen, and not active where there is another.

    Args:
        model: The base, or a model that has adapters already.
        adapter: What to put there.
        name: Its name on the model.

    Raises:
        AdapterError: The name is taken or cannot be used, or the adapter's numbers are not finite.
        AdapterFileError: It does not fit the model.
    """
    _check_finite(adapter.tensors())
    side = Sidecar(False, (), "", None, _sites(adapter), {})
    file = TensorFile(adapter.tensors(), {}, "", 0)
    files = AdapterFiles(Path(name), adapter.config, file, side, True, (), made=True)
    place_adapter(model, files, name, False, ("odd_scale",))


def write(
    adapter: AdapterWeights, folder: str | os.PathLike[str], *, replace: bool = False, allow: Collection[str] = ()
) -> SavedAdapter:
    """Write an adapter into a folder, in PEFT's format with `lorakit.json`.

    Args:
        adapter: What to write.
        folder: Where; a new one, of which nothing is left on an error, unless `replace` is set.
        replace: Write over an adapter that stands there, file by file.
        allow: Refusals to lift: "nonfinite".

    Returns:
        What was written.

    Raises:
        UsageError: Something stands there.
        AdapterError: The numbers are not finite.
        DiskError: The disk refuses.
    """
    folder = Path(folder)
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: is not an empty folder; nothing is overwritten. Give a new one.", where=folder)
    tensors = adapter.tensors()
    if "nonfinite" not in allow:
        _check_finite(tensors)
    weights = encode(tensors, {"format": "pt", METADATA_KEY: str(FORMAT_VERSION)})
    config = json_bytes({**adapter.config.as_json(), "inference_mode": True})
    base = None if adapter.base is None else adapter.base.as_dict()
    about: dict[str, Any] = {**adapter.facts, "base": base, "sites": _sites(adapter)}
    if replace:
        return write_files(folder, config, weights, about)
    with publish_directory(folder) as fresh:
        saved = write_files(fresh, config, weights, about)
    return dataclasses.replace(saved, folder=folder)


def reader_of(model: nn.Module) -> Callable[[str], Reading]:
    """How to read the base of a model, with or without adapters.

    Args:
        model: Only read.

    Returns:
        Path of a site, or of a bare parameter -> the weight there, (out, in, …), as it was before any merge. It raises
        AdapterError where there is none.
    """
    site_map = AdapterIndex.of(model)
    kinds = {candidate.path: candidate.kind for candidate in site_map.candidates}

    def at(path: str) -> Reading:
        outer = path.partition(INSIDE)[0]
        places = site_map.places(outer, site_map.kind(kinds[outer])) if kinds.get(outer) else []  # type: ignore[arg-type]
        place = next((place for place in places if place.path == path), None) or _bare_place(site_map, path)
        if place is None:
            raise AdapterError(f"The model has no site {path}, at which an adapter sits.", what=path)
        layer, holder, parameter = site_map.layer(place), site_map.holder(place), place.slot.parameter
        base = weight_format_of(holder, parameter, place.slot.as_stored)
        stored = base.stored(holder, parameter) if layer is None else layer.original()
        W: Tensor = base.tensors(stored)[0] if place.slot.experts else base.read(holder, stored).double()
        return Reading(W, place.kind, place.slot)

    return at


def _bare_place(site_map: AdapterIndex, path: str) -> TargetWeight | None:
    module, _, parameter = path.rpartition(".")
    if module not in site_map.modules or parameter not in defined_parameters(site_map.base(module)):
        return None
    return TargetWeight(path, module, PARAMETER, parameter_slot(site_map.base(module), parameter))


def _sites(adapter: AdapterWeights) -> dict[str, dict[str, float]]:
    """Rank and alpha of each site, such that alpha gives the factor's own scale."""
    unit = {r: scale(r, 1.0, adapter.config.use_rslora) for r in {factor.r for factor in adapter.factors.values()}}
    return {path: {"r": f.r, "lora_alpha": f.scale / unit[f.r]} for path, f in adapter.factors.items()}


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise AdapterError(f"The result holds NaN or infinite numbers, first in {bad[0]}; nothing was kept.")
