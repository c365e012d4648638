"""Adapter files that are damaged, hostile or of another base: a typed error in a second, naming the file; nothing changed.

Each case damages the directory of a valid adapter and loads it into a model that already has an adapter.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.config import CONFIG_FILE, LoraConfig
from lorakit.core import attach, detach, inspect_adapter, load_adapter, save_adapter, use
from lorakit.core.files.adapter_folder import METADATA_KEY, SIDECAR_FILE, WEIGHTS_FILE
from lorakit.durable import sealed as resealed
from lorakit.durable import sha256_bytes, sha256_file
from lorakit.errors import (
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    LorakitError,
    NotYetSupported,
    ShapeMismatchError,
)
from lorakit.tensor_headers import MAX_TENSORS

from ...laws.snapshots import bits, same_bits, snapshot
from ...laws.zoo import BERT, GPT2, LINEARS, LLAMA, randomise, run, with_adapters

Damage = Callable[[Path], None]
A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B_KEY = A_KEY.replace("lora_A", "lora_B")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(with_adapters(LLAMA, "x", "y"), tmp_path / "adapter", "y")
    return tmp_path / "adapter"


def edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def do(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(resealed(values) if name == SIDECAR_FILE else values))

    return do


def edit_config(**fields: Any) -> Damage:
    return edit_json(CONFIG_FILE, lambda values: values.update(fields))


def edit_tensors(change: Callable[[dict[str, Tensor]], object], metadata: dict[str, str] | None = None) -> Damage:
    """Rewrite the weights as another program would: without our key in the header."""

    def do(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS_FILE, metadata or {"format": "pt"})

    return do


def write_weights(data: bytes) -> Damage:
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(data) and None


def change_bytes(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(change((folder / WEIGHTS_FILE).read_bytes())) and None


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> Damage:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write_weights((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def flip(at: float) -> Damage:
    def change(data: bytes) -> bytes:
        position = int(at * (len(data) - 1))
        return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]

    return change_bytes(change)


def replaced_by(make: Callable[[Path], object], name: str) -> Damage:
    def do(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return do


def sealed(damage: Damage) -> Damage:
    """The hashes in lorakit.json made right again: an attacker can do that."""

    def do(folder: Path) -> None:
        damage(folder)
        values = json.loads((folder / SIDECAR_FILE).read_text())
        values["weights"]["sha256"] = sha256_file(folder / WEIGHTS_FILE)
        values["config"]["sha256"] = sha256_file(folder / CONFIG_FILE)
        (folder / SIDECAR_FILE).write_text(json.dumps(resealed(values)))

    return do


def with_pickle(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"x": torch.zeros(1)}, folder / "adapter_model.bin")


def with_hostile_pickle(folder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(folder / "owned"),)

    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps(Evil()))


def set_value(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[3].fill_(value)


def reshaped(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.zeros(*shape)})


def without(*words: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if all(word in name for word in words)]


def as_dtype(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({A_KEY: tensors[A_KEY].to(dtype)})


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
REDOS = "(a+)+$"

FILES: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "directory not found"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), CONFIG_FILE),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), f"{WEIGHTS_FILE}: no such file"),
    "empty": (write_weights(b""), f"{WEIGHTS_FILE}.*empty or truncated"),
    "seven bytes": (write_weights(b"1234567"), "empty or truncated"),
    "truncated": (change_bytes(lambda d: d[:-10]), "truncated or damaged"),
    "truncated in the header": (change_bytes(lambda d: d[:100]), "not a safetensors file"),
    "longer": (change_bytes(lambda d: d + b"x"), "truncated or damaged"),
    "bit flip in the data": (flip(0.9), "damaged: its SHA-256"),
    "bit flip at the end": (flip(1.0), "damaged: its SHA-256"),
    "bit flip in the length": (flip(0.0), WEIGHTS_FILE),
    "pickle too": (with_pickle, r"pickle.*adapter_model\.bin.*never loaded"),
    "pickle inside": (with_hostile_pickle, "pickle"),
    "zip inside": (write_weights(b"PK\x03\x04" + b"0" * 500), "pickle"),
    "absurd header": (with_header({}, length=1 << 60), "claims a header of"),
    "header past the end": (with_header({}, length=5000), "claims a header of"),
    "large header": (with_header(b"{" + b" " * (9 << 20)), "claims a header of"),
    "header of no JSON": (with_header(b"{nope"), "header is not valid JSON"),
    "header of no UTF-8": (with_header(b'{"\xff\xfe": 1}'), "header is not valid JSON"),
    "header of a list": (with_header([1]), "header is not a JSON object"),
    "deep header": (with_header(b"[" * 100_000), "header is not valid JSON"),
    "duplicate names": (with_header(b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2), b"0000"), "duplicate key 'a'"),
    "a million tensors": (
        with_header(b"{" + b",".join(b'"%d":0' % i for i in range(700_000)) + b"}"), "tensors; at most"
    ),
    "overlap": (with_header({"a": ENTRY, "b": ENTRY}, b"0000"), "begins at byte 0, but should begin at byte 4"),
    "hole": (with_header({"a": {**ENTRY, "data_offsets": [4, 8]}}, b"00000000"), "begins at byte 4"),
    "past the end": (with_header({"a": {**ENTRY, "shape": [2], "data_offsets": [0, 8]}}, b"0000"), "truncated or damaged"),
    "span of another size": (with_header({"a": {**ENTRY, "shape": [5]}}, b"0000"), "'a'"),
    "huge shape": (with_header({"a": {**ENTRY, "shape": [1 << 62, 4]}}, b"0000"), "'a'"),
    "negative shape": (with_header({"a": {**ENTRY, "shape": [-1, -1]}}, b"0000"), "'a'"),
    "negative offsets": (with_header({"a": {**ENTRY, "data_offsets": [-4, 0]}}, b"0000"), "'a'"),
    "shape of words": (with_header({"a": {**ENTRY, "shape": ["1"]}}, b"0000"), "'a'"),
    "shape of truth": (with_header({"a": {**ENTRY, "shape": [True]}}, b"0000"), "'a'"),
    "no dtype": (with_header({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"0000"), "'a'"),
    "entry of a number": (with_header({"a": 3}, b"0000"), "'a'"),
    "metadata of numbers": (with_header({"__metadata__": {"x": 1}, "a": ENTRY}, b"0000"), "metadata"),
    "int8": (edit_tensors(as_dtype(torch.int8)), r"q_proj.lora_A.*I8"),
    "int64": (edit_tensors(as_dtype(torch.int64)), r"q_proj.lora_A.*I64"),
    "bool": (edit_tensors(as_dtype(torch.bool)), r"q_proj.lora_A.*BOOL"),
    "fp8": (edit_tensors(as_dtype(torch.float8_e4m3fn)), r"q_proj.lora_A.*F8_E4M3"),
    "NaN": (edit_tensors(set_value(A_KEY, float("nan"))), r"NaN or infinite values \(tensors: 1\).*q_proj\.lora_A"),
    "infinity": (edit_tensors(set_value(B_KEY, float("-inf"))), r"NaN or infinite.*q_proj\.lora_B"),
    "no A": (edit_tensors(without(A_KEY)), r"missing .*layers\.0\.self_attn\.q_proj\.lora_A\.weight"),
    "no B anywhere": (edit_tensors(without("lora_B")), r"missing .*layers\.0\.mlp\.down_proj\.lora_B\.weight.*layers\.1.*v_proj\.lora_B"),
    "no whole site": (edit_tensors(without("layers.1", "v_proj")), r"missing site .*layers\.1\.self_attn\.v_proj"),
    "nothing": (edit_tensors(lambda t: t.clear()), "missing site"),
    "extra tensor": (edit_tensors(lambda t: t.update({"extra.weight": torch.zeros(2)})), r"unexpected extra\.weight"),
    "extra site": (
        edit_tensors(lambda t: t.update({key.replace("q_", "k_"): t[key].clone() for key in (A_KEY, B_KEY)})),
        r"unexpected site .*k_proj",
    ),
    "no prefix": (edit_tensors(renamed("base_model.model.", "")), r"missing site .*unexpected .*names begin with 'base_model\.model\.'"),
    "twice the prefix": (edit_tensors(renamed("base_model.model.", "base_model.model.base_model.model.")), "unexpected site"),
    "magnitude without DoRA": (
        edit_tensors(lambda t: t.update({A_KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(16)})),
        r"unexpected .*lora_magnitude_vector",
    ),
    "DoRA without magnitude": (edit_config(use_dora=True), r"missing .*lora_magnitude_vector"),
    "shape of A": (edit_tensors(reshaped(A_KEY, 4, 17)), r"lora_A.* has shape \(4, 17\), expected \(4, 16\)"),
    "shape of B": (edit_tensors(reshaped(B_KEY, 17, 4)), r"lora_B.* has shape \(17, 4\), expected \(16, 4\)"),
    "A and B swapped": (
        edit_tensors(lambda t: t.update({A_KEY: t[B_KEY], B_KEY: t[A_KEY]})), r"has shape \(16, 4\), expected \(4, 16\)"
    ),
    "A of no dimension": (edit_tensors(lambda t: t.update({A_KEY: torch.tensor(1.0)})), r"has shape \(\)"),
    "A empty": (edit_tensors(reshaped(A_KEY, 0, 16)), r"has shape \(0, 16\)"),
    "r of the config": (edit_config(r=5), r"has shape \(4, 16\), expected \(5, 16\)"),
    "r of a pattern": (edit_config(rank_pattern={"q_proj": 2}), r"has shape \(4, 16\), expected \(2, 16\)"),
    "r absurd": (edit_config(r=10**8), "has shape"),
    "r zero": (edit_config(r=0), f"{CONFIG_FILE}: r is 0"),
    "r a word": (edit_config(r="8"), f"{CONFIG_FILE}: r is '8'"),
    "alpha NaN": (lambda f: (f / CONFIG_FILE).write_text('{"lora_alpha": NaN}') and None, f"{CONFIG_FILE}: .*NaN"),
    "alpha null": (edit_config(lora_alpha=None), f"{CONFIG_FILE}: lora_alpha is None"),
    "dropout": (edit_config(lora_dropout=1.5), r"lora_dropout is 1\.5"),
    "bias": (edit_config(bias="some"), "bias is 'some'"),
    "target of numbers": (edit_config(target_modules=[1]), "target_modules contains 1"),
    "no targets": (edit_config(target_modules=[]), "adapter"),
    "pattern of a list": (edit_config(rank_pattern=[1]), CONFIG_FILE),
    "pattern of words": (edit_config(alpha_pattern={"q_proj": "much"}), r"alpha_pattern\['q_proj'\] is 'much'"),
    "ReDoS in alpha_pattern": (edit_config(alpha_pattern={REDOS: 2}), f"{CONFIG_FILE}: alpha_pattern: .*regular expression"),
    "config of another method": (edit_config(peft_type="LOHA"), "peft_type is 'LOHA'; only LORA"),
    "config of a list": (lambda f: (f / CONFIG_FILE).write_text("[]") and None, f"{CONFIG_FILE}: contains a list"),
    "config empty": (lambda f: (f / CONFIG_FILE).write_text("") and None, f"{CONFIG_FILE}: not valid JSON"),
    "config twice": (lambda f: (f / CONFIG_FILE).write_text('{"r": 4, "r": 5}') and None, "duplicate key 'r'"),
    "config huge": (lambda f: (f / CONFIG_FILE).write_text(" " * (2 << 20)) and None, f"{CONFIG_FILE}: 2,097,152 bytes"),
    "config deep": (lambda f: (f / CONFIG_FILE).write_text("[" * 100_000) and None, f"{CONFIG_FILE}: not valid JSON"),
    "config of no UTF-8": (lambda f: (f / CONFIG_FILE).write_bytes(b'{"a": "\xff"}') and None, f"{CONFIG_FILE}: not valid JSON"),
    "config a FIFO": (replaced_by(os.mkfifo, CONFIG_FILE), f"{CONFIG_FILE}: not a regular file"),
    "weights a FIFO": (replaced_by(os.mkfifo, WEIGHTS_FILE), f"{WEIGHTS_FILE}: not a regular file"),
    "facts a FIFO": (replaced_by(os.mkfifo, SIDECAR_FILE), f"{SIDECAR_FILE}: not a regular file"),
    "weights a folder": (replaced_by(Path.mkdir, WEIGHTS_FILE), f"{WEIGHTS_FILE}: .*not a regular file"),
    "config a folder": (replaced_by(Path.mkdir, CONFIG_FILE), CONFIG_FILE),
    "weights a device": (replaced_by(lambda p: p.symlink_to("/dev/zero"), WEIGHTS_FILE), "not a regular file"),
    "weights a loop": (replaced_by(lambda p: p.symlink_to(p), WEIGHTS_FILE), WEIGHTS_FILE),
    "weights a dead link": (replaced_by(lambda p: p.symlink_to("gone"), WEIGHTS_FILE), "no such file"),
    "newer format": (edit_json(SIDECAR_FILE, lambda v: v.update(format_version=99)), f"{SIDECAR_FILE}: format 99 is newer"),
    "format a word": (edit_json(SIDECAR_FILE, lambda v: v.update(format_version="1")), f"{SIDECAR_FILE}: not a JSON object"),
    "facts no JSON": (lambda f: (f / SIDECAR_FILE).write_text("{") and None, f"{SIDECAR_FILE}: not valid JSON"),
    "facts deep": (lambda f: (f / SIDECAR_FILE).write_text("[" * 100_000) and None, f"{SIDECAR_FILE}: not valid JSON"),
    "base a word": (edit_json(SIDECAR_FILE, lambda v: v.update(base="x")), SIDECAR_FILE),
    "base without fields": (edit_json(SIDECAR_FILE, lambda v: v.update(base={"architecture": "x"})), SIDECAR_FILE),
    "samples of no hex": (
        edit_json(SIDECAR_FILE, lambda v: v["base"].update(samples=dict.fromkeys(v["base"]["samples"], "zzzz" * 16))),
        SIDECAR_FILE,
    ),
    "samples of a list": (edit_json(SIDECAR_FILE, lambda v: v["base"].update(samples=[1])), SIDECAR_FILE),
    "alpha of facts a word": (sealed(edit_json(SIDECAR_FILE, lambda v: next(iter(v["sites"].values())).update(lora_alpha="x"))), SIDECAR_FILE),
    "sites of numbers": (edit_json(SIDECAR_FILE, lambda v: v.update(sites=dict.fromkeys(v["sites"], 1))), SIDECAR_FILE),
}  # fmt: skip


def refused(model: nn.Module, folder: Path, error: type[LorakitError], text: str, **how: Any) -> LorakitError:
    """Check that a folder is rejected within a second, by text and where, and that the model does not change."""
    specimen = LLAMA
    before, answer = snapshot(model), bits(run(model, specimen.given()))
    started = time.perf_counter()
    with pytest.raises(error, match=f"(?s){text}") as caught:
        load_adapter(model, folder, "new", **how)
    assert time.perf_counter() - started < 1
    assert str(folder) in str(caught.value)
    assert str(caught.value.where).startswith(str(folder))
    assert len(str(caught.value)) < 1500
    assert snapshot(model) == before
    assert bits(run(model, specimen.given())) == answer
    return caught.value


@pytest.mark.parametrize("which", FILES)
def test_files(which: str, folder: Path) -> None:
    damage, text = FILES[which]
    damage(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a refusal may come after a warning about the same file
        refused(with_adapters(LLAMA, "a"), folder, AdapterFileError, text)
        refused(LLAMA.model(), folder, AdapterFileError, text)
    assert not (folder / "owned").exists()


@pytest.mark.parametrize("which", [w for w in FILES if w not in {"no folder"}])
def test_inspecting_says_the_same_or_finds_it(which: str, folder: Path) -> None:
    damage, _ = FILES[which]
    damage(folder)
    started = time.perf_counter()
    try:
        summary = inspect_adapter(folder)
    except AdapterFileError as error:
        assert str(folder) in str(error)
    else:
        assert summary.sites or summary.findings
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"lora_alpha": 1e9}, "scale at .* is 2.5e.08"),
        ({"lora_alpha": -8}, "scale at .* is -2"),
        ({"lora_alpha": 0}, "scale at .* is 0"),
        ({"alpha_pattern": {"down_proj": 1e9}}, "scale at .*down_proj"),
    ],
    ids=str,
)
def test_an_odd_scale(fields: dict[str, Any], text: str, folder: Path) -> None:
    edit_config(**fields)(folder)
    model = with_adapters(LLAMA, "a")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match=text):
            load_adapter(model, folder, "new")
        assert snapshot(model) == before
        load_adapter(model, folder, "new", allow=["odd_scale"])
    assert any("scale" in finding for finding in inspect_adapter(folder).findings)


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"x": 1}},
    ],
    ids=str,
)
def test_what_is_not_built_yet(fields: dict[str, Any], folder: Path) -> None:
    edit_config(**fields)(folder)
    refused(with_adapters(LLAMA, "a"), folder, NotYetSupported, next(iter(fields)))


def test_every_mismatch_is_named_at_once(folder: Path) -> None:
    edit_tensors(
        lambda t: [without(A_KEY)(t), reshaped(B_KEY.replace("q_", "v_"), 3, 3)(t), t.update(extra=torch.zeros(1))]
    )(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(LLAMA.model(), folder, AdapterFileError, "does not match this model")
        with pytest.raises(AdapterFileError) as caught:
            load_adapter(LLAMA.model(), folder)
    for text in ("missing " + A_KEY, "v_proj.lora_B.weight has shape (3, 3), expected (8, 4)", "unexpected extra"):
        assert text in str(caught.value)
    assert "missing site" not in str(caught.value)  # its B is there


OTHER_BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "other weights": (lambda: LLAMA.model(seed=1), "values in .* differ: same shapes, different weights"),
    "one weight": (lambda: _with_one_changed(), "values in .* differ"),
    "other depth": (lambda: _llama(num_hidden_layers=3), "names or shapes of the base's parameters differ"),
    "shallower": (lambda: _llama(num_hidden_layers=1), "names or shapes of the base's parameters differ"),
    "other width": (lambda: _llama(hidden_size=32), "names or shapes"),
    "other vocabulary": (lambda: _llama(vocab_size=51), "has 50 tokens, but this model has 51"),
    "other architecture": (GPT2.model, "a LlamaForCausalLM, but this model is a GPT2LMHeadModel"),
}


def _with_one_changed() -> nn.Module:
    model = LLAMA.model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.05)
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.05)
    return model


def _llama(**sizes: int) -> nn.Module:
    from transformers import LlamaForCausalLM

    config = LLAMA.model().config
    for name, value in sizes.items():
        setattr(config, name, value)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("which", OTHER_BASES)
def test_another_base(which: str, folder: Path) -> None:
    make, text = OTHER_BASES[which]
    model = make()
    before = snapshot(model)
    with pytest.raises(BaseMismatchError, match=f"{folder}: .*made for a different base: .*{text}") as caught:
        load_adapter(model, folder)
    assert (caught.value.where, caught.value.override) == (str(folder), "base_mismatch")
    assert "allow 'base_mismatch'" in str(caught.value) and "give --x" in caught.value.text("give --x")
    assert snapshot(model) == before
    if which in {"other weights", "one weight", "other vocabulary"}:
        with pytest.warns(UserWarning, match="loaded on another base as allowed"):
            assert load_adapter(model, folder, allow=["base_mismatch"]).base == "different"
    else:
        with pytest.raises(AdapterFileError, match="does not match this model"):
            load_adapter(model, folder, allow=["base_mismatch"])
        assert snapshot(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_at_another_precision_is_no_other_base(dtype: torch.dtype, folder: Path) -> None:
    report = load_adapter(LLAMA.model(dtype), folder)
    assert report.base == "same at other precision"


def test_a_base_that_cannot_be_verified_loads(folder: Path) -> None:
    (folder / SIDECAR_FILE).unlink()
    assert load_adapter(LLAMA.model(), folder).base == "unverifiable"


def sound(folder: Path, expected: Tensor, name: str = "new") -> list[str]:
    """Check that the adapter loads and computes the expected output; return the warnings."""
    model = with_adapters(LLAMA, "a")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = load_adapter(model, folder, name)
    assert [str(w.message) for w in caught] == list(report.warnings)
    with use(model, name):
        assert same_bits(run(model, LLAMA.given()), expected)
    return list(report.warnings)


@pytest.fixture
def expected(folder: Path) -> Tensor:
    model = LLAMA.model()
    load_adapter(model, folder)
    return run(model, LLAMA.given())


def moved_to_blobs(folder: Path) -> None:
    """Use the layout of a Hub cache: links to files elsewhere."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)


