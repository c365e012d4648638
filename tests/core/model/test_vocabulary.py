"""New tokens: an adapter trained on resized embeddings is small, and loads onto the original base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import attach, detach, disable, fingerprint, load_adapter, merge_and_unload, save_adapter
from lorakit.core.model.fingerprint import SAME
from lorakit.errors import AdapterFileError, BaseMismatchError

from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import GPT2, LLAMA, TIED, Specimen, randomise, run

FP32 = torch.float32
GIVEN = {"input_ids": torch.tensor([[50, 3, 51, 1], [1, 50, 4, 5]])}
OLD = {"input_ids": GIVEN["input_ids"] % 50}
TIED_ONES = pytest.mark.parametrize("specimen", [TIED, GPT2], ids=str)
ROWS: dict[str, Any] = {"trainable_token_indices": [50, 51]}


def grown(specimen: Specimen, rows: int = 52, seed: int = 3) -> nn.Module:
    """A model to which tokens were added; the new rows differ from run to run, as a person's would."""
    model = specimen.model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def trained(specimen: Specimen, folder: Path, **fields: Any) -> Tensor:
    """Save an adapter of a resized model and return its output."""
    model = grown(specimen)
    attach(model, specimen.config(**fields))
    randomise(model, "default", 4, size=0.3)
    save_adapter(model, folder)
    return run(model, GIVEN)


@TIED_ONES
def test_new_rows_alone(specimen: Specimen, tmp_path: Path) -> None:
    wanted = trained(specimen, tmp_path, **ROWS)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 20_000
    model = specimen.model()
    with pytest.warns(UserWarning, match=r"50 tokens, .* trained with 52, so rows were appended .*\(new rows: 2\)"):
        report = load_adapter(model, tmp_path)
    assert report.base == SAME
    assert_close(run(model, GIVEN), wanted, FP32)
    assert model.config.vocab_size == 52
    assert model.get_input_embeddings().num_embeddings == model.get_output_embeddings().out_features == 52
    with disable(model):
        assert_close(run(model, OLD)[..., :50], run(specimen.model(), OLD), FP32)
    merge_and_unload(model)
    assert_close(run(model, GIVEN), wanted, FP32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@TIED_ONES
def test_onto_a_base_that_was_grown_with_other_numbers(specimen: Specimen, tmp_path: Path) -> None:
    wanted = trained(specimen, tmp_path, **ROWS)
    model = grown(specimen, seed=77)
    assert load_adapter(model, tmp_path).base == SAME
    assert_close(run(model, GIVEN), wanted, FP32)


@pytest.mark.parametrize(
    ("specimen", "fields"),
    [
        (TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (LLAMA, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (LLAMA, {"trainable_token_indices": {"embed_tokens": [50, 51], "lm_head": [50, 51]}}),
    ],
    ids=str,
)
def test_other_ways_to_bring_them(specimen: Specimen, fields: dict[str, Any], tmp_path: Path) -> None:
    wanted = trained(specimen, tmp_path, **fields)
    for model in (specimen.model(), grown(specimen, seed=77)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert load_adapter(model, tmp_path).base == SAME
        assert_close(run(model, GIVEN), wanted, FP32)


def test_what_does_not_bring_them(tmp_path: Path) -> None:
    trained(TIED, tmp_path / "none")
    trained(TIED, tmp_path / "one", trainable_token_indices=[51])
    trained(LLAMA, tmp_path / "head", **ROWS)
    for specimen, folder in ((TIED, "none"), (TIED, "one"), (LLAMA, "head")):
        model = specimen.model()
        before, mark = snapshot(model), fingerprint(model)
        text = r"has 52 tokens, but this model has 50\. New tokens were added .*resize_token_embeddings\(52\).*trainable_token_"
        with pytest.raises(BaseMismatchError, match=text):
            load_adapter(model, tmp_path / folder)
        assert snapshot(model) == before
        assert fingerprint(model) == mark


def test_a_load_that_fails_takes_the_rows_off_again(tmp_path: Path) -> None:
    trained(TIED, tmp_path, **ROWS)
    model = TIED.model(seed=5)
    before = snapshot(model)
    with pytest.raises(BaseMismatchError, match="different weights"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before
    assert model.config.vocab_size == model.model.embed_tokens.num_embeddings == 50
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_onto_a_model_with_adapters(tmp_path: Path) -> None:
    trained(TIED, tmp_path, **ROWS)
    model = TIED.model()
    attach(model, TIED.config(), "other")
    with pytest.raises(BaseMismatchError, match="New tokens were added"):
        load_adapter(model, tmp_path)
    detach(model)
    with pytest.warns(UserWarning, match=r"rows were appended .*\(new rows: 2\)"):
        load_adapter(model, tmp_path)


def test_files_that_peft_wrote(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            grown(TIED), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **ROWS)
        )
        theirs.eval().save_pretrained(tmp_path)
        model = TIED.model()
        load_adapter(model, tmp_path)
    assert_close(run(model, GIVEN), run(theirs, GIVEN), FP32)
    with warnings.catch_warnings(), pytest.raises(AdapterFileError, match="rows 0 to 49"):
        warnings.simplefilter("ignore")
        untied = peft.get_peft_model(grown(LLAMA), peft.LoraConfig(r=2, target_modules=["q_proj"], **ROWS))
        untied.save_pretrained(tmp_path / "untied")
        load_adapter(LLAMA.model(), tmp_path / "untied")


@pytest.mark.parametrize("copied", ["score", "classification_head"], ids=str)
def test_a_head_that_the_adapter_brings_may_be_another_in_the_base(copied: str, tmp_path: Path) -> None:
    def base(seed: int) -> nn.Module:
        model = nn.Module()
        model.body = nn.Linear(4, 4)
        torch.nn.init.ones_(model.body.weight)
        torch.nn.init.ones_(model.body.bias)
        torch.manual_seed(seed)  # a head that is drawn at each start
        head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        head[1].running_mean.normal_()
        setattr(model, copied, head)
        return model

    model = base(1)
    attach(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=[copied], init_lora_weights=False))
    save_adapter(model, tmp_path)
    assert load_adapter(base(2), tmp_path).base == SAME
    other = base(2)
    torch.nn.init.constant_(other.body.bias, 1.5)
    with pytest.raises(BaseMismatchError, match=r"1 of .*body\.bias"):
        load_adapter(other, tmp_path)
