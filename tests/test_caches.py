"""Every cache is in the table of `lorakit.caches`; each of its inputs, changed alone, is a miss, and no change is a hit."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lorakit
from lorakit import LoraConfig, caches, file_hashes, hub
from lorakit.caches import CACHES, PACKAGES, Cache
from lorakit.data import Batch, Split, read_records, token_cache
from lorakit.hub import converting, packaged
from lorakit.hub.packaged import kept_directory
from lorakit.machine import LIBRARY_VARIABLES, this_machine
from lorakit.ops.kernels import building, compiled
from lorakit.speed import tuning
from lorakit.tasks import TASKS, Target, TaskOnData
from lorakit.train.loop import score_cache
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup.run_data import make_batches

from .small_models import llama
from .train.specified import specified

SOURCE = Path(lorakit.__file__).parent
Patch = pytest.MonkeyPatch


def same_size_and_time(path: Path, old: str | bytes, new: str | bytes) -> None:
    """Replace text in a file, keeping the file's size and modification time."""
    old, new = (one.encode() if isinstance(one, str) else one for one in (old, new))
    before, content = path.stat(), path.read_bytes()
    assert old in content and len(old) == len(new)
    time.sleep(0.02)  # longer than a tick of the file system's clock
    path.write_bytes(content.replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def another_version(patch: Patch, name: str) -> None:
    found = importlib.metadata.version
    patch.setattr(importlib.metadata, "version", lambda one: "999" if one == name else found(one))


class Tokens:
    """A run's data, tokenized with a tokenizer from files."""

    def __init__(self, tmp_path: Path, tokenizer: Any) -> None:
        self.data, self.folder = tmp_path / "a.jsonl", tmp_path / "tokenizer"
        self.data.write_text("".join(json.dumps({"prompt": f"p{n}", "completion": "c"}) + "\n" for n in range(8)))
        tokenizer.save_pretrained(self.folder)
        self.settings: dict[str, Any] = {"model": "x", "data": [str(self.data)], "output_dir": str(tmp_path / "run")}
        self.length, self.notes = 16, list[str]()

        self.task = TaskOnData(TASKS["causal-lm"], Target("text"))

    def key(self) -> list[Any]:
        settings = TrainSettings(**self.settings)
        records = read_records(self.settings["data"], settings.row_request())
        split = Split(records.some(range(len(records)), [*records.notes, *self.notes]), None, "")
        tokenizer = hub.adapter_tokenizer(self.folder)
        return list(make_batches(specified(settings, split, self.task, tokenizer, self.length)).loader.sequences)


def tokenizer_config(**values: Any) -> Callable[[Tokens, Patch], None]:
    return lambda case, _: edit(case.folder / "tokenizer_config.json", **values)


def setting(**values: Any) -> Callable[[Tokens, Patch], None]:
    return lambda case, _: case.settings.update(values)


def version(name: str) -> Callable[[Any, Patch], None]:
    return lambda _, patch: another_version(patch, name)


def variable(name: str) -> Callable[[Any, Patch], None]:
    return lambda _, patch: patch.setenv(name, "AVX2")


def another_merge(case: Tokens, _: Patch) -> None:
    path = case.folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["model"]["merges"].pop()
    path.write_text(json.dumps(rules))


def another_template(case: Tokens, _: Patch) -> None:
    same_size_and_time(case.folder / "chat_template.jinja", "assistant", "Assistant")


class Start:
    """The start of a run: a base from files, an adapter, and batches."""

    def __init__(self, cache: Cache, facts: dict[str, Any], tmp_path: Path) -> None:
        self.cache, self.facts = cache, facts
        self.folder = tmp_path / "base"
        self.model = llama()
        self.model.save_pretrained(self.folder)
        self.model.config.name_or_path = str(self.folder)
        self.adapter, self.task = LoraConfig(), {"name": "causal-lm"}
        self.named = [("A", torch.zeros(2, 2))]
        self.batch = Batch(*(torch.zeros(1, 4, dtype=torch.long) for _ in range(3)), 1.0, 4, 4)
        self.environment: dict[str, Any] = {"dtype": "float32"}

    def key(self) -> None:
        spec: Any = SimpleNamespace(
            settings=SimpleNamespace(token_cache=True),
            processes=SimpleNamespace(is_alone=True),
            forecast=SimpleNamespace(config=self.adapter),
            task=SimpleNamespace(as_dict=lambda: self.task),
        )
        batches = [self.batch]
        score_cache.start_key(self.cache, self.model, spec, self.environment, self.facts, self.named, batches)


def other_weights(case: Start, _: Patch) -> None:
    path = case.folder / "model.safetensors"
    same_size_and_time(path, path.read_bytes()[-4:], b"\x01\x02\x03\x04")


def other_class(case: Start, _: Patch) -> None:
    case.model.__class__ = type("Other", (type(case.model),), {})


def set_on(path: str, value: Any) -> Callable[[Any, Patch], None]:
    def change(case: Any, _: Patch) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            case = getattr(case, owner)
        setattr(case, name, value)

    return change


def fact(name: str) -> Callable[[Start, Patch], None]:
    return lambda case, _: case.facts.update({name: "other"})


def with_batch(**values: Any) -> Callable[[Start, Patch], None]:
    return lambda case, _: setattr(case, "batch", dataclasses.replace(case.batch, **values))


STARTS: dict[str, list[Callable[..., None]]] = {
    "weights": [other_weights],
    "new_tensors": [set_on("named", [("A", torch.ones(2, 2))]), set_on("named", [("B", torch.zeros(2, 2))])],
    "config": [set_on("model.config.rms_norm_eps", 1.0)],
    "model_class": [other_class],
    "attention": [set_on("model.config._attn_implementation", "eager")],
    "adapter": [set_on("adapter", LoraConfig(r=3)), set_on("adapter", LoraConfig(lora_alpha=5))],
    "task": [set_on("task", {"name": "classification"})],
    "rows": [
        with_batch(input_ids=torch.ones(1, 4, dtype=torch.long)),
        with_batch(attention_mask=torch.ones(1, 4, dtype=torch.long)),
        with_batch(labels=torch.ones(1, 4, dtype=torch.long)),
        with_batch(extra={"x": torch.zeros(1)}),
    ],
    "environment": [set_on("environment", {"dtype": "bfloat16"})],
    "machine": [variable("ONEDNN_MAX_CPU_ISA"), *map(variable, LIBRARY_VARIABLES)],
    "code": [version("safetensors"), version("jinja2")],
}


class Machine:
    def __init__(self, tmp_path: Path) -> None: ...

    def key(self) -> None:
        tuning.machine()


def on_machine(**values: Any) -> Callable[[Machine, Patch], None]:
    other = dataclasses.replace(this_machine(), **values)
    return lambda _, patch: patch.setattr(tuning, "this_machine", lambda: other)


def other_kernels(_: Machine, patch: Patch) -> None:
    patch.setattr(compiled, "kernels", object)


class File:
    def __init__(self, tmp_path: Path) -> None:
        self.path, self.status = tmp_path / "a", dict[str, int]()
        self.path.write_bytes(b"one")

    def key(self) -> None:
        file_hashes.file_hash(self.path)


def status(name: str) -> Callable[[File, Patch], None]:
    def change(case: File, patch: Patch) -> None:
        other = file_hashes.FileStatus.of(case.path)._replace(**{name: 1})
        patch.setattr(file_hashes.FileStatus, "of", lambda file: other)

    return change


def other_path(case: File, _: Patch) -> None:
    (case.path.parent / "b").hardlink_to(case.path)
    case.key()  # a new link changes the change time
    case.path = case.path.parent / "b"


class Library:
    """The C sources, and a compiler that only says its version."""

    def __init__(self, tmp_path: Path) -> None:
        shutil.copytree(building.SOURCE.parent, tmp_path / "c")
        self.source, self.compiler, self.define = tmp_path / "c" / building.SOURCE.name, tmp_path / "cc", "X"
        self.compiler.write_text("#!/bin/sh\necho version 1\n")
        self.compiler.chmod(0o700)

    def key(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "SOURCE", self.source)
            building._key([str(self.compiler)], self.define)


class Package:
    """A package with a GGUF file, whose conversion is replaced."""

    def __init__(self, tmp_path: Path) -> None:
        self.file, self.cache, self.name = tmp_path / "x.gguf", tmp_path / "cache", "smollm2"
        self.file.write_bytes(b"GGUF one")

    def key(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packaged, "_find", lambda _: self.file)
            patch.setattr(packaged, "require_packages", lambda *_: None)
            patch.setattr(packaged, "convert_gguf", lambda *given: (given[2] / "config.json").write_text("{}"))
            packaged.packaged_directory(self.name, cache=self.cache)


def other_model(case: Package, patch: Patch) -> None:
    other = dataclasses.replace(packaged.PACKAGED["smollm2"], needed_bytes=1)
    patch.setitem(packaged.PACKAGED, "smollm2", other)


class Gguf:
    """A GGUF file whose conversion is replaced."""

    def __init__(self, tmp_path: Path) -> None:
        self.file, self.loader, self.dtype = tmp_path / "x.gguf", "AutoModel", "float32"
        self.file.write_bytes(b"GGUF one")

    def key(self) -> None:
        source = hub.ModelSource("gguf", "x", str(self.file), "x", "x")
        written = {"is_same": True}
        converting._kept(source, self.loader, self.dtype, 1, lambda folder: (folder / "a").touch() or written)


CHANGES: dict[str, tuple[Callable[..., Any], dict[str, list[Callable[..., None]]]]] = {
    "tokens": (
        Tokens,
        {
            "records": [lambda case, _: same_size_and_time(case.data, '"p3"', '"q3"')],
            "notes": [lambda case, _: case.notes.append("other")],
            "reading": [
                setting(on_bad_row="skip"),
                setting(format="prompt-completion"),
                setting(columns={"prompt": "prompt"}),
                setting(task="causal-lm"),
                setting(group="prompt"),
            ],
            "encoding": [set_on("length", 17), setting(overlong="drop")],
            "tokenizer": [
                tokenizer_config(truncation_side="left"),
                tokenizer_config(padding_side="left"),
                tokenizer_config(split_special_tokens=True),
                tokenizer_config(model_max_length=99),
                tokenizer_config(eos_token="<|im_end|>"),
                lambda case, _: same_size_and_time(case.folder / "tokenizer.json", "<|im_end|>", "<|im_eND|>"),
                another_merge,
            ],
            "template": [another_template],
            "code": [version("tokenizers"), version("pyarrow")],
        },
    ),
    "scores": (
        lambda path, _: Start(caches.EVALUATIONS, {"accelerated": True, "int8_scales": None, "packed": False}, path),
        {**STARTS, **{name: [fact(name)] for name in ("accelerated", "int8_scales", "packed")}},
    ),
    "int8": (
        lambda path, _: Start(caches.INT8, {"batch_tokens": 512}, path),
        {**STARTS, "batch_tokens": [fact("batch_tokens")]},
    ),
    "choices.json": (
        lambda path, _: Machine(path),
        {
            "processor": [on_machine(cpu="other")],
            "instructions": [on_machine(features=()), lambda _, patch: patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")],
            "threads": [lambda _, patch: patch.setattr(torch, "get_num_threads", lambda: 77)],
            "kernels": [other_kernels],
            "versions": [version("torch"), lambda _, patch: patch.setattr(lorakit, "__version__", "999")],
        },
    ),
    "weight_files.json": (
        lambda path, _: File(path),
        {"path": [other_path], **{name: [status(name)] for name in file_hashes.FileStatus._fields}},
    ),
    "kernels": (
        lambda path, _: Library(path),
        {
            "source": [lambda case, _: same_size_and_time(case.source, "return", "RETURN")],
            "flags": [lambda _, patch: patch.setattr(building, "FLAGS", ("-O2",))],
            "compiler": [lambda case, _: same_size_and_time(case.compiler, "version 1", "version 2")],
            "instructions": [lambda _, patch: patch.setattr(building, "_instructions", lambda: "other")],
            "system": [lambda _, patch: patch.setattr(building.platform, "machine", lambda: "other")],
            "define": [set_on("define", "Y")],
            "torch": [lambda _, patch: patch.setattr(torch, "__version__", "999")],
        },
    ),
    "models": (
        lambda path, _: Package(path),
        {
            "source": [lambda case, _: same_size_and_time(case.file, "one", "two")],
            "model": [other_model],
            "versions": [version("gguf"), version("transformers")],
        },
    ),
    "gguf": (
        lambda path, _: Gguf(path),
        {
            "source": [lambda case, _: same_size_and_time(case.file, "one", "two")],
            "loader": [set_on("loader", "AutoModelForCausalLM")],
            "dtype": [set_on("dtype", "bfloat16")],
            "versions": [version("gguf"), version("tokenizers")],
        },
    ),
}
"""Place of a cache -> something that asks for a key, and the changes of each input."""


DIRECTORIES = {
    "cache_directory": {"machine.py", "caches.py"},
    "scratch_directory": {"caches.py", "hub/converting.py"},
    "home_directory": {"machine.py", "cli/doctor.py"},
    "Path.home": {"machine.py", "core/model/fingerprint.py"},
}
"""Function that gives a place outside the current directory -> the modules that may call it."""


@pytest.fixture
def asked(monkeypatch: Patch, tmp_path: Path) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The place and the inputs of each key that was asked for."""
    found, key = list[tuple[str, dict[str, Any]]](), Cache.key

    def spied(self: Cache, **values: Any) -> str:
        found.append((self.place, json.loads(json.dumps({**values, "": key(self, **values)}))))
        return key(self, **values)

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 1)
    monkeypatch.setattr(compiled, "kernels", lambda: None)  # would be compiled for the new cache directory
    monkeypatch.setattr(Cache, "key", spied)
    yield found


CELLS = [
    pytest.param(place, name, number, id=f"{place}-{name}-{number}")
    for place, (_, changes) in CHANGES.items()
    for name, options in changes.items()
    for number in range(len(options))
]


@pytest.mark.parametrize(("place", "name", "number"), CELLS)
def test_an_input_that_changes_alone_is_a_miss(
    place: str, name: str, number: int, tmp_path: Path, monkeypatch: Patch, asked: Any, tiny_tokenizer: Any
) -> None:
    make, changes = CHANGES[place]
    case = make(tmp_path, tiny_tokenizer)

    def last() -> dict[str, Any]:
        case.key()
        return next(values for one, values in reversed(asked) if one == place)

    first = last()
    assert last() == first
    changes[name][number](case, monkeypatch)
    if place == "weight_files.json":
        first = next(values for one, values in reversed(asked) if one == place)
    second = last()
    assert [key for key in first if first[key] != second[key]] == [name, ""]


@pytest.mark.parametrize("values", [{"truncation_side": "left"}, {"split_special_tokens": True}], ids=str)
def test_tokens_are_those_of_the_tokenizer_as_it_is_now(
    values: dict[str, Any], tmp_path: Path, asked: Any, tiny_tokenizer: Any
) -> None:
    case = Tokens(tmp_path, tiny_tokenizer)
    rows = [{"text": f"<|im_end|> one two three four five six {n} <|im_start|>", "label": f"{n}"} for n in range(4)]
    case.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    case.task, case.length = TaskOnData(TASKS["classification"], Target("class", ("0", "1", "2", "3"))), 8
    first = case.key()
    edit(case.folder / "tokenizer_config.json", **values)
    second = case.key()
    case.settings["token_cache"] = False
    assert second == case.key() != first


def test_every_input_of_every_cache_is_changed() -> None:
    assert {cache.place: set(cache.inputs) for cache in CACHES} == {
        place: set(changes) for place, (_, changes) in CHANGES.items()
    }


@pytest.mark.parametrize("name", PACKAGES)
def test_each_package_is_part_of_the_versions(name: str, monkeypatch: Patch) -> None:
    found = caches.versions()
    another_version(monkeypatch, name)
    assert {**found, name: "999"} == caches.versions() != found


def test_the_source_is_part_of_the_code(tmp_path: Path, monkeypatch: Patch) -> None:
    for name in ("__init__.py", "a/b.py", "a/c.c", "a/d.h"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
        time.sleep(0.02)
    monkeypatch.setattr(lorakit, "__file__", str(tmp_path / "__init__.py"))
    found = [caches.code(), caches.code()]
    assert found[0] == found[1]
    for name in ("a/b.py", "a/c.c", "a/d.h"):
        same_size_and_time(tmp_path / name, "one", "two")
        found.append(caches.code())
        assert found[-1] != found[-2]


@pytest.mark.parametrize(
    "values", [{}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": object()}], ids=["missing", "more", "not-json"]
)
def test_a_key_needs_all_inputs_and_no_others_as_json(values: dict[str, Any]) -> None:
    cache = Cache("x", 1, ("a", "b"))
    with pytest.raises(TypeError):
        cache.key(**values)
    assert cache.key(a=1, b=2) != dataclasses.replace(cache, format=2).key(a=1, b=2) != cache.key(a=2, b=1)


def test_nothing_else_gives_places_in_the_cache_directory() -> None:
    """A cache outside the table would need the cache directory, or the directory of another cache."""
    sources = {path.relative_to(SOURCE).as_posix(): path.read_text() for path in SOURCE.rglob("*.py")}
    users = {name: {path for path, text in sources.items() if f"{name}(" in text} for name in DIRECTORIES}
    assert users == DIRECTORIES
    assert {cache.place for cache in CACHES} == {one.place for one in vars(caches).values() if isinstance(one, Cache)}
    assert len({cache.place for cache in CACHES}) == len(CACHES)


def test_the_files_of_a_tokenizer_without_a_backend_are_part_of_its_settings(tmp_path: Path) -> None:
    from transformers import CTRLTokenizer

    found = []
    for number, merges in enumerate(("a b\nab c\n", "b c\na bc\n", "a b\nab c\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps({name: at for at, name in enumerate(("<unk>", "a", "b", "c"))}))
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
        tokenizer = CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
        assert getattr(tokenizer, "backend_tokenizer", None) is None
        found.append((hub.tokenizer_hash(tokenizer), hub.tokenizer_settings(tokenizer)))
    assert found[0] == found[2]
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


LOADING = """
import sys
from pathlib import Path
from lorakit.hub.packaged import kept_directory
folder = kept_directory(Path(sys.argv[1]), "key", 1, None)
print("found", flush=True)
sys.stdin.readline()
print((folder / "weights").read_text())
"""


def test_an_entry_that_another_process_loads_is_not_removed(tmp_path: Path) -> None:
    for name in ("loaded", "unused"):
        kept_directory(tmp_path / name, "key", 1, lambda folder: {"n": (folder / "weights").write_text("w" * 99)})
        os.utime(tmp_path / name, (1, 1))
    words = [sys.executable, "-c", LOADING, str(tmp_path / "loaded")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout and process.stdout.readline() == "found\n"
        caches.remove_unused(tmp_path, 1, 50)
        assert process.communicate("go\n")[0] == "w" * 99 + "\n"
    assert not (tmp_path / "unused").exists()
    os.utime(tmp_path / "loaded", (1, 1))
    caches.remove_unused(tmp_path, 1, 50)
    assert not (tmp_path / "loaded").exists()
