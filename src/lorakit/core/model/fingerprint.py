"""What identifies a base: its architecture, its parameters' names and shapes, and samples of every tensor.

Taken in milliseconds, also for large models: values at fixed positions of every floating parameter and persistent
buffer, in the bits of their dtype. Adapters, merges and trained biases do not change it. Not seen are: a change at
positions that are not sampled (a change of a fraction f of a tensor's values is missed with probability (1 - f)^64),
unless the weight files are known and differ; a change of a quantized weight below what quantizing cost; buffers that
are not saved; the model's code and config; the tokenizer; and whatever somebody does who knows the positions.

Adapters that were merged into a base for good are recorded in the model's config, which travels with the weights
through every save and load, so that none is applied a second time.

`weight_file_hashes` returns the SHA-256 of the files that a base was loaded from, if they are known and small enough
to hash. The hashes are evidence, not part of the identity: memory can change after loading, and the same base can be
saved in other files. They are cached with the size, modification time and inode of each file. Files that cannot be
found or read are ignored without an error.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorakit.core.model.base_samples import (
    APART,
    EXACT,
    QUANTIZED,
    Part,
    Sample,
    agreement,
    as_hex,
    first_agreement,
    first_positions,
    from_hex,
    listing,
    parameter_count,
    parts_of,
    positions,
    take_first_samples,
    take_samples,
)
from lorakit.core.model.index import AdapterIndex, embedding_of
from lorakit.durable import JsonObject, read_json, sha256_file, write_json
from lorakit.errors import OVERRIDE, AdapterFileError, BaseMismatchError, DiskError
from lorakit.machine import cache_directory

SAME, OTHER_PRECISION, UNVERIFIABLE, DIFFERENT = "same", "same at other precision", "unverifiable", "different"

FIRST, VERSION = 1, 2
"""The form that has no version field, and the form that is written."""

RUNNING = frozenset({"running_mean", "running_var"})
"""Buffers that a forward in training mode changes, and that no adapter holds."""

SHOWN = 3
"""How many tensors a reason names."""


@dataclass(frozen=True)
class Fingerprint:
    """A base's identity.

    Attributes:
        architecture: Class name of the model.
        parameters: Numbers in it; a tensor that is shared under several names counts once.
        names_sha256: SHA-256 of the sorted names and shapes.
        vocabulary: Rows of the input embedding, 0 if there is none.
        dtype: dtype of most matrices, or how most of them are quantized.
        samples: Parameter -> sample; empty if they cannot be read.
        buffers: Persistent buffer -> sample.
        files: Name of each weight file -> its SHA-256; empty if not known.
        version: Form of the samples.
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
        """Quantized tensor -> how far each of its samples may be from the value that was quantized, in bf16."""
        return {name: sample.bound for name, sample in self.samples.items() if sample.bound}

    def without(self, names: Collection[str]) -> Fingerprint:
        """Return the fingerprint without samples of some parameters and buffers, such as those an adapter brings."""
        samples = {name: sample for name, sample in self.samples.items() if name not in names}
        buffers = {name: sample for name, sample in self.buffers.items() if name not in names}
        return replace(self, samples=samples, buffers=buffers)

    def as_dict(self) -> JsonObject:
        """Return plain values, as `lorakit.json` holds them; optional fields only if there is something in them."""
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
    def from_dict(cls, values: Any) -> Fingerprint | None:
        """Return what `as_dict` gave; None if the values do not have that form."""
        try:
            return _read(dict(values))
        except (KeyError, ValueError, TypeError, AttributeError):
            return None


