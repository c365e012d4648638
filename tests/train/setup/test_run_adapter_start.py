"""A run that trains an existing adapter further: its start, its provenance, resuming it, and every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from lorakit import core, hub
from lorakit.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    LorakitError,
    ModelError,
    RunError,
    UsageError,
)
from lorakit.report import read_metrics
from lorakit.train import trainer
from lorakit.train.files import checkpoint
from lorakit.train.loop import loop
from lorakit.train.progress import PlainProgress
from lorakit.train.settings.settings import TrainSettings

WEIGHTS = "adapter_model.safetensors"
Run = Callable[..., Path]


@pytest.fixture
def run(short_run: dict[str, Any], tmp_path: Path) -> Run:
    """Train into `tmp_path / name` and return that directory; keywords change settings, None omits one."""

    def train(name: str, **more: Any) -> Path:
        usual = {"learning_rate": 0.01, "max_steps": 3, "eval_data": short_run["data"][-1:], "save_total_limit": 9}
        given = {**short_run, **usual, "data": short_run["data"][:-1], "output_dir": tmp_path / name, **more}
        trainer.run(TrainSettings(**{key: value for key, value in given.items() if value is not None}))
        return tmp_path / name

    return train


@pytest.fixture
def other(tmp_path: Path) -> list[Path]:
    """Other data than that of `short_run`."""
    paths = [tmp_path / f"other-{number}.txt" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_text(f"def add(a, b): return a + b + {number}\n" * 4, encoding="utf-8")
    return paths


def further(run: Run, name: str, start: Path, **more: Any) -> Path:
    return run(name, **{"from_adapter": str(start), "r": None, "model": None, **more})


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


def at_start(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A dict that receives the trainable tensors at the first evaluation of each later run."""
    seen: dict[str, torch.Tensor] = {}
    evaluate = loop.evaluate

    def first(model: Any, *rest: Any) -> Any:
        if not seen:
            seen.update({name: p.detach().clone() for name, p in core.trainable_parameters(model, "default")})
        return evaluate(model, *rest)

    monkeypatch.setattr(loop, "evaluate", first)
    return seen


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "patterns": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "regex": {"target_modules": r".*layers\.1\.(self_attn\.q|mlp\.up)_proj"},
    "DoRA, rsLoRA": {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1},
    "saved module, biases": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "bias": "all"},
    "token rows": {"trainable_token_indices": [5, 9]},
    "new tokens": {"new_tokens": ["jumps over", "<never>"]},
    "KaSA": {"target_modules": ["q_proj"], "kasa_config": {"beta": 0.01}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "EVA": {"init_lora_weights": "eva"},
    "allocated": {"allocate_ranks": "gradients"},
    "LoRA-FA": {"optimizer": "lorafa"},
}  # fmt: skip


