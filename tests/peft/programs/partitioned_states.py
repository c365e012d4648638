"""An adapter of a model that DeepSpeed ZeRO-3 partitions over two processes; started by torch.distributed.run.

python -m torch.distributed.run --standalone --nproc-per-node 2 partitioned_states.py FOLDER dora | lora
"""

import sys
import warnings
from pathlib import Path

import deepspeed
import torch
from torch import distributed, nn

from lorakit.errors import AdapterError
from lorakit.peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
inputs = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
deepspeed.init_distributed("gloo")
rank = distributed.get_rank()


def adapted():
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["0", "2"], use_dora=sys.argv[2] == "dora", init_lora_weights=False)
    return get_peft_model(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)), config)


def optimizer(model):
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def close(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)


plain = adapted()
begun = {name: value.clone() for name, value in get_peft_model_state_dict(plain).items()}
plain.save_pretrained(folder / f"plain-{rank}")
stepper = optimizer(plain)
(plain(inputs) ** 2).mean().backward()
stepper.step()

model = adapted()
config = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
config["gradient_clipping"] = 1e9
config |= {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)
assert all(parameter.numel() == 0 for parameter in model.parameters())
assert close(get_peft_model_state_dict(model), begun)
model.save_pretrained(folder / "saved", is_main_process=rank == 0)
distributed.barrier()
for name in ("adapter_model.safetensors", "adapter_config.json", "lorakit.json"):
    assert (folder / "saved" / name).read_bytes() == (folder / f"plain-{rank}" / name).read_bytes()
engine.backward((engine(inputs) ** 2).mean())
engine.step()
assert close(get_peft_model_state_dict(model), get_peft_model_state_dict(plain))
set_peft_model_state_dict(model, begun)
assert close(get_peft_model_state_dict(model), begun)
assert not model.load_adapter(folder / "saved", "default", is_trainable=True).missing_keys
try:
    model.save_pretrained(folder / "nothing", state_dict={})
    raise SystemExit("an incomplete adapter was saved")
except AdapterError as error:
    assert error.field == "state_dict" and "lora_A" in str(error.where)
assert not (folder / "nothing").exists()
distributed.barrier()
if rank == 0:
    print("ok: DeepSpeed ZeRO-3")
