"""Trainable tokens of several adapters are combined by their changes of the base, or rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit.peft as ours
from lorakit.core import attach, combine, combine_folders, load_adapter, merge, rescale, save_adapter, unmerge, use
from lorakit.errors import AdapterError

from ...laws.zoo import TIED, randomise, run

GIVEN = TIED.given()
ROWS = {"trainable_token_indices": [3, 7], "target_modules": ["q_proj"]}


def several(*names: str, **fields: Any) -> Any:
    model: Any = TIED.model()
    for seed, name in enumerate(names):
        attach(model, TIED.config(**{**ROWS, **fields}), name)
        randomise(model, name, seed)
    return model


def rows_of(model: Any, name: str) -> torch.Tensor:
    found: torch.Tensor = model.model.embed_tokens.token_adapter.trainable_tokens_delta[name].detach()
    return found


@pytest.mark.parametrize("merged", [False, True])
def test_the_base_counts_once(merged: bool) -> None:
    model = several("a", "b")
    plain: Any = TIED.model()
    table = plain.model.embed_tokens.weight.detach()[[3, 7]]
    if merged:  # merged rows are not part of the base
        merge(model, "a")
    combine(model, ["a", "b"], [0.5, 1.5], "sum", way="cat")
    wanted = table + 0.5 * (rows_of(model, "a") - table) + 1.5 * (rows_of(model, "b") - table)
    torch.testing.assert_close(rows_of(model, "sum"), wanted)
    if merged:
        unmerge(model, "a")
    with use(model, "sum"):
        assert torch.isfinite(run(model, GIVEN)).all()


def test_a_mean_needs_no_base(tmp_path: Path) -> None:
    model = several("a", "b")
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        save_adapter(model, folder, folder.name)
    combine_folders(folders, [0.25, 0.75], tmp_path / "mean")
    load_adapter(model, tmp_path / "mean", "mean")
    torch.testing.assert_close(rows_of(model, "mean"), 0.25 * rows_of(model, "a") + 0.75 * rows_of(model, "b"))
    with pytest.raises(
        AdapterError, match=r"model.embed_tokens are combined with weights that add up to 2, so .* base"
    ):
        combine_folders(folders, [1.0, 1.0], tmp_path / "sum")
    combine_folders(folders, [1.0, 1.0], tmp_path / "sum", model=TIED.model())
    combine(model, ["a", "b"], [1.0, 1.0], "sum")
    load_adapter(model, tmp_path / "sum", "from-folders")
    torch.testing.assert_close(rows_of(model, "from-folders"), rows_of(model, "sum"))


def test_other_rows_have_no_combination() -> None:
    model = several("a")
    attach(model, TIED.config(**{**ROWS, "trainable_token_indices": [3, 8]}), "b")
    with pytest.raises(AdapterError, match=r"a and b train different tokens"):
        combine(model, ["a", "b"], [1.0, 1.0], "sum")
    assert "sum" not in model.model.embed_tokens.token_adapter.token_indices


def test_rows_that_one_adapter_alone_has_are_taken_as_they_are() -> None:
    model = several("a")
    attach(model, TIED.config(target_modules=["q_proj"]), "b")
    combine(model, ["a", "b"], [0.5, 0.5], "sum")
    torch.testing.assert_close(rows_of(model, "sum"), rows_of(model, "a"))
    rescale(model, "a", 0.5, "weaker")
    torch.testing.assert_close(rows_of(model, "weaker"), rows_of(model, "a"))


def test_add_weighted_adapter_with_rows() -> None:
    """PEFT silently leaves the rows of the new adapter equal to the base's."""
    config = ours.LoraConfig(r=2, task_type="CAUSAL_LM", **ROWS)
    model = ours.get_peft_model(TIED.model(), config, "a")
    model.add_adapter("b", config)
    for name in "ab":
        randomise(model, name, ord(name))
    inner: Any = model.get_base_model()
    for way in ("svd", "linear", "ties_svd", "cat"):
        density = 0.5 if way.startswith("ties") else None
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], way, combination_type=way, density=density)
        model.set_adapter(way)
        model.eval()(**GIVEN) if isinstance(GIVEN, dict) else run(inner, GIVEN)
        torch.testing.assert_close(rows_of(inner, way), (rows_of(inner, "a") + rows_of(inner, "b")) / 2)
