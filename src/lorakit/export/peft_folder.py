"""The common form as PEFT's directory, which vLLM, SGLang, Ray Serve and PEFT read, and the commands that serve it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path

from lorakit import hub
from lorakit.core.operations.writing import write
from lorakit.durable import read_bytes, write_bytes
from lorakit.errors import AdapterError, UsageError
from lorakit.export.request import Exported, ExportRequest, versioned

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts for `--max-lora-rank` (vllm/config/lora.py, 0.32)."""

MOST_TOKENIZER_BYTES = 256 << 20


def write_peft(request: ExportRequest, folder: Path) -> Exported:
    """Write an adapter in the common form, with its tokenizer, to a directory.

    Raises:
        AdapterError: The adapter waits for tokens (aLoRA), which these runtimes reject.
        UsageError: The base has no name by which a runtime can be started.
    """
    adapter = request.adapter
    if adapter.invocation:
        text = f"{adapter.folder}: vLLM and SGLang reject adapters that wait for tokens (aLoRA); export it as gguf."
        raise AdapterError(text, what="aLoRA", where=adapter.folder)
    base = request.served_base or adapter.weights.config.base_model_name_or_path
    if base is None:
        text = f"{adapter.folder}: the adapter does not name its base; pass --served-base, the --model of the runtime."
        raise UsageError(text, field="served_base", where=adapter.folder)
    config = dataclasses.replace(adapter.weights.config, base_model_name_or_path=base)
    write(dataclasses.replace(adapter.weights, config=config), folder)
    for path in hub.tokenizer_files(adapter.folder):
        write_bytes(folder / path.name, read_bytes(path, MOST_TOKENIZER_BYTES))
    name = versioned(request.name, folder)
    return Exported(name, serving_commands(name, base, adapter.rank))


def serving_commands(name: str, base: str, rank: int, output: str = "OUTPUT") -> Mapping[str, str]:
    """Return the command lines that serve an exported adapter, by runtime."""
    model, pair = shlex.quote(base), shlex.quote(f"{name}={output}/{name}")
    enough = next((limit for limit in VLLM_RANKS[1:] if limit >= rank), None)
    sglang = (
        f"python -m sglang.launch_server --model-path {model} --host 127.0.0.1 --enable-lora --max-lora-rank {rank} "
        f"--lora-target-modules all --lora-paths {pair}"
    )
    if enough is None:
        return {"sglang": sglang}
    vllm = f"vllm serve {model} --host 127.0.0.1 --enable-lora --max-lora-rank {enough} --lora-modules {pair}"
    return {"vllm": vllm, "sglang": sglang}
