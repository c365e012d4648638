"""Compare the rules of `lorakit check` about vLLM with what real vLLM does: `python scripts/rules_in_vllm.py`.

The adapters are those of tests/export/specimens.py. vLLM loads each and answers one token, whose log-probabilities are
compared with the base's and with those that the adapter was made for. The exit code is 1 if a rule and vLLM disagree.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import vllm_server
from environments import VLLM

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"hidden_size": 256, "intermediate_size": 384}  # heads of 64, which vLLM's attention on a CPU supports
BASES = ("llama", "tied", "qwen2")
ELSEWHERE = ("new tokens", "quantized base", "no base name", "base name", "chat template", "rank value")
"""Conditions whose effect is elsewhere than in a loaded adapter's answer to token ids; see vllm_resolver.py."""

BASE_ERROR, ADAPTER_ERROR = 1e-5, 1e-4
"""Largest differences of log-probabilities, in fp32, that count as equal to the base and to what is expected."""

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
base, *adapters = json.loads(sys.argv[1])
llm = LLM(base, enable_lora=True, max_lora_rank=16, max_loras=1, dtype="float32", enforce_eager=True,
          skip_tokenizer_init=True, max_model_len=64, max_num_seqs=2, enable_prefix_caching=False)
sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=20, detokenize=False)
for number, adapter in enumerate(adapters, 1):
    request = LoRARequest(f"a{number}", number, adapter)
    try:
        llm.llm_engine.add_lora(request)
        found = llm.generate({"prompt_token_ids": list(range(12))}, sampling, lora_request=request, use_tqdm=False)
        answer = {token: value.logprob for token, value in found[0].outputs[0].logprobs[0].items()}
    except Exception as error:
        answer = str(error)
    print("ANSWER", json.dumps([adapter, answer]), flush=True)
"""


def answers(paths: list[str]) -> dict[str, dict[str, float] | str]:
    """Return vLLM's log-probabilities by token, or its error, for each adapter; the first path is the base's."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | vllm_server.ENVIRONMENT
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    command = [str(VLLM.python), "-c", PROGRAM, json.dumps(paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if len(lines) != len(paths) - 1:
        raise SystemExit(f"vLLM stopped after {len(lines)} of {len(paths) - 1} adapters:\n{done.stderr[-2000:]}")
    return dict(map(json.loads, lines))


def effect(answer: dict[str, float] | str, plain: list[float], expected: list[float]) -> str:
    """Return the name of the effect that an answer shows."""
    if isinstance(answer, str):
        return "rejected"
    off_base, off = (max(abs(value - to[int(token)]) for token, value in answer.items()) for to in (plain, expected))
    return "ignored silently" if off_base < BASE_ERROR else "fine" if off < ADAPTER_ERROR else "wrong result"


def main() -> int:
    """Print what each rule says and what vLLM does, and return 1 if they disagree."""
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    from lorakit.export.rules import RUNTIMES

    VLLM.set_up()
    differing = 0
    for base in BASES:
        for name, seen in sorted(effects(base).items()):
            says = RUNTIMES["vllm"].rules[name].effect.value
            differing += seen != says
            print(f"{name:20} rule: {says:18} vLLM: {seen}{'' if seen == says else '  <- differs'}")
    return 1 if differing else 0


def effects(base: str) -> dict[str, str]:
    """Return the effect in vLLM of each condition whose adapter is for a base."""
    from tests.export.specimens import SPECIMENS, logits

    from lorakit.export.rules import RUNTIMES

    names = [n for n in RUNTIMES["vllm"].rules if SPECIMENS[n].served_on == base and n not in ELSEWHERE]
    names.sort(key=lambda name: name == "nan")  # after an adapter with NaN, others may fail
    with tempfile.TemporaryDirectory() as folder:
        made = {name: SPECIMENS[name].write(Path(folder) / name.replace(" ", "-"), **SIZES) for name in names}
        found = answers([str(made[names[0]][0]), *(str(made[name][1]) for name in names)])
    plain = logits(SPECIMENS[names[0]].model(**SIZES))[0, -1].log_softmax(-1).tolist()
    return {
        name: effect(found[str(adapter)], plain, expected[0, -1].log_softmax(-1).tolist())
        for name, (_, adapter, expected) in made.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
