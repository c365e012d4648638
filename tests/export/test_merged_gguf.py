"""Adapters merged into GGUF files: llama.cpp gives the log-probabilities of the model that peft merges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests import small_models
from tests.conftest import CHAT_TEMPLATE
from tests.export.bases import FAMILIES, ROPE, random
from tests.export.specimens import added_tokens, with_random_adapter
from tests.export.test_gguf import IDS, patterns
from tests.gguf_models import ggml_quantized, write_base
from tests.small_gguf import own_gguf_cache  # noqa: F401 - a fixture

from lorakit import core, hub
from lorakit.durable import sha256_file
from lorakit.errors import AdapterError, LorakitError, ModelError, UsageError
from lorakit.export.formats import FORMATS, export
from lorakit.export.modelfile import chatml_system
from lorakit.export.request import Exported, ExportRequest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # by peft
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),  # by peft
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

BOUND = 1e-3
"""Allowed difference of a log-probability, in nats."""

TIED: dict[str, Callable[[], Any]] = {
    "llama": lambda: small_models.llama(rope_parameters=ROPE, tie_word_embeddings=True),
    "qwen2": lambda: small_models.qwen2(rope_parameters=ROPE, tie_word_embeddings=True),
    "gemma3_text": FAMILIES["gemma3_text"],
    "gpt2": FAMILIES["gpt2"],
}
HEADS = {"gpt2": ("transformer.wte", "lm_head")}


def scores(model: Any) -> list[float]:
    """Return a model's log-probability of each token but the first."""
    with torch.no_grad():
        found = model(input_ids=torch.tensor([IDS])).logits[0].log_softmax(-1)
    return found[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()


def files(model: Any, folder: Path, **settings: Any) -> ExportRequest:
    """Write a base, the same as GGUF, and a random adapter of peft, and return the request to merge it."""
    model.save_pretrained(folder / "base")
    file = write_base(model, folder / "base.gguf")
    with_random_adapter(copy.deepcopy(model), folder / "adapter", 0.1, **settings)
    source = hub.resolve(folder / "base")
    return ExportRequest(core.common_form(folder / "adapter"), "notes", source, base_gguf=file, outtype="F32")


def merged(request: ExportRequest, output: Path) -> tuple[Exported, Path]:
    exported, folder = export("gguf --merged", request, output)
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", f"{exported.name}.gguf"]
    return exported, folder / f"{exported.name}.gguf"


def by_peft(model: Any, folder: Path) -> Any:
    """Return the model that peft merges."""
    import peft

    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder / "adapter").eval().merge_and_unload()


def difference(file: Path, expected: list[float]) -> float:
    """Return the largest difference of llama.cpp from log-probabilities."""
    pytest.importorskip("xllamacpp")
    from types import SimpleNamespace

    from lorakit.verify.llama_cpp import running
    from lorakit.verify.runtime import BASE
    from lorakit.verify.servers import LlamaServer

    needs: Any = SimpleNamespace(added_ids=frozenset(), end_ids=frozenset([60]))
    with running(file, None, 64) as client:
        models: Any = client.get("/v1/models")["data"]
        found = LlamaServer(client, models, needs, BASE).log_probabilities(IDS)
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


@pytest.mark.costly
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_computes_what_peft_merges(tmp_path: Path, family: str) -> None:
    model = random(family, 0.1)
    request = files(model, tmp_path, **patterns(family))
    expected = scores(by_peft(model, tmp_path))
    assert difference(request.base_gguf or tmp_path, expected) > 0.1
    exported, file = merged(request, tmp_path / "out")
    assert difference(file, expected) < BOUND
    assert exported.notes == ()


@pytest.mark.costly
@pytest.mark.parametrize("site", ["embedding", "head"])
@pytest.mark.parametrize("family", TIED)
def test_a_weight_that_two_modules_share(tmp_path: Path, family: str, site: str) -> None:
    torch.manual_seed(0)
    model = small_models.randomized(TIED[family](), 0.1)
    assert model.config.tie_word_embeddings
    pair = HEADS.get(family, ("model.embed_tokens", "lm_head"))
    adapted = pair[site == "head"]
    request = files(model, tmp_path, target_modules=[adapted.rpartition(".")[2]])
    ours = copy.deepcopy(model)
    core.load_adapter(ours, tmp_path / "adapter")
    expected = scores(ours)
    assert max(abs(a - b) for a, b in zip(expected, scores(model), strict=True)) > 0.05
    _, file = merged(request, tmp_path / "out")
    assert difference(file, expected) < BOUND


