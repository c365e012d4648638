"""aLoRA: the adapter is active from the last occurrence of its invocation tokens on, whatever part a forward computes."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import LoraConfig
from lorakit.core import (
    activate,
    adapters,
    attach,
    checkpoint_contexts,
    detach,
    disable,
    invocation_offsets,
    invoked,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    prompt_offset,
    route,
    save_adapter,
    use,
    waits_for_tokens,
)
from lorakit.core.variants.alora import last_invocation
from lorakit.errors import ConfigError, MergeError, RouteError

from ...laws.snapshots import same_bits
from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import EMBEDDING, GPT2, INVOCATION, LLAMA, Specimen, randomise, run

FP32 = torch.float32
WORD = "cache"  # what transformers calls the cache of keys and values
pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning"),
]
MODELS = pytest.mark.parametrize("specimen", [LLAMA, GPT2], ids=str)


@pytest.mark.parametrize("tokens", [(999_999,), (1, -1), ()])
def test_an_adapter_that_can_never_act_is_an_error(tokens: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        waiting(tokens=tokens)
    assert caught.value.field == "alora_invocation_tokens"
    save_adapter(waiting(), tmp_path, "a")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alora_invocation_tokens": list(tokens)}))
    (tmp_path / "lorakit.json").unlink()
    with pytest.raises(ConfigError):
        load_adapter(LLAMA.model(), tmp_path)


def waiting(specimen: Specimen = LLAMA, *names: str, tokens: tuple[int, ...] = INVOCATION, **fields: Any) -> nn.Module:
    """A model with aLoRA adapters of random numbers; the first is active."""
    model = specimen.model()
    for seed, name in enumerate(names or ("a",)):
        config = specimen.config(alora_invocation_tokens=list(tokens), task_type="CAUSAL_LM", **fields)
        attach(model, config, name)
        randomise(model, name, 70 + seed)
    return model


def text(*rows: list[int]) -> dict[str, Tensor]:
    """Prompts padded on the right with 0, and their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


PLAIN = [9, 8, 7, 11, 12, 13, 14]
ONCE = [9, 8, 3, 4, 12, 13, 14]
TWICE = [3, 4, 9, 8, 3, 4, 14]
FIRST = [3, 4, 9, 8, 12, 13, 14]


def changed(model: nn.Module, base: nn.Module, given: Any) -> list[list[bool]]:
    """Return a mask of the positions in each row that an adapter changes."""
    return (run(model, given) - run(base, given)).abs().amax(-1).gt(0).tolist()


@pytest.mark.parametrize(
    ("row", "offset"),
    [(PLAIN, None), (ONCE, 5), (TWICE, 3), (FIRST, 7), ([1, 2, 3, 3, 4], 2), ([4, 3], None), ([3], None), ([3, 4], 2)],
)
def test_where_the_last_invocation_begins(row: list[int], offset: int | None) -> None:
    assert invocation_offsets(torch.tensor(row), INVOCATION) == [offset]
    assert invocation_offsets(torch.tensor([row, row]), INVOCATION) == [offset, offset]


