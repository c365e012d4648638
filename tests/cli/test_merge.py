"""lorakit.cli.merge: a directory that any program loads and that gives the outputs of base and adapters, or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, durable, hub
from lorakit.cli import main, merge
from lorakit.errors import BaseMismatchError
from lorakit.session import merging

Save = Callable[..., Path]
IDS = torch.tensor([[5, 17, 200, 3, 9, 44]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(IDS).logits
    assert isinstance(found, torch.Tensor)
    return found.float()


def unmerged(directory: Path, *adapters: Path) -> torch.Tensor:
    model = hub.load_model(directory, "float32")
    names = [f"a{number}" for number, _ in enumerate(adapters)]
    for name, adapter in zip(names, adapters, strict=True):
        core.load_adapter(model, adapter, name)
    if names:
        core.activate(model, *names)
    return logits(model)


def merged(*words: Any, code: int = 0) -> None:
    assert main(["merge", *map(str, words)]) == code


def error(capsys: pytest.CaptureFixture[str], code: int, *words: Any) -> str:
    merged(*words, code=code)
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_plain_directory_that_says_the_same(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one = save_adapter("one")
    merged("--model", tiny_model_directory, "--adapter", one, "--output-dir", tmp_path / "new" / "out")
    out = capsys.readouterr().out
    assert f"{tmp_path / 'new' / 'out'}: " in out
    assert "at 14 sites" in out
    assert "retained   100.00% of the update" in out
    assert "same top token as the unmerged model at 100% of positions" in out
    folder = tmp_path / "new" / "out"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(loaded), unmerged(tiny_model_directory, one), atol=1e-5)
    assert not torch.allclose(logits(loaded), unmerged(tiny_model_directory), atol=1e-2)
    assert loaded.config.tie_word_embeddings
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert {"config.json", "generation_config.json", "model.safetensors", "lorakit_merged.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    assert not list(tmp_path.rglob(f"{durable.TEMPORARY}*"))


def test_several_adapters_are_added_up(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = save_adapter("one", 1), save_adapter("two", 2, use_dora=True)
    merged("--model", tiny_model_directory, "--adapter", one, two, "--output-dir", tmp_path / "out", "--json")
    found = json.loads(capsys.readouterr().out)
    assert [entry["folder"] for entry in found["adapters"]] == [str(one), str(two)]
    assert torch.allclose(logits(hub.load_model(tmp_path / "out")), unmerged(tiny_model_directory, one, two), atol=1e-4)
    written = json.loads((tmp_path / "out" / "lorakit_merged.json").read_text())
    assert {key: found[key] for key in written} == written
    assert written["probe"]["dtype"] == "float32"
    assert written["probe"]["max_difference"] < written["probe"]["tolerance"]
    assert written["probe"]["effect"] > 0.1


@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 0.2), ("float16", 0.02), ("float32", 1e-5)])
def test_the_dtype_is_the_one_asked_for(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, dtype: str, atol: float
) -> None:
    one = save_adapter("one")
    merged("--model", tiny_model_directory, "--adapter", one, "--output-dir", tmp_path / "out", "--dtype", dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    model = hub.load_model(tmp_path / "out")
    assert str(model.dtype) == f"torch.{dtype}"
    assert torch.allclose(logits(model.float()), unmerged(tiny_model_directory, one), atol=atol)


def test_a_base_of_low_precision_can_be_widened(tiny_llama: Any, tmp_path: Path, save_adapter: Save) -> None:
    tiny_llama.bfloat16().save_pretrained(tmp_path / "low")
    one = save_adapter("one", model=hub.load_model(tmp_path / "low"), spread=1e-3)
    merged("--model", tmp_path / "low", "--adapter", one, "--output-dir", tmp_path / "wide", "--dtype", "float32")
    model = hub.load_model(tmp_path / "wide")
    assert model.dtype == torch.float32
    assert torch.allclose(logits(model), unmerged(tmp_path / "low", one), atol=1e-5)


def test_what_does_not_survive_is_said(
    tiny_llama: Any, tmp_path: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama.bfloat16().save_pretrained(tmp_path / "low")
    one = save_adapter("one", model=hub.load_model(tmp_path / "low"), spread=1e-5)
    merged("--model", tmp_path / "low", "--adapter", one, "--output-dir", tmp_path / "out", "--verbose")
    captured = capsys.readouterr()
    assert "of the adapter's update is retained in bfloat16 weights" in captured.err
    assert "--dtype float32 to keep it." in captured.err
    assert "neither the model nor the adapters have a tokenizer" in captured.err
    assert "sites that retain least" in captured.out


def test_tied_embeddings_need_a_word_and_come_apart(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one", target_modules=["embed_tokens", "q_proj"])
    words = ["--model", tiny_model_directory, "--adapter", one, "--output-dir", tmp_path / "out"]
    said = error(capsys, 1, *words)
    assert "model.embed_tokens is adapted and shares its weight with lm_head.weight" in said
    assert "Pass --untie" in said
    assert not (tmp_path / "out").exists()
    merged(*words, "--untie")
    assert "untied     input and output embeddings are separate weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.allclose(logits(hub.load_model(tmp_path / "out")), unmerged(tiny_model_directory, one), atol=1e-5)


def test_an_adapter_is_not_applied_twice(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    one, two = save_adapter("one", 1), save_adapter("two", 2)
    merged("--model", tiny_model_directory, "--adapter", one, "--output-dir", tmp_path / "out")
    shutil.move(one, tmp_path / "renamed")
    renamed = tmp_path / "renamed"
    (renamed / "lorakit.json").unlink()  # as saved by PEFT: without a fingerprint
    capsys.readouterr()
    said = error(capsys, 1, "--model", tmp_path / "out", "--adapter", renamed, "--output-dir", tmp_path / "again")
    assert f"this adapter has already been merged into the model (as {one}) and would be applied twice" in said
    assert "pass --allow-base-mismatch." in said
    with pytest.raises(BaseMismatchError, match="and would be applied twice"):
        core.load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), renamed)
    (two / "lorakit.json").unlink()
    merged("--model", tmp_path / "out", "--adapter", two, "--output-dir", tmp_path / "both")
    with pytest.raises(BaseMismatchError, match="and would be applied twice"):  # the record of the first merge is kept
        core.load_adapter(hub.load_model(tmp_path / "both"), renamed)


def test_gpt2_with_its_transposed_weights(tiny_gpt2: Any, tmp_path: Path, save_adapter: Save) -> None:
    tiny_gpt2.save_pretrained(tmp_path / "gpt2")
    one = save_adapter("one", model=hub.load_model(tmp_path / "gpt2"), target_modules=["c_attn", "c_proj"], bias="all")
    merged("--model", tmp_path / "gpt2", "--adapter", one, "--output-dir", tmp_path / "out")
    assert torch.allclose(logits(hub.load_model(tmp_path / "out")), unmerged(tmp_path / "gpt2", one), atol=1e-5)


def test_a_directory_that_says_something_else_is_not_kept(
    tiny_model_directory: Path,
    save_adapter: Save,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, save = save_adapter("one"), hub.save_model

    def damage(model: Any, folder: Path, tokenizer: Any = None) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        save(model, folder, tokenizer)

    monkeypatch.setattr(hub, "save_model", damage)
    said = error(capsys, 1, "--model", tiny_model_directory, "--adapter", one, "--output-dir", tmp_path / "out")
    assert "The merged model differs from the unmerged one: on 48 tokens" in said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(f"{durable.TEMPORARY}*"))


def test_where_fp32_does_not_fit_the_models_own_precision_is_compared(
    tiny_llama: Any, tmp_path: Path, save_adapter: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    small = dataclasses.replace(merging.this_machine(), available_bytes=1000)
    monkeypatch.setattr(merging, "this_machine", lambda: small)
    tiny_llama.bfloat16().save_pretrained(tmp_path / "low")
    one = save_adapter("one", model=hub.load_model(tmp_path / "low"))
    merged("--model", tmp_path / "low", "--adapter", one, "--output-dir", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "lorakit_merged.json").read_text())["probe"]["dtype"] == "bfloat16"


def test_a_directory_with_content_is_left_alone(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tiny_model_directory, "--adapter", save_adapter("one"), "--output-dir"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    assert "is not empty" in error(capsys, 2, *words, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    assert "is a file; pass a new directory as --output-dir" in error(capsys, 2, *words, tmp_path / "full" / "mine")
    (tmp_path / "empty").mkdir()
    merged(*words, tmp_path / "empty")


def test_bad_input(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, out = save_adapter("one"), tmp_path / "out"
    words = ["--model", tiny_model_directory, "--output-dir", out, "--adapter"]
    assert "adapter directory not found" in error(capsys, 1, *words, tmp_path / "no")
    assert f"--adapter lists {one} twice" in error(capsys, 2, *words, one, one)
    assert "dtype is 'int8'; it must be one of auto, bfloat16" in error(capsys, 2, *words, one, "--dtype", "int8")
    assert "parameter --adapter requires an argument" in error(capsys, 2, *words[:-1])
    other = hub.load_model(tiny_model_directory)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
        other.model.embed_tokens.weight.mul_(2)
    assert "made for a different base" in error(capsys, 1, *words, save_adapter("other", model=other))
    nan = save_adapter("nan", spread=float("nan"))
    assert "pass --allow-nonfinite." in error(capsys, 1, *words, nan)
    words[1] = tmp_path / "no-model"
    assert "model directory not found" in error(capsys, 1, *words, one)
    assert not out.exists()


@pytest.mark.filterwarnings("default")
def test_numbers_that_are_not_finite_are_not_merged_even_when_allowed(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = save_adapter("nan", spread=float("nan"))
    words = ["--model", tiny_model_directory, "--output-dir", tmp_path / "out", "--adapter", nan, "--allow-nonfinite"]
    said = error(capsys, 1, *words)
    assert said.count("warning: ") == 1
    assert "gives NaN or infinite weights" in said
    assert not (tmp_path / "out").exists()


def test_a_disk_that_refuses(
    tiny_model_directory: Path,
    save_adapter: Save,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--model", tiny_model_directory, "--adapter", save_adapter("one"), "--output-dir", tmp_path / "out"]
    make = Path.mkdir

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name.startswith(durable.TEMPORARY):
            raise OSError(30, "Read-only file system")
        make(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        patch.setattr(hub, "load_model", lambda *_, **__: pytest.fail("nothing heavy happens before the disk is asked"))
        assert "out: cannot be written (Read-only file system)" in error(capsys, 1, *words)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 10))
        assert "kB needed, 10 B free" in error(capsys, 1, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "tiny-llama"]


def test_doubts_are_put_into_words() -> None:
    probe = merging.Probe(0.4, 1.0, "float32", 0.5, 0.9)
    done = merging.Merged(Path("out"), "bfloat16", 1, 2, False, True, core.MergeReport((), (), 0))
    (sentence,) = merge.merge_warnings(done, probe)
    assert "by up to 0.4" in sentence and "by up to 0.5" in sentence
    assert sentence.endswith("--dtype float32 may preserve it.")
