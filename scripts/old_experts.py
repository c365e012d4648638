"""Write the adapters in tests/golden/transformers-4: models with experts, adapted with releases of 2025.

    python scripts/old_experts.py [family ...]

In transformers 4, each expert was a separate module. The script creates a virtual environment in a temporary folder,
installs the old releases there, and runs itself in it. Each directory has the model (`base`), the unmodified files of
peft, and `expected.safetensors` with the input and the logits that transformers and peft computed. They represent files
that users already have, so they are written once: run this to add a family, not to fix a test.

torch is installed from the sources in pip's configuration. Set PIP_EXTRA_INDEX_URL to PyTorch's CPU index if plain pip
would install CUDA libraries.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "transformers-4"
RELEASES = ("transformers==4.57.1", "peft==0.17.1", "accelerate<2", "torch", "numpy")
ROWS, TOKENS, VOCABULARY = 2, 6, 16


class Family(NamedTuple):
    """A small model and the adapter on it.

    Attributes:
        model_type: The `model_type` of its config.
        sizes: Values of the config in addition to `SIZES`.
        targets: Names of the adapted modules.
        fields: Further values of the adapter's config.
    """

    model_type: str
    sizes: dict[str, Any]
    targets: tuple[str, ...]
    fields: Mapping[str, Any] = MappingProxyType({})


SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,  # grouped matmuls need rows of 16 bytes
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "initializer_range": 0.3,
}
SHARED = {"moe_intermediate_size": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENT = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
OF_QWEN = ("q_proj", "gate_proj", "up_proj", "down_proj", "gate")
QWEN3 = {"num_experts": 3, "moe_intermediate_size": 4, "head_dim": 4}

FAMILIES = {
    "mixtral": Family("mixtral", {"num_local_experts": 3}, ("q_proj", "w1", "w2", "w3", "gate")),
    "qwen3-moe": Family("qwen3_moe", QWEN3, OF_QWEN),
    "qwen3-moe-rslora": Family("qwen3_moe", QWEN3, OF_QWEN[1:4], {"use_rslora": True}),
    "qwen2-moe": Family(
        "qwen2_moe", {"num_experts": 3, "moe_intermediate_size": 4, "shared_expert_intermediate_size": 4}, OF_QWEN
    ),
    "olmoe": Family("olmoe", {"num_experts": 3}, OF_QWEN),
    "deepseek-v3": Family(
        "deepseek_v3",
        {"n_routed_experts": 4, **SHARED, **LATENT},
        ("kv_b_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "phimoe": Family("phimoe", {"num_local_experts": 3}, ("q_proj", "w1", "w2", "w3", "gate")),
    "gpt-oss": Family(
        "gpt_oss",
        {"num_local_experts": 3, "head_dim": 4, "layer_types": ["sliding_attention", "full_attention"]},
        ("q_proj", "o_proj"),
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}
"""Directory -> what is in it. gpt-oss had fused experts in transformers 4, too."""


def main() -> None:
    """Create the environment and run this script in it, or write the adapters if it runs there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="directories to write; default: all")
    parser.add_argument("--write", action="store_true", help="write with the importable releases")
    given = parser.parse_args()
    if given.write:
        for name in given.families or FAMILIES:
            write(FAMILIES[name], GOLDEN / name)
        return
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", *RELEASES], check=True)
        subprocess.run([python, __file__, "--write", *given.families], check=True)


def write(family: Family, folder: Path) -> None:
    """Write the model, the adapter and the logits of a family."""
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family.model_type, **(SIZES | family.sizes))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model, "", 1)
    model.save_pretrained(folder / "base")
    (folder / "base" / "generation_config.json").unlink(missing_ok=True)
    ids = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(7))
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(family.targets), **family.fields)
    wrapped = peft.get_peft_model(model, config).eval()
    randomise(wrapped, "lora_", 2)
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    with torch.no_grad():
        logits = wrapped(input_ids=ids, use_cache=False).logits
    written_by = f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
    save_file({"input_ids": ids, "logits": logits.contiguous()}, folder / "expected.safetensors", {"by": written_by})
    print(folder.name, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()), "bytes")


def randomise(model: Any, part: str, seed: int) -> None:
    """Give each parameter whose name contains `part` random values; those that peft or a model begins at 0 as well."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if part in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


if __name__ == "__main__":
    sys.exit(main())
