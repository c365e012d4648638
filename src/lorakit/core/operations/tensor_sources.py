"""Where the tensors of a model are read from, one at a time: a model in memory, or safetensors files in a folder.

Knows names and tensors, nothing of adapters.

An adapter off any model: factors by site with their scales, and all else it trains under its names on disk.

What operations on adapters take and give, whether it comes from a model or from a folder. It knows nothing of what
the operations do.
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
from lorakit.core.files.tensor_names import PREFIX, parse
from lorakit.core.linalg import Product, factors_of, product_of
from lorakit.core.model.base_view import base_tensors
from lorakit.core.model.fingerprint import BaseVerdict, Fingerprint, compare
from lorakit.core.model.index import INSIDE, AdapterIndex, check_known, defined_parameters, layers, state_of
from lorakit.core.model.target_weights import bare_parameters, paths_on_disk
from lorakit.core.variants import (
    NO_SETTING,
    NO_TENSORS,
    PLAIN,
    Addend,
    Factor,
    Setting,
    Variant,
    variant_at,
    variants_of,
    without,
)
from lorakit.errors import AdapterFileError, ModelError, warn_caller
from lorakit.targets import match_path, resolve


@dataclass(frozen=True)
class TensorSource:
    """Tensors by name, each read when it is asked for.

    Attributes:
        label: What messages call it.
        shapes: Name -> shape.
        read: Name -> tensor (…).
        read_one: Name and number -> the tensor (…) at that place of the first axis, such as one expert of many.
    """

    label: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    read_one: Callable[[str, int], Tensor]

    def under(self, names: Sequence[str]) -> str | None:
        """The first of a tensor's names that this source has, or None.

        Args:
            names: In the model; files often leave its first word out, as `transformer.`.
        """
        candidates = [*names, *(name.partition(".")[2] for name in names)]
        return next((candidate for candidate in candidates if candidate in self.shapes), None)


def source_of_model(model: nn.Module, label: str = "the model") -> TensorSource:
    """The parameters and buffers of a model's base; what is merged into it is left out.

    Args:
        model: With or without adapters; only read.
        label: What messages call it.
    """
    tensors = {name: tensor.detach() for name, tensor, _ in base_tensors(model)}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    return TensorSource(label, shapes, tensors.__getitem__, lambda name, number: tensors[name][number])


def source_of_folder(folder: str | os.PathLike[str]) -> TensorSource:
    """The tensors of a model directory's safetensors files; only one is in memory at a time.

    Where there is a `model.safetensors`, it holds the model, and other files there are something else.

    Args:
        folder: The directory, or one file.

    Raises:
        ModelError: There is no such folder, it holds no safetensors, or a file is damaged.
    """
    folder = Path(folder)
    whole = folder if folder.is_file() else folder / "model.safetensors"
    beside = sorted(path for path in folder.glob("*.safetensors") if path.is_file()) if folder.is_dir() else []
    files = [whole] if whole.is_file() else beside
    if not files:
        raise ModelError(
            f"{folder}: there are no safetensors files here, so no weights can be read one by one.", where=folder
        )
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
            one: Tensor = file.get_slice(name)[number]
            return one

    return TensorSource(str(folder), shapes, read, read_one)


PLAIN_TARGETS: Mapping[str, Any] = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
"""What a config says where its targets are exactly what they name."""


@dataclass(frozen=True)
class BareSite:
    """Which bare parameter a factor sits on, as far as that is known.

    Attributes:
        names: Its path, or those of all that it may be where files do not say.
        order: Its place in its module's order of definition, from which its path on disk follows.
        experts: So many matrices share A and B, each with its own part of them.
    """

    names: tuple[str, ...]
    order: int = 0
    experts: int = 1


@dataclass(frozen=True)
class SiteFactors:
    """One adapter at one site.

    Attributes:
        A: (r, in, …); of experts (experts·r, in).
        B: (out, r, …); of experts (out, r·experts).
        scale: What B·A is multiplied by.
        endings: How the names of A and B end on disk.
        others: What else it has there, by part: "bias" (out,), and the variant's own tensors (…) by
            `OwnTensor.held_as`; each with its name's ending.
        bare: The bare parameter it sits on, or None for a module.
        variant: The entry of VARIANTS.
        setting: What the config asks of the variant here.
    """

    A: Tensor
    B: Tensor
    scale: float
    endings: tuple[str, str]
    others: Mapping[str, tuple[str, Tensor]] = field(default_factory=dict)
    bare: BareSite | None = None
    variant: Variant = PLAIN
    setting: Setting = field(default_factory=lambda: NO_SETTING)

    @property
    def experts(self) -> int:
        """So many matrices share A and B, each with its own part of them; 1 where it is one."""
        return 1 if self.bare is None else self.bare.experts

    @property
    def names(self) -> tuple[str, ...]:
        """Of a bare parameter its path, or those of all that it may be; of a module none."""
        return () if self.bare is None else self.bare.names

    @property
    def r(self) -> int:
        """The rank; of experts, that of each."""
        return int(self.A.shape[0]) // self.experts

    @property
    def shared(self) -> int:
        """So many groups share the rank: those of a grouped convolution."""
        return 1 if self.experts > 1 else max(1, int(self.A.shape[0]) // int(self.B.shape[1]))

    def part(self, name: str) -> Tensor | None:
        """A tensor of `others`, of any shape, or None."""
        return self.others[name][1] if name in self.others else None

    @property
    def own(self) -> dict[str, Tensor]:
        """The variant's own tensors (…) by `OwnTensor.held_as`."""
        return {tensor.held_as: self.others[tensor.held_as][1] for tensor in self.variant.tensors}

    def factor(self) -> Factor:
        """Return the factor as a layer would hold it, with A (r, in) and B (out, r)."""
        return Factor(
            self.A, self.B, self.scale, nn.Identity(), self.variant, self.own, self.part("bias"), self.setting
        )

    def product(self) -> Product:
        """Return A and B as they are multiplied as matrices, (g, r, in) and (g, out, r), without the scale."""
        return product_of(*self.factor().multiplied(), self.experts)

    def addend(self, weight: float) -> Addend:
        """Return the factor as a part of a sum.

        Args:
            weight: The number that its update is multiplied by.
        """
        return Addend(self.factor(), weight, self.product(), self.experts)

    def of_variant(self, variant: Variant, own: Mapping[str, Tensor]) -> SiteFactors:
        """Return the same A and B as a factor of another variant.

        Args:
            variant: The variant.
            own: Its own tensors (…) by `OwnTensor.held_as`.
        """
        others = {name: other for name, other in self.others.items() if name not in self.own}
        others |= {tensor.held_as: (tensor.keys[0], own[tensor.held_as]) for tensor in variant.tensors}
        return dataclasses.replace(self, others=others, variant=variant, setting=NO_SETTING)

    def in_usual_shapes(self) -> SiteFactors:
        """Return the same factor as plain LoRA, where its variant is that but for how A and B are held."""
        if not self.variant.is_lora_once_multiplied:
            return self
        A, B = self.factor().multiplied()
        return dataclasses.replace(self.of_variant(PLAIN, NO_TENSORS), A=A, B=B)

    def holding(self, product: Product, scale: float = 1.0) -> SiteFactors:
        """Return the same site with another product of any rank, (g, r, in) and (g, out, r), and another scale.

        It is plain LoRA if the variant does not allow another rank.
        """
        A, B = factors_of(product, self.A, self.B, self.experts)
        same = self if self.variant.outlasts_a_cut else self.of_variant(PLAIN, NO_TENSORS)
        return dataclasses.replace(same, A=A, B=B, scale=scale)


