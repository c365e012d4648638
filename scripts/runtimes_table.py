"""Compare exported adapters in real runtimes with lorakit and with peft, and write the table of serving-elsewhere.md.

    python scripts/runtimes_table.py [--runtimes vllm,llama.cpp,mlx-lm] [--families llama,SmolLM2-135M]
    python scripts/runtimes_table.py --table [--check]     # only the page, from benchmarks/results/runtimes.jsonl

A row has the results of one family in one runtime. Rows that were measured with the same sources and versions are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import generated_table
import vllm_server
from environments import VLLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

PAGE = ROOT / "docs" / "serving-elsewhere.md"
RESULTS = ROOT / "benchmarks" / "results" / "runtimes.jsonl"
BEGIN = generated_table.begin(__file__)
BOUND = 1e-3
PROMPTS, TOKENS, GREEDY = 3, 24, 8
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "eos_token_id": 60,
}
"""Sizes of random bases: 32 is the smallest size of a head in vLLM on a CPU; llama.cpp scales scores by that size."""

PACKAGED = "SmolLM2-135M"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "gpt2", PACKAGED)
ON_LINEAR_ONLY = ("BD-LoRA",)
"""Variants that GPT-2's `Conv1D` layers do not support."""

WITHOUT_LORA = {("vllm", "gpt2")}
"""Runtimes that reject the adapters of a family: `GPT2LMHeadModel` of vLLM 0.32 is not `SupportsLoRA`."""

BLOCKS = {
    "target_modules_bd_a": ["q_proj", "qkv_proj", "c_attn"],
    "target_modules_bd_b": ["down_proj", "mlp.c_proj"],
    "nblocks": 2,
    "match_strict": False,
}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj|qkv_proj|c_attn": 4, r"1\..*(down_proj|c_fc)": 11},
        "alpha_pattern": {r"0\..*(o_proj|c_proj)": 5},
    },
    "PiSSA": {"init_lora_weights": "pissa"},
    "VeLoRA": {"velora_config": {"num_groups": 4, "init_type": "random"}},
    "BD-LoRA": {"use_bdlora": BLOCKS},
    "QA-LoRA": {"use_qalora": True, "qalora_group_size": 4},
    "LoRA-XS": {"use_lora_xs": True},
    "one layer": {"target_modules": r".*\.1\..*(proj|c_attn|c_fc)", "r": 3},
}
"""Name -> fields of the config besides rank 8, alpha 12 and all linear layers."""

NOT_IN_PEFT = ("QA-LoRA", "LoRA-XS")
"""Variants that peft lacks, or has for other bases only; it loads their exports."""

Open = Callable[[Any], contextlib.AbstractContextManager[Any]]
"""Function from a `RuntimeRequest` to a context with a `Runtime`."""


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of the tokens of each prompt but the first, and greedy tokens up to one that ends them."""

    values: Sequence[Sequence[float]]
    greedy: Sequence[Sequence[int]]

    def distance(self, other: Answers) -> float:
        """Return the largest difference of a log-probability."""
        pairs = zip(self.values, other.values, strict=True)
        return max(abs(a - b) for row, others in pairs for a, b in zip(row, others, strict=True))


def write_base(family: str, folder: Path) -> None:
    """Write the base of a family, or link the packaged model."""
    from tests.export import bases

    from lorakit import hub

    if family == PACKAGED:
        folder.symlink_to(hub.resolve("smollm2").path_or_id, target_is_directory=True)
        return
    bases.saved(bases.random(family, 0.1, **SIZES), folder)
    bases.write_tokenizer(folder)


def variants_of(family: str) -> Mapping[str, Mapping[str, Any]]:
    """Return the variants that a family's layers support."""
    return {name: one for name, one in VARIANTS.items() if family != "gpt2" or name not in ON_LINEAR_ONLY}


