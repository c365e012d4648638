"""Settings files of other tools: what is converted, what is listed, and what is rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.errors import ConfigError
from lorakit.train.settings.conversion.converting import FOREIGN, Conversion, convert_file
from lorakit.train.settings.sources import gather, read_settings_file

FILES = sorted((Path(__file__).parent / "foreign").glob("*/*.*"))
MISSING = {"model": "model", "data": ["data"], "output_dir": "output"}


def file(tool: str, name: str) -> Path:
    (found,) = (path for path in FILES if path.parent.name == tool and path.stem == name)
    return found


def settings(tool: str, name: str) -> dict[str, Any]:
    return dict(convert_file(file(tool, name)).settings)


def texts(found: Conversion, kind: str) -> dict[str, str]:
    return {note.key: note.text for note in getattr(found, kind)}


def text_file(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def test_there_are_ten_files_for_each_tool() -> None:
    folders = [path.parent.name for path in FILES]
    assert {name: folders.count(name) for name in folders} == dict.fromkeys(
        ["axolotl", "llama_factory", "mlx_lm", "peft"], 10
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_file_becomes_valid_settings(path: Path, tmp_path: Path) -> None:
    found = convert_file(path)
    assert found.tool.lower().replace("-", "_") == path.parent.name
    out = tmp_path / "out.yaml"
    out.write_text(found.text())
    assert read_settings_file(out) == dict(found.settings)
    given = {name: value for name, value in MISSING.items() if name in found.missing}
    assert set(found.missing) <= set(MISSING)
    assert gather(given, out).as_dict()
    unknown = [note.key for note in found.dropped if "unknown key" in note.text]
    assert unknown == (["micro_batchsize"] if path.stem == "unfinished" else [])


def test_axolotl_qlora() -> None:
    found = convert_file(file("axolotl", "qlora"))
    wanted = {
        "model": "example/base-8b",
        "data": ["hf:example/instructions"],
        "format": "alpaca",
        "output_dir": "./outputs/qlora",
        "quantization": "nf4",
        "r": 32,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "per_device_train_batch_size": 2,
        "max_length": 4096,
        "learning_rate": 2e-4,
        "recompute": "layers",
        "eval_fraction": 0.05,
        "dtype": "auto",
        "optimizer": "adamw",
    }
    assert {name: found.settings.get(name) for name in wanted} == wanted
    assert "paged_adamw_32bit" in texts(found, "changed")["optimizer"]
    dropped = texts(found, "dropped")
    assert {"special_tokens.pad_token", "evals_per_epoch", "saves_per_epoch"} <= dropped.keys()
    assert "fsdp" not in dropped and "wandb_entity" not in dropped  # they are not set


def test_axolotl_values_in_other_forms() -> None:
    lora = settings("axolotl", "lora")
    assert (lora["quantization"], lora["learning_rate"], lora["eval_steps"]) == ("int8", 3e-4, 50)
    assert lora["columns"] == {"text": "body"} and lora["lr_scheduler_type"] == "constant"
    assert lora["warmup_ratio"] == 0.1 if "warmup_ratio" in lora else lora["warmup_steps"] == 20
    assert "save_steps" not in lora
    chat = settings("axolotl", "chat")
    assert (chat["format"], chat["data"]) == ("sharegpt", ["hf:example/conversations:train[:20%]"])
    assert (chat["quantization"], chat["double_quantization"], chat["dtype"]) == ("fp4", False, "bfloat16")
    assert "rex" in texts(convert_file(file("axolotl", "chat")), "changed")["lr_scheduler"]
    columns = settings("axolotl", "columns")
    assert columns["data"] == ["hf:example/tickets@v2#english"]
    assert columns["columns"] == {"instruction": "subject", "input": "body", "output": "reply"}
    assert columns["eval_fraction"] == 0.0 and columns["num_train_epochs"] == 1.0  # Axolotl's defaults
    several = settings("axolotl", "several")
    assert several["data"] == ["a.jsonl", "b.jsonl", "hf:example/talk"] and "format" not in several
    assert several["eval_data"] == ["held.jsonl"]
    assert several["use_dora"] and several["layers_to_transform"] == [0, 1, 2]
    assert settings("axolotl", "tokens")["new_tokens"] == ["<think>", "</think>"]


def test_what_is_missing_is_stated() -> None:
    found = convert_file(file("axolotl", "unfinished"))
    assert found.missing == ("data", "output_dir")
    assert "Did you mean micro_batch_size" in texts(found, "dropped")["micro_batchsize"]
    assert {"data", "output_dir"}.isdisjoint(found.settings)


def test_llama_factory() -> None:
    sft = settings("llama_factory", "sft")
    assert sft["data"] == ["data/notes.json", "data/rules.json"]
    assert (sft["r"], sft["lora_alpha"], sft["target_modules"], sft["dtype"]) == (8, 16, "all-linear", "bfloat16")
    assert sft["recompute"] == "layers" and "overwrite" not in sft
    defaults = settings("llama_factory", "qlora")
    assert (defaults["learning_rate"], defaults["max_length"], defaults["lr_scheduler_type"]) == (5e-5, 2048, "linear")
    assert (defaults["quantization"], defaults["double_quantization"]) == ("nf4", False)
    hqq = settings("llama_factory", "hqq")
    assert (hqq["quantization"], hqq["dtype"]) == ("hqq8", "float16")
    assert "quantization_bit" in texts(convert_file(file("llama_factory", "gptq")), "dropped")
    assert settings("llama_factory", "pissa")["init_lora_weights"] == "pissa_niter_4"
    targets = settings("llama_factory", "targets")
    assert targets["target_modules"] == ["q_proj", "v_proj"] and targets["modules_to_save"] == [
        "embed_tokens",
        "lm_head",
    ]
    assert targets["new_tokens"] == ["<a>", "<b>"] and "recompute" not in targets
    assert settings("llama_factory", "files")["data"] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("tool", "name", "keys"),
    [
        ("axolotl", "deepspeed", {"deepspeed", "ddp_timeout"}),
        ("axolotl", "fsdp", {"fsdp", "fsdp_config"}),
        ("llama_factory", "deepspeed", {"deepspeed"}),
    ],
)
def test_settings_of_several_processes_name_what_replaces_them(tool: str, name: str, keys: set[str]) -> None:
    dropped = texts(convert_file(file(tool, name)), "dropped")
    assert all("--nproc" in dropped[key] and "`parallel: fsdp`" in dropped[key] for key in keys)


def test_what_cannot_be_split_over_processes_is_stated(tmp_path: Path) -> None:
    keys = ("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size")
    values = {"base_model": "m", "adapter": "lora", "sequence_len": 8} | dict.fromkeys(keys, 2)
    dropped = texts(convert_file(text_file(tmp_path / "x.yaml", **values)), "dropped")
    assert all("rows" in dropped[key] and "not split" in dropped[key] for key in keys)


def test_mlx_lm() -> None:
    full = settings("mlx_lm", "full")
    assert full["data"] == ["/data/sets/talk/train.jsonl"] and full["eval_data"] == ["/data/sets/talk/valid.jsonl"]
    assert (full["r"], full["lora_alpha"], full["max_steps"], full["save_steps"]) == (8, 160.0, 1000, 100)
    assert full["target_modules"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert full["lr_scheduler_type"] == "constant" and full["warmup_ratio"] == 0.0
    assert "16" in texts(convert_file(file("mlx_lm", "full")), "changed")["num_layers"]
    schedule = settings("mlx_lm", "schedule")
    assert schedule["lr_scheduler_type"] == "cosine"
    assert schedule["warmup_ratio"] == 0.2 if "warmup_ratio" in schedule else schedule["warmup_steps"] == 100
    assert settings("mlx_lm", "dora")["use_dora"] is True
    hub = settings("mlx_lm", "hub")
    assert hub["data"] == ["hf:owner/talks:train[:1000]"] and hub["eval_data"] == ["hf:owner/talks:train[-100:]"]


def test_peft() -> None:
    plain = convert_file(file("peft", "plain"))
    assert dict(plain.settings) == {
        "model": "example/base",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "use_dora": False,
        "use_rslora": False,
        "bias": "none",
    }
    assert plain.missing == ("data", "output_dir") and not plain.dropped
    assert settings("peft", "patterns")["rank_pattern"] == {"down_proj": 32}
    assert "init_lora_weights" in texts(convert_file(file("peft", "loftq")), "dropped")


@pytest.mark.parametrize(
    ("given", "task"),
    [("SEQ_CLS", "classification"), ("TOKEN_CLS", "token-classification"), ("CAUSAL_LM", None), (None, None)],
)
def test_the_task_of_peft(given: str | None, task: str | None, tmp_path: Path) -> None:
    found = convert_file(text_file(tmp_path / "x.yaml", peft_type="LORA", task_type=given, r=4))
    assert found.settings.get("task") == task


@pytest.mark.parametrize(
    ("values", "key", "word"),
    [
        ({"base_model": "m", "datasets": [], "sequence_len": 8}, "adapter", "not all weights"),
        ({"base_model": "m", "adapter": "llama-adapter", "sequence_len": 8}, "adapter", "LoRA"),
        ({"base_model": "m", "adapter": "lora", "rl": "dpo", "sequence_len": 8}, "rl", "preferences"),
        ({"stage": "dpo", "finetuning_type": "lora", "cutoff_len": 8}, "stage", "preferences"),
        ({"stage": "sft", "finetuning_type": "full", "cutoff_len": 8}, "finetuning_type", "full"),
        ({"iters": 5, "fine_tune_type": "full"}, "fine_tune_type", "not all weights"),
        ({"peft_type": "IA3", "r": 4}, "peft_type", "LoRA"),
        ({"peft_type": "LORA", "task_type": "QUESTION_ANS"}, "task_type", "has no task for it"),
    ],
)
def test_another_kind_of_training_is_an_error(values: dict[str, Any], key: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=word) as error:
        convert_file(text_file(tmp_path / "x.yaml", **values))
    assert error.value.field == key
    assert error.value.fields["where"] is not None


@pytest.mark.parametrize(
    "text", ["a: 1\nb: 2\n", "", "- 1\n", "r: 4\nmodel: x\n"], ids=["unknown", "empty", "list", "own"]
)
def test_a_file_of_no_known_tool(text: str, tmp_path: Path) -> None:
    (path := tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        convert_file(path)
    if "expected lines" not in str(error.value):
        assert error.value.fields["allowed"] == tuple(tool.name for tool in FOREIGN)
        assert all(tool.name in str(error.value) for tool in FOREIGN)


def test_a_value_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    path = text_file(tmp_path / "x.yaml", base_model="m", adapter="lora", lora_r="many", sequence_len=8)
    with pytest.raises(ConfigError, match="r is 'many'") as error:
        convert_file(path)
    assert error.value.field == "r" and str(path) in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "base_model: !!python/object/apply:os.system ['touch made']\nadapter: lora\n",
        "base_model: m\nbase_model: n\nadapter: lora\n",
        "base_model: [\n",
    ],
    ids=["code", "repeated", "syntax"],
)
def test_nothing_in_a_file_is_evaluated(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (path := tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML"):
        convert_file(path)
    assert not (tmp_path / "made").exists()


def test_a_key_cannot_add_lines_to_the_output(tmp_path: Path) -> None:
    path = text_file(
        tmp_path / "x.yaml", base_model="m", adapter="lora", sequence_len=8, **{"a\noverwrite: true\n#": 1}
    )
    (out := tmp_path / "out.yaml").write_text(convert_file(path).text())
    assert "overwrite" not in read_settings_file(out)
