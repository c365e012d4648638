"""Embeddings are those of `SentenceTransformer.encode`, for each pooling and each further module, alone and in batches."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import hub
from lorakit.data import Batch, Labeled, Records
from lorakit.errors import AdapterFileError, ConfigError, ModelError
from lorakit.tasks import TASKS, EncodeOptions, Target, TaskOnData, agree_on_padding, load_model_for, on_model

from ..conftest import CHAT_TEMPLATE

pytest.importorskip("sentence_transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*")

TEXTS = ["the cat", "Zoë sat on a mat and slept all day long", " here ", "and", "no, the cat sat. " * 9]
MODES = ["mean", "cls", "lasttoken", "max", "mean_sqrt_len_tokens", "weightedmean", ["mean", "cls"]]
SAMPLE = [("mean", "normalized"), ("cls", "three"), ("lasttoken", "dense"), ("max", "alone")]
OLD_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}


def saved(folder: Path, mode: Any = "mean", *modules: Any, **settings: Any) -> Path:
    """Save a model as sentence-transformers does, with modules after its transformer and pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    first = Transformer(str(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rest = [module() for module in modules]
    include = {"include_prompt": settings.pop("include_prompt", True)}
    pooling = Pooling(first.get_embedding_dimension(), mode, **include)
    limit = settings.pop("max_seq_length", None)
    model = SentenceTransformer(modules=[first, pooling, *rest], device="cpu", **settings)
    if limit is not None:
        model.max_seq_length = limit
    target = folder.with_name(f"{folder.name}-embeds")
    shutil.rmtree(target, ignore_errors=True)
    model.save(str(target))
    return target


def dense() -> Any:
    from sentence_transformers.sentence_transformer.modules import Dense

    return Dense(32, 8)


def normalize() -> Any:
    from sentence_transformers.sentence_transformer.modules import Normalize

    return Normalize()


def norm() -> Any:
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    return LayerNorm(32)


def bound(folder: Path) -> TaskOnData:
    return on_model(TaskOnData(TASKS["embedding"], Target("pairs")), hub.resolve(folder))


def embedded(folder: Path, texts: list[str], sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Return lorakit's embeddings in batches of each size, shape (texts, width)."""
    source, task = hub.resolve(folder), bound(folder)
    tokenizer = hub.load_tokenizer(source)
    pad = agree_on_padding(task, source, [tokenizer])
    model = load_model_for(task, source, tokenizer=tokenizer).model
    records = Records(Labeled((text,)) for text in texts)
    rows = task.task.encode(records, tokenizer, task.target, EncodeOptions(512, is_labeled=False)).sequences
    found = []
    for size in sizes:
        batches = [task.objective.collate(rows[at : at + size], pad, 0.0) for at in range(0, len(rows), size)]
        assert task.objective.forward is not None
        with torch.no_grad():
            found.append(torch.cat([task.objective.forward(model, batch, "cpu")[0] for batch in batches]))
    return found


def encoded(folder: Path, texts: list[str], size: int = 32) -> torch.Tensor:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu").encode(texts, batch_size=size, convert_to_tensor=True)


def assert_embeds_alike(folder: Path, texts: list[str] = TEXTS) -> None:
    expected = encoded(folder, texts)
    for found in embedded(folder, texts, (1, 2, len(texts))):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def decoder(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Callable[[str], Path]:
    def make(side: str) -> Path:
        folder = tmp_path / side
        tiny_llama.save_pretrained(folder)
        tiny_tokenizer.padding_side, tiny_tokenizer.chat_template = side, None
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make


def matrix() -> list[Any]:
    """Return each pooling with each list of further modules; a sample is in `make test`."""
    further = {"alone": (), "normalized": (normalize,), "dense": (dense,), "three": (norm, dense, normalize)}
    return [
        pytest.param(mode, modules, id=f"{mode}-{name}", marks=() if (mode, name) in SAMPLE else pytest.mark.slow)
        for mode in MODES
        for name, modules in further.items()
        if isinstance(mode, str) or dense not in modules  # its input has the size of one pooling
    ]


@pytest.mark.parametrize(("mode", "further"), matrix())
def test_each_pooling_with_further_modules(
    mode: Any, further: tuple[Any, ...], model_directory: Callable[..., Path]
) -> None:
    """Defect 3: the mean was used for CLS and last-token models, and dense layers were ignored."""
    folder = saved(model_directory("Bert", initializer_range=0.5), mode, *further)
    assert_embeds_alike(folder)


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode == "cls" else pytest.mark.slow) for mode in OLD_KEYS]
)
def test_the_keys_of_earlier_releases(mode: str, model_directory: Callable[..., Path]) -> None:
    folder = saved(model_directory("Bert", initializer_range=0.5), mode, normalize)
    config = {"word_embedding_dimension": 32, **{key: one == mode for one, key in OLD_KEYS.items()}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    types = json.loads((folder / "modules.json").read_text())
    for one in types:
        one["type"] = f"sentence_transformers.models.{one['type'].rpartition('.')[2]}"
    (folder / "modules.json").write_text(json.dumps(types))
    assert_embeds_alike(folder)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "mode",
    ["lasttoken", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("mean", "cls", "max", "weightedmean"))],
)
def test_a_decoder_with_padding_on_either_side(mode: str, side: str, decoder: Callable[[str], Path]) -> None:
    assert_embeds_alike(saved(decoder(side), mode, dense, normalize))


