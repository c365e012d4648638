"""An adapter as `make demo` trains it answers the demo's prompts in llama.cpp, alone and merged, and in mlx-lm as here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lorakit
from lorakit import data
from lorakit.cli import main
from lorakit.train import TrainSettings, run
from lorakit.verify.llama_cpp import running

from .gguf_models import write_smollm2
from .loading import load

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (lorakit[runtimes])")
pytestmark = pytest.mark.slow

DEMO: Any = load("scripts/demo.py")
STEPS, TOKENS = 8, 8


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    text, _ = data.write_python_reference(folder / "data", DEMO.HELD_OUT, DEMO.SEED)
    steps = {"max_steps": STEPS, "save_steps": STEPS, "eval_fraction": 0.0}
    result = run(TrainSettings(**DEMO.SETTINGS, **steps, data=[str(text)], output_dir=str(folder / "run")))
    assert result.adapter is not None
    return result.adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smollm2(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.mark.parametrize("runtime", ["gguf", "gguf-merged", "mlx"])
def test_the_answers_are_those_of_lorakit(adapter: Path, base: Path, tmp_path: Path, runtime: str) -> None:
    if runtime == "mlx":
        pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (lorakit[runtimes])")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in DEMO.PROMPTS))
    words = ["--base-gguf", base, "--data", prompts, "--max-new-tokens", TOKENS]
    assert main(["verify", str(adapter), "--against", runtime, *map(str, words)]) == 0
    verified = json.loads((adapter / "lorakit.json").read_text())["verified"]["comparisons"]
    (one,) = (each for each in verified if each["runtime"] == runtime)
    assert one["judged"] and one["difference"] < 1e-3 and one["prompts"] == len(DEMO.PROMPTS)
    assert one["data"] == "prompts.jsonl" and one["title"] in (adapter / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_client_of_openai_gets_the_text_of_lorakit(
    adapter: Path, base: Path, tmp_path: Path, is_merged: bool
) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed (lorakit[runtimes])")
    words = ["export", "gguf", str(adapter), "--output-dir", str(tmp_path / "out"), "--base-gguf", str(base)]
    assert main([*words, *(["--merged", "--outtype", "F32"] if is_merged else [])]) == 0
    (file,) = (tmp_path / "out").glob("*.gguf")
    with lorakit.open_session("smollm2", {"demo": adapter}, dtype="float32", device="cpu") as session:
        own, other = (
            session.generate(DEMO.PROMPTS[0], adapter=name, chat=False, max_new_tokens=TOKENS).text
            for name in ("demo", None)
        )
    assert own != other
    lora = {} if is_merged else {"lora": [{"id": 0, "scale": 1.0}]}
    with (
        running(*((file, None) if is_merged else (base, file)), 256) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client,
    ):
        more = {"cache_prompt": False, **lora}
        answer = client.completions.create(
            model="any", prompt=DEMO.PROMPTS[0], max_tokens=TOKENS, temperature=0, extra_body=more
        )
    assert answer.choices[0].text == own
