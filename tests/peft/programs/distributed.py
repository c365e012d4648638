"""Train in two processes (DDP over gloo), in the way named by the first argument; started by torch.distributed.run.

python -m torch.distributed.run --standalone --nproc-per-node 2 distributed.py install_as_peft | mixin  FOLDER_OF_A_MODEL  FOLDER_FOR_RUNS
"""

import sys
from pathlib import Path

way, base_folder, runs = sys.argv[1], sys.argv[2], Path(sys.argv[3])

if way == "install_as_peft":
    from lorakit.peft import install_as_peft

    install_as_peft()
    from peft import LoraConfig, get_peft_model
else:
    from lorakit.peft import LoraConfig, LoraTrainerMixin, get_peft_model

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

if way == "mixin":

    class HubTrainer(LoraTrainerMixin, Trainer):
        pass

else:
    HubTrainer = Trainer


def trainer(name):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    common = {"output_dir": str(runs / name), "max_steps": 4, "save_steps": 2, "logging_steps": 1, "report_to": []}
    common |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.05, "per_device_train_batch_size": 2}
    tokens = torch.randint(0, 500, (16, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    args = TrainingArguments(**common, dataloader_pin_memory=False)
    return HubTrainer(model=model, args=args, train_dataset=rows)


def numbers(one):
    return dict((one.lora_model if way == "mixin" else one.model).named_parameters())


whole = trainer("whole")
assert whole.args.world_size == 2
whole.train()
checkpoint = runs / "whole" / "checkpoint-2"
assert (checkpoint / "adapter_model.safetensors").exists()
assert not (checkpoint / "model.safetensors").exists()
resumed = trainer("resumed")
resumed.train(resume_from_checkpoint=str(checkpoint))
ended, again = numbers(whole), numbers(resumed)
assert all(torch.equal(ended[name], again[name]) for name in ended)
if whole.args.process_index == 0:
    print("ok: two processes: the adapter alone is saved; a resumed run ends with the same bits")
torch.distributed.destroy_process_group()
