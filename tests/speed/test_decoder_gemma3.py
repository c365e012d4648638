"""Gemma 3 runs fused forwards: layers with and without a sliding window, with different rotary tables."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lorakit import LoraConfig, core
from lorakit.speed import accelerate, pack_rows

from ..small_models import GROUPED, VOCABULARY

WINDOW = 8
TEXT: dict[str, Any] = GROUPED | {
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def text(**words: Any) -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT | words))


def with_images() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=TEXT,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_id=VOCABULARY - 1,
        boi_token_id=VOCABULARY - 2,
        eoi_token_id=VOCABULARY - 3,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def adapted(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Return adapters whose B is not zero, and weights with which tokens attend differently."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(12)
    core.attach(
        model.to(dtype),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj", "up_proj"], init_lora_weights=False),
    )
    return model


def ids_of(length: int, rows: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY - 3, (rows, length), generator=torch.Generator().manual_seed(length))


def step(model: Any, **batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(**batch, labels=batch["input_ids"], use_cache=False)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(ours: Tensor, theirs: Tensor, bound: float) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert float((ours - theirs).norm()) <= bound * float(theirs.norm()) + 1e-9


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return adapted({"text": text, "with images": with_images}[name](), dtype)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("length", [1, WINDOW, WINDOW + 1, 3 * WINDOW + 5])
@pytest.mark.parametrize("name", ["text", "with images"])
def test_value_and_gradients_within_and_beyond_the_window(
    name: str, length: int, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name).train(training)
    batch = {"input_ids": ids_of(length)}
    if name == "with images":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    theirs = step(model, **batch)
    acceleration = accelerate(model)
    assert "3 × Gemma3DecoderLayer: decoder layer" in str(acceleration)
    if name == "text":  # no attention of the model's own runs then
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    ours = step(model, **batch)
    close(ours[0], theirs[0], 2e-5)
    assert ours[1].keys() == theirs[1].keys() and any("lora_B" in key for key in ours[1])
    for key, gradient in theirs[1].items():
        close(ours[1][key], gradient, 5e-5)


def test_the_window_and_both_rotaries_act_in_these_models() -> None:
    """Otherwise the comparison above would pass whatever the fused forwards do with them."""
    ids = ids_of(3 * WINDOW)
    wanted = make("text").eval()(ids).logits.detach()
    for change in ("window", "rotary"):
        other = make("text").eval()
        if change == "window":
            other.config.sliding_window = 3 * WINDOW
            other.model.layers[0].self_attn.sliding_window = 3 * WINDOW
        else:
            other.model.rotary_emb.full_attention_inv_freq = other.model.rotary_emb.sliding_attention_inv_freq
        assert float((other(ids).logits.detach() - wanted).norm()) > 1e-3 * float(wanted.norm()), change


def test_an_image_shows_its_tokens_to_each_other() -> None:
    """Its mask shows more than earlier tokens, so those calls run the model's own attention."""
    model = make("with images").eval().requires_grad_(False)
    ids = ids_of(20)
    types = torch.zeros_like(ids)
    types[:, 4:8] = 1
    wanted, causal = (model(input_ids=ids, token_type_ids=one).logits for one in (types, torch.zeros_like(types)))
    assert float((wanted - causal).norm()) > 1e-3 * float(wanted.norm())
    accelerate(model)
    close(model(input_ids=ids, token_type_ids=types).logits, wanted, 2e-5)


def test_rows_laid_end_to_end_and_padded_rows() -> None:
    model = make("text").train()
    ids = ids_of(3 * WINDOW, rows=3)
    mask = torch.ones_like(ids)
    mask[0, 2 * WINDOW :] = mask[2, 3:] = 0
    theirs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    acceleration = accelerate(model)
    assert acceleration.packs
    close(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()], theirs, 2e-5)
    inputs, _ = pack_rows(ids, mask, ids)
    close(model(**inputs, use_cache=False).logits[0], theirs, 2e-5)


def test_in_bf16_it_is_as_near_to_the_truth_as_the_model_itself() -> None:
    exact, model = make("text", torch.float64), make("text", torch.bfloat16)
    with torch.no_grad():
        for wide, narrow in zip(exact.parameters(), model.parameters(), strict=True):
            wide.copy_(narrow)
    ids = ids_of(3 * WINDOW)
    truth, theirs = exact(ids).logits.detach(), model(ids).logits.detach().double()
    assert "decoder layer" in str(accelerate(model))
    ours = model(ids).logits.detach().double()
    assert float((ours - truth).norm()) <= 1.4 * float((theirs - truth).norm())


def test_a_layer_that_does_not_use_its_window_keeps_its_own_forward() -> None:
    """As in EXAONE 4: its layers without a window still store the model's window."""
    model = make("text")
    model.model.layers[1].self_attn.sliding_window = WINDOW
    twin = copy.deepcopy(model)
    acceleration = accelerate(model)
    assert "2 × Gemma3DecoderLayer: decoder layer" in str(acceleration)
    assert "1 × Gemma3Attention: unchanged" in str(acceleration)
    close(model(ids_of(30)).logits, twin(ids_of(30)).logits, 2e-5)
