"""gpt-oss files in MXFP4, which are dequantized while they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit import core, hub
from lorakit.config import LoraConfig
from lorakit.errors import ModelError

from .. import packed_models

IDS = torch.tensor([[5, 17, 20, 3, 9, 44]])
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the fp4 codes 0 to 7 (e2m1); the codes 8 to 15 are their negatives."""


@pytest.fixture
def dense() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads)).eval()


@pytest.fixture
def mxfp4_directory(dense: Any, tmp_path: Path) -> Path:
    """A directory in the layout of gpt-oss; `dense` gets the dequantized weights."""
    folder = tmp_path / "gpt-oss"
    dense.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    for path, module in dense.named_modules():
        for name in ("gate_up_proj", "down_proj"):
            if name in module._parameters:
                weight = module._parameters[name]
                experts, columns, rows = weight.shape
                codes = torch.randint(0, 16, (experts, rows, columns))
                scales = torch.randint(121, 125, (experts, rows, columns // 32))
                table = torch.tensor([*VALUES, *[-value for value in VALUES]])
                groups = torch.arange(columns) // 32
                weight.data = (table[codes] * torch.exp2(scales[..., groups] - 127.0)).mT.contiguous()
                blocks = (codes[..., ::2] | codes[..., 1::2] << 4).unflatten(-1, (-1, 16))
                del tensors[f"{path}.{name}"]
                tensors |= {f"{path}.{name}_blocks": blocks.byte(), f"{path}.{name}_scales": scales.byte()}
    return packed_models.write(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def trained(model: Any) -> list[Tensor]:
    """Attach an adapter to the attention and the experts, and return its gradients after one backward pass."""
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    words: dict[str, Any] = {"target_modules": ["q_proj", "o_proj"], "target_parameters": experts}
    core.attach(model, LoraConfig(r=2, init_lora_weights=False, **words), seed=3)
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad for _, p in core.trainable_parameters(model))]


def test_mxfp4_files_are_dequantized_trained_saved_and_merged(
    mxfp4_directory: Path, dense: Any, tmp_path: Path
) -> None:
    model = hub.load_model(mxfp4_directory, "float32")
    experts: Any = model.model.layers[0].mlp.experts
    assert torch.equal(experts.gate_up_proj, dense.model.layers[0].mlp.experts.gate_up_proj)
    assert torch.equal(experts.down_proj, dense.model.layers[0].mlp.experts.down_proj)
    for one, other in zip(trained(model), trained(dense), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    core.save_adapter(model, tmp_path / "adapter")
    again = hub.load_model(mxfp4_directory, "float32")
    core.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        wanted = model.eval()(IDS).logits
        assert torch.equal(again(IDS).logits, wanted)
        core.merge(again)
        torch.testing.assert_close(again(IDS).logits, wanted, rtol=1e-4, atol=1e-5)


def test_missing_mxfp4_scales_are_rejected(mxfp4_directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(mxfp4_directory / "model.safetensors")
    del tensors["model.layers.0.mlp.experts.down_proj_scales"]
    save_file(tensors, mxfp4_directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError):
        hub.load_model(mxfp4_directory, "float32")
