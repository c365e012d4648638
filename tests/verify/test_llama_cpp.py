"""Exported adapters in llama.cpp, in this process and behind its server, and wrong exports that `verify` finds there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.small_gguf import own_gguf_cache, write_gguf  # noqa: F401 - a fixture
from tests.verify.test_loaded import compared

from lorakit import hub, open_session
from lorakit.errors import ModelError, UsageError
from lorakit.export import formats, gguf
from lorakit.session import SessionOptions
from lorakit.verify.llama_cpp import running
from lorakit.verify.prompts import PROMPTS

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (lorakit[runtimes])")

FIELDS: dict[str, Any] = {"use_rslora": True, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 3}}
Factors = tuple[torch.Tensor, torch.Tensor]
PART = "\ufffd"
"""Part of a character; llama.cpp's server leaves out some of those that lorakit shows."""


@pytest.fixture
def base(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Path:
    """A base with weights so large that positions matter, and the same as a GGUF file next to it."""
    tiny_llama.resize_token_embeddings(len(tiny_tokenizer))  # llama.cpp wants as many rows as tokens
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in tiny_llama.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tiny_llama.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    write_gguf(tmp_path / "base.gguf", tiny_llama, tiny_tokenizer, "F32")
    return tmp_path / "base"


@pytest.fixture
def folder(base: Path, save_adapter: Callable[..., Path]) -> Path:
    return save_adapter("notes", model=hub.load_model(base), **FIELDS)


def in_llama_cpp(folder: Path, base: Path, **fields: Any) -> Any:
    (one,) = compared(folder, base, "gguf", **{"base_gguf": base.with_suffix(".gguf"), **fields}).values()
    return one


def test_an_exported_adapter(folder: Path, base: Path) -> None:
    one = in_llama_cpp(folder, base, prompts=20)
    assert one.problems == []
    assert (one.dtype, one.greedy_same, one.other_tokens) == ("float32", 20, ())
    assert 0 < one.difference < 1e-3 and one.base_difference is not None and one.base_difference < 1e-3
    assert min(one.distances.values()) > 0.1
    assert "xllamacpp" in one.versions


def test_other_dtypes_are_reported(folder: Path, base: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    file = write_gguf(base.parent / "f16.gguf", tiny_llama, tiny_tokenizer, "F16")
    one = in_llama_cpp(folder, base, base_gguf=file)
    assert (one.dtype, one.is_judged, one.problems) == ("F16", False, [])
    assert one.difference > 1e-3


def test_answers_of_lorakit_in_another_dtype_are_not_judged(folder: Path, base: Path) -> None:
    one = in_llama_cpp(folder, base, session=SessionOptions("bfloat16", "cpu"))
    assert (one.dtype, one.is_judged, one.problems) == ("float32, lorakit's bfloat16", False, [])
    assert one.difference > 1e-3


@pytest.mark.parametrize("outtype", ["F32", "F16"])
def test_a_merged_model(folder: Path, base: Path, outtype: Any) -> None:
    (one,) = compared(folder, base, "gguf-merged", base_gguf=base.with_suffix(".gguf"), outtype=outtype).values()
    assert one.problems == [] and one.other_tokens == () and one.base_difference is None
    assert (one.difference < 1e-3, one.is_judged) == ((True, True) if outtype == "F32" else (False, False))
    assert list(one.distances) == ["lorakit's base"]


def test_a_merged_model_of_a_rounded_base(folder: Path, base: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    file = write_gguf(base.parent / "f16.gguf", tiny_llama, tiny_tokenizer, "F16")
    (one,) = compared(folder, base, "gguf-merged", base_gguf=file).values()
    assert (one.dtype, one.is_judged, one.problems) == ("float32 from F16, F32", False, [])


def test_a_chat_template_of_lorakit(folder: Path, base: Path, tiny_tokenizer: Any) -> None:
    from lorakit.session.tokenizers import use_template

    use_template(tiny_tokenizer, "chatml", [])
    tiny_tokenizer.save_pretrained(folder)  # with marks of answers, which other programs do not know
    (one,) = compared(folder, base, "gguf-merged", base_gguf=base.with_suffix(".gguf")).values()
    assert one.problems == [] and one.other_tokens == ()


@contextlib.contextmanager
def served(folder: Path, base: Path) -> Iterator[tuple[str, str]]:
    """Export an adapter, serve it with llama.cpp, and yield the URL and the adapter's name there."""
    from lorakit.core import common_form
    from lorakit.export.request import ExportRequest

    request = ExportRequest(common_form(folder), "notes", hub.resolve(base))
    exported, output = formats.export("gguf", request, base.parent / "exported")
    with running(base.with_suffix(".gguf"), output / f"{exported.name}.gguf", 256) as client:
        yield client.url, exported.name


def test_a_server(folder: Path, base: Path) -> None:
    with served(folder, base) as (url, name):
        (one,) = compared(folder, base, url).values()
    assert one.problems == [] and one.greedy_same == 4
    assert name in one.title and set(one.distances) == {"lorakit's base", "base"}


def test_a_client_of_openai_gets_the_answers_that_verify_compares(folder: Path, base: Path) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed (lorakit[runtimes])")
    with served(folder, base) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        (one,) = compared(folder, base, url, prompts=6, new_tokens=8).values()
        assert one.problems == [] and one.greedy_same == 6
        asked = {scale: [chat(client, prompt, scale) for prompt in PROMPTS[:6]] for scale in (0.0, 1.0)}
    with open_session(str(base), {"notes": folder}, dtype="float32", device="cpu") as session:
        for name, scale in ((None, 0.0), ("notes", 1.0)):
            answers = session.generate_batch(PROMPTS[:6], [name] * 6, chat=True, max_new_tokens=8)
            assert asked[scale] == [answer.text.replace(PART, "") for answer in answers]
    assert asked[0.0] != asked[1.0]


def chat(client: Any, prompt: str, scale: float) -> str:
    """Return the greedy text with which a server answers a client, with a scale of its first adapter."""
    more = {"lora": [{"id": 0, "scale": scale}], "cache_prompt": False}
    reply = client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=8,
        extra_body=more,
    )
    return str(reply.choices[0].message.content).replace(PART, "")


def unpermuted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the order of the rows of q and k."""
    monkeypatch.setattr(gguf.GgufLayout, "rows", lambda layout, name, B: B)


def with_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep `lora_alpha`, by which llama.cpp scales again."""
    from gguf import GGUFWriter

    add = GGUFWriter.add_float32
    monkeypatch.setattr(GGUFWriter, "add_float32", lambda writer, key, _: add(writer, key, 8.0))


def changed(change: Callable[[str, Factors], Factors]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change A and B of each site before they are written."""
    entry = formats.FORMATS["gguf"]

    def wrong(request: Any, folder: Path) -> Any:
        weights = request.adapter.weights
        factors = {}
        for path, factor in weights.factors.items():
            A, B = change(path, (factor.A.clone(), factor.B.clone()))
            factors[path] = replace(factor, A=A, B=B)
        adapter = replace(request.adapter, weights=replace(weights, factors=factors))
        return entry.write(replace(request, adapter=adapter), folder)

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(formats, "FORMATS", {**formats.FORMATS, "gguf": replace(entry, write=wrong)})

    return patch


def unscaled(path: str, factors: Factors) -> Factors:
    return factors[0], factors[1] / 4  # alpha 8 and rank 4 with rsLoRA: 8 / √4


def unpadded(path: str, factors: Factors) -> Factors:
    if "k_proj" in path:  # the rest of rank 4 holds anything, instead of zeros
        factors[0][2:], factors[1][:, 2:] = 1.0, 1.0
    return factors


def transposed(path: str, factors: Factors) -> Factors:
    A, B = factors
    return A, B.T.reshape(B.shape) if "o_proj" in path else B


WRONG = {
    "no permutation": unpermuted,
    "scale not folded": changed(unscaled),
    "padding lost": changed(unpadded),
    "alpha kept": with_alpha,
    "transposed B": changed(transposed),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_exports(folder: Path, base: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    WRONG[fault](monkeypatch)
    one = in_llama_cpp(folder, base)
    assert one.difference > 10 * one.bound and one.problems
    assert one.base_difference is not None and one.base_difference < 1e-3


def test_a_base_of_other_weights(folder: Path, base: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    one = in_llama_cpp(folder, base, base_gguf=write_gguf(base.parent / "x.gguf", tiny_llama, tiny_tokenizer, "F32"))
    assert one.base_difference is not None and one.base_difference > one.bound and len(one.problems) >= 2


def test_a_base_with_other_tokens(folder: Path, base: Path, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    one = in_llama_cpp(folder, base, base_gguf=write_gguf(base.parent / "x.gguf", tiny_llama, tiny_tokenizer, "F32"))
    assert one.other_tokens == (0, 1, 2, 3) and len(one.problems) == 1


def test_files_that_are_not_the_base(folder: Path, base: Path) -> None:
    whole = base.with_suffix(".gguf")
    (base.parent / "part.gguf").write_bytes(whole.read_bytes()[:-100])
    for given in (base.parent / "part.gguf", base.parent / "missing.gguf", folder / "adapter_config.json"):
        with pytest.raises(ModelError):
            in_llama_cpp(folder, base, base_gguf=given)
    with pytest.raises(UsageError) as caught:
        in_llama_cpp(folder, base, base_gguf=None)
    assert caught.value.field == "base_gguf"


def test_an_adapter_as_the_base(folder: Path, base: Path) -> None:
    from lorakit.core import common_form
    from lorakit.export.request import ExportRequest

    _, output = formats.export(
        "gguf", ExportRequest(common_form(folder), "notes", hub.resolve(base)), base.parent / "exported"
    )
    with pytest.raises(ModelError):
        in_llama_cpp(folder, base, base_gguf=next(output.iterdir()))
