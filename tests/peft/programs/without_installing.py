"""TRL's trainers get a config or a model of lorakit.peft although TRL was imported with another peft.

python without_installing.py FOLDER_OF_A_MODEL  FOLDER_FOR_RUNS
"""

import copy
import pickle
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lorakit import LorakitError, LoraTrainerMixin
from lorakit.peft import LoraConfig, PeftModel, get_peft_model

base_folder, runs = sys.argv[1], Path(sys.argv[2])
rows = [{"prompt": "what is 1?", "chosen": " it is 1", "rejected": " not 1"}] * 4
texts = [{"text": "what is 1? it is 1"}] * 4
common = {"max_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}


class LoraSFTTrainer(LoraTrainerMixin, SFTTrainer):
    pass


def trainer(kind, data, arguments, wraps):
    model, config = AutoModelForCausalLM.from_pretrained(base_folder), LoraConfig(task_type="CAUSAL_LM")
    given = {"model": get_peft_model(model, config)} if wraps else {"model": model, "peft_config": config}
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    return kind(args=arguments, train_dataset=Dataset.from_list(data), processing_class=tokenizer, **given)


for kind, data, arguments in (
    (SFTTrainer, texts, SFTConfig(str(runs), **common)),
    (DPOTrainer, rows, DPOConfig(str(runs), **common)),
):
    for wraps in (False, True):
        try:
            trainer(kind, data, arguments, wraps)
        except LorakitError as error:
            assert "lorakit.install_as_peft()" in str(error) and kind.__name__ in str(error), error
            assert str(error).count(". ") == 0 and error.field == "peft_config", error
            print(f"ok: {kind.__name__}, {'model' if wraps else 'config'}")
for wraps in (False, True):
    trainer(LoraSFTTrainer, texts, SFTConfig(str(runs), **common), wraps).train()
print("ok: the mixin trains")

config = LoraConfig(task_type="CAUSAL_LM", r=4)
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config)
for one in (config, model):
    assert one.__class__ is type(one) and isinstance(one, type(one)) and not isinstance(one, str)
assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
again = copy.deepcopy(model)
assert type(again) is type(model)
swapped = type("Swapped", (type(model),), {})
again.__class__ = swapped  # as FSDP2 does
assert type(again) is swapped and again.__class__ is swapped and isinstance(again, PeftModel)
ids = torch.ones(1, 4, dtype=torch.int64)
assert torch.equal(torch.compile(model, backend="eager")(ids).logits, model(ids).logits)
print("ok: classes are as usual otherwise")
