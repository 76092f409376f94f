"""What is masked: as often as BERT's paper says, no special token, whole words, on any mesh."""

import jax
import numpy as np
import pytest
from tiny_models import on_devices, quick_jit, shard

from lm_jax.config import DataConfig
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError
from lm_jax.training.masking import make_masking

TOKENIZER = BytesTokenizer(mask=True)
SPECIALS = sorted(TOKENIZER.specials)
VOCAB = 300  # more than the tokenizer's 259, as a padded vocabulary


def masking(length=64, **changes):
    return make_masking(DataConfig(objective="masked", length=length, **changes), TOKENIZER, VOCAB)


def batch_of(rows, length=64, seed=0):
    """Rows of segments <s> text </s> of random words, padded by unequal amounts."""
    rng = np.random.default_rng(seed)
    ids = np.full((rows, length), TOKENIZER.pad_id, np.int32)
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        start = 0
        for segment in (1, 2):
            size = int(rng.integers(5, length // 2 + 1))
            text = rng.integers(97, 105, size - 2)
            text[rng.random(size - 2) < 0.3] = ord(" ")
            ids[row, start : start + size] = [TOKENIZER.bos_id, *text, TOKENIZER.eos_id]
            segments[row, start : start + size] = segment
            start += size
    return {
        "inputs": ids,
        "targets": ids.copy(),
        "segments": segments,
        "positions": np.zeros_like(ids),
        "weights": (segments > 0).astype(np.float32),
    }


def masked(mask, batch, seed=0):
    got = jax.device_get(quick_jit(mask.__call__)(batch, jax.random.key(seed)))
    chosen = np.zeros(batch["inputs"].shape, bool)
    for row, (places, weights) in enumerate(zip(got["predicted"], got["weights"], strict=True)):
        assert len(set(places.tolist())) == len(places), "no position twice"
        chosen[row, places[weights > 0]] = True
    return got, chosen


def within(found, total, share, sigmas=5):
    """Whether a count is within so many standard deviations of a binomial's mean."""
    return abs(found - total * share) <= sigmas * np.sqrt(total * share * (1 - share))


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_shares_are_those_of_the_paper(rate):
    batch = batch_of(3000)
    got, chosen = masked(masking(mask_rate=rate), batch)
    eligible = (batch["weights"] > 0) & ~np.isin(batch["inputs"], SPECIALS)
    total, count = eligible.sum(), chosen.sum()
    assert within(count, total, rate)
    before, after = batch["inputs"][chosen], got["inputs"][chosen]
    to_mask, same = (after == TOKENIZER.mask_id).sum(), (after == before).sum()
    assert within(to_mask, count, 0.8)
    assert within(same, count, 0.1 + 0.1 / 256)
    drawn = after[(after != TOKENIZER.mask_id) & (after != before)]
    # Random ones are any byte alike, and no special token.
    assert within((drawn < 128).sum(), len(drawn), 0.5) and drawn.max() < 256
    # Alike at the beginning, in the middle and at the end of what can be chosen.
    for part in np.array_split(np.flatnonzero(eligible), 5):
        assert within(chosen.reshape(-1)[part].sum(), len(part), rate)


@pytest.mark.parametrize("whole_words", [False, True])
def test_the_rest_is_left_as_it_was(whole_words):
    batch = batch_of(200)
    got, chosen = masked(masking(mask_whole_words=whole_words), batch)
    np.testing.assert_array_equal(got["inputs"][~chosen], batch["inputs"][~chosen])
    for key in ("segments", "positions"):
        np.testing.assert_array_equal(got[key], batch[key])
    assert not chosen[batch["weights"] == 0].any()
    assert not chosen[np.isin(batch["inputs"], SPECIALS)].any()
    wanted = np.take_along_axis(batch["targets"], got["predicted"], 1)
    np.testing.assert_array_equal(got["targets"], wanted)
    assert got["inputs"].max() < TOKENIZER.vocab_size


def words_of(ids, segments):
    """The places of each word of a row: from a space (or an end) up to the next, in a segment."""
    words = []
    for t, (token, segment) in enumerate(zip(ids, segments, strict=True)):
        if segment == 0 or token in SPECIALS:
            words.append([])
        elif token == ord(" ") or not words:
            words.append([t])
        else:
            words[-1].append(t)
    return [word for word in words if word]


def test_whole_words_are_whole():
    batch = batch_of(3000)
    got, chosen = masked(masking(mask_whole_words=True), batch)
    found = total = 0
    by_size = {}
    for ids, segments, row in zip(batch["inputs"], batch["segments"], chosen, strict=True):
        for word in words_of(ids, segments):
            assert row[word].all() or not row[word].any()
            by_size.setdefault(len(word), []).append(row[word[0]])
            found, total = found + row[word].sum(), total + len(word)
    assert within(found, total, 0.15, sigmas=10)  # words come together, which spreads the count
    for size in (1, 2, 3, 4):
        assert within(np.sum(by_size[size]), len(by_size[size]), 0.15), size
    # Corrupted token by token, as in BERT's release: of some words a part becomes the mask.
    parts = got["inputs"][chosen] == TOKENIZER.mask_id
    assert within(parts.sum(), chosen.sum(), 0.8)


def test_whole_words_end_at_specials_and_segments():
    """Documents cut anywhere: 'ab' ends one segment and 'cd' begins the next, without a sign."""
    ids = np.array([[97, 98, 99, 100, 257, 256, 101, 102]], np.int32)
    segments = np.array([[1, 1, 2, 2, 2, 2, 2, 2]], np.int32)
    one = {"inputs": ids, "targets": ids, "segments": segments, "positions": ids * 0}
    batch = {k: np.repeat(x, 500, 0) for k, x in one.items()}
    batch["weights"] = np.ones((500, 8), np.float32)
    _, chosen = masked(masking(length=8, mask_rate=0.5, mask_whole_words=True), batch)
    seen = {tuple(row.tolist()) for row in chosen[:, [0, 2, 6]]}
    assert seen > {(True, False, False), (False, True, False), (False, False, True)}
    for a, b in ((0, 1), (2, 3), (6, 7)):
        np.testing.assert_array_equal(chosen[:, a], chosen[:, b])


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks_do_not_depend_on_the_mesh(whole_words):
    mask, batch = masking(mask_whole_words=whole_words), batch_of(8)
    alone, _ = masked(mask, batch)
    for axes in ((8, 1, 1), (2, 2, 2)):
        with jax.set_mesh(on_devices(axes)):
            spread, _ = masked(mask, shard(batch))
        for key in alone:
            np.testing.assert_array_equal(alone[key], spread[key], err_msg=key)


def test_masks_are_a_function_of_the_key():
    mask, batch = masking(), batch_of(8)
    first, again, other = (masked(mask, batch, seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=1).all()


@pytest.mark.parametrize("length", [3, 8, 61])
@pytest.mark.parametrize("rate", [0.01, 0.15, 0.9])
def test_no_rate_or_length_asks_for_more_than_there_is_room_for(length, rate):
    config = DataConfig(objective="masked", length=length, mask_rate=rate)
    assert rate * length <= config.predictions <= length
    ids = np.full((50, length), 97, np.int32)
    batch = dict.fromkeys(("inputs", "targets", "positions"), ids)
    batch |= {"segments": np.ones_like(ids), "weights": np.ones(ids.shape, np.float32)}
    got, chosen = masked(make_masking(config, TOKENIZER, VOCAB), batch)
    assert got["predicted"].shape == (50, config.predictions)
    assert set(chosen.sum(1)) <= {int(rate * length), int(rate * length) + 1}


def test_what_a_tokenizer_lacks_is_said():
    config = DataConfig(objective="masked")
    with pytest.raises(UserError, match="needs a mask token"):
        make_masking(config, BytesTokenizer(), VOCAB)
    assert make_masking(DataConfig(), BytesTokenizer(), VOCAB) is None
    only = make_masking(config, CharacterTokenizer("ab", mask=True), 3)
    assert only.special_V.tolist() == [False, False, True]
