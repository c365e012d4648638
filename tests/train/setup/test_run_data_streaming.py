"""Runs on streamed data: when data is streamed, what is recorded, invalid rows in the middle, weights and groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Loader, StreamLoader, streaming
from lorakit.data.records import content_key
from lorakit.errors import ConfigError, DataError, RunError, UsageError
from lorakit.tasks import CAUSAL_LM, Target, TaskOnData
from lorakit.train import run
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup import run_data
from lorakit.train.setup.run_data import is_streamed, make_batches, read_data

from ..said import Said
from ..specified import specified

PLAIN = TaskOnData(CAUSAL_LM, Target())


def write(path: Path, count: int, **more: Any) -> str:
    rows = [{"text": f"the fox number {number} jumps over the dog", **more} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings_of(short_run: dict[str, Any], **values: Any) -> TrainSettings:
    return TrainSettings(**{**short_run, "max_steps": 3, "streaming": "on", **values})


def recorded(short_run: dict[str, Any]) -> Any:
    return json.loads((short_run["output_dir"] / "run.json").read_text())


def test_when_data_is_streamed(
    short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    path = write(tmp_path / "a.jsonl", 40)
    auto = settings_of(short_run, data=path, streaming="auto")
    assert not is_streamed(auto, None)
    monkeypatch.setattr(run_data, "STREAMED_BYTES", 10)
    assert is_streamed(auto, None)
    assert not is_streamed(settings_of(short_run, data=path, streaming="off"), None)
    assert not is_streamed(settings_of(short_run, data=path, streaming="auto", max_steps=None), None)
    assert not is_streamed(auto, {"data_sha256": {path: "0" * 64}})  # resumed as it began
    said = list[str]()
    read_data(settings_of(short_run, data=path, streaming="auto", max_steps=None), None, said.append)
    assert len(said) == 1 and "--max-steps" in said[0]
    with pytest.raises(UsageError) as caught:
        read_data(settings_of(short_run, data=path, max_steps=None))
    assert caught.value.field == "max_steps"
    batches = make_batches(specified(auto, read_data(auto), PLAIN, tiny_tokenizer, 16))
    assert isinstance(batches.loader, StreamLoader) and batches.held_out is not None


def test_a_streamed_run_is_recorded(short_run: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 40, other=1)
    found = run(settings_of(short_run, data=path, init_lora_weights="eva", new_tokens=["<new>"]))
    assert found.ending == "finished" and found.adapter is not None
    assert any("first part" in note for note in found.notes)
    record = recorded(short_run)
    assert record["data_sha256"][path].startswith("partial:")
    assert any("'other' (40 rows)" in note for note in record["data"]["notes"])
    assert (record["data"]["shape"], record["data"]["columns"]) == ("text", {"text": "text"})
    training = json.loads((found.adapter / "lorakit.json").read_text())["training"]
    assert (training["shape"], training["columns"]) == ("text", {"text": "text"})


def test_an_invalid_row_stops_with_a_checkpoint_and_can_be_skipped_on_resume(
    short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "SAMPLE_BYTES", 400)
    monkeypatch.setattr(streaming, "_LEAST_BYTES", 400)
    monkeypatch.setattr(streaming, "BUFFER", 4)
    path = write(tmp_path / "a.jsonl", 12)
    with Path(path).open("a") as file:
        file.write('{"txt": 3}\n' + json.dumps({"text": "one more row with the fox"}) + "\n")
    settings = settings_of(short_run, data=path, eval_fraction=0, max_steps=6, save_steps=50)
    with pytest.raises(DataError) as caught:
        run(settings)
    assert caught.value.where == f"{path}:13"
    assert recorded(short_run)["status"] == "failed"
    saved = [one.name for one in short_run["output_dir"].glob("checkpoint-*")]
    assert saved and saved != ["checkpoint-0"]
    done = run(settings.model_copy(update={"resume": True, "on_bad_row": "skip"}))
    assert done.ending == "finished" and done.steps == 6


def test_streamed_data_that_changes_cannot_be_resumed(short_run: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 20)
    run(settings_of(short_run, data=path))
    said = Said()
    run(settings_of(short_run, data=path, resume=True, max_steps=4), progress=said)
    assert any("last MiB" in text for text in said.lines)
    write(tmp_path / "a.jsonl", 21)
    with pytest.raises(RunError, match="the data changed"):
        run(settings_of(short_run, data=path, resume=True, max_steps=5))


@pytest.mark.parametrize("mode", ["on", "off"])
def test_weights_repeat_sequences(short_run: dict[str, Any], tmp_path: Path, tiny_tokenizer: Any, mode: str) -> None:
    names = [write(tmp_path / "a.jsonl", 40, x=1), write(tmp_path / "b.jsonl", 20)]
    rows = [json.dumps({"text": f"hello world {number}"}) for number in range(20)]
    Path(names[1]).write_text("\n".join(rows))
    settings = settings_of(
        short_run, data=names, data_weights={names[0]: 0.5, names[1]: 2.25}, streaming=mode, eval_fraction=0.1
    )
    split = read_data(settings)
    batches = make_batches(specified(settings, split, PLAIN, tiny_tokenizer, 64))
    counts = {False: 0, True: 0}
    loader = batches.loader
    seen = list[tuple[int, ...]]()
    while not seen or not loader.epoch.is_integer():
        batch = next(loader)
        for ids in batch.input_ids.tolist():
            counts[tiny_tokenizer.decode(ids).startswith("hello")] += 1
            seen.append(tuple(ids))
    few = sum("hello" in getattr(record, "text", "") for record in split.train)
    many = len(split.train) - few
    if mode == "off":
        assert counts == {True: 2 * few + round(few / 4), False: round(many / 2)}
        assert isinstance(loader, Loader) and loader.batches_per_epoch == -(-sum(counts.values()) // 4)
    assert 2 * few <= counts[True] <= 3 * few and 0 < counts[False] < many
    again = make_batches(specified(settings, split, PLAIN, tiny_tokenizer, 64)).loader
    again.load_state({**loader.state(), "epoch": 0, "batch": 0})
    assert next(again).input_ids.tolist() == [list(ids) for ids in seen[:4]]
    assert batches.held_out is not None
    assert sum(len(batch.input_ids) for batch in batches.held_out()) == len(split.held_out)
    assert {content_key(one) for one in split.held_out}.isdisjoint(content_key(one) for one in split.train)


def test_weights_of_unknown_names(short_run: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", 4)
    flags = settings_of(short_run, data=path, data_weights=["a.jsonl=2", "b=c.jsonl=0.5"])
    assert flags.data_weights == {"a.jsonl": 2.0, "b=c.jsonl": 0.5}
    with pytest.raises(ConfigError) as caught:
        read_data(settings_of(short_run, data=path, data_weights={"b.jsonl": 2.0}))
    assert caught.value.field == "data_weights" and caught.value.allowed == (path,)
    for wrong in ({path: 0}, {path: float("inf")}, ["a.jsonl"], ["=2"], {path: True}):
        with pytest.raises(ConfigError) as caught:
            settings_of(short_run, data=path, data_weights=wrong)
        assert caught.value.field == "data_weights"
    twice = [path, str(tmp_path / "*.jsonl")]
    with pytest.raises(DataError, match="different weights"):
        read_data(settings_of(short_run, data=twice, data_weights={path: 2.0}))


@pytest.mark.parametrize("mode", ["on", "off"])
def test_no_group_is_in_both_parts(short_run: dict[str, Any], tmp_path: Path, mode: str) -> None:
    rows = [{"text": f"{user} says {number % 7}", "user": user} for number in range(60) for user in (number % 12,)]
    rows += [{"text": f"the same text of {user // 2}", "user": user} for user in range(12)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = read_data(settings_of(short_run, data=str(path), group="user", streaming=mode, eval_fraction=0.3))
    users: list[set[str]] = []
    for part in (split.train, split.held_out):
        texts = [getattr(record, "text", "") for record in part]
        users.append({text.split()[0] for text in texts if " says " in text})
    assert users[0] and users[1] and not users[0] & users[1]
    assert {content_key(one) for one in split.held_out}.isdisjoint(content_key(one) for one in split.train)
    if mode == "off":
        assert len(split.train) + len(split.held_out) == len(rows) and "group" in split.note
        other = read_data(
            settings_of(short_run, data=str(path), group="user", streaming=mode, eval_fraction=0.3, seed=1)
        )
        assert {content_key(one) for one in other.held_out} != {content_key(one) for one in split.held_out}


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_missing_group_column(short_run: dict[str, Any], tmp_path: Path, mode: str) -> None:
    path = write(tmp_path / "a.jsonl", 4, user=1)
    with pytest.raises(DataError, match="'text', 'user'"):
        read_data(settings_of(short_run, data=path, group="users", streaming=mode))
    with pytest.raises(DataError) as caught:
        read_data(settings_of(short_run, group="user", streaming=mode))
    assert caught.value.field == "group"
    with pytest.raises(ConfigError) as both:
        settings_of(short_run, data=path, eval_data=path, group="user")
    assert both.value.field == "group"


@pytest.mark.costly(cases=0)
def test_a_second_run_reads_its_tokens_from_the_cache(
    short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorakit.data import encode, token_cache
    from lorakit.tasks import causal_lm

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LEAST_BYTES", 1)
    path = write(tmp_path / "a.jsonl", 30)
    settings = settings_of(short_run, data=path, streaming="off", save_total_limit=5)
    run(settings.model_copy(update={"token_cache": False}))
    assert not (tmp_path / "cache" / "tokens").exists()
    plain = recorded(short_run)
    weights = (short_run["output_dir"] / "adapter" / "adapter_model.safetensors").read_bytes()
    for again in (False, True):
        if again:
            monkeypatch.setattr(causal_lm, "encode_text", None)
        run(settings.model_copy(update={"overwrite": True}))
        assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2
        assert recorded(short_run)["data"] == plain["data"]
        assert recorded(short_run)["evaluation_data"] == plain["evaluation_data"]
        assert (short_run["output_dir"] / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    monkeypatch.setattr(causal_lm, "encode_text", encode)
    monkeypatch.setenv("LORAKIT_CACHE", "~nobody-of-this-name/cache")
    assert run(settings.model_copy(update={"overwrite": True})).ending == "finished"
