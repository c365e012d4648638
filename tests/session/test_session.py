"""lorakit.session: a session against transformers and PEFT on the same model, adapters, rows and threads."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import lorakit
from lorakit import core, hub
from lorakit.cli import main
from lorakit.errors import ConfigError, DataError, MergeError, UsageError
from lorakit.generate import Sampling
from lorakit.identity.identities import original_class
from lorakit.session import Session
from lorakit.session import session as session_module
from lorakit.session.base_matmul import unsupported
from lorakit.speed.few_rows import Linear
from lorakit.speed.patching import DECODES

from ..stored_hub import StoredHub

Save = Callable[..., Path]
PROMPT = "hello world"
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it


@pytest.fixture
def adapters(save_adapter: Save) -> dict[str, Path]:
    return {name: save_adapter(name, seed, spread=0.5) for seed, name in enumerate(("one", "two", "three"), start=1)}


@pytest.fixture
def session(tiny_model_directory: Path, adapters: dict[str, Path]) -> Session:
    return lorakit.open_session(str(tiny_model_directory), adapters)


def of_peft(base: Path, adapter: Path | None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return (model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter))).eval()


def continued(model: Any, tokenizer: Any, ids: list[int], tokens: int) -> str:
    inputs = torch.tensor([ids])
    found = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)


def test_texts_are_those_of_peft(session: Session, tiny_model_directory: Path, adapters: dict[str, Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_directory)
    ids = tokenizer(PROMPT)["input_ids"]
    texts = set()
    for name, folder in {**adapters, None: None}.items():
        answer = session.generate(PROMPT, adapter=name, chat=False, max_new_tokens=12)
        assert answer.text == continued(of_peft(tiny_model_directory, folder), tokenizer, ids, 12)
        texts.add(answer.text)
    assert len(texts) == 4  # the adapters act
    names = [None, "three", "one"]
    together = session.generate_batch([PROMPT] * 3, names, chat=False, max_new_tokens=12)
    assert [answer.text for answer in together] == [
        session.generate(PROMPT, adapter=name, chat=False, max_new_tokens=12).text for name in names
    ]


def test_chats_are_rendered_by_the_template(
    session: Session, tiny_model_directory: Path, adapters: dict[str, Path]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_directory)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    expected = continued(of_peft(tiny_model_directory, adapters["two"]), tokenizer, ids, 8)
    assert session.chat(messages, adapter="two", max_new_tokens=8).text == expected
    assert session.generate(PROMPT, system="be brief", adapter="two", max_new_tokens=8).text == expected
    with pytest.raises(DataError):
        session.chat([*messages, {"role": "assistant", "content": "hi"}], adapter="two")


def test_the_loss_is_that_of_peft(
    session: Session, tiny_model_directory: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"prompt": "say", "completion": f" hello {'world ' * n}"} for n in range(1, 6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_directory)
    for name, folder in {"one": adapters["one"], None: None}.items():
        model, total, count = of_peft(tiny_model_directory, folder), 0.0, 0
        for row in rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
            labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
            with torch.no_grad():
                mean = model(input_ids=torch.tensor([whole]), labels=labels).loss.item()
            total, count = total + mean * (len(whole) - len(prompt)), count + len(whole) - len(prompt)
        found = session.evaluate(path, adapter=name)
        assert found.tokens == count and found.loss == pytest.approx(total / count, rel=1e-5)


def test_the_commands_say_the_same(
    session: Session, tiny_model_directory: Path, adapters: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", tiny_model_directory, "--adapter", adapters["one"], adapters["two"], "--prompt", PROMPT]
    assert main(["generate", *map(str, flags), "--max-new-tokens", "6", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    ours = [session.generate(PROMPT, adapter=name, max_new_tokens=6).text for name in (None, "one", "two")]
    assert [answer["text"] for answer in result["answers"]] == ours


def test_a_merge_in_memory_is_that_of_peft(tiny_model_directory: Path, adapters: dict[str, Path]) -> None:
    model = of_peft(tiny_model_directory, adapters["one"]).merge_and_unload()
    ids = torch.arange(4, 20)[None]
    with lorakit.open_session(str(tiny_model_directory), {"one": adapters["one"]}) as session:
        text = session.generate(PROMPT, max_new_tokens=6).text
        session.merge()
        assert not session.adapters and not core.adapters(session.model) and session.merged == (str(adapters["one"]),)
        with torch.no_grad():
            torch.testing.assert_close(session.model(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        assert session.generate(PROMPT, max_new_tokens=6).text == text


def test_a_merge_that_rounds_is_refused_and_changes_nothing(
    tiny_model_directory: Path, adapters: dict[str, Path]
) -> None:
    with lorakit.open_session(str(tiny_model_directory), {"one": adapters["one"]}, dtype="bfloat16") as session:
        before = {name: value.clone() for name, value in session.model.state_dict().items()}
        with pytest.raises(MergeError):
            session.merge()
        after = session.model.state_dict()
        assert [*session.adapters] == ["one"] and all(torch.equal(value, after[name]) for name, value in before.items())


def test_adapters_come_and_go(session: Session, adapters: dict[str, Path]) -> None:
    text = session.generate(PROMPT, adapter="two", max_new_tokens=6).text
    session.unload_adapter("one")
    assert [*session.adapters] == ["two", "three"]
    assert session.generate(PROMPT, adapter="two", max_new_tokens=6).text == text
    session.load_adapter("again", adapters["two"])
    assert session.generate(PROMPT, adapter="again", max_new_tokens=6).text == text
    for name in ("one", "four"):
        with pytest.raises(UsageError) as caught:
            session.generate(PROMPT, adapter=name)
        assert caught.value.fields["what"] == name
        with pytest.raises(UsageError):
            session.unload_adapter(name)
    with pytest.raises(UsageError):  # which of the three?
        session.generate(PROMPT)


@pytest.mark.filterwarnings("ignore::UserWarning")  # rows were appended; the adapter is new
def test_a_base_that_has_grown_measures_only_the_adapter_with_its_tokens(
    tiny_model_directory: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    model = hub.load_model(tiny_model_directory)
    model.resize_token_embeddings(len(model.get_input_embeddings().weight) + 3)
    core.attach(
        model, lorakit.LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[512, 513, 514]), "made"
    )
    core.save_adapter(model, tmp_path / "grown", "made")
    (tmp_path / "rows.txt").write_text("hello world " * 20)
    alone = lorakit.open_session(str(tiny_model_directory), {"one": adapters["one"]}).evaluate(tmp_path / "rows.txt")
    with lorakit.open_session(str(tiny_model_directory), {"one": adapters["one"], "grown": tmp_path / "grown"}) as both:
        for name in ("one", None):
            with pytest.raises(UsageError):
                both.evaluate(tmp_path / "rows.txt", adapter=name)
        assert both.evaluate(tmp_path / "rows.txt", adapter="grown").tokens == alone.tokens


def test_a_failed_load_changes_nothing(session: Session, tmp_path: Path, save_adapter: Save) -> None:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    other = save_adapter("other", model=transformers.LlamaForCausalLM(config))
    text = session.generate(PROMPT, adapter="one", max_new_tokens=6).text
    for bad in (other, tmp_path / "nothing"):
        with pytest.raises(lorakit.LorakitError):
            session.load_adapter("bad", bad)
    assert [*session.adapters] == ["one", "two", "three"]
    assert session.generate(PROMPT, adapter="one", max_new_tokens=6).text == text


def test_threads_get_their_own_adapters(session: Session) -> None:
    alone = {name: session.generate(PROMPT, adapter=name, max_new_tokens=10).text for name in session.adapters}
    found: list[tuple[str, str]] = []

    def ask(name: str) -> None:
        found.extend((name, session.generate(PROMPT, adapter=name, max_new_tokens=10).text) for _ in range(3))

    threads = [threading.Thread(target=ask, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9 and all(text == alone[name] for name, text in found)


def test_sampling_repeats_with_its_seed(session: Session) -> None:
    first, again, other = (
        session.generate(PROMPT, adapter=None, max_new_tokens=10, sampling=Sampling(2.0, seed=seed)).text
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_stop_string_ends_one_answer_of_a_batch(session: Session) -> None:
    names = ["one", "two", None]
    whole = session.generate_batch([PROMPT] * 3, names, max_new_tokens=12)
    stop = next(
        text
        for text in (whole[0].text[at : at + 3] for at in range(2, 20))
        if all(text not in w.text for w in whole[1:])
    )
    found = session.generate_batch([PROMPT] * 3, names, max_new_tokens=12, stop=[stop])
    assert [answer.ended for answer in found] == ["stop", "length", "length"]
    assert found[0].text == whole[0].text[: whole[0].text.index(stop)]
    assert [answer.text for answer in found[1:]] == [answer.text for answer in whole[1:]]
    chat = session.chat([{"role": "user", "content": PROMPT}], adapter=None, max_new_tokens=12)
    stopped = session.chat(
        [{"role": "user", "content": PROMPT}], adapter=None, max_new_tokens=12, stop=[chat.text[3:5]]
    )
    assert stopped.text == chat.text[: chat.text.index(chat.text[3:5])] and stopped.tokens < chat.tokens == 12


def test_acceleration_can_be_turned_off(
    tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[object]()
    whole = session_module.accelerate
    monkeypatch.setattr(session_module, "accelerate", lambda model: calls.append(model) or whole(model))
    (tmp_path / "notes.txt").write_text("hello world hello world", encoding="utf-8")
    losses = [
        lorakit.open_session(str(tiny_model_directory), accelerated=is_accelerated)
        .evaluate(tmp_path / "notes.txt")
        .loss
        for is_accelerated in (False, True)
    ]
    assert len(calls) == 1
    assert losses[0] == pytest.approx(losses[1])


@pytest.mark.parametrize("accelerated", [True, False])
def test_all_linear_layers_multiply_few_rows_in_a_session(
    tiny_model_directory: Path, adapters: dict[str, Path], accelerated: bool
) -> None:
    with lorakit.open_session(str(tiny_model_directory), accelerated=accelerated) as session:
        session.load_adapter("one", adapters["one"])
        found = [type(each) for each in session.model.modules() if original_class(each) is nn.Linear]
    assert found and set(found) == {Linear if accelerated else nn.Linear}


@pytest.mark.parametrize("accelerated", [True, False])
def test_a_session_generates_with_fused_layers(tiny_model_directory: Path, accelerated: bool) -> None:
    with lorakit.open_session(str(tiny_model_directory), accelerated=accelerated) as session:
        fused = [module for module in session.model.modules() if DECODES in vars(module)]
        assert len(fused) == (session.model.config.num_hidden_layers if accelerated else 0)


def test_a_closed_session_says_so(session: Session) -> None:
    session.close()
    with pytest.raises(UsageError):
        session.generate(PROMPT, adapter=None)


def test_adapters_name_their_base(tiny_model_directory: Path, tmp_path: Path) -> None:
    model = hub.load_model(tiny_model_directory)
    config = lorakit.LoraConfig(
        r=2, target_modules="all-linear", base_model_name_or_path=str(tiny_model_directory), init_lora_weights=False
    )
    core.attach(model, config, "made")
    core.save_adapter(model, tmp_path / "named", "made")
    with lorakit.open_session(adapters={"named": tmp_path / "named"}) as session:
        assert session.spec.source.given == str(tiny_model_directory)
    with pytest.raises(UsageError):
        lorakit.open_session()


def test_the_models_own_head_predicts_as_in_transformers(tmp_path: Path, tiny_tokenizer: Any) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    names = {0: "ham", 1: "spam"}
    config = transformers.BertConfig(vocab_size=512, pad_token_id=0, id2label=names, **sizes)
    transformers.BertForSequenceClassification(config).eval().save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    texts = ["hello", "hello world hello world", "a"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    with lorakit.open_session(str(tmp_path / "bert")) as session:
        found = list(session.predict(texts=texts, batch_rows=2))
        with pytest.raises(UsageError):
            session.generate("hello")
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            scores = model(**tiny_tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert row["label"] == names[int(scores.argmax())]
        assert [row["scores"][name] for name in names.values()] == pytest.approx(scores.tolist(), abs=1e-5)


def _labeling(tmp_path: Path, tokenizer: Any) -> Session:
    """Return a session of a small BERT with a head of two classes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=512, pad_token_id=0, id2label={0: "ham", 1: "spam"}, **sizes)
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).eval().save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    return lorakit.open_session(str(tmp_path / "bert"))


