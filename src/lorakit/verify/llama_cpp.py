"""The adapter as a GGUF file in llama.cpp, in this process: a base in F32 and a cache in F32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from lorakit import hub
from lorakit.errors import ModelError, describe, require_packages
from lorakit.export.gguf_base import base_gguf
from lorakit.verify.http_client import JsonClient
from lorakit.verify.loaded import package_versions
from lorakit.verify.runtime import BASE, Runtime, RuntimeRequest
from lorakit.verify.servers import SLOTS, LlamaServer, listed_models

LONGEST_ANSWER = 3600.0
"""Longest time in seconds for an answer of the server in this process: no network fails, and large bases are slow."""


@contextlib.contextmanager
def open_gguf(request: RuntimeRequest) -> Iterator[Runtime]:
    """Export the adapter as GGUF, and open it with the base's GGUF file in llama.cpp.

    Raises:
        MissingExtra: llama.cpp is not installed.
        UsageError: The base's GGUF file is not given.
        AdapterError: The adapter cannot be exported.
        ModelError: llama.cpp cannot load a file.
    """
    require_packages("Verifying in llama.cpp", "runtimes", ["xllamacpp"])
    base = base_gguf(request.spec.source, request.base_gguf)
    (adapter,) = request.export("gguf").glob("*.gguf")
    with running(base, adapter, request.context) as client:
        runtime = LlamaServer(client, listed_models(client), request, adapter.stem)
        runtime.versions = {**package_versions("xllamacpp"), **runtime.versions}
        yield runtime


@contextlib.contextmanager
def open_merged_gguf(request: RuntimeRequest) -> Iterator[Runtime]:
    """Merge the adapter into the base's GGUF file, and open the merged model in llama.cpp.

    Raises:
        MissingExtra: llama.cpp is not installed.
        LorakitError: The adapter cannot be merged, or llama.cpp cannot load the file.
    """
    require_packages("Verifying in llama.cpp", "runtimes", ["xllamacpp"])
    base = hub.resolve(base_gguf(request.spec.source, request.base_gguf))
    (merged,) = request.export("gguf --merged").glob("*.gguf")
    with running(merged, None, request.context) as client:
        runtime = LlamaServer(client, listed_models(client), request, BASE)
        runtime.versions = {**package_versions("xllamacpp"), **runtime.versions}
        runtime.title, runtime.others = f"{merged.stem}, merged, in llama.cpp", ()
        stored = set(base.header.formats if base.header else ())
        if request.base_gguf is not None and stored != {"F32"}:  # its weights were rounded before
            runtime.dtype = f"{runtime.dtype} from {', '.join(sorted(stored))}"
        yield runtime


@contextlib.contextmanager
def running(base: Path, adapter: Path | None, context: int) -> Iterator[JsonClient]:
    """Run llama.cpp's server in this process, with `context` tokens for each request, and yield a client for it.

    Raises:
        ModelError: llama.cpp cannot load a file.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(base)
    settings.n_ctx, settings.n_parallel = context * SLOTS, SLOTS
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to F16
    settings.hostnames, settings.port = ["127.0.0.1"], 0
    # its threads wait actively: with more than torch's, a busy machine computes ten times as long
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.warmup, settings.verbosity = False, -1
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    try:
        server = xllamacpp.Server(settings)
    except (RuntimeError, ValueError) as cause:
        text = f"{base}: llama.cpp cannot load this base, or the adapter {adapter} on it ({describe(cause)})."
        raise ModelError(text, where=base, field="base_gguf") from cause
    try:
        yield JsonClient(server.listening_address, timeout=LONGEST_ANSWER)
    finally:
        del server  # stops it
