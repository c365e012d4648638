from __future__ import annotations

from lorakit.architectures.layouts import block_of, role, short_roles


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


def test_blocks_are_named_by_their_first_number() -> None:
    assert block_of("decoder.block.3.layer.0.SelfAttention.q") == "decoder.block.3"
    assert block_of("lm_head") is None
