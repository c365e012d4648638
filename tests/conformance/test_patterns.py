"""`rank_pattern` and `alpha_pattern` give every site the rank, alpha and scale that the installed peft gives it."""

from __future__ import annotations

import copy
import re
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.targets.patterns import first_match

_SEGMENT = st.sampled_from(["a", "b", "ab", "0", "1", "10", "q_proj", "proj", "layers", "mlp"])
_PATH = st.lists(_SEGMENT, min_size=1, max_size=4).map(".".join)
_PIECE = st.sampled_from(
    [
        "a",
        "b",
        ".",
        "\\.",
        "*",
        ".*",
        "|",
        "(a|b)",
        "q_proj",
        "proj",
        "1",
        "\\d",
        "\\d+",
        "^",
        "$",
        "[01]",
        "?",
        "+",
        "a|b",
    ]
)


def _compiles(key: str) -> bool:
    try:
        re.compile(key)
        re.compile(f"(.*\\.)?({key})")
    except re.error:
        return False
    return True


_KEY = st.one_of(_PATH, st.lists(_PIECE, min_size=1, max_size=5).map("".join)).filter(_compiles)


@pytest.mark.costly(cases=0)
@settings(max_examples=1000, deadline=None)
@given(st.lists(_KEY, max_size=4, unique=True), _PATH)
def test_the_first_key_that_fits_is_that_of_peft(keys: list[str], path: str) -> None:
    pattern = {key: index for index, key in enumerate(keys)}
    assert first_match(pattern, path, -1) == pattern.get(get_pattern_key(list(pattern), path), -1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.mlp = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "down": nn.Linear(8, 8)})


def model() -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(12)), "q_proj": nn.Linear(8, 8)})


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("ranks", "alphas"),
    [
        ({"q_proj": 2}, {"q_proj": 3}),
        ({"^q_proj": 2}, {"mlp.q_proj": 5}),
        ({r"layers\.1\..*": 2, r"layers.1.q_proj": 3}, {r"layers\.(0|11)\.mlp\..*": 32}),
        ({"layers.1": 2, ".*": 6}, {"down|o_proj": 1}),
        ({"proj": 2, r"\d+\.q_proj": 3, "[a-z]_proj": 5}, {"layers.10.q_proj": 7, "0.q_proj": 9}),
    ],
)
@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
def test_ranks_alphas_and_scales_are_those_of_peft(ranks: Any, alphas: Any, rslora: bool) -> None:
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down"], "use_rslora": rslora}
    options |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    base = model()
    other = copy.deepcopy(base)
    core.attach(base, LoraConfig(**options), allow=("partial_targets",))
    peft.inject_adapter_in_model(peft.LoraConfig(**options), other)
    ours = {s.path: (s.layer.r, s.layer.lora_alpha, s.layer.scaling) for s in core.sites(base)}
    theirs = {n: (m.r, m.lora_alpha, m.scaling) for n, m in other.named_modules() if hasattr(m, "lora_A")}
    assert len(ours) == 49
    assert ours == theirs
