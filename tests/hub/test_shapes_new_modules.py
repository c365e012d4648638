"""Modules that a model's files lack are known before the weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorakit import hub
from lorakit.hub.shapes import full_modules, missing_names, modules_with

from .. import small_models

LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}}
SIZES = {**small_models.SMALL, "pad_token_id": 0}


def _masked(family: str) -> Callable[[], Any]:
    config = getattr(transformers, f"{family}Config")
    return lambda: getattr(transformers, f"{family}ForMaskedLM")(config(**SIZES, bos_token_id=0, eos_token_id=0))


def _distilbert() -> Any:
    sizes = {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    return transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**sizes))


def _classifier(labels: int) -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=labels))


def _without_prefix() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": small_models.llama,
    "gpt2": small_models.gpt2,
    "mixtral": small_models.mixtral,
    "phi3": small_models.phi3,
    "t5": small_models.t5,
    "bert": small_models.bert,
    "bert-encoder": _without_prefix,
    "classifier": lambda: _classifier(3),
    "classifier-of-other-size": lambda: _classifier(2),
    "distilbert": _distilbert,
    **{family.lower(): _masked(family) for family in ("Roberta", "Albert", "Electra", "ModernBert")},
}


@pytest.mark.parametrize("task", ["classification", "token-classification", "encoder"])
@pytest.mark.parametrize("which", MODELS)
def test_the_report_after_loading_says_the_same(which: str, task: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    MODELS[which]().save_pretrained(tmp_path, max_shard_size="30KB")
    source, values = hub.resolve(tmp_path), LABELS if task in hub.WITH_NEW_HEADS else {}
    try:
        skeleton = hub.skeleton(source, task, values)
    except ValueError:
        pytest.skip("transformers has no class for this task")
    loaded = hub.load_for_task(source, hub.LoadOptions("float32"), task, values)
    assert modules_with(skeleton, missing_names(skeleton, source)) == loaded.new_modules or task == "encoder"
    shape = hub.shape_for_task(source, task, values)
    assert set(loaded.new_modules) <= set(shape.full_modules)
    assert shape.parameters == sum(parameter.numel() for parameter in loaded.model.parameters())


def test_without_weights_only_the_head_is_known(tmp_path: Path) -> None:
    small_models.bert().config.save_pretrained(tmp_path)
    source = hub.resolve(tmp_path / "config.json")
    model = hub.skeleton(source, "classification", LABELS)
    assert missing_names(model, source) == frozenset()
    assert full_modules(model, source, "classification") == ("classifier",)


def test_headers_on_the_hub_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    small_models.bert().save_pretrained(tmp_path)
    model = hub.skeleton(hub.resolve(tmp_path), "classification", LABELS)
    names = dict(small_models.bert().named_parameters())
    infos = {name: _info(tuple(p.shape)) for name, p in names.items()}
    whole = type("Repo", (), {"files_metadata": {"model.safetensors": type("File", (), {"tensors": infos})}})
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda _, **__: whole)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    source = hub.ModelSource("hub", "someone/model", "someone/model", "someone/model", "someone/model")
    assert modules_with(model, missing_names(model, source)) == ("bert.pooler", "classifier")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert missing_names(model, source) == frozenset()


def _info(shape: tuple[int, ...]) -> Any:
    return type("Info", (), {"shape": list(shape)})
