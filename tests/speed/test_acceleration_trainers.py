"""Third-party training loops with an accelerated model: equal losses, and the files they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from lorakit import LoraConfig, LoraTrainerMixin, core
from lorakit.speed import accelerate

from ..small_models import llama

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft calls it


class LoraTrainer(LoraTrainerMixin, Trainer):
    pass


def tiny(beside_peft: bool) -> Any:
    torch.manual_seed(0)
    model = llama()
    if beside_peft:
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=1)
    return model


def losses(model: Any, kind: Any, folder: Path) -> list[float]:
    tokens = torch.randint(0, 61, (12, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row.masked_fill(row < 10, -100)} for row in tokens]
    common: dict[str, Any] = {"output_dir": str(folder), "max_steps": 3, "logging_steps": 1, "report_to": []}
    common |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.01, "dataloader_pin_memory": False}
    common |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "eval_strategy": "steps"}
    args = TrainingArguments(**common, eval_steps=3, save_steps=3)
    trainer = kind(model=model, args=args, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    assert (folder / "checkpoint-3" / "adapter_model.safetensors").exists()
    return [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history[:4]]


@pytest.mark.costly
@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("beside_peft", [True, False])
def test_the_trainer_has_the_same_losses(beside_peft: bool, logits: bool, tmp_path: Path) -> None:
    kind = Trainer if beside_peft else LoraTrainer
    theirs = losses(tiny(beside_peft), kind, tmp_path / "plain")
    model = tiny(beside_peft)
    accelerate(model, logits=logits)
    assert losses(model, kind, tmp_path / "fast") == pytest.approx(theirs, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_reads_logits(tiny_tokenizer: Any, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    found = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = llama(vocab_size=512)
        words = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, words)
        if fast:
            accelerate(model)
        args = trl.SFTConfig(
            output_dir=str(tmp_path / str(fast)), max_steps=2, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
            disable_tqdm=True, per_device_train_batch_size=2, dataloader_pin_memory=False, gradient_checkpointing=False,
        )  # fmt: skip
        rows = Dataset.from_list([{"text": "The quick brown fox jumps over the lazy dog. " * n} for n in (1, 2, 1, 2)])
        trainer = trl.SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer)
        trainer.train()
        log = trainer.state.log_history[:2]
        found.append([(entry["loss"], entry.get("mean_token_accuracy")) for entry in log])
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
