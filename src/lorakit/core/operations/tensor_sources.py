"""Adapters and base weights as plain tensors, read from a model in memory or from safetensors files.

`AdapterWeights` is the input and output of all operations on adapters.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorakit.config import LoraConfig, scale
from lorakit.core.attachment.residual_base import check_plain, on_the_original, plain_config
from lorakit.core.attachment.saving import saved_form
from lorakit.core.files.adapter_folder import AdapterFiles, alpha_at, parameters_meant, rank_and_alpha, read_adapter
from lorakit.core.files.inspecting import Finding, implausible, judge_files
from lorakit.core.files.tensors import by_site, parse
from lorakit.core.kinds import WeightSpec
from lorakit.core.linalg import Product, factors_of, product_of
from lorakit.core.model.base_view import base_tensors
from lorakit.core.model.fingerprint import UNVERIFIABLE, BaseVerdict, Fingerprint, compare
from lorakit.core.model.index import INSIDE, AdapterIndex, defined_parameters
from lorakit.core.model.target_weights import matched, paths_on_disk
from lorakit.core.variants import NO_SETTING, NO_TENSORS, PLAIN, Factor, Variant, variant_at, variants_of, without
from lorakit.errors import AdapterFileError, ModelError, warn_caller
from lorakit.targets.resolving import match_path
from lorakit.tensor_headers import PREFIX


@dataclass(frozen=True)
class TensorSource:
    """Named tensors that are read on demand.

    Attributes:
        read: Function from a name to the tensor (…).
        read_one: Function from a name and an index to the slice (…) at that index along the first axis.
    """

    label: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    read_one: Callable[[str, int], Tensor]

    def under(self, names: Sequence[str]) -> str | None:
        """Return the first of a tensor's names in the model that this source contains, or None.

        Each name is also tried without its first part, such as `transformer.`, because files often omit that part.
        """
        candidates = [*names, *(name.partition(".")[2] for name in names)]
        return next((candidate for candidate in candidates if candidate in self.shapes), None)


def source_of_model(model: nn.Module, label: str = "the model") -> TensorSource:
    """Return a source for the parameters and buffers of a base model, without merged adapters."""
    tensors = {name: tensor.detach() for name, tensor, _ in base_tensors(model)}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return TensorSource(label, shapes, tensors.__getitem__, lambda name, number: tensors[name][number])


def source_of_folder(folder: str | os.PathLike[str]) -> TensorSource:
    """Return a source that reads tensors from a safetensors file, or those of a model's directory; a ModelError if it
    cannot.

    If the directory contains a `model.safetensors`, that file holds the whole model, and no other files are read.
    """
    folder = Path(folder)
    whole = folder if folder.is_file() else folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not files:
        text = f"{folder}: no safetensors files found; pass a safetensors file or a directory with one."
        raise ModelError(text, where=folder)
    homes: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    homes[name], shapes[name] = path, tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as cause:
            raise ModelError(f"{path}: cannot be read as safetensors ({cause}).", where=path) from None

    def read(name: str) -> Tensor:
        with safe_open(homes[name], framework="pt") as file:
            return file.get_tensor(name)

    def read_one(name: str, number: int) -> Tensor:
        with safe_open(homes[name], framework="pt") as file:
            return file.get_slice(name)[number]

    return TensorSource(str(folder), shapes, read, read_one)


PLAIN_TARGETS: Mapping[str, Any] = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
"""Config fields that restrict the targets, each mapped to the value that turns the field off."""


@dataclass(frozen=True)
class BareSite:
    """The bare parameter that a factor adapts, or several candidates if the parameter is not known.

    Attributes:
        names: Path of the parameter, or the paths of all candidates.
        order: Position of the parameter among those that its module defines; this position determines the path on disk.
        experts: Number of matrices in the parameter, each with its own part of A and B.
    """

    names: tuple[str, ...]
    order: int = 0
    experts: int = 1

    @classmethod
    def of(cls, module: nn.Module, path: str, spec: WeightSpec) -> BareSite:
        """Return the `BareSite` for a known parameter, given its module and that module's path."""
        order = defined_parameters(module).index(spec.parameter)
        return cls((f"{path}.{spec.parameter}",), order, max(1, spec.experts))


