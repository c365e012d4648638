"""Name matching: dots are borders, everything must match something, and sentences say what a person should know."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from lorakit.config import LoraConfig
from lorakit.errors import ConfigError, NoTargetError, TargetError
from lorakit.targets.patterns import first_match, key_fits, names_path
from lorakit.targets.resolving import LARGE_RANK, SEVERAL_MODULES, Candidate, resolve


def linear(path: str, out: int = 8, size: int = 8, dense: bool = True, kind: str = "Linear") -> Candidate:
    return Candidate(path, kind, kind, dense, out, size)


def block(number: int) -> list[Candidate]:
    prefix = f"model.layers.{number}"
    return [
        Candidate(prefix, None, "Block"),
        Candidate(f"{prefix}.attn", None, "Attention"),
        linear(f"{prefix}.attn.q_proj"),
        linear(f"{prefix}.attn.v_proj"),
        linear(f"{prefix}.attn.o_proj"),
        linear(f"{prefix}.mlp.o_proj", 8, 32),
        Candidate(f"{prefix}.norm", None, "RMSNorm"),
    ]


MODEL = [
    Candidate("", None, "Model"),
    Candidate("model", None, "Inner"),
    linear("model.embed", 50, 8, dense=False, kind="Embedding"),
    Candidate("model.layers", None, "ModuleList"),
    *block(0), *block(1), *block(2),
    linear("head", 3, 8),
    linear("lm_head", 50, 8, dense=False),
]  # fmt: skip


def paths(**fields: Any) -> list[str]:
    return [match.path for match in resolve(MODEL, LoraConfig(**fields)).matches]


def in_layers(word: str, *layers: int) -> list[str]:
    return [f"model.layers.{number}.{word}" for number in layers]


def test_a_list_entry_is_a_path_or_its_end_after_a_dot() -> None:
    assert paths(target_modules=["attn.q_proj"]) == in_layers("attn.q_proj", 0, 1, 2)
    assert paths(target_modules=["q_proj"]) == in_layers("attn.q_proj", 0, 1, 2)
    assert paths(target_modules=["head"]) == ["head"]
    assert paths(target_modules=["model.layers.1.attn.q_proj"]) == in_layers("attn.q_proj", 1)
    assert names_path("a.b", "a.b") and names_path("b", "a.b")
    assert not names_path("b", "a.bb") and not names_path("b", "ab") and not names_path("a", "a.b")


def test_sites_come_in_the_models_order_whatever_the_lists() -> None:
    expected = ["model.layers.0.attn.q_proj", "model.layers.0.attn.v_proj", "model.layers.1.attn.q_proj"]
    assert paths(target_modules=["v_proj", "q_proj"])[:3] == expected


def test_a_string_is_a_regular_expression_for_the_whole_path() -> None:
    assert paths(target_modules=r"model\.layers\.[02]\.attn\.(q|v)_proj") == [
        path for number in (0, 2) for path in in_layers("attn.q_proj", number) + in_layers("attn.v_proj", number)
    ]
    with pytest.raises(TargetError, match="q_proj"):
        paths(target_modules="q_proj")
    with pytest.raises(ConfigError, match=r"target_modules: '\(q' is not a valid regular expression"):
        paths(target_modules="(q")


@pytest.mark.parametrize("word", ["all-linear", "All-Linear"])
def test_all_linear_is_every_dense_module(word: str) -> None:
    found = paths(target_modules=word)
    assert len(found) == 13 and "lm_head" not in found and "model.embed" not in found and "head" in found


def test_exclude_wins() -> None:
    assert paths(target_modules=["o_proj"], exclude_modules=["mlp.o_proj"]) == in_layers("attn.o_proj", 0, 1, 2)
    assert paths(target_modules=["q_proj"], exclude_modules=r".*\.1\..*") == in_layers("attn.q_proj", 0, 2)
    assert "head" not in paths(target_modules="all-linear", exclude_modules=["head"])


@pytest.mark.parametrize("layers", [1, [1], [1, 1]])
def test_layers(layers: Any) -> None:
    assert paths(target_modules=["q_proj"], layers_to_transform=layers) == in_layers("attn.q_proj", 1)
    assert paths(target_modules=["q_proj"], layers_to_transform=layers, layers_pattern="layers") == in_layers(
        "attn.q_proj", 1
    )


def test_a_layers_pattern_is_a_regular_expression() -> None:
    fields = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    assert paths(**fields, layers_pattern="(lay)ers|blocks") == in_layers("attn.q_proj", 1)
    with pytest.raises(ConfigError, match=r"layers_pattern: 'lay\(ers' is not a valid regular expression") as caught:
        paths(**fields, layers_pattern=["lay(ers"])
    assert (caught.value.fields["field"], caught.value.fields["what"]) == ("layers_pattern", "lay(ers")


def test_layers_of_exact_paths_and_of_a_list_at_the_top() -> None:
    """Where PEFT ignores the layers for a full name, or does not find them at the top."""
    assert paths(target_modules=in_layers("attn.q_proj", 1), layers_to_transform=[1]) == in_layers("attn.q_proj", 1)
    with pytest.raises(TargetError, match=r"'model\.layers\.0\.attn\.q_proj' matches only modules .*in other layers"):
        paths(target_modules=in_layers("attn.q_proj", 0, 1), layers_to_transform=[1])
    top = [Candidate("", None), linear("layers.0.q"), linear("layers.1.q")]
    assert [m.path for m in resolve(top, LoraConfig(target_modules=["q"], layers_to_transform=[1])).matches] == [
        "layers.1.q"
    ]


def test_rank_and_alpha_patterns() -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj", "o_proj"], rank_pattern={"mlp.o_proj": 2, "o_proj": 3}, alpha_pattern={r"layers\.1\..*": 5}
    )  # fmt: skip
    found = {
        match.path.removeprefix("model.layers."): (match.rank, match.alpha) for match in resolve(MODEL, config).matches
    }
    assert found["0.attn.q_proj"] == (4, 8)
    assert found["0.attn.o_proj"] == (3, 8)
    assert found["0.mlp.o_proj"] == (2, 8)
    assert found["1.mlp.o_proj"] == (2, 5)


def test_a_key_fits_the_end_of_a_path_after_a_dot() -> None:
    assert key_fits("q", "a.q") and key_fits("a.q", "a.q") and key_fits(r".*q", "a.xq")
    assert not key_fits("q", "a.xq") and not key_fits("a", "a.q") and not key_fits("^q", "a.q")
    assert first_match({"x": 1, "q": 2, "a.q": 3}, "a.q", 9) == 2
    assert first_match({"x": 1}, "a.q", 9) == 9
    with pytest.raises(ConfigError, match=r"rank_pattern or alpha_pattern: '\(' is not a valid regular expression"):
        first_match({"(": 1}, "a", 0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"target_modules": ["nope"]}, r"\['nope'\] not found.*Supported modules.*q_proj"),
    "typo": ({"target_modules": ["q_porj"]}, "'q_porj'.*nearest: q_proj"),
    "one of two": ({"target_modules": ["q_proj", "v_porj"]}, "target_modules entry 'v_porj' matches no module; nearest: v_proj"),
    "two of three": ({"target_modules": ["q_proj", "x1", "x2"]}, "'x1'.*'x2'"),
    "excluded away": ({"target_modules": ["q_proj", "head"], "exclude_modules": ["head"]}, "'head' matches only modules that are excluded"),
    "in other layers": ({"target_modules": ["q_proj", "head"], "layers_to_transform": [0]}, "'head' matches only .*other layers"),
    "no such layer": ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "q_proj"),
    "idle exclusion": ({"target_modules": ["q_proj"], "exclude_modules": ["nope"]}, "exclude_modules entry 'nope'"),
    "idle rank": ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, r"rank_pattern key 'v_proj' matches none of the adapted modules \(3 in total\)"),
    "idle alpha": ({"target_modules": ["q_proj"], "alpha_pattern": {"nope": 2}}, "alpha_pattern key 'nope'"),
    "idle saved": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_hed"]}, "modules_to_save entry 'lm_hed'.*nearest: lm_head"),
    "container": ({"target_modules": ["attn"]}, r"model\.layers\.0\.attn \(and 2 more\), named by 'attn', is a Attention.*not support"),
    "norm": ({"target_modules": ["q_proj", "norm"]}, "is a RMSNorm, which LoRA does not support"),
    "no targets": ({}, "target_modules is not set"),
}  # fmt: skip


@pytest.mark.parametrize("which", REFUSED)
def test_what_is_refused(which: str) -> None:
    fields, text = REFUSED[which]
    with pytest.raises((TargetError, ConfigError), match=text) as caught:
        resolve(MODEL, LoraConfig(**fields))
    assert caught.value.field in (*fields, "target_modules")


def test_errors_say_which_entry_is_wrong_and_what_there_is() -> None:
    with pytest.raises(NoTargetError) as caught:
        resolve(MODEL, LoraConfig(target_modules=["q_prj"]))
    assert (caught.value.what, caught.value.field) == ("['q_prj']", "target_modules")
    assert {"q_proj", "head"} <= set(caught.value.allowed)
    with pytest.raises(TargetError) as caught:
        resolve(MODEL, LoraConfig(target_modules=["q_proj"], alpha_pattern={"nope": 2}))
    assert not isinstance(caught.value, NoTargetError)
    assert (caught.value.what, caught.value.field, caught.value.override) == (
        "nope",
        "alpha_pattern",
        "partial_targets",
    )
    with pytest.raises(TargetError) as caught:
        resolve(MODEL, LoraConfig(target_modules=["attn"]))
    assert (caught.value.what, caught.value.where) == ("attn", "model.layers.0.attn")


def test_a_partial_match_with_a_word() -> None:
    found = resolve(MODEL, LoraConfig(target_modules=["q_proj", "nope"]), allow_partial=True)
    assert len(found.matches) == 3 and len(found.missing) == 1 and found.missing[0].entry == "nope"
    with pytest.raises(TargetError, match="'nope'"):
        resolve(MODEL, LoraConfig(target_modules=["nope"]), allow_partial=True)


def test_saved_modules_and_the_heads_of_a_task() -> None:
    found = resolve(MODEL, LoraConfig(target_modules=["q_proj"], modules_to_save=["head"]))
    assert found.saved == ("head",)
    classifier = [*MODEL, linear("score")]
    found = resolve(classifier, LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    assert found.saved == ("score",) and "score" not in [match.path for match in found.matches]
    assert found.missing == ()


def test_what_is_saved_whole_is_not_adapted() -> None:
    found = resolve(MODEL, LoraConfig(target_modules=["q_proj"], modules_to_save=["model.layers.1"]))
    assert [match.path for match in found.matches] == in_layers("attn.q_proj", 0, 2)
    assert found.saved == ("model.layers.1",)
    found = resolve(MODEL, LoraConfig(target_modules=["q_proj"], modules_to_save=["layers.1", "layers.1.mlp.o_proj"]))
    assert found.saved == ("model.layers.1",)  # the outermost


def test_a_name_that_hits_modules_of_different_make_is_noted() -> None:
    notes = resolve(MODEL, LoraConfig(target_modules=["o_proj", "q_proj"])).notes
    assert len(notes) == 1
    assert notes[0].kind == SEVERAL_MODULES and "'o_proj'" in notes[0].text
    for template in ("model.layers.*.attn.o_proj (8→8, ×3)", "model.layers.*.mlp.o_proj (32→8, ×3)"):
        assert template in notes[0].text


def test_a_rank_larger_than_the_module_is_noted_by_name() -> None:
    notes = resolve(MODEL, LoraConfig(r=16, target_modules=["head"])).notes
    assert [note.kind for note in notes] == [LARGE_RANK]
    assert re.search(r"head.*rank 16.*\b3\b", notes[0].text)
    assert resolve(MODEL, LoraConfig(r=3, target_modules=["head"])).notes == ()


def test_the_config_is_only_read() -> None:
    config = LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    before = config.to_dict()
    resolve(MODEL, config)
    assert config.to_dict() == before


def test_it_knows_no_torch() -> None:
    code = "import sys, lorakit.targets, lorakit.config, lorakit.durable; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
