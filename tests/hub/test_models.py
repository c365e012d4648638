import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.errors import ConfigError, ModelError
from lorakit.hub import chat_template_hash, load_model, load_tokenizer, tokenizer_hash


def test_a_directory_gives_back_its_model_in_its_dtype(tiny_model_directory: Path, tiny_llama: Any) -> None:
    loaded = load_model(tiny_model_directory)
    assert not loaded.training
    assert loaded.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), tiny_llama.parameters(), strict=True))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for dtype in ("bfloat16", torch.bfloat16):
        assert load_model(tiny_model_directory, dtype=dtype).dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype is 'int4'; it must be one of auto, bfloat16, float16, float32"):
        load_model(tiny_model_directory, dtype="int4")
    with pytest.raises(
        ConfigError,
        match="task is 'x'; it must be one of causal, seq2seq, classification, token-classification, encoder",
    ):
        load_model(tiny_model_directory, task="x")


def test_other_tasks(tiny_model_directory: Path) -> None:
    assert type(load_model(tiny_model_directory, task="classification")).__name__ == "LlamaForSequenceClassification"
    assert type(load_model(tiny_model_directory, task="encoder")).__name__ == "LlamaModel"


def test_loading_leaves_the_settings_of_transformers_and_prints_nothing(
    tiny_model_directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    earlier = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        load_model(tiny_model_directory)
        load_tokenizer(tiny_model_directory)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(earlier)
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_missing_or_damaged(tiny_model_directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = tiny_model_directory / "model.safetensors"
    whole = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in whole.items() if key != name}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"weights are missing from the files \(1 in total, for example {name}\)"):
        load_model(tiny_model_directory)
    save_file({**whole, name: torch.zeros(3, 3)}, weights, {"format": "pt"})
    with pytest.raises(ModelError, match=r"tiny-llama: the model cannot be loaded \(RuntimeError: .*size"):
        load_model(tiny_model_directory)
    save_file(whole, weights, {"format": "pt"})
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"tiny-llama: the model cannot be loaded \(SafetensorError"):
        load_model(tiny_model_directory)


def test_code_of_a_folder_is_never_run(tiny_model_directory: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model_directory / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (tiny_model_directory / "config.json").write_text(json.dumps(config))
    trap = tmp_path / "ran"
    (tiny_model_directory / "mine.py").write_text(f"open({str(trap)!r}, 'w')")
    with pytest.raises(ModelError, match="its own Python code"):
        load_model(tiny_model_directory)
    assert not trap.exists()


def test_a_model_without_a_tokenizer(tiny_model_directory: Path) -> None:
    (tiny_model_directory / "tokenizer.json").unlink()
    with pytest.raises(
        ModelError, match=r"tiny-llama: the model directory has no tokenizer file \(such as tokenizer.json\)"
    ):
        load_tokenizer(tiny_model_directory)


def test_the_languages_of_a_tokenizer_are_part_of_its_hash() -> None:
    from transformers import NllbTokenizer

    words = {word: at for at, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", "▁", "a"))}
    made = [
        NllbTokenizer(vocab=words, merges=[], src_lang="eng_Latn", tgt_lang=target)
        for target in ("deu_Latn", "fra_Latn", "eng_Latn", None)
    ]
    german, french, english, none = (tokenizer_hash(tokenizer) for tokenizer in made)
    assert len({german, french, english}) == 3 and english == none
    for tokenizer in made:
        tokenizer("a", text_target="a")  # sets the language that is missing
    assert [tokenizer_hash(tokenizer) for tokenizer in made] == [german, french, english, none]


def test_hashes_know_what_decides_and_nothing_else(tiny_model_directory: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model_directory)
    first, template = tokenizer_hash(tokenizer), chat_template_hash(tokenizer)
    tokenizer(["a", "b b"], padding=True, truncation=True, max_length=3)
    tokenizer.save_pretrained(tmp_path / "again")
    shutil.copy(tiny_model_directory / "config.json", tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert tokenizer_hash(tokenizer) == tokenizer_hash(again) == first
    assert chat_template_hash(again) == template
    for name, other, usual in [("truncation_side", "left", "right"), ("split_special_tokens", True, False)]:
        setattr(again, name, other)
        assert tokenizer_hash(again) != first, name
        setattr(again, name, usual)
    assert tokenizer_hash(again) == first
    again.add_tokens(["<new>"])
    assert tokenizer_hash(again) != first
    again.chat_template += " "
    assert chat_template_hash(again) != template
    again.chat_template = None
    assert chat_template_hash(again) is None


@pytest.mark.costly(cases=0)
def test_a_model_of_the_hub_s_cache_loads_offline(tiny_model_directory: Path, tmp_path: Path) -> None:
    entry = tmp_path / "hf" / "hub" / "models--some--tiny"
    shutil.copytree(tiny_model_directory, entry / "snapshots" / "0123abcd")
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0123abcd")
    code = (
        "from lorakit import hub\n"
        "source = hub.resolve('some/tiny'); hub.require(source, tokenizer=True)\n"
        "model, tokenizer = hub.load_model(source), hub.load_tokenizer(source)\n"
        "shape = hub.shape_of(source)\n"
        "print(source.kind, source.recorded_name, model.num_parameters() == shape.parameters, len(tokenizer) > 200)\n"
        "hub.load_model('some/other')"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "hub some/tiny True True\n", done.stderr
    assert "Network access is off (HF_HUB_OFFLINE is set): unset it, or pass a directory." in done.stderr


@pytest.mark.parametrize("named", ["known", "unknown"])
def test_code_of_a_model_directory_is_not_run(named: str, tiny_model_directory: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tiny_model_directory / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass C: ...\n", encoding="utf-8")
    path = tiny_model_directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C"}
    if named == "unknown":
        config["model_type"] = "nobody-knows-it"
    path.write_text(json.dumps(config), encoding="utf-8")
    if named == "known":
        assert type(load_model(tiny_model_directory)).__name__ == "LlamaForCausalLM"
    else:
        with pytest.raises(ModelError, match="never run"):
            load_model(tiny_model_directory)
    assert not ran.exists()
