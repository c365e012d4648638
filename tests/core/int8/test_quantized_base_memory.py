"""Memory of a mapped file while its weights are quantized for int8 matmuls."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.allocator import PAGEMAP
from lorakit.core.int8.quantized_base import int8_scales, quantize_base, quantize_with_scales
from lorakit.core.quantization.int8_linear import Int8Linear

SMAPS = Path("/proc/self/smaps")
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
BLOCK = 4 * (4 * 512 * 512 + 3 * 512 * 1024)
"""Bytes of the linear layers of one block, in fp32."""

pytestmark = pytest.mark.skipif(
    not (SMAPS.is_file() and Path(PAGEMAP).is_file()), reason="only Linux lists the pages of a process"
)


@pytest.fixture
def mapped(tmp_path: Path) -> Any:
    """A model whose weights are in a mapped file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path).requires_grad_(False).eval()
    if not size_of(tmp_path, "Size"):
        pytest.skip("this release of transformers does not map the file")
    return model


def size_of(folder: Path, what: str = "Rss") -> int:
    """Return the size in bytes of the mappings of a folder's files: "Rss" in memory, "Size" in total."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text(), flags=re.MULTILINE)
    own = [part for part in parts if str(folder) in part]
    return sum(1024 * int(found) for part in own for found in re.findall(rf"^{what}: *(\d+) kB", part, re.MULTILINE))


def batch(seed: int = 0) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(seed))}


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_less_than_a_block_of_the_originals_is_in_memory_at_any_time(mapped: Any, tmp_path: Path) -> None:
    seen = []
    for layer in mapped.model.layers:  # the norms keep their dtype
        layer.post_attention_layernorm.register_forward_hook(lambda *_: seen.append(size_of(tmp_path)))
    batches = [batch(seed) for seed in range(3)]
    report = quantize_base(mapped, batches, keep=True)
    seen.append(size_of(tmp_path))
    assert len(report.paths) == 21 and len(seen) == 10 and size_of(tmp_path, "Size") > 3 * BLOCK
    assert max(seen) < BLOCK, seen
    scales = int8_scales(mapped)
    report.restore()
    assert bits(mapped) and size_of(tmp_path) > 3 * BLOCK  # `bits` reads all weights
    quantize_with_scales(mapped, scales, keep=True)
    assert size_of(tmp_path) < BLOCK


def test_a_failed_calibration_leaves_the_weights_in_their_file(mapped: Any) -> None:
    before = bits(mapped)
    with pytest.raises(IndexError):
        quantize_base(mapped, [batch(), {"input_ids": torch.full((1, 3), 10_000)}])
    assert bits(mapped) == before
    assert not any(isinstance(module, Int8Linear) for module in mapped.modules())


def test_weights_that_were_modified_in_memory_are_quantized(mapped: Any) -> None:
    for layer in mapped.model.layers:
        layer.mlp.up_proj.weight[5, 7] = 3.0
        layer.self_attn.q_proj.weight.mul_(1.5)
        layer.input_layernorm.weight.add_(0.5)
    other = copy.deepcopy(mapped)  # not in a mapped file
    for model in (mapped, other):
        quantize_base(model, [batch()])
    assert bits(mapped) == bits(other)