def test_an_occurrence_in_the_padding_is_none() -> None:
    """The end token is a usual invocation, and a usual padding."""
    ids = torch.tensor([[5, 2, 6, 2, 2, 2], [2, 2, 2, 5, 2, 6]])
    right, left = torch.tensor([[1, 1, 1, 0, 0, 0]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert invocation_offsets(ids[:1], [2], right) == [5]
    assert invocation_offsets(ids[:1], [2]) == [1]
    assert invocation_offsets(ids[1:], [2], left) == [2]
    assert last_invocation(ids[:1], [2, 2], right).tolist() == [0]


@MODELS
def test_it_acts_from_the_last_invocation_on(specimen: Specimen) -> None:
    """The formula of docs/math.md (90), position by position, in a batch with rows that do not invoke it."""
    given = text(PLAIN, ONCE, TWICE, FIRST)
    found = changed(waiting(specimen), specimen.model(), given)
    assert found == [[False] * 7, [False] * 2 + [True] * 5, [False] * 4 + [True] * 3, [True] * 7]


def test_its_output_at_a_site_is_the_formula() -> None:
    """Equation (90) at one site: y₀ + mask · s·B(A x)."""
    model = waiting()
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
    run(model, text(ONCE))
    handle.remove()
    factor = layer.factor("a")
    z = factor.scale * seen["x"] @ factor.A.T @ factor.B.T
    mask = torch.tensor([0, 0, 1, 1, 1, 1, 1])[None, :, None]
    assert_close(seen["y"], layer.base_layer(seen["x"]) + mask * z, FP32)


@MODELS
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_answer(specimen: Specimen, side: str) -> None:
    model, rows = waiting(specimen), [ONCE, [7, 3, 4, 5], [6, 5, 8]]
    alone = [run(model, {"input_ids": torch.tensor([row])})[0] for row in rows]
    longest = max(map(len, rows))
    for row, answer in zip(rows, alone, strict=True):
        pad = [INVOCATION[-1]] * (longest - len(row))
        ids = torch.tensor([pad + row if side == "left" else row + pad])
        one, none = torch.ones(1, len(row), dtype=torch.int64), torch.zeros(1, len(pad), dtype=torch.int64)
        mask = torch.cat([none, one] if side == "left" else [one, none], 1)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        found = run(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})[0]
        kept = found[-len(row) :] if side == "left" else found[: len(row)]
        assert_close(kept, answer, FP32)


def test_adapters_of_every_sort_in_one_batch() -> None:
    model = waiting(LLAMA, "a")
    for seed, (name, fields) in enumerate(
        {
            "b": {"alora_invocation_tokens": [12], "task_type": "CAUSAL_LM"},
            "plain": {},
            "dora": {"use_dora": True},
        }.items()
    ):
        attach(model, LLAMA.config(**fields), name)
        randomise(model, name, seed)
    rows = ["a", "b", None, "plain", "dora", "a"]
    given = text(*[ONCE] * 6)
    with route(model, rows):
        mixed = run(model, given)
    for index, name in enumerate(rows):
        with use(model, name) if name else disable(model):
            alone = run(model, text(ONCE))[0]
        assert_close(mixed[index], alone, FP32)
    with use(model, "a", "b", "plain"):
        together = run(model, text(ONCE))
    with use(model, "plain"):
        plain = run(model, text(ONCE))
    assert_close(together[:, :2], plain[:, :2], FP32)
    for start in (2, 4):
        assert_differs(together[:, start], plain[:, start], FP32)


def test_without_tokens_it_says_what_to_pass() -> None:
    model, given = waiting(), text(ONCE)
    embedded = {"inputs_embeds": model.get_input_embeddings()(given["input_ids"])}
    with pytest.raises(RouteError, match=r"was not called with input_ids. Pass input_ids, or .*invoked\(model"):
        run(model, embedded)
    wanted = run(model, given)
    with invoked(model, given["input_ids"]):
        assert_close(run(model, embedded), wanted, FP32)
    with invoked(model, offsets=[5]):
        assert_close(run(model, embedded), wanted, FP32)
        assert_close(run(model, given), wanted, FP32)
    with invoked(model, offsets=[None]):
        assert_close(run(model, given), run(LLAMA.model(), given), FP32)
    with disable(model):
        run(model, embedded)
    with pytest.raises(RouteError, match=r"prompts \(1\) differs from the number of offsets \(2\)"):
        invoked(model, given["input_ids"], offsets=[1, 2])
    with pytest.raises(RouteError, match="neither input_ids nor offsets"):
        invoked(model)


@MODELS
@pytest.mark.parametrize("cut", [2, 4, 5, 6])
def test_steps_with_a_cache_are_one_forward_without(specimen: Specimen, cut: int) -> None:
    """The first piece ends before an invocation or after it; what follows goes token by token from the sixth on."""
    model, ids = waiting(specimen), text(ONCE, PLAIN, [3, 4, 9, 8, 12, 3, 4] if cut == 5 else FIRST)["input_ids"]
    parts, cache, begin = [], None, 0
    with torch.no_grad():
        for end in dict.fromkeys((cut, *((7,) if cut == 5 else (6, 7)))):
            piece = model(input_ids=ids[:, begin:end], use_cache=True, **({} if cache is None else {WORD: cache}))
            parts.append(piece.logits)
            cache, begin = piece[WORD], end
    wanted = run(model, {"input_ids": ids})
    found = torch.cat(parts, 1)
    assert_close(found[:2], wanted[:2], FP32)
    if cut != 5:
        assert_close(found, wanted, FP32)
    else:  # the invocation in the second piece is the last; what the first adapted stays adapted
        assert_differs(found[2, :5], wanted[2, :5], FP32)


@MODELS
def test_in_a_block_any_cut_of_the_prompt_will_do(specimen: Specimen) -> None:
    model, given = waiting(specimen), text(ONCE, PLAIN, TWICE)
    ids, whole = given["input_ids"], run(model, given)
    for cut in range(1, 7):
        with torch.no_grad(), invoked(model, ids):
            first = model(input_ids=ids[:, :cut], use_cache=True)
            rest = model(input_ids=ids[:, cut:], **{WORD: first[WORD]}, use_cache=True)
        assert_close(torch.cat([first.logits, rest.logits], 1), whole, FP32)


def test_a_cache_that_the_base_filled_is_used_again() -> None:
    """The prompt before the invocation is computed once, for the base and every adapter: the purpose of aLoRA."""
    model, prompt, rest = waiting(LLAMA, "a", "b"), [9, 8, 7, 6], [3, 4, 12, 13]
    with torch.no_grad(), disable(model):
        cache = model(input_ids=torch.tensor([prompt]), use_cache=True)[WORD]
    for name in "ab":
        with torch.no_grad(), use(model, name):
            ours = copy.deepcopy(cache)
            found = model(input_ids=torch.tensor([rest]), **{WORD: ours}, use_cache=True).logits
            step = model(input_ids=torch.tensor([[15]]), **{WORD: ours}, use_cache=True).logits
            whole = run(model, {"input_ids": torch.tensor([[*prompt, *rest, 15]])})
        assert_close(torch.cat([found, step], 1), whole[:, 4:], FP32)
    ours.crop(-4)  # the second half of the invocation is gone, so it holds no longer
    twin, last = copy.deepcopy(ours), torch.tensor([[15]])
    with torch.no_grad(), use(model, "b"):
        found = model(input_ids=last, **{WORD: ours}, use_cache=True).logits
    with torch.no_grad(), disable(model):
        assert_close(found, model(input_ids=last, **{WORD: twin}, use_cache=True).logits, FP32)


@MODELS
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_of_transformers_keeps_the_prompts_starts(specimen: Specimen, beams: int) -> None:
    """With and without a cache, with and without beams; tokens in the answer do not invoke the adapter again."""
    model, ids, held = waiting(specimen), torch.tensor([ONCE, PLAIN, TWICE]), context()
    words = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    words |= {"eos_token_id": 49, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(input_ids=ids, **words)
        with invoked(model, ids):
            assert model.generate(input_ids=ids, use_cache=False, **words).tolist() == found.tolist()
        base = specimen.model().generate(input_ids=ids, **words)
    assert found[1].tolist() == base[1].tolist()
    assert found[0].tolist() != base[0].tolist()
    assert context() == held


def test_a_failed_forward_leaves_nothing() -> None:
    model, given, held = waiting(), text(ONCE), context()
    wanted = run(model, given)
    with pytest.raises((IndexError, RuntimeError)):
        run(model, {"input_ids": torch.tensor([[3, 4, 99]])})
    assert context() == held
    handle = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, text(TWICE))
    handle.remove()
    assert same_bits(run(model, given), wanted)
    assert context() == held


def context() -> dict[str, object]:
    """The context variables of lorakit that hold something, by name."""
    held = {variable.name: value for variable, value in contextvars.copy_context().items() if value}
    return {name: value for name, value in held.items() if name.startswith("lorakit")}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_hooks_come_with_the_first_and_go_with_the_last() -> None:
    model = waiting(LLAMA, "a", "b")
    attach(model, LLAMA.config(), "plain")
    tables = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
    assert [len(getattr(model, table)) for table in tables] == [1, 1, 1, 1]
    detach(model, "a")
    assert len(model._forward_hooks) == 1
    detach(model, "b")
    assert [len(getattr(model, table)) for table in tables] == [0, 0, 0, 0]
    run(model, text(ONCE))
    model = waiting(LLAMA, "a")
    attach(model, LLAMA.config(), "plain")
    merge_and_unload(model, "plain")
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_it_cannot_be_merged() -> None:
    model = waiting()
    for call in (merge, merged_state_dict, merge_and_unload):
        with pytest.raises(MergeError, match="is aLoRA, which cannot be merged"):
            call(model, "a")
    run(model, text(ONCE))


def test_what_it_cannot_be_combined_with() -> None:
    words = {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}
    with pytest.raises(ConfigError, match=r"embed: Embedding does not support aLoRA.*alora_invocation_tokens to None"):
        attach(EMBEDDING.model(), EMBEDDING.config(**words))
    with pytest.raises(ConfigError, match=r"use_dora and alora_invocation_tokens at .*mutually exclusive"):
        attach(LLAMA.model(), LLAMA.config(use_dora=True, **words))
    with pytest.warns(UserWarning, match="only supported for CAUSAL_LM"):
        LoraConfig(alora_invocation_tokens=[1])


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant", "contexts"])
def test_a_checkpoint_runs_again_with_its_forwards_starts(mode: str) -> None:
    """Law 13, over several steps whose texts differ."""

    def gradients(model: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
        model(**given, labels=given["input_ids"]).loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    model, plain = waiting().train(), waiting().train()
    words: dict[str, Any] = {"use_reentrant": mode == "reentrant"}
    if mode == "contexts":
        words["context_fn"] = checkpoint_contexts(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=words)
    if mode == "reentrant":
        model.enable_input_require_grads()
    steps = [text(ONCE, TWICE), text(PLAIN, FIRST), text(TWICE)]
    found = [gradients(model, given) for given in steps]
    for given, mine in zip(steps, found, strict=True):
        wanted = gradients(plain, given)
        assert wanted.keys() == mine.keys()
        for name, gradient in wanted.items():
            assert_close(mine[name], gradient, FP32)
    assert found[0]["model.layers.0.self_attn.q_proj.lora_A.a.weight"].abs().max() > 0


def test_two_forwards_then_their_backwards() -> None:
    """Known with contexts; without them it raises where the two differ, and goes on where they agree."""
    model = waiting().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    one, two = text(ONCE), text(TWICE)
    losses = [model(**given, labels=given["input_ids"]).loss for given in (one, one)]
    for loss in losses:
        loss.backward()
    del losses, loss
    losses = [model(**given, labels=given["input_ids"]).loss for given in (one, two)]
    with pytest.raises(
        RouteError, match=r"positions of a in that pass cannot be determined \(candidates: 2\).*checkpoint_contexts"
    ):
        losses[0].backward()
    del losses
    contexts = {"use_reentrant": False, "context_fn": checkpoint_contexts(model)}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=contexts)
    model.zero_grad()
    losses = [model(**given, labels=given["input_ids"]).loss for given in (one, two)]
    for loss in losses:
        loss.backward()
    plain = waiting().train()
    for given in (one, two):
        plain(**given, labels=given["input_ids"]).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert_close(grads[name], parameter.grad, FP32)


def test_a_batch_that_does_not_invoke_it_has_zero_gradients() -> None:
    model, given = waiting().train(), text(PLAIN)
    model(**given, labels=given["input_ids"]).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and not p.grad.any() for p in trained)


