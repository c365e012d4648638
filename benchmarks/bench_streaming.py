"""Claim: `lorakit train` starts on a file of 10 GB within a minute, in the memory that a file of 10 MB takes.

    python benchmarks/bench_streaming.py [--gigabytes 10] [--steps 30] [--suffix jsonl] [--folder /tmp]

Both files contain rows (JSON Lines, a JSON list, CSV or Parquet) with texts cut from Python's language reference. A
model with random weights (2 layers, width 64, SmolLM2's tokenizer) trains on each of them with the default settings,
so the large file is streamed and the small one is tokenized as a whole. Measured are the time from the start of the
process to the first batch, which includes the evaluation before the first step, the processor time up to the first
step (Linux), which depends less on other processes, and the peak memory of the process. The run on the large file is
then repeated, killed with SIGKILL in the middle and resumed; the benchmark fails if its adapter differs in a single
bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runner import append_row

SMALL_BYTES, BLOCK_BYTES = 10_000_000, 50_000_000
MOST_SECONDS, MOST_ADDED_BYTES = 60, 200_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--suffix", choices=("jsonl", "json", "csv", "parquet"), default="jsonl")
    parser.add_argument("--folder", type=Path, help="where to write the files; they are deleted afterwards")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        model = make_model(folder / "model")
        small = make_file(folder / f"small.{options.suffix}", SMALL_BYTES)
        large = make_file(folder / f"large.{options.suffix}", int(options.gigabytes * 1e9))
        found = {path.stem: measured(path, model, folder / path.stem, options.steps) for path in (small, large)}
        same = is_same_after_kill(large, model, folder, options.steps)
        size = large.stat().st_size
    (seconds, cpu, peak), (small_seconds, small_cpu, small_peak) = found["large"], found["small"]
    facts = {"bytes": size, "suffix": options.suffix, "steps": options.steps, "same bits after a kill": same}
    samples = {
        "first batch, large file (s)": [seconds],
        "first batch, 10 MB (s)": [small_seconds],
        "processor time, large file (s)": [cpu],
        "processor time, 10 MB (s)": [small_cpu],
        "peak, large file (MB)": [peak / 1e6],
        "peak, 10 MB (MB)": [small_peak / 1e6],
    }
    append_row("streaming", facts, samples)
    if seconds > MOST_SECONDS or peak > small_peak + MOST_ADDED_BYTES or not same:
        raise SystemExit("the claim does not hold")


def make_model(folder: Path) -> Path:
    """Write a small model with random weights and SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorakit import hub

    tokenizer = hub.load_tokenizer("smollm2")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_file(path: Path, size: int) -> Path:
    """Write rows of texts; blocks of 50 MB repeat, each row with its own number."""
    from lorakit import data

    drawn = random.Random(0)
    text = "\n".join(record.text for record in data.python_reference() if isinstance(record, data.Document))
    rows, have = list[str](), 0
    while have < min(size, BLOCK_BYTES):
        at = drawn.randrange(len(text) - 4000)
        rows.append(json.dumps(text[at : at + drawn.randrange(200, 4000)]))
        have += len(rows[-1])
    if path.suffix == ".parquet":
        return make_table(path, size, [json.loads(row) for row in rows])
    begin, between, end = ("[", ",\n", "]\n") if path.suffix == ".json" else ("", "\n", "\n")
    written = number = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        written += file.write("number,text\n" if path.suffix == ".csv" else begin)
        while written < size:
            text = rows[number % len(rows)]
            if path.suffix == ".csv":
                quoted = json.loads(text).replace('"', '""')
                row = f'{number},"{quoted}"'
            else:
                row = f'{{"number": {number}, "text": {text}}}'
            written += file.write((between if number else "") + row)
            number += 1
        file.write(end)
    return path


def make_table(path: Path, size: int, texts: list[str]) -> Path:
    """Write a Parquet file without compression; blocks of 50 MB repeat, each row with its own number."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("number", pyarrow.int64()), ("text", pyarrow.string())])
    first = 0
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        while first == 0 or path.stat().st_size < size:
            numbers = list(range(first, first + len(texts)))
            writer.write_table(pyarrow.table([numbers, texts], schema=schema))
            first += len(texts)
    return path


def command(path: Path, model: Path, run: Path, steps: int) -> list[str]:
    """Return the command line of a run."""
    words = ["--model", model, "--data", path, "--output-dir", run, "--max-steps", steps, "--save-steps", 5]
    flags = ["--device", "cpu", "--dtype", "float32", "--no-token-cache", "--no-tuning", "--eval-steps", steps]
    return [sys.executable, "-m", "lorakit", "train", *map(str, [*words, *flags])]


def measured(path: Path, model: Path, run: Path, steps: int) -> tuple[float, float, int]:
    """Return the seconds to the first batch, the processor time to the first step, and the peak memory in bytes."""
    began = time.time()
    process = subprocess.Popen(
        command(path, model, run, steps), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    row = wait_for_step(process, run, 1)
    first, cpu = time.time() - began - row["seconds"], processor_seconds(process.pid)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed:\n{output}")
    return first, cpu, json.loads((run / "run.json").read_text())["result"]["peak_rss_bytes"]


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used, or 0 if the system does not report it."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> dict[str, float]:
    """Wait until a step is in the log, and return its row."""
    log = run / "metrics.jsonl"
    while True:
        lines = log.read_text().splitlines() if log.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        found = [row for row in rows if row["step"] >= step and "loss" in row]
        if found:
            return found[0]
        if process.poll() is not None:
            raise SystemExit(f"the run ended before step {step}:\n{process.stdout.read() if process.stdout else ''}")
        time.sleep(0.01)


def is_same_after_kill(path: Path, model: Path, folder: Path, steps: int) -> bool:
    """Return whether a run that is killed in the middle and resumed gives the same adapter as the run before."""
    words = command(path, model, folder / "killed", steps)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for_step(process, folder / "killed", steps // 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    subprocess.run([*words, "--resume"], check=True, stdout=subprocess.DEVNULL)
    weights = [folder / name / "adapter" / "adapter_model.safetensors" for name in (path.stem, "killed")]
    return weights[0].read_bytes() == weights[1].read_bytes()


if __name__ == "__main__":
    main()
