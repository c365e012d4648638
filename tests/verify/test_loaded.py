"""Saved and merged adapters agree with lorakit in plain torch, and a wrong update is found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, hub
from lorakit.errors import ConfigError, NonFiniteError, UsageError
from lorakit.export import formats
from lorakit.session import Session, SessionOptions
from lorakit.verify import Comparison, VerifyOptions, verify
from lorakit.verify.loaded import LoadedRuntime, SessionRuntime, add_update, chosen


def compared(folder: Path, base: Path, *against: str, **fields: Any) -> dict[str, Comparison]:
    options = VerifyOptions(model=str(base), **{"prompts": 4, "new_tokens": 4, **fields})
    return {one.runtime: one for one in verify(folder, against, options).comparisons}


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_dtypes_that_are_float32_are_judged(
    save_adapter: Callable[..., Path], tiny_model_directory: Path, dtype: Any
) -> None:
    options = SessionOptions(dtype, "cpu")
    for one in compared(save_adapter("notes"), tiny_model_directory, "reloaded", "merged", session=options).values():
        assert (one.dtype, one.is_judged, one.problems) == ("float32", True, [])


VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "rsLoRA with patterns": ({"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}, True),
    "DoRA": ({"use_dora": True}, False),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "saved module": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_merged_adapters(save_adapter: Callable[..., Path], tiny_model_directory: Path, variant: str) -> None:
    fields, is_plain = VARIANTS[variant]
    folder = save_adapter("notes", **fields)
    found = compared(folder, tiny_model_directory, "reloaded", "merged", prompts=20)
    for one in found.values():
        assert one.problems == []
        assert (one.prompts, one.greedy_same, one.other_tokens) == (20, 20, ())
        assert one.distances["lorakit's base"] > 0.005
    assert ("plain torch" in found["reloaded"].title) == is_plain


def test_gpt2(save_adapter: Callable[..., Path], tiny_gpt2: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    base = tmp_path / "tiny-gpt2"
    tiny_gpt2.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    folder = save_adapter("notes", model=hub.load_model(base))
    found = compared(folder, base, "reloaded", "merged")
    assert [one.problems for one in found.values()] == [[], []]
    assert "plain torch" in found["reloaded"].title


WRONG: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "scale": lambda tensors: {name: 0.5 * one if "lora_B" in name else one for name, one in tensors.items()},
    "one site lost": lambda tensors: {
        name: torch.zeros_like(one) if "layers.1.mlp.down_proj.lora_B" in name else one for name, one in tensors.items()
    },
    "rows of B reversed": lambda tensors: {
        name: one.flip(0) if "q_proj.lora_B" in name else one for name, one in tensors.items()
    },
    "two sites exchanged": lambda tensors: {
        name: tensors[name.replace("q_proj", "o_proj") if "q_proj" in name else name.replace("o_proj", "q_proj")]
        for name in tensors
    },
    "everything lost": lambda tensors: {name: torch.zeros_like(one) for name, one in tensors.items()},
}


def change(folder: Path, fault: str) -> None:
    """Change the tensors of a saved adapter."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    save_file(WRONG[fault](load_file(file)), file, {"format": "pt"})
    (folder / "lorakit.json").unlink()  # has the hash of the file


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_files_are_found(
    save_adapter: Callable[..., Path], tiny_model_directory: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_adapter("notes")
    save = core.save_adapter

    def wrong(model: Any, path: Path, *rest: Any, **fields: Any) -> Any:
        report = save(model, path, *rest, **fields)
        change(path, fault)
        return report

    monkeypatch.setattr(core, "save_adapter", wrong)
    (one,) = compared(folder, tiny_model_directory, "reloaded").values()
    assert one.difference > one.bound and one.problems
    if fault == "everything lost":
        assert one.difference == pytest.approx(one.distances["lorakit's base"], rel=1e-3)


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_exports_are_found(
    save_adapter: Callable[..., Path], tiny_model_directory: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = formats.FORMATS["peft"]

    def wrong(request: Any, folder: Path) -> Any:
        exported = entry.write(request, folder)
        change(folder, fault)
        return exported

    folder = save_adapter("notes", use_rslora=True)
    monkeypatch.setattr(formats, "FORMATS", {**formats.FORMATS, "peft": replace(entry, write=wrong)})
    (one,) = compared(folder, tiny_model_directory, "reloaded").values()
    assert one.difference > one.bound and one.problems


def test_an_adapter_without_effect_proves_nothing(
    save_adapter: Callable[..., Path], tiny_model_directory: Path
) -> None:
    (one,) = compared(save_adapter("notes", spread=1e-9), tiny_model_directory, "reloaded").values()
    assert one.difference < one.bound and len(one.problems) == 1


def test_the_update_in_plain_torch_is_the_formula(
    save_adapter: Callable[..., Path], tiny_model_directory: Path
) -> None:
    folder = save_adapter("notes", target_modules=["q_proj"], r=4, lora_alpha=6)
    tensors = core.common_form(folder).weights.factors["model.layers.0.self_attn.q_proj"]
    plain, expected = hub.load_model(tiny_model_directory), hub.load_model(tiny_model_directory)
    assert add_update(plain, core.common_form(folder))
    site = expected.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(3, site.in_features, generator=torch.Generator().manual_seed(0))
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    update = 6 / 4 * saved[f"{start}.lora_B.weight"] @ saved[f"{start}.lora_A.weight"]
    assert torch.allclose(
        plain.get_submodule("model.layers.0.self_attn.q_proj")(x), x @ (site.weight + update).T, atol=1e-5
    )
    assert torch.allclose(tensors.B @ tensors.A, update, atol=1e-6)


def test_data_gives_the_prompts(save_adapter: Callable[..., Path], tiny_model_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "held-out.jsonl"
    rows = [f'{{"prompt": "question {number}", "completion": "answer"}}' for number in range(6)]
    file.write_text("\n".join(rows))
    folder = save_adapter("notes")
    options = VerifyOptions(model=str(tiny_model_directory), data=[str(file)], prompts=5, new_tokens=2)
    report = verify(folder, ["reloaded"], options)
    assert report.is_good and report.prompts == str(file) and report.comparisons[0].prompts == 5
    assert report.as_dict()["good"] is True


@pytest.mark.parametrize("new_tokens", [62, 5000])
def test_answers_that_leave_no_room_for_a_prompt(
    save_adapter: Callable[..., Path], tiny_model_directory: Path, new_tokens: int
) -> None:
    config = tiny_model_directory / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 64}))
    folder = save_adapter("notes")
    with pytest.raises(UsageError) as caught:
        compared(folder, tiny_model_directory, "reloaded", new_tokens=new_tokens + 1)
    assert caught.value.field == "max_new_tokens"
    if new_tokens == 62:
        assert compared(folder, tiny_model_directory, "reloaded", new_tokens=new_tokens)["reloaded"].tokens >= 4


