"""Cards: what identifies an adapter, and code and commands that run as they are written."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests import small_models
from tests.small_gguf import write_gguf

from lorakit import core, hub
from lorakit.cli import main
from lorakit.config import LoraConfig
from lorakit.durable import sha256_file
from lorakit.export.peft_folder import serving_commands
from lorakit.train.files.model_card import BASE, HERE, model_card

RECORD = {
    "settings": {"data": ["/home/me/notes.md"], "learning_rate": 3e-4, "optimizer": "adamw", "weight_decay": 0.0},
    "versions": {"lorakit": "9"},
}
TRAINING = {
    "task": "causal-lm",
    "step": 8,
    "total_steps": 9,
    "seed": 3,
    "dtype": "float32",
    "base_eval_loss": 2.0,
    "eval_loss": 1.0,
    "data_sha256": {"notes.md": "ab" * 32},
}


@pytest.fixture
def base(tiny_model_directory: Path) -> Path:
    """A Llama, as mlx-lm needs it."""
    hub.save_model(hub.load_model(tiny_model_directory), tiny_model_directory.with_name("base"))
    for path in hub.tokenizer_files(tiny_model_directory):
        shutil.copy(path, tiny_model_directory.with_name("base"))
    return tiny_model_directory.with_name("base")


def adapted(base: Path, folder: Path, **settings: Any) -> str:
    """Save an adapter with random factors, and return its card."""
    model = hub.load_model(base)
    fields = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(1)
    core.attach(model, LoraConfig(**fields | settings))
    core.save_adapter(model, folder, base_model_name_or_path=str(base), facts={"training": TRAINING})
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return model_card(folder, 640, RECORD)


def blocks(card: str, language: str, base: Path, folder: Path) -> list[str]:
    """Return the blocks of code of a card in a language, with paths."""
    found = re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)
    return [block.replace(HERE, str(folder)).replace(BASE, str(base)) for block in found]


def test_what_identifies_an_adapter(base: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    card = adapted(base, tmp_path / "notes")
    assert fingerprint(card) == fingerprint(adapted(base, tmp_path / "again"))
    for text in (
        "# LoRA adapter for base",
        "640 trained parameters",
        "fingerprint ",
        f"| weights | SHA-256 {sha256_file(tmp_path / 'notes' / 'adapter_model.safetensors')} |",
        "| data | notes.md (SHA-256 abababababab) |",
        "| settings | optimizer adamw |",
        "8 of 9 steps, learning rate 0.0003, seed 3",
        "Evaluation perplexity: 7.39 → 2.72",
        "| versions | lorakit 9 |",
    ):
        assert text in card
    assert str(tmp_path) not in card and "/home/me" not in card
    hub.save_model(small_models.llama(vocab_size=len(tiny_tokenizer)), tmp_path / "other", tiny_tokenizer)
    assert fingerprint(card) != fingerprint(adapted(tmp_path / "other", tmp_path / "elsewhere"))


def fingerprint(card: str) -> str:
    (found,) = re.findall(r"fingerprint ([0-9a-f]{12}) ", card)
    return found


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # by peft
@pytest.mark.parametrize("package", ["lorakit", "peft"])
def test_the_python_code_runs(package: str, base: Path, tmp_path: Path) -> None:
    card = adapted(base, tmp_path / "notes")
    (code,) = blocks(card, "python", base, tmp_path / "notes")
    found: dict[str, Any] = {}
    exec(code.replace("from lorakit import", f"from {package} import"), found)
    expected = hub.load_model(base)
    core.load_adapter(expected, tmp_path / "notes")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(found["model"].eval()(input_ids=ids).logits, expected.eval()(ids).logits)
    assert type(found["model"]).__module__.partition(".")[0] == package
    assert len(found["tokenizer"]) == len(transformers.AutoTokenizer.from_pretrained(base))


def test_the_commands_for_other_runtimes_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = adapted(base, tmp_path / "notes", rank_pattern={"q_proj": 20})
    expected = serving_commands("NAME@HASH12", BASE, 20, "OUTPUT")
    assert "--max-lora-rank 32 " in expected["vLLM"]
    assert f"{expected['vLLM']}  # vLLM" in card and f"{expected['SGLang']}  # SGLang" in card
    monkeypatch.chdir(tmp_path)
    model, tokenizer = hub.load_model(base), hub.load_tokenizer(base)
    write_gguf(tmp_path / "BASE.gguf", model, tokenizer, "F32")
    for block in blocks(card, "sh", base, tmp_path / "notes"):
        export = shlex.split(block.splitlines()[0].replace("OUTPUT", f"out-{len([*tmp_path.iterdir()])}"))
        assert export[0] == "lorakit"
        assert ("ollama create NAME:HASH12" in block) == ("--merged" in export)
        assert main(export[1:]) == 0


def test_mlx_lm_generates_as_the_card_says(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx_lm")
    card = adapted(base, tmp_path / "notes")
    (block,) = (block for block in blocks(card, "sh", base, tmp_path / "notes") if "mlx_lm.generate" in block)
    export, generate = block.splitlines()
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(export)[1:]) == 0
    program, *words = shlex.split(generate, comments=True)
    command = [sys.executable, "-m", program, *words, "--max-tokens", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Generation: 3 tokens" in done.stdout


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "DoRA (use_dora)"),
        ({"modules_to_save": ["norm"]}, "saved modules (modules_to_save)"),
        ({"trainable_token_indices": [3]}, "trained token rows (trainable_token_indices)"),
    ],
    ids=["dora", "module", "tokens"],
)
def test_what_other_runtimes_cannot_apply(
    settings: dict[str, Any], said: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = adapted(base, tmp_path / "notes", **settings)
    assert said in card and "vllm serve" not in card
    assert (
        main(["export", "vllm", str(tmp_path / "notes"), "--served-base", "b", "--output-dir", str(tmp_path / "out")])
        == 1
    )
    (merge,) = blocks(card, "sh", base, tmp_path / "notes")
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(merge)[1:]) == 0
    assert hub.load_model(tmp_path / "MERGED") is not None


def test_adapters_that_wait_for_tokens(base: Path, tmp_path: Path) -> None:
    card = adapted(base, tmp_path / "notes", alora_invocation_tokens=[1])
    assert "(aLoRA)" in card and "vllm serve" not in card
    (block,) = blocks(card, "sh", base, tmp_path / "notes")
    assert "llama-cli" in block
    assert main(shlex.split(block.splitlines()[0].replace("OUTPUT", str(tmp_path / "out")))[1:]) == 0


def test_an_export_has_a_card(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path / "notes")
    words = [
        "export",
        "vllm",
        str(tmp_path / "notes"),
        "--served-base",
        str(base),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--verify"]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    card = (folder / "README.md").read_text()
    for text in (
        "plain LoRA of rank 4",
        "8 of 9 steps",
        f"{folder.name}=OUTPUT/{folder.name}",
        "--lora OUTPUT/NAME@HASH12.gguf",
        "lorakit export mlx",
        "| float32 |",
        "the adapter's answers",
    ):
        assert text in card
    assert f"{folder.name}.gguf" not in card  # that file has its own hash
    assert "lorakit export vllm" not in card and str(tmp_path) not in card
    before = (folder / "README.md").read_bytes()
    assert main(words) == 0
    assert (folder / "README.md").read_bytes() == before


def test_other_tasks_are_for_lorakit_and_peft(base: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForSequenceClassification.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    core.attach(model, config)
    core.save_adapter(model, tmp_path / "labels", base_model_name_or_path="owner/base")
    card = model_card(tmp_path / "labels", 1)
    assert "AutoModelForSequenceClassification" in card and "vllm" not in card
