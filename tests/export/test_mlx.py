"""Adapters for mlx-lm: mlx-lm itself gives the log-probabilities of transformers with peft."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests import small_models
from tests.export.bases import FAMILIES, ROPE, random, saved
from tests.export.specimens import with_random_adapter
from tests.gguf_models import write_base

from lorakit import core, hub
from lorakit.config import CONFIG_FILE
from lorakit.errors import AdapterError, AdapterFileError, UsageError
from lorakit.export.conditions import unread_rope
from lorakit.export.facts import base_facts
from lorakit.export.formats import export
from lorakit.export.mlx import MLX_WEIGHTS
from lorakit.export.request import ExportRequest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # by peft
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

BOUND = 1e-3
"""Allowed difference of a log-probability, in nats; 2e-4 was measured with SmolLM2, less with small models."""

SCALED = ROPE | {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SCALED_PER_TYPE = {"full_attention": ROPE | {"rope_type": "linear", "factor": 4.0}, "sliding_attention": ROPE}

# mlx-lm rounds the square root of Gemma 3's hidden size to bf16, which is exact for 64
FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama 3": ("llama", {"rope_parameters": SCALED}),
    "gemma2": ("gemma2", {"hidden_size": 64}),
    "gemma3_text": (
        "gemma3_text",
        {"hidden_size": 64, "num_hidden_layers": 7, "sliding_window": 4, "rope_parameters": SCALED_PER_TYPE},
    ),
}
"""Name of a case -> its family, and fields of the config."""


def model_of(case: str) -> Any:
    family, fields = FIELDS[case]
    return random(family, 0.2, **fields)


def trained(base: Any, folder: Path, std: float = 0.3, **settings: Any) -> Any:
    """Return a model of PEFT with a random adapter on a base, after saving the adapter."""
    return with_random_adapter(base, folder, std, **settings)


def written(base: Path, adapter: Path, output: Path, **fields: Any) -> Path:
    request = ExportRequest(core.common_form(adapter), "notes", base=hub.resolve(base), **fields)
    return export("mlx", request, output)[1]


def in_mlx(base: Path, adapter: Path | None, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities (tokens, vocabulary) that mlx-lm computes."""
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    if adapter is not None:
        load_adapters(model, str(adapter))
        model.eval()
    logits = model(mx.array([ids])).astype(mx.float32)
    return torch.tensor(logits[0].tolist()).log_softmax(-1)