@dataclass(eq=False, kw_only=True)
class SiteFactors(Factor):
    """One adapter's A (r, in, …) and B (out, r, …) at a site; for experts, (experts·r, in) and (out, r·experts).

    Attributes:
        endings: Suffixes of the names of A and B on disk.
        bare: The adapted bare parameter, or None for a module.
    """

    endings: tuple[str, str]
    bare: BareSite | None = None

    @property
    def experts(self) -> int:
        """Number of matrices at the site, each with its own part of A and B."""
        return 1 if self.bare is None else self.bare.experts

    @property
    def names(self) -> tuple[str, ...]:
        """Path of the bare parameter, or the paths of all candidates; empty for a module."""
        return () if self.bare is None else self.bare.names

    @property
    def r(self) -> int:
        """The rank; for experts, the rank of each expert."""
        return int(self.A.shape[0]) // self.experts

    @property
    def shared(self) -> int:
        """Number of groups that share the rank; always 1, except for grouped convolutions."""
        return 1 if self.experts > 1 else max(1, int(self.A.shape[0]) // int(self.B.shape[1]))

    def product(self) -> Product:
        """Return A and B as matrices, (g, r, in) and (g, out, r), without the scale."""
        return product_of(*self.multiplied(), self.experts)

    def scaled_product(self) -> Product:
        """Return A and B as matrices, (g, r, in) and (g, out, r), with the scale in B."""
        product = self.product()
        return Product(product.A, product.B * self.scale)

    def size_text(self) -> str:
        """Return the shape of the adapted weight, for messages."""
        one = " × ".join(str(size) for size in (self.B.shape[0], *self.A.shape[1:]))
        return f"{self.experts} experts of {one}" if self.experts > 1 else one

    def of_variant(self, variant: Variant, extras: Mapping[str, Tensor]) -> SiteFactors:
        """Return a factor of another variant with the same A and B, and extra tensors (…) by `OwnTensor.held_as`."""
        return dataclasses.replace(self, variant=variant, own=extras, setting=NO_SETTING)

    def holding(self, product: Product, scale: float = 1.0) -> SiteFactors:
        """Return a factor for the same site with the given A (g, r, in), B (g, out, r) and scale.

        The rank may change. If the variant does not allow that (`outlasts_a_cut` is False), the result is plain LoRA.
        """
        A, B = factors_of(product, self.A, self.B, self.experts)
        same = self if self.variant.outlasts_a_cut else self.of_variant(PLAIN, NO_TENSORS)
        return dataclasses.replace(same, A=A, B=B, scale=scale)


@dataclass(frozen=True)
class AdapterWeights:
    """The config, all tensors and the metadata of an adapter.

    Attributes:
        factors: Dict from path on disk to factor, sorted by path.
        others: Dict from name on disk to tensor (…) for everything else: saved modules, biases, and trainable tokens.
    """

    label: str
    config: LoraConfig
    factors: Mapping[str, SiteFactors]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    base: Fingerprint | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""
    findings: tuple[Finding, ...] = ()

    def report(self) -> None:
        """Warn about implausible values in the adapter's files; an all-zero update is not considered implausible."""
        for message in implausible(self.label, self.findings, may_be_zero=True):
            warn_caller(message)

    def tensors(self) -> dict[str, Tensor]:
        """Return all of the adapter's tensors (…), keyed by name on disk and sorted by name."""
        tensors = dict(self.others)
        for path, factor in self.factors.items():
            stem, (end_A, end_B) = PREFIX + path, factor.endings
            tensors |= {stem + end_A: factor.A, stem + end_B: factor.B}
            tensors |= {f"{stem}.{t.held_as}": factor.own[t.held_as] for t in factor.variant.parts.extras}
            if factor.bias is not None:
                tensors[stem + end_B.removesuffix(".weight") + ".bias"] = factor.bias
        return dict(sorted(tensors.items()))

    def compare_base(self, other: AdapterWeights) -> BaseVerdict:
        """Compare the adapter's base with that of another adapter, ignoring modules that either adapter saves."""
        if other.base is None:
            return BaseVerdict(UNVERIFIABLE, f"{other.label} has no fingerprint of its base")
        saved = {name.removeprefix(PREFIX) for name in (*self.others, *other.others)}
        base = None if self.base is None else self.base.without(saved)
        return compare(base, other.base.without(saved), f"{self.label}'s")

    def origin(self) -> dict[str, str]:
        """Return the adapter's name and, if known, its hash, for the `lorakit.json` of a derived adapter."""
        name = Path(self.label).name
        return {"name": name, "sha256": self.sha256} if self.sha256 else {"name": name}


def weights_of_model(model: nn.Module, name: str) -> AdapterWeights:
    """Return the weights of an adapter, which stays on the model; an AdapterError if the base has changed (LoftQ)."""
    index = AdapterIndex.of(model)
    form = saved_form(index, name)
    check_plain(index.layers(name), name, form.config)
    config, known = form.config, _sites_in(index, name)
    tensors = {key: tensor.detach() for key, tensor in form.tensors.items()}
    factors, others = _by_site(tensors, config, lambda path, A: known[path])
    matches = matched(index, config, allow_partial=True).matches
    outer, parameters = outer_modules(factors), {name for factor in factors.values() for name in factor.names}
    if {match.path for match in matches if not match.parameter} != outer:
        config = dataclasses.replace(config, target_modules=outer, **PLAIN_TARGETS)  # only some targets were loaded
    if {match_path(match) for match in matches if match.parameter} != parameters:
        config = dataclasses.replace(config, target_parameters=sorted(parameters) or None)
    return AdapterWeights(name, _in_usual_shapes(config), factors, others)


def weights_of_folder(folder: str | os.PathLike[str], allow: Collection[str] = ()) -> AdapterWeights:
    """Read an adapter from disk without a model; `allow` can hold "nonfinite".

    An AdapterFileError if a file is damaged, or if a scale, the rank of a bare parameter, what an init changed in the
    base, or what A of a variant reads cannot be known without a model.
    """
    files = read_adapter(folder)
    config = files.config
    _check_bare_known(files)
    for variant in variants_of(config) if files.sidecar.base is None else ():
        if variant.unclear:
            text = f"{folder}: the files do not show what A of {variant.title} reads: {variant.unclear}"
            raise AdapterFileError(text, what=variant.title, where=folder, field=variant.field)
    findings = judge_files(files, allow)
    factors, others = _by_site(files.file.tensors, config, lambda path, A: _site_on_disk(files, path, A))
    plain = on_the_original(files, {p: (f.A, f.B, f.experts if f.names else 0) for p, f in factors.items()})
    if plain is not None:
        factors = {p: dataclasses.replace(f, A=plain[p][0], B=plain[p][1]) for p, f in factors.items()}
        config = plain_config(config)
    for path, factor in factors.items():
        fits = factor.A.ndim >= 2 and factor.B.ndim >= 2 and factor.B.shape[1]
        fits = fits and not factor.A.shape[0] % factor.B.shape[1]
        if not fits or (factor.names and factor.A.shape[0] != factor.B.shape[1]):
            shapes = f"{tuple(factor.A.shape)} and {tuple(factor.B.shape)}"
            text = f"{folder}: A and B of {path} have incompatible shapes: {shapes}."
            raise AdapterFileError(text, what=path, where=folder)
    if not factors:
        raise AdapterFileError(f"{folder}: the file contains no LoRA sites.", where=folder)
    side, config = files.sidecar, _in_usual_shapes(config)
    return AdapterWeights(str(folder), config, factors, others, side.base, side.facts, files.file.sha256, findings)


def _in_usual_shapes(config: LoraConfig) -> LoraConfig:
    """Return a config without variants that only store A and B differently, which `_by_site` converts to LoRA's."""
    return without(config, *(variant for variant in variants_of(config) if variant.is_lora_once_multiplied))


def outer_modules(factors: Mapping[str, SiteFactors]) -> set[str]:
    """Return the modules that a config must target to adapt these sites; targeting a module covers all its weights."""
    return {path.partition(INSIDE)[0] for path, factor in factors.items() if not factor.names}


def _sites_in(index: AdapterIndex, name: str) -> dict[str, tuple[float, BareSite | None]]:
    """Return the scale and bare parameter of each of the adapter's sites, as a dict keyed by path on disk."""
    on_disk = paths_on_disk(index, name)
    sites = {}
    for path, layer in index.layers(name):
        outer = path.partition(INSIDE)[0]
        bare = BareSite.of(layer.owner, outer, layer.spec) if layer.kind.names_parameter else None
        sites[on_disk[path]] = layer.scaling[name], bare
    return sites


def _site_on_disk(files: AdapterFiles, path: str, A: Tensor) -> tuple[float, BareSite | None]:
    """Determine the scale and bare parameter of a site from the files alone."""
    config, names = files.config, parameters_meant(files.config, path)
    rows = int(A.shape[0]) if A.ndim else 0
    if not names:
        return scale(max(1, rows), alpha_at(files, path), config.use_rslora), None
    r, alpha = rank_and_alpha(files, path, rows)
    if alpha is None:
        text = (
            f"{files.folder}: rank and alpha at {path} depend on which parameter is adapted ({' or '.join(names)}), "
            "but these files do not show which. Load the adapter into its model, and run the operation there."
        )
        raise AdapterFileError(text, what=path, where=files.folder)
    order = -path.count(INSIDE) if len(names) > 1 else 0
    return scale(r, alpha, config.use_rslora), BareSite(names, order, max(1, rows // r))


def _check_bare_known(files: AdapterFiles) -> None:
    """Reject files that do not show which sites are bare parameters."""
    config = files.config
    entry = next((entry for entry in config.target_parameters or () if "." not in entry), None)
    if entry is not None and isinstance(config.target_modules, str):
        text = (
            f"{files.folder}: target_parameters names {entry!r} without its module, and target_modules is "
            f"{config.target_modules!r}, so these files do not show which sites are bare parameters. Load the adapter "
            "into its model, and run the operation there."
        )
        raise AdapterFileError(text, what=entry, where=files.folder, field="target_parameters")


def _by_site(
    tensors: Mapping[str, Tensor], config: LoraConfig, site: Callable[[str, Tensor], tuple[float, BareSite | None]]
) -> tuple[dict[str, SiteFactors], dict[str, Tensor]]:
    """Return two dicts: factors, keyed and sorted by path on disk, and tensors that belong to no site, keyed by name.

    Tensors of variants that the config does not select, and PEFT's copies of base weights, are left out.
    """
    factors = {}
    for path, named in sorted(by_site({name: (name, tensor) for name, tensor in tensors.items()}).items()):
        variant, setting = variant_at(config, path)
        parts = ("A", "B", *(tensor.held_as for tensor in variant.parts.extras))
        lacking = [part for part in parts if part not in named]
        if lacking:
            text = f"The adapter's site {path} has no {' and '.join(lacking)}."
            raise AdapterFileError(text, what=lacking[0], where=path)
        (name_A, A), (name_B, B) = named["A"], named["B"]
        extras = {tensor.held_as: named[tensor.held_as][1] for tensor in variant.parts.extras}
        bias = named["bias"][1] if "bias" in named else None
        factor_scale, bare = site(path, A)
        endings = name_A.removeprefix(PREFIX + path), name_B.removeprefix(PREFIX + path)
        factor = SiteFactors(
            A, B, factor_scale, nn.Identity(), variant, extras, bias, setting, endings=endings, bare=bare
        )
        if variant.is_lora_once_multiplied:  # these factors differ from LoRA's only in how they are stored
            A, B = factor.multiplied()
            factor = dataclasses.replace(factor.of_variant(PLAIN, NO_TENSORS), A=A, B=B)
        factors[path] = factor
    others = {name: tensor for name, tensor in tensors.items() if parse(name) is None}
    return factors, {name: tensor for name, tensor in others.items() if not name.endswith(".base_layer.weight")}
