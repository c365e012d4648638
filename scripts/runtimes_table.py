"""Compare exported adapters in real runtimes with lorakit and with peft, and write the table of serving-elsewhere.md.

    python scripts/runtimes_table.py [--runtimes vllm,vllm-resolver,llama.cpp,mlx-lm] [--families Llama,SmolLM2-135M]
    python scripts/runtimes_table.py --table [--check]     # only the page, from benchmarks/results/runtimes.jsonl

Each variant of an adapter is made for each family, exported, and answers with the log-probabilities of given tokens and
with greedy tokens. A row has the largest differences, in nats. An adapter is loaded into peft as it was saved, if peft
has the variant, otherwise as it was exported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import generated_table
import vllm_server

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

PAGE = ROOT / "docs" / "serving-elsewhere.md"
RESULTS = ROOT / "benchmarks" / "results" / "runtimes.jsonl"
BEGIN = generated_table.begin(__file__)
BOUND = 1e-3
PROMPTS, TOKENS, GREEDY = 3, 24, 8
SMALL: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
"""Sizes of random bases: 32 is the smallest size of a head in vLLM on a CPU."""

GROUPS = 4
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "rank and alpha patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 4, "layers.1.mlp.down_proj": 11},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 5},
    },
    "PiSSA": {"init_lora_weights": "pissa"},
    "QA-LoRA": {"use_qalora": True, "qalora_group_size": GROUPS},
    "BD-LoRA": {
        "use_bdlora": {
            "target_modules_bd_a": ["q_proj", "v_proj"],
            "target_modules_bd_b": ["o_proj", "down_proj"],
            "nblocks": 2,
        }
    },
    "LoRA-XS": {"use_lora_xs": True},
    "rank 3": {"r": 3},
    "one layer": {"layers_to_transform": [1]},
}
"""Name -> fields of the config besides rank 8, alpha 12 and four target modules."""

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
NOT_IN_PEFT = ("QA-LoRA", "LoRA-XS")
"""Variants that peft lacks, or has for other bases only."""


@dataclass(frozen=True)
class Family:
    """A base and its adapters, in directories.

    Attributes:
        adapters: Variant -> its adapter as saved.
    """

    name: str
    base: Path
    adapters: Mapping[str, Path]


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of the tokens of each prompt but the first, and greedy tokens."""

    values: Sequence[Sequence[float]]
    greedy: Sequence[Sequence[int]]


Open = Callable[[str, Any], contextlib.AbstractContextManager[Any]]
"""Function from a variant and a `RuntimeRequest` to a `Runtime`."""


def random_base(kind: str, **fields: Any) -> Callable[[Path], None]:
    """Return a function that writes a small random model of an architecture, and a tokenizer of its ids."""

    def write(folder: Path) -> None:
        import torch
        from tests import small_models

        from lorakit import hub

        torch.manual_seed(0)
        model = getattr(small_models, kind)(**{**SMALL, **fields}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.2)
        model.config.eos_token_id = model.generation_config.eos_token_id = small_models.VOCABULARY - 1
        model.save_pretrained(folder)
        config = folder / "config.json"
        config.write_text(json.dumps(hub.with_earlier_rope(json.loads(config.read_text()))))  # for mlx-lm
        write_tokenizer(folder, small_models.VOCABULARY)

    return write


def write_tokenizer(folder: Path, size: int) -> None:
    """Write a tokenizer of `size` words to the directory of a base."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(folder)


def smollm2(folder: Path) -> None:
    """Link the packaged SmolLM2-135M."""
    from lorakit import hub

    folder.symlink_to(hub.resolve("smollm2").path_or_id, target_is_directory=True)


ROPE = {"rope_type": "default", "rope_theta": 1e4}
PER_TYPE = {"full_attention": ROPE | {"rope_theta": 1e6}, "sliding_attention": ROPE}
GEMMA = {"query_pre_attn_scalar": SMALL["head_dim"], "sliding_window": 64}
"""llama.cpp scales scores by the size of a head; the window is longer than the prompts, which mlx-lm needs."""

FAMILIES: Mapping[str, Callable[[Path], None]] = {
    "Llama": random_base("llama"),
    "Mistral": random_base("mistral", sliding_window=None),
    "Qwen2": random_base("qwen2"),
    "Qwen3": random_base("qwen3"),
    "Gemma 2": random_base("gemma2", **GEMMA),
    "Gemma 3": random_base("gemma3", **GEMMA, num_hidden_layers=6, rope_parameters=PER_TYPE),
    "SmolLM2-135M": smollm2,
}
"""Name -> function that writes the base to a new directory; in Gemma 3, mlx-lm expects full attention in layer 6."""


def made(name: str, folder: Path) -> Family:
    """Write a base and its adapters, whose factors are random."""
    from lorakit import core, hub
    from lorakit.config import LoraConfig

    base = folder / "base"
    FAMILIES[name](base)
    adapters = {}
    for number, (variant, fields) in enumerate(VARIANTS.items()):
        model = hub.load_model(base, "float32")
        config = {"r": 8, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        core.attach(model, LoraConfig(**{**config, **fields}), seed=number)
        _randomize([parameter for _, parameter in core.trainable_parameters(model)], number)
        adapters[variant] = folder / f"{number}-{variant.replace(' ', '-').lower()}"
        core.save_adapter(model, adapters[variant], base_model_name_or_path=str(base))
    return Family(name, base, adapters)


def _randomize(parameters: Sequence[Any], seed: int) -> None:
    """Add noise of 0.3 of each factor's usual size: random numbers in place of training."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += noise * (0.3 * parameter.std() if parameter.any() else 0.05)