def difference(model: Any, base: Path, adapter: Path | None) -> float:
    """Return the largest difference of a log-probability between a model of PEFT and mlx-lm."""
    ids = torch.randint(0, model.config.vocab_size, (24,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    theirs = in_mlx(base, adapter, ids.tolist())
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


def worst(base: Path, adapter: Path, model: Any, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> float:
    """Return the difference after a change of the exported config and tensors; infinity if mlx-lm rejects them."""
    config, tensors = json.loads((adapter / CONFIG_FILE).read_text()), load_file(adapter / MLX_WEIGHTS)
    change(config, tensors)
    (adapter / CONFIG_FILE).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter / MLX_WEIGHTS)
    try:
        return difference(model, base, adapter)
    except ValueError as error:
        assert "incompatible tensors" in str(error)
        return math.inf


@pytest.mark.parametrize("family", FIELDS)
def test_mlx_lm_computes_the_same(family: str, tmp_path: Path) -> None:
    base = model_of(family)
    folder = saved(base, tmp_path / "base")
    model = trained(base, tmp_path / "adapter", std=0.1, use_rslora=True, rank_pattern={"1.*_proj": 6})
    exported = written(folder, tmp_path / "adapter", tmp_path / "out")
    assert difference(model, folder, exported) < BOUND
    with model.disable_adapter():
        assert difference(model, folder, exported) > 100 * BOUND


def test_untied_embeddings_and_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = small_models.llama(tie_word_embeddings=False)
    folder = saved(base, tmp_path / "base")
    targets = ["embed_tokens", "lm_head", "down_proj"]
    model = trained(base, tmp_path / "adapter", target_modules=targets, layers_to_transform=None)
    exported = written(folder, tmp_path / "adapter", tmp_path / "out")
    assert difference(model, folder, exported) < BOUND


def _untransposed(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors.update({name: tensor.T for name, tensor in tensors.items()})


def _with_scale(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["lora_parameters"]["scale"] = 3.0  # lora_alpha / r


def _from_the_start(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["num_layers"] = 1


def _other_layer(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        tensors[name.replace(".1.", ".2.")] = tensors.pop(name)


@pytest.mark.parametrize("change", [_untransposed, _with_scale, _from_the_start, _other_layer])
def test_mutants_exceed_the_bound(change: Callable[..., None], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = small_models.llama(num_hidden_layers=4)
    folder = saved(base, tmp_path / "base")
    settings = {"r": 32, "lora_alpha": 96, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    model = trained(base, tmp_path / "adapter", **settings)  # all sizes are 32, so that no shape reveals the mutant
    exported = written(folder, tmp_path / "adapter", tmp_path / "out")
    assert worst(folder, exported, model, lambda config, tensors: None) < BOUND
    assert worst(folder, exported, model, change) > 10 * BOUND


def test_layers_are_counted_from_the_end(tmp_path: Path) -> None:
    base = small_models.llama(num_hidden_layers=4)
    folder = saved(base, tmp_path / "base")
    trained(base, tmp_path / "adapter", layers_to_transform=[1, 3], target_modules=["q_proj", "up_proj"])
    config = json.loads((written(folder, tmp_path / "adapter", tmp_path / "out") / CONFIG_FILE).read_text())
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": 3,
        "lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj", "self_attn.q_proj"]},
    }


def test_sites_that_mlx_lm_cannot_adapt(tmp_path: Path) -> None:
    llama = saved(small_models.llama(tie_word_embeddings=True), tmp_path / "llama")
    wider = saved(small_models.llama(hidden_size=64), tmp_path / "wider")
    trained(small_models.llama(tie_word_embeddings=True), tmp_path / "head", target_modules=["embed_tokens"])
    trained(small_models.llama(num_hidden_layers=3), tmp_path / "deep")
    trained(small_models.qwen2(), tmp_path / "fits")
    for adapter, base, site in [
        ("head", llama, "model.embed_tokens"),
        ("deep", llama, "model.layers.2.mlp.down_proj"),
        ("fits", wider, "model.layers.0.mlp.down_proj"),
    ]:
        with pytest.raises(AdapterError) as caught:
            written(base, tmp_path / adapter, tmp_path / "out")
        assert caught.value.what == site
        assert not (tmp_path / "out").exists()


def test_a_file_with_some_of_its_sites(tmp_path: Path) -> None:
    base = random("llama", 0.1)
    folder = saved(base, tmp_path / "base")
    trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(weights).items() if "layers.1." not in name}, weights)
    with pytest.raises(AdapterFileError) as caught:
        written(folder, tmp_path / "adapter", tmp_path / "out")
    assert "1 of 2 sites" in str(caught.value.what) and not (tmp_path / "out").exists()


def test_what_mlx_lm_does_not_have(tmp_path: Path) -> None:
    sizes = small_models.GROUPED | {"num_labels": 3, "pad_token_id": 0}
    base = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes))
    folder = saved(base, tmp_path / "base")
    trained(base, tmp_path / "adapter", target_modules=["q_proj", "score"], task_type=None)
    with pytest.raises(AdapterError) as caught:
        written(folder, tmp_path / "adapter", tmp_path / "out")
    assert caught.value.what == "score" and not (tmp_path / "out").exists()


def test_mlx_lm_reads_no_gguf_files(tmp_path: Path) -> None:
    base = random("llama", 0.1)
    file = write_base(base, tmp_path / "base.gguf")
    trained(base, tmp_path / "adapter")
    with pytest.raises(UsageError) as caught:
        written(file, tmp_path / "adapter", tmp_path / "out")
    assert caught.value.field == "served_base" and not (tmp_path / "out").exists()
    assert written(file, tmp_path / "adapter", tmp_path / "out", served_base="owner/base").is_dir()


def test_architectures_that_were_not_tested(tmp_path: Path) -> None:
    base = small_models.olmo2()
    folder = saved(base, tmp_path / "base")
    model = trained(base, tmp_path / "adapter")
    with pytest.raises(UsageError) as caught:
        written(folder, tmp_path / "adapter", tmp_path / "out")
    assert caught.value.field == "untested_architecture"
    exported = written(folder, tmp_path / "adapter", tmp_path / "out", allow_untested=True)
    assert difference(model, folder, exported) < BOUND


@pytest.mark.parametrize("family", ["llama", "llama 3", "gemma3_text"])
def test_mlx_lm_needs_the_earlier_keys_of_rope_parameters(family: str, tmp_path: Path) -> None:
    base = model_of(family)
    folder = saved(base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    left = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling")}
    assert difference(base, folder, None) < BOUND
    assert not unread_rope(base_facts(folder))
    (folder / "config.json").write_text(json.dumps(left))
    assert difference(base, folder, None) > 100 * BOUND
    assert unread_rope(base_facts(folder))


@pytest.mark.costly
def test_smollm2(tmp_path: Path) -> None:
    base = hub.load_model("smollm2", "float32")
    folder = saved(base, tmp_path / "base")
    torch.manual_seed(1)
    model = trained(base, tmp_path / "adapter", std=0.05, r=8)
    exported = written(folder, tmp_path / "adapter", tmp_path / "out")
    assert difference(model, folder, exported) < BOUND
    assert difference(model, folder, None) > 100 * BOUND
