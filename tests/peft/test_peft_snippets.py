"""Programs as people write them for `peft`, run with either library behind the name: only the import differs.

Each test is one program. What it must show is written after it, and holds for both libraries.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lorakit.peft

from .models import bert, ids, t5


@pytest.fixture(params=["lorakit", "peft"])
def peft(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The library that the program imports."""
    library = lorakit.peft if request.param == "lorakit" else pytest.importorskip("peft")
    with contextlib.ExitStack() as stack:
        if library is not lorakit.peft:  # its remarks are not under test
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        yield library


def test_causal_language_model_in_a_training_loop(peft: ModuleType, tiny_gpt2: Any, tmp_path: Path) -> None:
    LoraConfig, TaskType, get_peft_model = peft.LoraConfig, peft.TaskType, peft.get_peft_model

    peft_config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=8,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=["c_attn", "c_proj"],
        fan_in_fan_out=True,
    )
    model = get_peft_model(tiny_gpt2, peft_config)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    model.train()
    for _ in range(8):
        outputs = model(input_ids=ids(), attention_mask=torch.ones_like(ids()), labels=ids())
        loss = outputs.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    with torch.no_grad():
        answer = model.generate(
            input_ids=ids(1), attention_mask=torch.ones_like(ids(1)), max_new_tokens=4, pad_token_id=0
        )

    assert losses[-1] < losses[0] - 0.1
    assert answer.shape[1] > 7
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_classification(peft: ModuleType, tmp_path: Path) -> None:
    get_peft_model, LoraConfig, TaskType, PeftModel = (
        peft.get_peft_model,
        peft.LoraConfig,
        peft.TaskType,
        peft.PeftModel,
    )

    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=16, target_modules=["query", "value"], bias="none")
    model = get_peft_model(bert(num_labels=3), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    labels = torch.tensor([0, 1, 2])
    for _ in range(25):
        loss = model(input_ids=ids(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(num_labels=3), tmp_path)
    loaded.eval()
    predictions = loaded(input_ids=ids()).logits.argmax(-1)

    assert predictions.tolist() == [0, 1, 2]
    assert torch.equal(loaded.base_model.model.classifier.weight, model.base_model.model.classifier.weight)


def test_sequence_to_sequence(peft: ModuleType) -> None:
    peft_config = peft.LoraConfig(task_type=peft.TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32)
    model = peft.get_peft_model(t5(), peft_config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(10):
        outputs = model(input_ids=ids(), labels=ids(3, 4))
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    model.eval()
    out = model.generate(input_ids=ids(), max_new_tokens=5, num_beams=2)

    assert losses[-1] < losses[0]
    assert out.shape[0] == 3
    assert {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad} == {"q", "v"}


def test_two_adapters(peft: ModuleType, tiny_llama: Any, tmp_path: Path) -> None:
    LoraConfig = peft.LoraConfig
    model = peft.get_peft_model(
        tiny_llama, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), adapter_name="en"
    )
    model.add_adapter("ko", LoraConfig(target_modules=["q_proj", "v_proj"], r=4, task_type="CAUSAL_LM"))
    answers = {}
    for name in ("en", "ko"):
        model.set_adapter(name)
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for step in range(4):
            optimizer.zero_grad()
            model(input_ids=ids() + len(name) * step, labels=ids() + (100 if name == "ko" else 0)).loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            answers[name] = model(input_ids=ids()).logits
    with torch.no_grad():
        mixed = model(input_ids=ids(), adapter_names=["ko", "en", "__base__"]).logits
        with model.disable_adapter():
            base = model(input_ids=ids()).logits
    model.save_pretrained(tmp_path)
    model.delete_adapter("en")

    assert not torch.equal(answers["en"], answers["ko"])
    torch.testing.assert_close(mixed, torch.stack([answers["ko"][0], answers["en"][1], base[2]]), rtol=1e-4, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"en", "ko"}
    assert model.active_adapter == "ko"


def test_merge_and_save(peft: ModuleType, tiny_llama: Any, tmp_path: Path) -> None:
    import copy

    from transformers import AutoModelForCausalLM

    base = copy.deepcopy(tiny_llama)
    model = peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    model.eval()
    expected = model(input_ids=ids()).logits
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), torch_device="cpu")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")

    torch.testing.assert_close(again(ids()).logits, expected, rtol=1e-4, atol=1e-5)
    assert type(merged).__name__ == "LlamaForCausalLM"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # transformers 5 renames it
def test_continue_training(peft: ModuleType, tiny_llama: Any, tmp_path: Path) -> None:
    import copy

    base = copy.deepcopy(tiny_llama)
    peft.get_peft_model(tiny_llama, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(input_ids=ids(), labels=ids()).loss.backward()

    reached = [n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert reached
    assert all(".lora_B." in name for name in reached)  # B is zero, so nothing reaches A yet
