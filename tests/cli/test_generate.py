"""lorakit.cli.generate: output streams, base and adapters side by side, and errors."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import core, hub
from lorakit.cli import main, prompts
from lorakit.cli.prompts import read_chats, read_tools
from lorakit.config import LoraConfig
from lorakit.errors import DataError
from lorakit.generate import generate
from lorakit.session import Answer
from lorakit.session.prompts import encode_prompts
from lorakit.session.tokenizers import use_template

Save = Callable[..., Path]


def asked(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    assert main(["generate", *map(str, words), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def refusal(capsys: pytest.CaptureFixture[str], code: int, *words: Any) -> str:
    assert main(["generate", *map(str, words)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def by_hand(directory: Path, text: str, adapter: Path | None = None, tokens: int = 6) -> str:
    """Return the answer to a chat prompt, computed with the library alone."""
    tokenizer, model = hub.load_tokenizer(directory), hub.load_model(directory)
    if adapter is not None:
        core.load_adapter(model, adapter)
    ids = encode_prompts([text], tokenizer, "chat", None)[0]
    made = list(generate(model, ids, max_new_tokens=tokens, eos_ids=(0,)))
    return str(tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def test_the_answer_alone_goes_to_stdout(tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(tiny_model_directory), "--prompt", "hello", "--max-new-tokens", "6"]
    assert main(words) == 0
    captured = capsys.readouterr()
    text = by_hand(tiny_model_directory, "hello")
    assert captured.out == text + ("" if text.endswith("\n") else "\n")
    assert captured.err == "[stopped at --max-new-tokens]\n"
    assert main([*words, "--verbose"]) == 0
    again = capsys.readouterr()
    assert again.out == captured.out
    assert again.err.startswith("[6 tokens, ")
    assert again.err.endswith(" tokens/s; stopped at --max-new-tokens]\n")


def test_base_and_adapters_answer_in_one_batch_as_they_do_alone(
    tiny_model_directory: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = save_adapter("one", 1), save_adapter("two", 2)
    common = ["--model", tiny_model_directory, "--prompt", "hello world", "what is?", "--max-new-tokens", 6]
    found = asked(capsys, *common, "--adapter", one, two)
    assert [row["prompt"] for row in found["results"]] == ["hello world", "what is?"]
    for row in found["results"]:
        expected = {"base": None, str(one): one, str(two): two}
        assert [answer["name"] for answer in row["answers"]] == list(expected)
        for answer in row["answers"]:
            assert answer["text"] == by_hand(tiny_model_directory, row["prompt"], expected[answer["name"]])
        assert len({answer["text"] for answer in row["answers"]}) == 3


def test_a_single_adapter_answers_alone_unless_the_base_is_asked_for(
    tiny_model_directory: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one")
    common = ["--model", tiny_model_directory, "--adapter", one, "--prompt", "hello", "--max-new-tokens", 6]
    alone = asked(capsys, *common)["results"][0]["answers"]
    assert [(a["name"], a["text"]) for a in alone] == [(str(one), by_hand(tiny_model_directory, "hello", one))]
    assert [a["name"] for a in asked(capsys, *common, "--base")["results"][0]["answers"]] == ["base", str(one)]


def test_penalties_reach_the_sampler(tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", tiny_model_directory, "--prompt", "hello", "--max-new-tokens", 12]
    plain, penalized = (asked(capsys, *common, *more) for more in ([], ["--repetition-penalty", 100]))
    assert plain["sampling"]["repetition_penalty"] == 1 and penalized["sampling"]["repetition_penalty"] == 100
    assert plain["results"][0]["answers"][0]["text"] != penalized["results"][0]["answers"][0]["text"]
    assert "min_p is 2.0; it must be from 0 to 1." in refusal(capsys, 2, *common, "--min-p", 2)


def test_stop_ends_an_answer(tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = by_hand(tiny_model_directory, "hello", tokens=12)
    stop = whole[6:8]
    words = ["--model", tiny_model_directory, "--prompt", "hello", "--max-new-tokens", 12, "--stop", "absent", stop]
    (answer,) = asked(capsys, *words)["results"][0]["answers"]
    assert (answer["text"], answer["ended"]) == (whole[: whole.index(stop)], "stop") and answer["tokens"] < 12
    assert main(["generate", *map(str, words), "--verbose"]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip("\n") == answer["text"].rstrip("\n") and "; ended by --stop]" in captured.err
    assert "--stop needs a text" in refusal(capsys, 2, *words, "--stop", "")


def test_several_answers_stand_one_below_the_other_in_a_pipe(
    tiny_model_directory: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one")
    words = ["--model", str(tiny_model_directory), "--adapter", str(one), "--base", "--prompt", "hello"]
    assert main(["generate", *words, "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("── base ─")
    assert f"\n\n── {one} ──" in captured.out
    assert f"[{one}: stopped at --max-new-tokens]" in captured.err


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("one two three four", "one two\nthree four"),
        ("one two\n\n  three", "one two\n\n  three"),
        ("averyveryverylongword x", "averyveryverylongword x"),
        ("日本語日本語日本語", "日本語日本語日本語"),
        ("한국어 문장은 길다", "한국어\n문장은\n길다"),
        ("trailing ", "trailing"),
    ],
)
def test_a_stream_is_broken_between_words(text: str, printed: str) -> None:
    for size in (1, 2, 5, 100):
        lines = prompts._Lines(10)
        pieces = [lines.add(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join([*pieces, lines.end()]) == printed


def test_columns_on_a_wide_terminal(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.generate import NewToken

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    rows = [Answer("base", tiny_tokenizer, [1]), Answer("mine", tiny_tokenizer, [1])]
    ids = tiny_tokenizer("hello")["input_ids"]
    stream = [NewToken(row, token, "length" if token == ids[-1] else None) for token in ids for row in (0, 1)]
    prompts.show(rows, stream)
    shown = screen.getvalue()
    assert any("base" in line and "mine" in line for line in shown.splitlines())
    assert any(line.count("hello") == 2 for line in shown.splitlines())


def test_a_models_terminal_commands_are_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.generate import NewToken

    class Tokenizer:
        def decode(self, token_ids: list[int], **options: Any) -> str:
            return "a\x1b[2Jb" * len(token_ids)

    screen = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("COLUMNS", "20")  # too narrow for columns side by side
    for labels in (["one"], ["one", "two"]):
        rows = [Answer(label, Tokenizer(), [1]) for label in labels]
        prompts.show(rows, [NewToken(row, 2, "length") for row in range(len(rows))])
    assert screen.getvalue().count("a␛[2Jb") == 3
    assert "\x1b[2J" not in screen.getvalue()


def test_draws_repeat_with_their_seed(tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", tiny_model_directory, "--prompt", "hello", "--max-new-tokens", 12, "--temperature", 2.0]
    texts = [asked(capsys, *common, "--seed", seed)["results"][0]["answers"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_prompts_come_from_files_and_from_a_pipe(
    tiny_model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_text("from a file\nof two lines\n", encoding="utf-8")
    common = ["--model", tiny_model_directory, "--max-new-tokens", 2]
    found = asked(capsys, *common, "--prompt-file", tmp_path / "p.txt")
    assert [row["prompt"] for row in found["results"]] == ["from a file\nof two lines"]
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert asked(capsys, *common)["results"][0]["prompt"] == "from a pipe"


def test_the_chat_template_is_used_where_there_is_one(
    tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", tiny_model_directory, "--prompt", "hello", "--max-new-tokens", 2]
    assert asked(capsys, *common)["chat"] is True
    assert asked(capsys, *common, "--no-chat")["chat"] is False
    tokenizer = hub.load_tokenizer(tiny_model_directory)
    (ids,) = encode_prompts(["hello"], tokenizer, "chat", "be brief")
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(encode_prompts(["hello"], tokenizer, "text", None)[0]) == "hello"


def test_an_adapters_own_tokenizer_is_used(
    tiny_model_directory: Path, save_adapter: Save, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one")
    tiny_tokenizer.chat_template = None
    tiny_tokenizer.save_pretrained(one)
    common = ["--model", tiny_model_directory, "--prompt", "hello", "--max-new-tokens", 2]
    assert asked(capsys, *common, "--adapter", one)["chat"] is False


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--prompt", ""], 2, "--prompt: the prompt is empty."),
        (["--prompt", "x", "--system", "s", "--no-chat"], 2, "--system needs the chat template, but --no-chat"),
        (["--prompt", "x", "--temperature", "-1"], 2, "temperature is -1.0; it must be 0 (greedy)"),
        (["--prompt", "x", "--top-p", "2"], 2, "top_p is 2.0; it must be above 0 and at most 1"),
        (["--prompt", "x", "--max-new-tokens", "0"], 2, "max_new_tokens is 0; it must be at least 1."),
        (
            ["--prompt", "x", "--dtype", "int8"],
            2,
            "dtype is 'int8'; it must be one of auto, bfloat16, float16, float32.",
        ),
        (["--prompt", "x", "--adapter", "nowhere"], 1, "nowhere: adapter directory not found; it must contain"),
        (
            ["--prompt-file", "nowhere.txt"],
            1,
            "nowhere.txt: the prompt file cannot be read (No such file or directory)",
        ),
        (["--prompt", "word " * 200], 2, "tokens, but the model supports at most 128"),
        (["--promt", "x"], 2, "Did you mean"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    tiny_model_directory: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert said in refusal(capsys, code, "--model", tiny_model_directory, *words)


def test_nothing_to_answer(
    tiny_model_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert "no prompt; pass --prompt" in refusal(capsys, 2, "--model", tiny_model_directory)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "standard input: the prompt is empty." in refusal(capsys, 2, "--model", tiny_model_directory)


def test_a_prompt_file_that_is_no_text(
    tiny_model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p").write_bytes(b"ab\xff")
    said = refusal(capsys, 1, "--model", tiny_model_directory, "--prompt-file", tmp_path / "p")
    assert "p: not UTF-8 (invalid start byte at byte 2)." in said


@pytest.mark.parametrize("flag", ["--prompt-file", "--messages", "--tools"])
def test_a_file_without_an_end_is_an_error(
    tiny_model_directory: Path, capsys: Any, monkeypatch: Any, flag: str
) -> None:
    monkeypatch.setattr(prompts, "MAX_PROMPT_BYTES", 4000)
    words = ["--model", tiny_model_directory, flag, "/dev/zero", *(["--prompt", "x"] if flag == "--tools" else [])]
    assert "/dev/zero: a prompt must not exceed 4.0 kB." in refusal(capsys, 1, *words)
    with Path("/dev/zero").open(encoding="utf-8") as endless:
        monkeypatch.setattr("sys.stdin", endless)
        assert "standard input: a prompt must not exceed" in refusal(capsys, 1, "--model", tiny_model_directory)


def test_an_answer_ends_where_turns_end_in_training(
    tiny_model_directory: Path, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Judged by transformers: told where to end, before the merge; by itself, from the merged model's files."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(encode_prompts(["hello"], tiny_tokenizer, "chat", None))
    end, model = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>"), hub.load_model(tiny_model_directory)
    model.config.tie_word_embeddings = False
    head = torch.nn.Linear(*model.lm_head.weight.T.shape, bias=False)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    model.lm_head = head
    usual = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    at = next(at for at in range(1, 8) if usual[at] not in usual[:at])
    rows = torch.tensor([end, usual[at]])
    with torch.no_grad():
        head.weight[rows] = head.weight[rows.flip(0)]  # the model writes the end of a turn there
    hub.save_model(model, base := tmp_path / "base", tiny_tokenizer)
    told = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=[0, end])[0, ids.shape[1] :].tolist()
    assert told == [*usual[:at], end]
    core.attach(model := hub.load_model(base), LoraConfig(r=2, target_modules="all-linear"), "made")
    for _, parameter in core.trainable_parameters(model, "made"):
        parameter.data += 1e-6  # an adapter that changes no weight is reported
    facts = {"base_name": "tiny", "training": {"prompt_format": "chat"}}
    core.save_adapter(model, tmp_path / "a", "made", facts=facts)
    words = ["--adapter", tmp_path / "a", "--prompt", "hello", "--max-new-tokens", 8]
    (answer,) = asked(capsys, "--model", base, *words)["results"][0]["answers"]
    assert (answer["tokens"], answer["ended"]) == (len(told), "eos")
    assert (
        main(["merge", "--model", str(base), "--adapter", str(tmp_path / "a"), "--output-dir", str(tmp_path / "m")])
        == 0
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert merged.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist() == told


def test_models_that_cannot_be_used(
    tiny_model_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "model directory not found" in refusal(capsys, 1, "--model", tmp_path / "no", "--prompt", "x")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tiny_model_directory / name).unlink()
    said = refusal(capsys, 1, "--model", tiny_model_directory, "--prompt", "x")
    assert "the model directory has no tokenizer file (such as tokenizer.json)" in said


def test_templates_that_are_missing_or_refuse(
    tiny_tokenizer: Any, tmp_path: Path, tiny_llama: Any, capsys: Any
) -> None:
    tiny_llama.save_pretrained(tmp_path / "m")
    tiny_tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    words = ["--model", tmp_path / "m", "--prompt", "x"]
    said = refusal(capsys, 2, *words)
    assert "The chat template rejects this prompt (no system role here); try --no-chat." in said
    tiny_tokenizer.chat_template = None
    shutil.rmtree(tmp_path / "m")
    tiny_llama.save_pretrained(tmp_path / "m")
    tiny_tokenizer.save_pretrained(tmp_path / "m")
    assert "--chat needs a chat template" in refusal(capsys, 2, *words, "--chat")
    assert "--system needs a chat template" in refusal(capsys, 2, *words, "--system", "s")


def test_adapters_that_cannot_be_used(
    tiny_model_directory: Path, save_adapter: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", tiny_model_directory, "--prompt", "x", "--max-new-tokens", 2, "--adapter"]
    one = save_adapter("one")
    assert f"--adapter lists {one}/ twice; pass it once." in refusal(capsys, 2, *common, one, f"{one}/")
    shutil.copytree(one, tmp_path / "run" / "adapter")
    assert main(["generate", *map(str, common), str(tmp_path / "run")]) == 0  # a run directory stands for its adapter
    capsys.readouterr()
    (one / "adapter_model.safetensors").rename(one / "adapter_model.bin")
    said = refusal(capsys, 1, *common, one)
    assert "pickle (adapter_model.bin)" in said and "never loaded" in said


@pytest.mark.filterwarnings("default")
def test_an_adapter_of_another_base_needs_a_word(
    tiny_model_directory: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    other = hub.load_model(tiny_model_directory)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    one = save_adapter("one", model=other)
    common = ["--model", tiny_model_directory, "--prompt", "x", "--max-new-tokens", 2, "--adapter", one]
    said = refusal(capsys, 1, *common)
    assert "made for a different base" in said
    assert "pass --allow-base-mismatch." in said
    assert main(["generate", *map(str, common), "--allow-base-mismatch"]) == 0
    assert f"warning: {one}: loaded on another base as allowed" in capsys.readouterr().err


def test_damaged_numbers_are_named(
    tiny_model_directory: Path, save_adapter: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save_adapter("one", spread=float("nan"))
    common = ["--model", tiny_model_directory, "--prompt", "x", "--adapter", one]
    assert "pass --allow-nonfinite." in refusal(capsys, 1, *common)


TIDE = {"type": "function", "function": {"name": "tide", "description": "Tells the tide.", "parameters": {}}}


def test_messages_and_tools_are_rendered_as_in_training(
    tiny_model_directory: Path, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ids are those of apply_chat_template; the layouts are those of training data."""
    use_template(tiny_tokenizer, "chatml", [])
    tiny_tokenizer.save_pretrained(tiny_model_directory)
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello world"},
        {"role": "user", "content": "what is two?"},
    ]
    shared = [{"from": "human", "value": "hello"}]
    files = [tmp_path / "a.json", tmp_path / "b.jsonl", tmp_path / "tools.json"]
    files[0].write_text(json.dumps(turns, indent=1))
    files[1].write_text(
        json.dumps({"messages": turns, "tools": [TIDE]}) + "\n\n" + json.dumps({"conversations": shared})
    )
    files[2].write_text(json.dumps([TIDE]))
    chats = read_chats(files[:2])
    assert [len(chat.tools) for chat in chats] == [0, 1, 0]
    tools = read_tools(files[2])
    found = encode_prompts([*chats, "hello"], tiny_tokenizer, "chat", None, tools)
    expected = [turns, turns, [{"role": "user", "content": "hello"}], [{"role": "user", "content": "hello"}]]
    for ids, messages in zip(found, expected, strict=True):
        whole = tiny_tokenizer.apply_chat_template(messages, tools=[TIDE], add_generation_prompt=True)
        assert ids == list(whole["input_ids"])
    config = tiny_model_directory / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 1024'))
    words = ["--model", tiny_model_directory, "--max-new-tokens", 2, "--messages", *files[:2], "--tools", files[2]]
    document = asked(capsys, *words)
    assert [result["prompt"] for result in document["results"]] == ["what is two?", "what is two?", "hello"]
    assert document["chat"] is True


