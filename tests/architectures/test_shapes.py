from __future__ import annotations

from lorakit.architectures.shapes import block_of, role, short_roles
from lorakit.plan import SiteShape, catalogue


def test_a_tied_weight_counts_once() -> None:
    site = SiteShape("lm_head", "Linear", 100, 8, tied_to="wte")
    assert (site.weight_parameters, site.parameters) == (800, 0)
    assert SiteShape("c", "Conv1D", 12, 4, bias=True).parameters == 60


def test_role_forgets_the_layer() -> None:
    assert role("transformer.h.11.attn.c_proj") == "transformer.h.*.attn.c_proj"
    assert role("lm_head") == "lm_head"


def test_short_roles_are_the_shortest_that_differ() -> None:
    paths = ["h.0.attn.c_proj", "h.1.attn.c_proj", "h.0.mlp.c_proj", "h.0.attn.c_attn"]
    assert short_roles(paths) == {
        "h.*.attn.c_proj": "attn.c_proj",
        "h.*.mlp.c_proj": "mlp.c_proj",
        "h.*.attn.c_attn": "c_attn",
    }


def test_short_roles_of_one_that_ends_another() -> None:
    assert short_roles(["proj", "a.proj"]) == {"proj": "proj", "a.proj": "a.proj"}


def test_a_site_is_found_by_path() -> None:
    shape = catalogue.published("gpt2")
    assert shape is not None
    sites = {site.path: site for site in shape.sites}
    assert sites["transformer.h.3.mlp.c_proj"].in_features == 3072
    assert "transformer.h.12.mlp.c_proj" not in sites


def test_blocks_are_named_by_their_first_number() -> None:
    assert block_of("decoder.block.3.layer.0.SelfAttention.q") == "decoder.block.3"
    assert block_of("lm_head") is None
    shape = catalogue.published("gpt2")
    assert shape is not None
    assert shape.blocks == tuple(f"transformer.h.{layer}" for layer in range(12))


def test_encoder_and_decoder_have_blocks_of_their_own() -> None:
    import torch
    import transformers

    from lorakit import hub

    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=2, num_decoder_layers=3))
    assert len(hub.shape_of_module(model, "t5", "here").blocks) == 5