@contextlib.contextmanager
def vllm(family: Family, workspace: Path, command: str) -> Iterator[Open]:
    """Export the adapters, and serve them in vLLM with one of the printed commands."""
    from lorakit.core import common_form
    from lorakit.export.formats import export
    from lorakit.export.peft_folder import serving_commands
    from lorakit.export.request import ExportRequest, name_of
    from lorakit.verify.servers import open_url

    served, ranks = {}, {}
    for variant, folder in family.adapters.items():
        request = ExportRequest(common_form(folder), name_of(folder), served_base=str(family.base))
        served[variant], ranks[variant] = export("vllm", request, workspace)[0].name, request.adapter.rank
    largest = max(ranks, key=lambda variant: ranks[variant])
    printed = serving_commands(served[largest], str(family.base), ranks[largest], str(workspace))[command]
    others = [f"{name}={workspace}/{name}" for name in served.values() if name != served[largest]]
    options = (*others, "--max-loras", "4") if "--lora-modules" in printed else ("--max-loras", "4")
    with vllm_server.serving(printed, workspace / "log.txt", *options) as url:

        def opened(variant: str, request: Any) -> contextlib.AbstractContextManager[Any]:
            _first_use(url, served[variant])
            return open_url(url, replace(request, served_model=served[variant]))

        yield opened


def _first_use(url: str, model: str) -> None:
    """Request a token of a model, which the resolver loads; `/v1/models` does not list it before."""
    from lorakit.verify.http_client import JsonClient

    JsonClient(url, timeout=120).post("/v1/completions", {"model": model, "prompt": [2, 3], "max_tokens": 1})


@contextlib.contextmanager
def llama_cpp(family: Family, workspace: Path) -> Iterator[Open]:
    """Write the base as a GGUF file in F32, and open each adapter with it in llama.cpp."""
    from tests.gguf_models import write_base

    from lorakit import hub
    from lorakit.verify.llama_cpp import open_gguf

    base = write_base(hub.load_model(family.base, "float32"), workspace / "base.gguf")
    yield lambda variant, request: open_gguf(replace(request, base_gguf=base))


@contextlib.contextmanager
def mlx(family: Family, workspace: Path) -> Iterator[Open]:
    """Open each adapter in mlx-lm."""
    from lorakit.verify.mlx import open_mlx

    yield lambda variant, request: open_mlx(request)


RUNTIMES: Mapping[str, Callable[[Family, Path], contextlib.AbstractContextManager[Open]]] = {
    "vllm": lambda family, workspace: vllm(family, workspace, "vLLM"),
    "vllm-resolver": lambda family, workspace: vllm(family, workspace, "vLLM, adapters on first use"),
    "llama.cpp": llama_cpp,
    "mlx-lm": mlx,
}
"""Name of a runtime -> function that makes a family's adapters available in it."""


def request_of(family: Family, variant: str, workspace: Path) -> Any:
    """Return the `RuntimeRequest` for an adapter."""
    from transformers import AutoConfig

    from lorakit import core
    from lorakit.session import SessionOptions, session_spec
    from lorakit.verify.loaded import ADAPTER
    from lorakit.verify.runtime import RuntimeRequest

    files = core.read_adapter(family.adapters[variant])
    spec = session_spec(str(family.base), {ADAPTER: files}, SessionOptions(dtype="float32"))
    workspace.mkdir(parents=True)
    config = AutoConfig.from_pretrained(family.base)
    ends = frozenset({config.eos_token_id, config.vocab_size - 1})  # the last is what `write_base` records
    return RuntimeRequest(spec, workspace, ends, frozenset(), TOKENS + GREEDY + 1, timeout=300)


def asked(runtime: Any, prompts: Sequence[Sequence[int]], ends: Collection[int]) -> Answers:
    """Return a runtime's answers, the greedy ones up to the first token that ends them."""
    values = [runtime.log_probabilities(ids) for ids in prompts]
    greedy = [runtime.greedy(ids, GREEDY) for ids in prompts]
    return Answers(values, [list(takewhile(lambda token: token not in ends, tokens)) for tokens in greedy])


def references(family: Family, variant: str, request: Any, prompts: Sequence[Sequence[int]]) -> tuple[Answers, ...]:
    """Return lorakit's and peft's answers, and those of lorakit's base."""
    import peft

    from lorakit import core, hub
    from lorakit.verify.loaded import LoadedRuntime, open_session_runtime
    from lorakit.verify.runtime import BASE

    with open_session_runtime(request) as runtime:
        ours, base = asked(runtime, prompts, request.end_ids), of_base(runtime, BASE, prompts)
    folder = family.adapters[variant]
    if variant in NOT_IN_PEFT:
        folder = request.workspace / "plain"
        core.common_form(family.adapters[variant]).save(folder, str(family.base))
    model = peft.PeftModel.from_pretrained(hub.load_model(family.base, "float32"), str(folder)).eval()
    theirs = asked(LoadedRuntime("peft", model, request.spec.tokenizer, request), prompts, request.end_ids)
    return ours, theirs, base


