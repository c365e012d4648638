"""The common form as PEFT's directory, which vLLM, SGLang, Ray Serve and PEFT read, and the commands that serve it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from lorakit import hub
from lorakit.durable import write_bytes, write_text
from lorakit.errors import UsageError
from lorakit.export.conditions import vllm_limit
from lorakit.export.request import Exported, ExportRequest, versioned
from lorakit.hub_cache import CARD


def write_peft(request: ExportRequest, folder: Path) -> Exported:
    """Write an adapter in the common form, with its tokenizer, to a directory.

    Raises:
        UsageError: The base has no name by which a runtime can be started.
    """
    adapter = request.adapter
    base = request.served_base or adapter.weights.config.base_model_name_or_path
    if base is None:
        text = f"{adapter.folder}: the adapter does not name its base; pass --served-base, the --model of the runtime."
        raise UsageError(text, field="served_base", where=adapter.folder)
    adapter.save(folder, base, {"verified": request.verified} if request.verified else {})
    for file, content in hub.tokenizer_contents(adapter.folder).items():
        write_bytes(folder / file, content)
    name = versioned(request.name, folder)
    if request.card is not None:
        write_text(folder / CARD, request.card(adapter.folder, folder, name))
    return Exported(name, base)


def serving_commands(name: str, base: str, rank: int, output: str) -> Mapping[str, str]:
    """Return how runtimes serve an exported adapter: runtime -> command, or Python code (Ray).

    Source:
        vllm/config/lora.py and lora_filesystem_resolver (0.32), sglang/srt/server_args.py (0.5.23),
        ray/llm/_internal/serve/configs (2.60).
    """
    model, pair = shlex.quote(base), shlex.quote(f"{name}={output}/{name}")
    sglang = (
        f"python -m sglang.launch_server --model-path {model} --host 127.0.0.1 --enable-lora --max-lora-rank {rank} "
        f"--lora-target-modules all --lora-paths {pair}"
    )
    limit = vllm_limit(rank)
    if limit is None:
        return {"SGLang": sglang}
    options = f"--host 127.0.0.1 --enable-lora --max-lora-rank {limit}"
    resolver = (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True VLLM_PLUGINS=lora_filesystem_resolver "
        f"VLLM_LORA_RESOLVER_CACHE_DIR={shlex.quote(output)} vllm serve {model} {options} --max-loras 8 "
        "--max-cpu-loras 64"
    )
    ray = f"""from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

config = LLMConfig(  # upload {name} to s3://BUCKET/adapters/ first; clients name it base:{name}
    model_loading_config={{"model_id": "base", "model_source": {json.dumps(base)}}},
    lora_config={{"dynamic_lora_loading_path": "s3://BUCKET/adapters", "max_num_adapters_per_replica": 32}},
    engine_kwargs={{"enable_lora": True, "max_loras": 32, "max_lora_rank": {limit}}},
)
serve.run(build_openai_app({{"llm_configs": [config]}}))"""
    return {
        "vLLM": f"vllm serve {model} {options} --lora-modules {pair}",
        "vLLM, adapters on first use": resolver,
        "SGLang": sglang,
        "Ray Serve LLM": ray,
    }
