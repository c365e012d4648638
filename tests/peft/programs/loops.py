"""Train with Trainer and SFTTrainer in one process or two, replicated or sharded; started by torch.distributed.run.

python loops.py install_as_peft | mixin  one | ddp | fsdp2 | fsdp2_parts | fsdp1_parts  FOLDER_OF_A_MODEL  FOLDER_FOR_RUNS

accelerate shards only on accelerators, so the program tells it that the two processes on this CPU have them. FSDP 1 must
be wrapped here for the same reason.
"""

import sys
import warnings
from pathlib import Path

way, mode, base_folder, runs = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])

if way == "install_as_peft":
    from lorakit.peft import install_as_peft

    install_as_peft()
    from peft import LoraConfig, get_peft_model
else:
    from lorakit.peft import LoraConfig, LoraTrainerMixin, get_peft_model

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import lorakit
from lorakit.peft import get_peft_model_state_dict
from lorakit.peft.utils.other import fsdp_auto_wrap_policy

warnings.filterwarnings("ignore", module=r"torch\.distributed\.")  # FSDP 1 uses functions that torch deprecates
is_sharded = mode.startswith("fsdp")
FSDP = (
    {
        "version": int(mode[4]),
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "cpu_ram_efficient_loading": False,
    }
    if is_sharded
    else {}
)
FSDP |= {"state_dict_type": "SHARDED_STATE_DICT"} if mode.endswith("_parts") else {}
FSDP |= {"sync_module_states": False} if mode == "fsdp1_parts" else {}
WIDTH = 4 if mode == "one" else 2


class Wraps:
    """Wraps the model with FSDP 1, since accelerate passes a device that torch rejects on a CPU."""

    def _wrap_model(self, model, training=True, dataloader=None):
        if mode == "fsdp1_parts" and training and not isinstance(model, FullyShardedDataParallel):
            model = self.model = FullyShardedDataParallel(
                model,
                auto_wrap_policy=fsdp_auto_wrap_policy(model),
                use_orig_params=True,
                device_id=torch.device("cpu"),
            )
        return model if mode == "fsdp1_parts" else super()._wrap_model(model, training, dataloader)


MIXIN = (LoraTrainerMixin,) if way == "mixin" else ()
HubTrainer = type("HubTrainer", (*MIXIN, Wraps, Trainer), {})
TrlTrainer = type("TrlTrainer", (*MIXIN, Wraps, SFTTrainer), {})
tokenizer = AutoTokenizer.from_pretrained(base_folder)
rows = [{"prompt": f"what is {i} and {i}?", "completion": f" it is {2 * i}."} for i in range(16)]
tokens = torch.randint(5, 200, (16, 8), generator=torch.Generator().manual_seed(1))
lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
fused = []


def settings(kind, name, **more):
    common = {"output_dir": str(runs / name), "max_steps": 4, "save_steps": 2, "logging_steps": 1, "seed": 1}
    common |= {"per_device_train_batch_size": WIDTH, "learning_rate": 0.02, "report_to": [], "use_cpu": True}
    common |= {"disable_tqdm": True, "bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False}
    args = kind(**common | ({"fsdp": True, "fsdp_config": dict(FSDP)} if is_sharded else {}) | more)
    if is_sharded:
        assert args.world_size == 2
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return args


def adapted():
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32), LoraConfig(**lora))
    if not is_sharded:
        fused.append(len(lorakit.accelerate(model).swaps))
    return model


def hub_trainer(name, **more):
    args = settings(TrainingArguments, name, **more)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    return HubTrainer(adapted(), args, train_dataset=data, eval_dataset=data[:4], processing_class=tokenizer)


def trl_trainer(name, **more):
    data, held_out = Dataset.from_list(rows), Dataset.from_list(rows[:4])
    args = settings(SFTConfig, name, max_length=32, **more)
    return TrlTrainer(adapted(), args, train_dataset=data, eval_dataset=held_out, processing_class=tokenizer)


def numbers(trainer):
    found = get_peft_model_state_dict(trainer.model)
    return {name.removeprefix("base_model.model."): value.clone() for name, value in found.items()}


def in_file(folder):
    found = load_file(Path(folder) / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): value for name, value in found.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


for make in (hub_trainer, trl_trainer):
    label = "Trainer" if make is hub_trainer else "SFTTrainer"
    whole = make(f"{label}-whole")
    begun = numbers(whole)
    whole.train()
    ended = numbers(whole)
    assert begun.keys() == ended.keys() and not same(begun, ended)
    saved = runs / f"{label}-saved"
    if way == "install_as_peft" and mode.endswith("_parts"):  # the trainer saves the model in parts only
        whole.model.save_pretrained(saved, is_main_process=whole.args.should_save)
    else:
        whole.save_model(str(saved))
        whole.accelerator.wait_for_everyone()
        assert same(in_file(runs / f"{label}-whole" / "checkpoint-4"), ended)
    whole.accelerator.wait_for_everyone()
    assert same(in_file(saved), ended)
    has_file = (runs / f"{label}-whole" / "checkpoint-2" / "adapter_model.safetensors").exists()
    assert has_file == (way == "mixin" or not mode.endswith("_parts"))

    if make is hub_trainer and mode != "fsdp1_parts":  # torch crashes there: it frees what is on the CPU already
        prepared = whole.model_wrapped
        given = whole.accelerator.get_state_dict(prepared)
        whole.accelerator.save_model(prepared, runs / "accelerate")
        whole.accelerator.wait_for_everyone()
        everything = load_file(runs / "accelerate" / "model.safetensors")
        for held in (everything, given) if whole.args.process_index == 0 else (everything,):
            bare = {key.removeprefix("base_model.model.").replace(".default", ""): value for key, value in held.items()}
            assert same({key: bare[key] for key in ended}, ended)

    resumed = make(f"{label}-resumed")
    resumed.train(resume_from_checkpoint=str(runs / f"{label}-whole" / "checkpoint-2"))
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (whole, resumed)]
    assert losses[0][:3] == losses[1][:3], "the third step uses the adapter of the checkpoint"
    if mode != "fsdp1_parts":  # accelerate does not restore the optimizer here, without lorakit either
        assert same(numbers(resumed), ended)

    choice = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    best = make(f"{label}-best", **choice, greater_is_better=True)  # the worst by loss, so that it is not the last
    best.train()
    assert best.state.best_model_checkpoint.endswith("-2")
    chosen = numbers(best)
    assert not same(chosen, ended)
    if has_file:
        assert same(chosen, in_file(best.state.best_model_checkpoint))
    if whole.args.process_index == 0:
        save_file(chosen, runs / f"{label}-best.safetensors")
        print(f"ok: {label}: saved, resumed and loaded whole; fused modules: {fused[0] if fused else 'none'}")
if whole.args.world_size > 1:
    torch.distributed.barrier()  # one that leaves early takes its connections from the other
    torch.distributed.destroy_process_group()
