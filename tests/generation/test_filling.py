"""Hidden tokens are filled in where they stood, by the most probable token of text."""

import dataclasses

import jax
import numpy as np
import published_folders
import pytest
import tokenizers
from tiny_models import BERT, build, logits, on_devices

from lm_jax.data.tokenizer import load_tokenizer
from lm_jax.data.tokenizer_base import CharacterTokenizer
from lm_jax.errors import UserError
from lm_jax.generation.filling import encode_with_masks, fill_in

TOKENIZER = CharacterTokenizer("abcdefgh ", mask=True)
TEXT = "bad face"


@pytest.fixture(scope="module")
def model():
    return build(dataclasses.replace(BERT, layers=1))


def test_guesses_are_the_models_and_the_rest_stays(model):
    filled = fill_in(model, TOKENIZER, TEXT, hidden=3)
    assert len(filled.text) == len(TEXT) and len(filled.guesses) == 3
    ids = TOKENIZER.encode(TEXT)
    # Which were hidden: by hand, each set of three that the answer allows, tried on the model.
    tried = []
    for places in np.stack(np.meshgrid(*[range(len(ids))] * 3), -1).reshape(-1, 3):
        if (np.diff(places) <= 0).any():
            continue
        masked = ids.copy()
        masked[places] = TOKENIZER.mask_id
        tried.append((places, masked))
    scores = np.asarray(logits(model, np.stack([masked for _, masked in tried])))
    scores = scores[:, :, : len("abcdefgh ")]  # no mask, no padding of V
    expected = []
    for (places, _), best in zip(tried, scores.argmax(-1), strict=True):
        guessed = ids.copy()
        guessed[places] = best[places]
        pairs = [(TOKENIZER.piece(ids[i]), TOKENIZER.piece(best[i])) for i in places]
        expected.append((TOKENIZER.decode(guessed), pairs))
    assert filled in expected
    assert fill_in(model, TOKENIZER, TEXT, hidden=3) == filled


def test_no_more_is_hidden_than_there_is(model):
    assert len(fill_in(model, TOKENIZER, TEXT, hidden=99).guesses) == len(TEXT)


def test_it_works_on_a_mesh(model):
    alone = fill_in(model, TOKENIZER, TEXT, hidden=4)
    with jax.set_mesh(on_devices((2, 2, 1))):
        placed = jax.device_put(model, jax.P())
        assert fill_in(placed, TOKENIZER, TEXT, hidden=4) == alone


@pytest.mark.parametrize("text", ["", "a" * 17])
def test_a_text_that_does_not_fit_is_refused(model, text):
    with pytest.raises(UserError, match=f"has {len(text)} tokens.*at most 16"):
        fill_in(model, TOKENIZER, text, hidden=1)


@pytest.mark.parametrize("family, mask", [("bert", "[MASK]"), ("roberta", "<mask>")])
def test_masks_in_a_text_are_read_as_published_tokenizers_read_them(family, mask, tmp_path):
    published_folders.write(tmp_path, published_folders.FAMILIES[family]())
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    ours = load_tokenizer(tmp_path)
    for text in ("The {} sat.", "{}", "a {}{} b", "on{}the mat", "  {}  {} ", "no mask", ""):
        want = theirs.encode(text.format(mask, mask)).ids
        assert encode_with_masks(ours, text.format(mask, mask)).tolist() == want, text
        assert encode_with_masks(ours, text.format("[MASK]", "[MASK]")).tolist() == want, text


def test_a_character_before_a_mask_is_one_of_its_own():
    ids = encode_with_masks(TOKENIZER, "a [MASK]b")
    assert ids.tolist() == [*TOKENIZER.encode("a "), TOKENIZER.mask_id, *TOKENIZER.encode("b")]