def test_packed_rows_are_refused_in_training() -> None:
    model = waiting().train()
    packed = {"input_ids": torch.tensor([ONCE + TWICE]), "position_ids": torch.tensor([[*range(7), *range(7)]])}
    with pytest.raises(RouteError, match=r"rows of this batch contain several texts.*without packing"):
        model(**packed)
    run(model.eval(), packed)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, given = waiting(), text(ONCE, PLAIN)
    wanted = run(model, given)
    save_adapter(model, tmp_path, "a")
    fresh = LLAMA.model()
    load_adapter(fresh, tmp_path, "b")
    assert same_bits(run(fresh, given), wanted)
    twin = copy.deepcopy(fresh)
    activate(fresh)
    assert same_bits(run(twin, given), wanted)
    assert same_bits(run(pickle.loads(pickle.dumps(twin)), given), wanted)  # our own bytes


def test_threads_do_not_meet() -> None:
    model = waiting(LLAMA, "a", "b")
    texts = [text(ONCE), text(TWICE), text(PLAIN), text(FIRST)]
    wanted = [run(model, given) for given in texts]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.allclose(run(model, texts[number]), wanted[number], atol=1e-5):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_site_whose_positions_are_not_known_says_so() -> None:
    class Choosing(nn.Module):
        """A model whose inner layer sees some tokens of the batch in an order of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(20, 4), nn.Linear(4, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids).flatten(0, 1)
            return self.inner(x[: x.shape[0] - int(self.training)])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Choosing().eval()
    ids = torch.tensor([[5, 6, 1, 7], [1, 5, 6, 7]])
    base = model(ids)
    attach(model, LoraConfig(r=2, target_modules=["inner"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"))
    randomise(model, "default", 1)
    moved = (model(ids) - base).abs().amax(-1).gt(0)
    assert moved.tolist() == [False, False, True, True, True, True, True, True]
    with contextlib.suppress(RouteError):
        model.train()(ids)
        pytest.fail("seven tokens of eight have no known positions")


def test_an_init_that_moves_the_base_is_refused() -> None:
    """Before its start the model must be the base."""
    words = {"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM", "init_lora_weights": "pissa"}
    with pytest.raises(ConfigError, match=r"'pissa' changes the base weight, and aLoRA needs it unchanged"):
        attach(LLAMA.model(), LLAMA.config(**words))


def test_a_prompt_tells_on_how_many_tokens_an_adapter_acts() -> None:
    model = waiting()
    ids = torch.tensor([9, *INVOCATION, 8])
    assert waits_for_tokens(model)
    assert prompt_offset(model, ids, "a") == 3
    assert prompt_offset(model, ids[:1], "a") == 0
    attach(model, dataclasses.replace(adapters(model)["a"], alora_invocation_tokens=None), "plain")
    assert prompt_offset(model, ids, "plain") == 4
    detach(model, "a")
    assert not waits_for_tokens(model)
