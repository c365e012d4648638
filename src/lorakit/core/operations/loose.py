"""An adapter off any model: factors by site with their scales, and all else it trains under its names on disk.

What operations on adapters take and give, whether it comes from a model or from a folder. It knows nothing of what
the operations do.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit.config import LoraConfig, scale
from lorakit.core.files.fingerprinting import Fingerprint
from lorakit.core.files.keys import PREFIX, parse
from lorakit.core.files.loading import AdapterFiles, alpha_at, read_adapter
from lorakit.core.files.restoring import RECOMPUTE, Past, past_of
from lorakit.core.files.saved_form import saved_form
from lorakit.core.kinds import Slot
from lorakit.core.layering.sitemap import INSIDE, layers, state_of, survey
from lorakit.core.making.checks import check_known
from lorakit.core.making.residual import as_plain, plain_config
from lorakit.errors import AdapterError, AdapterFileError, NotYetSupported
from lorakit.targets import resolve


@dataclass(frozen=True)
class LooseFactor:
    """One adapter at one site.

    Attributes:
        A: (r, in, …).
        B: (out, r, …).
        scale: What B·A is multiplied by.
        endings: How the names of A and B end on disk.
        others: What else it has there, by part: "magnitude" (out,), "bias" (out,); each with its name's ending.
    """

    A: Tensor
    B: Tensor
    scale: float
    endings: tuple[str, str]
    others: Mapping[str, tuple[str, Tensor]] = field(default_factory=dict)

    @property
    def r(self) -> int:
        """The rank."""
        return int(self.A.shape[0])

    def part(self, name: str) -> Tensor | None:
        """A tensor of `others`, of any shape, or None."""
        return self.others[name][1] if name in self.others else None


@dataclass(frozen=True)
class LooseAdapter:
    """A whole adapter.

    Attributes:
        label: What messages call it: its name on the model, or its folder.
        config: Its config.
        factors: Path -> factor, in order of the paths.
        others: Name on disk -> tensor (…) of what is no factor: copied modules, biases, rows of tokens.
        base: Fingerprint of its base, or None.
        facts: What `lorakit.json` says of it besides.
        sha256: Of its weights file, or "".
    """

    label: str
    config: LoraConfig
    factors: Mapping[str, LooseFactor]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    base: Fingerprint | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def tensors(self) -> dict[str, Tensor]:
        """Everything under its name on disk, each (…), sorted by name."""
        found = dict(self.others)
        for path, factor in self.factors.items():
            stem = PREFIX + path
            found |= {stem + factor.endings[0]: factor.A, stem + factor.endings[1]: factor.B}
            found |= {stem + ending: tensor for ending, tensor in factor.others.values()}
        return dict(sorted(found.items()))

    def origin(self) -> dict[str, str]:
        """Where it comes from, as `lorakit.json` of a result says it."""
        name = Path(self.label).name
        return {"name": name, "sha256": self.sha256} if self.sha256 else {"name": name}


def loose_from_model(model: nn.Module, name: str) -> LooseAdapter:
    """Take an adapter's numbers off a model, which keeps it.

    Args:
        model: The adapted model; only read.
        name: The adapter.

    Raises:
        AdapterError: There is no such adapter, or it is no plain LoRA on the original base (LoftQ).
        NotYetSupported: It sits on bare parameters.
    """
    state = state_of(model)
    check_known(state, [name])
    _check_whole(state.configs[name], name)
    _check_plain(model, name)
    found = saved_form(model, name)
    config = dataclasses.replace(found.config)
    scales = {path: layer.scaling[name] for path, layer in layers(model) if name in layer.r}
    tensors = {key: tensor.detach() for key, tensor in found.tensors.items()}
    factors, others = _sorted_out(tensors, scales)
    outer = _outer(factors)
    named = {match.path for match in resolve(survey(model).candidates, config, allow_partial=True).matches}
    if named != outer:  # loaded in part, as was allowed: the config names more than there is
        config = dataclasses.replace(config, target_modules=outer, **_PLAIN_TARGETS)
    return LooseAdapter(name, config, factors, others)


def loose_from_folder(folder: str | os.PathLike[str]) -> LooseAdapter:
    """Read an adapter from disk; no model is needed.

    Args:
        folder: A folder that PEFT or lorakit wrote.

    Raises:
        AdapterFileError: A file is missing or damaged, A and B do not fit together, a scale follows from a regular
            expression, which is not run, or the factors act on a base that its init changed, and the folder does not
            say how.
        NotYetSupported: The adapter needs what is not built yet, or sits on bare parameters.
    """
    files = read_adapter(folder)
    config, tensors = files.config, files.file.tensors
    _check_whole(config, str(folder))
    ranks = {key.path: int(t.shape[0]) for n, t in tensors.items() if (key := parse(n)) and key.part == "A" and t.ndim}
    scales = {path: scale(r, alpha_at(files, path), config.use_rslora) for path, r in ranks.items()}
    factors, others = _sorted_out(tensors, scales)
    past = past_of(files.folder, config, files.sidecar.began if files.is_ours else {}, False, (RECOMPUTE,))
    if past.moves:
        factors = _on_the_original(factors, past, files)
        config = plain_config(config)
    for path, factor in factors.items():
        fits = factor.A.ndim >= 2 and factor.B.ndim >= 2 and factor.B.shape[1] and not factor.r % factor.B.shape[1]
        if not fits:
            shapes = f"{tuple(factor.A.shape)} and {tuple(factor.B.shape)}"
            raise AdapterFileError(f"{folder}: A and B of {path} do not fit together: {shapes}.")
    if not factors:
        raise AdapterFileError(f"{folder}: there are no LoRA sites in the file.")
    side = files.sidecar
    return LooseAdapter(str(folder), config, factors, others, side.base, side.facts, files.file.sha256)


def described(config: LoraConfig, ranks: Mapping[str, int], targets: set[str] | str | None = None) -> LoraConfig:
    """A config for factors whose scale is 1, whatever their ranks: it says of every site what lies there.

    Args:
        config: All that has nothing to do with rank and scale.
        ranks: Path of each site -> its rank.
        targets: What `target_modules` says, or None for the paths.

    Returns:
        A config without rsLoRA in which alpha equals the rank everywhere, so that any reader gets scale 1.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {_anchored(path, ranks): r for path, r in ranks.items() if r != usual}
    narrowed = {} if targets is not None else _PLAIN_TARGETS
    return dataclasses.replace(
        config,
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        use_rslora=False,
        init_lora_weights=True,
        target_modules=_outer(ranks) if targets is None else targets,
        **narrowed,
    )


