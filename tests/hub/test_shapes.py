import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.config import LoraConfig
from lorakit.errors import ModelError
from lorakit.hub import shape_of, shape_of_module
from lorakit.plan import catalogue, count


def test_a_catalogue_name_needs_no_torch() -> None:
    code = (
        "import sys; from lorakit.hub import shape_of; print(shape_of('gpt2').parameters, shape_of('smollm2').name); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "124439808 smollm2\nset()\n"


@pytest.mark.parametrize("name", ["gpt2", "bert-base-uncased", "SmolLM2-135M", "Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_a_config_gives_the_shape_of_the_catalogue(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig

    known = catalogue.published(name)
    assert known is not None
    config = AutoConfig.for_model(
        {"GPT2LMHeadModel": "gpt2", "BertModel": "bert"}.get(known.architecture, known.architecture[:5].lower()),
        **_sizes(known),
    )
    config.architectures = [known.architecture]
    config.dtype = known.dtype
    config.save_pretrained(tmp_path)
    for given in (tmp_path, tmp_path / "config.json"):
        shape = shape_of(given)
        different = {
            field.name: (getattr(shape, field.name), getattr(known, field.name))
            for field in dataclasses.fields(shape)
            if getattr(shape, field.name) != getattr(known, field.name)
        }
        if known.architecture == "BertModel":
            different.pop("tied", None)  # it has no output head, so the name has no meaning there
        assert set(different) <= {"name", "source", "published", "model_type"}, different
    assert sum(part.parameters for part in (*shape.sites, *shape.others)) == shape.parameters


def test_values_that_differ_between_layers_are_those_of_the_first(tmp_path: Path) -> None:
    import transformers

    if not hasattr(transformers, "Gemma4TextConfig"):
        pytest.skip("transformers without Gemma 4")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32}
    tables = {"vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    config = transformers.Gemma4TextConfig(hidden_size=32, num_hidden_layers=6, intermediate_size=48, **heads, **tables)
    config.architectures = ["Gemma4ForCausalLM"]
    config.save_pretrained(tmp_path)
    shape = shape_of(tmp_path / "config.json")
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (4, 2, 16)
    widths = [site.out_features for site in shape.sites if site.path.endswith("q_proj")]
    assert set(widths) == {4 * 16, 4 * 32} and widths[0] == 4 * 16


def _sizes(known: Any) -> dict[str, Any]:
    if known.architecture == "GPT2LMHeadModel":
        return {}
    sizes = {
        "vocab_size": known.vocab,
        "hidden_size": known.hidden,
        "num_hidden_layers": known.layers,
        "num_attention_heads": known.heads,
        "intermediate_size": known.intermediate,
        "max_position_embeddings": known.positions,
    }
    if known.gated:
        sizes |= {
            "num_key_value_heads": known.kv_heads,
            "head_dim": known.head_dim,
            "tie_word_embeddings": known.tied,
        }
    return sizes


def test_a_sequence_to_sequence_model() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100)
    shape = shape_of_module(T5ForConditionalGeneration(config), "t5", "here")
    assert (shape.hidden, shape.layers, shape.heads, shape.head_dim, shape.intermediate) == (32, 2, 4, 8, 64)
    assert not shape.causal
    assert sum(part.parameters for part in (*shape.sites, *shape.others)) == shape.parameters
    assert {site.tied_to for site in shape.sites if site.path.endswith(("embed_tokens", "lm_head"))} == {"shared"}
    assert not next(site for site in shape.sites if site.path == "lm_head").dense


def test_all_linear_takes_a_classifiers_head_unless_the_task_copies_it(tiny_model_directory: Path) -> None:
    """As in attaching and in PEFT, only the output embedding is left out by default."""
    from lorakit.hub import load_model

    shape = shape_of_module(load_model(tiny_model_directory, task="classification"), "tiny", "here")
    paths = [site.path for site in count(shape, LoraConfig(target_modules="all-linear")).sites]
    assert "score" in paths and "model.layers.0.mlp.up_proj" in paths
    counted = count(shape, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert "score" not in [site.path for site in counted.sites] and list(counted.saved) == ["score"]


def test_a_config_that_names_no_class_and_one_that_is_no_model(tiny_model_directory: Path) -> None:
    path = tiny_model_directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "architectures"}))
    shape = shape_of(tiny_model_directory)
    assert (shape.name, shape.architecture, shape.tied) == ("tiny-llama", "LlamaForCausalLM", True)
    path.write_text(json.dumps({**config, "model_type": "no-such-kind"}))
    with pytest.raises(ModelError, match="tiny-llama: the model cannot be loaded"):
        shape_of(tiny_model_directory)
    path.write_text("{")
    with pytest.raises(ModelError, match="the model cannot be loaded"):
        shape_of(tiny_model_directory)


def test_no_storage_is_taken(tmp_path: Path) -> None:
    """A model of 70 billion parameters has a shape on any machine."""
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128_256,
    ).save_pretrained(tmp_path)
    assert shape_of(tmp_path).parameters == 70_553_706_496


def test_positions_that_no_token_can_use() -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.RobertaConfig(**sizes, vocab_size=40, max_position_embeddings=34, pad_token_id=1)
    assert shape_of_module(transformers.RobertaForMaskedLM(config), "tiny", "here").positions == 32
    config = transformers.BertConfig(**sizes, vocab_size=40, max_position_embeddings=34)
    assert shape_of_module(transformers.BertForMaskedLM(config), "tiny", "here").positions == 34
