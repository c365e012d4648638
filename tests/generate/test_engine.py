"""lorakit.generate.engine: rows that join and leave have the tokens that they have alone; turns, memory, faults."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lorakit import core
from lorakit.errors import ModelError, NonFiniteError, RouteError, RunError, UsageError
from lorakit.generate import (
    Continuation,
    Engine,
    Failure,
    NewToken,
    PromptRead,
    Sampling,
    generate_batch,
    rows_are_independent,
)
from lorakit.generate.rows import CHUNK
from lorakit.ops.cache import BLOCK

from ..laws.zoo import GPT2, INVOCATION, LLAMA, Specimen, randomise

LONG = [6 + (i * i) % 251 for i in range(3 * CHUNK + 10)]


def run(engine: Engine, given: Sequence[Continuation], per_step: int = 100) -> dict[int, list[Any]]:
    """Submit some continuations before each step, and return what each row yields."""
    found, left = defaultdict(list), list(given)
    while left or not engine.is_idle:
        for one in left[:per_step]:
            engine.submit(one)
        left = left[per_step:]
        for event in engine.step():
            found[event.row].append(event)
    return found


def tokens(events: Sequence[Any]) -> list[int]:
    return [event.token for event in events if isinstance(event, NewToken)]


def long_llama(**fields: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=1024, num_key_value_heads=2, **sizes, **fields)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def adapted(model: Any, *names: str) -> Any:
    for seed, name in enumerate(names, 1):
        fields = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"} if name.startswith("alora") else {}
        fields |= {"use_dora": True} if name.startswith("dora") else {}
        core.attach(model, core_config(r=2**seed, **fields), name)
        randomise(model, name, seed)
    return model.eval()


def core_config(**fields: Any) -> Any:
    from lorakit.config import LoraConfig

    return LoraConfig(target_modules="all-linear", **fields)


def mixed(names: Sequence[str | None], count: int, seed: int = 0) -> list[Continuation]:
    choose = random.Random(seed)
    rows = []
    for number in range(count):
        begin, length = choose.randrange(100), choose.choice([1, 5, 33, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
        sampling = Sampling(choose.choice([0.0, 1.0]), seed=number)
        prompt = (*LONG[begin : begin + length // 2], 7, 8, *LONG[begin : begin + length // 2])
        rows.append(Continuation(prompt, choose.choice([1, 4, 12]), sampling, names[number % len(names)]))
    return rows


def test_rows_that_join_and_leave_have_the_tokens_of_each_alone() -> None:
    names = [None, "plain", "dora", "alora", "other"]
    model = adapted(long_llama(), *filter(None, names))
    rows = mixed(names, 20)
    together = run(Engine(model, rows=6, prefix_tokens=2 * CHUNK), rows, per_step=2)
    for number, row in enumerate(rows):
        alone = tokens(run(Engine(model), [row])[0])
        assert tokens(together[number]) == alone
        assert len(alone) == row.max_new_tokens
    assert len({tuple(tokens(run(Engine(model), [Continuation((5, 6, 7, 8), 8, adapter=n)])[0])) for n in names}) == 5


def test_in_bf16_the_logits_have_the_bits_of_each_row_alone() -> None:
    """The law of a server: where the probe holds, log-probabilities are equal, not only close."""
    names = [None, "plain", "other"]
    model = adapted(long_llama().to(torch.bfloat16), "plain", "other")
    rows = [
        Continuation(row.prompt, row.max_new_tokens, row.sampling, row.adapter, logprobs=5) for row in mixed(names, 12)
    ]
    together = run(Engine(model, rows=5, prefix_tokens=2 * CHUNK), rows, per_step=3)
    is_independent = rows_are_independent(model, ["plain", "other"])
    for number, row in enumerate(rows):
        alone = run(Engine(model), [row])[0]
        for one, other in zip(together[number], alone, strict=True):
            if is_independent:
                assert (one.token, one.logprobs) == (other.token, other.logprobs)
            else:
                assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=0.1)


@pytest.mark.parametrize("window", [8, 40])
def test_a_sliding_window_is_each_rows_own(window: int) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MistralForCausalLM(MistralConfig(vocab_size=320, num_key_value_heads=2, sliding_window=window, **sizes))
    prompts = [LONG[:n] for n in (3, 60, 20, 150)]
    rows = [Continuation(tuple(prompt), 10) for prompt in prompts]
    together = run(Engine(model.eval()), rows)
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        assert tokens(together[number]) == theirs[0, len(prompt) :].tolist()


def test_a_model_whose_cache_is_no_keys_and_values_runs_row_by_row() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    prompts = [[5, 6, 7], LONG[:20]]
    together = run(Engine(model, prefix_tokens=CHUNK), [Continuation(tuple(prompt), 6) for prompt in prompts])
    for number, prompt in enumerate(prompts):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)
        assert tokens(together[number]) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("specimen", [LLAMA, GPT2], ids=str)
def test_rows_with_invocation_tokens_continue_as_each_does_alone(specimen: Specimen) -> None:
    model = specimen.model()
    for seed, (name, invocation) in enumerate({"a": list(INVOCATION), "b": [5], "plain": None}.items()):
        fields = {} if invocation is None else {"alora_invocation_tokens": invocation, "task_type": "CAUSAL_LM"}
        core.attach(model, specimen.config(**fields), name)
        randomise(model, name, 80 + seed)
    shared = [9, 8, 7, 11, 12, 13]
    prompts = [[*shared, 3, 4, 20], [*shared, 5], [*shared, 3, 4, 21, 22, 23], [1, 2], [*shared, 14]]
    names = ["a", "b", None, "plain", "a"]
    found: list[list[int]] = [[] for _ in prompts]
    for new in generate_batch(model, prompts, max_new_tokens=5, adapters=names):
        found[new.row].append(new.token)
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        expected, ids = [], list(prompt)
        for _ in range(5):  # without a cache
            begins = core.invoked(model, torch.tensor([prompt]))
            with torch.no_grad(), core.use(model, name) if name else core.disable(model), begins:
                logits = model(torch.tensor([ids])).logits
            expected.append(int(logits[0, -1].argmax()))
            ids.append(expected[-1])
        assert found[row] == expected


def test_an_adapter_with_invocation_tokens_can_come_and_go_while_others_continue() -> None:
    model = adapted(long_llama(), "plain")
    prompt, found = (*LONG[:30], 7, 8, *LONG[30:40]), defaultdict(list)
    engine = Engine(model, bank=core.AdapterBank(slots=8, by_row=True, is_constant=True))
    before = [Continuation(prompt, 12), Continuation(prompt, 12, adapter="plain")]
    after = [Continuation(prompt, 5, adapter="alora"), Continuation((9,) * 20, 5, adapter="alora")]

    def go(steps: int, *rows: Continuation) -> None:
        for row in rows:
            engine.submit(row)
        for event in (event for _ in range(steps) for event in engine.step()):
            found[event.row].append(event)

    go(3, *before)
    adapted(model, "alora")
    go(7, *after)
    alone = [tokens(run(Engine(model), [row])[0]) for row in (*before, *after)]
    engine.forget("alora")
    core.detach(model, "alora")
    go(9)
    assert [tokens(found[number]) for number in range(4)] == alone
    assert len({tuple(one) for one in alone}) == 4


def test_the_base_continues_when_the_only_adapter_with_invocation_tokens_goes() -> None:
    model = long_llama()
    row = Continuation((*LONG[:9], 7, 8), 8)
    alone = tokens(run(Engine(model), [row])[0])
    engine = Engine(adapted(model, "alora"))
    engine.submit(row)
    found = engine.step()
    engine.forget("alora")
    core.detach(model, "alora")
    while not engine.is_idle:
        found += engine.step()
    assert tokens(found) == alone


def test_a_prompt_that_begins_like_another_reads_only_the_rest() -> None:
    model = adapted(long_llama(), "plain", "alora")
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    engine = Engine(model, prefix_tokens=8 * CHUNK)

    def read(prompt: Sequence[int], adapter: str | None) -> tuple[list[int], list[int]]:
        seen.clear()
        found = tokens(run(engine, [Continuation(tuple(prompt), 3, adapter=adapter)])[engine.submitted - 1])
        return [count for count in seen if count > 1], found

    whole, alike = LONG[: 2 * CHUNK + 9], [*LONG[:CHUNK], *LONG[: CHUNK + 4]]
    assert read(whole, "plain")[0] == [CHUNK, CHUNK, 9]
    assert read(whole, "plain")[0] == [9]
    assert read(alike, "plain")[0] == [CHUNK, 4]
    assert read(whole, None)[0] == [CHUNK, CHUNK, 9]  # keys and values of another adapter
    invoked = [*LONG[: CHUNK + 50], 7, 8, *LONG[:100]]
    counts, found = read(invoked, "alora")
    assert counts == [CHUNK, len(invoked) - 2 * CHUNK]  # the first chunk is that of the base
    assert found == tokens(run(Engine(model), [Continuation(tuple(invoked), 3, adapter="alora")])[0])
    assert read(LONG[:CHUNK], "plain")[0] == [CHUNK]  # the last token is always read
    engine.forget("plain")
    assert read(whole, "plain")[0] == [CHUNK, CHUNK, 9]
    assert Engine(model, prefix_tokens=CHUNK - 1).counts["tokens"] == 0


def test_few_prefixes_are_kept_and_their_memory_is_given_back() -> None:
    engine = Engine(long_llama(), prefix_tokens=2 * CHUNK)
    for begin in range(5):
        run(engine, [Continuation(tuple(LONG[begin : begin + 2 * CHUNK + 1]), 2)])
        assert engine.counts["tokens"] == 2 * CHUNK
    engine.reset()
    assert engine.counts == {"waiting": 0, "reading": 0, "open": 0, "tokens": 0, "bytes": 0}


def test_rows_wait_until_there_is_memory_and_a_place() -> None:
    model = long_llama()
    engine = Engine(model, rows=2, tokens=4 * BLOCK)
    for length in (BLOCK, BLOCK, 2 * BLOCK, 5):
        engine.submit(Continuation(tuple(LONG[:length]), BLOCK))  # 2, 2, 3 and 2 blocks
    most = 0
    while not engine.is_idle:
        engine.step()
        counts = engine.counts
        assert counts["reading"] + counts["open"] <= 2
        most = max(most, counts["tokens"])
    assert most == 4 * BLOCK
    assert engine.counts["tokens"] == 0
    with pytest.raises(UsageError) as caught:
        engine.submit(Continuation(tuple(LONG[: 3 * BLOCK]), BLOCK + 1))
    assert caught.value.field == "max_new_tokens"
    assert engine.is_idle


def test_a_row_that_is_cancelled_frees_its_memory_at_once() -> None:
    engine = Engine(long_llama())
    keep, drop = (engine.submit(Continuation(tuple(LONG[:n]), 20)) for n in (10, 2 * CHUNK))
    engine.step()
    engine.step()
    engine.cancel(drop)
    assert engine.counts["tokens"] == BLOCK
    assert {event.row for event in engine.step()} == {keep}
    engine.cancel(drop)  # again: nothing
    engine.cancel(keep)
    assert engine.is_idle
    assert engine.counts["tokens"] == 0


def test_owners_take_turns_and_so_do_their_adapters() -> None:
    """One owner submits many long prompts; another owner, who comes later, waits for one chunk at most."""
    model = adapted(long_llama(), "plain")
    engine, long = Engine(model), tuple(LONG[: 3 * CHUNK])
    for _ in range(4):
        engine.submit(Continuation(long, 1, owner="many"))
    engine.step()
    few = engine.submit(Continuation((5, 6), 1, owner="few"))
    adapter = engine.submit(Continuation(long, 1, adapter="plain", owner="many"))
    assert [event.row for event in engine.step()] == [few]
    order = [event.row for _ in range(15) for event in engine.step()]
    assert order.index(adapter) <= 1  # before the other three of its owner


def test_prompts_are_not_shared_with_an_adapter_that_changes_tokens_before_its_invocation() -> None:
    model = long_llama()
    fields = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}
    core.attach(model, core_config(r=2, trainable_token_indices=[LONG[3], LONG[40]], **fields), "tokens")
    randomise(model, "tokens", 1)
    rows = [Continuation((*LONG[: 2 * CHUNK], 7, 8, 9), 4, adapter=name) for name in ("tokens", None)]
    alone = [tokens(run(Engine(model), [row])[0]) for row in rows]
    assert alone[0] != alone[1]
    for order in ((0, 1), (1, 0)):
        found = run(Engine(model, prefix_tokens=1024), [rows[k] for k in order], per_step=1)
        assert [tokens(found[n]) for n in range(2)] == [alone[k] for k in order]


def test_an_owner_with_two_prompts_does_not_wait_for_all_who_come_later() -> None:
    engine = Engine(long_llama())
    waiting = [engine.submit(Continuation((5, 6), 1, owner="two")) for _ in range(2)]
    ended = []
    for n in range(20):
        engine.submit(Continuation((5, 6), 1, owner=f"one {n}"))
        ended += [event.row for event in engine.step()]
    assert waiting[1] in ended[:4]
    assert len(ended) == 20


def test_a_damaged_adapter_ends_its_own_rows_only() -> None:
    model = adapted(long_llama(), "plain", "damaged")
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.down_proj").lora_B["damaged"].weight.fill_(torch.nan)
    rows = [Continuation(tuple(LONG[: 9 + n]), 6, adapter=[None, "plain", "damaged"][n % 3]) for n in range(9)]
    expected = [tokens(run(Engine(model), [row])[0]) for row in rows if row.adapter != "damaged"]
    engine = Engine(model)
    for _ in range(2):
        found = run(engine, rows)
        first = min(found)
        failed = [found[first + n] for n in range(9) if n % 3 == 2]
        assert all(isinstance(event, Failure) and isinstance(event.error, NonFiniteError) for (event,) in failed)
        assert [tokens(found[first + n]) for n in range(9) if n % 3 != 2] == expected
    assert engine.counts["tokens"] == 0


def test_a_prompt_whose_log_probabilities_are_not_finite_ends_its_row() -> None:
    model = long_llama()
    with torch.no_grad():
        hidden = model.model(torch.tensor([LONG[:40]])).last_hidden_state[0, 3]
        model.lm_head.weight[0] = hidden / hidden.norm() * 3e38  # infinite for tokens with a similar state
        is_finite = model(torch.tensor([LONG[:40]])).logits[0].amax(-1).isfinite().tolist()
    prompt = tuple(LONG[: 1 + max(at for at in range(40) if is_finite[at])])
    engine = Engine(model)
    found = run(engine, [Continuation(prompt, 1, prompt_logprobs=0), Continuation(prompt, 1)])
    assert [type(event) for event in found[0] + found[1]] == [Failure, NewToken]
    assert engine.counts["tokens"] == 0


def test_log_probabilities_are_those_of_one_forward_pass() -> None:
    model = long_llama()
    prompt = tuple(LONG[: CHUNK + 20])
    read, *new = run(Engine(model, prefix_tokens=4 * CHUNK), [Continuation(prompt, 5, logprobs=2, prompt_logprobs=3)])[
        0
    ]
    assert isinstance(read, PromptRead)
    ids = torch.tensor([[*prompt, *tokens(new)]])
    with torch.no_grad():
        expected = model(ids).logits[0].log_softmax(-1)
    values = [*read.logprobs, *(event.logprobs for event in new)]
    assert [one.token for one in values] == ids[0, 1:].tolist()
    for position, one in enumerate(values):
        best = expected[position].topk(3)
        assert one.logprob == pytest.approx(float(expected[position, one.token]), abs=1e-4)
        assert [token for token, _ in one.top] == best.indices[: len(one.top)].tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values[: len(one.top)].tolist(), abs=1e-4)
    assert {len(one.top) for one in read.logprobs} == {3}
    assert {len(event.logprobs.top) for event in new} == {2}


def test_a_function_can_end_a_row() -> None:
    model, prompt = long_llama(), tuple(LONG[:9])
    whole = tokens(run(Engine(model), [Continuation(prompt, 9)])[0])
    end = next(token for token in whole if whole.index(token) > 1)
    events = run(Engine(model), [Continuation(prompt, 9, until=lambda token: token == end)])[0]
    assert tokens(events) == whole[: whole.index(end) + 1]
    assert events[-1].ended == "stop"


@pytest.mark.parametrize("place", ["until", "mask", "advance", "is_finished"])
def test_any_error_of_a_rows_own_functions_ends_only_that_row(place: str) -> None:
    class Failing:
        """A constraint that fails at its third token."""

        def __init__(self) -> None:
            self.asked: Counter[str] = Counter()

        def __getattr__(self, name: str) -> Any:
            if name == "is_finished":
                return self._call(name, False)
            return lambda given: self._call(name, given)

        def _call(self, name: str, result: Any) -> Any:
            self.asked[name] += 1
            if name == place and self.asked[name] == 3:
                raise KeyError("broken")
            return result

    model, prompt = long_llama(), tuple(LONG[:9])
    engine, constraint = Engine(model), Failing()
    expected = tokens(run(engine, [Continuation(prompt, 6)])[0])
    until = (lambda _: constraint._call("until", False)) if place == "until" else None
    own: dict[str, Any] = {"until": until, "constraint": constraint}
    found = run(engine, [Continuation(prompt, 6), Continuation(prompt, 6, **own), Continuation(prompt, 6)])
    assert tokens(found[1]) == tokens(found[3]) == expected
    *before, last = found[2]
    assert tokens(before) == expected[:2]
    assert isinstance(last, Failure) and isinstance(last.error, RunError) and "KeyError: 'broken'" in str(last.error)
    assert isinstance(last.error.__cause__, KeyError)
    assert engine.counts["tokens"] == 0


def test_a_continuation_is_checked_before_it_waits() -> None:
    engine = Engine(adapted(long_llama(), "plain"))
    for wrong in (Continuation((), 1), Continuation((320,), 1), Continuation(tuple(range(300)) * 4, 1)):
        with pytest.raises(UsageError):
            engine.submit(wrong)
    with pytest.raises(RouteError):
        engine.submit(Continuation((1,), 1, adapter="nobody"))
    assert engine.is_idle


def test_an_encoder_decoder_is_rejected_when_the_engine_is_made() -> None:
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    t5 = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartConfig(vocab_size=32, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)
    for model in (T5ForConditionalGeneration(t5), BartForConditionalGeneration(bart)):
        with pytest.raises(
            ModelError, match=r"encoder-decoder: its cache \(argument (cache|past_key_values)\).*decoder-only"
        ):
            Engine(model.eval())


def test_an_adapter_that_replaces_another_is_not_mixed_up_with_it() -> None:
    model = adapted(long_llama(), "plain")
    engine, row = Engine(model, prefix_tokens=4 * CHUNK), Continuation(tuple(LONG[: CHUNK + 5]), 8, adapter="plain")
    before = tokens(run(engine, [row])[0])
    engine.forget("plain")
    core.detach(model, "plain")
    core.attach(model, core_config(r=5), "plain")
    randomise(model, "plain", 77)
    after = tokens(run(engine, [row])[1])
    assert after == tokens(run(Engine(model), [row])[0])
    assert after != before


def test_the_base_stays_the_base_when_the_first_adapter_comes_and_the_last_one_goes() -> None:
    model = long_llama()
    engine, row = Engine(model), Continuation(tuple(LONG[:9]), 8)
    base = tokens(run(engine, [row])[0])
    for number in (1, 3):
        adapted(model, "plain")
        found = run(engine, [row, Continuation(row.prompt, 8, adapter="plain")])
        assert tokens(found[number]) == base != tokens(found[number + 1])
        engine.forget("plain")
        core.detach(model, "plain")
