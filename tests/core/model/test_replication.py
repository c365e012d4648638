"""`layer_replication`: repeated layers with shared weights and separate adapters; detaching restores the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.errors import AdapterFileError, BaseMismatchError, ConfigError, LorakitError, MergeError, TargetError

RANGES = [(0, 2), (1, 3)]
X = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(3))


def llama(layers: int = 3, tied: bool = False) -> Any:
    """A small Llama, the same every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    words = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": tied}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **words, initializer_range=0.2)).eval()


def config(**fields: Any) -> LoraConfig:
    """q and down in layers 0, 1, 1, 2."""
    words = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "layer_replication": RANGES}
    return LoraConfig(**{**words, **fields})


def adapted(*names: str, **fields: Any) -> Any:
    """A stacked Llama with adapters that differ in every number."""
    model = llama()
    for seed, name in enumerate(names):
        core.attach(model, config(**fields), name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in core.trainable_parameters(model, name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def logits(model: Any) -> Tensor:
    """Its output, without a graph."""
    with torch.no_grad():
        found: Tensor = model(X).logits
        return found


def by_hand(model: Any, name: str) -> Tensor:
    """The output of a plain Llama of four layers, each with the weights of its original and its own update."""
    plain, base = llama(4), llama()
    state = base.state_dict()
    for index, source in enumerate([0, 1, 1, 2]):
        for key in [key for key in state if key.startswith(f"model.layers.{source}.")]:
            plain.state_dict()[key.replace(f"layers.{source}.", f"layers.{index}.")].copy_(state[key])
    for key in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        plain.state_dict()[key].copy_(state[key])
    for site in core.sites(model):
        A, B = site.layer.lora_A[name].weight, site.layer.lora_B[name].weight
        plain.get_submodule(site.path).weight.data += 3 * B @ A
    return logits(plain)


def test_layers_share_weights_and_have_adapters_of_their_own() -> None:
    model = adapted("a")
    layers = model.model.layers
    assert len(layers) == model.config.num_hidden_layers == 4
    weights = [layer.self_attn.q_proj.base_layer.weight for layer in layers]
    assert weights[1] is weights[2]
    assert weights[0] is not weights[1]
    factors = {id(layer.self_attn.q_proj.lora_A["a"].weight) for layer in layers}
    assert len(factors) == 4
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]


def test_copies_of_a_layer_are_no_tied_modules() -> None:
    model = llama()
    assert core.attach(model, config()).notes == ()
    core.detach(model)
    core.attach(model, config(ensure_weight_tying=True))
    assert len({id(site.layer.lora_A["default"].weight) for site in core.sites(model)}) == 8


def test_the_output_is_that_of_the_written_out_model() -> None:
    model = adapted("a", "b")
    for name in ("a", "b"):
        with core.use(model, name):
            torch.testing.assert_close(logits(model), by_hand(model, name), atol=1e-5, rtol=1e-5)


def test_gradients_reach_each_copys_own_factors_and_not_the_base() -> None:
    model = adapted("a")
    model(X).logits.square().mean().backward()
    trained = core.trainable_parameters(model, "a")
    assert all(bool(parameter.grad.any()) for _, parameter in trained)  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in llama_parameters(model))