@dataclass(frozen=True)
class AdapterWeights:
    """A whole adapter.

    Attributes:
        label: What messages call it: its name on the model, or its folder.
        config: Its config.
        factors: Path -> factor, in order of the paths.
        others: Name on disk -> tensor (…) of what is no factor: copied modules, biases, rows of tokens.
        base: Fingerprint of its base, or None.
        facts: What `lorakit.json` says of it besides.
        sha256: Of its weights file, or "".
        findings: What looks implausible in its files.
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
        """Warn of what looks implausible in its files, except that it may do nothing."""
        for message in implausible(self.label, self.findings, may_be_zero=True):
            warn_caller(message)

    def tensors(self) -> dict[str, Tensor]:
        """Everything under its name on disk, each (…), sorted by name."""
        found = dict(self.others)
        for path, factor in self.factors.items():
            stem = PREFIX + path
            found |= {stem + factor.endings[0]: factor.A, stem + factor.endings[1]: factor.B}
            found |= {stem + ending: tensor for ending, tensor in factor.others.values()}
        return dict(sorted(found.items()))

    def compare_base(self, other: AdapterWeights) -> BaseVerdict | None:
        """Compare the base with another adapter's, without modules that either brings; None if one is unknown."""
        if self.base is None or other.base is None:
            return None
        brought = {name.removeprefix(PREFIX) for name in (*self.others, *other.others)}
        return compare(self.base.without(brought), other.base.without(brought), f"{self.label}'s")

    def origin(self) -> dict[str, str]:
        """Where it comes from, as `lorakit.json` of a result says it."""
        name = Path(self.label).name
        return {"name": name, "sha256": self.sha256} if self.sha256 else {"name": name}


