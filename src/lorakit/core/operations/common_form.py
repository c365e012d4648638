"""The common form of an adapter: plain LoRA in fp32 with one rank, scale 1, and neither patterns nor rsLoRA.

It is made from the files alone, and every runtime computes the same update from it. Variants whose inference is a plain
low-rank update are converted exactly; adapters that contain anything else are rejected, by name. This module does not
depend on formats or runtimes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorakit.config import LoraConfig
from lorakit.core.linalg import padded
from lorakit.core.operations.compatibility import shared_facts
from lorakit.core.operations.tensor_sources import AdapterWeights, SiteFactors, weights_of_folder
from lorakit.core.operations.writing import common_targets, described, write
from lorakit.core.variants import NO_TENSORS, PLAIN, Variant, invocations_of, variants_of, without
from lorakit.errors import AdapterError, AdapterFileError, PatternError
from lorakit.tables import format_some
from lorakit.targets.patterns import literal_value
from lorakit.tensor_headers import PREFIX, ROWS

MERGE = "Merge it (lorakit merge), or extract a plain adapter from the merged model (lorakit extract --rank)."


@dataclass(frozen=True)
class CommonAdapter:
    """An adapter in the common form.

    Attributes:
        folder: The directory that it was read from.
        weights: A (r, in, …) and B (out, r, …) in fp32 with scale 1 and the same r at every site, and their config.
        invocation: Ids of the tokens from whose last occurrence the adapter is active (aLoRA); empty if always.
    """

    folder: Path
    weights: AdapterWeights
    invocation: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The rank of every site."""
        return self.weights.config.r

    def save(
        self, folder: str | os.PathLike[str], base: str | None, more: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        """Write the adapter to an empty directory in PEFT's format, with the name of its base and more metadata."""
        config = dataclasses.replace(self.weights.config, base_model_name_or_path=base)
        write(dataclasses.replace(self.weights, config=config, facts={**self.weights.facts, **more}), folder)


def common_form(folder: str | os.PathLike[str]) -> CommonAdapter:
    """Read an adapter from disk and convert it to the common form; the base is not needed.

    Raises:
        AdapterError: The adapter has a part that is not plain LoRA, such as a magnitude (DoRA) or a saved module.
        AdapterFileError: The files are damaged or do not belong together, or contain NaN or infinite values.
    """
    source = weights_of_folder(folder)
    _check_plain(source)
    _check_config(source)
    rank = max(factor.r for factor in source.factors.values())
    factors = {path: _common(factor, rank) for path, factor in source.factors.items()}
    waiting = invocations_of(source.config)
    gone = [variant for variant in variants_of(source.config) if variant.invocation is None]
    config, factors = described(without(source.config, *gone), factors, _listed(common_targets([source])))
    config = dataclasses.replace(config, inference_mode=True, lora_dropout=0.0, bias="none")
    facts = {**shared_facts([source]), "operation": {"name": "export", "of": [source.origin()]}}
    weights = dataclasses.replace(source, config=config, factors=factors, facts=facts, sha256="")
    return CommonAdapter(Path(folder), weights, tuple(waiting[0][1]) if waiting else ())


_BESIDES = {
    "modules_to_save": "saved modules",
    "trainable_token_indices": "trained token rows",
    "lora_bias": "biases of B",
    "layer_replication": "replicated layers",
    "bias": "trained biases",
}
"""Config field -> what it adds to an adapter that no other runtime applies as LoRA."""


def besides_lora(config: LoraConfig) -> list[str]:
    """Return what the config of an adapter says that prevents its common form; empty if nothing does."""
    found = [field for field in _BESIDES if (value := getattr(config, field)) and value != "none"]
    return [*_not_plain(variants_of(config)), *map(_named, found)]


def _listed(targets: set[str] | str | None) -> set[str] | None:
    """Return targets as a list, which every runtime can read; None, for full paths, if they are an expression."""
    return None if isinstance(targets, str) else targets


def _common(factor: SiteFactors, rank: int) -> SiteFactors:
    """Return a factor with the scale in B, padded with zeros to a rank, in fp32."""
    held = factor.holding(padded(factor.scaled_product(), rank))
    waits = factor.variant.invocation is not None
    plain = held if waits else held.of_variant(PLAIN, NO_TENSORS)
    return dataclasses.replace(plain, A=plain.A.float(), B=plain.B.float())


def _check_plain(adapter: AdapterWeights) -> None:
    """Reject an adapter with parts that are not plain LoRA, naming all of them."""
    problems = _not_plain(dict.fromkeys(factor.variant for factor in adapter.factors.values()))
    problems += dict.fromkeys(_what(name) for name in adapter.others)
    if any(factor.bias is not None for factor in adapter.factors.values()):
        problems.append(_named("lora_bias"))
    if adapter.config.layer_replication:
        problems.append(_named("layer_replication"))
    if problems:
        text = f"{adapter.label}: the adapter contains {', '.join(problems)}, which runtimes cannot apply as LoRA. "
        raise AdapterError(text + MERGE, what=problems[0], where=adapter.label)


def _check_config(adapter: AdapterWeights) -> None:
    """Reject an adapter whose config says more than its tensors show, or other ranks; expressions are not evaluated."""
    config, problems = adapter.config, list[str]()
    ranks = dict[str, int]()
    with contextlib.suppress(PatternError):
        ranks = {
            p: int(literal_value(config.rank_pattern, p, config.r)) for p, f in adapter.factors.items() if not f.bare
        }
    if other := [path for path, rank in ranks.items() if rank != adapter.factors[path].r]:
        problems.append(f"other ranks than in the config at {format_some(other)}")
    targets = () if isinstance(config.target_modules, str) else config.target_modules or ()
    modules = [path for path, factor in adapter.factors.items() if targets and not factor.bare]
    if unnamed := [path for path in modules if not any(f".{name}." in f".{path}." for name in targets)]:
        problems.append(f"target_modules does not name {format_some(unnamed)}")
    absent = [field for field in ("modules_to_save", "trainable_token_indices", "lora_bias") if getattr(config, field)]
    problems += [f"no tensors of {field}" for field in absent]
    if problems:
        text = f"{adapter.label}: the tensors do not match the config: {'; '.join(problems)}. Restore both files."
        raise AdapterFileError(text, what=problems[0], where=adapter.label)


def _is_plain(variant: Variant) -> bool:
    """Return whether inference with a variant is plain LoRA on the original base, at least from its tokens onward."""
    always = variant.output is None or variant.invocation is not None
    return always and variant.is_low_rank and variant.parts.uses_factors


def _what(name: str) -> str:
    """Return what a tensor that belongs to no site is, for messages."""
    module, _, parameter = name.removeprefix(PREFIX).rpartition(".")
    if name.endswith(ROWS):
        return _named("trainable_token_indices")
    return _named("bias") if parameter == "bias" else f"the saved module {module} (modules_to_save)"


def _named(field: str) -> str:
    return f"{_BESIDES[field]} ({field})"


def _not_plain(variants: Iterable[Variant]) -> list[str]:
    return [f"{variant.title} ({variant.field})" for variant in variants if not _is_plain(variant)]