@pytest.mark.parametrize("name", ["vllm", "http", "http:localhost", "mlx://host", "ftp://host", ""])
def test_unknown_runtimes(save_adapter: Callable[..., Path], tiny_model_directory: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compared(save_adapter("notes"), tiny_model_directory, name)
    assert caught.value.field == "against"


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
def test_an_adapter_with_nan(save_adapter: Callable[..., Path], tiny_model_directory: Path) -> None:
    folder = save_adapter("notes", spread=float("nan"))
    with pytest.raises(NonFiniteError):
        compared(folder, tiny_model_directory, session=SessionOptions("float32", "cpu", allow=("nonfinite",)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_runtime_with_nan(
    save_adapter: Callable[..., Path], tiny_model_directory: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def undefined(runtime: LoadedRuntime, ids: Sequence[int], other: str | None = None) -> list[float]:
        return [*chosen(runtime.scores(ids, other), ids)[:-1], value]

    monkeypatch.setattr(LoadedRuntime, "log_probabilities", undefined)
    monkeypatch.setattr(
        SessionRuntime, "log_probabilities", lambda self, ids, other: chosen(self.scores(ids, other), ids)
    )
    with pytest.raises(NonFiniteError) as caught:
        compared(save_adapter("notes"), tiny_model_directory, "merged")
    assert caught.value.where == "merged"


def test_an_adapter_that_classifies(tiny_model_directory: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model_directory, num_labels=2)
    from lorakit.config import LoraConfig

    core.attach(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    core.save_adapter(model, tmp_path / "classes")
    with pytest.raises(UsageError) as caught:
        compared(tmp_path / "classes", tiny_model_directory, "reloaded")
    assert caught.value.field == "adapter"


def test_the_session_is_closed_before_runtimes_open(
    save_adapter: Callable[..., Path], tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = list[int]()
    start, close = Session.__init__, Session.close

    def init(self: Session, *args: Any, **fields: Any) -> None:
        opened.append(1)
        assert sum(opened) == 1
        start(self, *args, **fields)

    def end(self: Session) -> None:
        opened.append(-1)
        close(self)

    monkeypatch.setattr(Session, "__init__", init)
    monkeypatch.setattr(Session, "close", end)
    compared(save_adapter("notes"), tiny_model_directory, "reloaded")
    assert len(opened) == 4
