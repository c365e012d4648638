"""Turn results of operations into reports and configs, add results to a model, and write them to a directory.

On disk, a bare parameter has the path of its module; if a module has several, the last one defined has the outermost
path. As the same path can refer to different parameters in two adapters, `aligned` matches sites by parameter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig, scale
from lorakit.core.attachment.loading import place_adapter
from lorakit.core.files.adapter_folder import FORMAT_VERSION, METADATA_KEY, AdapterFiles, Sidecar, write_files
from lorakit.core.files.tensors import TensorFile, encode
from lorakit.core.kinds import PARAMETER, parameter_spec
from lorakit.core.linalg import Reading, padded
from lorakit.core.model.index import INSIDE, AdapterIndex, TargetWeight, defined_parameters
from lorakit.core.operations.tensor_sources import PLAIN_TARGETS, AdapterWeights, SiteFactors, outer_modules
from lorakit.core.quantization import weight_format_of
from lorakit.durable import JsonObject, json_bytes
from lorakit.durable_folders import publish_directory
from lorakit.errors import AdapterError, UsageError
from lorakit.targets.patterns import exact_key


@dataclass(frozen=True)
class SiteOperation:
    """One site of the resulting adapter.

    Attributes:
        r: Rank of the site; for experts in one parameter, the rank of each expert.
        r_before: Rank of the update Δ that the site approximates: the sum of the adapters' ranks, the rank of the
            original adapter, or the rank of the full change in the weight.
        norm: Frobenius norm of Δ, which is a weighted sum of updates, a single update, or the change in the weight;
            updates include their scales.
        deviation: Relative distance from Δ: ‖result − Δ‖ / ‖Δ‖; 0 if the norm is 0.
    """

    path: str
    r: int
    r_before: int
    norm: float
    deviation: float

    @property
    def energy_lost(self) -> float:
        """Square of the deviation; for the best approximation of a given rank, this is the lost fraction of ‖Δ‖²."""
        return self.deviation**2


@dataclass(frozen=True)
class OperationReport:
    """Report on an adapter that was combined, compressed or extracted.

    Attributes:
        facts: Origin of the new adapter, as metadata to pass to `save_adapter`; `lorakit.json` stores this metadata.
    """

    name: str
    config: LoraConfig
    sites: tuple[SiteOperation, ...]
    facts: JsonObject

    @property
    def deviation(self) -> float:
        """Largest deviation of any site."""
        return max((site.deviation for site in self.sites), default=0.0)

    @property
    def energy_lost(self) -> float:
        """Lost fraction of the total energy of all sites."""
        whole = sum(site.norm**2 for site in self.sites)
        return sum(site.norm**2 * site.energy_lost for site in self.sites) / whole if whole else 0.0

    def as_dict(self) -> JsonObject:
        """Return the report as plain JSON values, without the name."""
        return {
            "config": self.config.as_json(),
            "deviation": self.deviation,
            "energy_lost": self.energy_lost,
            "sites": [{**asdict(site), "energy_lost": site.energy_lost} for site in self.sites],
            **self.facts,
        }


_Parameter = tuple[int, tuple[str, ...]]
"""Position of a bare parameter in its module's order of definition, and its possible names."""


