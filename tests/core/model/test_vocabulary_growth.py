"""Embeddings resized for new tokens, and configs that train all new rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core import attach, disable, fingerprint, load_adapter, save_adapter, trainable_parameters
from lorakit.core.model.vocabulary import check_growth, grow_vocabulary, initialize_rows, with_trained_rows
from lorakit.core.optimizers import Rates, rates_by_name, trained_parts
from lorakit.errors import ModelError

from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import GPT2, LLAMA, TIED, Specimen, run

GIVEN = {"input_ids": torch.tensor([[50, 3, 51, 1], [1, 50, 4, 5]])}
OLD = {"input_ids": GIVEN["input_ids"] % 50}


@pytest.mark.parametrize("specimen", [TIED, LLAMA, GPT2], ids=str)
def test_rows_are_appended_and_nothing_else_changes(specimen: Specimen) -> None:
    model: Any = specimen.model()
    wanted, tied = run(model, OLD), model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert len(check_growth(model, 52)) == 2
    grow_vocabulary(model, 52)
    assert torch.equal(run(model, OLD)[..., :50], wanted)
    assert model.config.vocab_size == 52
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    for table in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert torch.allclose(table.weight[50:], table.weight[:50].mean(0).expand(2, -1), atol=1e-6)
    before = snapshot(model)
    grow_vocabulary(model, 51)
    grow_vocabulary(model, 52)
    assert snapshot(model) == before


@pytest.mark.parametrize("specimen", [TIED, LLAMA, GPT2], ids=str)
def test_new_rows_of_all_tables_are_trained_and_no_others(specimen: Specimen) -> None:
    model: Any = specimen.model()
    grow_vocabulary(model, 52)
    config = specimen.config()
    asked = with_trained_rows(config, model, [50, 51])
    assert config.trainable_token_indices is None
    tables = {"model.embed_tokens": [50, 51], "lm_head": [50, 51]}
    assert asked.trainable_token_indices == (tables if specimen is LLAMA else [50, 51])
    attach(model, asked)
    fresh = run(model, GIVEN)
    initialize_rows(model, "default", {50: [1, 2], 51: []})
    rows = [p for name, p in trainable_parameters(model) if "token_adapter" in name]
    assert len(rows) == (2 if specimen is LLAMA else 1)
    table = model.get_input_embeddings().original_module.weight
    assert torch.allclose(rows[0][0], table[1:3].mean(0), atol=1e-6)
    assert torch.equal(rows[0][1], table[51])
    assert not torch.equal(run(model, GIVEN), fresh)
    with disable(model):
        assert torch.equal(run(model, GIVEN), fresh)
    model(**GIVEN).logits.logsumexp(-1).sum().backward()
    assert all(bool((row.grad != 0).all()) for row in rows)
    assert table.grad is None


def test_rates_by_pattern_reach_the_rows() -> None:
    model = LLAMA.model()
    attach(model, with_trained_rows(LLAMA.config(), model, [3]))
    rates = rates_by_name(trained_parts(model), Rates(1.0, patterns={"embed_tokens": 2.0, "lm_head": 3.0}))
    of_rows = {name: rate for name, rate in rates.items() if "token_adapter" in name}
    assert sorted(of_rows.values()) == [2.0, 3.0]


def test_an_adapter_of_the_base_before_it_grew(tmp_path: Any) -> None:
    """Rows that were appended since do not make it another base; other numbers do."""
    model = TIED.model()
    attach(model, TIED.config(init_lora_weights=False))
    save_adapter(model, tmp_path)
    wanted = run(model, OLD)
    grown: Any = TIED.model()
    grow_vocabulary(grown, 60)
    assert load_adapter(grown, tmp_path).base == "same"
    assert torch.equal(run(grown, OLD)[..., :50], wanted)
    assert fingerprint(grown).vocabulary == 60
    other = TIED.model(seed=5)
    grow_vocabulary(other, 60)
    with pytest.raises(ValueError, match="has 50 tokens, but this model has 60"):
        load_adapter(other, tmp_path)


def test_an_adapter_with_new_tokens_on_a_base_that_grew_further(tmp_path: Any) -> None:
    model: Any = TIED.model()
    grow_vocabulary(model, 52)
    model.get_input_embeddings().weight.data[50:] = 7.0  # rows that the adapter brings are not compared
    attach(model, with_trained_rows(TIED.config(init_lora_weights=False), model, [*range(40), 50, 51]))
    save_adapter(model, tmp_path)
    wanted = run(model, GIVEN)
    grown = TIED.model()
    grow_vocabulary(grown, 55)
    assert load_adapter(grown, tmp_path).base == "same"
    assert_close(run(grown, GIVEN)[..., :52], wanted, torch.float32)


class Odd(nn.Module):
    """A model whose embedding is not all that has a place per token, or that does not say which it is."""

    def __init__(self, table: nn.Module | None, width: int = 4) -> None:
        super().__init__()
        self.table = table
        self.linear = nn.Linear(width, width)
        self.register_buffer("scores", torch.zeros(2, 10))

    def get_input_embeddings(self) -> nn.Module:
        if self.table is None:
            raise NotImplementedError
        return self.table


def test_what_cannot_grow() -> None:
    with pytest.raises(ModelError, match="resize_token_embeddings") as caught:
        grow_vocabulary(Odd(nn.Embedding(10, 4)), 11)
    assert caught.value.what == "Odd"
    for refused in (lambda m: grow_vocabulary(m, 11), lambda m: with_trained_rows(LoraConfig(), m, [1])):
        with pytest.raises(ModelError, match="input embedding") as caught:
            refused(Odd(None))
        assert caught.value.what == "Odd"
