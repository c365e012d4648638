"""A run on a small Mixtral on the command line: planning, training, resuming, evaluating, generating, merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit import core, hub
from lorakit.cli import main

Train = Callable[..., int]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def mixtral(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A directory with a Mixtral of two layers and four experts."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 128, "bos_token_id": None}
    config = transformers.MixtralConfig(**sizes, **more, vocab_size=len(tiny_tokenizer), eos_token_id=0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    tiny_tokenizer.save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


@pytest.fixture
def train(tmp_path: Path, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Run `lorakit train` with all experts and routers; keywords replace flags."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)  # plotting takes longer than training
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 20, encoding="utf-8")

    def call(*more: str, **flags: Any) -> int:
        given = {
            "model": mixtral,
            "data": text,
            "eval-data": text,
            "output-dir": tmp_path / "run",
            "target-modules": "all-linear",
            "dtype": "float32",
            "device": "cpu",
            "max-length": 24,
            "max-steps": 4,
            "learning-rate": 0.02,
            "lr-scheduler-type": "constant",
            "warmup-ratio": 0,
            "r": 2,
        }
        given.update({name.replace("_", "-"): value for name, value in flags.items()})
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return main(["train", *words, *more])

    return call


def test_a_run_trains_experts_and_routers_as_planned(
    train: Train, mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["result"]["best_loss"] < record["result"]["first_loss"]
    tensors = load_file(tmp_path / "run" / "adapter" / WEIGHTS)
    assert {name.partition(".mlp.")[2] for name in tensors if ".mlp." in name} == {
        f"{site}.lora_{part}.weight" for site in ("gate", "experts", "experts.base_layer") for part in "AB"
    }
    assert all(bool(tensor.any()) for tensor in tensors.values())
    capsys.readouterr()
    assert main(["plan", str(mixtral), "--r", "2", "--target-modules", "all-linear", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["adapter"]["trainable"] == record["resolved"]["trainable_parameters"]
    inactive = 2 * 2 * 3 * 32 * 48  # in each layer, 2 of 4 experts with 3 matrices
    assert planned["model"]["active_parameters"] == planned["model"]["parameters"] - inactive
    assert main(["plan", str(mixtral), "--r", "2", "--target-modules", "all-linear"]) == 0
    assert " per token (2 of 4 experts)" in capsys.readouterr().out


def test_what_the_targets_leave_out_is_said_once(
    train: Train, mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_tokenizer: Any
) -> None:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 1}
    more = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2}
    config = transformers.Llama4TextConfig(**sizes, **more, vocab_size=len(tiny_tokenizer), pad_token_id=None)
    transformers.Llama4ForCausalLM(config).save_pretrained(mixtral)
    assert train(max_steps=1) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The targets leave out ")]
    assert note in json.loads((tmp_path / "run" / "run.json").read_text())["result"]["notes"]


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(train: Train, tmp_path: Path) -> None:
    assert train("--save-steps", "2", output_dir=tmp_path / "whole") == 0
    assert train("--save-steps", "2", output_dir=tmp_path / "parts", max_steps=2) == 0
    assert main(["train", "--output-dir", str(tmp_path / "parts"), "--resume", "--max-steps", "4"]) == 0
    one, other = (tmp_path / name / "adapter" / WEIGHTS for name in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()


def test_the_adapter_is_evaluated_used_and_merged(
    train: Train, mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    adapter = tmp_path / "run" / "adapter"
    common = ["--model", str(mixtral), "--adapter", str(adapter), "--dtype", "float32", "--device", "cpu"]
    capsys.readouterr()
    assert main(["eval", *common, "--data", str(tmp_path / "text.txt"), "--json"]) == 0
    base, tuned = json.loads(capsys.readouterr().out)["results"]
    assert tuned["loss"] < base["loss"]
    assert main(["generate", *common, "--prompt", "The quick", "--max-new-tokens", "3"]) == 0
    merged = tmp_path / "merged"
    assert main(["merge", "--model", str(mixtral), "--adapter", str(adapter), "--output-dir", str(merged)]) == 0
    model, whole = hub.load_model(mixtral, "float32"), hub.load_model(merged, "float32")
    core.load_adapter(model, adapter)
    ids = torch.randint(3, 57, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, whole(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
