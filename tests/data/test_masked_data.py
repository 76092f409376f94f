"""Documents for masked language models: each token once, its own target, in whole segments."""

import itertools
from collections import Counter

import numpy as np
import pytest
from data_helpers import NumbersTokenizer, data_config, jsonl, numbered_documents

from lm_jax.data.held_out import validation_batches
from lm_jax.data.loader import train_stream
from lm_jax.errors import UserError

LENGTHS = [3, 60, 1, 8, 9, 2, 17, 5, 0, 12, 6, 33]
PACKINGS = ["first_fit", "concatenate", "crop"]
CLS, SEP = 1, 2


def config_of(tmp_path, packing, lengths=LENGTHS, **changes):
    path = jsonl(tmp_path / "a.jsonl", numbered_documents(lengths))
    changes = {"epochs": None if packing == "crop" else 1} | changes
    return data_config(path, packing=packing, objective="masked", **changes)


def held_out(config, tokenizer, **options):
    return list(validation_batches(config, tokenizer, batch_size=8, **options))


def segments_of(batches):
    for batch in batches:
        for tokens, segments, positions in zip(
            batch["inputs"], batch["segments"], batch["positions"], strict=True
        ):
            for segment in range(1, segments.max() + 1):
                where = np.flatnonzero(segments == segment)
                assert (np.diff(where) == 1).all()
                assert positions[where].tolist() == list(range(len(where)))
                yield tokens[where].tolist()


def numbers(batches):
    return Counter(i for tokens in segments_of(batches) for i in tokens if i >= 1000)


def every_number(lengths=LENGTHS):
    texts = numbered_documents(lengths)
    return Counter(int(word) for text in texts for word in text.split())


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ends", [(CLS, SEP), (None, SEP), (CLS, None), (None, None)])
def test_each_token_is_its_own_target_once(tmp_path, packing, ends):
    config, tokenizer = config_of(tmp_path, packing), NumbersTokenizer(*ends)
    ways = [held_out(config, tokenizer)]
    if packing != "crop":  # which draws
        ways.append(list(train_stream(config, tokenizer, seed=0)))
    for batches in ways:
        for batch in batches:
            np.testing.assert_array_equal(batch["inputs"], batch["targets"])
            np.testing.assert_array_equal(batch["weights"], batch["segments"] > 0)
        assert numbers(batches) == every_number()


@pytest.mark.parametrize("ends", [(CLS, SEP), (None, SEP), (CLS, None), (None, None)])
def test_first_fit_keeps_each_segment_whole(tmp_path, ends):
    config, tokenizer = config_of(tmp_path, "first_fit"), NumbersTokenizer(*ends)
    back = [SEP] if ends[1] else []
    front = [CLS] if ends[0] else back
    for batches in (
        train_stream(config, tokenizer, seed=0),
        held_out(config, tokenizer),
        held_out(config, tokenizer, max_batches=2),
    ):
        for tokens in segments_of(batches):
            assert tokens[: len(front)] == front
            assert tokens[len(tokens) - len(back) :] == back
            inner = tokens[len(front) : len(tokens) - len(back)]
            assert inner and inner == list(range(inner[0], inner[0] + len(inner)))


@pytest.mark.parametrize("packing", ["concatenate", "crop"])
def test_a_stream_of_documents_is_cut_anywhere(tmp_path, packing):
    config = config_of(tmp_path, packing)
    stream = [
        token
        for text in numbered_documents(LENGTHS)
        if text
        for token in (CLS, *map(int, text.split()), SEP)
    ]
    batches = held_out(config, NumbersTokenizer(CLS, SEP))
    assert list(itertools.chain(*segments_of(batches))) == stream


def test_crop_draws_every_window_and_no_other(tmp_path):
    config = config_of(tmp_path, "crop", [9])
    starts = Counter()
    for batch in itertools.islice(train_stream(config, NumbersTokenizer(CLS, SEP), seed=0), 40):
        for row in batch["inputs"]:
            starts[row[0]] += 1
            assert batch["weights"].all()
    # Of [CLS] + 9 numbers + [SEP], 11 tokens, the windows of 8 begin at one of four.
    assert set(starts) == {CLS, 1000, 1001, 1002}
    assert min(starts.values()) > 40


def test_a_document_of_one_token_can_be_masked_and_none_cannot(tmp_path):
    config = config_of(tmp_path, "first_fit", [1])
    assert numbers(train_stream(config, NumbersTokenizer(), seed=0)) == {1000: 1}
    config = config_of(tmp_path, "first_fit", [0, 0], epochs=None)
    with pytest.raises(UserError, match="no document of the training split has a token"):
        list(train_stream(config, NumbersTokenizer(CLS, SEP), seed=0))
    with pytest.raises(UserError, match="the validation split has no document of a token"):
        held_out(config, NumbersTokenizer(CLS, SEP))
