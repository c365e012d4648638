"""Law 4, without PEFT: a loaded adapter is bit-identical to the saved one, also on a new base in another process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.core import attach, check_adapter, load_adapter, merge, save_adapter, trainable_parameters, use
from lorakit.core.inits import init_named

from .snapshots import same_bits, snapshot
from .tolerances import assert_close, assert_differs
from .zoo import ARCHITECTURES, BERT, EVERY_KIND, LINEARS, MIXTRAL, TIED, Case, Specimen, cases, run, with_adapters


@pytest.mark.parametrize("case", cases())
def test_round_trip(case: Case, tmp_path: Path) -> None:
    model, given = case.adapted("a", "b"), case.specimen.given(case.dtype)
    expected = {}
    for name in ("a", "b"):
        with use(model, name):
            expected[name] = run(model, given)
        save_adapter(model, tmp_path / name, name)
        check_adapter(tmp_path / name)
    assert_differs(expected["a"], expected["b"], case.dtype)
    fresh, moved = case.specimen.model(case.dtype), init_named(case.init).changes_base
    if case.init == "loftq":
        return  # test_law_moved_bases.py
    assert load_adapter(fresh, tmp_path / "b", "b").base == "same"
    assert load_adapter(fresh, tmp_path / "a", "other").warnings == ()
    for name, saved in (("b", "b"), ("other", "a")):
        with use(fresh, name):
            if moved and saved == "a":  # written as plain LoRA of twice the rank, for the unchanged base
                assert_close(run(fresh, given), expected[saved], case.dtype)
            else:
                assert same_bits(run(fresh, given), expected[saved])


@pytest.mark.parametrize("specimen", [*ARCHITECTURES, MIXTRAL, TIED], ids=str)
def test_architectures(specimen: Specimen, tmp_path: Path) -> None:
    model, given = with_adapters(specimen, "a"), specimen.given()
    save_adapter(model, tmp_path, "a")
    check_adapter(tmp_path)
    fresh = specimen.model()
    load_adapter(fresh, tmp_path, "a")
    assert same_bits(run(fresh, given), run(model, given))


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["classifier"]},
        {"task_type": "SEQ_CLS"},
        {"bias": "all", "modules_to_save": ["classifier", "pooler"]},
        {"use_rslora": True, "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3}},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.layer\.1\..*(query|key)"},
        {"target_modules": ["query"], "layers_to_transform": [1]},
        {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"]},
        {"target_modules": ["query", "word_embeddings"], "lora_dropout": 0.3},
    ],
    ids=str,
)
def test_every_field_that_shapes_an_adapter(fields: dict[str, object], tmp_path: Path) -> None:
    model, given = with_adapters(BERT, "a", **fields), BERT.given()
    expected = run(model, given)
    assert_differs(expected, run(BERT.model(), given), torch.float32)
    save_adapter(model, tmp_path, "a")
    fresh = BERT.model()
    load_adapter(fresh, tmp_path, "x", trainable=True)
    assert same_bits(run(fresh, given), expected)
    saved = [p for _, p in trainable_parameters(model, "a")]
    loaded = [p for _, p in trainable_parameters(fresh, "x")]
    assert len(saved) == len(loaded)
    assert all(same_bits(one, other) for one, other in zip(saved, loaded, strict=True))


def test_second_save_of_what_was_loaded_holds_the_same_weights(tmp_path: Path) -> None:
    model = with_adapters(BERT, "a", bias="all", modules_to_save=["classifier"])
    first = save_adapter(model, tmp_path / "1", "a")
    fresh = BERT.model()
    load_adapter(fresh, tmp_path / "1", "b")
    assert save_adapter(fresh, tmp_path / "2", "b").weights_sha256 == first.weights_sha256


def test_saving_leaves_the_model_alone_and_a_merged_adapter_is_saved_as_it_is(tmp_path: Path) -> None:
    model = with_adapters(EVERY_KIND, "a", "b")
    before = snapshot(model)
    unmerged = save_adapter(model, tmp_path / "1", "a")
    assert snapshot(model) == before
    merge(model, "a", "b")
    assert save_adapter(model, tmp_path / "2", "a").weights_sha256 == unmerged.weights_sha256


def test_the_bits_do_not_depend_on_what_else_sits_on_the_model(tmp_path: Path) -> None:
    alone = with_adapters(EVERY_KIND, "a")
    beside = with_adapters(EVERY_KIND, "a", "weight", "lora_A")
    one = save_adapter(alone, tmp_path / "1", "a").weights_sha256
    assert save_adapter(beside, tmp_path / "2", "a").weights_sha256 == one


@pytest.mark.parametrize("name", ["up", "act", "weight", "base_layer", "lora_A", "0", "modules_to_save", "embed"])
def test_an_adapter_named_like_a_module_loses_no_tensor(name: str, tmp_path: Path) -> None:
    model = LINEARS.model()
    attach(model, LINEARS.config(), name)
    from .zoo import randomise

    randomise(model, name, seed=5)
    save_adapter(model, tmp_path, name)
    fresh = LINEARS.model()
    load_adapter(fresh, tmp_path, "x")
    assert same_bits(run(fresh, LINEARS.given()), run(model, LINEARS.given()))
