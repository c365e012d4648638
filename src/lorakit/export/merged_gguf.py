"""An adapter merged into its base's GGUF file, for programs of llama.cpp and for Ollama; metadata and tokenizer stay.

One weight at a time is read, dequantized, changed and written. A head that shares its weight with the embedding gets
its own weight if the adapter changes only one of the two.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorakit.choices import EMBEDDING
from lorakit.durable import write_text
from lorakit.errors import AdapterError
from lorakit.export.facts import added_tokens, chat_template
from lorakit.export.gguf import TOKENS, adapted_names, layout_of
from lorakit.export.gguf_base import GgufBase, base_gguf
from lorakit.export.modelfile import modelfile
from lorakit.export.request import Exported, ExportRequest, versioned
from lorakit.tables import format_some

if TYPE_CHECKING:
    import gguf
    from numpy.typing import NDArray

HEAD = "output"

_TEMPLATE = "tokenizer.chat_template"
_REPLACED = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")
_IN_FP32 = re.compile(r".*(_norm|position_embd|token_types|ffn_gate_inp(_shexp)?|ssm_conv1d)\.weight|.*(?<!\.weight)")
"""Names of weights that llama.cpp's converter never rounds, besides vectors."""


@dataclass(frozen=True)
class MergedWeight:
    """One weight of the merged model.

    Attributes:
        source: Name of the weight in the base's file.
        site: Path of the adapted site, or None if the weight is the base's.
        form: How it is stored.
    """

    source: str
    site: str | None
    form: gguf.GGMLQuantizationType


def write_merged_gguf(request: ExportRequest, folder: Path) -> Exported:
    """Write the merged model as one GGUF file, and a Modelfile for Ollama, to an empty directory.

    Raises:
        AdapterError: A site has no weight in GGUF files, or a merged weight is too large for F16.
        ModelError: The GGUF file is not the adapter's base.
        UsageError: The architecture was not tested, or there is no GGUF file.

    Source:
        llama.cpp: conversion/base.py (prepare_tensors: which weights stay in F32, and F16 for rows that no block fits).
    """
    layout = layout_of(request)
    base = GgufBase(base_gguf(request.known_base, request.base_gguf), layout)
    names = adapted_names(request, layout, if_tied="")
    doubts = [base.check(request), _lacking(request, base)]
    file, template = folder / "model.gguf", chat_template(request.adapter.folder)
    _write(request, base, _weights(request, base, {f"{n}.weight": path for path, n in names.items()}), file, template)
    named = versioned(request.name, folder)
    file.rename(folder / f"{named}.gguf")
    write_text(folder / "Modelfile", modelfile(f"{named}.gguf", base, template))
    return Exported(named, request.known_base.recorded_name, tuple(filter(None, doubts)))


def _lacking(request: ExportRequest, base: GgufBase) -> str:
    """Return for the user which added tokens of the adapter's tokenizer the file does not have, or ""."""
    field = base.reader.fields.get("tokenizer.ggml.tokens")
    known = set() if field is None else set(_contents(field))
    own = added_tokens(request.adapter.folder).values()
    new = [text for text in own if known and known.isdisjoint([text.encode(), text.replace(" ", "▁").encode()])]
    text = f"{base.path}: lacks {format_some(new)} of the adapter's tokenizer, so prompts with them give other tokens. "
    return text + "Merge the adapter (lorakit merge), and convert the merged model." if new else ""


def merged_commands(name: str, base: str, rank: int, output: str) -> Mapping[str, str]:
    """Return how llama.cpp and Ollama load a merged model: title -> command."""
    file = shlex.quote(f"{output}/{name}.gguf")
    small = shlex.quote(f"{output}/{name}-Q4_K_M.gguf")
    return {
        "llama.cpp": f"llama-cli -m {file} -p 'PROMPT'",
        "Ollama": f"ollama create {name.replace('@', ':')} -f {shlex.quote(f'{output}/Modelfile')}",
        "llama-quantize": f"llama-quantize {file} {small} Q4_K_M",  # the package gguf does not write K-quants
    }


