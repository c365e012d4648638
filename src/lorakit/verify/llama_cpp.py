"""The adapter as a GGUF file in llama.cpp, in this process: a base in F32 and a cache in F32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from lorakit import hub
from lorakit.errors import ModelError, UsageError, describe, require_packages
from lorakit.verify.http_client import JsonClient
from lorakit.verify.loaded import package_versions
from lorakit.verify.runtime import Runtime, RuntimeRequest
from lorakit.verify.servers import LlamaServer, listed_models


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
    base = base_file(request)
    (adapter,) = request.export("gguf").glob("*.gguf")
    with running(base, adapter, request) as client:
        runtime = LlamaServer(client, listed_models(client), request, adapter.stem)
        runtime.versions = {**package_versions("xllamacpp"), **runtime.versions}
        yield runtime


def base_file(request: RuntimeRequest) -> Path:
    """Return the base as a GGUF file: the given one, or the one that the adapter was trained on.

    Raises:
        UsageError: There is none.
        ModelError: The file is damaged, or not a whole model.
    """
    if request.base_gguf is not None:
        return Path(hub.resolve(request.base_gguf).path_or_id)
    if request.spec.source.header is None:
        text = "llama.cpp needs the base as a GGUF file (F32 for an exact comparison); pass --base-gguf."
        raise UsageError(text, field="base_gguf")
    return request.spec.source.header.path


@contextlib.contextmanager
def running(base: Path, adapter: Path | None, request: RuntimeRequest) -> Iterator[JsonClient]:
    """Run llama.cpp's server in this process, and yield a client for it.

    Raises:
        ModelError: llama.cpp cannot load a file.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(base)
    settings.n_ctx, settings.n_parallel = request.context, 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to F16
    settings.hostnames, settings.port = ["127.0.0.1"], 0
    settings.warmup, settings.verbosity = False, -1
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    try:
        server = xllamacpp.Server(settings)
    except (RuntimeError, ValueError) as cause:
        text = f"{base}: llama.cpp cannot load this base, or the adapter {adapter} on it ({describe(cause)})."
        raise ModelError(text, where=base, field="base_gguf") from cause
    try:
        yield JsonClient(server.listening_address, timeout=request.timeout)
    finally:
        del server  # stops it
