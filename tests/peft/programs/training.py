"""Train with Hugging Face's Trainer and TRL's SFTTrainer, in the way named by the first argument.

    python training.py install_as_peft | mixin  FOLDER_OF_A_MODEL  FOLDER_FOR_RUNS

Everything after the first lines is written as for peft, and is the same for both ways.
"""

import shutil
import sys
from pathlib import Path

way, base_folder, runs = sys.argv[1], sys.argv[2], Path(sys.argv[3])

if way == "install_as_peft":
    from lorakit.peft import install_as_peft

    install_as_peft()
    from peft import LoraConfig, PeftModel, get_peft_model
else:
    from lorakit.peft import LoraConfig, LoraTrainerMixin, PeftModel, get_peft_model

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

if way == "mixin":

    class HubTrainer(LoraTrainerMixin, Trainer):
        pass

    class TrlTrainer(LoraTrainerMixin, SFTTrainer):
        pass

else:
    HubTrainer, TrlTrainer = Trainer, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained(base_folder)
rows = [{"prompt": f"what is {i} and {i}?", "completion": f" it is {2 * i}."} for i in range(16)]
ids = [tokenizer(row["prompt"] + row["completion"])["input_ids"][:12] for row in rows]
tokens = [{"input_ids": row, "labels": row} for row in ids if len(row) == 12]
lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def settings(kind, name, **more):
    common = {"output_dir": str(runs / name), "max_steps": 6, "save_steps": 2, "logging_steps": 1, "seed": 1}
    common |= {"per_device_train_batch_size": 2, "learning_rate": 0.02, "report_to": [], "use_cpu": True}
    common |= {"disable_tqdm": True, "bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False}
    return kind(**common | more)


def base():
    return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)


def hub_trainer(name, **more):
    torch.manual_seed(0)
    model = get_peft_model(base(), LoraConfig(**lora, task_type="CAUSAL_LM"))
    args = settings(TrainingArguments, name, **more)
    return HubTrainer(model=model, args=args, train_dataset=tokens, eval_dataset=tokens[:4], processing_class=tokenizer)


def trl_trainer(name, **more):
    torch.manual_seed(0)
    return TrlTrainer(
        model=base(),
        args=settings(SFTConfig, name, max_length=32, **more),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tokenizer,
        peft_config=LoraConfig(**lora, task_type="CAUSAL_LM"),
    )


def wrapper(trainer):
    model = trainer.lora_model if way == "mixin" else trainer.model
    assert isinstance(model, PeftModel)
    return model


def numbers(trainer):
    return {name: value.detach().clone() for name, value in wrapper(trainer).named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def holds(trainer, folder):
    """Return whether the model has the tensors of a checkpoint's files."""
    own = numbers(trainer)
    for key, value in load_file(Path(folder) / "adapter_model.safetensors").items():
        head, _, leaf = key.rpartition(".")
        if not torch.equal(own[f"{head}.default.{leaf}"], value):
            return False
    return True


ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "lorakit.json"}
STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
untouched = {name: value.clone() for name, value in base().state_dict().items()}

for make in (hub_trainer, trl_trainer):
    label = "Trainer" if make is hub_trainer else "SFTTrainer"
    whole = make(f"{label}-whole")
    begun = numbers(whole)
    whole.train()
    ended = numbers(whole)
    moved = {name for name in ended if not torch.equal(begun[name], ended[name])}
    assert moved == {name for name in ended if ".lora_" in name}, "the adapter is trained, and it alone"
    checkpoint = runs / f"{label}-whole" / "checkpoint-4"
    found = {path.name for path in checkpoint.iterdir()}
    assert found - {"README.md"} == ADAPTER | STATE | TOKENIZER, found
    print(f"ok: {label}: checkpoints hold the adapter alone")

    resumed = make(f"{label}-resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(ended, numbers(resumed))
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    print(f"ok: {label}: a resumed run ends with the same bits")

    best = make(
        f"{label}-best",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst by loss, so that it is not the last
    )
    best.train()
    assert not best.state.best_model_checkpoint.endswith("-6")
    assert holds(best, best.state.best_model_checkpoint)
    assert not holds(best, runs / f"{label}-best" / "checkpoint-6")
    print(f"ok: {label}: the best checkpoint is loaded at the end")

    for reentrant in (False, True):
        kwargs = {"use_reentrant": reentrant}
        thrifty = make(f"{label}-thrifty", activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
        thrifty.train()
        assert same(ended, numbers(thrifty)), reentrant
    print(f"ok: {label}: gradient checkpointing changes no bit")

    whole.save_model(str(runs / f"{label}-saved"))
    again = PeftModel.from_pretrained(base(), runs / f"{label}-saved")
    prompt = tokenizer("what is 7 and 7?", return_tensors="pt")
    models = [wrapper(whole).eval(), again.eval(), base().eval()]
    logits = [model(**prompt).logits for model in models]
    answers = [model.generate(**prompt, max_new_tokens=8, do_sample=False) for model in models]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(answers[0], answers[1])
    assert not torch.allclose(logits[0], logits[2])
    with models[0].disable_adapter():
        assert torch.equal(models[0](**prompt).logits, logits[2])
        assert torch.equal(models[0].generate(**prompt, max_new_tokens=8, do_sample=False), answers[2])
    print(f"ok: {label}: what was saved generates as what was trained")

    plain = wrapper(whole).unload().state_dict()
    assert same(untouched, plain)
    print(f"ok: {label}: the base is what it was")
    shutil.rmtree(runs / f"{label}-whole")
