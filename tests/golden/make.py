"""Write the golden adapters with the installed `peft`: python tests/golden/make.py [folder ...].

They represent files that users already have, so they are written once: run this to add an adapter, not to fix a test.

Each directory has the unmodified files of peft and `expected.json`: the name of the base (`base_of`), the input, and the
outputs that peft computed. The tests read them without peft. The base's weights come from plain arithmetic, not from a
random generator, so they are equal on every machine and with every version.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
DENSE = {"target_modules": ["up", "head"]}
GOLDEN: Mapping[str, tuple[str, dict[str, Any]]] = {
    "plain": ("dense", DENSE),
    "dora": ("dense", {**DENSE, "use_dora": True}),
    "rslora-patterns": (
        "dense",
        {**DENSE, "use_rslora": True, "rank_pattern": {"head": 3}, "alpha_pattern": {"up": 5}},
    ),
    "embedding": ("dense", {"target_modules": ["embed", "up"]}),
    "bias-all": ("dense", {"target_modules": ["up"], "bias": "all"}),
    "bias-lora-only": ("dense", {"target_modules": ["up"], "bias": "lora_only"}),
    "saved-head": ("dense", {"target_modules": ["up"], "modules_to_save": ["head"]}),
    "regex": ("dense", {"target_modules": r".*(up|head)"}),
    "all-linear": ("dense", {"target_modules": "all-linear"}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}),
    "gpt2-classes": ("gpt2-classes", {"target_modules": ["c_attn"], "task_type": "SEQ_CLS"}),
}
"""Directory written by peft -> base, and config fields in addition to r=2 and lora_alpha=3."""

OURS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "lorakit-format-1": ("dense", {**DENSE, "use_dora": True}),
    "lorakit-format-2": ("dense", {**DENSE, "use_dora": True}),
}
"""Folder that lorakit wrote -> the same; the name says the format of `lorakit.json`."""

INPUT = torch.tensor([[1, 7, 3], [2, 9, 4]])


def base_of(name: str) -> nn.Module:
    """A base in eval mode whose numbers follow from their names and places."""
    model = {"dense": _dense, "gpt2": _gpt2, "gpt2-classes": _gpt2_classes}[name]().eval()
    fill(model, 0.0)
    return model


def fill(model: nn.Module, shift: float) -> None:
    """Give each parameter a wave of its own; a shift makes another set of numbers."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            numbers = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = 0.4 * torch.sin(numbers * (0.7 + 0.01 * index) + index + shift)
            parameter.copy_(wave.view(parameter.shape) + (1.0 if "ln_" in name and "weight" in name else 0.0))


def output_of(model: nn.Module) -> Tensor:
    """Return the output of the model for `INPUT`, or its logits."""
    with torch.no_grad():
        result = model(INPUT)
    return result if isinstance(result, Tensor) else result.logits


def _dense() -> nn.Module:
    return nn.Sequential(
        OrderedDict(embed=nn.Embedding(12, 6), up=nn.Linear(6, 8), act=nn.Tanh(), head=nn.Linear(8, 5))
    )


def _gpt2_config() -> Any:
    from transformers import GPT2Config

    sizes = {"vocab_size": 12, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8, "num_labels": 3}
    return GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)


def _gpt2() -> nn.Module:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel(_gpt2_config())


def _gpt2_classes() -> nn.Module:
    from transformers import GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(_gpt2_config())


def main() -> None:
    """Rewrite the directories named on the command line, or all that peft writes."""
    import peft

    import lorakit.peft

    for name in sys.argv[1:] or GOLDEN:
        library: Any = peft if name in GOLDEN else lorakit.peft
        base, fields = {**GOLDEN, **OURS}[name]
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = library.get_peft_model(base_of(base), library.LoraConfig(r=2, lora_alpha=3, **fields))
        learned = nn.Module()
        trained = {n.replace(".", "_"): p for n, p in model.named_parameters() if p.requires_grad}
        learned._parameters.update(trained)
        fill(learned, 0.5)
        model.eval().save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # a card of placeholders
        expected = {
            "written_by": f"{library.__name__} {library.__version__}",
            "base": base,
            "outputs": output_of(model).tolist(),
        }
        (folder / "expected.json").write_text(json.dumps(expected) + "\n")
        print(folder.name, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
