import itertools
import json
import random
from array import array
from typing import Any

import pytest
import torch

from lorakit.data import Document, Loader, Sequence, by_length, encode, padding_id
from lorakit.errors import ConfigError, DataError


@pytest.fixture
def sequences(tiny_tokenizer: Any) -> Any:
    documents = [Document("hello world, " * (1 + index % 5) + str(index)) for index in range(11)]
    return encode(documents, tiny_tokenizer, 16).sequences


def key(batch: Any) -> tuple[Any, ...]:
    return batch.input_ids.tolist(), batch.attention_mask.tolist(), batch.labels.tolist(), batch.epoch


def test_an_epoch_gives_every_sequence_once_and_each_epoch_its_own_order(sequences: Any) -> None:
    loader = Loader(sequences, 4, seed=5)
    orders = []
    for epoch in range(3):
        rows = []
        for index in range(loader.batches_per_epoch):
            batch = next(loader)
            assert batch.epoch == epoch + (index + 1) / loader.batches_per_epoch
            rows += [
                [token for token, kept in zip(ids, mask, strict=True) if kept]
                for ids, mask in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)
            ]
        assert sorted(rows) == sorted(list(s.input_ids) for s in sequences)
        orders.append(rows)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 7])
def test_the_largest_batch_is_known_before_the_rows_are_read(sequences: Any, batches: int) -> None:
    loader = Loader(sequences, 4, seed=5)
    most = loader.most_tokens(batches)
    assert most == max(batch.tokens for batch in itertools.islice(loader, batches))


def test_counts_are_those_of_the_causal_loss(sequences: Any) -> None:
    for batch in Loader(sequences, 4, seed=0, epochs=1):
        assert batch.tokens == int(batch.attention_mask.sum())
        assert batch.trained_tokens == int((batch.labels[:, 1:] != -100).sum()) == int((batch.labels != -100).sum())
        assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.labels.dtype == torch.int64


def test_the_end_is_trained_where_padding_has_the_same_id(sequences: Any, tiny_tokenizer: Any) -> None:
    assert padding_id(tiny_tokenizer) == tiny_tokenizer.eos_token_id
    for batch in Loader(sequences, 4, seed=0, epochs=1, pad_id=padding_id(tiny_tokenizer)):
        inside = batch.attention_mask.bool()
        assert (batch.labels[~inside] == -100).all()
        ends = inside & (batch.input_ids == tiny_tokenizer.eos_token_id)
        assert (batch.labels[ends] == tiny_tokenizer.eos_token_id).all()


def test_the_model_s_own_loss_agrees_with_the_count(sequences: Any, tiny_llama: Any) -> None:
    batch = next(Loader(sequences, 3, seed=0))
    with torch.no_grad():
        out = tiny_llama(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        each = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
        )
    torch.testing.assert_close(each / batch.trained_tokens, out.loss)


@pytest.mark.parametrize("given_out", [0, 1, 2, 3, 4, 7])
def test_a_state_gives_the_batches_that_would_have_come(sequences: Any, given_out: int) -> None:
    loader = Loader(sequences, 4, seed=5)
    for _ in range(given_out):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    expected = [key(batch) for batch in itertools.islice(loader, 8)]
    other = Loader(sequences, 4, seed=5)
    other.load_state(state)
    assert [key(batch) for batch in itertools.islice(other, 8)] == expected


def test_a_state_of_other_data_is_refused(sequences: Any) -> None:
    state = Loader(sequences, 4, seed=5).state()
    with pytest.raises(DataError, match="cannot be restored: the data, batch_rows changed"):
        Loader(sequences[1:], 3, seed=5).load_state(state)
    same_tokens = [Sequence(s.input_ids, array("i", [-100] * len(s))) for s in sequences]
    with pytest.raises(DataError, match="cannot be restored: the data changed"):
        Loader(same_tokens, 4, seed=5).load_state(state)
    with pytest.raises(DataError, match="seed changed"):
        Loader(sequences, 4, seed=6).load_state(state)
    with pytest.raises(DataError, match="position in the data is not valid: epoch 0, batch 99"):
        Loader(sequences, 4, seed=5).load_state({**state, "batch": 99})


def test_an_evaluation_goes_through_once_in_order(sequences: Any) -> None:
    batches = list(Loader(sequences, 4, seed=0, shuffle=False, epochs=1))
    assert sum(batch.tokens for batch in batches) == sum(map(len, sequences))
    assert batches[0].input_ids[0, : len(sequences[0])].tolist() == list(sequences[0].input_ids)
    assert batches[-1].epoch == 1
    assert batches[-1].input_ids.shape[0] == len(sequences) % 4


@pytest.mark.parametrize("rows", [1, 3, 50])
def test_by_length_a_batch_has_the_places_of_some_of_the_longest(sequences: Any, rows: int) -> None:
    rng = random.Random(3)
    cut = [Sequence(s.input_ids[:n], s.labels[:n]) for s in sequences for n in (rng.randrange(1, len(s)), len(s))]
    targets = rows * max(map(len, cut))
    batches = list(by_length(cut, rows, pad_id=9))
    given = [ids[:n].tolist() for b in batches for ids, n in zip(b.input_ids, b.attention_mask.sum(1), strict=True)]
    assert sorted(given) == sorted(list(s.input_ids) for s in cut)  # each once
    assert [len(ids) for ids in given] == sorted(map(len, cut))
    assert all(batch.input_ids.numel() <= targets for batch in batches)
    for batch, following in itertools.pairwise(batches):  # one more row would not fit
        count, longest = len(batch.input_ids), int(following.attention_mask[0].sum())
        assert (count + 1) * longest > targets
    assert batches[-1].epoch == 1
    assert sum(batch.trained_tokens for batch in batches) == sum(s.trained_tokens for s in cut)


def test_batches_need_rows(sequences: Any) -> None:
    with pytest.raises(ConfigError, match="rows is 0; it must be at least 1"):
        Loader(sequences, 0, seed=0)
    with pytest.raises(DataError, match="no sequences to make batches from"):
        Loader([], 1, seed=0)
    with pytest.raises(ConfigError, match="rows is 0; it must be at least 1"):
        next(by_length(sequences, 0))
