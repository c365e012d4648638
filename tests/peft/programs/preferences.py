"""TRL's other trainers than SFTTrainer, unmodified: train, save an adapter, resume bit for bit.

    python preferences.py FOLDER_OF_A_MODEL  FOLDER_FOR_RUNS

After the first two lines this is written as for peft.
"""

from lorakit.peft import install_as_peft

install_as_peft()

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

base_folder, runs = sys.argv[1], Path(sys.argv[2])
pairs = [{"prompt": f"what is {i}?", "chosen": f" it is {i}", "rejected": f" not {i}"} for i in range(8)]
judged = [{"prompt": f"what is {i}?", "completion": f" it is {i}", "label": bool(i % 2)} for i in range(8)]
prompts = [{"prompt": f"what is {i}?"} for i in range(8)]


def reward(completions, **_):
    return [float(len(text)) for text in completions]


TRAINERS = {
    DPOTrainer: (DPOConfig, pairs, {"max_length": 32}, {}),
    KTOTrainer: (KTOConfig, judged, {"max_length": 32}, {}),
    RewardTrainer: (RewardConfig, pairs, {"max_length": 32}, {}),
    GRPOTrainer: (
        GRPOConfig,
        prompts,
        {"num_generations": 2, "max_completion_length": 6, "beta": 0.1},
        {"reward_funcs": reward},
    ),
}


def trainer(kind, name):
    config, rows, own, more = TRAINERS[kind]
    scores = kind is RewardTrainer
    source = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model = source.from_pretrained(base_folder, dtype=torch.float32, **({"num_labels": 1} if scores else {}))
    common = {"output_dir": str(runs / name), "max_steps": 4, "save_steps": 2, "logging_steps": 1, "report_to": []}
    common |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.02, "per_device_train_batch_size": 2}
    task = "SEQ_CLS" if scores else "CAUSAL_LM"
    torch.manual_seed(0)
    return kind(
        model=model,
        args=config(**common, bf16=False, dataloader_pin_memory=False, **own),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task),
        **more,
    )


for kind in TRAINERS:
    whole = trainer(kind, kind.__name__)
    begun = {name: value.detach().clone() for name, value in whole.model.named_parameters()}
    whole.train()
    assert isinstance(whole.model, PeftModel)
    ended = dict(whole.model.named_parameters())
    moved = {name for name in ended if not torch.equal(begun[name], ended[name])}
    assert moved
    assert all(".lora_" in name or ".modules_to_save." in name for name in moved), moved
    checkpoint = runs / kind.__name__ / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    resumed = trainer(kind, f"{kind.__name__}-resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    again = dict(resumed.model.named_parameters())
    assert all(torch.equal(ended[name], again[name]) for name in ended)
    print(f"ok: {kind.__name__}: the adapter alone is trained and saved; a resumed run ends with the same bits")