class BaseVerdict(NamedTuple):
    """What `compare` found.

    Attributes:
        verdict: `SAME`, `OTHER_PRECISION`, `UNVERIFIABLE` or `DIFFERENT`.
        reason: Why, in words.
        warning: What a user should know although the base is accepted, or "".
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
    """Take the fingerprint of a model's base.

    Args:
        model: A model with or without adapters, or its index; only read.
        read: Name -> tensor (…), for a model on the meta device whose values are elsewhere.
        cut: Id of a tensor of the base -> how many of its rows count, if it has more.
        like: The fingerprint to compare it with, whose form it gets.
        with_files: Hash the weight files that the model was loaded from, if they are known.

    Returns:
        The fingerprint of what is under the adapters.
    """
    version = VERSION if like is None else like.version
    index = AdapterIndex.of(model)
    model = index.model
    parts = parts_of(index, cut)
    parameters = {name: part for name, part in parts.items() if not part.is_buffer}
    buffers = {name: part for name, part in parts.items() if part.is_buffer and part.is_readable(False)}
    matrices = {name: part for name, part in parameters.items() if len(part.shape) >= 2}
    needed = matrices if version == FIRST else parameters
    samples: dict[str, Sample] = {}
    if needed and all(part.is_readable(read is not None) for part in needed.values()):
        samples = (take_first_samples if version == FIRST else take_samples)(parameters, read)
    return Fingerprint(
        architecture=type(_innermost(model)).__name__,
        parameters=parameter_count(parts),
        names_sha256=hashlib.sha256(listing(parts).encode()).hexdigest(),
        vocabulary=min(vocabulary_of(model), *cut.values()) if cut else vocabulary_of(model),
        dtype=_dtype(matrices or parameters, samples if read is not None else {}),
        samples=samples,
        buffers=take_samples(buffers, None) if version != FIRST else {},
        files=weight_file_hashes(model) if with_files else {},
        version=version,
    )


def compare(known: Fingerprint | None, present: Fingerprint, whose: str = "the adapter's") -> BaseVerdict:
    """Compare an adapter's base with the one at hand.

    Args:
        known: The fingerprint kept with the adapter, or None.
        present: That of the model at hand.
        whose: Whose base it is, for the reason.

    Returns:
        The verdict, its reason, and a warning if there is one.
    """
    if known is None:
        return BaseVerdict(UNVERIFIABLE, "the adapter carries no fingerprint of its base")
    if known.architecture != present.architecture:
        reason = f"{whose} base is a {known.architecture}, this model is a {present.architecture}"
        return BaseVerdict(DIFFERENT, reason)
    if known.vocabulary != present.vocabulary:
        reason = f"{whose} base has {known.vocabulary:,} tokens, this model has {present.vocabulary:,}"
        return BaseVerdict(DIFFERENT, reason)
    if known.names_sha256 != present.names_sha256:
        counts = f"{known.parameters:,} against {present.parameters:,} parameters"
        return BaseVerdict(DIFFERENT, f"names or shapes of the base's parameters differ ({counts})")
    if known.version != present.version:
        return BaseVerdict(UNVERIFIABLE, "the two fingerprints have different forms, whose samples cannot be compared")
    if not known.samples or not present.samples:
        return BaseVerdict(UNVERIFIABLE, "the numbers of one of the bases cannot be read (quantised, or without data)")
    if known.version == FIRST:
        return _by_first_samples(known, present, whose)
    return _by_files(_by_samples(known, present, whose), known, present)


def _by_samples(known: Fingerprint, present: Fingerprint, whose: str) -> BaseVerdict:
    found = {
        name: agreement(known.samples[name], present.samples[name])
        if name in known.samples and name in present.samples
        else APART
        for name in sorted({*known.samples, *present.samples})
    }
    shared = [name for name in sorted(known.buffers) if name in present.buffers]  # one may not be saved everywhere
    found |= {name: agreement(known.buffers[name], present.buffers[name]) for name in shared}
    apart = [name for name, how in found.items() if how == APART]
    moved = [name for name in apart if name in shared and name.rpartition(".")[2] in RUNNING]
    if len(apart) > len(moved):
        return BaseVerdict(DIFFERENT, _differ([name for name in apart if name not in moved], len(found)))
    warning = ""
    if moved:
        warning = (
            f"running statistics of the base differ from those at the time of saving in {len(moved)} buffers, first "
            f"{moved[0]}: they change in training mode, and the adapter does not hold them. Save and restore them "
            "with the base."
        )
    if known.dtype != present.dtype:
        return BaseVerdict(OTHER_PRECISION, f"{whose} base was {known.dtype}, this model is {present.dtype}", warning)
    inexact = [how for how in found.values() if how not in (EXACT, APART)]
    if QUANTIZED in inexact:
        return BaseVerdict(
            OTHER_PRECISION, "the numbers agree within what quantising cost, in one way and in another", warning
        )
    if inexact:
        return BaseVerdict(
            OTHER_PRECISION, f"{len(inexact)} of {len(found)} tensors agree after rounding to another dtype", warning
        )
    return BaseVerdict(SAME, "architecture, shapes and sampled numbers agree", warning)


def _by_files(found: BaseVerdict, known: Fingerprint, present: Fingerprint) -> BaseVerdict:
    """Add what the weight files say: they confirm or raise a doubt, and never decide."""
    if found.verdict == DIFFERENT or not known.files or not present.files:
        return found
    if sorted(known.files.values()) == sorted(present.files.values()):
        return found._replace(reason=f"{found.reason}, and the weight files are the same")
    if found.verdict != SAME:
        return found._replace(reason=f"{found.reason}; the weight files differ")
    doubt = (
        "the base's weight files differ from those at the time of saving, and all sampled numbers are the same: the "
        "base was saved again in other files, or changed at places that are not sampled. If it was only saved again, "
        "ignore this."
    )
    return found._replace(
        reason=f"{found.reason}; the weight files differ", warning=" ".join(filter(None, (found.warning, doubt)))
    )


def _by_first_samples(known: Fingerprint, present: Fingerprint, whose: str) -> BaseVerdict:
    apart, exact = [], True
    for name, sample in known.samples.items():
        other = present.samples.get(name)
        if other is None or not first_agreement(sample, other):
            apart.append(name)
        else:
            exact = exact and first_agreement(sample, other, slack=False)
    if apart:
        return BaseVerdict(DIFFERENT, _differ(apart, len(known.samples)))
    weaker = f"only {len(known.samples)} matrices are sampled, since the fingerprint has the first form"
    if known.dtype != present.dtype:
        return BaseVerdict(OTHER_PRECISION, f"{whose} base was {known.dtype}, this model is {present.dtype}; {weaker}")
    if not exact:
        return BaseVerdict(
            OTHER_PRECISION, f"the numbers agree within what quantising cost, in one way and in another; {weaker}"
        )
    return BaseVerdict(SAME, f"architecture, shapes and sampled numbers agree; {weaker}")


def _differ(apart: list[str], total: int) -> str:
    first = ", ".join(apart[:SHOWN])
    return f"the numbers of {len(apart)} of {total} tensors differ: same shapes, other weights (first {first})"


def sampled_positions(mark: Fingerprint, name: str, shape: tuple[int, ...]) -> list[int]:
    """Return which values of a flattened tensor a fingerprint holds, in order.

    Args:
        mark: The fingerprint.
        name: The tensor.
        shape: Its shape in the base of the fingerprint.
    """
    sample = mark.samples.get(name)
    if sample is None or not sample.bits:
        return []
    if mark.version == FIRST:
        return first_positions(shape).tolist()
    return positions([(name, shape)], len(sample.bits) // sample.torch_dtype.itemsize)[0].tolist()


def _dtype(parts: Mapping[str, Part], read: Mapping[str, Sample]) -> str:
    dtypes = [read[name].dtype if name in read else part.dtype for name, part in parts.items()]
    return max(set(dtypes), key=dtypes.count) if dtypes else ""


def _read(values: JsonObject) -> Fingerprint:
    """Return the fingerprint that JSON values describe.

    Raises:
        KeyError: A field is missing.
        ValueError: A field does not have its form.
        TypeError: Likewise.
        AttributeError: Likewise.
    """
    version = values.pop("version", FIRST)
    first = version == FIRST
    bounds = dict(values.pop("bounds", {}))
    bytes_of = from_hex if first else _from_text
    samples, buffers = (
        {
            name: Sample(dtype, bytes_of(text), bytes_of(bounds.get(name, "")))
            for dtype, named in table.items()
            for name, text in named.items()
        }
        for table in (
            {"bfloat16": values.pop("samples")} if first else values.pop("samples"),
            values.pop("buffers", {}),
        )
    )
    files = values.pop("files", {})
    made = Fingerprint(**values, samples=samples, buffers=buffers, files=files, version=version)
    words, numbers = (made.architecture, made.names_sha256, made.dtype), (made.parameters, made.vocabulary, version)
    sound = all(isinstance(word, str) for word in (*words, *files, *files.values()))
    sound = sound and all(isinstance(number, int) for number in numbers) and version in (FIRST, VERSION)
    if not (sound and all(sample.is_sound() for sample in (*samples.values(), *buffers.values()))):
        raise ValueError("not a fingerprint")
    return made


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
    """Return the number of rows of a model's input embedding; 0 if it has none."""
    weight = getattr(embedding_of(model), "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim else 0


def _innermost(model: nn.Module) -> nn.Module:
    """The model itself, or what a compiler's wrapper holds."""
    original = model._modules.get("_orig_mod")
    return original if original is not None else model


CONFIG_KEY = "lorakit_merged"
"""Field of the model's config: a list of {"sha256", "name"}, one per adapter that was merged for good."""


def merge_record(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the weights -> name of every adapter that was merged into a model for good.

    Args:
        model: Any model; one without a config, or without a sound note in it, has none.
    """
    noted: Any = getattr(getattr(model, "config", None), CONFIG_KEY, None)
    entries = noted if isinstance(noted, (list, tuple)) else []
    return {str(e["sha256"]): str(e.get("name", "")) for e in entries if isinstance(e, Mapping) and "sha256" in e}


def add_merge_record(model: nn.Module, adapters: Mapping[str, str]) -> None:
    """Write into a model's config that adapters were merged for good.

    Args:
        model: A merged model with a config.
        adapters: SHA-256 of an adapter's weights -> its name; they join those that are noted already.
    """
    known = {**merge_record(model), **adapters}
    setattr(model.config, CONFIG_KEY, [{"sha256": sha, "name": name} for sha, name in known.items()])


def check_not_merged_in(model: nn.Module, folder: Path, weights_sha256: str, allow: Collection[str]) -> None:
    """Refuse an adapter that is part of the weights already, unless "base_mismatch" is allowed.

    Args:
        model: The base.
        folder: The adapter's folder, for the message.
        weights_sha256: Of its weights.
        allow: As in `load_adapter`.

    Raises:
        BaseMismatchError: It was merged into this model.
    """
    known = merge_record(model)
    if weights_sha256 in known and "base_mismatch" not in allow:
        was = f" (as {known[weights_sha256]})" if known[weights_sha256] else ""
        raise BaseMismatchError(
            f"{folder}: this adapter was merged into the model already{was}, and would act twice.",
            advice=f"Use the model as it is, load the adapter's own base, or {OVERRIDE}.",
            where=folder,
            override="base_mismatch",
        )


FILE, FORMAT, MOST_KEPT = "weight_files.json", 1, 512
"""Name of the cache's file, its format, and the number of hashes that it keeps."""

LEAST_KEPT = 1 << 20
"""Smaller files are hashed each time, which takes as long as reading the cache."""

MOST_BYTES = 1 << 30
"""Files of a base that are neither in a hub's cache under their hash nor hashed before are hashed up to this size in
all: about a second. A larger base has no evidence from files."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHA256 = re.compile("[0-9a-f]{64}")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def weight_file_hashes(model: nn.Module) -> dict[str, str]:
    """Return SHA-256 by name of the safetensors files that a model was loaded from; empty if any is not known.

    Args:
        model: A model; its config says where it was loaded from (`name_or_path`).
    """
    try:
        return _hashes(_files_of(model))
    except (OSError, RuntimeError, ValueError):  # unreadable, no home directory, not a path
        return {}


def _files_of(model: nn.Module) -> list[Path]:
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    if not isinstance(name, str) or not name:
        return []
    folder = Path(name) if Path(name).is_dir() else _snapshot(name)
    return [] if folder is None else _in_folder(folder)


def _in_folder(folder: Path) -> list[Path]:
    """Return the weight files that transformers takes from a folder."""
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


def _snapshot(name: str) -> Path | None:
    """Return the folder of a hub's cache with a model's weights; None if there are several revisions, or none."""
    if not _HUB_ID.fullmatch(name):
        return None
    snapshots = _hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    found = [entry for entry in snapshots.iterdir() if _in_folder(entry)] if snapshots.is_dir() else []
    return found[0] if len(found) == 1 else None


def _hub_cache() -> Path:
    own, home, shared = (os.environ.get(name) for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"))
    if own:
        return Path(own).expanduser()
    if home:
        return Path(home).expanduser() / "hub"
    return (Path(shared) if shared else Path.home() / ".cache") / "huggingface" / "hub"


def _hashes(files: list[Path]) -> dict[str, str]:
    known, unknown, fresh = {}, {}, {}
    kept = _read_kept() if files else {}
    for file in files:
        real = Path(os.path.realpath(file))
        facts = _facts(real)
        hashed = _kept_hash(kept.get(str(real)), facts)
        if _SHA256.fullmatch(real.name) and real.parent.name == "blobs":  # a hub's cache names blobs by their SHA-256
            known[file.name] = real.name
        elif hashed is not None:
            known[file.name] = hashed
        else:
            unknown[file.name] = real, facts
    if sum(facts["size"] for _, facts in unknown.values()) > MOST_BYTES:
        return {}
    for name, (real, facts) in unknown.items():
        known[name] = sha256_file(real)
        if _facts(real) != facts:
            return {}  # it changed while it was read
        if facts["size"] >= LEAST_KEPT:
            fresh[str(real)] = {**facts, "sha256": known[name]}
    if fresh:
        older = {path: entry for path, entry in kept.items() if path not in fresh}
        _keep({**older, **fresh})
    return dict(sorted(known.items()))


def _kept_hash(entry: Any, facts: dict[str, int]) -> str | None:
    """Return the hash in an entry of the cache; None if it is not sound, or the file has changed."""
    if not isinstance(entry, dict) or facts != {key: entry.get(key) for key in facts}:
        return None
    sha256 = str(entry.get("sha256"))
    return sha256 if _SHA256.fullmatch(sha256) else None


def _facts(file: Path) -> dict[str, int]:
    """Return what changes with a file's content.

    Raises:
        OSError: It is not a regular file, or cannot be asked.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{file}: not a regular file")
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _read_kept() -> JsonObject:
    try:
        content = read_json(cache_directory() / FILE, 16 << 20)
    except (AdapterFileError, OSError, RuntimeError):  # none yet, damaged, or no place for a cache
        return {}
    known = isinstance(content, dict) and content.get("format") == FORMAT
    files = content.get("files") if known else None
    return files if isinstance(files, dict) else {}


def _keep(kept: JsonObject) -> None:
    newest = dict(list(kept.items())[-MOST_KEPT:])
    try:
        write_json(cache_directory() / FILE, {"format": FORMAT, "files": newest})
    except (DiskError, OSError, RuntimeError):
        return  # hashed again next time
