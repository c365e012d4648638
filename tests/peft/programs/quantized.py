"""Train adapters on a 4-bit base (bitsandbytes nf4, double quantization) with the API that the first argument names.

    python quantized.py install_as_peft | mixin  FOLDER_OF_A_TOKENIZER  FOLDER_FOR_FILES

After the first lines it is written as for peft, and is the same for both ways.
"""

import sys
from pathlib import Path

way, tokenizer_folder, files = sys.argv[1], sys.argv[2], Path(sys.argv[3])

if way == "install_as_peft":
    from lorakit.peft import install_as_peft

    install_as_peft()
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
else:
    from lorakit.peft import LoraConfig, LoraTrainerMixin, PeftModel, get_peft_model, prepare_model_for_kbit_training

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

if way == "mixin":

    class TrlTrainer(LoraTrainerMixin, SFTTrainer):
        pass

    class HubTrainer(LoraTrainerMixin, Trainer):
        pass

else:
    HubTrainer, TrlTrainer = Trainer, SFTTrainer

sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(vocab_size=512, max_position_embeddings=64, **sizes)).save_pretrained(files / "base")
tokens = torch.randint(0, 512, (8, 10), generator=torch.Generator().manual_seed(1))
rows = [{"input_ids": row, "labels": row} for row in tokens]


def quantized():
    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(files / "base", quantization_config=four, dtype=torch.float32)


def trainer(name, **more):
    model = prepare_model_for_kbit_training(quantized(), use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    common = {"output_dir": str(files / name), "max_steps": 4, "save_steps": 2, "logging_steps": 1, "report_to": []}
    common |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.02, "dataloader_pin_memory": False}
    return HubTrainer(model=model, args=TrainingArguments(**common | more), train_dataset=rows)


def trl_trainer(name):
    torch.manual_seed(0)
    common = {"output_dir": str(files / name), "max_steps": 4, "save_steps": 2, "logging_steps": 1, "report_to": []}
    common |= {"use_cpu": True, "disable_tqdm": True, "learning_rate": 0.02, "per_device_train_batch_size": 2}
    return TrlTrainer(
        model=quantized(),
        args=SFTConfig(**common, bf16=False, max_length=32, activation_checkpointing=False),
        train_dataset=Dataset.from_list([{"prompt": f"what is {i}?", "completion": f" it is {i}"} for i in range(16)]),
        processing_class=AutoTokenizer.from_pretrained(tokenizer_folder),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )


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

conversation = trl_trainer("conversation")
conversation.train()
continued = trl_trainer("continued")
continued.train(resume_from_checkpoint=str(files / "conversation" / "checkpoint-2"))
one, other = numbers(conversation), numbers(continued)
assert all(torch.equal(one[name], other[name]) for name in one)
assert not (files / "conversation" / "checkpoint-2" / "model.safetensors").exists()
print("ok: 4 bits: SFTTrainer trains, saves and resumes to the same bits")

whole.save_model(str(files / "saved"))
opened = PeftModel.from_pretrained(quantized(), files / "saved")
with torch.no_grad():
    inputs = {"input_ids": tokens[:2], "attention_mask": torch.ones_like(tokens[:2])}
    answer = wrapper(whole).eval()(**inputs).logits
    assert torch.equal(opened.eval()(**inputs).logits, answer)
    assert not torch.allclose(quantized().eval()(**inputs).logits, answer)
    longer = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (wrapper(whole), opened)]
assert torch.equal(longer[0], longer[1])
print("ok: 4 bits: what was saved answers as what was trained")

base = wrapper(whole).unload()
assert not base._hf_peft_config_loaded
base.save_pretrained(files / "plain")
print("ok: 4 bits: the base is given back and can be saved")