def aligned(adapters: Sequence[AdapterWeights]) -> dict[str, list[SiteFactors | None]]:
    """Return each adapter's factor at each site of any of them, by the path that an adapter with all sites has on disk.

    An AdapterError if shapes at a site differ, if adapters adapt different parameters of a module in an unknown order,
    or if one adapts a module and another a parameter of it.
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
            text = f"One adapter adapts {module}, and another a parameter of it (target_parameters); choose one."
            raise AdapterError(text, where=module, field="target_parameters")
        _check_told_apart(module, inside)
        for depth, key in enumerate(sorted(inside, reverse=True)):
            modules[module + INSIDE * depth] = inside[key]
    for path, factors in modules.items():
        _check_shapes(path, [factor for factor in factors if factor is not None])
    return dict(sorted(modules.items()))


def _check_shapes(path: str, factors: Sequence[SiteFactors]) -> None:
    shapes = {(f.A.shape[1:], f.B.shape[0], f.shared, f.experts, f.B.shape[2:]) for f in factors}
    if len(shapes) > 1:
        sizes = " and ".join(sorted({factor.size_text() for factor in factors}))
        text = f"The adapters cannot have the same base: at {path}, they change weights of different shapes: {sizes}."
        raise AdapterError(text, where=path)


def described(
    config: LoraConfig, factors: Mapping[str, SiteFactors], targets: set[str] | str | None = None
) -> tuple[LoraConfig, dict[str, SiteFactors]]:
    """Return a config for factors with scale 1, including the rank of every site.

    Only ranks, scales and targets of `config` are replaced; without `targets`, full paths are targeted.

    Returns:
        The config and the factors. The config does not use rsLoRA, and alpha equals the rank everywhere, so that every
        program computes a scale of 1. If files cannot distinguish some parameters of a module, the factors of those
        parameters are padded to a common rank.
    """
    factors = _evened(factors)
    ranks = {name: factor.r for path, factor in factors.items() for name in factor.names or (path,)}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {exact_key(name, ranks): r for name, r in ranks.items() if r != usual}
    with_ranks = dataclasses.replace(
        config,
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_rslora=False,
        init_lora_weights=True,
        target_modules=outer_modules(factors) if targets is None else targets,
        **(PLAIN_TARGETS if targets is None else {}),
    )
    return with_ranks, factors


def common_targets(adapters: Sequence[AdapterWeights]) -> set[str] | str | None:
    """Return targets that match exactly the modules that the adapters adapt, or None if only full paths can do so."""
    first, *rest = (adapter.config for adapter in adapters)
    fields = ("target_modules", *PLAIN_TARGETS)
    if all(getattr(first, name) == getattr(config, name) for config in rest for name in fields):
        return _modules_named(first)
    modules: set[str] = set()
    for config in (first, *rest):
        narrowed, known = any(getattr(config, name) is not None for name in PLAIN_TARGETS), _modules_named(config)
        if narrowed or not isinstance(known, set):
            return None
        modules |= known
    return modules


def _modules_named(config: LoraConfig) -> set[str] | str | None:
    """Return the value of `target_modules`, or an empty set if the config targets only bare parameters."""
    named = config.target_modules
    if named is None or isinstance(named, str):
        return set() if named is None and config.target_parameters else named
    return set(named)


def _check_told_apart(module: str, inside: Iterable[_Parameter]) -> None:
    orders, names = [order for order, _ in inside], {names for _, names in inside}
    known = len(set(orders)) == len(orders) and all(len(one) == 1 for one in names)
    if not known and len(names) > 1:
        text = (
            f"The adapters adapt different parameters of {module} ({', '.join(sorted(set().union(*names)))}), and "
            "the files do not show which of them is defined first. Load the adapters into their model, and run the "
            "operation there."
        )
        raise AdapterError(text, where=module, field="target_parameters")


def _evened(factors: Mapping[str, SiteFactors]) -> dict[str, SiteFactors]:
    """Pad factors with zeros to a common rank if they belong to parameters that files cannot distinguish."""
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


def put(model: nn.Module, adapter: AdapterWeights, name: str) -> None:
    """Add a frozen adapter to a model; it becomes active only if the model has no other adapters."""
    tensors = adapter.tensors()
    _check_finite(tensors)
    side, file = Sidecar(sites=_sites(adapter)), TensorFile(tensors, {}, "", 0)
    files = AdapterFiles(Path(name), adapter.config, file, side, True, (), made=True)
    place_adapter(model, files, name, False, ("odd_scale",))


def write(
    adapter: AdapterWeights, folder: str | os.PathLike[str], *, replace: bool = False, allow: Collection[str] = ()
) -> None:
    """Write an adapter to a directory, in PEFT's format plus `lorakit.json`.

    Unless `replace` is set, which replaces an adapter file by file, the directory must be new or empty (a UsageError
    otherwise), and is removed if an error occurs. `allow` can hold "nonfinite".
    """
    folder = Path(folder)
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: not an empty directory; pass a new one. Nothing was overwritten.", where=folder)
    tensors = adapter.tensors()
    if "nonfinite" not in allow:
        _check_finite(tensors)
    weights = encode(tensors, {"format": "pt", METADATA_KEY: str(FORMAT_VERSION)})
    config = json_bytes({**adapter.config.as_json(), "inference_mode": True})
    base = None if adapter.base is None else adapter.base.as_dict()
    about = {**adapter.facts, "base": base, "sites": _sites(adapter)}
    with contextlib.nullcontext(folder) if replace else publish_directory(folder) as target:
        write_files(target, config, weights, about)


def reader_of(model: nn.Module | AdapterIndex) -> Callable[[str], Reading]:
    """Return a function from the path of a site or bare parameter to its base weight, (out, in, …), without merged
    adapters.

    The function raises AdapterError if the model has no such site.
    """
    site_map = AdapterIndex.of(model)
    kinds = {candidate.path: candidate.kind for candidate in site_map.candidates if candidate.kind}

    def at(path: str) -> Reading:
        outer = path.partition(INSIDE)[0]
        targets = site_map.targets(outer, site_map.kind(kinds[outer])) if outer in kinds else []
        target = next((target for target in targets if target.path == path), None) or _bare_target(site_map, path)
        if target is None:
            raise AdapterError(f"An adapter adapts {path}, but the model has no such site.", where=path)
        layer, holder, parameter = site_map.layer(target), site_map.holder(target), target.spec.parameter
        base = weight_format_of(holder, parameter, target.spec.as_stored)
        stored = base.stored(holder, parameter) if layer is None else layer.original()
        W = base.tensors(stored)[0] if target.spec.experts else base.read(holder, stored).double()
        return Reading(W, target.kind, target.spec)

    return at


def _bare_target(site_map: AdapterIndex, path: str) -> TargetWeight | None:
    module, _, parameter = path.rpartition(".")
    if module not in site_map.modules or parameter not in defined_parameters(site_map.base(module)):
        return None
    return TargetWeight(path, module, PARAMETER, parameter_spec(site_map.base(module), parameter))


def _sites(adapter: AdapterWeights) -> dict[str, dict[str, float]]:
    """Return the rank of each site, and the alpha that yields the factor's scale."""
    rslora = adapter.config.use_rslora
    return {p: {"r": f.r, "lora_alpha": f.scale / scale(f.r, 1.0, rslora)} for p, f in adapter.factors.items()}


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        text = f"The result contains NaN or infinite values, first in {bad[0]}; it was discarded."
        raise AdapterError(text, where=bad[0])
