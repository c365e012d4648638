"""Configs with the keys of rope parameters from before transformers 5: transformers reads the same from both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests import small_models

from lorakit import hub
from lorakit.hub.model_files import with_earlier_rope

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 2e6, "factor": 8.0}
LOCAL = {"rope_type": "default", "rope_theta": 2e4}
PER_TYPE = {"full_attention": LINEAR, "sliding_attention": LOCAL}

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (transformers.LlamaConfig(rope_parameters=LOCAL), {"rope_theta": 2e4}),
    "scaled": (transformers.LlamaConfig(rope_parameters=LLAMA3), {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "partial": (transformers.StableLmConfig(), {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}),
    "other names": (transformers.GPTNeoXConfig(), {"rotary_emb_base": 10000.0, "rotary_pct": 0.25}),
    "per type": (
        transformers.Gemma3TextConfig(rope_parameters=PER_TYPE),
        {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},
    ),
    "per type, one value": (transformers.Olmo3Config(), {"rope_theta": 500000.0}),
    "per type, unknown": (transformers.ModernBertConfig(), {}),
    "none": (transformers.GPT2Config(), {}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    config, added = CONFIGS[name]
    config.save_pretrained(tmp_path)
    before, path = type(config).from_pretrained(tmp_path).to_dict(), tmp_path / "config.json"
    written = json.loads(path.read_text())
    earlier = with_earlier_rope(written)
    assert {key: value for key, value in earlier.items() if key not in written} == added
    assert earlier.items() >= written.items()
    assert with_earlier_rope(earlier) == earlier
    path.write_text(json.dumps(earlier))
    assert type(config).from_pretrained(tmp_path).to_dict() == before


def test_configs_inside_others() -> None:
    values = with_earlier_rope({"model_type": "gemma3", "text_config": transformers.Gemma3TextConfig().to_dict()})
    assert values["text_config"]["rope_local_base_freq"] == 10000.0
    assert "rope_theta" not in values


def test_a_saved_model_is_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_models.llama(rope_parameters=LLAMA3).eval()
    hub.save_model(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["rope_theta"] == 5e5
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    ids = torch.arange(24)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