HARMLESS: dict[str, tuple[Damage, str | None]] = {
    "nothing": (lambda f: None, None),
    "links": (moved_to_blobs, None),
    "a README": (lambda f: (f / "README.md").write_text("x") and None, None),
    "edited config": (edit_config(lora_dropout=0.1), f"{CONFIG_FILE} was edited after the adapter was saved"),
    "unknown field": (edit_config(future_field=1), "future_field"),
    "resaved": (edit_tensors(lambda t: None), "rewritten by another program"),
    "no facts": (lambda f: (f / SIDECAR_FILE).unlink(), None),
    "ReDoS in target_modules": (edit_config(target_modules=REDOS), "was edited"),
    "ReDoS in exclude_modules": (edit_config(exclude_modules=REDOS), "was edited"),
    "module to import": (edit_config(auto_mapping={"parent_library": "antigravity", "base_model_class": "x"}), "was edited"),
    "base named elsewhere": (edit_config(base_model_name_or_path="/no/such/model"), "was edited"),
    "PEFT's own extras": (
        edit_tensors(lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.zeros(50, 16)})), "rewritten"
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", HARMLESS)
def test_what_does_an_adapter_no_harm(which: str, folder: Path, expected: Tensor) -> None:
    damage, text = HARMLESS[which]
    damage(folder)
    started = time.perf_counter()
    said = sound(folder, expected)
    assert time.perf_counter() - started < 2
    if text is None:
        assert said == []
    else:
        assert any(text in sentence for sentence in said), said
        assert str(folder) in said[0]


