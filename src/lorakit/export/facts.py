"""Properties of an adapter and its base, from their files, that the rules about other runtimes depend on.

Neither torch nor a model is loaded; with a base that is not in the catalog, `lorakit.hub` builds its skeleton with
transformers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit import hub
from lorakit.architectures.shapes import ModelShape
from lorakit.choices import MAX_RANK
from lorakit.config import SIDECAR_FILE, LoraConfig, read_config
from lorakit.durable import JsonObject, as_object, read_bytes, read_json
from lorakit.errors import PatternError
from lorakit.hub_cache import HubOptions, adapter_from_hub
from lorakit.targets.patterns import literal_value
from lorakit.tensor_headers import ENDINGS, MAX_FILE_BYTES, PREFIX, StoredTensor, parse_header

WEIGHTS_FILE = "adapter_model.safetensors"
TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
MAX_BYTES = 64 << 20

_NUMBERS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BF16_EXPONENT, _BF16_VALUE = 0x7F80, 0x7FFF
"""Bits of a bf16 number: all exponent bits are set in NaN and infinity; all but the sign are zero in zero."""


@dataclass(frozen=True)
class Pair:
    """The factors of one site: A (r, in) and B (out, r); for fused experts, r is that of all experts together.

    Attributes:
        is_zero: Whether A or B has only zeros.
    """

    rank: int
    in_features: int
    out_features: int
    is_zero: bool


@dataclass(frozen=True)
class BaseFacts:
    """A base model: its config and the tokenizer's files; weights are not read.

    Attributes:
        names: Every string that names it: as given, as recorded in adapters, and its path or Hub id.
        config: The contents of its `config.json`; empty for a GGUF file.
        template: Its default chat template, or None.
        added_tokens: Id -> text of the tokens that its tokenizer adds; empty if that is not known.
    """

    names: frozenset[str]
    shape: ModelShape
    config: JsonObject
    template: str | None
    added_tokens: Mapping[int, str] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """Its `model_type`, which the catalog of published models lacks."""
        return str(self.config.get("model_type") or self.shape.model_type)


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter on disk.

    Attributes:
        pairs: Path of a site -> its factors; sites whose A and B belong together.
        incomplete: Paths of sites without A or without B, or whose ranks differ from each other or from the config's.
        unprefixed: Names of factors that do not start as PEFT's.
        others: Name of each tensor that is not a factor, without PEFT's prefix -> its shape.
        nonfinite: Names of the tensors with NaN or infinite values.
        fingerprint: The base that `lorakit.json` describes; empty if there is none.
        template: The default chat template in the adapter's directory, or None.
        added_tokens: Id -> text of the tokens that the adapter's tokenizer adds to those of its model file.
        max_rank: The rank that the runtime is started for.
    """

    folder: Path
    config: LoraConfig
    pairs: Mapping[str, Pair] = field(default_factory=dict)
    incomplete: tuple[str, ...] = ()
    unprefixed: tuple[str, ...] = ()
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    nonfinite: tuple[str, ...] = ()
    fingerprint: JsonObject = field(default_factory=dict)
    template: str | None = None
    added_tokens: Mapping[int, str] = field(default_factory=dict)
    base: BaseFacts | None = None
    max_rank: int = MAX_RANK

    @property
    def largest_rank(self) -> int:
        """The largest rank that the config gives to a site."""
        return max([self.config.r, *map(int, self.config.rank_pattern.values())])

    @property
    def vocabulary(self) -> int:
        """Number of rows of the base's input embedding, else that recorded in `lorakit.json`; 0 if unknown."""
        recorded = self.fingerprint.get("vocabulary")
        return self.base.shape.vocab if self.base is not None else recorded if isinstance(recorded, int) else 0


def adapter_facts(
    folder: str | os.PathLike[str], base: BaseFacts | None = None, max_rank: int = MAX_RANK
) -> AdapterFacts:
    """Read an adapter's files.

    Raises:
        AdapterFileError: A file is missing or damaged.
        NotYetSupported: The config has a feature that is not implemented.
    """
    folder = Path(folder)
    config, _ = read_config(folder)
    path = folder / WEIGHTS_FILE
    data = read_bytes(path, MAX_FILE_BYTES)
    tensors = parse_header(path, data).tensors
    pairs, incomplete = _pairs(data, tensors, is_blocked=config.use_bdlora is not None)
    sidecar = folder / SIDECAR_FILE
    values = as_object(read_json(sidecar, MAX_BYTES)) if sidecar.is_file() else {}
    return AdapterFacts(
        folder=folder,
        config=config,
        pairs=pairs,
        incomplete=(*incomplete, *_of_other_rank(config, pairs)),
        unprefixed=tuple(name for name in tensors if _site_of(name) is not None and not name.startswith(PREFIX)),
        others={n.removeprefix(PREFIX): tensor.shape for n, tensor in tensors.items() if _site_of(n) is None},
        nonfinite=tuple(name.removeprefix(PREFIX) for name, tensor in tensors.items() if not _is_finite(data, tensor)),
        fingerprint=as_object(values.get("base")),
        template=chat_template(folder),
        added_tokens=added_tokens(folder),
        base=base,
        max_rank=max_rank,
    )