def of_base(runtime: Any, name: str, prompts: Sequence[Sequence[int]]) -> Answers:
    """Return the answers of a runtime's base, which has the given name there, without greedy tokens."""
    return Answers([runtime.log_probabilities(ids, name) for ids in prompts], [])


def measured(name: str, family: Family, runtimes: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a family."""
    import torch
    from transformers import AutoConfig

    size = AutoConfig.from_pretrained(family.base).vocab_size
    generator = torch.Generator().manual_seed(7)
    prompts = torch.randint(20, size - 1, (PROMPTS, TOKENS), generator=generator).tolist()
    requests = {variant: request_of(family, variant, folder / f"own-{variant}") for variant in family.adapters}
    known = {variant: references(family, variant, request, prompts) for variant, request in requests.items()}
    rows = []
    for runtime_name in runtimes:
        workspace = folder / runtime_name
        workspace.mkdir()
        base = None
        with RUNTIMES[runtime_name](family, workspace) as opened:
            for variant, request in requests.items():
                own = workspace / f"own-{variant}"
                own.mkdir()
                with opened(variant, replace(request, workspace=own)) as runtime:
                    found = asked(runtime, prompts, request.end_ids)
                    if base is None:
                        called = next(one for one in runtime.others if one in ("base", str(family.base)))
                        base = largest(of_base(runtime, called, prompts), known[variant][2])
                    versions = dict(runtime.versions)
                rows.append({"runtime": runtime_name, "runtime_versions": versions, "family": name, "variant": variant})
                rows[-1] |= {"base": base} | compared(found, variant, known)
                print(json.dumps(rows[-1]), flush=True)
    return rows


def compared(found: Answers, variant: str, known: Mapping[str, tuple[Answers, ...]]) -> dict[str, Any]:
    """Return the differences of a runtime's answers from lorakit's, peft's, and those to all other adapters."""
    ours, theirs, _ = known[variant]
    return {
        "lorakit": largest(found, ours),
        "peft": largest(found, theirs),
        "greedy_same": sum(one == other for one, other in zip(found.greedy, ours.greedy, strict=True)),
        "greedy": len(ours.greedy),
        "nearest_other": min(largest(found, other[0]) for name, other in known.items() if name != variant),
    }


def largest(one: Answers, other: Answers) -> float:
    """Return the largest difference of two runtimes' log-probabilities."""
    pairs = zip(one.values, other.values, strict=True)
    return max(abs(a - b) for row, others in pairs for a, b in zip(row, others, strict=True))


def is_good(row: Mapping[str, Any]) -> bool:
    """Return whether a runtime gives an adapter's answers, as exactly as it computes the base, and not another's."""
    bound = max(BOUND, 2 * row["base"])
    return max(row["lorakit"], row["peft"]) <= bound < row["nearest_other"] and row["greedy_same"] == row["greedy"]


def table() -> str:
    """Return the newest results as a table: a row for each runtime and family, a column for each variant."""
    newest: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        newest.setdefault((row["runtime"], row["family"]), {})[row["variant"]] = row
    head = ["runtime", "family", "its base", *VARIANTS, "greedy", "nearest other"]
    lines = [[*names, *_cells(found)] for names, found in sorted(newest.items())]
    measured = [row for found in newest.values() for row in found.values()]
    versions = {
        f"{package} {number}"
        for row in measured
        for package, number in {**row["runtime_versions"], "peft": row["versions"]["peft"]}.items()
    }
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *lines])
    return f"{len(measured)} adapters; {', '.join(sorted(versions))}.\n\n{text}"


def _cells(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what a row says about a runtime and a family, from the results by variant."""
    rows = [found[variant] for variant in VARIANTS]
    same, count = (sum(row[name] for row in rows) for name in ("greedy_same", "greedy"))
    return [
        f"{rows[0]['base']:.0e}",
        *(f"{row['lorakit']:.0e} / {row['peft']:.0e}" for row in rows),
        f"{same} of {count}",
        f"{min(row['nearest_other'] for row in rows):.2g}",
    ]


def main() -> int:
    """Measure, append the rows and write the table; return 1 if a runtime gives other answers."""
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
        if any(name.startswith("vllm") for name in runtimes):
            vllm_server.set_up()
        for name in options.families.split(","):
            with tempfile.TemporaryDirectory() as temporary:
                rows = measured(name, made(name, Path(temporary)), runtimes, Path(temporary))
            for row in rows:
                append_row("runtimes", row, {}, quiet=True)
            bad += sum(not is_good(row) for row in rows)
        print(f"{bad} adapters with other answers (bound {BOUND:.0e})")
    return generated_table.write(PAGE, BEGIN, table) or int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