def test_a_literal_pattern_from_a_file_is_understood(folder: Path) -> None:
    for pattern in ("q_proj", r"model.layers.0.self_attn.q_proj", r"^model\.layers\.0\.self_attn\.q_proj"):
        edit_config(alpha_pattern={pattern: 12})(folder)
        model = LLAMA.model()
        with pytest.warns(UserWarning, match="was edited"):
            load_adapter(model, folder)
        assert model.model.layers[0].self_attn.q_proj.scaling["default"] == 3
        assert model.model.layers[0].self_attn.v_proj.scaling["default"] == 2


def test_a_regular_expression_of_our_own_comes_back(tmp_path: Path) -> None:
    """Its scales are in lorakit.json, so the pattern is not needed."""
    model = LLAMA.model()
    attach(model, LLAMA.config(alpha_pattern={r"layers\.(0|7)\..*_proj": 12}, target_modules=r".*\.(q|v)_proj"))
    randomise(model, "default", 3)
    save_adapter(model, tmp_path)
    fresh = LLAMA.model()
    load_adapter(fresh, tmp_path)
    assert same_bits(run(fresh, LLAMA.given()), run(model, LLAMA.given()))


def test_allowances_lift_one_refusal_each(folder: Path) -> None:
    edit_tensors(set_value(A_KEY, float("nan")))(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = ["key_mismatch", "base_mismatch", "odd_scale"]
        assert refused(LLAMA.model(), folder, AdapterFileError, "NaN", allow=words).override == "nonfinite"
        load_adapter(LLAMA.model(), folder, allow=["nonfinite"])
    edit_tensors(lambda t: [without(A_KEY)(t), t.update(extra=torch.zeros(1))])(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = refused(LLAMA.model(), folder, AdapterFileError, "unexpected extra", allow=["nonfinite"])
        model = LLAMA.model()
        load_adapter(model, folder, allow=["key_mismatch"])
    assert any("loaded in part as allowed" in str(w.message) for w in caught)
    assert error.override == "key_mismatch" and not isinstance(error, ShapeMismatchError)
    edit_tensors(reshaped(B_KEY.replace("q_", "v_"), 3, 3))(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = refused(LLAMA.model(), folder, ShapeMismatchError, r"\(3, 3\)", allow=["key_mismatch"])
    assert error.override is None  # no word allows that


def test_warnings_as_errors_refuse_before_anything_changes(folder: Path) -> None:
    edit_config(lora_dropout=0.1)(folder)
    model = with_adapters(LLAMA, "a")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="was edited"):
            load_adapter(model, folder, "new")
    assert snapshot(model) == before


def test_copies_and_biases_of_another_shape(tmp_path: Path) -> None:
    model = with_adapters(BERT, "a", modules_to_save=["classifier"], bias="all")
    save_adapter(model, tmp_path, "a")
    path = tmp_path / WEIGHTS_FILE
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, text in (
        ("classifier.weight", r"classifier\.weight has shape"),
        ("pooler.dense.bias", r"pooler\.dense\.bias has shape"),
    ):
        key = next(key for key in tensors if key.endswith(name))
        save_file({**tensors, key: torch.zeros(5, 5)}, path, {"format": "pt"})
        fresh = BERT.model()
        before = snapshot(fresh)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(AdapterFileError, match=text):
                load_adapter(fresh, tmp_path)
        assert snapshot(fresh) == before


def test_no_code_runs_and_no_file_is_written_while_hostile_files_are_loaded(tmp_path: Path) -> None:
    """An audit hook sees imports of new modules, processes, sockets and files opened for writing; run apart."""
    import subprocess
    import sys

    save_adapter(with_adapters(LINEARS, "x"), tmp_path / "good", "x")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    edit_config(auto_mapping={"parent_library": "antigravity"}, megatron_core="this.module")(tmp_path / "bad")
    shutil.copytree(tmp_path / "good", tmp_path / "evil")
    with_hostile_pickle(tmp_path / "evil")
    save_file({}, tmp_path / "warm.safetensors")
    program = f"""
import sys, warnings; warnings.simplefilter("ignore")
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from tests.laws.zoo import LINEARS
from lorakit.core import load_adapter
model = LINEARS.model(); load_adapter(model, {str(tmp_path / "good")!r}, "warm")
seen = []
def hook(event, args):
    if event in ("os.system", "subprocess.Popen", "socket.connect", "exec", "os.mkdir", "pickle.find_class", "import"):
        seen.append((event, str(args)[:80]))
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append((event, str(args)))
sys.addaudithook(hook)
for folder in ("bad", "evil"):
    try: load_adapter(model, {str(tmp_path)!r} + "/" + folder, folder)
    except ValueError as error: print(type(error).__name__)
print([event for event in seen if "lorakit" not in event[1]])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["AdapterFileError", "[]"], done.stdout
    assert not (tmp_path / "evil" / "owned").exists()


def test_the_limit_on_tensors_is_what_the_format_says() -> None:
    assert MAX_TENSORS == 100_000


def test_a_file_of_ours_keeps_its_key(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert METADATA_KEY in json.loads(data[8 : 8 + size])["__metadata__"]
    assert sha256_bytes(data) == json.loads((folder / SIDECAR_FILE).read_text())["weights"]["sha256"]


def test_a_site_that_is_not_loaded_keeps_its_bias(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    biases = [model[i].bias.detach().clone() for i in (0, 1)]
    attach(model, LoraConfig(r=2, target_modules=["0", "1"], bias="lora_only", init_lora_weights=False))
    with torch.no_grad():
        for layer in model:
            layer.base_layer.bias.add_(1)
    save_adapter(model, tmp_path, "default")
    detach(model)
    edit_tensors(without("base_model.model.1.lora_B.weight"))(tmp_path)
    with pytest.warns(UserWarning):
        load_adapter(model, tmp_path, allow=["key_mismatch"])
    assert torch.equal(model[0].base_layer.bias, biases[0] + 1)
    assert torch.equal(model[1].bias, biases[1])
    detach(model)
    assert all(torch.equal(model[i].bias, biases[i]) for i in (0, 1))