def base_facts(model: str | hub.ModelSource) -> BaseFacts:
    """Read a base's config and tokenizer files, which are downloaded if it is on the Hub.

    Raises:
        ModelError: The model was not found, or no model can be built from its config.
    """
    source = hub.resolve(model)
    path = Path(source.path_or_id)
    if source.kind == "hub":
        options = HubOptions(revision=source.revision)
        path = adapter_from_hub(source.path_or_id, options, files=("config.json",), has_tokenizer=True)
    config = {"config": path, "gguf": None}.get(source.kind, path / "config.json")
    stored = None if source.header is None else source.header.values.get("tokenizer.chat_template")
    return BaseFacts(
        names=frozenset({source.given, source.recorded_name, source.path_or_id}),
        shape=hub.shape_of(model),
        config={} if config is None else as_object(read_json(config)),
        template=chat_template(path) if path.is_dir() else stored,
        added_tokens=added_tokens(path),
    )


def chat_template(folder: Path) -> str | None:
    """Return the default chat template of the tokenizer in a directory, or None if there is none."""
    if (folder / TEMPLATE_FILE).is_file():
        return read_bytes(folder / TEMPLATE_FILE, MAX_BYTES).decode("utf-8", errors="replace")
    path = folder / TOKENIZER_CONFIG
    found = as_object(read_json(path, MAX_BYTES)).get("chat_template") if path.is_file() else None
    if isinstance(found, list):  # several templates by name
        named = [as_object(one) for one in found]
        found = next((one.get("template") for one in named if one.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def added_tokens(folder: Path) -> dict[int, str]:
    """Return the tokens, id -> text, that a tokenizer adds to those of its model; transformers 5 writes one file."""
    files = {name: folder / name for name in ("added_tokens.json", TOKENIZER_CONFIG, "tokenizer.json")}
    first, second, third = (as_object(read_json(f, MAX_BYTES)) if f.is_file() else {} for f in files.values())
    listed: list[tuple[object, object]] = [(number, text) for text, number in first.items()]
    decoder = as_object(second.get("added_tokens_decoder")).items()
    listed += [(int(key), as_object(one).get("content")) for key, one in decoder if key.isdecimal()]
    listed += [(one.get("id"), one.get("content")) for one in map(as_object, third.get("added_tokens") or [])]
    return {number: str(text) for number, text in listed if isinstance(number, int)}


def _site_of(name: str) -> tuple[str, str] | None:
    """Return the site and the factor, "A" or "B", of a tensor, or None if the tensor is not a factor."""
    rest = name.removeprefix(PREFIX)
    for ending, part in ENDINGS.items():
        if part in ("A", "B") and rest.endswith(ending):
            return rest.removesuffix(ending), part
    return None


def _pairs(
    data: bytes, tensors: Mapping[str, StoredTensor], *, is_blocked: bool
) -> tuple[dict[str, Pair], tuple[str, ...]]:
    """Return the factors that belong together by site, and the sites with others.

    In block-diagonal factors, B has as many columns as a block of A has rows.
    """
    sites: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        if (site := _site_of(name)) is not None:
            sites.setdefault(site[0], {})[site[1]] = tensor
    pairs = {}
    for path, parts in sites.items():
        A, B = parts.get("A"), parts.get("B")
        if A is None or B is None or len(A.shape) < 2 or len(B.shape) < 2:
            continue
        if A.shape[0] == B.shape[1] > 0 or (is_blocked and B.shape[1] and A.shape[0] % B.shape[1] == 0):
            is_zero = _is_zero(data, A) or _is_zero(data, B)
            pairs[path] = Pair(A.shape[0], A.shape[1], B.shape[0], is_zero)
    return pairs, tuple(path for path in sites if path not in pairs)


def _of_other_rank(config: LoraConfig, pairs: Mapping[str, Pair]) -> list[str]:
    """Return the sites with other ranks than the config says; those of experts and expressions are not compared."""
    if config.target_parameters or config.use_bdlora:
        return []
    with contextlib.suppress(PatternError):
        return [p for p, pair in pairs.items() if pair.rank != literal_value(config.rank_pattern, p, config.r)]
    return []


def _is_finite(data: bytes, tensor: StoredTensor) -> bool:
    """Return whether a tensor has neither NaN nor infinite values."""
    values = _values(data, tensor)
    if tensor.dtype == "BF16":
        return bool(((values & _BF16_EXPONENT) != _BF16_EXPONENT).all())
    return bool(np.isfinite(values).all())


def _is_zero(data: bytes, tensor: StoredTensor) -> bool:
    """Return whether a tensor has only zeros."""
    values = _values(data, tensor)
    return not bool((values & _BF16_VALUE if tensor.dtype == "BF16" else values).any())


def _values(data: bytes, tensor: StoredTensor) -> NDArray[Any]:
    """Return a tensor's values (n,); those of bf16 as the bits, and those of integers as bytes."""
    kind = np.dtype(_NUMBERS.get(tensor.dtype, "u1"))
    return np.frombuffer(data, kind, (tensor.last - tensor.first) // kind.itemsize, tensor.first)
