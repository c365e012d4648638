"""What is read of an adapter's files, in every dtype, compared with torch; chat templates and added tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.export.specimens import Specimen
from tests.small_models import VOCABULARY

from lorakit import hub
from lorakit.core import inspect_adapter
from lorakit.errors import AdapterFileError, ModelError
from lorakit.export.facts import BaseFacts, adapter_facts, base_facts, chat_template
from lorakit.plan import catalogue

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

VALUES = {
    "finite": [1.0, -2.0],
    "nan": [1.0, torch.nan],
    "inf": [-torch.inf, 1.0],
    "zero": [0.0, -0.0],
    "small": [0.0, 2.0**-24],
}


def written(folder: Path, values: torch.Tensor) -> Path:
    """Write an adapter with one site, whose A is (1, 2) and B (2, 1)."""
    tensors = {"A": values.view(1, 2), "B": torch.ones(2, 1, dtype=values.dtype)}
    prefix = "base_model.model.model.layers.0.q_proj.lora_"
    save_file(
        {f"{prefix}{name}.weight": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_values_are_judged_as_by_torch(tmp_path: Path, dtype: torch.dtype, values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    facts = adapter_facts(written(tmp_path, tensor))
    (pair,) = facts.pairs.values()
    assert (pair.rank, pair.in_features, pair.out_features) == (1, 2, 2)
    assert bool(facts.nonfinite) == (not tensor.isfinite().all())
    assert pair.is_zero == (not tensor.any())


def test_sites_and_ranks_are_those_that_inspect_reads(tmp_path: Path) -> None:
    _, adapter, _ = Specimen({"rank_pattern": {"q_proj": 3}, "target_modules": "all-linear"}).write(tmp_path)
    facts, summary = adapter_facts(adapter), inspect_adapter(adapter)
    assert {p: (one.rank, one.in_features, one.out_features) for p, one in facts.pairs.items()} == {
        site.path: (site.r, site.in_features, site.out_features) for site in summary.sites
    }


def test_a_base_is_known_by_its_names_and_shape(tmp_path: Path) -> None:
    base, _, _ = Specimen().write(tmp_path)
    facts = base_facts(str(base))
    assert str(base) in facts.names and facts.shape.vocab == VOCABULARY
    assert facts.shape == hub.shape_of(str(base)) and facts.config["model_type"] == "llama"
    assert facts.template is None


def test_the_vocabulary_is_the_bases_else_the_recorded_one(tmp_path: Path) -> None:
    base, adapter, _ = Specimen(own=True).write(tmp_path)
    assert adapter_facts(adapter).vocabulary == adapter_facts(adapter, base_facts(str(base))).vocabulary == VOCABULARY
    (adapter / "lorakit.json").unlink()
    assert adapter_facts(adapter).vocabulary == 0


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("chat_template.jinja", "{{ a }}", "{{ a }}"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{{ b }}"}), "{{ b }}"),
        (
            "tokenizer_config.json",
            json.dumps(
                {"chat_template": [{"name": "tool_use", "template": "c"}, {"name": "default", "template": "d"}]}
            ),
            "d",
        ),
        ("tokenizer_config.json", "{}", None),
        ("tokenizer.json", "{}", None),
    ],
)
def test_a_chat_template_is_read_in_each_form(tmp_path: Path, name: str, content: str, expected: str | None) -> None:
    (tmp_path / name).write_text(content)
    assert chat_template(tmp_path) == expected


def test_added_tokens_are_read_from_all_files(tmp_path: Path) -> None:
    folder = written(tmp_path, torch.ones(2))
    (folder / "added_tokens.json").write_text('{"<a>": 7}')
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"9": {"content": "<b>"}, "x": {}}}')
    (folder / "tokenizer.json").write_text('{"added_tokens": [{"id": 11, "content": "<c>"}, {}]}')
    assert adapter_facts(folder).added_tokens == {7: "<a>", 9: "<b>", 11: "<c>"}


def test_bad_files_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path, torch.ones(2))
    (folder / "added_tokens.json").write_text("{")
    with pytest.raises(AdapterFileError) as caught:
        adapter_facts(folder)
    assert caught.value.where == str(folder / "added_tokens.json")
    with pytest.raises(ModelError):
        base_facts(str(tmp_path / "none"))


def test_a_published_model_has_the_type_of_its_config() -> None:
    shapes = [catalogue.published(name) for name in catalogue.names()]
    shape = next(shape for shape in shapes if shape is not None and not shape.model_type)
    assert BaseFacts(frozenset(), shape, {"model_type": "llama"}, None).model_type == "llama"