def test_predictions_and_measurements_can_overlap(tmp_path: Path, tiny_tokenizer: Any) -> None:
    texts, rows = ["hello", "world", "a", "hello world"] * 3, tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "hello", "label": "ham"}) + "\n")
    with _labeling(tmp_path, tiny_tokenizer) as session:
        whole, loss = list(session.predict(texts=texts, batch_rows=2)), session.evaluate(rows).loss
        first, second = (session.predict(texts=texts, batch_rows=2) for _ in range(2))
        begun = [next(first)], [next(second)]
        assert session.evaluate(rows).loss == loss
        assert [*begun[0], *first] == whole  # ends before the other
        assert [*begun[1], *second] == whole
        assert not any("forward" in vars(module) for module in session.model.modules())  # all are restored

        found = list[object]()
        threads = [
            threading.Thread(target=lambda: found.append(list(session.predict(texts=texts, batch_rows=2))))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [whole] * 4


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda session: session.unload_adapter("one"), id="unloaded"),
        pytest.param(lambda session: session.merge("three"), id="merged"),
        pytest.param(lambda session: session.close(), id="closed"),
        pytest.param(
            lambda session: (
                files := session.adapters["two"],
                session.unload_adapter("one"),
                session.load_adapter("one", files),
            ),
            id="replaced",
        ),
    ],
)
def test_a_stream_does_not_continue_with_another_adapter(session: Session, change: Callable[[Session], object]) -> None:
    stream = session.stream([[5, 6, 7]], ["one"], max_new_tokens=8, sampling=Sampling())
    next(stream)
    change(session)
    with pytest.raises(UsageError):
        next(stream)


