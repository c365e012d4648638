"""`lorakit train --new-tokens` on the command line: training, saving, resuming, using, merging, and errors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorakit import cli, core, hub
from lorakit.config import LoraConfig
from lorakit.train.files import checkpoint
from lorakit.train.settings.sources import gather

TOKENS = ["<think>", "</think>"]


def _text(n: int) -> str:
    return f"What is {n} and {n}? <think>add {n} twice</think> It is {2 * n}. " * 3


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    for n in range(6):
        (tmp_path / f"{n}.txt").write_text(_text(n), encoding="utf-8")
    return [str(tmp_path / f"{n}.txt") for n in range(6)]


@pytest.fixture
def base(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    """A model directory whose embedding has `spare` more rows than its tokenizer has tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(*, tied: bool = True, spare: int = 0, width: int = 32) -> Path:
        config = LlamaConfig(
            vocab_size=len(tiny_tokenizer) + spare,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            initializer_range=0.1,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
        torch.manual_seed(0)
        folder = tmp_path / f"base-{tied}-{spare}-{width}"
        LlamaForCausalLM(config).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


def _train(
    model: Path, texts: list[str], folder: Path, *more: str, tokens: str = "<think>,</think>", rate: float = 0.01
) -> int:
    words = ["--model", str(model), "--data", *texts, "--output-dir", str(folder), "--max-length", "48"]
    words += ["--dtype", "float32", "--device", "cpu", "--max-steps", "4", "--eval-fraction", "0.2", "--r", "4"]
    words += ["--learning-rate", str(rate), "--new-tokens", *tokens.split(" "), "--save-total-limit", "9", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "matplotlib.figure", None)
        return cli.main(["train", *words])


def _logits(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=torch.tensor([ids])).logits
    return logits


def _adapted(model: Path, adapter: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*rows were appended")
        loaded = hub.load_model(model, "float32")
        assert core.load_adapter(loaded, adapter).base == "same"
    return loaded


@pytest.mark.costly
@pytest.mark.filterwarnings("ignore:.*rows were appended")
@pytest.mark.parametrize(("tied", "spare"), [(True, 0), (False, 0), (True, 1), (False, 8)])
def test_from_training_to_a_merged_model(
    tied: bool, spare: int, base: Any, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = base(tied=tied, spare=spare), tmp_path / "run"
    assert _train(model, texts, folder) == 0
    said = capsys.readouterr().out
    known = len(hub.load_tokenizer(model))
    assert f"New tokens: <think> ({known}), </think> ({known + 1});" in said
    assert "not in the training data" not in said

    config = json.loads((folder / "adapter/adapter_config.json").read_text(encoding="utf-8"))
    rows = [known, known + 1]
    assert config["trainable_token_indices"] == (rows if tied else {"model.embed_tokens": rows, "lm_head": rows})
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert record["plan"]["adapter"]["trainable"] == record["resolved"]["trainable_parameters"]
    assert sum(record["plan"]["adapter"]["token_rows"].values()) == (1 if tied else 2) * 2 * 32
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    assert sum(t.numel() for t in weights.values()) == record["resolved"]["trainable_parameters"]  # and no embedding

    for target in ("adapter", "checkpoint-1", "checkpoint-4"):
        tokenizer = hub.load_tokenizer(hub.ModelSource("directory", "", str(folder / target), None, ""))
        assert [tokenizer.convert_tokens_to_ids(token) for token in TOKENS] == rows
    ids = tokenizer("3? <think>add</think> It")["input_ids"]
    assert [i for i in ids if i >= known] == rows

    wanted = _logits(_adapted(model, folder / "checkpoint-4"), ids)
    assert wanted.shape[-1] == known + max(2, spare)
    assert torch.equal(_logits(_adapted(model, folder / "adapter"), ids), wanted)  # the best step is the last one here

    assert cli.main([
        "merge", "--model", str(model), "--adapter", str(folder / "adapter"), "--output-dir", str(tmp_path / "merged")
    ]) == 0  # fmt: skip
    merged = hub.load_model(tmp_path / "merged")
    assert torch.allclose(_logits(merged, ids), wanted, atol=1e-4)
    assert merged.config.vocab_size == known + max(2, spare)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) is tied
    assert hub.load_tokenizer(tmp_path / "merged")("a</think>")["input_ids"][-1] == known + 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = hub.load_model(model, "float32")
        if spare < 2:
            theirs.resize_token_embeddings(known + 2)
        theirs = peft.PeftModel.from_pretrained(theirs, folder / "adapter")
    assert torch.allclose(_logits(theirs, ids), wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*rows were appended")
@pytest.mark.filterwarnings("ignore:.*B·A is zero at all sites:UserWarning")  # of the new adapter
def test_eval_and_generate_use_the_adapters_own_tokenizer(
    base: Any, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder, plain = base(), tmp_path / "run", tmp_path / "plain"
    assert _train(model, texts, folder) == 0
    held_out = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    core_model = hub.load_model(model, "float32")
    core.attach(core_model, LoraConfig(r=2, target_modules=["q_proj"]))
    core.save_adapter(core_model, plain)
    hub.load_tokenizer(model).save_pretrained(plain)
    capsys.readouterr()
    words = ["--model", str(model), "--dtype", "float32", "--device", "cpu"]
    both = [str(plain), str(folder / "adapter")]
    for adapters in (both, both[::-1]):
        assert cli.main(["eval", *words, "--data", *texts, "--max-length", "48", "--adapter", *adapters, "--json"]) == 0
        captured = capsys.readouterr()
        assert captured.err.count("has its own tokenizer") == 1
        found = {row["name"]: row for row in json.loads(captured.out)["results"]}
        assert found[both[0]]["tokens"] == found["base"]["tokens"]
        assert found[both[0]]["loss"] == pytest.approx(found["base"]["loss"])  # a new adapter
        assert found[both[1]]["tokens"] < found["base"]["tokens"]
        assert found[both[1]]["loss"] < 0.95 * found["base"]["loss"]
    assert held_out["result"]["best_loss"] < held_out["result"]["first_loss"]

    asked = ["--prompt", "3? <think>", "--max-new-tokens", "2", "--base", "--json"]
    for target in (folder / "adapter", folder / "checkpoint-4"):
        assert cli.main(["generate", *words, "--adapter", str(target), *asked]) == 0
        captured = capsys.readouterr()
        assert len(json.loads(captured.out)["results"][0]["answers"]) == 2
    assert (
        cli.main(["generate", *words, "--adapter", *both, *asked]) == 0
    )  # the one that adds rows to the base comes second
    captured = capsys.readouterr()
    assert "different tokenizers" not in captured.err


@pytest.mark.parametrize("tied", [True, False])
def test_resumed_is_never_interrupted(tied: bool, base: Any, texts: list[str], tmp_path: Path) -> None:
    model = base(tied=tied)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert _train(model, texts, whole, "--weight-decay", "0.1") == 0
    assert _train(model, texts, parted, "--weight-decay", "0.1") == 0
    for step in (3, 4):
        checkpoint.discard(parted / f"checkpoint-{step}")
    assert cli.main(["train", "--output-dir", str(parted), "--resume"]) == 0
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = load_file(whole / "checkpoint-4" / name), load_file(parted / "checkpoint-4" / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_rows_begin_at_the_mean_of_their_pieces_and_no_others_move(base: Any, texts: list[str], tmp_path: Path) -> None:
    model, folder = base(tied=False), tmp_path / "run"
    assert _train(model, texts, folder, rate=1e-9) == 0
    plain, tokenizer = hub.load_model(model), hub.load_tokenizer(model)
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    for table in ("model.embed_tokens", "lm_head"):
        rows = weights[f"base_model.model.{table}.token_adapter.trainable_tokens_delta"]
        for number, token in enumerate(TOKENS):
            pieces = tokenizer(token, add_special_tokens=False)["input_ids"]
            wanted = plain.get_submodule(table).weight[pieces].mean(0)
            assert torch.allclose(rows[number], wanted, atol=1e-6)


def test_tokens_that_the_data_does_not_have(
    base: Any, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(base(), texts, tmp_path / "run", tokens="<think> <never>") == 0
    assert (
        "These new tokens are not in the training data, so their rows stay untrained: <never>"
        in capsys.readouterr().out
    )


def test_a_file_lists_them_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    given = {"model": "m", "data": "d", "output_dir": "o"}
    for text, wanted in (("['a,b', ' c']", ["a,b", " c"]), ("a, b", ["a", "b"]), ("[]", [])):
        file.write_text(f"new-tokens: {text}\n", encoding="utf-8")
        assert gather(given, file).new_tokens == wanted


@pytest.mark.parametrize(
    ("tokens", "more", "text"),
    [
        ("", (), "new_tokens is ''; a token must not be empty."),
        ("<a>,,<b>", (), "new_tokens is '<a>,,<b>'; a token must not be empty."),
        ("<a>,<b>,<a>", (), "new_tokens is '<a>,<b>,<a>'; '<a>' occurs twice."),
        ("<a>,<|im_end|>", (), "new_tokens contains '<|im_end|>', which the tokenizer already has (id 2)"),
        ("a", (), "new_tokens contains 'a', which the tokenizer already has"),
        (
            "<a>",
            ("--target-modules", "q_proj", "embed_tokens"),
            "trainable_token_indices cannot be applied to model.embed_tokens, which has LoRA weights",
        ),
    ],
)
def test_what_is_refused(
    tokens: str,
    more: tuple[str, ...],
    text: str,
    base: Any,
    texts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _train(base(), texts, tmp_path / "run", *more, tokens=tokens) != 0
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_tokens_on_resume(
    base: Any, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(base(), texts, tmp_path / "run") == 0
    assert cli.main(["train", "--output-dir", str(tmp_path / "run"), "--resume", "--new-tokens", "<other>"]) == 1
    assert "new_tokens is ['<other>'] and was ['<think>', '</think>']" in capsys.readouterr().err


def test_a_tokenizer_without_a_vocabulary(
    base: Any, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    def refuse(self: Any, *given: Any, **more: Any) -> Any:
        raise NotImplementedError

    model = base()
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", refuse)
    assert _train(model, texts, tmp_path / "run") == 1
    text = "does not support adding tokens. Use a base with a tokenizer that does, or leave new_tokens out."
    assert text in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*rows were appended", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_on_a_quantized_base(base: Any, texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, folder = base(width=64), tmp_path / "run"
    assert _train(model, texts, folder, "--quantization", "nf4") == 0
    words = ["--model", str(model), "--adapter", str(folder / "adapter"), "--quantization", "nf4"]
    assert cli.main(["merge", *words, "--output-dir", str(tmp_path / "merged")]) == 0
    ids = hub.load_tokenizer(tmp_path / "merged")("3? <think>add</think> It")["input_ids"]
    loaded = hub.load_model(model, "float32", quantization="nf4")
    core.load_adapter(loaded, folder / "adapter")
    assert torch.allclose(_logits(hub.load_model(tmp_path / "merged"), ids), _logits(loaded, ids), atol=1e-2)


@pytest.mark.parametrize(
    "more",
    [
        ("--init-lora-weights", "pissa"),
        ("--init-lora-weights", "eva"),
        ("--allocate-ranks", "gradients", "--optimizer", "lorafa"),
        ("--learning-rate-pattern", "embed_tokens=0.1", "--use-dora"),
    ],
    ids=lambda more: "-".join(more[1:2]),
)
@pytest.mark.filterwarnings("ignore:.*rows were appended")
def test_beside_other_settings(more: tuple[str, ...], base: Any, texts: list[str], tmp_path: Path) -> None:
    model, folder = base(), tmp_path / "run"
    assert _train(model, texts, folder, *more) == 0
    found = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    ids = hub.load_tokenizer(hub.ModelSource("directory", "", str(folder / "adapter"), None, ""))("<think>a b")
    assert torch.isfinite(_logits(_adapted(model, folder / "adapter"), ids["input_ids"])).all()
    assert found["result"]["best_loss"] < found["result"]["first_loss"]
