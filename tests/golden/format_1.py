"""Write the golden files of lorakit's formats of November 2026: python tests/golden/format_1.py [name ...].

They represent files that users have, so they are written once, by the code of that time (commit 9001998): an adapter of
each kind, variant and init that has a form of its own on disk, a merged model with its record, and a run that stopped at
a checkpoint. Run this script to add a file, never to make a failing test pass.

Base weights are plain arithmetic (`make.fill`), so they are the same on every machine and version. `expected.json` next
to each adapter holds the outputs that the writer computed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig

if __package__:
    from .make import fill
else:  # run as a script
    from make import fill  # type: ignore[no-redef]

HERE = Path(__file__).resolve().parent / "format-1"
ADAPTERS, MERGED, RUN = HERE / "adapters", HERE / "merged", HERE / "run"
VOCABULARY = 24


@dataclass(frozen=True)
class Golden:
    """One saved adapter.

    Attributes:
        base: Name in `BASES`.
        targets: `target_modules`.
        fields: Other fields of the config.
        form: "plain" calls `save_adapter`, "trained" `save_as_trained`.
    """

    base: str
    targets: tuple[str, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    form: str = "plain"


def wave(*shape: int) -> Tensor:
    """An input, the same on every machine."""
    count = torch.tensor(shape).prod().item()
    return torch.sin(torch.arange(count, dtype=torch.float64) * 0.9 + 0.3).float().view(shape)


def ids(rows: int = 2, length: int = 6) -> Tensor:
    """Token ids, (rows, length); each row holds tokens 3, 4 once, which aLoRA adapters wait for."""
    tokens = (torch.arange(rows * length).view(rows, length) * 7) % (VOCABULARY - 5) + 5
    tokens[:, 2:4] = torch.tensor([3, 4])
    return tokens


def _dense() -> nn.Module:
    return nn.Sequential(OrderedDict(up=nn.Linear(6, 8), act=nn.Tanh(), head=nn.Linear(8, 5)))


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(OrderedDict(up=Conv1D(8, 6), act=nn.Tanh(), head=nn.Linear(8, 5)))


def _tokens() -> nn.Module:
    embed = nn.Embedding(VOCABULARY, 6)
    return nn.Sequential(OrderedDict(embed=embed, up=nn.Linear(6, 8), act=nn.Tanh(), head=nn.Linear(8, 5)))


def _convolution(dims: int) -> nn.Module:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    up = conv(2, 4, 3, padding=1)
    return nn.Sequential(OrderedDict(up=up, act=nn.Tanh(), flat=nn.Flatten(), head=nn.Linear(4 * 3**dims, 5)))


class Attending(nn.Module):
    """Self-attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mha, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mha(x, x, x)[0])


class Experts(nn.Module):
    """Every row goes through all experts of one tensor, then through a square matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.square = nn.Parameter(torch.empty(3, 4, 6)), nn.Parameter(torch.empty(6, 6))
        self.is_transposed = True

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("ni,eio->no", x, self.up)) @ self.square.T


class Squared(nn.Module):
    """x -> (W x)², with a weight of another name: a module that only a user's own kind adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.table.T) ** 2


def _table(module: nn.Module) -> tuple[core.WeightSpec, ...]:
    return (core.WeightSpec("table", 5, 4),)


def own_kinds() -> list[Any]:
    """The user's own kind that the adapter "own-kind" was made with."""
    return [dataclasses.replace(core.kind_named("Parameter"), name="Squared", types=(Squared,), specs=_table)]


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    words = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0, "tie_word_embeddings": False}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **words))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    words = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts, **words))


BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "dense": (_dense, lambda: wave(4, 6)),
    "conv1d": (_conv1d, lambda: wave(4, 6)),
    "tokens": (_tokens, ids),
    "convolution-1": (lambda: _convolution(1), lambda: wave(2, 2, 3)),
    "convolution-2": (lambda: _convolution(2), lambda: wave(2, 2, 3, 3)),
    "convolution-3": (lambda: _convolution(3), lambda: wave(2, 2, 3, 3, 3)),
    "attention": (Attending, lambda: wave(2, 3, 4)),
    "experts": (lambda: nn.Sequential(OrderedDict(experts=Experts())), lambda: wave(4, 4)),
    "own": (
        lambda: nn.Sequential(OrderedDict(first=nn.Linear(3, 4), own=Squared(), last=nn.Linear(5, 2))),
        lambda: wave(4, 3),
    ),
    "llama": (_llama, ids),
    "mixtral": (_mixtral, ids),
}
"""Name -> how the base is built, and its input."""

UP, BOTH = ("up",), ("up", "head")
MERGEABLE = {"dora": {"use_dora": True}, "plain": {}}
LOFTQ = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 2}}
GOLDEN: dict[str, Golden] = {
    **{f"linear-{name}": Golden("dense", BOTH, fields) for name, fields in MERGEABLE.items()},
    **{f"conv1d-{name}": Golden("conv1d", UP, fields) for name, fields in MERGEABLE.items()},
    **{f"embedding-{name}": Golden("tokens", ("embed", "up"), fields) for name, fields in MERGEABLE.items()},
    **{
        f"convolution-{dims}-{name}": Golden(f"convolution-{dims}", UP, fields)
        for dims in (1, 2, 3)
        for name, fields in MERGEABLE.items()
    },
    "attention": Golden("attention", ("mha",)),
    "parameters": Golden("experts", (), {"target_parameters": ["experts.up", "experts.square"]}),
    "own-kind": Golden("own", ("own", "last")),
    "alora": Golden("tokens", UP, {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}),
    "rslora-patterns": Golden(
        "dense", BOTH, {"use_rslora": True, "rank_pattern": {"head": 3}, "alpha_pattern": {"up": 5}}
    ),
    "lora-bias": Golden("dense", BOTH, {"lora_bias": True}),
    "bias-all": Golden("dense", UP, {"bias": "all"}),
    "bias-lora-only": Golden("dense", UP, {"bias": "lora_only"}),
    "saved-module": Golden("dense", UP, {"modules_to_save": ["head"]}),
    **{name: Golden("dense", UP, {"init_lora_weights": name}) for name in ("pissa", "olora", "orthogonal", "mica")},
    "pissa-trained": Golden("dense", UP, {"init_lora_weights": "pissa"}, "trained"),
    "pissa-conv1d": Golden("conv1d", UP, {"init_lora_weights": "pissa"}),
    "loftq": Golden("dense", UP, LOFTQ),
    "eva": Golden("dense", UP, {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}}),
    "corda": Golden("dense", UP, {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}}),
    "corda-trained": Golden(
        "dense", UP, {"init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}}, "trained"
    ),
    "lora-ga": Golden("dense", UP, {"init_lora_weights": "lora_ga"}),
    "llama-all-linear": Golden("llama", ("all-linear",), {"task_type": "CAUSAL_LM"}),
    "llama-head": Golden("llama", ("q_proj",), {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}),
    "llama-tokens": Golden("llama", ("q_proj",), {"trainable_token_indices": {"embed_tokens": [2, 5]}}),
    "llama-replicated": Golden("llama", ("q_proj", "v_proj"), {"layer_replication": [[0, 2], [1, 2]]}),
    "mixtral-experts": Golden(
        "mixtral", ("q_proj",), {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    ),
}
"""Folder below `format-1/adapters` -> what it holds, with r=2 and lora_alpha=3."""


def base_of(name: str) -> nn.Module:
    """The base in eval mode; its weights follow from their names and places."""
    model = BASES[name][0]().eval()
    fill(model, 0.0)
    model.requires_grad_(False)
    return model


def output_of(model: nn.Module, base: str) -> Tensor:
    """The model's output, or its logits, for the base's input."""
    given = BASES[base][1]()
    with torch.no_grad():
        result = model(input_ids=given) if base in ("llama", "mixtral") else model(given)
    return result if isinstance(result, Tensor) else result.logits


def _attached(golden: Golden) -> nn.Module:
    model = base_of(golden.base)
    targets: Any = golden.targets[0] if golden.targets == ("all-linear",) else list(golden.targets) or None
    config, statistics = LoraConfig(r=2, lora_alpha=3, target_modules=targets, **golden.fields), None
    if golden.fields.get("init_lora_weights") in ("eva", "corda", "lora_ga"):
        batches = [wave(40, 6)]
        statistics = core.collect_for(model, config, batches, lambda net, given: net(given).square().mean())
        config = statistics.config
    core.attach(model, config, seed=0, statistics=statistics, kinds=own_kinds() if golden.base == "own" else ())
    with torch.no_grad():
        for index, (path, parameter) in enumerate(core.trainable_parameters(model, "default")):
            numbers = torch.arange(parameter.numel(), dtype=torch.float64)
            shift = 0.3 * torch.sin(numbers * (0.7 + 0.01 * index) + index + 0.5).view(parameter.shape)
            if "lora_magnitude" in path:
                parameter.mul_(1 + 0.3 * shift)
            else:
                parameter.add_(shift)
    return model


def write_adapter(name: str) -> None:
    """Write one adapter and the outputs of the model that has it."""
    golden, folder = GOLDEN[name], ADAPTERS / name
    shutil.rmtree(folder, ignore_errors=True)
    model = _attached(golden)
    save = core.save_as_trained if golden.form == "trained" else core.save_adapter
    save(model, folder, facts={"base_name": golden.base})
    expected = {"base": golden.base, "outputs": output_of(model, golden.base).tolist()}
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", *"abcdefghijklmnopqrstuvw"]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>", unk_token="<end>")