def test_a_stream_continues_while_others_come_and_go(session: Session) -> None:
    def stream() -> Any:
        return session.stream([[5, 6, 7]], ["one"], max_new_tokens=8, sampling=Sampling())

    whole, changed = list(stream()), stream()
    begun, files = [next(changed)], session.adapters["two"]
    session.unload_adapter("two")
    session.load_adapter("new", files)
    assert [*begun, *changed] == whole


def test_a_stream_names_loaded_adapters(tiny_model_directory: Path) -> None:
    with lorakit.open_session(str(tiny_model_directory)) as session, pytest.raises(UsageError):
        session.stream([[5]], ["one"], max_new_tokens=2, sampling=Sampling())


def test_a_merge_names_each_adapter_once(session: Session, adapters: dict[str, Path]) -> None:
    session.merge("one", "one")
    assert session.merged == (str(adapters["one"]),)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"base_matmul": "int4"}, ConfigError),
        ({"task": "regresion"}, UsageError),
        ({"device": "gpu"}, UsageError),
        ({"adapters": ["runs/notes"]}, UsageError),
        ({"dtpe": "float32"}, UsageError),
    ],
)
def test_wrong_options_are_named(tiny_model_directory: Path, fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        lorakit.open_session(str(tiny_model_directory), **fields)
    assert caught.value.fields["field"] in fields  # type: ignore[attr-defined]


def test_a_model_that_generates_does_not_predict(session: Session) -> None:
    with pytest.raises(UsageError):
        session.predict(texts=["hello"], adapter="one")


def test_a_batch_has_an_adapter_for_each_prompt(session: Session) -> None:
    with pytest.raises(UsageError):
        session.generate_batch(["a", "b"], ["one"])


@pytest.mark.filterwarnings("ignore::UserWarning")  # the adapter is new
@pytest.mark.parametrize("is_first", [False, True])
def test_an_adapter_with_other_classes_is_not_loaded_later(
    tmp_path: Path, tiny_tokenizer: Any, save_adapter: Save, is_first: bool
) -> None:
    def saved(name: str, names: list[str]) -> Path:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")
        config = lorakit.LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], task_type="SEQ_CLS")
        core.attach(model, config, "made")
        facts = {"training": {"labels": {"kind": "class", "names": names}}}
        core.save_adapter(model, tmp_path / name, "made", facts=facts)
        return tmp_path / name

    session = _labeling(tmp_path, tiny_tokenizer)
    fits, other = saved("fits", ["ham", "spam"]), saved("other", ["spam", "ham"])
    if is_first:
        session = lorakit.open_session(str(tmp_path / "bert"), {"first": fits})
    with session, pytest.raises(UsageError):
        session.load_adapter("other", other)
    with _labeling(tmp_path, tiny_tokenizer) as session:
        session.load_adapter("fits", fits)
        assert {*next(session.predict(texts=["hello"], adapter="fits"))["scores"]} == {"ham", "spam"}
        with pytest.raises(UsageError):  # trained for another task
            session.load_adapter("text", save_adapter("text", model=session.model, task_type="CAUSAL_LM"))


