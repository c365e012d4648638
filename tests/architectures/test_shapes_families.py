"""Rules of the layouts that no catalogue entry covers; test_catalogue compares the layouts with transformers."""

from __future__ import annotations

from lorakit.architectures.shapes import Sizes, llama, qwen2, qwen3


def test_head_dim_and_kv_heads_default_to_the_heads() -> None:
    shape = llama(Sizes(64, 1, 4, 100, 32, 128))
    assert (shape.head_dim, shape.kv_heads) == (16, 4)
    assert {s.path: s.out_features for s in shape.sites}["model.layers.0.self_attn.k_proj"] == 64


def test_a_head_dim_of_its_own() -> None:
    shape = qwen3(Sizes(64, 1, 4, 100, 32, 128, 2, 32))
    sites = {site.path: site for site in shape.sites}
    assert sites["model.layers.0.self_attn.q_proj"].out_features == 128
    assert sites["model.layers.0.self_attn.o_proj"].in_features == 128
    assert next(o.path for o in shape.others) == "model.layers.0.self_attn.q_norm"


def test_qwen2_has_biases_on_query_key_and_value_alone() -> None:
    shape = qwen2(Sizes(64, 1, 4, 100, 32, 128, 2))
    assert [s.path.rsplit(".", 1)[-1] for s in shape.sites if s.bias] == ["q_proj", "k_proj", "v_proj"]


def test_an_untied_head_is_counted() -> None:
    tied = llama(Sizes(64, 1, 4, 100, 32, 128))
    untied = llama(Sizes(64, 1, 4, 100, 32, 128, tied=False))
    assert untied.parameters - tied.parameters == 6400