@pytest.mark.parametrize(
    ("content", "where", "said"),
    [
        ("[", "m.json", "invalid JSON"),
        ('[{"role": "user"}]', "m.json", "content"),
        ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]', "m.json", "last message"),
        ('{"role": "user", "content": "a"}\n{', "m.jsonl:2", "invalid JSON"),
        ('{"tools": []}', "m.json", "messages"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [1]}', "m.json", "tools"),
        (
            '{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": 1}',
            "m.json",
            "chat_template_kwargs",
        ),
    ],
)
def test_bad_messages_are_named(tmp_path: Path, content: str, where: str, said: str) -> None:
    path = tmp_path / where.partition(":")[0]
    path.write_text(content)
    with pytest.raises(DataError, match=said) as found:
        read_chats([path])
    assert found.value.where == str(tmp_path / where)


def test_tools_that_the_template_omits_are_an_error(tiny_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not render the tools"):
        encode_prompts(["hello"], tiny_tokenizer, "chat", None, [TIDE])
    (tmp_path / "t.json").write_text("[]")
    with pytest.raises(DataError, match="no tools"):
        read_tools(tmp_path / "t.json")


def test_flags_that_contradict_messages(tiny_model_directory: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "m.json").write_text('[{"role": "user", "content": "a"}]')
    words = ["--model", tiny_model_directory, "--messages", tmp_path / "m.json"]
    assert "cannot be combined with --prompt;" in refusal(capsys, 2, *words, "--prompt", "x")
    assert "cannot be combined with --system;" in refusal(capsys, 2, *words, "--system", "x")
    assert "need the chat template" in refusal(capsys, 2, *words, "--no-chat")


def test_a_line_is_read_from_a_terminal(
    tiny_model_directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", "--model", str(tiny_model_directory), "--max-new-tokens", "6"]
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})("hello\nnot this\n")
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip("\n") == by_hand(tiny_model_directory, "hello").rstrip("\n")
    assert "press Enter" in captured.err
