"""Adapters for llama.cpp: llama.cpp itself gives the log-probabilities of transformers with peft."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.export.bases import FAMILIES, random
from tests.export.specimens import with_random_adapter
from tests.gguf_models import write_base, write_smollm2

from lorakit import core, hub
from lorakit.export.formats import export
from lorakit.export.request import ExportRequest
from lorakit.verify import VerifyOptions, verify
from lorakit.verify.llama_cpp import running
from lorakit.verify.runtime import BASE
from lorakit.verify.servers import LlamaServer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # by peft
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

BOUND = 1e-3
"""Allowed difference of a log-probability, in nats."""

IDS = torch.randint(0, 60, (20,), generator=torch.Generator().manual_seed(3)).tolist()


def patterns(family: str) -> dict[str, Any]:
    """Return settings that the common form must remove."""
    names = ("c_attn", "c_proj") if family == "gpt2" else ("down_proj", "o_proj")
    return {"use_rslora": True, "rank_pattern": {names[0]: 2}, "alpha_pattern": {names[1]: 5}}


def own_values(model: Any) -> list[float]:
    """Return the log-probability that a model gives to each token but the first."""
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([IDS])).logits[0].log_softmax(-1)
    return scores[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()


def expected(base: Any, folder: Path, **settings: Any) -> list[float]:
    """Save a random adapter of peft, and return its log-probability of each token but the first."""
    return own_values(with_random_adapter(copy.deepcopy(base), folder, 0.1, **settings))


def largest(values: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(values, others, strict=True))


def in_llama_cpp(base: Path, adapter: Path | None) -> list[float]:
    """Return the log-probability that llama.cpp gives to each token but the first, with an adapter or the base's."""
    pytest.importorskip("xllamacpp")
    request: Any = SimpleNamespace(added_ids=frozenset(), end_ids=frozenset([60]))
    with running(base, adapter, 64) as client:
        models: Any = client.get("/v1/models")["data"]
        name = BASE if adapter is None else adapter.stem
        return LlamaServer(client, models, request, name).log_probabilities(IDS)


def difference(family: str, folder: Path, **settings: Any) -> float:
    """Return the largest difference between llama.cpp and peft."""
    base = random(family, 0.1)
    base.save_pretrained(folder / "base")
    values = expected(base, folder / "adapter", **settings)
    request = ExportRequest(core.common_form(folder / "adapter"), "notes", hub.resolve(folder / "base"))
    exported, output = export("gguf", request, folder / "out")
    (file,) = output.iterdir()
    assert file.name == f"{exported.name}.gguf"
    return largest(values, in_llama_cpp(write_base(base, folder / "base.gguf"), file))


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_peft_does(tmp_path: Path, family: str) -> None:
    assert difference(family, tmp_path, **patterns(family)) < BOUND


class GeluOfTable(torch.nn.Module):
    """GELU as ggml computes it on a CPU: from a table whose arguments and values are rounded to F16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3_text"])
def test_a_table_of_gelu_explains_the_difference_of_bases(tmp_path: Path, family: str) -> None:
    base = random(family, 0.1)
    found = in_llama_cpp(write_base(base, tmp_path / "base.gguf"), None)
    exact = largest(own_values(base), found)
    for layer in base.modules():
        for name in {"act", "act_fn"} & dict(layer.named_children()).keys():
            setattr(layer, name, GeluOfTable())
    assert exact > 1e-4 and largest(own_values(base), found) < exact / 4


@pytest.mark.costly(cases=0)
def test_verify_on_smollm2(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    settings = {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    with_random_adapter(hub.load_model("smollm2", "float32"), tmp_path / "notes", 0.02, **settings)
    base = write_smollm2(tmp_path / "base.gguf")
    options = VerifyOptions(model="smollm2", base_gguf=base, prompts=2, new_tokens=4)
    (one,) = verify(tmp_path / "notes", ["gguf"], options).comparisons
    assert one.problems == [] and one.is_judged and one.difference < BOUND
    assert (one.greedy_same, one.other_tokens) == (2, ()) and min(one.distances.values()) > 100 * BOUND