def write_adapters(base: Path, folder: Path, family: str) -> dict[str, Path]:
    """Write an adapter with random factors for each variant, and return their directories."""
    import torch

    from lorakit import core, hub
    from lorakit.config import LoraConfig

    written = {}
    for number, (variant, fields) in enumerate(variants_of(family).items()):
        model = hub.load_model(base, "float32")
        config = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
        core.attach(model, LoraConfig(**config), seed=number)
        generator = torch.Generator().manual_seed(number)
        for _, parameter in core.trainable_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * (0.3 * parameter.std() if parameter.any() else 0.02)
        written[variant] = folder / variant.replace(" ", "-").lower()
        core.save_adapter(model, written[variant], base_model_name_or_path=str(base))
    return written


def request_of(base: Path, adapter: Path, workspace: Path) -> Any:
    """Return the `RuntimeRequest` for an adapter."""
    from transformers import AutoConfig

    from lorakit import core
    from lorakit.session import SessionOptions, session_spec
    from lorakit.verify.loaded import ADAPTER
    from lorakit.verify.runtime import RuntimeRequest

    spec = session_spec(str(base), {ADAPTER: core.read_adapter(adapter)}, SessionOptions(dtype="float32"))
    config = AutoConfig.from_pretrained(base)
    ends = frozenset({config.eos_token_id, config.vocab_size - 1})  # the last is what `gguf_models` records
    return RuntimeRequest(spec, workspace, "float32", ends, frozenset(), TOKENS + GREEDY + 1, timeout=300)


@contextlib.contextmanager
def vllm(base: Path, requests: Sequence[Any], workspace: Path) -> Iterator[Open]:
    """Export the adapters, and serve them in vLLM with the printed command."""
    from lorakit.export.peft_folder import serving_commands
    from lorakit.verify.runtime import BASE
    from lorakit.verify.servers import open_url

    exports = [replace(request, workspace=workspace).export("vllm") for request in requests]
    ranks = {folder: json.loads((folder / "adapter_config.json").read_text())["r"] for folder in exports}
    largest = max(exports, key=lambda folder: ranks[folder])
    command = serving_commands(largest.name, str(base), ranks[largest], str(largest.parent))["vLLM"]
    others = [f"{folder.name}={folder}" for folder in exports if folder != largest]
    with vllm_server.serving(command, workspace / "log.txt", *others, "--served-model-name", BASE) as url:
        yield lambda request: open_url(url, request)


@contextlib.contextmanager
def llama_cpp(base: Path, requests: Sequence[Any], workspace: Path) -> Iterator[Open]:
    """Write the base as a GGUF file in F32, with which llama.cpp opens an adapter."""
    from tests import gguf_models

    from lorakit import hub
    from lorakit.verify.llama_cpp import open_gguf

    file = gguf_models.write_base(hub.load_model(base, "float32"), workspace / "base.gguf")
    yield lambda request: open_gguf(replace(request, base_gguf=file))


@contextlib.contextmanager
def mlx_lm(base: Path, requests: Sequence[Any], workspace: Path) -> Iterator[Open]:
    """Open adapters in mlx-lm."""
    from lorakit.verify.mlx import open_mlx

    yield open_mlx


RUNTIMES: Mapping[str, Callable[[Path, Sequence[Any], Path], contextlib.AbstractContextManager[Open]]] = {
    "vllm": vllm,
    "llama.cpp": llama_cpp,
    "mlx-lm": mlx_lm,
}
"""Name -> function from a base, the requests for its adapters and an empty directory to how adapters are opened."""


def asked(runtime: Any, prompts: Sequence[Sequence[int]], ends: Iterable[int], name: str | None = None) -> Answers:
    """Return the answers of an adapter in a runtime; of another model with this name there, without greedy tokens."""
    values = [runtime.log_probabilities(ids, name) for ids in prompts]
    greedy = [] if name else [runtime.greedy(ids, GREEDY) for ids in prompts]
    return Answers(values, [list(takewhile(lambda token: token not in ends, tokens)) for tokens in greedy])


