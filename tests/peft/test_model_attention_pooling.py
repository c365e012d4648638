"""`all-linear` on a vision tower with an nn.MultiheadAttention: the same tensors as peft, and files that both read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorakit.peft as ours
from lorakit.hub.shapes import shape_of_module
from lorakit.plan import count

from .experts import quiet, randomise, trained

theirs = pytest.importorskip("peft")
FIELDS: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"}


def tower() -> Any:
    """Return a small SigLIP vision model, the tower of Gemma 3 and others."""
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).eval()


def pooled(model: Any) -> Tensor:
    """Return the output of the attention pooling for one image."""
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found: Tensor = model(pixel_values=image).pooler_output
    return found


def wrapped(library: Any) -> Any:
    """Return a tower, wrapped by a library, with random values in its adapter."""
    with quiet():
        model = library.get_peft_model(tower(), library.LoraConfig(**FIELDS))
    randomise(model)
    return model.eval()


def test_all_linear_trains_the_tensors_of_peft() -> None:
    model, expected = wrapped(ours), wrapped(theirs)
    assert trained(model) == trained(expected)
    assert any(".attention.out_proj.lora_A." in name for name in trained(model))
    planned = count(shape_of_module(tower(), "tower", "test"), ours.LoraConfig(**FIELDS))
    assert planned.trainable == sum(torch.Size(shape).numel() for shape in trained(expected).values())


def test_the_output_projection_is_used_where_peft_ignores_it(tmp_path: Path) -> None:
    model, other = wrapped(ours), wrapped(theirs)
    found, ignored = pooled(model), pooled(other)
    assert not torch.allclose(found, ignored, atol=1e-4)
    other.merge_adapter()
    torch.testing.assert_close(found, pooled(other), rtol=1e-4, atol=1e-5)  # a merge of peft includes it
    other.unmerge_adapter()
    found.sum().backward()
    name = next(name for name in trained(model) if ".attention.out_proj.lora_B." in name)
    assert model.get_parameter(name).grad is not None
    with quiet():
        model.save_pretrained(tmp_path / "ours")
        other.save_pretrained(tmp_path / "theirs")
        read = theirs.PeftModel.from_pretrained(tower(), tmp_path / "ours").eval()
        again = ours.PeftModel.from_pretrained(tower(), tmp_path / "theirs").eval()
    torch.testing.assert_close(pooled(read), ignored)
    torch.testing.assert_close(pooled(again), found)
