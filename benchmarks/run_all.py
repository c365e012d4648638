"""Run all benchmarks except that of a GPU, in less than an hour on two idle cores: `make bench`.

    python benchmarks/run_all.py [--only step job] [--list]

Each command is one of benchmarks/README.md, with short settings; alone they take more rounds. The minutes of each are
printed at the end. If one fails, the others still run.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

COMMANDS: dict[str, str] = {
    "startup": "bench_startup.py",
    "layer_call": "bench_layer_call.py",
    "contract": "bench_contract.py",
    "blocks": "bench_blocks.py",
    "experts": "bench_experts.py",
    "attach": "bench_attach.py",
    "face": "bench_face.py",
    "int8_base": "bench_int8_base.py",
    "products": "bench_products.py --repeats 5",
    "optimizer": "bench_optimizer.py",
    "optimizers": "bench_optimizers.py --steps 10 --only adamw adamw8bit lorafa muon",
    "step": "bench_step.py --steps 4 --sides 'GEMM baseline' 'lorakit, frozen' lorakit peft",
    "step of peft's other settings": "bench_step.py --dropout 0.05 --allocators tuned "
    "--sides 'transformers, frozen' peft \"peft, adapters in the base's dtype\" 'peft, bf16 autocast'",
    "step of gpt2": "bench_step.py --model gpt2 --dropout 0.05 --allocators tuned "
    "--sides 'GEMM baseline' 'lorakit, frozen' lorakit peft",
    "step of q and v": "bench_step.py --model 'smollm2, q and v' --dtype float32 --dropout 0 --allocators tuned "
    "--steps 4 --sides 'transformers, frozen' lorakit peft",
    "ablation": "bench_step.py --ablate",
    "ablation with few labels": "bench_step.py --ablate --trained 0.3 "
    "--optimizations 'skipped rows in the last layer' 'loss without logits'",
    "int8": "bench_int8.py --model smollm2 --ablate",
    "int8, a quarter of Llama-3.2-1B": "bench_int8.py --model llama-1b --rounds 3",
    "picture": "picture_of_step.py --picture docs/performance.svg",
    "train": "bench_train.py",
    "neighbour": "bench_neighbour.py --steps 8 --rounds 1",
    "job": "bench_job.py --steps 20",
    "decode": "bench_decode.py --rounds 1",
    "generate": "bench_generate.py --rounds 2",
    "few_rows": "bench_few_rows.py",
    "decode in int8": "bench_decode.py --int8 --rows 1 4 16 32",
    "longest": "bench_longest.py --gib 1.5",
    "lengths": "bench_lengths.py --steps 30",
    "plan_memory": "bench_plan_memory.py --steps 3 --allocators pinned",
    "growth": "bench_growth.py",
    "memory": "bench_memory.py --models smollm2 --sizes 4x256 --recompute none",
    "tasks": "bench_tasks.py --seeds 1 --steps 40",
    "streaming": "bench_streaming.py --gigabytes 2",
    "processes": "bench_processes.py --steps 5",
    "int8_embeddings": "bench_int8_embeddings.py --tasks text --evaluated 16",
    "fused_quantization": "bench_fused_quantization.py",
    "int8_parity": "bench_int8_parity.py --quick --tasks text",
}
"""Name -> command, without the interpreter."""

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    options = parser.parse_args()
    minutes, failed = dict[str, float](), list[str]()
    for name in options.only:
        script, *words = shlex.split(COMMANDS[name])
        print(f"{name}: python benchmarks/{COMMANDS[name]}", flush=True)
        if options.list:
            continue
        began = time.monotonic()
        done = subprocess.run([sys.executable, str(HERE / script), *words], cwd=HERE.parent, check=False)
        minutes[name] = (time.monotonic() - began) / 60
        failed += [name] if done.returncode else []
    for name, taken in minutes.items():
        print(f"{name:28} {taken:5.1f} minutes{' (failed)' if name in failed else ''}")
    if minutes:
        print(f"{'total':28} {sum(minutes.values()):5.1f} minutes")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