_PLAIN_TARGETS: Mapping[str, Any] = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}


def common_targets(adapters: Sequence[LooseAdapter]) -> set[str] | str | None:
    """What names exactly the sites of some adapters together, in the words of their configs; None where only paths do.

    Args:
        adapters: Of one base.
    """
    first, *rest = (adapter.config for adapter in adapters)
    said = ("target_modules", *_PLAIN_TARGETS)
    if all(getattr(first, name) == getattr(config, name) for config in rest for name in said):
        known = first.target_modules
        return set(known) if isinstance(known, (list, set)) else known
    found: set[str] = set()
    for config in (first, *rest):
        narrowed = any(getattr(config, name) is not None for name in _PLAIN_TARGETS)
        if narrowed or not isinstance(config.target_modules, (list, set)):
            return None
        found |= set(config.target_modules)
    return found


def _sorted_out(
    tensors: Mapping[str, Tensor], scales: Mapping[str, float]
) -> tuple[dict[str, LooseFactor], dict[str, Tensor]]:
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
            lacking = " and ".join(sorted({"A", "B"} - set(found)))
            raise AdapterFileError(f"The adapter's site {path} has no {lacking}.")
        (end_A, A), (end_B, B) = found.pop("A"), found.pop("B")
        factors[path] = LooseFactor(A, B, scales[path], (end_A, end_B), found)
    return factors, others


def _check_plain(model: nn.Module, name: str) -> None:
    for path, layer in layers(model):
        if layer.moved_by == name and layer.initial is None:
            raise AdapterError(
                f"{path}: {state_of(model).configs[name].init_lora_weights} changed the base by more than a product of "
                f"low rank, so adapter {name!r} is no plain LoRA on the original: its factors alone do not say what it "
                "does. Merge it, or write what it makes of the model with merged_state_dict."
            )


def _on_the_original(factors: Mapping[str, LooseFactor], past: Past, files: AdapterFiles) -> dict[str, LooseFactor]:
    """The factors of an adapter whose init moved the base, as plain LoRA of twice the rank."""
    named = (
        f"{files.folder}: init_lora_weights is {files.config.init_lora_weights!r}: the factors act on a base that it"
    )
    if past.first is None:
        raise AdapterFileError(
            f"{named} changed, and the folder does not say how. Load it with allow=['recompute_init'] and save it with "
            "save_adapter, or, in PEFT, with path_initial_model_for_weight_conversion. If the base at hand is the "
            "changed one, set init_lora_weights to true in its config."
        )
    if files.sidecar.base is not None and files.sidecar.base.bounds:
        raise AdapterFileError(
            f"{named} changed while it was quantised, so it was rounded a second time, and this is no plain LoRA on "
            "the original. Merge it instead."
        )
    plain = {}
    for path, factor in factors.items():
        first = past.first.get(path)
        if first is None or (first[0].shape, first[1].shape) != (factor.A.shape, factor.B.shape):
            raise AdapterFileError(f"{files.folder}: the first factors of {path} are missing or of another shape.")
        A, B = as_plain(Slot("weight", factor.B.shape[0], factor.A.shape[1]), factor.A, factor.B, first)
        plain[path] = dataclasses.replace(factor, A=A, B=B)
    return plain


def _check_whole(config: LoraConfig, label: str) -> None:
    if config.target_parameters:
        raise NotYetSupported(
            f"{label} sits on bare parameters (target_parameters); this does not support targeting nn.Parameter. "
            "Merge it into a model instead."
        )


def _outer(paths: Iterable[str]) -> set[str]:
    """The modules that must be named to have sites at these paths: a module brings what stands inside it."""
    return {path.partition(INSIDE)[0] for path in paths}


def _anchored(path: str, paths: Mapping[str, int]) -> str:
    """A pattern that names one path and no other: some path may end with another."""
    ambiguous = any(other.endswith("." + path) for other in paths)
    return "^" + path.replace(".", r"\.") if ambiguous else path
