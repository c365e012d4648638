"""Train adapters on a base in 4 bits (bitsandbytes nf4 with double quantisation), in the way named by the first argument.

    python quantised.py stand_in | mixin  FOLDER_FOR_FILES

After the first lines it is written as for peft, and is the same for both ways.
"""

import sys
from pathlib import Path

way, files = sys.argv[1], Path(sys.argv[2])

if way == "stand_in":
    from lorakit.peft import stand_in

    stand_in()
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
else:
    from lorakit.peft import LoraConfig, LoraTrainerMixin, PeftModel, get_peft_model, prepare_model_for_kbit_training

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

if way == "mixin":

    class HubTrainer(LoraTrainerMixin, Trainer):
        pass

else:
    HubTrainer = Trainer

sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=128, max_position_embeddings=64, **sizes)).save_pretrained(files / "base")
tokens = torch.randint(0, 128, (8, 10), generator=torch.Generator().manual_seed(1))
rows = [{"input_ids": row, "labels": row} for row in tokens]


def quantised():
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(files / "base", quantization_config=four, dtype=torch.float32)


def trainer(name, **more):
    model = prepare_model_for_kbit_training(quantised(), use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    common = {"output_dir": str(files / name), "max_steps": 4, "save_steps": 2, "logging_steps": 1, "report_to": []}
    common |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.02, "dataloader_pin_memory": False}
    return HubTrainer(model=model, args=TrainingArguments(**common | more), train_dataset=rows)


def wrapper(one):
    return one.lora_model if way == "mixin" else one.model


def numbers(one):
    return {name: value.detach().clone() for name, value in wrapper(one).named_parameters() if ".lora_" in name}


def packed(model):
    return {name: value.clone() for name, value in model.named_parameters() if value.dtype == torch.uint8}


whole = trainer("whole")
before = packed(wrapper(whole))
assert before
whole.train()
losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
assert losses[-1] < losses[0]
ended, after = numbers(whole), packed(wrapper(whole))
assert all(torch.equal(before[name], after[name]) for name in before)
checkpoint = files / "whole" / "checkpoint-2"
assert (checkpoint / "adapter_model.safetensors").stat().st_size < 100_000
assert not (checkpoint / "model.safetensors").exists()
print("ok: 4 bits: the adapter is trained and saved alone")

resumed = trainer("resumed")
resumed.train(resume_from_checkpoint=str(checkpoint))
again = numbers(resumed)
assert all(torch.equal(ended[name], again[name]) for name in ended)
print("ok: 4 bits: a resumed run ends with the same bits")

thrifty = trainer("thrifty", activation_checkpointing=True)
thrifty.train()
spared = numbers(thrifty)
assert all(torch.equal(ended[name], spared[name]) for name in ended)
print("ok: 4 bits: gradient checkpointing changes no bit")

whole.save_model(str(files / "saved"))
opened = PeftModel.from_pretrained(quantised(), files / "saved")
with torch.no_grad():
    inputs = {"input_ids": tokens[:2], "attention_mask": torch.ones_like(tokens[:2])}
    answer = wrapper(whole).eval()(**inputs).logits
    assert torch.equal(opened.eval()(**inputs).logits, answer)
    assert not torch.allclose(quantised().eval()(**inputs).logits, answer)
    longer = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (wrapper(whole), opened)]
assert torch.equal(longer[0], longer[1])
print("ok: 4 bits: what was saved answers as what was trained")

base = wrapper(whole).unload()
assert not base._hf_peft_config_loaded
base.save_pretrained(files / "plain")
print("ok: 4 bits: the base is given back and can be saved")
