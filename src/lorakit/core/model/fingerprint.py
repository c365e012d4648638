"""The identity of a base model: its architecture, the names and shapes of its parameters, and samples of every tensor.

A fingerprint takes milliseconds to compute, even for large models, because every floating-point parameter and
persistent buffer is sampled only at fixed positions. The sampled values are stored bit for bit in the tensor's dtype.
Adapters, merges and trained biases do not change the fingerprint.

A fingerprint misses changes at positions that are not sampled, unless the weight files are known and differ. A change
to a fraction f of a tensor's values is missed with probability (1 - f)^64. A fingerprint also misses changes within the
quantization error of a quantized weight; changes to buffers that are not saved, to the model's code and config, or to
the tokenizer; and deliberate changes by someone who knows the sampled positions.

To keep an adapter from being applied twice, permanently merged adapters are recorded in the model's config, which is
saved and loaded with the weights.

The hashes of the files that a base was loaded from are evidence, not part of the identity: values in memory can change
after loading, and the same base can be saved to different files. They are cached (`lorakit.file_hashes`).
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from lorakit.core.model.base_samples import (
    APART,
    EXACT,
    QUANTIZED,
    BaseTensor,
    Sample,
    agreement,
    as_hex,
    first_agreement,
    first_positions,
    from_hex,
    positions,
    take_first_samples,
    take_samples,
    tensors_of_base,
)
from lorakit.core.model.index import COMPILED, AdapterIndex, embedding_of
from lorakit.core.quantization.int8_linear import Int8Linear
from lorakit.core.routing.state import AdapterState
from lorakit.core.shards import has_several_processes, is_sharded
from lorakit.durable import JsonObject, JsonValue, read_json
from lorakit.errors import OVERRIDE, BaseMismatchError
from lorakit.file_hashes import FileStatus, file_hashes

SAME, OTHER_PRECISION, UNVERIFIABLE, DIFFERENT = "same", "same at other precision", "unverifiable", "different"

FIRST, VERSION = 1, 2
"""The first format version, whose fingerprints have no version field, and the current format version."""

RUNNING = frozenset({"running_mean", "running_var"})
"""Buffers that change during forward passes in training mode and are not saved with adapters."""

SHOWN = 3
"""Maximum number of tensors named in the reason for a verdict."""


@dataclass(frozen=True)
class Fingerprint:
    """The identity of a base model.

    Attributes:
        architecture: Class name of the model.
        parameters: Number of parameters; a tensor with several names is counted once.
        names_sha256: SHA-256 of the names and shapes of the parameters, sorted by name.
        vocabulary: Number of rows in the input embedding; 0 if there is none.
        dtype: The most common dtype or weight format among the matrices.
        samples: Name of a parameter -> sample; empty if the values cannot be read.
        buffers: Name of a persistent buffer -> sample.
        files: Name of a weight file -> its SHA-256; empty if the files are not known.
        version: Format version of the samples.
    """

    architecture: str
    parameters: int
    names_sha256: str
    vocabulary: int
    dtype: str
    samples: Mapping[str, Sample]
    buffers: Mapping[str, Sample] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def bounds(self) -> dict[str, bytes]:
        """Dict from the name of each quantized tensor to the maximum error of each sampled value, as bf16 bytes."""
        return {name: sample.bound for name, sample in self.samples.items() if sample.bound}

    def without(self, names: Collection[str]) -> Fingerprint:
        """Return a copy of the fingerprint without the samples of the given parameters and buffers."""
        samples = {name: sample for name, sample in self.samples.items() if name not in names}
        buffers = {name: sample for name, sample in self.buffers.items() if name not in names}
        return replace(self, samples=samples, buffers=buffers)

    def as_dict(self) -> JsonObject:
        """Return the fingerprint as JSON values for `lorakit.json`; empty optional fields are omitted."""
        names = ("architecture", "parameters", "names_sha256", "vocabulary", "dtype")
        values: JsonObject = {name: getattr(self, name) for name in names}
        first = self.version == FIRST
        text = as_hex if first else _as_text
        bounds = {name: text(bound) for name, bound in self.bounds.items()}
        if first:
            values["samples"] = {name: text(sample.bits) for name, sample in self.samples.items()}
            return {**values, "bounds": bounds} if bounds else values
        optional = {"bounds": bounds, "buffers": _by_dtype(self.buffers), "files": dict(self.files)}
        values |= {name: table for name, table in optional.items() if table}
        return {**values, "version": self.version, "samples": _by_dtype(self.samples)}

    @classmethod
    def from_dict(cls, values: JsonValue) -> Fingerprint | None:
        """Return the fingerprint described by the output of `as_dict`, or None if the values are malformed."""
        try:
            return _read(dict(values)) if isinstance(values, dict) else None
        except (KeyError, ValueError, TypeError, AttributeError):
            return None


class BaseVerdict(NamedTuple):
    """Result of `compare`: `SAME`, `OTHER_PRECISION`, `UNVERIFIABLE` or `DIFFERENT`.

    `reason` is the reason for use in messages, and `warning` is for the user of an accepted base, or "".
    """

    verdict: str
    reason: str
    warning: str = ""


def fingerprint(
    model: nn.Module | AdapterIndex,
    read: Callable[[str], Tensor] | None = None,
    cut: Mapping[int, int] = MappingProxyType({}),
    *,
    like: Fingerprint | None = None,
    with_files: bool = False,
) -> Fingerprint:
    """Compute the fingerprint of a model's base, without its adapters.

    Args:
        model: A model with or without adapters, or its index; not changed.
        read: Function that maps a tensor name to a tensor (…), for a model on the meta device; if None, the model's
            tensors are read.
        cut: Id of a base tensor -> number of leading rows to use; other tensors are used in full.
        like: A fingerprint to compare with the result; the result uses the same format version.
        with_files: Whether to hash the weight files that the model was loaded from, if they are known.
    """
    version = VERSION if like is None else like.version
    index = AdapterIndex.of(model)
    model = index.model
    if read is None and (recorded := _recorded(index)) is not None:
        return replace(recorded, files=weight_file_hashes(model) if with_files else {})
    tensors = tensors_of_base(index, cut)
    parameters = {name: tensor for name, tensor in tensors.items() if not tensor.is_buffer}
    buffers = {name: tensor for name, tensor in tensors.items() if tensor.is_buffer and tensor.is_readable(False)}
    shapes = "\n".join(f"{name} {tensor.shape}" for name, tensor in sorted(parameters.items()))
    matrices = {name: tensor for name, tensor in parameters.items() if len(tensor.shape) >= 2}
    needed = matrices if version == FIRST else parameters
    samples: dict[str, Sample] = {}
    if needed and all(tensor.is_readable(read is not None) for tensor in needed.values()):
        samples = (take_first_samples if version == FIRST else take_samples)(parameters, read)
    return Fingerprint(
        architecture=type(model._modules.get(COMPILED, model)).__name__,
        parameters=sum({tensor.key: math.prod(tensor.shape) for tensor in parameters.values()}.values()),
        names_sha256=hashlib.sha256(shapes.encode()).hexdigest(),
        vocabulary=min(vocabulary_of(model), *cut.values()) if cut else vocabulary_of(model),
        dtype=_dtype(matrices or parameters, samples if read is not None else {}),
        samples=samples,
        buffers=take_samples(buffers, None) if version != FIRST else {},
        files=weight_file_hashes(model) if with_files else {},
        version=version,
    )


def record_base(index: AdapterIndex, state: AdapterState) -> None:
    """Record the fingerprint of a base in the adapters' state, because its weights may be distributed later.

    Nothing is done in a single process, or if the fingerprint is known or the weights are distributed already.
    """
    if state.base is None and has_several_processes() and not is_sharded(index.model):
        state.base = fingerprint(index).as_dict()


def _recorded(index: AdapterIndex) -> Fingerprint | None:
    """Return the recorded fingerprint of a base whose weights are distributed or in int8 now; otherwise None."""
    recorded = None if index.state is None else index.state.base
    if recorded is None or not (is_sharded(index.model) or _multiplies_in_int8(index)):
        return None
    return _read(dict(recorded))


def _multiplies_in_int8(index: AdapterIndex) -> bool:
    return any(isinstance(index.base(path), Int8Linear) for path in index.modules)


def compare(known: Fingerprint | None, present: Fingerprint, whose: str = "the adapter's") -> BaseVerdict:
    """Compare an adapter's base, if it is known, with a model's base.

    `whose` is a possessive that identifies the known base in the reason, such as "the adapter's".
    """
    if known is None:
        return BaseVerdict(UNVERIFIABLE, "the adapter has no fingerprint of its base")
    if known.architecture != present.architecture:
        reason = f"{whose} base is a {known.architecture}, but this model is a {present.architecture}"
        return BaseVerdict(DIFFERENT, reason)
    if known.vocabulary != present.vocabulary:
        reason = f"{whose} base has {known.vocabulary:,} tokens, but this model has {present.vocabulary:,}"
        return BaseVerdict(DIFFERENT, reason)
    if known.names_sha256 != present.names_sha256:
        counts = f"{known.parameters:,} versus {present.parameters:,} parameters"
        return BaseVerdict(DIFFERENT, f"names or shapes of the base's parameters differ ({counts})")
    if known.version != present.version:
        return BaseVerdict(UNVERIFIABLE, "the fingerprints have different formats, so their samples cannot be compared")
    if not known.samples or not present.samples:
        return BaseVerdict(UNVERIFIABLE, "the values of one base cannot be read (quantized, or on the meta device)")
    return _with_files(_compare_samples(known, present, whose), known, present)


def _compare_samples(known: Fingerprint, present: Fingerprint, whose: str) -> BaseVerdict:
    first = known.version == FIRST
    agree = first_agreement if first else agreement
    degrees = {
        name: agree(known.samples[name], present.samples[name])
        if name in known.samples and name in present.samples
        else APART
        for name in sorted({*known.samples, *(() if first else present.samples)})
    }
    shared = [name for name in sorted(known.buffers) if name in present.buffers]  # others are persistent in only one
    degrees |= {name: agree(known.buffers[name], present.buffers[name]) for name in shared}
    apart = [name for name, degree in degrees.items() if degree == APART]
    moved = [name for name in apart if name in shared and name.rpartition(".")[2] in RUNNING]
    if len(apart) > len(moved):
        named = ", ".join([name for name in apart if name not in moved][:SHOWN])
        count = f"{len(apart) - len(moved)} of {len(degrees)}"
        return BaseVerdict(
            DIFFERENT, f"values in {count} tensors differ: same shapes, different weights (first {named})"
        )
    warning = ""
    if moved:
        warning = (
            f"the base's running statistics have changed since the adapter was saved (buffers: {len(moved)}, first "
            f"{moved[0]}). Running statistics change in training mode, and the adapter does not contain them. Save and "
            "restore them with the base."
        )
    weaker = f"; only {len(degrees)} matrices are sampled, because the fingerprint is in format 1" if first else ""
    inexact = [degree for degree in degrees.values() if degree not in (EXACT, APART)]
    if known.dtype != present.dtype:
        reason = f"{whose} base was {known.dtype}, but this model is {present.dtype}"
    elif QUANTIZED in inexact:
        reason = "the values agree within the quantization errors of the two formats"
    elif inexact:
        reason = f"{len(inexact)} of {len(degrees)} tensors agree after rounding to another dtype"
    else:
        return BaseVerdict(SAME, f"architecture, shapes and sampled values agree{weaker}", warning)
    return BaseVerdict(OTHER_PRECISION, reason + weaker, warning)


def _with_files(verdict: BaseVerdict, known: Fingerprint, present: Fingerprint) -> BaseVerdict:
    """Compare the weight files; a difference can add a warning but never changes the verdict."""
    if verdict.verdict == DIFFERENT or not known.files or not present.files:
        return verdict
    if sorted(known.files.values()) == sorted(present.files.values()):
        return verdict._replace(reason=f"{verdict.reason}, and the weight files are the same")
    warning = verdict.warning
    if verdict.verdict == SAME:
        doubt = (
            "the base's weight files differ from those used when the adapter was saved, although all sampled values "
            "are the same: either the base was saved again to different files, or it changed at positions that are not "
            "sampled. If the base was only saved again, ignore this warning."
        )
        warning = f"{warning} {doubt}" if warning else doubt
    return verdict._replace(reason=f"{verdict.reason}; the weight files differ", warning=warning)


def sampled_positions(mark: Fingerprint, name: str, shape: tuple[int, ...]) -> list[int]:
    """Return the positions, in order, at which a fingerprint samples a flattened tensor of this shape."""
    sample = mark.samples.get(name)
    if sample is None or not sample.bits:
        return []
    if mark.version == FIRST:
        return first_positions(shape).tolist()
    return positions([(name, shape)], len(sample.bits) // sample.torch_dtype.itemsize)[0].tolist()


def _dtype(tensors: Mapping[str, BaseTensor], read: Mapping[str, Sample]) -> str:
    dtypes = [read[name].dtype if name in read else tensor.dtype for name, tensor in tensors.items()]
    return max(set(dtypes), key=dtypes.count) if dtypes else ""


def _read(values: JsonObject) -> Fingerprint:
    """Build a fingerprint from JSON values; wrong ones raise a KeyError, ValueError, TypeError or AttributeError."""
    version = values.pop("version", FIRST)
    decode = from_hex if version == FIRST else _from_text
    bounds = dict(values.pop("bounds", {}))
    table = values.pop("samples")
    samples = _samples({"bfloat16": table} if version == FIRST else table, bounds, decode)
    buffers = _samples(values.pop("buffers", {}), bounds, decode)
    files = values.pop("files", {})
    mark = Fingerprint(**values, samples=samples, buffers=buffers, files=files, version=version)
    texts, integers = (mark.architecture, mark.names_sha256, mark.dtype), (mark.parameters, mark.vocabulary, version)
    sound = all(isinstance(text, str) for text in (*texts, *files, *files.values()))
    sound = sound and all(isinstance(integer, int) for integer in integers) and version in (FIRST, VERSION)
    if not (sound and all(sample.is_sound() for sample in (*samples.values(), *buffers.values()))):
        raise ValueError("not a fingerprint")
    return mark


def _samples(table: JsonObject, bounds: Mapping[str, str], decode: Callable[[str], bytes]) -> dict[str, Sample]:
    return {
        name: Sample(dtype, decode(text), decode(bounds.get(name, "")))
        for dtype, named in table.items()
        for name, text in named.items()
    }


def _by_dtype(samples: Mapping[str, Sample]) -> dict[str, dict[str, str]]:
    tables: dict[str, dict[str, str]] = {}
    for name, sample in samples.items():
        tables.setdefault(sample.dtype, {})[name] = _as_text(sample.bits)
    return tables


def _as_text(bits: bytes) -> str:
    return base64.b64encode(bits).decode("ascii")


def _from_text(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def vocabulary_of(model: nn.Module) -> int:
    """Return the number of rows in a model's input embedding, or 0 if it has none."""
    weight = getattr(embedding_of(model), "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim else 0


CONFIG_KEY = "lorakit_merged"
"""Field of the model's config that lists permanently merged adapters, each as {"sha256", "name"}."""


def merge_record(model: nn.Module) -> dict[str, str]:
    """Return SHA-256 of its weights -> name of each permanently merged adapter in a model's config."""
    recorded = getattr(getattr(model, "config", None), CONFIG_KEY, None)
    entries = recorded if isinstance(recorded, (list, tuple)) else []
    return {str(e["sha256"]): str(e.get("name", "")) for e in entries if isinstance(e, Mapping) and "sha256" in e}


def add_merge_record(model: nn.Module, adapters: Mapping[str, str]) -> None:
    """Add permanently merged adapters, SHA-256 of their weights -> name, to the record in a model's config."""
    known = {**merge_record(model), **adapters}
    setattr(model.config, CONFIG_KEY, [{"sha256": sha, "name": name} for sha, name in known.items()])


def check_not_merged_in(model: nn.Module, folder: Path, weights_sha256: str, allow: Collection[str]) -> None:
    """Raise a BaseMismatchError if an adapter was merged into a model already, unless "base_mismatch" is allowed."""
    known = merge_record(model)
    if weights_sha256 in known and "base_mismatch" not in allow:
        name = f" (as {known[weights_sha256]})" if known[weights_sha256] else ""
        raise BaseMismatchError(
            f"{folder}: this adapter has already been merged into the model{name} and would be applied twice.",
            advice=f"Use the model without the adapter, load the adapter's base, or {OVERRIDE}.",
            what=known[weights_sha256] or None,
            where=folder,
            override="base_mismatch",
        )


MOST_BYTES = 1 << 30
"""Maximum total size in bytes of the files to hash; hashing this much takes about a second. Files with a cached hash do
not count, nor do files that the Hub cache names by their hash. If the total is larger, no hashes are returned."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHA256 = re.compile("[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def weight_file_hashes(model: nn.Module) -> dict[str, str]:
    """Return a dict from file name to SHA-256 for the safetensors or GGUF files that a model was loaded from.

    It is empty if the files, which `name_or_path` of the config gives, are not known or a hash cannot be computed.
    """
    return {name: str(sha256) for name, (sha256, *_) in weight_file_inputs(model).items()}


def weight_file_inputs(model: nn.Module) -> dict[str, list[str | int]]:
    """Return what identifies the files that a model was loaded from in the keys of caches (`lorakit.caches`).

    Returns:
        File name -> the SHA-256 of `weight_file_hashes`, with the file's status if the Hub cache gives the SHA-256,
        which is then not computed. Empty if the hashes are not known.
    """
    try:
        files = {file.name: Path(os.path.realpath(file)) for file in _files_of(model)}
        blobs = {name: FileStatus.of(path) for name, path in files.items() if _is_blob(path)}
        others = {path for name, path in files.items() if name not in blobs}
        computed = file_hashes(others, MOST_BYTES)
    except (OSError, RuntimeError, ValueError):  # an unreadable file, no home directory, or an invalid path
        return {}
    if len(computed) < len(others):
        return {}
    return {n: [path.name, *blobs[n]] if n in blobs else [computed[path]] for n, path in sorted(files.items())}


def _files_of(model: nn.Module) -> list[Path]:
    """Return a model's weight files from its directory, or from the Hub cache if only one cached revision has any."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if not isinstance(name, str) or not name:
        return []
    if Path(name).is_dir():
        return _in_folder(Path(name))
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return [Path(name)]
    snapshots = _hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    if not _HUB_ID.fullmatch(name) or not snapshots.is_dir():
        return []
    revisions = [files for entry in snapshots.iterdir() if (files := _in_folder(entry))]
    return revisions[0] if len(revisions) == 1 else []


def _in_folder(folder: Path) -> list[Path]:
    """Return the weight files that transformers loads from a directory."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        return []
    index = read_json(folder / _INDEX, 64 << 20)
    table = index.get("weight_map") if isinstance(index, dict) else None
    names = {name for name in table.values() if isinstance(name, str)} if isinstance(table, dict) else set()
    if any(Path(name).name != name for name in names):
        return []
    return [folder / name for name in sorted(names)]


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _is_blob(real: Path) -> bool:
    """Return whether a file is in the Hub cache under a name that is its SHA-256."""
    return _SHA256.fullmatch(real.name) is not None and real.parent.name == "blobs"