def weights_of_model(model: nn.Module, name: str) -> AdapterWeights:
    """Take an adapter's numbers off a model, which keeps it.

    Args:
        model: The adapted model; only read.
        name: The adapter.

    Raises:
        AdapterError: There is no such adapter, or it is no plain LoRA on the original base (LoftQ).
    """
    state = state_of(model)
    check_known(state, [name])
    check_plain(model, name)
    found = saved_form(model, name)
    config = dataclasses.replace(found.config)
    known = _sites_in(model, name)
    tensors = {key: tensor.detach() for key, tensor in found.tensors.items()}
    factors, others = _sorted_out(tensors, config, lambda path, A: known[path])
    site_map = AdapterIndex.of(model)
    bare = bare_parameters(site_map) if config.target_parameters else None
    matches = resolve(site_map.candidates, config, allow_partial=True, parameters=bare).matches
    outer, parameters = outer_modules(factors), {name for factor in factors.values() for name in factor.names}
    if {match.path for match in matches if not match.parameter} != outer:
        config = dataclasses.replace(config, target_modules=outer, **PLAIN_TARGETS)  # loaded in part, as was allowed
    if {match_path(match) for match in matches if match.parameter} != parameters:
        config = dataclasses.replace(config, target_parameters=sorted(parameters) or None)
    return AdapterWeights(name, _in_usual_shapes(config), factors, others)


def weights_of_folder(folder: str | os.PathLike[str], allow: Collection[str] = ()) -> AdapterWeights:
    """Read an adapter from disk; no model is needed.

    Args:
        folder: A folder that PEFT or lorakit wrote.
        allow: Checks to override: "nonfinite".

    Raises:
        AdapterFileError: A file is missing or damaged, numbers are not finite, A and B do not fit together, a scale
            follows from a regular expression, which is not run, rank and scale of a bare parameter cannot be known
            without a model, or the factors act on a base that an init changed, and the folder does not say how.
        NotYetSupported: The adapter needs what is not built yet.
    """
    files = read_adapter(folder)
    config = files.config
    _check_told(files)
    findings = judge_files(files, allow)
    factors, others = _sorted_out(files.file.tensors, config, lambda path, A: _site_on_disk(files, path, A))
    plain = on_the_original(files, {p: (f.A, f.B, f.experts if f.names else 0) for p, f in factors.items()})
    if plain is not None:
        factors = {p: dataclasses.replace(f, A=plain[p][0], B=plain[p][1]) for p, f in factors.items()}
        config = plain_config(config)
    for path, factor in factors.items():
        fits = factor.A.ndim >= 2 and factor.B.ndim >= 2 and factor.B.shape[1]
        fits = fits and not factor.A.shape[0] % factor.B.shape[1]
        if not fits or (factor.names and factor.A.shape[0] != factor.B.shape[1]):
            shapes = f"{tuple(factor.A.shape)} and {tuple(factor.B.shape)}"
            raise AdapterFileError(f"{folder}: A and B of {path} do not fit together: {shapes}.", where=folder)
    if not factors:
        raise AdapterFileError(f"{folder}: there are no LoRA sites in the file.", where=folder)
    side = files.sidecar
    config = _in_usual_shapes(config)
    return AdapterWeights(str(folder), config, factors, others, side.base, side.facts, files.file.sha256, findings)


