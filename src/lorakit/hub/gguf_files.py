"""Read the header of a GGUF file, and load models and tokenizers from GGUF files with transformers.

Format, completeness, architecture and tokenizer are checked before weights are loaded. Files are treated as data: sizes
are checked against the length of the file, and nothing in a file is evaluated.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import ModelError, require_packages
from lorakit.terminal import hidden_stderr

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SUFFIX = ".gguf"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Number of a type of metadata values -> its format in `struct`; strings and arrays are 8 and 9."""

_TOKENS = "tokenizer.ggml.tokens"
_MAX_DIMENSIONS = 8
_ALIGNMENT = 32

_DIGITS_FIRST = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Pre-tokenizers in GGUF files that split off each digit and then split as GPT-2 does."""

_LIKE_GPT2 = frozenset({"gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"})
"""Pre-tokenizers in GGUF files that split as GPT-2 does, which is what transformers does with unknown ones."""


@dataclass(frozen=True)
class GgufHeader:
    """Metadata of a GGUF file.

    Attributes:
        values: Metadata key -> value; arrays are omitted.
        arrays: Key of each array in the metadata -> its number of elements.
        formats: Storage format of weights, such as "Q4_K" -> number of values stored in it.
        entries: Positions of the first and last bytes of each entry of the metadata, without the tokenizer's arrays.
        listing: Positions of the first and last bytes of the list of tensors.
        size: Size of the file in bytes.
    """

    path: Path
    values: Mapping[str, Any]
    arrays: Mapping[str, int]
    formats: Mapping[str, int]
    entries: tuple[tuple[int, int], ...]
    tensors: int
    listing: tuple[int, int]
    size: int

    @property
    def architecture(self) -> str:
        """Return the architecture as named in the file, such as "llama"; empty if there is none."""
        return str(self.values.get("general.architecture", ""))

    @property
    def has_tokenizer(self) -> bool:
        """Return whether the file contains a vocabulary."""
        return _TOKENS in self.arrays

    @property
    def pre_tokenizer(self) -> str | None:
        """Return the name of the rule that splits text before byte-level BPE, or None for another tokenizer type."""
        return str(self.values.get("tokenizer.ggml.pre")) if self.values.get("tokenizer.ggml.model") == "gpt2" else None

    def describe(self) -> str:
        """Return a line that says how the weights are stored and what that means for training."""
        shown = ", ".join(name for name, _ in Counter(self.formats).most_common())
        return (
            f"{self.path}: GGUF file with weights in {shown}; they are dequantized when they are loaded, and an "
            "adapter is trained on the dequantized weights."
        )


class _Reader:
    """Reads values from a memory-mapped file; a struct.error past its end, a ValueError for an unknown type."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position = data, len(_MAGIC)

    def scalars(self, form: str, count: int = 1) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{form}")
        self.skip(layout.size)
        return layout.unpack_from(self.data, self.position - layout.size)

    def skip(self, size: int) -> None:
        self.position += size
        if self.position > len(self.data):
            raise struct.error("past the end")

    def text(self) -> str:
        (length,) = self.scalars("Q")
        self.skip(length)
        return self.data[self.position - length : self.position].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """Return a metadata value; an array is skipped, and its number of elements is returned."""
        if kind in _SCALARS:
            return self.scalars(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"metadata of the unknown type {kind}")
        inner, count = self.scalars("IQ")
        if inner in _SCALARS:
            self.skip(count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(count):
                self.skip(*self.scalars("Q"))
        else:
            raise ValueError(f"an array of the unknown type {inner}")
        return count


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file without its weights, which must all be inside the file.

    Raises:
        ModelError: The file cannot be read, is not a GGUF file with a whole model, or is truncated.
        MissingExtra: A package that reads GGUF files is not installed.
    """
    require_packages("Reading GGUF files", "gguf", ("gguf", "accelerate"))
    try:
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise _error(path, "not a GGUF file (it does not begin with GGUF).")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _parse(path, _Reader(data))
    except ModelError:  # a ValueError, too
        raise
    except OSError as cause:
        raise _error(path, f"the file cannot be read ({cause.strerror}).") from None
    except struct.error:
        raise _error(path, "the GGUF file is truncated; copy or download it again.") from None
    except ValueError as cause:
        raise _error(path, f"the GGUF file is damaged or of an unknown version ({cause}).") from None
    _check_kind(header)
    return header


def _parse(path: Path, reader: _Reader) -> GgufHeader:
    (version,) = reader.scalars("I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, supported are {_VERSIONS[0]} and {_VERSIONS[1]}")
    tensors, entries = reader.scalars("QQ")
    values, arrays, kept = dict[str, Any](), dict[str, int](), list[tuple[int, int]]()
    for _ in range(entries):
        start, key = reader.position, reader.text()
        (kind,) = reader.scalars("I")
        (arrays if kind == _ARRAY else values)[key] = reader.value(kind)
        if kind != _ARRAY or not key.startswith("tokenizer."):
            kept.append((start, reader.position))
    formats: Counter[str] = Counter()
    first, end = reader.position, 0
    for _ in range(tensors):
        name, numbers, tensor_end = _tensor(reader)
        formats[name] += numbers
        end = max(end, tensor_end)
    listing = first, reader.position
    alignment = values.get("general.alignment", _ALIGNMENT)
    alignment = alignment if isinstance(alignment, int) and alignment > 0 else _ALIGNMENT
    reader.skip(-reader.position % alignment + end if tensors else 0)  # raises if the last weights are cut off
    return GgufHeader(path, values, arrays, formats, tuple(kept), tensors, listing, len(reader.data))


def _tensor(reader: _Reader) -> tuple[str, int, int]:
    """Return the storage format of the next tensor, the number of its values, and where it ends in the data."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = reader.text()
    (count,) = reader.scalars("I")
    if count > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {name[:80]!r} has {count} dimensions")
    numbers = 1
    for size in reader.scalars("Q", count):
        numbers *= size
    kind, offset = reader.scalars("IQ")
    form = GGMLQuantizationType(kind)
    block, block_bytes = GGML_QUANT_SIZES[form]
    return form.name, numbers, offset + numbers // block * block_bytes


def _check_kind(header: GgufHeader) -> None:
    """Raise a ModelError for a part of a split model, another kind of file, or one without architecture or weights."""
    parts, kind = header.values.get("split.count", 1), header.values.get("general.type", "model")
    if isinstance(parts, int) and parts > 1:
        raise _error(
            header.path,
            f"this is one of the {parts} parts of a split GGUF file; join them with llama.cpp's `llama-gguf-split "
            "--merge FIRST-PART NEW-FILE` and pass the new file.",
        )
    if kind != "model":
        raise _error(header.path, f"the GGUF file is of the type {kind!r}, not a model; pass the model's GGUF file.")
    if not header.architecture or not header.formats:
        raise _error(header.path, "the GGUF file has no general.architecture or no weights, so it is not a model.")


def _error(path: Path, problem: str) -> ModelError:
    return ModelError(f"{path}: {problem}", where=path)


def check_architecture(header: GgufHeader) -> None:
    """Raise a ModelError if transformers cannot read the architecture of a GGUF file."""
    known = readable_architectures()
    plain = {name.replace("-", "").replace("_", "") for name in known}
    if header.architecture.replace("-", "").replace("_", "") not in plain:
        text = (
            f"{header.path}: transformers cannot read the architecture {header.architecture!r} from a GGUF file; it "
            f"reads {', '.join(known)}. Pass a directory with the model's safetensors files."
        )
        raise ModelError(text, what=header.architecture, where=header.path, allowed=known)


def readable_architectures() -> list[str]:
    """Return the names of the architectures that transformers reads from GGUF files, sorted."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    names = {*GGUF_SUPPORTED_ARCHITECTURES, "t5encoder"} - {"general", "tokenizer"}  # not architectures
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:  # transformers before 5.20
        return sorted(names)
    return sorted(names.union(GGUF_CONFIG_ARCHS))


@contextlib.contextmanager
def reading(header: GgufHeader, *, for_config: bool = False) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the location and options with which transformers' loaders read a GGUF file, and hide progress bars.

    The location is an empty directory, so that loaders do not read other files of the file's directory. A config is
    read without the vocabulary, which saves seconds; see `finish_config`.
    """
    with tempfile.TemporaryDirectory() as folder, hidden_stderr():
        path = header.path.absolute()
        if for_config and not _is_read_fast(header):
            path = Path(folder) / "metadata.gguf"
            _write_metadata(header, path)
        yield folder, {"gguf_file": str(path)}


def _is_read_fast(header: GgufHeader) -> bool:
    """Return whether transformers reads the config of an architecture without reading the whole vocabulary."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:  # transformers before 5.20
        return False
    return header.architecture in GGUF_CONFIG_ARCHS


def _write_metadata(header: GgufHeader, target: Path) -> None:
    """Write a copy of a GGUF file without the tokenizer's arrays and with a hole in place of the weights."""
    with header.path.open("rb") as file, target.open("wb") as copy:
        version = file.read(len(_MAGIC) + struct.calcsize("<I"))
        copy.write(version + struct.pack("<QQ", header.tensors, len(header.entries)))
        for first, last in (*header.entries, header.listing):
            file.seek(first)
            copy.write(file.read(last - first))
        copy.truncate(copy.tell() + header.size)


def finish_config(config: PreTrainedConfig, header: GgufHeader) -> None:
    """Set the size of the vocabulary as transformers does, which `reading` for a config leaves out."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_TO_TRANSFORMERS_MAPPING

    known = GGUF_TO_TRANSFORMERS_MAPPING["config"].get(header.architecture, {"vocab_size": ""})
    is_stated = f"{header.architecture}.vocab_size" in header.values and "vocab_size" in known
    if header.has_tokenizer and not is_stated and not _is_read_fast(header):
        config.vocab_size = header.arrays[_TOKENS]


def dequantizing_options() -> dict[str, Any]:
    """Return options that make `from_pretrained` dequantize all weights of a GGUF file."""
    import transformers

    # newer transformers versions may keep weights packed if a kernel is installed
    packed = getattr(transformers, "GgufConfig", None)
    return {} if packed is None else {"quantization_config": packed(dequantize=True)}


def finish_model(model: PreTrainedModel, path: Path) -> None:
    """Remove all traces of the GGUF format from a loaded model, and record `path` as the source of its weights."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model.config).pop("_model_name_or_path", None)  # the title in the file; no loader accepts it as a path or id
    model.config.name_or_path = str(path.absolute())


def finish_tokenizer(tokenizer: PreTrainedTokenizerBase, header: GgufHeader) -> None:
    """Restore in a tokenizer what transformers omits: a rule that splits off digits, and the maximum length."""
    if header.pre_tokenizer in _DIGITS_FIRST:
        _split_digits(tokenizer)
    length = header.values.get(f"{header.architecture}.context_length")
    if isinstance(length, int) and length > 0:
        tokenizer.model_max_length = length
    tokenizer.name_or_path = str(header.path)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Restore the pre-tokenization rule that the GGUF reader omits: SmolLM first splits off each digit.

    Without the rule, "  1" becomes a space and " 1", whereas in pretraining it became two spaces and a digit.
    """
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])


def tokenizer_warning(header: GgufHeader) -> str | None:
    """Return a warning if transformers may split text differently than the model's own tokenizer, or None."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # transformers before 5.20
        return None
    name = header.pre_tokenizer
    if name is None or name in _DIGITS_FIRST | _LIKE_GPT2 | GGUF_PRE_TOKENIZER_SPLITS.keys():
        return None
    return (
        f"{header.path}: transformers does not know the pre-tokenizer {name!r} and splits text as GPT-2 does, so some "
        "text may become other tokens than in pretraining. To be certain, pass the directory of the original model."
    )