@pytest.mark.parametrize("include", [True, False])
def test_the_default_prompt_and_the_length(include: bool, model_directory: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {"prompts": {"search": "the query: ", "other": "no"}, "default_prompt_name": "search"}
    folder = saved(
        model_directory("Bert", initializer_range=0.5), "mean", include_prompt=include, max_seq_length=24, **settings
    )
    assert_embeds_alike(folder)
    recorded = bound(folder).target.embedding
    assert (recorded["prompt"], recorded["max_length"]) == ("the query: ", 24)


def test_a_shorter_width(model_directory: Callable[..., Path]) -> None:
    folder = saved(model_directory("Bert", initializer_range=0.5), "mean", truncate_dim=5)
    config = folder / "config_sentence_transformers.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"truncate_dim": 5}))
    assert_embeds_alike(folder)
    assert embedded(folder, TEXTS, (2,))[0].shape == (len(TEXTS), 5)


def test_models_that_sentence_transformers_did_not_save(
    model_directory: Callable[..., Path], decoder: Callable[[str], Path]
) -> None:
    """Their embeddings are not normalized; a causal language model's is that of the last token."""
    assert_embeds_alike(model_directory("Bert", initializer_range=0.5))
    assert_embeds_alike(decoder("left"))
    assert bound(decoder("right")).target.embedding["modules"][0]["pooling_mode"] == "lasttoken"  # type: ignore[index,call-overload]


@pytest.mark.parametrize("make", ["Bert", "decoder"])
def test_a_chat_template_without_modules_is_rejected(
    make: str, model_directory: Callable[..., Path], decoder: Callable[[str], Path]
) -> None:
    """SentenceTransformer renders texts as messages then, but not if older files of its own say nothing about them."""
    folder = model_directory("Bert", initializer_range=0.5) if make == "Bert" else decoder("right")
    assert_embeds_alike(folder)
    plain, older = encoded(folder, TEXTS), saved(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    messages = encoded(folder, TEXTS)
    with pytest.raises(ModelError) as caught:
        bound(folder)
    assert caught.value.what == "chat_template"
    assert (plain - messages).abs().max() > 1e-2
    (older / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _edit(older, "sentence_bert_config.json", lambda c: {"max_seq_length": 64})
    assert_embeds_alike(older)


def _edit(folder: Path, name: str, change: Callable[[Any], Any]) -> None:
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()) if path.is_file() else {})))


