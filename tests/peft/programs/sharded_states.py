"""Adapters of models that FSDP shards over two processes: trained, read, saved and loaded; started by torch.distributed.run.

python -m torch.distributed.run --standalone --nproc-per-node 2 sharded_states.py FOLDER
"""

import sys
import warnings
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lorakit.errors import AdapterError
from lorakit.peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from lorakit.peft.utils.other import fsdp_auto_wrap_policy

warnings.simplefilter("ignore")  # FSDP 1 says that it is deprecated
folder = Path(sys.argv[1])
distributed.init_process_group("gloo")
rank = distributed.get_rank()
inputs = torch.randn(6, 8, generator=torch.Generator().manual_seed(4))
ADAPTER = "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self):
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(8, 8), nn.ModuleList([Block(), Block()]), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def adapted(dora=True):
    torch.manual_seed(0)
    config = LoraConfig(
        r=3, target_modules=["up", "down"], use_dora=dora, modules_to_save=["head"], init_lora_weights=False
    )
    return get_peft_model(Model(), config)


def blocks(model):
    for block in model.get_base_model().blocks:
        fully_shard(block)
    return fully_shard(model)


def leaves(model):
    policy = fsdp_auto_wrap_policy(model)
    for module in reversed(list(model.modules())):
        if policy(module=module, recurse=False, nonwrapped_numel=0):
            fully_shard(module)
    return fully_shard(model)


def fsdp_1(model, units, original):
    policy = fsdp_auto_wrap_policy(model) if units else None
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=original, device_id=cpu)


WAYS = {
    "FSDP 2, units are blocks": blocks,
    "FSDP 2, units are blocks and factors": leaves,
    "FSDP 1, units are blocks and factors, original parameters": lambda model: fsdp_1(model, True, True),
    "FSDP 1, units are blocks and factors, flat parameters": lambda model: fsdp_1(model, True, False),
    "FSDP 1, one unit": lambda model: fsdp_1(model, False, True),
}


def step(model, parameters):
    (model(inputs) ** 2).mean().backward()
    torch.optim.SGD(parameters, lr=0.5).step()


def close(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def files(path):
    return {name: (path / name).read_bytes() for name in (ADAPTER, "adapter_config.json", "lorakit.json")}


plain = adapted()
begun = {key: value.clone() for key, value in get_peft_model_state_dict(plain).items()}
if rank == 0:
    plain.save_pretrained(folder / "plain")
step(plain, [parameter for parameter in plain.parameters() if parameter.requires_grad])
expected = get_peft_model_state_dict(plain)
assert not close(begun, expected)

for number, (label, shard) in enumerate(WAYS.items()):
    inner = adapted()
    outer = shard(inner)
    with torch.no_grad():
        outer(inputs)  # FSDP 1 does not allow reading a part of the model before its first forward pass
    one_unit, where = label.endswith("one unit"), folder / str(number)
    if one_unit:
        try:
            inner.save_pretrained(where, is_main_process=rank == 0)
            raise SystemExit("an incomplete adapter was saved")
        except AdapterError as error:
            assert "lora_A" in error.what and "summon_full_params" in str(error)
        with FullyShardedDataParallel.summon_full_params(outer):
            inner.save_pretrained(where, is_main_process=rank == 0)
    else:
        inner.save_pretrained(where, is_main_process=rank == 0)
    distributed.barrier()
    assert files(where) == files(folder / "plain"), label
    step(outer, [parameter for parameter in outer.parameters() if parameter.requires_grad])
    assert close(get_peft_model_state_dict(outer), expected), label
    for given in ({}, {key: value.flatten() for key, value in expected.items()}):
        try:
            inner.save_pretrained(folder / "nothing", state_dict=given)
            raise SystemExit("an incomplete adapter was saved")
        except AdapterError as error:
            assert error.field == "state_dict" and "lora_" in str(error.where)
    assert not (folder / "nothing").exists()
    set_peft_model_state_dict(outer, begun)
    assert all(torch.equal(value, begun[key]) for key, value in get_peft_model_state_dict(outer).items()), label
    step(outer, [parameter for parameter in outer.parameters() if parameter.requires_grad])
    if one_unit:
        try:
            inner.load_adapter(where, "default", is_trainable=True)
            raise SystemExit("a part of a flat buffer was written")
        except AdapterError as error:
            assert "lora_" in error.what
    else:
        assert not inner.load_adapter(where, "default", is_trainable=True).missing_keys
        assert all(torch.equal(value, begun[key]) for key, value in get_peft_model_state_dict(outer).items()), label
    if rank == 0:
        print(f"ok: {label}")

if rank == 0:
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Model(), folder / "0")
    assert all(torch.equal(value, begun[key]) for key, value in get_peft_model_state_dict(again).items())
distributed.barrier()
distributed.destroy_process_group()
