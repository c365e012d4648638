"""`lorakit plan`: output, and an error for each mistake."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import Llama4TextConfig

from lorakit import core
from lorakit.cli import main, plan
from lorakit.config import LoraConfig
from lorakit.machine import this_machine

from ..laws.zoo import MIXTRAL

REFERENCE = ["plan", "gpt2", "--r", "8", "--lora-alpha", "16", "--target-modules", "c_attn", "c_proj"]
AT_ONCE = [*REFERENCE, "--dtype", "bf16"]  # some processors are measured to choose the dtype


def _json(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_the_reference_project(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*AT_ONCE, "--ranks", "4,8,16,32"]) == 0
    out = capsys.readouterr().out
    assert "trainable    811,008 of 124,439,808 (0.65%)\npeak memory " in out
    assert "12,288   24,576     49,152     98,304" in out
    assert "time         no estimate; pass --calibrate" in out
    assert "= 811,008" not in out
    assert main([*AT_ONCE, "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "in the attention and MLP blocks" in " ".join(out.split())
    assert "12 × (24,576 + 12,288 + 30,720) = 811,008" in out
    assert "No time estimate" in out


def test_nothing_is_wider_than_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ranks", "4,8,16", "--max-steps", "9", "--tokens-per-second", "50", "--memory-budget", "4GB"]
    words += ["--dtype", "bf16"]
    assert main(["plan", "SmolLM2-135M", *words, "--verbose"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "time         " in out and "memory budget 4.00 GB: --recompute none" in out


def test_rows_longer_than_the_model_takes_are_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2", "--max-length", "2000"]) == 0
    assert "warning: gpt2 supports at most 1,024 tokens; the job's rows have 2,000." in capsys.readouterr().out


def test_the_assumed_length_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "SmolLM2-135M", "--dtype", "bf16"]) == 0
    assert "assumed      rows of 512 tokens; set --max-length" in capsys.readouterr().out
    assert main(["plan", "SmolLM2-135M", "--dtype", "bf16", "--max-length", "512"]) == 0
    assert "assumed" not in capsys.readouterr().out


def test_json_is_the_same_content(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ranks", "4", "8", "--max-steps=10", "--tokens-per-second", "512", "--dtype", "fp32"]
    values = _json([*REFERENCE, *words], capsys)
    assert values["adapter"]["trainable"] == 811_008
    assert values["ranks"]["ranks"] == [4, 8]
    assert values["lora"]["run_seconds"] == 10 * 4 * 512 / 512
    assert values["job"]["dtype"] == "float32"


def test_flags_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "gpt2", "--batch-size", "2", "--max_length", "128", "--gradient-accumulation-steps", "3"]
    words += ["--dtype", "bf16", "--gradient-checkpointing", "--use-dora", "--bias", "all"]
    words += ["--tokens", "1000", "--tokens-per-second", "100"]
    values = _json(words, capsys)
    job = values["job"]
    assert (job["batch_rows"], job["length_tokens"], job["accumulation"]) == (2, 128, 3)
    assert (job["dtype"], job["gradient_checkpointing"], job["steps"]) == ("bfloat16", True, 2)
    assert values["adapter"]["magnitudes"] > 0
    assert values["adapter"]["biases"] == 102_144


def test_forwards_are_those_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "Llama-3.2-1B", "--max-length", "256", "--dtype", "bfloat16"]
    fast, own = _json(words, capsys), _json([*words, "--no-accelerate"], capsys)
    assert (fast["job"]["accelerated"], own["job"]["accelerated"]) == (True, False)
    above = [values["lora"]["memory"]["above_weights_bytes"] for values in (fast, own)]
    assert above[0] < 0.5 * above[1]
    assert fast["full_fine_tuning"]["memory"] == {**own["full_fine_tuning"]["memory"]}
    assert main([*words, "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16, accelerated" in out and "Rows are packed" in " ".join(out.split())
    assert main([*words, "--no-accelerate"]) == 0
    assert "bfloat16, not accelerated" in capsys.readouterr().out


def test_what_is_computed_again_is_planned_or_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "SmolLM2-135M", "--max-length", "256", "--dtype", "bfloat16"]
    peaks = {
        way: _json([*words, "--recompute", way], capsys)["lora"]["memory"]["peak_bytes"]
        for way in ("none", "feed-forward", "layers")
    }
    chosen = _json([*words, "--memory-budget", f"{peaks['feed-forward']}B"], capsys)
    assert chosen["job"]["recompute"] == "feed-forward"
    assert chosen["lora"]["memory"]["peak_bytes"] == peaks["feed-forward"]
    assert "--recompute feed-forward is the cheapest setting that fits" in chosen["machine"][-1]
    assert main([*words, "--recompute", "feed-forward", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "bfloat16, feed-forward recomputed, accelerated" in out and "\nrecomputed " in out
    assert main([*words, "--memory-budget", "100MB"]) == 2
    assert "does not fit in a memory budget of 100 MB" in capsys.readouterr().err
    assert main([*words, "--memory-budget", "1GB", "--gradient-checkpointing"]) == 2
    assert "memory_budget and recompute=layers are mutually exclusive" in capsys.readouterr().err


def test_new_tokens_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """A new token is one row if embedding and head are tied, else two."""
    words = ["--r", "8", "--new-tokens", "<think>,</think>", "<x>"]
    for model, rows in (
        ("gpt2", {"transformer.wte": 768}),
        ("Llama-3.1-8B", {"model.embed_tokens": 4096, "lm_head": 4096}),
    ):
        plain, values = _json(["plan", model, "--r", "8"], capsys), _json(["plan", model, *words], capsys)
        assert values["adapter"]["token_rows"] == {path: 3 * width for path, width in rows.items()}
        assert values["adapter"]["trainable"] == plain["adapter"]["trainable"] + 3 * sum(rows.values())
        assert values["lora"]["saved_bytes"] == plain["lora"]["saved_bytes"] + 4 * 3 * sum(rows.values())
        assert values["lora"]["flops_per_token"]["forward"] > plain["lora"]["flops_per_token"]["forward"]
    assert main(["plan", "gpt2", *words, "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "transformer.wte has trainable token rows with 2,304 parameters." in " ".join(out.split())


def test_defaults_are_those_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    values = _json(["plan", "HuggingFaceTB/SmolLM2-135M"], capsys)
    assert {(g["rank"], g["scale"], g["entry"]) for g in values["adapter"]["groups"]} == {(16, 2.0, "all-linear")}
    assert (values["job"]["batch_rows"], values["job"]["length_tokens"]) == (4, 512)


def test_a_directory_and_its_config(tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--r", "4", "--target-modules", "q_proj", "v_proj"]
    whole = _json(["plan", str(tiny_model_directory), *words], capsys)
    alone = _json(["plan", str(tiny_model_directory / "config.json"), *words], capsys)
    assert whole["adapter"]["trainable"] == 2 * 4 * (32 + 32 + 32 + 16)
    assert whole["adapter"] == alone["adapter"]
    assert whole["job"]["length_tokens"] == 128  # the model's limit


def test_a_time_without_a_speed_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit import hub

    measured = hub.Calibration(8e11, 2e11, 2e10, 2.0, "cpu", 2)
    monkeypatch.setattr(hub, "calibrate", lambda with_fp16, with_int8: measured)
    monkeypatch.setattr(hub.calibration, "units_of", lambda device: hub.Units(None, "the units are unknown"))
    monkeypatch.setattr(plan, "this_machine", lambda: dataclasses.replace(this_machine(), features=()))
    values = _json([*REFERENCE, "--max-steps", "10"], capsys)
    assert values["speed"]["flops_per_second"] == 8e11
    own = _json([*REFERENCE, "--max-steps", "10", "--no-accelerate"], capsys)
    assert values["lora"]["tokens_per_second"] > own["lora"]["tokens_per_second"]  # depends on the 2 threads
    assert values["full_fine_tuning"]["tokens_per_second"] == own["full_fine_tuning"]["tokens_per_second"]
    assert values["job"]["dtype"] == "bfloat16"
    assert values["machine"][0].startswith("Measured cpu (2 threads)")
    assert values["machine"][1].startswith("Precision: bfloat16: ")
    values = _json([*REFERENCE, "--calibrate", "--dtype", "fp32"], capsys)
    assert values["speed"]["flops_per_second"] == 2e11
    assert values["lora"]["run_seconds"] is None
    unmeasured = _json([*REFERENCE, "--max-steps", "10", "--no-calibrate"], capsys)
    assert unmeasured["speed"] is None and "as published" in unmeasured["machine"][0]
    without_steps = _json(REFERENCE, capsys)  # the units do not tell which dtype a run chooses
    assert without_steps["job"]["dtype"] == "bfloat16" and without_steps["speed"]["flops_per_second"] == 8e11


@pytest.mark.parametrize(
    ("features", "words", "dtype"),
    [
        (("avx512f", "avx512_bf16", "amx_bf16"), [], "bfloat16"),
        (("avx2",), [], "float32"),
        (("avx2",), ["--dtype", "bf16"], "bfloat16"),
        (("amx_bf16",), ["--gpu", "24GB"], "float32"),  # as published: the GPU is not this machine
        (("avx512_bf16",), ["--no-calibrate"], "float32"),
        (("amx_bf16",), ["--tokens-per-second", "100", "--max-steps", "5"], "bfloat16"),
    ],
)
def test_the_dtype_is_that_of_train(
    features: tuple[str, ...],
    words: list[str],
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(plan, "this_machine", lambda: dataclasses.replace(this_machine(), features=features))
    assert _json([*REFERENCE, *words], capsys)["job"]["dtype"] == dtype


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["gpt2", "--target-modules", "c_atn"], 1, "nearest: c_attn"),
        (["gpt2", "--r", "0"], 2, "r is 0; it must be an integer >= 1."),
        (["gpt2", "--lora-dropout", "1.5"], 2, "lora_dropout is 1.5; it must be in [0, 1)."),
        (["gpt2", "--ranks", "4,x"], 2, "--ranks contains 'x'"),
        (["gpt2", "--tokens", "9", "--max-steps", "9"], 2, "--max-steps and --tokens are mutually exclusive"),
        (["gpt2", "--max-steps", "0"], 2, "max_steps is 0; it must be at least 1."),
        (["gpt2", "--calibrate", "--tokens-per-second", "9"], 2, "mutually exclusive"),
        (["gpt2", "--tokens-per-second", "0"], 2, "speed must be above 0"),
        (["gpt2", "--batch-size", "0"], 2, "batch_rows is 0; it must be"),
        (["gpt2", "--dtype", "bfloat61"], 2, "Did you mean bfloat16?"),
        (["gpt2", "--targets", "c_attn"], 2, "--target"),
        ([], 2, "See `lorakit plan --help`."),
    ],
)
def test_mistakes(words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == code
    assert message in capsys.readouterr().err


def test_a_model_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["plan", "gpt3"]) == 1
    assert "gpt2" in capsys.readouterr().err


def test_a_published_model_is_planned_at_once_and_without_torch() -> None:
    code = f"import sys; from lorakit.cli import main; main({AT_ONCE!r}); sys.exit('torch' in sys.modules)"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "811,008" in done.stdout
    assert time.perf_counter() - began < 3  # a third of a second on an idle machine


def test_lorafa_trains_one_factor_of_two(capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for optimizer in ("adamw", "lorafa"):
        assert main(["plan", "gpt2", "--r", "8", "--optimizer", optimizer, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    whole, half = ({line["cause"]: line["size_bytes"] for line in p["lora"]["memory"]["lines"]} for p in plans)
    assert half["adapter"] == whole["adapter"]
    assert half["optimizer"] == 8 * plans[1]["adapter"]["trainable"] < whole["optimizer"]
    assert half["activations"] < whole["activations"]
    assert any("One factor of each site is frozen" in r for r in plans[1]["adapter"]["reasons"])
    assert main(["plan", "gpt2", "--optimizer", "sgd"]) == 2
    assert "optimizer is 'sgd'; it must be one of adamw, adamw8bit, lorafa, muon." in capsys.readouterr().err


def test_experts_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --target-modules only the parameters are adapted. The counts equal the model's."""
    model = MIXTRAL.model()
    model.config.save_pretrained(tmp_path)
    for words, fields in (
        ([], {"target_modules": []}),
        (["--target-modules", "all-linear"], {"target_modules": "all-linear"}),
    ):
        flags = ["plan", str(tmp_path), "--r", "4", "--target-parameters", *MIXTRAL.parameters, *words]
        assert main([*flags, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        attached = MIXTRAL.model()
        report = core.attach(attached, MIXTRAL.config(**fields))
        assert found["adapter"]["trainable"] == report.trainable_parameters
        assert {group["experts"] for group in found["adapter"]["groups"]} == ({3} if not words else {1, 3})
        assert main([*flags, "--verbose"]) == 0
        assert "3 experts in one parameter" in " ".join(capsys.readouterr().out.split())


def test_a_plan_says_what_all_linear_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 4}
    Llama4TextConfig(**sizes, architectures=["Llama4ForCausalLM"]).save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--target-modules", "all-linear"]
    for more in ([], ["--verbose"]):
        assert main([*words, *more]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert out.count("The targets leave out ") == 1 and "feed_forward.router" in out


def test_fit_chooses_the_batch_size(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "SmolLM2-135M", "--batch-size", "8", "--max-length", "1024", "--dtype", "bfloat16", "--fit"]
    roomy, tight = (_json([*words, size], capsys)["job"] for size in ("8GB", "1700MB"))
    assert roomy["batch_rows"] == 8 and roomy["recompute"] == "none"
    assert tight["batch_rows"] * tight["accumulation"] == 8 and tight["batch_rows"] < 8
    assert main([*words, "100MB"]) == 2
    assert "--quantization" in capsys.readouterr().err
    assert main([*words, "8GB", "--memory-budget", "8GB"]) == 2
    assert "fit and memory_budget are mutually exclusive" in capsys.readouterr().err


def test_a_task_is_planned_as_it_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A masked language model lacks the pooler and the classifier, which are trained in full."""
    import torch

    from lorakit import hub

    from .. import small_models

    torch.manual_seed(0)
    small_models.bert().save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--r", "2", "--max-length", "16"]
    values = _json([*words, "--task", "classification", "--labels", "5"], capsys)
    saved = values["adapter"]["modules_to_save"]
    assert saved == {"bert.pooler": 32 * 32 + 32, "classifier": 5 * 32 + 5}
    labels = {"id2label": {str(n): f"LABEL_{n}" for n in range(5)}}
    model = hub.load_for_task(tmp_path, hub.LoadOptions("float32"), "classification", labels).model
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["pooler"])
    core.attach(model, config)
    trained = sum(parameter.numel() for _, parameter in core.trainable_parameters(model))
    assert values["adapter"]["trainable"] == trained
    assert _json([*words, "--task", "embedding"], capsys)["adapter"]["modules_to_save"] == {}
    assert main([*words, "--task", "clasification"]) == 2
    assert "classification" in capsys.readouterr().err
    assert main([*words, "--task", "classification", "--labels", "0"]) == 2
    assert "labels" in capsys.readouterr().err


def test_a_decoder_that_classifies_has_no_logits_over_the_vocabulary(
    tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(tiny_model_directory), "--max-length", "16", "--dtype", "bf16"]
    lines = {
        task: {line["cause"]: line["size_bytes"] for line in values["lora"]["memory"]["lines"]}
        for task in ("causal-lm", "classification")
        for values in [_json([*words, "--task", task], capsys)]
    }
    assert lines["causal-lm"]["logits"] > lines["classification"]["logits"] == 0
    assert _json([*words, "--task", "causal-lm"], capsys) == _json(words, capsys)
