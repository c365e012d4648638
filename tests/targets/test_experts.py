"""Names of transformers 4 select the parameters of transformers 5 exactly, or raise an error that names the problem."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.architectures.families import EXPERTS, EXPERTS_BY_TYPE
from lorakit.config import LoraConfig
from lorakit.errors import ConfigError, TargetError
from lorakit.targets.experts import note_on_rest, with_current_names
from lorakit.targets.resolving import BareParameter, Candidate, resolve

LAYERS = (0, 1)


def model(block: str = "mlp", dense_first: bool = False) -> tuple[list[Candidate], list[BareParameter]]:
    """Return a model of two layers with attention, experts, a shared expert and a router."""
    candidates, parameters = [Candidate("embed", "Embedding", out_features=8, in_features=50)], []
    for layer in LAYERS:
        at = f"layers.{layer}"
        linears = [f"{at}.attn.q_proj", f"{at}.{block}.shared.gate_proj"]
        if dense_first and layer == 0:
            linears = [linears[0], f"{at}.{block}.gate_proj", f"{at}.{block}.up_proj", f"{at}.{block}.down_proj"]
        else:
            candidates += [Candidate(f"{at}.{block}.experts", None), Candidate(f"{at}.{block}.gate", None)]
            parameters += [
                BareParameter(f"{at}.{block}.experts", "gate_up_proj", (4, 16, 8)),
                BareParameter(f"{at}.{block}.experts", "down_proj", (4, 8, 8)),
                BareParameter(f"{at}.{block}.gate", "weight", (4, 8)),
            ]
        candidates += [Candidate(path, "Linear", "Linear", True, 8, 8) for path in linears]
        parameters += [BareParameter(path, "weight", (8, 8)) for path in linears]
    return candidates, parameters


def converted(targets: Any, kind: str = "qwen3_moe", given: Any = None, **fields: Any) -> LoraConfig:
    """Return a config of rank 2 with converted targets."""
    candidates, parameters = given or model()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, **fields)
    return with_current_names(config, kind, candidates, parameters)


@pytest.mark.parametrize("layout", EXPERTS, ids=lambda layout: layout.down)
def test_each_layout_names_three_parts_and_a_router(layout: Any) -> None:
    assert set(layout.parameters.values()) == {"gate_up_proj", "down_proj", "gate.weight"}
    assert layout.parts("gate_up_proj") == layout.inner and layout.parts("down_proj") == (layout.down,)


def test_no_model_type_is_in_two_layouts() -> None:
    assert len(EXPERTS_BY_TYPE) == sum(len(layout.model_types) for layout in EXPERTS)


def test_names_become_parameters_with_the_rank_of_all_parts() -> None:
    config = converted(["q_proj", "gate_proj", "up_proj"])
    assert config.target_modules == {"q_proj"}
    assert config.target_parameters == ["gate_up_proj"]
    assert config.rank_pattern == {r".*\.gate_up_proj": 4} and config.alpha_pattern == {r".*\.gate_up_proj": 12}
    assert converted(["gate", "down_proj"]).target_parameters == ["down_proj", "gate.weight"]
    assert converted(["w1", "w2", "w3"], "mixtral").target_parameters == ["down_proj", "gate_up_proj"]


def test_a_config_with_current_names_is_not_changed() -> None:
    for targets in (["q_proj"], "all-linear"):
        config = LoraConfig(target_modules=targets)
        assert with_current_names(config, "gpt_oss", *model()) is config
    once = converted(["q_proj", "gate_proj", "up_proj", "gate"])
    assert with_current_names(once, "qwen3_moe", *model()) is once


def test_a_dense_model_of_the_same_type_is_not_converted() -> None:
    candidates, parameters = model()
    dense = [p for p in parameters if len(p.shape) == 2 and p.module.endswith("proj")]
    config = LoraConfig(target_modules="all-linear")
    assert with_current_names(config, "qwen3_moe", candidates, dense) is config


def test_a_path_of_a_module_stays_and_a_path_of_experts_selects_one_layer() -> None:
    assert converted(["shared.gate_proj"]).target_modules == {"shared.gate_proj"}
    config = converted(["layers.1.mlp.experts.down_proj"])
    assert config.target_parameters == ["layers.1.mlp.experts.down_proj"]
    every = [f"layers.1.block_sparse_moe.experts.{number}.w2" for number in range(4)]
    assert converted(every, "mixtral").target_parameters == ["layers.1.mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("pattern", "modules", "parameters"),
    [
        (r".*\.(gate_proj|up_proj)", {"gate_proj"}, ["gate_up_proj"]),
        (r".*\.shared\.gate_proj", r".*\.shared\.gate_proj", None),
        (r"layers\.1\..*down_proj", set(), ["layers.1.mlp.experts.down_proj"]),
        (r".*experts\.\d+\.down_proj|.*q_proj", {"q_proj"}, ["down_proj"]),
        (r".*\.gate", set(), ["gate.weight"]),
    ],
)
def test_a_regular_expression_selects_what_it_names(pattern: str, modules: Any, parameters: Any) -> None:
    config = converted(pattern)
    assert config.target_modules == modules
    assert config.target_parameters == parameters


def test_excluded_modules_and_other_layers_stay_out() -> None:
    config = converted("all-linear", exclude_modules=["experts"])
    assert config.target_parameters == ["gate.weight"] and config.rank_pattern == {}
    config = converted(["gate", "gate_proj", "up_proj", "down_proj"], layers_to_transform=[1])
    assert config.target_parameters == [
        f"layers.1.mlp.{name}" for name in ("experts.down_proj", "experts.gate_up_proj", "gate.weight")
    ]


@pytest.mark.parametrize(
    ("targets", "fields", "error", "what"),
    [
        (["gate_proj"], {}, ConfigError, "up_proj"),
        (r".*experts\.up_proj", {}, ConfigError, "gate_proj"),
        (["down_proj"], {"target_parameters": ["experts.down_proj"]}, ConfigError, "experts.down_proj"),
        (["gate"], {"target_parameters": ["gate.weight"]}, ConfigError, "gate.weight"),
        ([f"experts.{number}.down_proj" for number in range(5)], {}, TargetError, 4),
        (["experts.0.down_proj", "experts.3.down_proj"], {}, ConfigError, 1),
    ],
)
def test_what_cannot_be_converted_is_an_error(
    targets: Any, fields: dict[str, Any], error: type[ConfigError], what: Any
) -> None:
    with pytest.raises(error) as caught:
        converted(targets, **fields)
    assert caught.value.fields["what"] == str(what)
    assert caught.value.fields["field"] in {"target_modules", "target_parameters"}


def rest(targets: Any, given: Any = None, kind: str = "qwen3_moe", total: int = 10_000) -> str:
    """Return the note about what targets leave out, or ""."""
    candidates, parameters = given or model()
    asked = LoraConfig(target_modules=targets)
    config = with_current_names(asked, kind, candidates, parameters)
    found = resolve(candidates, config, parameters=parameters)
    note = note_on_rest(asked, config, candidates, parameters, found, total)
    return "" if note is None else note.text


def test_what_all_linear_leaves_out_is_reported_with_its_fraction() -> None:
    assert "shared.gate_proj" in rest("all-linear") and "1.28%" in rest("all-linear")  # 2 · 8 · 8 of 10,000
    text = rest("all-linear", kind="gpt_oss")
    assert "experts.gate_up_proj" in text and "mlp.gate" in text
    assert "16.00%" in text  # 2 · (4·16·8 + 4·8·8 + 4·8)


def test_dense_modules_whose_name_now_stands_for_experts_are_reported() -> None:
    given = model(dense_first=True)
    text = rest(["q_proj", "gate_proj", "up_proj"], given)
    assert "mlp.gate_proj" in text and "mlp.up_proj" in text and "down_proj" not in text
    assert rest(["q_proj"], given) == ""


def test_models_without_experts_get_no_note() -> None:
    candidates, parameters = model()
    dense = [p for p in parameters if len(p.shape) == 2 and p.module.endswith("proj")]
    assert rest("all-linear", (candidates, dense)) == ""
