from __future__ import annotations

from lorakit.plan import SiteShape, catalogue


def test_a_tied_weight_counts_once() -> None:
    site = SiteShape("lm_head", "Linear", 100, 8, tied_to="wte")
    assert (site.weight_parameters, site.parameters) == (800, 0)
    assert SiteShape("c", "Conv1D", 12, 4, bias=True).parameters == 60


def test_a_site_is_found_by_path() -> None:
    shape = catalogue.published("gpt2")
    assert shape is not None
    sites = {site.path: site for site in shape.sites}
    assert sites["transformer.h.3.mlp.c_proj"].in_features == 3072
    assert "transformer.h.12.mlp.c_proj" not in sites


def test_the_blocks_of_a_model_are_in_order() -> None:
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
