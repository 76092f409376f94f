"""Too long an example: its fields are cut at their ends, and nothing that stands around them."""

import dataclasses
import json

import numpy as np
import pytest
from data_helpers import data_config
from published_folders import FAMILIES, write

from lm_jax.config import TokenizerConfig
from lm_jax.data.encoding import encode_example, prompt_within, text_to_classify
from lm_jax.data.examples import Example
from lm_jax.data.sources import documents
from lm_jax.data.tokenizer import load_tokenizer, train_tokenizer
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "The old man sat, 12 hours long, by the sea — and waited. " * 20
BYTES = BytesTokenizer()


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "chatml"])
def tokenizer(request, tmp_path_factory):
    if request.param == "bytes":
        return BYTES
    if request.param == "sentencepiece":
        return train_tokenizer(TokenizerConfig(vocab_size=350), [TEXT, "User: Assistant:\n"] * 3)
    folder = tmp_path_factory.mktemp("chat") / "model"
    write(folder, FAMILIES["smollm2"]() | {"chat_template.jinja": CHATML})
    return load_tokenizer(folder)


def examples(tmp_path, record, **changes):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return list(documents(data_config(str(path), **changes), "train"))


def said(tokenizer, ids):
    """The text with what special tokens are called."""
    names, text, run = tokenizer.specials, "", []
    for i in [*ids.tolist(), None]:
        if i in names or i is None:
            text, run = text + tokenizer.decode(run) + names.get(i, ""), []
        else:
            run.append(i)
    return text


@pytest.mark.parametrize("objective", ["complete", "chat"])
def test_only_the_longest_field_loses_its_end(objective, tokenizer, tmp_path):
    record = {"text": TEXT, "question": "Who sat?", "answer": "the man"}
    (example,) = examples(
        tmp_path, record, objective=objective, target="{answer}",
        prompt="Read this. <<{text}>> Then: {question} Say it.",
    )  # fmt: skip
    whole, cut = prompt_within(example, tokenizer, 10_000)
    assert not cut
    frame = said(tokenizer, whole).split(TEXT)
    for budget in (150, 200, 307):
        ids, cut = prompt_within(example, tokenizer, budget)
        assert cut and budget - budget // 64 - 3 <= len(ids) <= budget
        text = said(tokenizer, ids)
        assert text.startswith(frame[0]) and text.endswith(frame[1])
        kept = text[len(frame[0]) : len(text) - len(frame[1])]
        assert kept and TEXT.startswith(kept)
        # In training it is the same: of a row the prompt has what the target leaves of it.
        config = data_config("", length=budget + 10, objective=objective)
        pairs_P3, is_whole = encode_example(example, tokenizer, config)
        assert not is_whole and len(pairs_P3) <= budget + 10
        counted = pairs_P3[pairs_P3[:, 2] == 1, 1]
        assert "the man" in said(tokenizer, counted)
        learned = said(tokenizer, pairs_P3[: np.argmax(pairs_P3[:, 2]) + 1, 0])
        assert learned.startswith(frame[0]) and learned.endswith(frame[1])
        room = budget + 11 - len(counted)
        np.testing.assert_array_equal(
            prompt_within(example, tokenizer, room)[0],
            pairs_P3[: np.argmax(pairs_P3[:, 2]) + 1, 0],
        )


def test_fields_of_one_length_are_cut_alike(tmp_path):
    record = {"a": "x" * 90, "b": "y" * 100, "c": "z" * 9, "d": "1"}
    (example,) = examples(tmp_path, record, objective="complete", prompt="{a}|{b}|{c}",
                          target="{d}")  # fmt: skip
    ids, cut = prompt_within(example, BYTES, 82)
    assert cut and BYTES.decode(ids) == "x" * 35 + "|" + "y" * 35 + "|" + "z" * 9


def test_a_prompt_keeps_half_of_the_row_and_the_target_loses_its_end():
    config = data_config("", length=40, objective="complete")
    pairs_P3, whole = encode_example(Example("p" * 30, ("t" * 60,)), BYTES, config)
    assert not whole and len(pairs_P3) == 40 and pairs_P3[:, 2].sum() == 21
    assert pairs_P3[:20, 0].tolist() == [256, *b"p" * 19]
    pairs_P3, whole = encode_example(Example("p" * 9, ("t" * 60,)), BYTES, config)
    assert not whole and pairs_P3[:, 2].sum() == 31  # a short one is whole, and the target has more


def talk(*contents):
    roles = ["system"] + ["user", "assistant"] * (len(contents) // 2)
    return tuple({"role": r, "content": c} for r, c in zip(roles, contents, strict=True))


def test_a_conversation_loses_its_oldest_exchanges_and_then_the_end_of_the_question(tokenizer):
    messages = talk("Be kind.", "one " * 20, "two " * 20, "and three " * 30, "four")
    example = Example("", ("four",), messages=messages)
    for count, whole in ((0, True), (2, False)):
        shorter = dataclasses.replace(example, messages=(messages[0], *messages[1 + count :]))
        ids, cut = prompt_within(shorter, tokenizer, 10_000)
        got, cut = prompt_within(example, tokenizer, len(ids))
        assert cut != whole
        np.testing.assert_array_equal(got, ids)
    ids, cut = prompt_within(example, tokenizer, len(ids) - 20)
    text = said(tokenizer, ids)
    assert cut and "Be kind." in text and "two" not in text and "and three and three" in text
    end = "Assistant:" if text.endswith("Assistant:") else "assistant\n"
    assert text.endswith(end)
    pairs_P3, whole = encode_example(example, tokenizer, data_config("", length=len(ids) + 5,
                                                                     objective="chat"))  # fmt: skip
    assert not whole and "four" in said(tokenizer, pairs_P3[pairs_P3[:, 2] == 1, 1])


def test_what_may_not_be_cut_and_is_too_long_is_said(tmp_path):
    record = {"q": "why?", "a": "so"}
    config = {"objective": "complete", "prompt": "x" * 50 + "{q}", "target": "{a}"}
    (example,) = examples(tmp_path, record, **config)
    with pytest.raises(UserError, match="cannot be shortened to 51 tokens"):
        prompt_within(example, BYTES, 51)
    assert len(prompt_within(example, BYTES, 52)[0]) == 52
    with pytest.raises(UserError, match=r"a\.jsonl:1: it is too long, .*data\.on_error"):
        example.bad("it is too long, and so on")


def test_a_text_to_classify_is_cut_inside_its_field(tmp_path):
    config = {"objective": "classify", "labels": ("a", "b"), "target": "{l}"}
    record = {"t": "x" * 99, "l": "a"}
    (example,) = examples(tmp_path, record, prompt="Is it so? {t} Yes:", **config)
    ids, whole = text_to_classify(example, BYTES, 32)
    assert not whole and BYTES.decode(ids) == "Is it so? " + "x" * 15 + " Yes:"
    (example,) = examples(tmp_path, record, prompt="{t}", **config)
    ids, whole = text_to_classify(example, BYTES, 32)
    assert not whole and BYTES.decode(ids) == "x" * 30