def in_peft(base: Path, variant: str, request: Any, prompts: Sequence[Sequence[int]]) -> Answers:
    """Return peft's answers with an adapter as it was saved, or as it is exported if peft lacks the variant."""
    import peft

    from lorakit import hub
    from lorakit.verify.loaded import LoadedRuntime

    folder = request.export("peft") if variant in NOT_IN_PEFT else request.folder
    model = peft.PeftModel.from_pretrained(hub.load_model(base, "float32"), str(folder)).eval()
    return asked(LoadedRuntime("peft", model, request.spec.tokenizer, request), prompts, request.end_ids)


def leads_of(runtime: Any, ids: Sequence[int], greedy: Sequence[int]) -> list[float]:
    """Return by how much the log-probability of each greedy token, and of the next, exceeds the second largest."""
    return [float(first - second) for first, second in runtime.scores([*ids, *greedy])[len(ids) - 1 :].topk(2).values]


def is_same(bound: float, ours: Sequence[int], theirs: Sequence[int], leads: Sequence[float]) -> bool:
    """Return whether two greedy answers are equal, or first differ where two tokens are as likely up to `bound`."""
    differing = (number for number, (one, other) in enumerate(zip_longest(ours, theirs)) if one != other)
    first = next(differing, None)
    return first is None or leads[first] <= bound


