"""Every target exactly once, no document beside another in a segment, padding that says so."""

import itertools

import numpy as np
import pytest
from data_helpers import (
    NumbersTokenizer,
    data_config,
    expected_targets,
    jsonl,
    numbered_documents,
    targets,
)

from lm_jax.data.loader import train_stream
from lm_jax.data.packing import FlatText
from lm_jax.errors import UserError

LENGTHS = [3, 30, 1, 8, 9, 2, 17, 5, 0, 12, 7]


@pytest.mark.parametrize("packing", ["first_fit", "concatenate"])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("bos", "eos", "front", "back"),
    [(1, 2, 1, 2), (None, 2, 2, 2), (1, None, 1, None), (None, None, None, None)],
)
def test_an_epoch_has_each_target_once(tmp_path, packing, shuffle, bos, eos, front, back):
    texts = numbered_documents(LENGTHS)
    config = data_config(
        jsonl(tmp_path / "a.jsonl", texts), packing=packing, shuffle=shuffle, epochs=2
    )
    stream = train_stream(config, NumbersTokenizer(bos, eos), seed=1)
    once = expected_targets(texts, front, back)
    assert targets(stream) == {pair: 2 * count for pair, count in once.items()}


@pytest.mark.parametrize("packing", ["first_fit", "concatenate", "crop"])
def test_a_segment_is_a_stretch_of_one_document(tmp_path, packing):
    path = jsonl(tmp_path / "a.jsonl", numbered_documents(LENGTHS))
    config = data_config(path, packing=packing, epochs=None if packing == "crop" else 1)
    tokenizer = NumbersTokenizer(pad_id=7)
    seen = 0
    for batch in itertools.islice(train_stream(config, tokenizer, seed=0), 20):
        assert {key: array.dtype.name for key, array in batch.items()} == {
            **dict.fromkeys(("inputs", "targets", "segments", "positions"), "int32"),
            "weights": "float32",
        }
        assert {array.shape for array in batch.values()} == {(8, 8)}
        np.testing.assert_array_equal(batch["weights"], (batch["segments"] > 0).astype(np.float32))
        assert set(batch["inputs"][batch["segments"] == 0].tolist()) <= {7}
        assert set(batch["targets"][batch["segments"] == 0].tolist()) <= {7}
        for row in range(8):
            segments = batch["segments"][row]
            present = sorted(set(segments.tolist()) - {0})
            assert present == list(range(1, len(present) + 1))
            for segment in present:
                where = np.flatnonzero(segments == segment)
                inputs = batch["inputs"][row, where]
                steps = np.arange(len(where))
                np.testing.assert_array_equal(where, where[0] + steps)
                np.testing.assert_array_equal(inputs, inputs[0] + steps)
                np.testing.assert_array_equal(batch["targets"][row, where], inputs + 1)
                np.testing.assert_array_equal(batch["positions"][row, where], steps)
                seen += 1
    assert seen > 10


@pytest.mark.parametrize("packing", ["first_fit", "concatenate", "crop"])
def test_attending_across_makes_a_row_one_segment(tmp_path, packing):
    path = jsonl(tmp_path / "a.jsonl", numbered_documents(LENGTHS))
    epochs = None if packing == "crop" else 1
    apart = data_config(path, packing=packing, epochs=epochs)
    across = data_config(path, packing=packing, epochs=epochs, attend_across_documents=True)
    tokenizer = NumbersTokenizer(eos_id=3)
    pairs = zip(
        train_stream(apart, tokenizer, seed=0), train_stream(across, tokenizer, seed=0), strict=True
    )
    several = 0
    for a, b in itertools.islice(pairs, 10):
        for key in ("inputs", "targets", "weights"):
            np.testing.assert_array_equal(a[key], b[key])
        real = b["weights"] == 1
        np.testing.assert_array_equal(b["segments"], real)
        np.testing.assert_array_equal(b["positions"], np.arange(8)[None] * real)
        several += int((a["segments"] > 1).sum())
    assert several > 0


def test_first_fit_cuts_no_piece_that_fits(tmp_path):
    texts = numbered_documents([5, 6, 3, 4, 8, 2])
    config = data_config(jsonl(tmp_path / "a.jsonl", texts), length=10, lanes=1)
    starts = []
    for batch in train_stream(config, NumbersTokenizer(), seed=0):
        starts += batch["inputs"][(batch["segments"] > 0) & (batch["positions"] == 0)].tolist()
    assert sorted(starts) == [1000 * (i + 1) for i in range(6)]


def test_concatenate_pads_only_the_end_of_a_lane(tmp_path):
    config = data_config(
        jsonl(tmp_path / "a.jsonl", numbered_documents([20, 33, 4, 9])),
        packing="concatenate",
        lanes=1,
        batch_size=1,
    )
    rows = [batch["weights"][0] for batch in train_stream(config, NumbersTokenizer(), seed=0)]
    assert all(row.all() for row in rows[:-1])
    assert sum(row.sum() for row in rows) == 19 + 32 + 3 + 8


def test_crop_draws_every_window_of_the_text_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(numbered_documents([20])[0])
    config = data_config(str(path), packing="crop", epochs=None)
    first = set()
    for batch in itertools.islice(train_stream(config, NumbersTokenizer(None, 2), seed=0), 40):
        np.testing.assert_array_equal(batch["inputs"], batch["inputs"][:, :1] + np.arange(8)[None])
        np.testing.assert_array_equal(batch["targets"], batch["inputs"] + 1)
        first |= set(batch["inputs"][:, 0].tolist())
    assert first == set(range(1000, 1012))  # the last window ends at the last token


def test_crop_puts_eos_between_documents(tmp_path):
    texts = numbered_documents([6, 5, 9, 7])
    config = data_config(jsonl(tmp_path / "a.jsonl", texts), packing="crop", epochs=None, length=4)
    seen = set()
    for batch in itertools.islice(train_stream(config, NumbersTokenizer(eos_id=3), seed=0), 60):
        seen |= set(targets([batch]))
        opens = batch["inputs"] == 3  # eos begins the segment of the document that follows
        assert (batch["positions"][opens] == 0).all()
    flat = [int(n) for text in texts for n in [*text.split(), 3]][:-1]
    assert seen == set(itertools.pairwise(flat))


def test_crop_of_too_little_text_says_so(tmp_path):
    config = data_config(
        jsonl(tmp_path / "a.jsonl", numbered_documents([4, 4])), packing="crop", epochs=None
    )
    with pytest.raises(UserError, match=r"8 tokens.*data\.length = 8"):
        train_stream(config, NumbersTokenizer(), seed=0)


def test_a_corpus_without_targets_is_an_error_and_no_endless_loop(tmp_path):
    config = data_config(jsonl(tmp_path / "a.jsonl", numbered_documents([1, 0, 1])), epochs=None)
    with pytest.raises(UserError, match="two tokens"):
        next(train_stream(config, NumbersTokenizer(), seed=0))


def test_crop_begins_each_document_as_a_prompt_begins():
    text = FlatText(numbered_documents([3, 2]), NumbersTokenizer(1, 2), data_config("", length=8))
    assert text.tokens.tolist() == [1, 1000, 1001, 1002, 2, 1, 2000, 2001]