UNSUPPORTED: dict[str, Callable[[Path], None]] = {
    "own code": lambda folder: _edit(folder, "modules.json", lambda m: [m[0], {**m[1], "type": "custom.Pooling"}]),
    "another module": lambda folder: _edit(
        folder, "modules.json", lambda m: [m[0], {**m[1], "type": "sentence_transformers.models.BoW"}]
    ),
    "no pooling": lambda folder: _edit(folder, "modules.json", lambda m: m[:1]),
    "empty": lambda folder: _edit(folder, "modules.json", lambda m: []),
    "outside": lambda folder: _edit(folder, "modules.json", lambda m: [m[0], {**m[1], "path": "../1_Pooling"}]),
    "a directory of its own": lambda folder: _edit(
        folder, "modules.json", lambda m: [{**m[0], "path": "0_Bert"}, m[1]]
    ),
    "not JSON": lambda folder: (folder / "modules.json").write_text("{"),  # type: ignore[dict-item,return-value]
    "chat messages": lambda folder: _edit(
        folder,
        "sentence_bert_config.json",
        lambda c: (
            c
            | {
                "modality_config": {"message": {"method": "forward", "method_output_name": "last_hidden_state"}},
                "module_output_name": "token_embeddings",
            }
        ),
    ),
    "lower case": lambda folder: _edit(folder, "sentence_bert_config.json", lambda c: c | {"do_lower_case": True}),
    "another output": lambda folder: _edit(
        folder, "sentence_bert_config.json", lambda c: c | {"transformer_task": "fill-mask"}
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported_is_rejected(case: str, model_directory: Callable[..., Path]) -> None:
    folder = saved(model_directory("Bert"), "cls")
    UNSUPPORTED[case](folder)
    with pytest.raises(ModelError) as caught:
        bound(folder)
    assert str(folder) in str(caught.value.where)


def test_pickled_weights_are_not_loaded(model_directory: Callable[..., Path]) -> None:
    from safetensors.torch import load_file

    folder = saved(model_directory("Bert"), "cls", dense)
    weights = folder / "2_Dense" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    assert_embeds_alike(folder)
    weights.unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
        bound(folder)


def test_an_encoder_decoder_is_rejected(model_directory: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="an encoder and a decoder"):
        bound(model_directory("T5"))


def test_a_ranking_needs_two_texts() -> None:
    """Of one text, every ranking is perfect; of two, the metric is that of sentence-transformers."""

    def found(*ids: int, scale: float = 1.0) -> dict[str, Any]:
        make, count = TASKS["embedding"].objective(Target("pairs")).meter, len(ids)
        assert make is not None
        meter = make()
        second = torch.tensor(ids)[:, None]
        extra = {"input_ids_1": second, "attention_mask_1": torch.ones_like(second)}
        vectors = torch.eye(2)[[n % 2 for n in range(count)]] * scale
        meter.add(
            Batch(second, torch.ones_like(second), torch.tensor([]), 0.0, count, count, extra),
            torch.stack([vectors, vectors]),
        )
        return dict(meter.result())

    assert found(5, 6) == {"ndcg@10": 1.0}
    for nothing in (0.0, float("nan")):  # embeddings that tell nothing apart: the text wanted is the last
        assert found(5, 6, scale=nothing)["ndcg@10"] == pytest.approx(1 / math.log2(3))
    for ids in ((5,), (5, 5)):
        assert "at least 2 different" in str(found(*ids)["ndcg@10"])


def test_a_target_without_a_model_is_an_error() -> None:
    with pytest.raises(ConfigError):
        TASKS["embedding"].encode(Records([Labeled(("a", "b"))]), None, Target("pairs"), EncodeOptions(8))  # type: ignore[arg-type]


def test_an_adapter_keeps_the_embedding_that_it_was_trained_with(model_directory: Callable[..., Path]) -> None:
    plain = model_directory("Bert", initializer_range=0.5)
    folder = saved(plain, "cls", dense)
    target = Target.from_dict(json.loads(json.dumps(bound(folder).target.as_dict())))
    assert target is not None and target.embedding
    task, source = TaskOnData(TASKS["embedding"], target), hub.resolve(folder)
    assert on_model(task, source).target == target
    later = [{**one, "a_later_key": 1} for one in target.embedding["modules"]]  # type: ignore[union-attr]
    on_model(TaskOnData(TASKS["embedding"], Target("pairs", embedding={**target.embedding, "modules": later})), source)
    for other in (saved(plain, "mean", dense), saved(plain, "cls"), saved(plain, "cls", dense, normalize)):
        with pytest.raises(AdapterFileError) as caught:
            on_model(task, hub.resolve(other))
        assert caught.value.field == "embedding"


@pytest.mark.parametrize(
    ("old", "mode", "further", "is_same"),
    [
        ("mean", "mean", (normalize,), True),
        ("cls", "cls", (), True),
        ("mean", "cls", (), False),
        ("mean", "mean", (dense,), False),
    ],
)
def test_adapters_of_earlier_releases(
    old: str, mode: str, further: tuple[Any, ...], is_same: bool, model_directory: Callable[..., Path]
) -> None:
    from lorakit.config import LoraConfig
    from lorakit.tasks import task_of_adapter

    labels = {"kind": "score", "names": [], **({"pooling": old} if old != "mean" else {})}
    task = task_of_adapter(LoraConfig(task_type="FEATURE_EXTRACTION"), {"task": "embedding", "labels": labels})
    source = hub.resolve(saved(model_directory("Bert"), mode, *further))
    if is_same:
        assert on_model(task, source).target.kind == "score"
    else:
        with pytest.raises(AdapterFileError):
            on_model(task, source)