def _weights(request: ExportRequest, base: GgufBase, sites: Mapping[str, str]) -> dict[str, MergedWeight]:
    """Return the weights of the merged model by name, given the sites (name of the weight -> path)."""
    head, tokens = f"{HEAD}.weight", f"{TOKENS}.weight"
    sources = {name: name for name in base.tensors}
    if head not in sources and {head, tokens} & sites.keys():
        if base.layout.name("lm_head") != HEAD:
            where = request.adapter.folder
            text = f"{where}: llama.cpp cannot give {base.layout.architecture} a head of its own; use lorakit merge."
            raise AdapterError(text, what=sites.get(tokens) or sites[head], where=where)
        sources[head] = tokens
    return {
        name: MergedWeight(source, sites.get(name), _form(name, base.tensors[source], request.outtype))
        for name, source in sources.items()
    }


def _form(name: str, tensor: gguf.ReaderTensor, wanted: str) -> gguf.GGMLQuantizationType:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    forms = GGMLQuantizationType
    if tensor.tensor_type in (forms.I8, forms.I16, forms.I32, forms.I64, forms.F64):
        return tensor.tensor_type
    if len(tensor.shape) < 2 or _IN_FP32.fullmatch(name):
        return forms.F32
    form = forms[wanted]
    return form if tensor.shape[0] % GGML_QUANT_SIZES[form][0] == 0 else forms.F16


def _write(
    request: ExportRequest, base: GgufBase, weights: Mapping[str, MergedWeight], file: Path, template: str | None
) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, base.layout.architecture)
    for key, field in base.reader.fields.items():
        if key.startswith("GGUF.") or key in _REPLACED or (key == _TEMPLATE and template):
            continue
        kind, *inner = field.types
        if kind != gguf.GGUFValueType.ARRAY:
            writer.add_key_value(key, _contents(field), kind)
        elif inner:  # an array that is not empty, which the writer rejects
            writer.add_key_value(key, _contents(field), kind, inner[-1])
    if template:
        writer.add_chat_template(template)
    main = "ALL_F32" if request.outtype == "F32" else f"MOSTLY_{request.outtype}"
    writer.add_file_type(gguf.LlamaFileType[main])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, weight in weights.items():
        shape = base.tensors[weight.source].shape[::-1].tolist()
        size, width = gguf.GGML_QUANT_SIZES[weight.form]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // size * width, weight.form)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in weights.items():
            writer.write_tensor_data(_stored(request, base, name, weight))


def _contents(field: gguf.ReaderField) -> Any:
    """Return a value of the metadata; texts as bytes, because tokens need not be valid UTF-8."""
    import gguf

    if field.types[-1] != gguf.GGUFValueType.STRING:
        return field.contents()
    texts = [field.parts[index].tobytes() for index in field.data]
    return texts if field.types[0] == gguf.GGUFValueType.ARRAY else texts[0]


def _stored(request: ExportRequest, base: GgufBase, name: str, weight: MergedWeight) -> NDArray[Any]:
    """Return a weight of the merged model as it is stored."""
    import gguf

    tensor = base.tensors[weight.source]
    if weight.site is None and tensor.tensor_type == weight.form:
        return tensor.data
    values = base.values(weight.source)
    if weight.site is not None:
        factor = request.adapter.weights.factors[weight.site]
        if _is_embedding(base, weight.site):
            update = factor.A.T @ factor.B.T  # rows are looked up by token id
        else:
            update = base.layout.rows(name.removesuffix(".weight"), factor.B @ factor.A)
        values = (torch.from_numpy(np.array(values)) + update).numpy()
    with np.errstate(over="ignore"):  # checked below
        stored = gguf.quants.quantize(values, weight.form)
    if weight.form == gguf.GGMLQuantizationType.F16 and not np.isfinite(stored).all():
        text = f"{request.adapter.folder}: the merged {name} has values that F16 cannot hold; pass --outtype BF16."
        raise AdapterError(text, what=name, where=request.adapter.folder, field="outtype")
    return stored


def _is_embedding(base: GgufBase, path: str) -> bool:
    return any(site.path == path and site.kind == EMBEDDING for site in base.layout.shape.sites)
