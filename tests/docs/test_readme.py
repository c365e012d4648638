"""The README does what it says: its Python and all commands run, and both languages have the same code."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = blocks(page, "sh")[page == "README.md"].splitlines()  # the first block of the README installs
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("lorakit ")]


def without_comments(code: str) -> list[str]:
    return [line.partition("#")[0].rstrip() for line in code.splitlines()]


@pytest.mark.costly
@pytest.mark.parametrize("number", [1, 2])
def test_python_blocks_run(number: int, tmp_path: Path) -> None:
    code = blocks("README.md", "python")[number]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for promised in re.findall(r"^# (trainable params.*)$", code, flags=re.MULTILINE):
        assert promised in done.stdout


@pytest.mark.costly(cases=0)
def test_the_trl_example_trains_with_sft_and_dpo(tmp_path: Path, tiny_model_directory: Path) -> None:
    pytest.importorskip("trl")
    code = blocks("docs/from-peft.md", "python")[1]
    assert "install_as_peft()" in code and "SFTTrainer" in code and "DPOTrainer" in code
    code = code.replace("HuggingFaceTB/SmolLM2-135M", str(tiny_model_directory))
    for name in ("runs/sft", "runs/dpo"):
        code = code.replace(f'"{name}"', f'"{name}", report_to=[], use_cpu=True, bf16=False, save_steps=2')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("sft", "dpo"):
        saved = tmp_path / "runs" / name / "checkpoint-2"
        assert (saved / "lorakit.json").is_file() and not (saved / "model.safetensors").exists()


def test_the_readme_is_short_and_every_command_is_shown() -> None:
    from lorakit.cli import COMMANDS

    assert len(blocks("README.md", "python")) == 3
    assert all((ROOT / page).read_text().count("\n") <= 120 for page in ("README.md", "README.ko.md"))
    assert {arguments[0] for arguments in commands("docs/command-line.md")} == set(COMMANDS)


def test_the_korean_page_holds_the_same_code() -> None:
    for language in ("python", "sh"):
        ours, theirs = blocks("README.md", language), blocks("README.ko.md", language)
        assert [without_comments(block) for block in ours] == [without_comments(block) for block in theirs]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/command-line.md"])
def test_commands_run_in_order(page: str, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text((ROOT / "docs" / "math.md").read_text()[:10_000])
    rows = [f"the film was {word},{label}" for word, label in (("great", "good"), ("dull", "bad")) for _ in range(8)]
    (tmp_path / "sentiment.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    for arguments in commands(page):
        if arguments[0] in ("pull", "serve", "chat"):  # need the network, or a user, or do not end; tests/cli runs them
            continue
        shorter = [
            "2" if before == "--max-steps" else word
            for before, word in zip(["", *arguments[:-1]], arguments, strict=True)
        ]
        extra = {"train": ["--max-length", "32"], "generate": ["--max-new-tokens", "4"]}.get(arguments[0], [])
        done = subprocess.run(
            [sys.executable, "-m", "lorakit", *shorter, *extra],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
    if page == "README.md":  # the session opens the run of the commands
        code = blocks(page, "python")[0]
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2, done.stderr
