"""lorakit.cli.check: verdicts as text and JSON, exit codes, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.small_gguf import own_gguf_cache, write_gguf  # noqa: F401 - a fixture

from lorakit import hub
from lorakit.cli import main

Save = Callable[..., Path]


def test_an_adapter_that_all_runtimes_read(save_adapter: Save, capsys: pytest.CaptureFixture[str]) -> None:
    one = save_adapter("one")
    assert main(["check", str(one), "--for", "sglang,peft"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{one}:"
    assert [line.split()[::2] for line in lines[4:6]] == [["sglang", "fine"], ["peft", "fine"]]
    assert "pass --base" in lines[-1]


def test_a_silent_difference_is_exit_code_1_with_its_remedy(
    save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one", use_rslora=True)
    assert main(["check", str(one), "--for", "vllm", "sglang"]) == 1
    out = capsys.readouterr().out
    assert "ignored silently  rslora" in out
    assert f"remedy: lorakit export sglang {one} --served-base MODEL --output-dir OUTPUT" in out
    assert "sglang/srt" not in out
    assert main(["check", str(one), "--for", "sglang", "--verbose"]) == 1
    assert "source: sglang/srt/lora/lora.py" in capsys.readouterr().out


def test_a_rejection_is_not_silent(save_adapter: Save) -> None:
    one = save_adapter("one", r=32)
    assert main(["check", str(one), "--for", "vllm"]) == 0
    assert main(["check", str(one), "--for", "vllm", "--max-rank", "32"]) == 0


def test_the_template_of_a_gguf_file_is_compared(
    save_adapter: Save, tiny_model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, tokenizer = save_adapter("one"), hub.load_tokenizer(tiny_model_directory)
    file = write_gguf(tmp_path / "base.gguf", hub.load_model(tiny_model_directory), tokenizer)
    (one / "chat_template.jinja").write_text(str(tokenizer.chat_template))
    assert main(["check", str(one), "--for", "sglang", "--base", str(file)]) == 0
    (one / "chat_template.jinja").write_text("{{ messages }}")
    capsys.readouterr()
    assert main(["check", str(one), "--for", "sglang", "--base", str(file)]) == 1
    (remedy,) = [line for line in capsys.readouterr().out.splitlines() if "remedy" in line]
    assert remedy.endswith(f"--chat-template {one / 'chat_template.jinja'}")


def test_json_has_every_rule_with_its_source(
    save_adapter: Save, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one", use_rslora=True)
    assert main(["check", str(one), "--base", str(tiny_model_directory), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["silent"] and found["not_compared"] == []
    sglang = found["runtimes"]["sglang"]
    assert sglang["verdict"] == "ignored silently" and sglang["version"] == "0.5.23"
    (rule,) = [rule for rule in sglang["rules"] if rule["condition"] == "rslora"]
    assert rule["source"].startswith("sglang/srt/lora/lora.py") and rule["known"] == "source"
    assert found["runtimes"]["peft"]["verdict"] == "fine"
    assert found["runtimes"]["ollama"]["verdict"] == "rejected"


def test_another_base_is_found(save_adapter: Save, wide_model_directory: Path) -> None:
    assert main(["check", str(save_adapter("one")), "--for", "peft", "--base", str(wide_model_directory)]) == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--for", "vllm,tgi"], "tgi"),
        (["--for", ","], "no runtime"),
        (["--max-rank", "0"], "max_rank"),
        (["--base", "./none"], "none"),
    ],
)
def test_wrong_usage(save_adapter: Save, capsys: pytest.CaptureFixture[str], words: list[str], named: str) -> None:
    assert main(["check", str(save_adapter("one")), *words]) in (1, 2)
    assert named in capsys.readouterr().err


def test_torch_is_not_loaded(save_adapter: Save) -> None:
    words = ["check", str(save_adapter("one"))]
    code = f"import sys; from lorakit.cli import main; assert main({words}) == 0; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


CURED = {
    "rslora": {"use_rslora": True},
    "alpha pattern": {"alpha_pattern": {"q_proj": 4}},
    "rank pattern": {"rank_pattern": {"q_proj": 2}},
    "target expression": {"target_modules": r".*\.0\..*(q_proj|v_proj)"},
    "qa-lora": {"use_qalora": True, "qalora_group_size": 4},
    "lora-xs": {"use_lora_xs": True},
}


@pytest.mark.parametrize("runtime", ["vllm", "sglang", "peft"])
@pytest.mark.parametrize("name", CURED)
def test_the_export_that_is_the_remedy_is_fine(
    save_adapter: Save,
    tiny_model_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    runtime: str,
) -> None:
    one, base = (
        save_adapter("one", **{"target_modules": ["q_proj", "v_proj"], **CURED[name]}),
        str(tiny_model_directory),
    )
    main(["check", str(one), "--for", runtime, "--base", base, "--json"])
    rules = json.loads(capsys.readouterr().out)["runtimes"][runtime]["rules"]
    remedies = {rule["remedy"] for rule in rules if rule["condition"] == name and rule["remedy"]}
    assert all(
        text.endswith(f"lorakit export {runtime} {one} --served-base MODEL --output-dir OUTPUT") for text in remedies
    )
    assert main(["export", runtime, str(one), "--served-base", base, "--output-dir", str(tmp_path / "out")]) == 0
    (exported,) = (tmp_path / "out").iterdir()
    capsys.readouterr()
    assert main(["check", str(exported), "--for", runtime, "--base", base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runtimes"][runtime]["verdict"] == "fine"
