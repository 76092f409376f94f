"""An exported tokenizer encodes in Transformers exactly as it does here."""

import json
import logging
import shutil

import pytest
import sentencepiece
import transformers
from published_folders import FAMILIES, LINES, sentencepiece_model, varied_texts, write
from transformers import AutoTokenizer

from lm_jax.config import TokenizerConfig
from lm_jax.data.tokenizer import load_tokenizer, train_tokenizer
from lm_jax.errors import UserError
from lm_jax.interop.tokenizer_export import write_huggingface_tokenizer

TEXTS = varied_texts(4000)


def ours(kind: str, mask: bool = False, **fields):
    documents = LINES if kind != "characters" else TEXTS
    return train_tokenizer(
        TokenizerConfig(kind=kind, vocab_size=1200, **fields), documents, mask=mask
    )


def exported(tokenizer, folder, **arguments):
    """What Transformers reads, without a word of warning."""
    files = write_huggingface_tokenizer(tokenizer, folder, **arguments)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert all((folder / name).is_file() for name in files)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = transformers.logging.get_logger("transformers")
    logger.addHandler(handler)
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    finally:
        logger.removeHandler(handler)
    assert said == []
    return theirs


def assert_alike(tokenizer, theirs, texts=TEXTS):
    assert len(theirs) == tokenizer.vocab_size
    got = [tokenizer.encode(text).tolist() for text in texts]
    plain = theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids
    assert [t for t, a, b in zip(texts, got, plain) if a != b] == []
    whole = theirs(texts, split_special_tokens=True).input_ids
    ends = len(whole[5]) - len(plain[5])
    for text, ids, inside in zip(texts, whole, got):
        prompt = tokenizer.encode_prompt(text).tolist() if text else ids
        assert ids[: len(prompt)] == prompt and len(ids) == len(inside) + ends
    return ends


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "characters"])
@pytest.mark.parametrize("mask", [False, True], ids=["causal", "masked"])
def test_our_own(kind, mask, tmp_path):
    tokenizer = ours(kind, mask)
    theirs = exported(tokenizer, tmp_path / "new" / "folder", model_max_length=77)
    ends = assert_alike(tokenizer, theirs)
    assert theirs.model_max_length == 77
    assert theirs.bos_token_id == tokenizer.bos_id and theirs.eos_token_id == tokenizer.eos_id
    assert theirs.mask_token_id == tokenizer.mask_id
    if kind == "characters":
        assert ends == 0 and theirs.pad_token is None
    else:
        assert ends == 1 + mask and theirs.pad_token_id == tokenizer.pad_id
        framed = theirs("a b").input_ids
        assert framed[0] == tokenizer.bos_id and (framed[-1] == tokenizer.eos_id) == mask
    for text in TEXTS[10:400]:
        ids = tokenizer.encode(text).tolist()
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == text
    pair = theirs("a", "b")
    inside = [tokenizer.encode(t).tolist() for t in "ab"]
    if mask and kind != "characters":  # as BERT
        bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
        assert pair.input_ids == [*bos, *inside[0], *eos, *inside[1], *eos]
    # Back here, it is a published tokenizer that does the same.
    again = load_tokenizer(tmp_path / "new" / "folder")
    assert again.vocab_size == tokenizer.vocab_size
    assert again.bos_before_text == tokenizer.bos_before_text
    for text in TEXTS[10:400]:
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert again.decode(again.encode(text)) == text


def test_a_character_that_is_unknown_is_an_error_there_as_well(tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), ["abc\n "])
    theirs = exported(tokenizer, tmp_path)
    assert theirs("a\nb c").input_ids == tokenizer.encode("a\nb c").tolist()
    with pytest.raises(Exception, match=r"Missing .UNK. token"):
        theirs("z")
    with pytest.raises(UserError, match="'z'"):
        tokenizer.encode("z")


def test_a_sentencepiece_model_with_a_space_in_front(tmp_path):
    (tmp_path / "llama.model").write_bytes(sentencepiece_model())
    tokenizer = load_tokenizer(tmp_path / "llama.model")
    theirs = exported(tokenizer, tmp_path / "out")
    assert_alike(tokenizer, theirs)
    sp = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    for text in TEXTS[10:400]:
        ids = sp.encode(text)
        assert theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids == ids
        assert theirs.decode(ids) == sp.decode(ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_published_ones_come_out_as_they_came_in(name, tmp_path):
    write(tmp_path / "published", FAMILIES[name]())
    before = AutoTokenizer.from_pretrained(tmp_path / "published")
    load_tokenizer(tmp_path / "published").save(tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / "lm_jax_tokenizer.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).write_text("stale")
    for with_config in (False, True):
        if with_config:
            shutil.copy(tmp_path / "published" / "config.json", tmp_path / "out")
        after = exported(tokenizer, tmp_path / "out")
        assert_alike(tokenizer, after, TEXTS[:600])
        assert after(TEXTS[:600]).input_ids == before(TEXTS[:600]).input_ids
        assert after("a", "b").input_ids == before("a", "b").input_ids
        for key in ("bos", "eos", "unk", "pad", "mask", "cls", "sep"):
            assert getattr(after, f"{key}_token_id") == getattr(before, f"{key}_token_id")
        assert after.chat_template == before.chat_template
        assert after.get_vocab() == before.get_vocab()


def test_a_tokenizer_json_alone(tmp_path):
    write(tmp_path / "published", FAMILIES["smollm2"]())
    tokenizer = load_tokenizer(tmp_path / "published" / "tokenizer.json")
    theirs = exported(tokenizer, tmp_path / "out")
    assert_alike(tokenizer, theirs, TEXTS[:600])
    assert theirs.eos_token == "<|im_end|>"


def test_what_cannot_be_expressed_is_refused(tmp_path):
    with pytest.raises(UserError, match="unigram tokenizer has no exact Hugging Face form"):
        write_huggingface_tokenizer(ours("sentencepiece", algorithm="unigram"), tmp_path / "a")
    fields = {"user_defined_symbols": "<x>", "add_dummy_prefix": False}
    (tmp_path / "b.model").write_bytes(sentencepiece_model(**fields))
    with pytest.raises(UserError, match="symbols that are not learned"):
        write_huggingface_tokenizer(load_tokenizer(tmp_path / "b.model"), tmp_path / "b")


def test_a_family_that_reads_tokenizers_its_own_way(tmp_path):
    """Transformers makes a Qwen2Tokenizer of any qwen2 model's, whatever tokenizer.json says."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tokenizer = ours("sentencepiece")
    with pytest.raises(UserError, match="any 'qwen2' model"):
        write_huggingface_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "So it would be otherwise."
    assert theirs(text, add_special_tokens=False).input_ids != tokenizer.encode(text).tolist()
    for model_type in ("gpt2", "llama", "mistral", "qwen3", "gemma2", "bert", "roberta"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert_alike(tokenizer, exported(tokenizer, tmp_path), TEXTS[:50])
