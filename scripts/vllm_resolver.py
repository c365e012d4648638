"""Observe in a real vLLM server what scripts/rules_in_vllm.py cannot see: names, paths, templates, and other requests.

    python scripts/vllm_resolver.py

The server resolves adapters from a directory. The exit code is 1 if it does something else than the rules of
`lorakit check` and docs/serving-elsewhere.md say.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import vllm_server
from environments import VLLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

IDS = [7, 8, 9, 10, 11]


def post(url: str, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    """Send JSON to a server, and return the status and the answer, as JSON if it is."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            status, text = error.code, error.read().decode()
    return status, json.loads(text) if text.startswith("{") else text


def asked(url: str, model: str, **more: Any) -> tuple[int, Any]:
    """Ask a model for one token."""
    return post(url, "/v1/completions", {"model": model, "prompt": IDS, "max_tokens": 1, "temperature": 0, **more})


def log_probability(url: str, model: str) -> float | None:
    """Return the log-probability of a model's most likely next token, or None if it fails."""
    status, answer = asked(url, model, logprobs=0)
    return answer["choices"][0]["logprobs"]["token_logprobs"][0] if status == 200 else None


def observations(url: str, base: str, output: Path) -> Iterator[tuple[str, object, object]]:
    """Yield what is observed, what is expected, and what vLLM does; the last ones damage the server."""
    status, answer = asked(url, "good")
    yield "an adapter of the directory answers under its own name", (200, "good"), (status, answer.get("model"))
    yield "an adapter whose config names no base fails", 500, asked(url, "no-base-name")[0]
    yield "an adapter whose config names another base is not found", 404, asked(url, "base-name")[0]
    yield "an unknown name is not found", 404, asked(url, "unknown")[0]
    yield "a relative path leaves the directory", 200, asked(url, "../outside")[0]
    yield "an absolute path leaves the directory", 200, asked(url, str(output.parent / "outside"))[0]
    chat = {"messages": [{"role": "user", "content": "t9"}]}
    own, bases = (post(url, "/tokenize", {"model": model, **chat})[1]["tokens"] for model in ("chat-template", base))
    yield "the adapter's own chat template is not used", bases, own
    before = log_probability(url, "good")
    shutil.copytree(output / "negated", output / "good", dirs_exist_ok=True)
    yield "an adapter that is replaced on disk answers as before", before, log_probability(url, "good")
    post(url, "/v1/unload_lora_adapter", {"lora_name": "good"})
    yield "... and after it is unloaded, as the new one", True, log_probability(url, "good") != before
    yield "a request of an adapter with NaN fails", 400, asked(url, "nan", prompt=IDS * 4, logprobs=1)[0]
    yield "... and after it a shorter one of the base, in the same memory", 400, asked(url, base, logprobs=1)[0]
    several = asked(url, "negated", prompt=[IDS * 5] * 8, echo=True, logprobs=1)[0]
    yield "log-probabilities of several prompts at once end the server", 500, several


def prepare(folder: Path) -> tuple[str, Path]:
    """Write the base and the adapters, and return the base and the directory that is resolved."""
    from rules_in_vllm import SIZES
    from tests.export.bases import write_tokenizer
    from tests.export.specimens import SPECIMENS, Specimen, mapped

    chosen = {name.replace(" ", "-"): SPECIMENS[name] for name in ("no base name", "base name", "chat template", "nan")}
    chosen |= {"good": Specimen(), "outside": Specimen(), "negated": Specimen(edit=mapped("lora_B", lambda B: -B))}
    output = folder / "adapters"
    for name, specimen in chosen.items():
        base, adapter, _ = specimen.write(folder / "made" / name, **SIZES)
        target = (folder if name == "outside" else output) / name
        shutil.copytree(adapter, target)
        if name not in ("no-base-name", "base-name"):
            config = json.loads((target / "adapter_config.json").read_text())
            config["base_model_name_or_path"] = str(folder / "base")
            (target / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(base, folder / "base")
    write_tokenizer(folder / "base")
    (folder / "base" / "chat_template.jinja").write_text("t5 t6")
    return str(folder / "base"), output


def main() -> int:
    """Print each observation, and return 1 if one differs."""
    from lorakit.export.peft_folder import serving_commands

    VLLM.set_up()
    differing = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, output = prepare(folder)
        commands = serving_commands("name@0123456789ab", base, 12, str(output))
        for name in ("vLLM", "vLLM, adapters on first use"):
            done = vllm_server.parsed(commands[name])
            differing += done.returncode
            print(f"{'differs' if done.returncode else 'ok':8}vLLM's parser reads the command {name!r}", flush=True)
        with vllm_server.serving(commands["vLLM, adapters on first use"], folder / "log.txt") as url:
            for what, expected, found in observations(url, base, output):
                differing += found != expected
                print(f"{'ok' if found == expected else 'differs':8}{what}: {found}", flush=True)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
