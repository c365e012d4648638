"""A crash in `save_pretrained` or in a Trainer's checkpoint: each adapter is the old one or the new one, for peft too."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit.core import load_adapter
from lorakit.core.model.index import layers
from lorakit.durable import TEMPORARY
from lorakit.durable_folders import sweep
from lorakit.errors import AdapterFileError
from lorakit.peft import LoraConfig, get_peft_model

from ..laws.crashing import at_every_operation
from ..laws.snapshots import bits
from ..laws.zoo import LINEARS, randomise
from .test_trainer_mixin import trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
Held = Callable[[Path], Any]


def wrapper(alpha: int) -> Any:
    """Two adapters, whose numbers, alphas and alpha patterns follow from a number."""
    model: Any = None
    for name in ("default", "b"):
        pattern = {"up": 3 * alpha} if alpha == 2 else {}
        config = LoraConfig(r=4, lora_alpha=alpha, alpha_pattern=pattern, target_modules=["up", "square"])
        if model is None:
            model = get_peft_model(LINEARS.model(), config)
        else:
            model.add_adapter(name, config)
    for seed, name in enumerate(("default", "b")):
        model.set_adapter(name)
        randomise(model.get_base_model(), name, 10 * alpha + seed)
    return model


def held(folder: Path) -> dict[str, Any]:
    """Bits and scales of what lorakit loads."""
    model = LINEARS.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_adapter(model, folder)
    return {path: _numbers(layer) for path, layer in layers(model)}


def held_by_peft(folder: Path) -> dict[str, Any]:
    """Bits and scales of what peft loads."""
    peft = pytest.importorskip("peft")
    model: Any = peft.PeftModel.from_pretrained(LINEARS.model(), str(folder))
    return {path: _numbers(layer) for path, layer in model.named_modules() if hasattr(layer, "lora_A")}


def _numbers(layer: Any) -> tuple[Any, ...]:
    return bits(layer.lora_A["default"].weight), bits(layer.lora_B["default"].weight), layer.scaling["default"]


def judge_of(tmp_path: Path, old: Any, new: Any, read: Held) -> Callable[[Path], str]:
    """Says what both adapters in a folder are: old, new, rejected, or neither."""
    for name, model in (("old", old), ("new", new)):
        model.save_pretrained(tmp_path / name)
    whole = {(name, part): read(tmp_path / name / part) for name in ("old", "new") for part in (".", "b")}
    assert len({str(value) for value in whole.values()}) == 4

    def judge(root: Path) -> str:
        words = []
        for part in (".", "b"):
            try:
                found = read(root / "out" / part)
            except AdapterFileError:
                words.append("rejected")
            else:
                words.append(next((name for (name, p), value in whole.items() if (p, value) == (part, found)), "mixed"))
        assert (root / "out" / "notes").read_text() == "mine"
        for folder in (root, root / "out", root / "out" / "b"):
            sweep(folder)
        assert not list(root.rglob(f"{TEMPORARY}*"))
        return " ".join(words)

    return judge


def template(tmp_path: Path, model: Any) -> Path:
    (tmp_path / "template").mkdir()
    model.save_pretrained(tmp_path / "template" / "out")
    (tmp_path / "template" / "out" / "notes").write_text("mine")
    return tmp_path / "template"


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "in order"])
def test_save_pretrained(exchange: bool, tmp_path: Path) -> None:
    old, new = wrapper(8), wrapper(2)
    judge = judge_of(tmp_path, old, new, held)
    found = at_every_operation(
        lambda root: new.save_pretrained(root / "out"), template(tmp_path, old), judge, how="kill", exchange=exchange
    )
    assert len(found) > 60 and found[-1] == "new new"
    rejected = set() if exchange else {"rejected old", "new rejected"}
    assert {"old old", "new old", "new new"} <= set(found) <= {"old old", "new old", "new new"} | rejected


@pytest.mark.slow
def test_save_pretrained_as_peft_reads_it(tmp_path: Path) -> None:
    """peft knows nothing of `lorakit.json`: config and weights on the disk always belong together."""
    old, new = wrapper(8), wrapper(2)
    judge = judge_of(tmp_path, old, new, held_by_peft)
    found = at_every_operation(
        lambda root: new.save_pretrained(root / "out"), template(tmp_path, old), judge, how="kill"
    )
    assert len(found) > 60 and set(found) == {"old old", "new old", "new new"}


@pytest.mark.slow
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "in order"])
def test_a_trainers_checkpoint(tiny_llama: Any, tmp_path: Path, exchange: bool) -> None:
    """Written again over an older one; `_save` is what the Trainer calls, before it adds its own files."""
    model = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora = trainer(model, tmp_path / "run")
    config = model.peft_config["default"]
    whole: dict[str, Any] = {}
    for seed, name in enumerate(("old", "new")):
        randomise(model.get_base_model(), "default", seed)
        lora._save(str(tmp_path / ("template/out" if name == "old" else "new")))
        whole[name] = _bits_of(tmp_path / ("template/out" if name == "old" else "new"))
    (tmp_path / "template" / "out" / "optimizer.pt").write_text("transformers")
    assert whole["old"] != whole["new"] and config.r == 2

    def judge(root: Path) -> str:
        assert (root / "out" / "optimizer.pt").read_text() == "transformers"
        try:
            found = _bits_of(root / "out")
        except AdapterFileError:
            return "rejected"
        return next((name for name, value in whole.items() if value == found), "mixed")

    found = at_every_operation(
        lambda root: lora._save(str(root / "out")), tmp_path / "template", judge, how="kill", exchange=exchange
    )
    assert len(found) > 40 and found[-1] == "new"
    assert {"old", "new"} <= set(found) <= {"old", "new"} | (set() if exchange else {"rejected"})


def _bits_of(folder: Path) -> dict[str, str]:
    from lorakit.core.files.adapter_folder import read_adapter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = read_adapter(folder)
    return {name: bits(tensor) for name, tensor in files.file.tensors.items()}
