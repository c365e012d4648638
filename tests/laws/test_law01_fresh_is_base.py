"""Law 1: a new adapter changes no output, for every init that declares it."""

from __future__ import annotations

import pytest
import torch

from lorakit.core import attach
from lorakit.core.inits import init_named
from lorakit.core.variants import variant_named

from .snapshots import same_bits
from .tolerances import assert_close, assert_differs
from .zoo import ARCHITECTURES, EVERY_KIND, MIXTRAL, Case, Specimen, attach_fresh, cases, run


@pytest.mark.parametrize("case", cases())
def test_fresh_adapter_changes_nothing_where_the_init_declares_it(case: Case) -> None:
    model, given = case.specimen.model(case.dtype), case.specimen.given(case.dtype)
    before = run(model, given)
    attach_fresh(model, case.specimen, dtype=case.dtype, seed=1, **case.fields)
    after, init = run(model, given), init_named(case.init)
    if not init.is_identity or variant_named(case.variant).move is not None:
        assert not same_bits(after, before), (
            "an init or a variant that declares nothing must be seen, or the law is empty"
        )
    elif case.variant == "plain" and init.is_exact:
        assert same_bits(after, before)
    else:
        assert_close(after, before, case.dtype)


@pytest.mark.parametrize("specimen", [*ARCHITECTURES, MIXTRAL], ids=str)
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_architectures(specimen: Specimen, init: bool | str) -> None:
    model, given = specimen.model(), specimen.given()
    before = run(model, given)
    attach(model, specimen.config(init_lora_weights=init))
    assert same_bits(run(model, given), before)


@pytest.mark.parametrize(
    "fields", [{"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["linear"]}, {"use_rslora": True}]
)
def test_extras_change_nothing_when_fresh(fields: dict[str, object]) -> None:
    targets = ["embed", "conv"]
    model, given = EVERY_KIND.model(), EVERY_KIND.given()
    before = run(model, given)
    attach(model, EVERY_KIND.config(target_modules=targets, **fields))
    assert same_bits(run(model, given), before)


def test_random_init_is_seen() -> None:
    model, given = EVERY_KIND.model(), EVERY_KIND.given()
    before = run(model, given)
    attach(model, EVERY_KIND.config(init_lora_weights=False), seed=3)
    assert_differs(run(model, given), before, torch.float32)