def test_rows_are_read_as_in_the_training_of_an_adapter_from_the_hub_that_is_loaded_later(
    tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows, model = tmp_path / "made", tmp_path / "rows.jsonl", hub.load_model(tiny_model_directory)
    core.attach(model, lorakit.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "made")
    training = {"shape": "text", "columns": {"text": "body"}, "max_length": 8}
    core.save_adapter(model, folder, "made", facts={"training": training})
    rows.write_text(json.dumps({"body": "hello world " * 9, "text": "hello"}) + "\n")
    stored = StoredHub(monkeypatch, tmp_path / "cache")
    stored.add("team/notes", folder)
    with lorakit.open_session(str(tiny_model_directory)) as session:
        session.load_adapter("later", "team/notes")
        later = session.evaluate(rows)
        session.unload_adapter("later")
        assert session.evaluate(rows).tokens < later.tokens  # reads the column text
    with lorakit.open_session(str(tiny_model_directory), {"first": "team/notes"}) as session:
        assert session.evaluate(rows) == later


@pytest.mark.skipif(bool(unsupported(torch.device("cpu"))), reason="this processor has no fast and exact int8 matmuls")
def test_int8_without_texts_asks_for_them(tiny_model_directory: Path) -> None:
    with pytest.raises(UsageError) as caught:
        lorakit.open_session(str(tiny_model_directory), base_matmul="int8")
    assert caught.value.fields["field"] == "calibration"
