"""Rules about llama.cpp's loader, observed in llama.cpp with exported adapters that are then changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.export.bases import random
from tests.export.test_gguf import BOUND, IDS, expected, in_llama_cpp
from tests.gguf_models import write_base

from lorakit import core, hub
from lorakit.errors import ModelError
from lorakit.export.formats import export
from lorakit.export.request import ExportRequest
from lorakit.export.rules import FINE, IGNORED, REJECTED, RUN, RUNTIMES, WRONG, Effect

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

Q = "blk.0.attn_q.weight.lora_"
RANK = 4


@dataclass(frozen=True)
class Change:
    """A change of an exported adapter, whose alpha is 0 and whose scale is 1.

    Attributes:
        tensor: Function from a tensor's name and value to the new value, or None to drop it.
        layer: What layer 1 is called.
    """

    alpha: float = 0.0
    tensor: Callable[[str, Any], Any] = lambda name, value: value
    layer: int = 1


CASES: dict[str, tuple[Change, Effect]] = {
    "exported": (Change(), FINE),
    "rank pattern": (Change(alpha=RANK), FINE),  # alpha is divided by the rank of the tensor
    "alpha pattern": (Change(alpha=2 * RANK), WRONG),
    "zero update": (Change(tensor=lambda name, value: value * 0), IGNORED),
    "missing sites": (Change(tensor=lambda name, value: None if Q in name else value), WRONG),
    "incomplete site": (Change(tensor=lambda name, value: None if name == f"{Q}b" else value), REJECTED),
    "shape": (Change(tensor=lambda name, value: value[:, :-8] if name == f"{Q}a" else value), REJECTED),
    "unknown path": (Change(layer=7), REJECTED),
}
"""Condition -> change of an adapter, and its effect."""


def rewrite(source: Path, target: Path, change: Change) -> Path:
    """Write a changed copy of an adapter."""
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, change.alpha)
    for tensor in gguf.GGUFReader(source).tensors:
        changed = change.tensor(tensor.name, np.array(tensor.data))
        if changed is not None:
            writer.add_tensor(tensor.name.replace("blk.1.", f"blk.{change.layer}."), changed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_does_what_its_rule_says(tmp_path: Path, name: str) -> None:
    change, effect = CASES[name]
    base = random("llama", 0.1)
    base.save_pretrained(tmp_path / "base")
    values = expected(base, tmp_path / "adapter", r=RANK)
    request = ExportRequest(core.common_form(tmp_path / "adapter"), "notes", hub.resolve(tmp_path / "base"))
    (file,) = export("gguf", request, tmp_path / "out")[1].iterdir()
    changed = rewrite(file, tmp_path / "changed.gguf", change)
    try:
        found = in_llama_cpp(write_base(base, tmp_path / "base.gguf"), changed)
    except ModelError:
        observed = REJECTED
    else:
        is_base = largest(found, plain(base)) < BOUND
        observed = IGNORED if is_base else FINE if largest(found, values) < BOUND else WRONG
    assert observed is effect


def largest(found: list[float], values: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(found, values, strict=True))


def plain(base: Any) -> list[float]:
    """Return the base's log-probability of each token but the first."""
    with torch.no_grad():
        scores = base(input_ids=torch.tensor([IDS])).logits[0].log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()


def test_the_rules_have_the_observed_effects() -> None:
    rules = RUNTIMES["llama.cpp"].rules
    of_converter = {"exported", "alpha pattern"}  # llama.cpp has one alpha; the converter does not read the pattern
    for name in CASES.keys() - of_converter:
        assert (rules[name].effect, rules[name].known) == (CASES[name][1], RUN)
    assert rules["scale 0"].effect is WRONG  # "exported" has alpha 0, and the answers of scale 1