def write_base(folder: Path) -> None:
    """Write the Llama and a tokenizer as a model directory."""
    base_of("llama").save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def write_merged() -> None:
    """Merge an adapter into a model directory with the command line; keep the result and the outputs."""
    from lorakit.cli import main

    shutil.rmtree(MERGED, ignore_errors=True)
    MERGED.mkdir(parents=True)
    os.chdir(MERGED)
    write_base(Path("base"))
    code = main(["merge", "--model", "base", "--adapter", "../adapters/llama-all-linear", "--output-dir", "model"])
    assert not code, code
    shutil.rmtree("base")
    expected = json.loads((ADAPTERS / "llama-all-linear" / "expected.json").read_text())
    Path("expected.json").write_text(json.dumps(expected) + "\n")


TEXT = "a b c d e f g h . i j k l m n o p q r s t u v w . c a b e d f h g "


def write_run() -> None:
    """Train for four of eight steps in `format-1/run`, as a run that a signal stopped after its checkpoint."""
    import signal

    from lorakit.train import TrainSettings, trainer
    from lorakit.train.files import checkpoint

    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    os.chdir(RUN)
    write_base(Path("base"))
    Path("text.txt").write_text(TEXT * 20)
    Path("held-out.txt").write_text(TEXT[::-1] * 2)
    save = checkpoint.save

    def save_and_stop(*args: Any, **words: Any) -> Any:
        result = save(*args, **words)
        if args[1].state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    checkpoint.save = save_and_stop  # type: ignore[assignment]
    sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
    sizes = {
        "max_length": 12,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 8,
        "save_steps": 4,
        "eval_steps": 2,
    }
    result = trainer.run(
        TrainSettings(
            model="base",
            data=["text.txt"],
            eval_data="held-out.txt",
            output_dir="run",
            dtype="float32",
            device="cpu",
            r=2,
            seed=3,
            **sizes,
        )
    )
    print(result)


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = sys.argv[1:] or [*GOLDEN, "merged", "run"]
    for one in asked:
        {"merged": write_merged, "run": write_run}.get(one, lambda one=one: write_adapter(one))()
        print(one)
