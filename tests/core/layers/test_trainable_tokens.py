"""Trainable token embeddings: in the model, on disk, merged and unmerged, and in the tied head."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit import LoraConfig
from lorakit.core import (
    attach,
    detach,
    disable,
    fingerprint,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    route,
    save_adapter,
    trainable_parameters,
    unmerge,
    use,
)
from lorakit.errors import AdapterFileError, ConfigError, MergeError, RouteError, TargetError

from ...laws.snapshots import same_bits, snapshot
from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import GPT2, LLAMA, T5, TIED, Specimen, base_tensors, output, randomise, run
from ..through_peft import through_peft

FP32 = torch.float32
INDICES = [7, 3, 20]
GIVEN = {"input_ids": torch.tensor([[7, 3, 20, 1], [1, 2, 4, 5], [3, 3, 7, 6], [8, 20, 9, 10]])}
BOTH = pytest.mark.parametrize("specimen", [LLAMA, TIED, GPT2], ids=str)
DELTA = ".token_adapter.trainable_tokens_delta"


def rows_of(specimen: Specimen, **fields: Any) -> LoraConfig:
    return specimen.config(**{"trainable_token_indices": INDICES, **fields})


def with_rows(specimen: Specimen, *names: str, **fields: Any) -> nn.Module:
    """A model with adapters whose rows, and factors, differ in every number."""
    model = specimen.model()
    for seed, name in enumerate(names or ("a",)):
        attach(model, rows_of(specimen, **fields), name)
        randomise(model, name, 40 + seed)
        move_rows(model, name, seed)
    return model


def move_rows(model: nn.Module, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(90 + seed)
    for path, parameter in trainable_parameters(model, name):
        if "trainable_tokens_delta" in path:
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator)


def table_of(model: nn.Module) -> Any:
    return model.get_input_embeddings()


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".token_adapter", ""): t.clone()
        for name, t in base_tensors(model).items()
        if "trainable_tokens" not in name
    }


@BOTH
def test_fresh_rows_change_no_bit(specimen: Specimen) -> None:
    model = specimen.model()
    attach(model, rows_of(specimen))
    assert same_bits(run(model, GIVEN), run(specimen.model(), GIVEN))


def test_the_formula() -> None:
    """Equation (91): what a table with those rows in it would give, looked up and read out."""
    model = with_rows(TIED, target_modules=["q_proj"])
    rows = table_of(model).token_adapter.trainable_tokens_delta["a"]
    W = TIED.model().model.embed_tokens.weight.detach().clone()
    W[INDICES] = rows.detach()
    x, h = GIVEN["input_ids"], torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    assert same_bits(table_of(model)(x), F.embedding(x, W, padding_idx=0))
    assert_close(model.lm_head(h), F.linear(h, W), FP32)
    assert same_bits(table_of(model).weight.detach(), W)
    with disable(model):
        assert table_of(model).weight is table_of(model).original_module.weight
    plain = LLAMA.model()
    attach(plain, rows_of(LLAMA))
    assert not hasattr(plain.lm_head, "token_adapter")


@BOTH
def test_only_those_rows_are_trained_and_have_the_gradients_of_a_table(specimen: Specimen) -> None:
    model = with_rows(specimen)
    shares = {name: p.numel() for name, p in trainable_parameters(model, "a") if "trainable_tokens" in name}
    assert list(shares.values()) == [3 * table_of(model).weight.shape[1]]
    output(model, GIVEN).pow(2).mean().backward()
    (found,) = [p.grad for name, p in trainable_parameters(model, "a") if "trainable_tokens" in name]
    plain = specimen.model(seed=99)
    plain.load_state_dict(merged_state_dict(model, "a"))
    plain.zero_grad()
    output(plain, GIVEN).pow(2).mean().backward()
    assert_close(found, plain.get_input_embeddings().weight.grad[INDICES], FP32)
    assert table_of(model).original_module.weight.grad is None


def test_adapters_apart_together_and_in_one_batch() -> None:
    model = TIED.model()
    for seed, (name, indices) in enumerate({"a": [7, 3], "b": [20, 9], "c": [3, 1], "plain": None}.items()):
        attach(model, TIED.config(trainable_token_indices=indices), name)
        randomise(model, name, seed)
        move_rows(model, name, seed)
    names = ["a", "b", "c", "plain", None]
    answers = {}
    for name in names:
        with use(model, name) if name else disable(model):
            answers[name] = run(model, GIVEN)
    for one, other in itertools.combinations(names, 2):
        assert_differs(answers[one], answers[other], FP32)
    assert same_bits(answers[None], run(TIED.model(), GIVEN))
    for rows in (["a", "b", None, "c"], ["plain", "c", "a", "plain"], [None] * 4):
        with route(model, rows):
            mixed = run(model, GIVEN)
        assert_close(mixed, torch.stack([answers[name][i] for i, name in enumerate(rows)]), FP32)
    with use(model, "a", "b"):
        together = run(model, GIVEN)
    with use(model, "b", "a"):
        assert_close(run(model, GIVEN), together, FP32)
    with use(model, "a", "c"), pytest.raises(RouteError, match="a and c are active together, and both train row 3"):
        run(model, GIVEN)
    text = r"number of rows in the route \(3\) does not match the input of a module with trainable tokens"
    with route(model, ["a"] * 3), pytest.raises(RouteError, match=text):
        run(model, GIVEN)


@BOTH
def test_merged_is_unmerged_and_the_bits_come_back(specimen: Specimen) -> None:
    plain = bits(specimen.model())
    model = with_rows(specimen, "a", target_modules=list(specimen.targets))
    attach(model, rows_of(specimen, trainable_token_indices=[1, 2]), "b")
    randomise(model, "b", 1)
    move_rows(model, "b", 1)
    mark, wanted = fingerprint(model), run(model, GIVEN)
    with use(model, "b"):
        other = run(model, GIVEN)
    with use(model, "a", "b"):
        both = run(model, GIVEN)
    with disable(model):
        base = run(model, GIVEN)
    assert merge(model, "a").kept_bytes > 0
    assert_close(run(model, GIVEN), wanted, FP32)
    assert fingerprint(model) == mark
    with use(model, "b"):
        assert_close(run(model, GIVEN), other, FP32)
    with disable(model):
        assert same_bits(run(model, GIVEN), base)
    with route(model, ["a", None, "b", "a"]):
        mixed = run(model, GIVEN)
    assert_close(mixed, torch.stack([wanted[0], base[1], other[2], wanted[3]]), FP32)
    merge(model, "b")
    with use(model, "a", "b"):
        assert_close(run(model, GIVEN), both, FP32)
    tensors = merged_state_dict(model, "a", "b")
    fresh = specimen.model(seed=99)
    fresh.load_state_dict(tensors)
    assert_close(run(fresh, GIVEN), both, FP32)
    unmerge(model, "a")
    unmerge(model, "b")
    detach(model)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in bits(model).items())
    assert type(table_of(model)) is nn.Embedding


@BOTH
def test_merge_and_unload_leaves_a_plain_model(specimen: Specimen) -> None:
    model = with_rows(specimen)
    wanted = run(model, GIVEN)
    merge_and_unload(model, "a")
    assert_close(run(model, GIVEN), wanted, FP32)
    assert list(model.state_dict()) == list(specimen.model().state_dict())
    tied = specimen.model().get_output_embeddings().weight is specimen.model().get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (specimen is not LLAMA)
    assert not tied or specimen is not LLAMA


def test_what_a_merge_refuses() -> None:
    model = with_rows(LLAMA, "a")
    attach(model, rows_of(LLAMA, trainable_token_indices=[3]), "b")
    merge(model, "a")
    with pytest.raises(
        MergeError,
        match=r"Token indices of adapter b are already defined and would result in undefined merging behavior: a",
    ):
        merge(model, "b")
    model = with_rows(LLAMA, "a")
    table_of(model).token_adapter.trainable_tokens_delta["a"].data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(MergeError, match=r"rows of a at model.embed_tokens contain NaN"):
        merge(model, "a")
    assert snapshot(model) == before


def test_rows_that_were_merged_for_good() -> None:
    model = LLAMA.model()
    attach(model, rows_of(LLAMA, target_modules=["q_proj"]), "a")
    move_rows(model, "a")
    attach(model, LLAMA.config(target_modules=["v_proj"]), "b")
    merge(model, "a", keep_base=False)
    with use(model, "b"), pytest.raises(MergeError, match=r"did not keep the base's values \(keep_base=False\)"):
        run(model, GIVEN)
    with pytest.raises(MergeError, match="keep_base=False"):
        unmerge(model, "a")


def test_tables_by_name_and_apart() -> None:
    model = TIED.model()
    attach(model, rows_of(TIED, trainable_token_indices={"lm_head": [1, 2], "embed_tokens": [3, 4]}))
    head, table = model.lm_head.token_adapter, table_of(model).token_adapter
    assert (head.token_indices, table.token_indices) == ({"default": [1, 2]}, {"default": [3, 4]})
    assert head.trainable_tokens_delta is not table.trainable_tokens_delta
    move_rows(model, "default")
    wanted = run(model, GIVEN)
    with pytest.raises(
        MergeError, match=r"shares its weight with lm_head.weight, which does not use its trainable tokens.*untie=True"
    ):
        merge(model)
    merge(model, untie=True)
    assert_close(run(model, GIVEN), wanted, FP32)
    unmerge(model)
    assert model.lm_head.original_module.weight is table_of(model).original_module.weight
    model = TIED.model()
    attach(model, rows_of(TIED, trainable_token_indices={"lm_head": [1, 2], "model.embed_tokens": [1, 2]}))
    assert model.lm_head.follows
    assert model.lm_head.token_adapter.trainable_tokens_delta is table_of(model).token_adapter.trainable_tokens_delta


def test_t5_shares_one_table_three_times() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    attach(model, LoraConfig(r=2, target_modules=["q"], trainable_token_indices={"shared": [0, 1, 3]}))
    move_rows(model, "default")
    x = torch.tensor([[0, 1, 2, 3]])
    tables = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)
    assert all(same_bits(table(x), model.shared(x)) for table in tables)
    assert_close(model.lm_head(torch.eye(16)).T[:4], model.shared(x)[0], FP32)
    merge_and_unload(model)
    assert model.lm_head.weight is model.shared.weight is model.decoder.embed_tokens.weight


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"trainable_token_indices": [50]}, "contains 50, but the weight has rows 0 to 49.*resize_token_embeddings"),
        ({"trainable_token_indices": [-1]}, "contains -1"),
        ({"trainable_token_indices": [1, 1]}, "expected one or more distinct integers"),
        ({"trainable_token_indices": []}, "one or more"),
        (
            {"trainable_token_indices": {"embed_token": [1]}},
            r"Target modules \{'embed_token'\} not found in the base model.*nearest: embed_tokens",
        ),
        ({"trainable_token_indices": {"norm": [1]}}, "names 'model.norm', a LlamaRMSNorm"),
        ({"modules_to_save": ["embed_tokens"]}, "The embedding layer is already marked to be trained fully"),
        ({"target_modules": ["embed_tokens"]}, "an adapter applies LoRA to this module or saves a copy of it"),
    ],
    ids=str,
)
def test_what_is_refused(fields: dict[str, Any], text: str) -> None:
    model = LLAMA.model()
    before = snapshot(model)
    with pytest.raises((ConfigError, TargetError), match=text):
        attach(model, rows_of(LLAMA, **fields))
    assert snapshot(model) == before


def test_other_adapters_where_rows_stand() -> None:
    model = with_rows(TIED, "a")
    with pytest.raises(TargetError, match="is a TrainableTokens, which LoRA does not support"):
        attach(model, TIED.config(target_modules=["embed_tokens"]), "b")
    with pytest.raises(TargetError, match="contains modules of another adapter") as error:
        attach(model, TIED.config(modules_to_save=["lm_head"]), "b")
    assert (error.value.where, error.value.field) == ("lm_head", "modules_to_save")
    model = TIED.model()
    attach(model, TIED.config(modules_to_save=["lm_head"]), "a")
    with pytest.raises(TargetError, match="cannot be applied to lm_head"):
        attach(model, rows_of(TIED), "b")
    model = with_rows(TIED, "a")
    with pytest.raises(ConfigError, match="rows of lm_head differently"):
        attach(model, rows_of(TIED, trainable_token_indices={"lm_head": [1]}), "b")


@BOTH
def test_saved_and_loaded_by_both(specimen: Specimen, tmp_path: Path) -> None:
    model = with_rows(specimen, "a", "b", target_modules=list(specimen.targets))
    wanted = run(model, GIVEN)
    save_adapter(model, tmp_path / "ours", "a")
    names = [name for name in load_file(tmp_path / "ours" / "adapter_model.safetensors") if DELTA in name]
    assert len(names) == 1
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["trainable_token_indices"] == INDICES
    fresh = specimen.model()
    load_adapter(fresh, tmp_path / "ours", "x")
    assert same_bits(run(fresh, GIVEN), wanted)
    theirs, _ = through_peft(tmp_path, specimen.model, lambda made: run(made, GIVEN), wanted)
    twin = copy.deepcopy(fresh)
    detach(fresh)
    assert same_bits(run(twin, GIVEN), wanted)
    assert {n for n in dict(theirs.named_parameters()) if DELTA in n} == {
        f"base_model.model.{n}".replace(".a", ".default")
        for n, _ in model.named_parameters()
        if n.endswith(f"{DELTA}.a")
    }


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    save_adapter(with_rows(LLAMA, "a"), tmp_path, "a")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for indices, text in (
        ([1], "has shape .3, 16., expected .1, 16."),
        ([99], "contains 99, but the weight has rows 0 to 49"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": indices}))
        with pytest.raises(AdapterFileError, match=text):
            load_adapter(LLAMA.model(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": None}))
    with pytest.raises(AdapterFileError, match=r"unexpected .*trainable_tokens_delta"):
        load_adapter(LLAMA.model(), tmp_path)


def test_scaled_padded_and_shortened_tables() -> None:
    """Scale, padding and max_norm of an embedding also apply to trainable token embeddings."""

    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.embed_scale

    for table in (Scaled(20, 4), nn.Embedding(20, 4, padding_idx=3), nn.Embedding(20, 4, max_norm=0.5)):
        model = nn.Sequential()
        model.add_module("embed", table)
        model.add_module("out", nn.Linear(4, 4))
        whole = copy.deepcopy(model)
        attach(model, LoraConfig(r=2, target_modules=["out"], trainable_token_indices={"embed": [3, 5]}))
        move_rows(model, "default")
        with torch.no_grad():
            whole.embed.weight[[3, 5]] = model.embed.token_adapter.trainable_tokens_delta["default"]
        x = torch.tensor([[3, 5, 7, 3]])
        assert_close(model(x), whole(x), FP32)
        model(x).pow(2).sum().backward()
        whole(x).pow(2).sum().backward()
        found = model.embed.token_adapter.trainable_tokens_delta["default"].grad
        if table.max_norm is None:
            assert_close(found, whole.embed.weight.grad[[3, 5]], FP32)


def test_quantities_of_a_model_without_a_name_for_its_embedding() -> None:
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(20, 4))
    model.add_module("out", nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"Target modules \{'embed_tokens'\} not found in the base model"):
        attach(model, LoraConfig(r=2, target_modules=["out"], trainable_token_indices=[1]))


def test_architectures_whose_embedding_is_found() -> None:
    model = T5.model()
    attach(model, T5.config(trainable_token_indices=[1, 2]))
    assert model.shared.token_adapter.token_indices == {"default": [1, 2]}
