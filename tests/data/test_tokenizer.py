"""Tokenizers give back what they were given, whatever that is."""

import io
import json
import pickle
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from lm_jax.config import TokenizerConfig
from lm_jax.data.tokenizer import load_tokenizer, spread, train_tokenizer
from lm_jax.data.tokenizer_published import HuggingFaceTokenizer
from lm_jax.errors import UserError

CORPUS = [
    "def area(width, height):\n    '''The area of a rectangle.'''\n    return width * height\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, x):\n"
    "        self.items.append(x)\n        return len(self.items)\n",
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!\n",
    "for i in range(1234567890):\n\tif i % 3 == 0:\n\t\tprint(f'{i:>10}', \"é ü ñ 日本語\")\r\n",
] * 3

NASTY = [
    "",
    " ",
    "   leading, trailing   ",
    "a\u2581b",
    "\u2581",
    "\u2581\u2581 \u2581",
    "\0",
    "a\0\0b",
    "tab\t\ttab",
    "\r\n\r\r\n\n",
    "<s>x</s><unk><pad><0x0A><|endoftext|>[CLS]",
    "\u0301\u0308lone combining",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f4\U000e0067",
    "\ue000\uf8ff\U0010fffd",
    "\ufffd \ufeff \u2585 \u2047 \u00a0 \u3000 \u2028",
    "ﬁ Å Å 한국어 \u202eright to left",
    "x" * 5000,
]


def nasty_texts(count: int = 60) -> list[str]:
    """Strings of pieces that tokenizers have stumbled over, and of any code points at all."""
    rng = random.Random(7)
    atoms = [t for t in NASTY if 0 < len(t) < 60] + ["def", " self", "    ", "\n", "the", "日", "é"]

    def any_character() -> str:
        code = rng.choice([rng.randrange(0x110000), rng.randrange(0x3000), rng.randrange(0x80)])
        return chr(code) if not 0xD800 <= code < 0xE000 else "\u2581"

    return [
        "".join(rng.choice([rng.choice(atoms), any_character()]) for _ in range(rng.randrange(30)))
        for _ in range(count)
    ]


ALL_TEXTS = NASTY + nasty_texts()


def trained(kind: str, **fields):
    config = TokenizerConfig(kind=kind, **({"vocab_size": 380} | fields))
    documents = CORPUS if kind != "characters" else CORPUS + ALL_TEXTS
    return train_tokenizer(config, documents)


def published(folder, kind: str):
    """Writes a small tokenizer.json as people publish them, and loads it."""
    if kind == "byte_level":
        hf = tokenizers.Tokenizer(models.BPE())
        hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        hf.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "byte_fallback":
        hf = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        hf.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        hf.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)],
            show_progress=False,
        )
    elif kind == "metaspace":
        hf = tokenizers.Tokenizer(models.BPE())
        hf.pre_tokenizer = pre_tokenizers.Metaspace()
        hf.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    else:
        hf = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        hf.normalizer = normalizers.BertNormalizer()
        hf.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        hf.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=200,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
            show_progress=False,
        )
    hf.train_from_iterator(CORPUS, trainer)
    hf.enable_truncation(5)
    hf.enable_padding(length=8)
    folder.mkdir(exist_ok=True)
    text = hf.to_str()
    if kind == "byte_fallback":  # the byte pieces belong to the model, not to the special tokens
        definition = json.loads(text)
        definition["added_tokens"] = [t for t in definition["added_tokens"] if t["id"] < 3]
        text = json.dumps(definition)
    (folder / "tokenizer.json").write_text(text)
    return load_tokenizer(folder)


