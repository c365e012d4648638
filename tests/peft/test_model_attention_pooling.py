"""`all-linear` on a vision tower with an nn.MultiheadAttention: the same tensors as peft, and files that both read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorakit.peft as ours
from lorakit import core
from lorakit.hub.shapes import shape_of_module
from lorakit.plan import count

from ..speed.architectures import build, inputs, small_settings
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("t5gemma2", "T5Gemma2ForSequenceClassification"),
        pytest.param("gemma3", "Gemma3ForConditionalGeneration", marks=pytest.mark.slow),
        pytest.param("phi4_multimodal", "Phi4MultimodalForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_models_with_such_a_tower_are_adapted_and_read_as_in_peft(kind: str, name: str, tmp_path: Path) -> None:
    """The outputs are compared in fp64; the classification head is that of the file."""
    task = {"task_type": "SEQ_CLS"} if name.endswith("Classification") else {}
    settings = small_settings(kind, name)

    def adapted(library: Any) -> Any:
        model = library.get_peft_model(build(kind, name, settings), library.LoraConfig(**FIELDS, **task))
        randomise(model)
        return model.eval()

    model, expected = adapted(ours), adapted(theirs)
    assert trained(model) == trained(expected)
    assert any(".attention.out_proj.lora_A." in path for path in trained(model))
    expected.save_pretrained(tmp_path)
    read = build(kind, name, settings)
    core.load_adapter(read, tmp_path)
    again = ours.PeftModel.from_pretrained(build(kind, name, settings), tmp_path)
    given = inputs(read, 9)
    if task:
        (head,) = (path for path in load_file(tmp_path / "adapter_model.safetensors") if path.endswith("out_proj.bias"))
        saved = load_file(tmp_path / "adapter_model.safetensors")[head]
        assert torch.equal(dict(read.named_parameters())["score.modules_to_save.default.out_proj.bias"], saved)
    wanted = expected.double()(**given).logits
    for found in (read, again.eval(), model):
        torch.testing.assert_close(found.double()(**given).logits, wanted, rtol=1e-5, atol=1e-5)