def _in_usual_shapes(config: LoraConfig) -> LoraConfig:
    """Return the config of the factors that `SiteFactors.in_usual_shapes` makes."""
    gone = [variant for variant in variants_of(config) if variant.is_lora_once_multiplied]
    return without(config, *gone) if gone else config


def outer_modules(factors: Mapping[str, SiteFactors]) -> set[str]:
    """The modules that must be named to have such sites: a module brings what stands inside it.

    Args:
        factors: Path on disk -> factor; what sits on bare parameters is left out.
    """
    return {path.partition(INSIDE)[0] for path, factor in factors.items() if not factor.names}


def _sites_in(model: nn.Module, name: str) -> dict[str, tuple[float, BareSite | None]]:
    """Path on disk -> scale and bare parameter, of an adapter's factors on a model."""
    on_disk, found = paths_on_disk(model, name), {}
    for path, layer in layers(model):
        if path in on_disk:
            slot, bare = layer.slot, None
            if layer.kind.names_parameter:
                names = (f"{path.partition(INSIDE)[0]}.{slot.parameter}",)
                bare = BareSite(names, defined_parameters(layer.owner).index(slot.parameter), max(1, slot.experts))
            found[on_disk[path]] = layer.scaling[name], bare
    return found


def _site_on_disk(files: AdapterFiles, path: str, A: Tensor) -> tuple[float, BareSite | None]:
    """Scale and bare parameter from the files alone: of several of one module, the outermost is defined last."""
    config, names = files.config, parameters_meant(files.config, path)
    rows = int(A.shape[0]) if A.ndim else 0
    if not names:
        return scale(max(1, rows), alpha_at(files, path), config.use_rslora), None
    r, alpha = rank_and_alpha(files, path, rows)
    if alpha is None:
        raise AdapterFileError(
            f"{files.folder}: rank and alpha at {path} follow from which parameter it is ({' or '.join(names)}), which "
            "these files do not say. Load the adapter onto its model, and do it there.",
            where=files.folder,
        )
    order = -path.count(INSIDE) if len(names) > 1 else 0
    return scale(r, alpha, config.use_rslora), BareSite(names, order, max(1, rows // r))


def _check_told(files: AdapterFiles) -> None:
    """Refuse files that do not tell modules from bare parameters."""
    config = files.config
    entry = next((entry for entry in config.target_parameters or () if "." not in entry), None)
    if entry is not None and isinstance(config.target_modules, str):
        raise AdapterFileError(
            f"{files.folder}: target_parameters names {entry!r} without its module, and target_modules is "
            f"{config.target_modules!r}, so these files do not say which sites are bare parameters. Load the adapter "
            "onto its model, and do it there.",
            where=files.folder,
        )


def _sorted_out(
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    site: Callable[[str, Tensor], tuple[float, BareSite | None]],
) -> tuple[dict[str, SiteFactors], dict[str, Tensor]]:
    parts: dict[str, dict[str, tuple[str, Tensor]]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = parse(name)
        if key is None:
            if not name.endswith(".base_layer.weight"):  # PEFT's copy of the base's own matrix: no part of the adapter
                others[name] = tensor
        else:
            parts.setdefault(key.path, {})[key.part] = (name.removeprefix(PREFIX + key.path), tensor)
    factors = {}
    for path, found in sorted(parts.items()):
        if not {"A", "B"} <= set(found):
            gone = " and ".join(sorted({"A", "B"} - set(found)))
            raise AdapterFileError(f"The adapter's site {path} has no {gone}.", what=gone, where=path)
        (end_A, A), (end_B, B) = found.pop("A"), found.pop("B")
        scale_here, bare = site(path, A)
        variant, setting = variant_at(config, path)
        lacking = [tensor.held_as for tensor in variant.tensors if tensor.held_as not in found]
        if lacking:
            raise AdapterFileError(f"The adapter's site {path} has no {lacking[0]}.", what=lacking[0], where=path)
        made = SiteFactors(A, B, scale_here, (end_A, end_B), found, bare, variant, setting)
        factors[path] = made.in_usual_shapes()
    return factors, others