def measured(family: str, runtimes: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the row of a family for each runtime."""
    import torch
    from transformers import AutoConfig

    from lorakit.verify.loaded import open_session_runtime
    from lorakit.verify.runtime import BASE

    base = folder / "base"
    write_base(family, base)
    size = AutoConfig.from_pretrained(base).vocab_size
    prompts = torch.randint(20, size - 1, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(7)).tolist()
    requests, ours, theirs, leads = {}, {}, {}, {}
    for variant, adapter in write_adapters(base, folder, family).items():
        request = requests[variant] = request_of(base, adapter, folder / "work" / variant)
        with open_session_runtime(request) as runtime:
            ours[variant] = asked(runtime, prompts, request.end_ids)
            leads[variant] = list(map(partial(leads_of, runtime), prompts, ours[variant].greedy))
            ours[BASE] = asked(runtime, prompts, request.end_ids, BASE)
        theirs[variant] = in_peft(base, variant, request, prompts)
    for name in runtimes:
        row: dict[str, Any] = {"runtime": name, "family": family, "key": key_of(name, family), "variants": {}}
        workspace = folder / name
        workspace.mkdir()
        with RUNTIMES[name](base, [*requests.values()], workspace) as opened:
            for variant, request in requests.items():
                with opened(replace(request, workspace=workspace / variant)) as runtime:
                    found = asked(runtime, prompts, request.end_ids)
                    row |= {"runtime_versions": dict(runtime.versions)}
                    row["base"] = asked(runtime, prompts, request.end_ids, BASE).distance(ours[BASE])
                row["variants"][variant] = {
                    "lorakit": found.distance(ours[variant]),
                    "peft": found.distance(theirs[variant]),
                    "greedy_same": sum(
                        map(partial(is_same, bound_of(row)), ours[variant].greedy, found.greedy, leads[variant])
                    ),
                    "nearest_other": min(found.distance(ours[other]) for other in ours if other != variant),
                }
        yield row


def key_of(runtime: str, family: str) -> str:
    """Return a hash of all that a row depends on: the sources of lorakit and of the measurement, and versions."""
    from lorakit.durable import sha256_bytes, sha256_file
    from lorakit.machine import this_machine

    helpers = ("tests/small_models.py", "tests/gguf_models.py", "tests/export/bases.py", "scripts/vllm_server.py")
    files = [*sorted((ROOT / "src").rglob("*.py")), *(ROOT / name for name in helpers), Path(__file__)]
    packages = ["torch", "transformers", "peft", "gguf", "xllamacpp", "mlx", "mlx-lm"]
    facts = [runtime, family, this_machine().cpu, *map(version, packages), *map(sha256_file, files)]
    if runtime == "vllm":
        facts += sorted(path.name for path in VLLM.folder.glob("lib/*/site-packages/*.dist-info"))
    return sha256_bytes(json.dumps(facts).encode())[:12]


def rows_of_results() -> dict[tuple[str, str], dict[str, Any]]:
    """Return the newest row of each family and runtime."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.exists() else []
    rows = {(row["family"], row["runtime"]): row for row in map(json.loads, lines)}
    pairs = ((family, runtime) for family in FAMILIES for runtime in RUNTIMES)
    return {pair: rows[pair] for pair in pairs if pair in rows}


def bound_of(row: Mapping[str, Any]) -> float:
    """Return the allowed difference: if a runtime's base is itself off, as llama.cpp's Gemma, twice as much."""
    return max(BOUND, 2 * row["base"])


def is_good(row: Mapping[str, Any]) -> bool:
    """Return whether a runtime gives each adapter's answers, and not another's or the base's."""
    return all(
        max(one["lorakit"], one["peft"]) <= bound_of(row) < one["nearest_other"] and one["greedy_same"] == PROMPTS
        for one in row["variants"].values()
    )


def table() -> str:
    """Return the newest results as a table, with a row for each family and runtime, and a column for each variant."""
    rows = rows_of_results()
    results = [one for row in rows.values() for one in row["variants"].values()]
    names = ("lorakit", "peft", "torch", "transformers")
    packages = {name: row["versions"][name] for row in rows.values() for name in names}
    packages |= {name: number for row in rows.values() for name, number in row["runtime_versions"].items()}
    machines = {f"{row['machine']['cpu']}, {row['machine']['cores']} cores" for row in rows.values()}
    lines = [["family", "runtime", "base", *VARIANTS], ["---"] * (3 + len(VARIANTS))]
    for (family, runtime), row in rows.items():
        found = [row["variants"].get(name) for name in VARIANTS]
        cells = [f"{_micro(one['lorakit'])} / {_micro(one['peft'])}" if one else "–" for one in found]
        lines.append([family, runtime, _micro(row["base"]), *cells])
    return (
        f"{len(results)} exports; {sum(one['greedy_same'] for one in results)} of {PROMPTS * len(results)} greedy "
        "answers agree; smallest distance from another adapter or the base "
        f"{min(one['nearest_other'] for one in results):.2g}. "
        f"{', '.join(f'{name} {number}' for name, number in packages.items())}; {'; '.join(sorted(machines))}.\n\n"
    ) + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _micro(value: float) -> str:
    """Return a value in millionths."""
    return f"{1e6 * value:.0f}"


def main() -> int:
    """Measure what is missing, append the rows and write the table; return 1 if a runtime gives other answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), help="names, separated by commas")
    parser.add_argument("--families", default=",".join(FAMILIES), help="names, separated by commas")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--check", action="store_true", help="compare the page with the results")
    options = parser.parse_args()
    bad = 0
    if not options.table:
        from runner import append_row

        runtimes = options.runtimes.split(",")
        if "vllm" in runtimes:
            VLLM.set_up()
        for family in options.families.split(","):
            known = {runtime: row["key"] for (other, runtime), row in rows_of_results().items() if other == family}
            wanted = [name for name in runtimes if (name, family) not in WITHOUT_LORA]
            missing = [name for name in wanted if known.get(name) != key_of(name, family)]
            with tempfile.TemporaryDirectory() as temporary:
                for row in measured(family, missing, Path(temporary)) if missing else ():
                    append_row("runtimes", row, {}, quiet=True)
                    bad += not is_good(row)
                    print(
                        f"{family} in {row['runtime']}: {'as lorakit' if is_good(row) else json.dumps(row)}", flush=True
                    )
    return generated_table.write(PAGE, BEGIN, table) or int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
