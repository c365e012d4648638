"""lorakit.cli.combine: combine several adapters into one, without their base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, hub
from lorakit.cli import main
from lorakit.core.model.index import layers

Save = Callable[..., Path]


def combined(*words: Any, code: int = 0) -> None:
    assert main(["combine", *map(str, words)]) == code


def deltas(directory: Path, *adapters: Path) -> list[dict[str, torch.Tensor]]:
    model = hub.load_model(directory, "float32")
    found = []
    for number, adapter in enumerate(adapters):
        core.load_adapter(model, adapter, f"a{number}")
        factors = {path: layer.factor(f"a{number}") for path, layer in layers(model)}
        found.append({path: (f.B @ f.A * f.scale).detach() for path, f in factors.items()})
    return found


def test_a_weighted_sum(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = save_adapter("one"), save_adapter("two", 2, r=3, use_rslora=True)
    new = tmp_path / "sum"
    combined("--adapter", one, two, "--weights", 0.5, -1, "--way", "cat", "--output-dir", new)
    out = capsys.readouterr().out
    assert f"{new}: 14 sites, rank 7, scale 1" in out
    assert f"combined   0.5 × {one} + -1 × {two} by cat" in out
    assert "deviation  at most 0.00%" in out
    first, second, found = deltas(tiny_model_directory, one, two, new)
    for path, delta in found.items():
        torch.testing.assert_close(delta, 0.5 * first[path] - second[path], rtol=1e-4, atol=1e-5)


def test_json_and_a_truncated_sum(save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = save_adapter("one"), save_adapter("two", 2)
    combined("--adapter", one, two, "--output-dir", tmp_path / "sum", "--rank", 2, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["output_dir"] == str(tmp_path / "sum") and found["config"]["r"] == 2
    assert len(found["sites"]) == 14 and 0 < found["deviation"] <= 1
    assert [of["weight"] for of in found["operation"]["of"]] == [1.0, 1.0]
    assert found["operation"]["way"] == "svd" and found["operation"]["rank"] == 2
    assert found["base_name"] == "tiny"
    combined("--adapter", one, two, "--output-dir", tmp_path / "text", "--rank", 2)
    assert "sites that deviate most" in capsys.readouterr().out


def test_ways_that_prune(save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = save_adapter("one"), save_adapter("two", 2)
    for number, seed in enumerate((1, 1, 2)):
        combined("--adapter", one, two, "--output-dir", tmp_path / str(number), "--way", "dare_ties_svd", "--density",
                 0.5, "--majority-sign", "frequency", "--seed", seed, "--clamp", 0.99)  # fmt: skip
    files = [(tmp_path / str(number) / "adapter_model.safetensors").read_bytes() for number in range(3)]
    assert files[0] == files[1] != files[2]


def test_dora_takes_its_base(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (save_adapter(name, seed, use_dora=True) for name, seed in (("one", 1), ("two", 2)))
    words = ("--adapter", one, two, "--output-dir", tmp_path / "sum", "--way", "cat")
    combined(*words, code=1)
    assert "uses DoRA, whose effect depends on the base weights" in capsys.readouterr().err
    combined(*words, "--model", tiny_model_directory)
    model = hub.load_model(tiny_model_directory, "float32")
    for name, folder in (("a", one), ("b", two), ("sum", tmp_path / "sum")):
        core.load_adapter(model, folder, name)
    ids = torch.tensor([[5, 17, 200, 3]])
    with torch.no_grad(), core.use(model, "a", "b"):
        both = model(ids).logits
    with torch.no_grad(), core.use(model, "sum"):
        torch.testing.assert_close(model(ids).logits, both, rtol=1e-3, atol=1e-4)


def test_the_tokenizer_comes_along_where_all_have_the_same(
    save_adapter: Save, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    one, two = save_adapter("one"), save_adapter("two", 2)
    tiny_tokenizer.save_pretrained(one)
    combined("--adapter", one, two, "--output-dir", tmp_path / "without")
    tiny_tokenizer.save_pretrained(two)
    combined("--adapter", one, two, "--output-dir", tmp_path / "with")
    assert not (tmp_path / "without" / "tokenizer.json").exists()
    assert (tmp_path / "with" / "tokenizer.json").read_bytes() == (one / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--weights", "1"], 2, "pass one weight per adapter"),
        (["--way", "tie"], 2, "combination_type is 'tie'"),
        (["--way", "ties"], 2, "density is None"),
        (["--way", "linear"], 2, r"ranks 3 and 4: all adapters must have the same r value"),
        (["--rank", "x"], 2, "rank"),
    ],
)
def test_what_is_refused(
    save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    one, two = save_adapter("one"), save_adapter("two", 2, r=3)
    combined("--adapter", one, two, "--output-dir", tmp_path / "sum", *words, code=code)
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""
    assert not (tmp_path / "sum").exists()


def test_other_bases_are_refused_by_flag(
    save_adapter: Save, tmp_path: Path, tiny_gpt2: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one")
    other = save_adapter("other", model=tiny_gpt2)
    combined("--adapter", one, other, "--output-dir", tmp_path / "sum", code=1)
    assert "different bases" in (said := capsys.readouterr().err)
    assert "To combine them anyway, pass --allow-base-mismatch" in said
    combined("--adapter", one, "--output-dir", one, code=2)
    assert "is not empty" in capsys.readouterr().err