EXACT = ["bpe", "unigram", "bytes", "characters", "byte_level", "byte_fallback"]
ALL = [*EXACT, "metaspace", "word_piece"]


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            if name in ("bpe", "unigram"):
                size = 380 if name == "bpe" else 340
                made[name] = trained("sentencepiece", algorithm=name, vocab_size=size)
            elif name in ("bytes", "characters"):
                made[name] = trained(name)
            else:
                made[name] = published(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


@pytest.mark.parametrize("name", EXACT)
def test_any_text_comes_back(make, name):
    tokenizer = make(name)
    for text in ALL_TEXTS:
        if name == "byte_fallback" and "\u2581" in text:
            continue  # as published: Llama 2 reads U+2581 as a space
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
        assert tokenizer.decode(ids) == text
        expected = len(text.encode()) + (tokenizer.prefix_bytes if text else 0)
        assert tokenizer.byte_lengths[ids].sum() == expected


@pytest.mark.parametrize("name", ALL)
def test_several_texts_at_once_are_the_same(make, name):
    tokenizer = make(name)
    for text, ids in zip(ALL_TEXTS, tokenizer.encode_batch(ALL_TEXTS), strict=True):
        assert ids.dtype == np.int32
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("name", ["bpe", "unigram", "byte_level", "word_piece"])
def test_text_never_becomes_a_special(make, name):
    tokenizer = make(name)
    reserved = {tokenizer.bos_id, tokenizer.eos_id}
    assert None not in reserved
    for text in ["<s></s>", "<unk><pad>", "a <|endoftext|> b", "[CLS] x [SEP]"]:
        assert not reserved & set(tokenizer.encode(text).tolist())


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_sentencepiece_never_needs_the_unknown_piece(make, name):
    tokenizer = make(name)
    unknown = next(i for i, s in tokenizer.specials.items() if s == "<unk>")
    assert all(unknown not in tokenizer.encode(text) for text in ALL_TEXTS)


@pytest.mark.parametrize("name", ALL)
def test_streaming_is_decoding(make, name):
    tokenizer = make(name)
    rng = np.random.default_rng(3)
    batches = [tokenizer.encode(text) for text in (ALL_TEXTS if name in EXACT else CORPUS)]
    batches += [rng.integers(-1, tokenizer.vocab_size + 1, n) for n in range(80)]
    for ids in batches:
        stream = tokenizer.stream()
        parts = [stream.push(int(i)) for i in ids]
        assert "".join(parts) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", EXACT)
def test_streaming_holds_back_half_a_character(make, name):
    text = "\U0001f469\u200d\U0001f467 é日\u0e01 \U0001f3f4"
    tokenizer = make(name) if name != "characters" else train_tokenizer(
        TokenizerConfig(kind="characters"), [text]
    )  # fmt: skip
    stream = tokenizer.stream()
    shown = ""
    for i in tokenizer.encode(text):
        shown += stream.push(int(i))
        assert text.startswith(shown)
    assert shown == text


@pytest.mark.parametrize("name", ALL)
def test_specials_stand_for_no_text(make, name):
    tokenizer = make(name)
    inside = tokenizer.encode("return")
    framed = [i for i in (tokenizer.bos_id, *inside, tokenizer.eos_id) if i is not None]
    assert tokenizer.decode(framed) == tokenizer.decode(inside) == "return"
    for i in tokenizer.specials:
        assert tokenizer.decode([i]) == ""
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size


def test_invalid_utf8_reads_as_replacement_characters(make):
    for name in ("bytes", "bpe"):
        tokenizer = make(name)
        ids = list(tokenizer.encode("\u2581"))  # three bytes
        assert len(ids) == 3
        assert tokenizer.decode(ids[1:]).strip("\ufffd") == ""
        assert tokenizer.decode([*ids[:1], *tokenizer.encode("9")]) == "\ufffd9"
        assert tokenizer.decode([tokenizer.vocab_size, -1]) == "\ufffd\ufffd"


@pytest.mark.parametrize("name", ALL)
def test_saving_and_pickling_keep_everything(make, name, tmp_path):
    tokenizer = make(name)
    tokenizer.save(tmp_path / "t")
    load_tokenizer(tmp_path / "t").save(tmp_path / "again")
    for other in (load_tokenizer(tmp_path / "again"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.fingerprint == tokenizer.fingerprint
        assert (other.kind, other.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
        assert (other.bos_id, other.eos_id, other.pad_id) == (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.pad_id,
        )
        for text in CORPUS:
            np.testing.assert_array_equal(other.encode(text), tokenizer.encode(text))
        pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
        assert [other.piece(i) for i in range(other.vocab_size)] == pieces


def test_fingerprints_differ(make):
    assert len({make(name).fingerprint for name in ALL}) == len(ALL)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_training_is_deterministic(algorithm):
    def train():
        return trained("sentencepiece", algorithm=algorithm, vocab_size=330)

    assert train().fingerprint == train().fingerprint


def test_training_is_quiet_and_reads_only_its_share(capfd):
    seen, progress = [], []

    def documents():
        for i in range(100):
            seen.append(i)
            yield CORPUS[i % 4]

    config = TokenizerConfig(vocab_size=360, train_bytes=1000)
    train_tokenizer(config, documents(), on_progress=progress.append)
    assert capfd.readouterr() == ("", "")
    assert len(seen) < 20
    assert progress[-1] == 1000 and progress == sorted(progress)


def test_long_lines_are_learned_from():
    for repeats in (200, 2000):
        text = "lorem ipsum dolor \U0001f600\U0001f600\U0001f600 " * repeats
        tokenizer = train_tokenizer(TokenizerConfig(vocab_size=292), [text])
        assert len(tokenizer.encode(" lorem ipsum dolor")) == 3
    text = "\U0001f600" * 3999  # four bytes each, in one sentence
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=262), [text])
    assert len(tokenizer.encode("\U0001f600\U0001f600")) == 1


def test_whitespace_runs_are_pieces(make):
    assert len(make("bpe").encode("        ")) < 4


def test_shakespeare_like_characters():
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), ["hello", " world\n"])
    assert tokenizer.vocab_size == len(set("hello world\n"))
    assert tokenizer.bos_id is tokenizer.eos_id is None
    assert tokenizer.encode("\n d").tolist() == [0, 1, 2]
    assert tokenizer.decode([tokenizer.pad_id]) == "\n"  # padding is a real character here