def test_gemma_2_has_no_head_of_its_own(tmp_path: Path) -> None:
    request = files(random("gemma2", 0.1), tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(AdapterError) as caught:
        merged(request, tmp_path / "out")
    assert caught.value.what == "model.embed_tokens" and not (tmp_path / "out").exists()


@pytest.mark.costly
@pytest.mark.parametrize("outtype", ["F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_types(tmp_path: Path, family: str, outtype: Any) -> None:
    model = random(family, 0.1)
    request = files(model, tmp_path)
    _, exact = merged(request, tmp_path / "exact")
    _, file = merged(replace(request, outtype=outtype), tmp_path / "out")
    found, wide = gguf.GGUFReader(file), {one.name: one for one in gguf.GGUFReader(exact).tensors}
    for tensor in found.tensors:
        values = wide.pop(tensor.name).data
        is_matrix = values.ndim > 1 and tensor.name != "position_embd.weight"
        form = (outtype if values.shape[-1] % 32 == 0 or outtype != "Q8_0" else "F16") if is_matrix else "F32"
        assert tensor.tensor_type.name == form, tensor.name
        assert np.array_equal(tensor.data, gguf.quants.quantize(values, tensor.tensor_type)), tensor.name
    assert not wide
    stored = {name: field.contents() for name, field in found.fields.items() if not name.startswith("GGUF.")}
    base = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "base.gguf").fields.items() if n[:5] != "GGUF."}
    number = gguf.LlamaFileType[f"MOSTLY_{outtype}"].value
    assert stored == base | {"general.file_type": number, "general.quantization_version": 2}
    assert 0 < difference(file, scores(by_peft(model, tmp_path))) < 1


@pytest.mark.parametrize("form", ["Q8_0", "Q4_0"])
def test_a_quantized_base(tmp_path: Path, form: str) -> None:
    model = random("llama", 0.1)
    request = files(model, tmp_path, target_modules=["q_proj"])
    quantized = requantized(tmp_path / "base.gguf", tmp_path / "small.gguf", form)
    _, file = merged(replace(request, base_gguf=quantized, outtype="Q8_0"), tmp_path / "out")
    before = {one.name: one for one in gguf.GGUFReader(quantized).tensors}
    for tensor in gguf.GGUFReader(file).tensors:
        if "attn_q" not in tensor.name and tensor.tensor_type == before[tensor.name].tensor_type:
            assert np.array_equal(tensor.data, before[tensor.name].data), tensor.name
    q = next(one for one in gguf.GGUFReader(file).tensors if one.name == "blk.0.attn_q.weight")
    factor = request.adapter.weights.factors["model.layers.0.self_attn.q_proj"]
    old = gguf.quants.dequantize(before[q.name].data, before[q.name].tensor_type)
    update = (factor.B @ factor.A).reshape(4, 2, 4, -1).transpose(1, 2).reshape(old.shape).numpy()
    assert np.array_equal(q.data, gguf.quants.quantize(old + update, gguf.GGMLQuantizationType.Q8_0))


def requantized(source: Path, target: Path, form: str, quantize: Any = gguf.quants.quantize) -> Path:
    """Write a GGUF file again with matrices of whole blocks in a type."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], *field.types[1:])
    for tensor in reader.tensors:
        is_whole = tensor.data.ndim > 1 and tensor.data.shape[-1] % 32 == 0
        kind = gguf.GGMLQuantizationType[form if is_whole else "F32"]
        writer.add_tensor(tensor.name, quantize(tensor.data, kind) if is_whole else tensor.data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


CHANGES = {
    **dict.fromkeys(("F32", "F16", "BF16"), 0.002),
    **dict.fromkeys(("Q8_0", "Q6_K", "Q5_K", "Q5_1"), 0.01),
    **dict.fromkeys(("Q4_K", "Q4_0", "IQ4_XS"), 0.02),
    "Q3_K": 0.03,
}
"""Storage format -> change of all weights, relative to theirs, that another fine-tuned version of the base may have."""


def fine_tuned(model: Any, change: float) -> Any:
    """Return a model whose matrices differ by random values, relative to their root mean square."""
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += change * parameter.square().mean().sqrt() * noise
    return tuned


@pytest.mark.parametrize("form", CHANGES)
def test_a_base_is_not_another_fine_tuned_version_of_it(tmp_path: Path, form: str) -> None:
    pytest.importorskip("xllamacpp")
    model = random("llama", 0.1, hidden_size=256, intermediate_size=256).bfloat16().float()
    request = files(model, tmp_path, target_modules=["q_proj"])
    right = requantized(tmp_path / "base.gguf", tmp_path / "right.gguf", form, stored_by_ggml)
    assert merged(replace(request, base_gguf=right), tmp_path / "out")[0].notes == ()
    other = write_base(fine_tuned(model, CHANGES[form]), tmp_path / "other.gguf")
    wrong = replace(request, base_gguf=requantized(other, tmp_path / "wrong.gguf", form, stored_by_ggml))
    with pytest.raises(ModelError) as caught:
        merged(wrong, tmp_path / "wrong")
    assert caught.value.field == "base_gguf" and not (tmp_path / "wrong").exists()
    (note,) = merged(replace(wrong, allow_mismatch=True), tmp_path / "allowed")[0].notes
    assert str(wrong.base_gguf) in note


def stored_by_ggml(values: Any, kind: gguf.GGMLQuantizationType) -> Any:
    return gguf.quants.quantize(values, kind) if kind.name in ("F32", "F16", "BF16") else ggml_quantized(values, kind)


def test_the_same_bytes_again(tmp_path: Path) -> None:
    request = files(random("llama", 0.1), tmp_path)
    one, first = merged(request, tmp_path / "one")
    other, second = merged(request, tmp_path / "other")
    assert one == other and sha256_file(first) == sha256_file(second)
    assert (first.parent / "Modelfile").read_bytes() == (second.parent / "Modelfile").read_bytes()


def test_the_type_is_in_the_name(tmp_path: Path) -> None:
    request = files(random("llama", 0.1), tmp_path)
    assert merged(request, tmp_path / "one")[0] != merged(replace(request, outtype="F16"), tmp_path / "two")[0]


def other_model(request: ExportRequest, folder: Path) -> Path:
    torch.manual_seed(5)
    return write_base(small_models.randomized(FAMILIES["llama"](), 0.1), folder / "other.gguf")


def one_weight_changed(request: ExportRequest, folder: Path) -> Path:
    model = hub.load_model(folder / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.005)
    return write_base(model, folder / "other.gguf")


def other_sizes(request: ExportRequest, folder: Path) -> Path:
    return write_base(small_models.llama(rope_parameters=ROPE, intermediate_size=64), folder / "other.gguf")


def fewer_heads(request: ExportRequest, folder: Path) -> Path:
    model = small_models.llama(rope_parameters=ROPE, num_attention_heads=8, num_key_value_heads=4)
    return write_base(model, folder / "other.gguf")


def other_architecture(request: ExportRequest, folder: Path) -> Path:
    return write_base(random("qwen2", 0.1), folder / "other.gguf")


def truncated(request: ExportRequest, folder: Path) -> Path:
    (folder / "part.gguf").write_bytes((folder / "base.gguf").read_bytes()[:-100])
    return folder / "part.gguf"


def split(request: ExportRequest, folder: Path) -> Path:
    content = (folder / "base.gguf").read_bytes()
    key = b"split.count"
    entry = len(key).to_bytes(8, "little") + key + (2).to_bytes(4, "little") + (3).to_bytes(2, "little")
    count = int.from_bytes(content[16:24], "little") + 1
    part = folder / "base-00001-of-00003.gguf"
    part.write_bytes(content[:16] + count.to_bytes(8, "little") + entry + content[24:] + bytes(64))
    return part


def an_adapter(request: ExportRequest, folder: Path) -> Path:
    return next(export("gguf", request, folder / "exported")[1].iterdir())


def a_directory(request: ExportRequest, folder: Path) -> Path:
    return folder / "base"


def missing(request: ExportRequest, folder: Path) -> Path:
    return folder / "missing.gguf"


BAD = (
    *(other_model, one_weight_changed, other_sizes, fewer_heads, other_architecture),
    *(truncated, split, an_adapter, a_directory, missing),
)


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_files_that_are_not_the_base(tmp_path: Path, make: Any) -> None:
    request = files(random("llama", 0.1), tmp_path)
    with pytest.raises(ModelError) as caught:
        merged(replace(request, base_gguf=make(request, tmp_path)), tmp_path / "out")
    assert isinstance(caught.value, LorakitError) and str(tmp_path) in str(caught.value.where)
    assert not (tmp_path / "out").exists()


def test_the_base_that_an_adapter_records(tmp_path: Path) -> None:
    from lorakit.config import LoraConfig

    one, other = random("llama", 0.1), small_models.randomized(FAMILIES["llama"](), 0.1)
    request = files(one, tmp_path)
    core.attach(one, LoraConfig(r=2, target_modules=["q_proj"]))
    core.save_adapter(one, tmp_path / "ours")
    common = core.common_form(tmp_path / "ours")
    merged(replace(request, adapter=common), tmp_path / "out")
    other.save_pretrained(tmp_path / "other")
    wrong = replace(request, adapter=common, base=hub.resolve(tmp_path / "other"))
    with pytest.raises(ModelError) as caught:  # although it is the GGUF file of the base that was passed
        merged(replace(wrong, base_gguf=write_base(other, tmp_path / "other.gguf")), tmp_path / "wrong")
    assert caught.value.field == "base_gguf"


def test_what_cannot_be_merged(tmp_path: Path) -> None:
    model = random("llama", 0.1)
    request = files(model, tmp_path)
    with pytest.raises(UsageError) as caught:
        merged(replace(request, base_gguf=None), tmp_path / "out")
    assert caught.value.field == "base_gguf"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(LorakitError):
        merged(request, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["file"]
    factors = {path: replace(one, B=one.B * 1e6) for path, one in request.adapter.weights.factors.items()}
    huge = replace(request.adapter, weights=replace(request.adapter.weights, factors=factors))
    with pytest.raises(AdapterError) as too_large:
        merged(replace(request, adapter=huge, outtype="F16"), tmp_path / "out")
    assert too_large.value.field == "outtype" and not (tmp_path / "out").exists()
    with_random_adapter(
        copy.deepcopy(model), tmp_path / "waits", 0.1, alora_invocation_tokens=[1], target_modules=["q_proj"]
    )
    with pytest.raises(AdapterError):
        merged(replace(request, adapter=core.common_form(tmp_path / "waits")), tmp_path / "out")


def test_a_base_without_known_values(tmp_path: Path) -> None:
    request = files(random("llama", 0.1), tmp_path)
    config = hub.resolve(tmp_path / "base" / "config.json")
    exported, _ = merged(replace(request, base=config), tmp_path / "out")
    assert len(exported.notes) == 1


def test_tokens_that_the_file_lacks(tmp_path: Path) -> None:
    request = files(random("llama", 0.1), tmp_path)
    added_tokens("t1", "<tool>")(tmp_path / "adapter")
    (note,) = merged(request, tmp_path / "out")[0].notes
    assert "lacks <tool> of" in note
    added_tokens("t1")(tmp_path / "adapter")
    assert merged(request, tmp_path / "again")[0].notes == ()


DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
TEMPLATES = {
    CHAT_TEMPLATE: "",
    DEFAULT + CHAT_TEMPLATE: "Be kind.",
    CHAT_TEMPLATE.replace("message['content']", "message['content']|trim"): None,
    CHAT_TEMPLATE.replace("im_end", "end"): None,
    "x" + CHAT_TEMPLATE: None,
    "{{ raise_exception('no') }}": None,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_that_are_chatml(template: str) -> None:
    assert chatml_system(template) == TEMPLATES[template]


def test_lorakit_s_own_chatml() -> None:
    from lorakit.session import tokenizers

    folder = Path(tokenizers.__file__).parent / "chat_templates"
    assert chatml_system((folder / "chatml.jinja").read_text()) == ""
    assert chatml_system((folder / "gemma.jinja").read_text()) is None


def test_the_modelfile(tmp_path: Path) -> None:
    request = files(random("llama", 0.1), tmp_path)
    _, file = merged(request, tmp_path / "plain")
    lines = (file.parent / "Modelfile").read_text().splitlines()
    assert lines[0] == f"FROM ./{file.name}"
    assert 'PARAMETER stop "t60"' in lines
    assert not [line for line in lines if line.startswith(("TEMPLATE", "ADAPTER", "SYSTEM"))]
    (tmp_path / "adapter" / "chat_template.jinja").write_text(DEFAULT + CHAT_TEMPLATE)
    _, file = merged(request, tmp_path / "chat")
    text = (file.parent / "Modelfile").read_text()
    body = "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    assert f'TEMPLATE """{body}"""\nSYSTEM """Be kind."""\nPARAMETER stop "<|im_end|>"\n' in text
    assert "\n# ADAPTER " in text
    stored = gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents()
    assert stored == DEFAULT + CHAT_TEMPLATE


def test_the_commands() -> None:
    commands = FORMATS["gguf --merged"].commands("notes@0123456789ab", "base", 4, "OUTPUT")
    assert commands["Ollama"] == "ollama create notes:0123456789ab -f OUTPUT/Modelfile"
    assert commands["llama.cpp"].startswith("llama-cli -m OUTPUT/notes@0123456789ab.gguf ")
    assert commands["llama-quantize"].endswith(" Q4_K_M")