def llama_parameters(model: Any) -> list[nn.Parameter]:
    """The base's own."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" not in name]


def test_generation_with_a_cache_is_that_without() -> None:
    model = adapted("a")
    words = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(X, use_cache=True, **words), model.generate(X, use_cache=False, **words))


def test_the_last_detach_gives_list_numbers_and_bits_back() -> None:
    model = llama()
    y, bits, layers = logits(model), copy.deepcopy(model.state_dict()), model.model.layers
    core.attach(model, config(), "a")
    core.attach(model, config(), "b")
    core.detach(model, "a")
    assert len(model.model.layers) == 4
    core.detach(model)
    assert model.model.layers is layers
    assert model.config.num_hidden_layers == 3
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), y)


@pytest.mark.parametrize(
    ("fields", "error", "what"),
    [
        ({"layer_replication": [(0, 9)]}, ConfigError, "(0, 9)"),
        ({"layer_replication": [(2, 2)]}, ConfigError, "(2, 2)"),
        ({"target_modules": ["nothing"]}, TargetError, "nothing"),
    ],
    ids=["past the end", "empty", "no target"],
)
def test_a_refused_call_leaves_the_layers_as_they_were(fields: Any, error: type[LorakitError], what: str) -> None:
    model = llama()
    layers = model.model.layers
    with pytest.raises(error) as caught:
        core.attach(model, config(**fields))
    assert caught.value.what is not None and what in caught.value.what
    assert model.model.layers is layers
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("other", [None, [(0, 3)]], ids=["none", "other ranges"])
def test_one_model_has_one_way_of_stacking(other: Any) -> None:
    model = adapted("a")
    with pytest.raises(ConfigError, match=r"the adapters on this model have \[\[0, 2\], \[1, 3\]\]"):
        core.attach(model, config(layer_replication=other), "b")
    plain = llama()
    core.attach(plain, config(layer_replication=None), "a")
    with pytest.raises(ConfigError, match="the adapters on this model have none"):
        core.attach(plain, config(), "b")
    assert len(plain.model.layers) == 3


def test_merging_is_refused_and_unties_with_a_word() -> None:
    model = adapted("a")
    y, fresh = logits(model), None
    with core.disable(model):
        fresh = logits(model)
    with pytest.raises(MergeError, match=r"shares its weight with model\.layers\.2\.self_attn\.q_proj\.weight"):
        core.merge(model)
    bits = copy.deepcopy(llama().state_dict())
    core.merge(model, untie=True)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    with core.disable(model):
        assert torch.equal(logits(model), fresh)
    core.unmerge(model)
    assert model.model.layers[1].self_attn.q_proj.weight is model.model.layers[2].self_attn.q_proj.weight
    assert torch.equal(logits(model), y)
    core.detach(model)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in model.state_dict().items())


def test_copies_that_share_nothing_merge_without_a_word() -> None:
    model = adapted("a", layer_replication=[(1, 3), (0, 1)])
    y, known = logits(model), core.fingerprint(model)
    core.merge(model)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    assert core.fingerprint(model) == known == core.fingerprint(llama())


def test_unloaded_it_is_a_plain_model_of_its_own_weights(tmp_path: Path) -> None:
    model = adapted("a")
    y = logits(model)
    core.merge_and_unload(model, untie=True)
    torch.testing.assert_close(logits(model), y, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 4
    torch.testing.assert_close(logits(again), y, atol=1e-5, rtol=1e-5)


def test_saved_is_loaded_onto_the_plain_base_and_beside_another(tmp_path: Path) -> None:
    model = adapted("a", "b")
    y = logits(model)
    core.save_adapter(model, tmp_path, "a")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layer_replication"] == [[0, 2], [1, 3]]
    assert len(core.inspect_adapter(tmp_path).sites) == 8
    fresh = llama()
    report = core.load_adapter(fresh, tmp_path, "a")
    assert report.base == "same"
    assert torch.equal(logits(fresh), y)
    core.load_adapter(fresh, tmp_path, "c")
    with core.use(fresh, "c"):
        assert torch.equal(logits(fresh), y)


def test_what_does_not_load_leaves_the_layers_as_they_were(tmp_path: Path) -> None:
    core.save_adapter(adapted("a"), tmp_path, "a")
    other = llama(4)
    with pytest.raises(BaseMismatchError, match="made for a different base"):
        core.load_adapter(other, tmp_path)
    tampered = json.loads((tmp_path / "adapter_config.json").read_text())
    tampered["layer_replication"] = [[0, 3]]
    (tmp_path / "adapter_config.json").write_text(json.dumps(tampered))
    model = llama()
    with pytest.raises(AdapterFileError, match=r"unexpected site model\.layers\.3"):
        core.load_adapter(model, tmp_path)
    assert model.config.num_hidden_layers == len(model.model.layers) == 3


def test_a_deep_copy_has_its_own_list_to_go_back_to() -> None:
    model = adapted("a")
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    core.detach(copied)
    assert len(copied.model.layers) == 3
    assert len(model.model.layers) == 4
    assert torch.equal(logits(copied), logits(llama()))


def test_a_model_that_is_cast_meanwhile_goes_back_cast() -> None:
    model = adapted("a", layer_replication=[(0, 1), (0, 1)])  # layers 1 and 2 are left out
    model.to(torch.bfloat16)
    core.detach(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def bert() -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return BertModel(BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=32)).eval()


def falcon() -> Any:
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return FalconForCausalLM(FalconConfig(**sizes)).eval()


@pytest.mark.parametrize(("make", "target"), [(bert, "query"), (falcon, "query_key_value")], ids=["bert", "falcon"])
def test_other_layouts_are_found(make: Any, target: str) -> None:
    model = make()
    core.attach(model, LoraConfig(target_modules=[target], layer_replication=[(0, 2), (0, 2)]))
    assert len(core.sites(model)) == model.config.num_hidden_layers == 4
    model(X)
    core.detach(model)
    assert model.config.num_hidden_layers == 2


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="Could not locate the layers attribute in the model, a Sequential"):
        core.attach(model, LoraConfig(target_modules=["0"], layer_replication=[(0, 1)]))


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    model = llama()
    model.model.layers[1].forward = model.model.layers[1].forward  # as accelerate's hooks leave it
    with pytest.raises(ConfigError, match="instance-level forward"):
        core.attach(model, config())