def test_word_piece_has_no_byte_lengths(make):
    with pytest.raises(UserError, match="bits per byte is undefined"):
        _ = make("word_piece").byte_lengths


def test_published_tokenizers_are_followed(make, tmp_path):
    """The ids are the library's own, without the truncation and padding stored in the file."""
    for name in ("byte_level", "byte_fallback", "metaspace", "word_piece"):
        tokenizer = make(name)
        tokenizer.save(tmp_path / name)
        hf = tokenizers.Tokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
        hf.no_truncation()
        hf.no_padding()
        for text in CORPUS:
            ids = hf.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text).tolist() == ids
            assert tokenizer.decode(ids) == hf.decode(ids)


def test_well_known_names(make):
    byte_level, llama, bert = make("byte_level"), make("byte_fallback"), make("word_piece")
    assert byte_level.bos_id == byte_level.eos_id == 0
    assert (llama.bos_id, llama.eos_id) == (1, 2)
    assert (bert.pad_id, bert.bos_id, bert.eos_id) == (0, 2, 3)


def test_the_files_beside_say_which_specials(tmp_path):
    published(tmp_path, "byte_fallback")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<s>"}))
    assert load_tokenizer(tmp_path).eos_id == 1
    stated = {"bos_token": None, "eos_token": {"content": "<unk>", "lstrip": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    assert load_tokenizer(tmp_path).eos_id == 1  # an older tokenizer's: the map counts
    stated["added_tokens_decoder"] = {"0": {"content": "<unk>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = load_tokenizer(place)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(UserError, match="<nowhere>"):
        load_tokenizer(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path).specials[400] == "<nowhere>"  # Transformers adds it
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not a JSON object"):
        load_tokenizer(tmp_path)


def test_a_published_sentencepiece_model(tmp_path):
    """With a dummy prefix, normalization and no byte fallback, as T5's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=90, minloglevel=2, bos_id=-1
    )
    path = tmp_path / "spiece.model"
    path.write_bytes(model.getvalue())
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for place in (path, tmp_path):
        tokenizer = train_tokenizer(TokenizerConfig(kind="file", path=str(place)), [])
        assert (tokenizer.bos_id, tokenizer.eos_id) == (None, reference.eos_id())
        assert tokenizer.prefix_bytes == 1
        text = "The quick brown fox"
        ids = tokenizer.encode(text)
        assert ids.tolist() == reference.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text) + 1


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_a_vocabulary_too_large_names_the_largest(algorithm):
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size = 8192 .* at most \d+") as error:
        trained("sentencepiece", algorithm=algorithm, vocab_size=8192)
    largest = int(str(error.value).split("at most ")[1].split(",")[0])
    size = trained("sentencepiece", algorithm=algorithm, vocab_size=largest).vocab_size
    assert size == largest


def test_a_vocabulary_too_small_names_the_least():
    with pytest.raises(UserError, match=r"tokenizer\.vocab_size = 200 .* need \d+") as error:
        trained("sentencepiece", vocab_size=200)
    least = int(str(error.value).split("need ")[1].split(";")[0])
    assert trained("sentencepiece", vocab_size=least + 1).vocab_size == least + 1


@pytest.mark.parametrize("kind", ["sentencepiece", "characters"])
@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
def test_an_empty_corpus(kind, documents):
    with pytest.raises(UserError, match="empty"):
        train_tokenizer(TokenizerConfig(kind=kind), documents)


def test_the_documents_own_error_comes_through():
    def documents():
        yield "text"
        raise UserError("corpus.jsonl:7: not JSON")

    with pytest.raises(UserError, match=r"corpus\.jsonl:7"):
        train_tokenizer(TokenizerConfig(), documents())


@pytest.mark.parametrize("name", ALL)
def test_lone_surrogates_are_named(make, name):
    with pytest.raises(UserError, match=r"U\+D83D.* position 4 \(line 2, column 2\)"):
        make(name).encode("ab\nc\ud83d")
    with pytest.raises(UserError, match=r"U\+D83D.* position 4 \(line 2, column 2\)"):
        make(name).encode_batch(["a", "ab\nc\ud83d"])


@pytest.mark.parametrize("kind", ["sentencepiece", "characters"])
def test_lone_surrogates_in_the_corpus(kind):
    with pytest.raises(UserError, match=r"U\+DC00"):
        train_tokenizer(TokenizerConfig(kind=kind), ["fine", "broken \udc00"])


def test_an_unknown_character_is_named():
    tokenizer = train_tokenizer(TokenizerConfig(kind="characters"), ["abc\n"])
    with pytest.raises(UserError, match=r"'z' \(U\+007A\) at position 5 \(line 2, column 2\)"):
        tokenizer.encode("abc\nazz")
    with pytest.raises(UserError, match=r"U\+1F600"):  # beyond the last character of the vocabulary
        tokenizer.encode("\U0001f600")


def test_files_that_are_no_tokenizers(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json: there is no such"):
        load_tokenizer(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="nowhere: there is no such"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found neither"):
        load_tokenizer(tmp_path)
    for content in (b"", b"\0\xff not a model", b'{"json": 1}'):
        (tmp_path / "a.model").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.model: not a SentencePiece model"):
            load_tokenizer(tmp_path / "a.model")
    (tmp_path / "b.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"more than one: a\.model, b\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes\.txt: not a tokenizer"):
        load_tokenizer(tmp_path / "notes.txt")
    for content, message in ((b"\xff", "not UTF-8"), (b"[]", "can read"), (b"{}", "can read")):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(UserError, match=rf"tokenizer\.json:.*{message}"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["bpe", "characters", "byte_level"])
def test_a_saved_tokenizer_that_was_damaged(make, name, tmp_path):
    make(name).save(tmp_path)
    meta = tmp_path / "lm_jax_tokenizer.json"
    saved = json.loads(meta.read_text())
    meta.write_text(json.dumps(saved | {"fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="fingerprint"):
        load_tokenizer(tmp_path)
    meta.write_text(json.dumps(saved | {"kind": "morse"}))
    with pytest.raises(UserError, match="'morse'"):
        load_tokenizer(tmp_path)
    for content in ("{", "[]", "{}", '{"kind": "characters", "fingerprint": ""}'):
        meta.write_text(content)
        with pytest.raises(UserError, match="damaged"):
            load_tokenizer(tmp_path)
    meta.write_text(json.dumps(saved))
    for data in [*tmp_path.glob("tokenizer.*")]:
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        with pytest.raises(UserError, match=data.name):
            load_tokenizer(tmp_path)
        data.unlink()
        with pytest.raises(UserError, match=data.name):
            load_tokenizer(tmp_path)


def test_a_sample_is_spread_over_the_corpus():
    documents = [f"{i:04d}" * 25 for i in range(1000)]  # 100 bytes each
    taken = list(spread(documents, 5000))
    assert len(taken) == 50
    places = sorted(int(t[:4]) for t in taken)
    assert max(b - a for a, b in zip([0, *places], [*places, 1000], strict=True)) < 60
    assert taken == list(spread(documents, 5000))
    assert sorted(spread(documents, 10**9)) == documents
    assert list(spread([], 10)) == []
    big = list(spread(["é" * 10**6, "x" * 10**6], 400_000))
    assert [len(t.encode()) for t in big] == [200_000, 200_000]


def test_text_with_reserved_characters_is_learned_from():
    """The trainer would skip each sentence with a U+2585, and take U+2581 for a space."""
    for character in "\0\u2581\u2585":
        documents = [f"lorem{character} ipsum{character}dolor"] * 20
        tokenizer = train_tokenizer(TokenizerConfig(vocab_size=280), documents)
        assert len(tokenizer.encode("lorem")) == 1
        pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
        assert "' dolor'" not in pieces


def test_only_the_first_bytes_of_a_long_document_are_learned_from():
    config = TokenizerConfig(vocab_size=285, train_bytes=1002)
    text = "lorem ipsum é" * 100
    kept = text.encode()[:1002].decode(errors="ignore")
    long, short = train_tokenizer(config, [text]), train_tokenizer(config, [kept])
    assert long.fingerprint == short.fingerprint
    other = train_tokenizer(config, [kept[:-300] + "dolor sit " * 30])
    assert other.fingerprint != short.fingerprint


def test_digits_stand_alone():
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=286), ["in 1984 and 2024 it was\n"] * 50)
    assert len(tokenizer.encode("1984")) == 4
    assert len(tokenizer.encode(" was\n")) < 5


def test_added_tokens_that_are_not_special_are_text(make, tmp_path):
    make("byte_level").save(tmp_path)
    (tmp_path / "lm_jax_tokenizer.json").unlink()
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    hf.add_tokens(["<é>", "   "])
    hf.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "a<é>b   c"
    ids = tokenizer.encode(text)
    assert len(ids) == 5
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].tolist() == [1, 4, 1, 3, 1]


def test_a_saved_tokenizer_keeps_having_no_bos(tmp_path):
    published(tmp_path, "byte_fallback")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").bos_id is None


@pytest.mark.parametrize(
    "name", ["bpe", "unigram", "bytes", "characters", "byte_level", "metaspace"]
)
def test_whitespace_begins_a_word(make, name):
    tokenizer = make(name)
    ids = tokenizer.encode(" def push(self, x):\n    return x")
    starts = tokenizer.starts_word
    assert starts.dtype == bool and starts.shape == (tokenizer.vocab_size,)
    words, word = [], []
    for i in ids.tolist():
        if starts[i] and word:
            words.append(tokenizer.decode(word))
            word = []
        word.append(i)
    words.append(tokenizer.decode(word))
    joined = [w.strip() for w in words if w.strip()]
    assert joined == ["def", "push(self,", "x):", "return", "x"]
    assert starts[list(tokenizer.specials)].all()


def test_word_pieces_that_continue_a_word(make):
    tokenizer = make("word_piece")
    ids = tokenizer.encode("unquickly items")
    pieces = [tokenizer.piece(int(i)) for i in ids]
    assert [not p.startswith("##") for p in pieces] == tokenizer.starts_word[ids].tolist()
    assert sum(tokenizer.starts_word[ids]) == 2 < len(ids)
    assert tokenizer.starts_word[list(tokenizer.specials)].all()


def test_words_cannot_be_told_where_only_their_ends_are_marked():
    hf = tokenizers.Tokenizer(models.BPE({"a</w>": 0, "a": 1, "<|endoftext|>": 2}, []))
    hf.decoder = decoders.BPEDecoder(suffix="</w>")
    with pytest.raises(UserError, match="where a word begins"):
        _ = HuggingFaceTokenizer(hf.to_str()).starts_word


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "characters"])
def test_a_mask_token_on_request(kind, tmp_path):
    config = TokenizerConfig(kind=kind, vocab_size=380)
    documents = ["a <mask> or [MASK] in text\n", *CORPUS]
    plain = train_tokenizer(config, documents)
    masked = train_tokenizer(config, documents, mask=True)
    assert plain.mask_id is None
    assert plain.fingerprint != masked.fingerprint
    assert masked.vocab_size == plain.vocab_size + (kind != "sentencepiece")
    assert masked.specials[masked.mask_id] == "<mask>"
    assert masked.starts_word[masked.mask_id]
    text = documents[0]
    ids = masked.encode(text)
    assert masked.mask_id not in ids
    assert masked.decode(ids) == masked.decode([masked.mask_id, *ids, masked.mask_id]) == text
    assert masked.byte_lengths[masked.mask_id] == 0
    masked.save(tmp_path)
    for again in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(masked))):
        assert again.mask_id == masked.mask_id
        assert again.fingerprint == masked.fingerprint
    from_file = TokenizerConfig(kind="file", path=str(tmp_path))
    assert train_tokenizer(from_file, [], mask=True).mask_id == masked.mask_id


def test_the_mask_token_of_published_tokenizers(tmp_path):
    published(tmp_path, "word_piece")
    file = TokenizerConfig(kind="file", path=str(tmp_path))
    with pytest.raises(UserError, match="no mask token"):
        train_tokenizer(file, [], mask=True)
    hf = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    hf.add_special_tokens(["[MASK]", "[HIDE]"])
    hf.save(str(tmp_path / "tokenizer.json"))
    tokenizer = train_tokenizer(file, [], mask=True)
    assert tokenizer.mask_id == hf.token_to_id("[MASK]")
    tokenizer.save(tmp_path / "saved")
    for again in (load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert again.mask_id == tokenizer.mask_id
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"mask_token": "[HIDE]"}))
    other = load_tokenizer(tmp_path)
    assert other.mask_id == hf.token_to_id("[HIDE]")
    assert other.fingerprint != tokenizer.fingerprint
