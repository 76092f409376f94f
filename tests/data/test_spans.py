"""Windows of a question and a part of its context: nothing is lost, answers are where they were."""

import itertools
import json

import numpy as np
import pytest
from data_helpers import data_config

from lm_jax.config import TokenizerConfig
from lm_jax.data.examples import Example
from lm_jax.data.loader import train_stream
from lm_jax.data.sources import documents
from lm_jax.data.spans import CONTEXT, FIRST, LAST, windows, with_length
from lm_jax.data.tokenizer import train_tokenizer
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError

TEXT = "Der Bär, größer als gedacht, aß 12 Äpfel — und schlief.\nDann kam 熊猫 vorbei 🐼."


def wordpiece():
    """A lowercasing WordPiece with BERT's frame, made of the words of TEXT."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    from lm_jax.data.tokenizer_published import HuggingFaceTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted(
        set("der bar, großer als gedacht aß 12 apfel — und schlief. dann kam 熊猫 vorbei wo?")
    )
    pieces += [c for c in letters if c != " "] + ["##" + c for c in letters if c != " "]
    made = tokenizers.Tokenizer(
        models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]")
    )
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    made.add_special_tokens(pieces[:5])
    return HuggingFaceTokenizer(made.to_str(), bos_id=2, eos_id=3, pad_id=0, mask_id=4)


def sentencepiece():
    return train_tokenizer(TokenizerConfig(vocab_size=320), [TEXT] * 20)


TOKENIZERS = {
    "bytes": BytesTokenizer,
    "characters": lambda: CharacterTokenizer(sorted(set(TEXT + "Wo?"))),
    "sentencepiece": sentencepiece,
    "wordpiece": wordpiece,
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]()


def config(**changes):
    defaults = {
        "objective": "extract",
        "prompt": "{question}",
        "context": "{context}",
        "target": "{answers}",
        "length": 48,
        "stride": 12,
    }
    return data_config("none", **(defaults | changes))


def test_tokens_stand_where_their_text_does(tokenizer):
    ids, spans = tokenizer.locate(TEXT)
    assert ids.tolist() == tokenizer.encode(TEXT).tolist() and spans.shape == (len(ids), 2)
    assert (np.diff(spans[:, 0]) >= 0).all() and (spans[:, 1] >= spans[:, 0]).all()
    covered = {c for a, b in spans for c in range(a, b)}
    assert covered >= {i for i, c in enumerate(TEXT) if not c.isspace()}
    for id, (a, b) in zip(ids, spans):
        said = tokenizer.decode([id]).strip().removeprefix("##")
        if said and "\ufffd" not in said and id not in tokenizer.specials:
            assert said in (
                TEXT[a:b].strip(),
                TEXT[a:b].strip().lower().replace("ä", "a").replace("ö", "o"),
            ), (said, TEXT[a:b])
    assert [len(x) for x in tokenizer.locate("")] == [0, 0]


@pytest.mark.parametrize("answer", ["Bär", "12 Äpfel", "熊猫", "vorbei 🐼."])
def test_an_answer_is_in_a_window_or_its_first_token_says_that_it_is_not(tokenizer, answer):
    example = Example("Wo?", (answer,), context=TEXT, start=TEXT.index(answer))
    made, seen, there = list(windows(example, tokenizer, config())), set(), 0
    for window in made:
        assert len(window.ids) <= 48
        pairs = window.pairs(example)
        first, last = np.flatnonzero(pairs[:, 1] & FIRST), np.flatnonzero(pairs[:, 1] & LAST)
        assert len(first) == len(last) == 1 and pairs[:, 2].sum() == pairs[first[0], 2] == 1
        seen |= {tuple(s) for s in window.spans if s[0] >= 0}
        inside = window.spans[:, 0] >= 0
        assert (pairs[inside, 1] & CONTEXT > 0).all() and not (
            pairs[: inside.argmax(), 1] & CONTEXT
        ).any()
        if inside[first[0]]:
            there += 1
            found = TEXT[window.spans[first[0], 0] : window.spans[last[0], 1]]
            assert answer in found and len(found.strip()) <= len(answer) + 3
        else:
            assert first[0] == last[0] == 0
    assert there and seen == {tuple(s) for s in tokenizer.locate(TEXT)[1]}


def test_windows_share_what_is_asked_for():
    spans = [w.spans[w.spans[:, 0] >= 0] for w in windows(
        Example("Wo?", ("Bär",), context=TEXT), BytesTokenizer(), config()
    )]  # fmt: skip
    assert len(spans) > 1
    for a, b in itertools.pairwise(spans):
        assert a[-12:].tolist() == b[:12].tolist()


def test_what_windows_cannot_share_is_refused_and_shorter_ones_share_less():
    example, bytes_ = Example("Wo?", ("Bär",), context=TEXT * 4), BytesTokenizer()
    with pytest.raises(UserError, match=r"data\.length = 48 tokens have room for 42 .* share 42"):
        list(windows(example, bytes_, config(stride=42)))
    for length in range(32, 64):
        shorter = with_length(config(stride=40), length)
        made = list(windows(example, bytes_, shorter))
        seen = np.concatenate([w.spans[w.spans[:, 0] >= 0] for w in made])
        assert {tuple(s) for s in seen} == {tuple(s) for s in bytes_.locate(example.context)[1]}
        assert max(len(w.ids) for w in made) == length and shorter.stride == min(40, length // 2)


def test_a_published_frame_is_that_of_the_library():
    tokenizer = wordpiece()
    ids, place = tokenizer.frame_pair(tokenizer.encode("wo?"), tokenizer.encode("der bar"))
    theirs = tokenizer._hf.encode("wo?", "der bar")
    assert ids.tolist() == theirs.ids and theirs.type_ids.index(1) == place


def record(**changes):
    return {"question": "Wo?", "context": "Da ist da.", "answers": ["da"]} | changes


@pytest.mark.parametrize(
    ("wrong", "starts", "said"),
    [
        (record(answers=["dort"]), "", "the answer 'dort' is no part of the context"),
        (record(at=[0]), "at", "at character 0 of the context stands 'Da' and not the answer 'da'"),
        (record(at=[-1]), "at", "at character -1"),
        (record(at=["7"]), "at", "'at' must be a number or several"),
        (record(), "at", "no key 'at'"),
    ],
)
def test_an_answer_that_is_not_there_is_scored_by_and_not_learned(wrong, starts, said, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record(at=[7])) + "\n" + json.dumps(wrong) + "\n")
    data = config(sources=(str(path),), answer_starts=starts, shuffle=False, epochs=1)
    found = documents(data, "train")
    assert found[0].start == 7 and found[1].targets == tuple(wrong["answers"])
    with (
        train_stream(data, BytesTokenizer(), seed=0) as stream,
        pytest.raises(UserError, match=r"a\.jsonl:2") as e,
    ):
        list(stream)
    assert said in str(e.value)
    data.on_error = "skip"
    with train_stream(data, BytesTokenizer(), seed=0) as stream:
        assert sum(b["weights"].sum() for b in stream) == 1


@pytest.mark.parametrize("nothing", [[], [""], ""])
def test_that_there_is_no_answer_is_said_and_learned(nothing, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record(context=TEXT, answers=nothing)) + "\n")
    data = config(sources=(str(path),), epochs=1)
    with pytest.raises(UserError, match=r"a\.jsonl:1: .* empty: .*data\.unanswerable=True"):
        documents(data, "train")
    data.unanswerable = True
    (example,) = documents(data, "train")
    assert example.targets == ("",)
    made = list(windows(example, BytesTokenizer(), data))
    for window in made:
        pairs = window.pairs(example)
        assert pairs[0, 1] & (FIRST | LAST) == FIRST | LAST and not (pairs[1:, 1] & FIRST).any()
    with train_stream(data, BytesTokenizer(), seed=0) as stream:
        assert sum(b["weights"].sum() for b in stream) == len(made) > 1


def test_in_words_no_answer_is_an_end_at_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record(answers=[])) + "\n")
    for objective in ("complete", "chat"):
        data = config(
            sources=(str(path),), objective=objective, context="", unanswerable=True, epochs=1,
            turns="together" if objective == "chat" else None,
        )  # fmt: skip
        with train_stream(data, BytesTokenizer(), seed=0) as stream:
            (batch,) = stream
        told = batch["targets"][batch["weights"] > 0].tolist()
        assert told == ([257] if objective == "complete" else [*b" ", 257])


def test_windows_are_packed_and_each_counts_once(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record(context=TEXT, answers=["Bär"])) + "\n")
    data = config(sources=(str(path),), epochs=1, lanes=1, batch_size=4, length=64)
    with train_stream(data, BytesTokenizer(), seed=0) as stream:
        batches = list(stream)
    count = len(list(windows(documents(data, "train")[0], BytesTokenizer(), data)))
    assert sum(b["weights"].sum() for b in batches) == count > 1