@pytest.mark.costly
@pytest.mark.filterwarnings("ignore:.*rows were appended")
@pytest.mark.parametrize("case", CASES)
def test_the_start_is_the_end_of_the_source(
    case: str, run: Run, other: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss is the source's last one, the tensors are the source's, and training and resuming continue."""
    more = CASES[case]
    source = run("source", **more)
    last = read_metrics(source).evaluations[-1]["eval_loss"]
    seen = at_start(monkeypatch)
    kept = {"optimizer": more["optimizer"]} if "optimizer" in more else {}
    folder = further(run, "further", source / "checkpoint-3", data=other, **kept)
    assert read_metrics(folder).evaluations[0]["eval_loss"] == last
    saved = load_file(source / "checkpoint-3" / WEIGHTS)
    if case == "PiSSA":  # saved as LoRA of twice the rank
        saved = {name: t[:2] if "lora_A" in name else t[:, :2] for name, t in saved.items()}
    values = [tuple(t.flatten().tolist()) for t in saved.values()]
    assert seen and all(tuple(p.flatten().tolist()) in values for p in seen.values())
    found = record(folder)
    assert found["plan"]["adapter"]["trainable"] == found["resolved"]["trainable_parameters"]
    assert found["resolved"]["trainable_parameters"] == record(source)["resolved"]["trainable_parameters"]
    for name in ("r", "lora_alpha", "use_dora", "use_rslora", "modules_to_save", "bias"):
        assert found["settings"][name] == record(source)["settings"][name]
    assert any(not torch.equal(t, saved[n]) for n, t in load_file(folder / "checkpoint-3" / WEIGHTS).items() if n in saved and t.shape == saved[n].shape) or case == "PiSSA"  # fmt: skip

    parts = further(
        run, "parts", source / "checkpoint-3", data=other, max_steps=1, lr_scheduler_type="constant", **kept
    )
    whole = further(run, "whole", source / "checkpoint-3", data=other, lr_scheduler_type="constant", **kept)
    shutil.rmtree(source)  # a checkpoint is enough to resume
    trainer.run(TrainSettings(data=other, output_dir=parts, resume=True, max_steps=3, model=found["settings"]["model"]))
    for name in (WEIGHTS, checkpoint.OPTIMIZER):
        assert (parts / "checkpoint-3" / name).read_bytes() == (whole / "checkpoint-3" / name).read_bytes()


@pytest.mark.costly(cases=0)
def test_where_an_adapter_comes_from_is_recorded(run: Run, other: list[Path], tmp_path: Path) -> None:
    source = run("source")
    folder = further(run, "further", source, data=other)
    origin = record(folder)["from_adapter"]
    sha256 = core.inspect_adapter(source / "adapter").weights_sha256
    base = record(source)["resolved"]["base"]
    rows = {"shape": "text", "columns": {}}
    assert origin == {"name": str(source), "sha256": sha256, "base_name": base, "steps": 3, "rows": rows}
    result = record(folder)["result"]
    facts = core.inspect_adapter(folder / "adapter").facts["training"]
    assert facts["from_adapter"] == {**origin, "eval_loss": result["first_loss"]}
    assert facts["base_eval_loss"] is None
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| start | adapter source (3 steps) |" in card
    assert record(source)["from_adapter"] is None
    again = further(run, "again", folder / "checkpoint-2", data=other)
    assert record(again)["from_adapter"]["steps"] == 3 + 2
    trainer.run(TrainSettings(data=other, output_dir=folder, from_adapter=str(source), resume=True, max_steps=4))
    assert record(folder)["from_adapter"] == origin


def test_the_output_names_the_adapter_instead_of_the_base(
    run: Run, short_run: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run("source")
    values = {
        **short_run,
        "output_dir": tmp_path / "more",
        "from_adapter": source,
        "learning_rate": 9.0,
        "max_steps": 2,
    }
    result = trainer.run(TrainSettings(**{k: v for k, v in values.items() if k != "r"}), PlainProgress())
    said = capsys.readouterr().out
    assert "evaluation at step 0 (the adapter before training): loss" in said
    assert "(trained for 3 steps)" in said
    assert any("not better than the adapter before training" in note for note in result.notes)


def test_the_optimizer_state_continues_only_on_request(run: Run, other: list[Path]) -> None:
    source = run("source", lr_scheduler_type="constant", warmup_ratio=0.0)
    for start in (source, source / "checkpoint-3"):
        name = f"kept-{start.name}"
        kept = further(run, name, start, data=other, max_steps=1, from_optimizer=True)
        assert checkpoint.load(kept / "checkpoint-1").optimizer["step/" + _first(kept)] == 4
        assert record(kept)["settings"]["from_optimizer"] is True
    new = further(run, "new", source, data=other, max_steps=1)
    assert checkpoint.load(new / "checkpoint-1").optimizer["step/" + _first(new)] == 1


def _first(folder: Path) -> str:
    return next(key.partition("/")[2] for key in checkpoint.load(folder / "checkpoint-1").optimizer)


def test_an_optimizer_state_that_is_not_there(run: Run, other: list[Path], tmp_path: Path) -> None:
    source = run("source")
    alone = tmp_path / "alone"
    shutil.copytree(source / "adapter", alone)

    def refused(start: Path, **more: Any) -> RunError:
        with pytest.raises(RunError) as caught:
            further(run, "kept", start, data=other, from_optimizer=True, **more)
        assert not (tmp_path / "kept").exists()
        assert caught.value.field == "from_optimizer"
        return caught.value

    assert "not a valid checkpoint" in str(refused(alone))
    assert "'lorafa'" in str(refused(source, optimizer="lorafa"))
    (source / "checkpoint-3" / checkpoint.OPTIMIZER).write_bytes(b"")
    assert checkpoint.OPTIMIZER in str(refused(source))
    with pytest.raises(ConfigError) as caught:
        run("kept", from_optimizer=True)
    assert caught.value.field == "from_optimizer"


@pytest.mark.costly(cases=3)
@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"r": 4}, "r"),
        ({"lora_alpha": 8.0}, "lora_alpha"),
        ({"lora_dropout": 0.5}, "lora_dropout"),
        ({"use_dora": True}, "use_dora"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"target_modules": ["no_such"]}, "target_modules"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"kasa_config": {"beta": 0.5}}, "kasa_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"allocate_ranks": "inputs"}, "allocate_ranks"),
        ({"new_tokens": ["<more>"]}, "new_tokens"),
    ],
)
def test_settings_that_differ_from_the_adapter_are_refused(
    more: dict[str, Any], field: str, run: Run, tmp_path: Path
) -> None:
    source = run("source", max_steps=1)
    with pytest.raises(UsageError) as caught:
        further(run, "further", source, **more)
    assert caught.value.field == field and field in str(caught.value)
    assert not (tmp_path / "further").exists()


def test_settings_that_are_equal_to_the_adapter_are_accepted(run: Run, other: list[Path]) -> None:
    source = run("source", max_steps=1)
    equal = {"r": 2, "lora_alpha": 32, "lora_dropout": 0.0, "use_dora": False, "init_lora_weights": "default"}
    for number, targets in enumerate(("all-linear", r".*_proj", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])):  # fmt: skip
        further(run, f"further-{number}", source, target_modules=targets, data=other, max_steps=1, **equal)


def test_patterns_in_files_are_not_evaluated(run: Run, other: list[Path], tmp_path: Path) -> None:
    source = run("source", max_steps=1)
    path = source / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "target_modules": "(([a-z_.]+)+)+[0-9]x"}), encoding="utf-8")
    with pytest.warns(UserWarning, match="was edited"):
        folder = further(run, "further", source, data=other, max_steps=1)
    assert record(folder)["resolved"]["trainable_parameters"] == record(source)["resolved"]["trainable_parameters"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True, "rank_pattern": {"q_proj": 3}}, {"modules_to_save": ["lm_head"]}]
)
def test_an_adapter_of_peft(
    fields: dict[str, Any], run: Run, tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "up_proj"],
        init_lora_weights=False,
        **fields,
    )
    model = peft.get_peft_model(hub.load_model(tiny_model_directory, "float32"), config)
    model.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    theirs = load_file(tmp_path / "theirs" / WEIGHTS)
    seen = at_start(monkeypatch)
    folder = further(run, "further", tmp_path / "theirs", model=tiny_model_directory)
    values = [tuple(t.flatten().tolist()) for t in theirs.values()]
    assert len(seen) == len(theirs) and all(tuple(p.flatten().tolist()) in values for p in seen.values())
    assert record(folder)["settings"]["r"] == 4 and record(folder)["from_adapter"]["steps"] is None
    losses = record(folder)["result"]
    assert losses["best_loss"] < losses["first_loss"]


def test_what_is_not_an_adapter(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = run("source", max_steps=2, save_steps=1)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.rmtree(source / "adapter")
    (tmp_path / "file").write_text("x")

    def refused(start: str, kind: type[LorakitError], *said: str) -> None:
        with pytest.raises(kind) as caught:
            further(run, "further", Path(start))
        assert all(part in str(caught.value) for part in said), caught.value
        assert not (tmp_path / "further").exists()

    refused(str(source), AdapterFileError, "checkpoint-2")
    refused(str(tmp_path / "none"), AdapterFileError, "not found")
    refused(str(tmp_path / "file"), AdapterFileError, "not found")
    refused("nobody/has-this", ModelError, "HF_HUB_OFFLINE")
    (source / "checkpoint-2" / WEIGHTS).write_bytes(b"x" * 100)
    refused(str(source / "checkpoint-2"), AdapterFileError, WEIGHTS)


def test_the_base_is_checked_and_may_be_missing(run: Run, tmp_path: Path, tiny_model_directory: Path) -> None:
    source = run("source", max_steps=1)
    path = source / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    model = hub.load_model(tiny_model_directory, "float32")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    other = tmp_path / "other-base"
    model.save_pretrained(other)
    hub.load_tokenizer(tiny_model_directory).save_pretrained(other)
    with pytest.raises(BaseMismatchError) as caught:
        further(run, "further", source, model=other)
    assert "allow" not in str(caught.value)
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}), encoding="utf-8")
    with pytest.raises(UsageError) as missing:
        further(run, "further", source)
    assert missing.value.field == "model"
    assert not (tmp_path / "further").exists()


def test_a_run_never_removes_the_adapter_that_it_starts_from(run: Run, tmp_path: Path) -> None:
    source = run("source", max_steps=1)
    with pytest.raises(UsageError) as caught:
        further(run, "source", source, overwrite=True)
    assert caught.value.field == "overwrite" and (source / "adapter" / WEIGHTS).is_file()


def test_a_base_that_only_the_adapter_names(run: Run, tmp_path: Path, tiny_model_directory: Path) -> None:
    source = run("source", max_steps=1)
    tiny_model_directory.rename(tmp_path / "moved")
    with pytest.raises(ModelError) as caught:
        further(run, "further", source)
    assert caught.value.field == "model" and str(source) in str(caught.value)
    further(run, "further", source, model=tmp_path / "moved", max_steps=1)


def test_an_adapter_that_does_not_fit_the_base(run: Run, tmp_path: Path, tiny_gpt2: Any, tiny_tokenizer: Any) -> None:
    source = run("source", max_steps=1)
    tiny_gpt2.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(AdapterFileError) as caught:
        further(run, "further", source, model=tmp_path / "gpt2")
    assert "does not match the base" in str(caught.value)


def test_resuming_without_a_checkpoint_needs_the_same_adapter(run: Run, other: list[Path], tmp_path: Path) -> None:
    source = run("source", max_steps=2, save_steps=1)
    folder = further(run, "further", source / "checkpoint-1", data=other, max_steps=1)
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    for name in (WEIGHTS, "lorakit.json"):
        shutil.copyfile(source / "checkpoint-2" / name, source / "checkpoint-1" / name)
    with pytest.raises(RunError) as caught:
        trainer.run(
            TrainSettings(data=other, output_dir=folder, from_adapter=str(source / "checkpoint-1"), resume=True)
        )
    assert caught.value.field == "from_adapter"


def test_the_tokenizer_and_template_of_the_adapter_are_used(run: Run, other: list[Path], tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    source = run("source", chat_template=tmp_path / "template.jinja", max_steps=1)
    folder = further(run, "further", source, data=other, max_steps=1)
    for name in ("adapter", "checkpoint-1"):
        own = hub.adapter_tokenizer(folder / name)
        assert own is not None and own.chat_template.startswith("{% for m in messages %}{{ m['content']")
