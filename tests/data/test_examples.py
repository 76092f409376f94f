"""Examples: made of records' fields, wrong ones named by their place, encoded as they are asked."""

import json

import numpy as np
import pytest
from data_helpers import data_config
from published_folders import FAMILIES
from published_folders import write as write_folder

from lm_jax.config import Config
from lm_jax.data import records
from lm_jax.data.encoding import conversation, encode_example, prompt_within
from lm_jax.data.examples import Example
from lm_jax.data.loader import train_stream
from lm_jax.data.readers import Errors
from lm_jax.data.sources import documents, texts
from lm_jax.data.tokenizer import load_tokenizer
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError
from lm_jax.template import Template
from lm_jax.validation import validate

TOKENIZER = BytesTokenizer()
BOS, EOS = 256, 257
SQUAD = {
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "A cat sat.",
                    "qas": [
                        {"id": "q", "question": "Who?", "answers": [
                            {"text": "cat", "answer_start": 2}, {"text": "A cat", "answer_start": 0}
                        ]}
                    ],
                }
            ],
        }
    ]
}  # fmt: skip


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def complete(source, **changes):
    defaults = {"objective": "complete", "prompt": "{q}?", "target": "{a}", "length": 32}
    return data_config(source, **(defaults | changes))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"q": "1, 2", "a": "x"}\n\n{"q": "\\u00e9", "a": 2}\n'),
        ("a.csv", 'q,a\n"1, 2",x\n\n\u00e9,2\n'),
        ("a.tsv", "q\ta\n1, 2\tx\n\u00e9\t2\n"),
        ("a.json", [{"q": "1, 2", "a": "x"}, {"q": "\u00e9", "a": 2}]),
        ("a.json", {"version": 1, "data": [{"q": "1, 2", "a": "x"}, {"q": "\u00e9", "a": 2}]}),
        ("a.json", '{"q": "1, 2", "a": "x"}\n\n{"q": "\u00e9", "a": 2}\n'),
    ],
)
def test_every_form_of_records_gives_the_same_examples(name, content, tmp_path):
    found = documents(complete(write(tmp_path, name, content)), "train")
    assert list(found) == [
        Example("1, 2?", ("x",), fields=((0, 4),)),
        Example("\u00e9?", ("2",), fields=((0, 1),)),
    ]
    folder = documents(complete(str(tmp_path)), "train")
    assert list(folder) == list(found)
    assert list(texts(complete(str(tmp_path)), "train")) == ["1, 2?\nx", "\u00e9?\n2"]


def test_quotes_of_a_tsv_are_quotes(tmp_path):
    """As those of a text; in CSV they are what a column stands in."""
    path = write(tmp_path, "a.tsv", 'q\ta\nb\t"c\nd\te\nf\tg"\n')
    found = documents(complete(path), "train")
    assert [(e.prompt, *e.targets) for e in found] == [("b?", '"c'), ("d?", "e"), ("f?", 'g"')]
    path = write(tmp_path, "a.csv", 'q,a\nb,"c\nd,e\nf,g"\n')
    (found,) = documents(complete(path), "train")
    assert found.targets == ("c\nd,e\nf,g",)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_field_may_be_long(name, tmp_path):
    text, mark = "word " * 40_000, "\t" if name.endswith(".tsv") else ","
    (found,) = documents(complete(write(tmp_path, name, f"q{mark}a\n{text}{mark}x\n")), "train")
    assert found.prompt == text + "?" and found.targets == ("x",)


def test_parquet_gives_them_too(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"q": ["a", "b"], "n": [1, 2], "a": [["x"], ["y", "z"]]}),
                   tmp_path / "a.parquet")  # fmt: skip
    found = documents(complete(str(tmp_path / "a.parquet")), "train")
    assert [(e.prompt, e.targets) for e in found] == [("a?", ("x",)), ("b?", ("y", "z"))]
    with pytest.raises(UserError, match="no column 'c'; columns: q, n, a"):
        documents(complete(str(tmp_path / "a.parquet"), prompt="{c}"), "train")


def test_squad_is_flat_and_has_all_answers(tmp_path):
    source = write(tmp_path, "squad.json", SQUAD)
    config = complete(source, prompt="{context} {question}", target="{answers}")
    (found,) = documents(config, "train")
    assert found == Example("A cat sat. Who?", ("cat", "A cat"), fields=((0, 10), (11, 15)))
    (record,) = records.read_json(source, Errors("raise"))
    assert record["answer_starts"] == [2, 0] and record["id"] == "q"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"q": "1", "a": "x"}\n{"q": "1"}\n', r"a\.jsonl:2: no key 'a'; keys: q\."),
        (
            "a.jsonl",
            '{"q": "1", "a": null}\n',
            r"a\.jsonl:1: 'a' must be text or a number, not null",
        ),
        ("a.jsonl", '{"q": "1", "a": []}\n', r"a\.jsonl:1: 'a' is empty: there is nothing"),
        ("a.jsonl", "{}\n", r"a\.jsonl:1: no key 'q'; keys: none"),
        ("a.json", [{"q": "1", "a": "x"}, {}], r"a\.json: record 2: no key 'q'; keys: none"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: a JSON object is wanted, not a list"),
        ("a.csv", "q,a\n1\n", r"a\.csv:2: 1 columns, and the first line has 2"),
        ("a.csv", "q,q\n1,2\n", r"a\.csv:1: two columns have the same name"),
        ("a.csv", "q,b\n1,2\n", r"a\.csv: no column 'a'; columns: q, b"),
        ("a.csv", 'q,a\n"1,2\n', r"a\.csv:\d: not CSV"),
        (
            "a.json",
            {"data": [{"paragraphs": [{"qas": [{}]}]}]},
            r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: not in the form of SQuAD",
        ),
        ("a.json", [{}, 2], r"a\.json: record 2: an object is wanted, not a number"),
        ("a.json", {"data": [2]}, r"a\.json: data: record 1: an object is wanted"),
        ("a.json", 2, r"a\.json: a list of objects is wanted, not a number"),
        ("a.json", json.dumps(SQUAD)[:-9], r"a\.json: not JSON: .*line 1 column \d+"),
        ("a.json", json.dumps(SQUAD, indent=1)[:-9], r"a\.json: not JSON: .*line \d\d column"),
        ("a.json", '[\n{"q": "1", "a": "2"},\n', r"a\.json: not JSON: .*line 3"),
        ("a.json", '{"q": "1"\n{"q": "1", "a": "2"}\n', r"a\.json:1: not JSON: .*object a line"),
        ("a.json", [1], r"a\.json: record 1: an object is wanted, not a number"),
        ("a.txt", "text", r"a\.txt: objective 'complete' is about records"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(name, content, said, tmp_path):
    config = complete(write(tmp_path, name, content))
    with pytest.raises(UserError, match=said):
        list(documents(config, "train"))


def test_what_is_wrong_can_be_skipped(tmp_path):
    lines = ['{"q": "1", "a": "x"}', "no", '{"q": "2"}', "{}", '{"q": "3", "a": "z"}']
    source = write(tmp_path, "a.jsonl", "\n".join(lines))
    found = documents(complete(source, on_error="skip"), "train")
    assert [e.targets for e in found] == [("x",), (), (), (), ("z",)]
    assert found.errors.count == 3


def test_an_article_of_squad_that_is_none_is_skipped_at_its_place(tmp_path):
    source = write(tmp_path, "a.json", {"data": [{"paragraphs": 1}, *SQUAD["data"], {}]})
    config = complete(source, prompt="{context} {question}", target="{answers}", on_error="skip")
    found = documents(config, "train")
    assert [bool(e.targets) for e in found] == [False, True, False] and found.errors.count == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "q,a\n1,x\n1,2,3\n3,z\n"),
        ("a.tsv", "q\ta\n1\tx\n1\n3\tz\n"),
        ("a.json", [{"q": "1", "a": "x"}, 2, {"q": "3", "a": "z"}]),
    ],
)
def test_what_a_file_has_no_record_of_is_skipped_at_its_place(name, content, tmp_path):
    """And counted as any other that is skipped."""
    found = documents(complete(write(tmp_path, name, content), on_error="skip"), "train")
    assert [e.targets for e in found] == [("x",), (), ("z",)] and found.errors.count == 1
    of, i = found[2].origin
    assert of.place(i).endswith((f"{name}:4", f"{name}: record 3"))


def test_labels_are_numbers_or_names(tmp_path):
    source = write(tmp_path, "a.csv", "text,label\na,1\nb,bad\n")
    config = complete(source, objective="classify", prompt="{text}", target="{label}",
                      labels=("bad", "good"), pooling="first")  # fmt: skip
    assert [(e.label, e.targets) for e in documents(config, "train")] == [
        (1, ("good",)),
        (0, ("bad",)),
    ]
    config.labels = ("bat", "god")
    with pytest.raises(UserError, match=r"a\.csv:3: 'bad' is none of .*did you mean 'bat'"):
        list(documents(config, "train"))


@pytest.mark.parametrize(
    ("labels", "values", "want"),
    [
        (("1", "2", "3"), [0, 1, 2, "1", "2", "3"], [0, 1, 2, 0, 1, 2]),
        (("0", "1"), ["1", 1, [0, 1]], [1, 1, 0]),
        (("bad", "good"), [1, "1", "good"], [1, 1, 1]),
        (("1", "2", "3"), [3], "no class of the number 3: .* are 0 to 2, and a name stands in q"),
        (("1", "2", "3"), ["0"], r"'0' is none of data\.labels"),
        (("1", "2", "x"), ["0"], r"'0' is none of data\.labels"),
        (("bad", "good"), [-1], "no class of the number -1"),
        (("bad", "good"), ["2"], "no class of the number 2"),
        (("bad", "good"), [1.0], r"'1\.0' is none of data\.labels"),
    ],
)
def test_an_integer_is_the_number_of_a_class_and_a_text_its_name(labels, values, want, tmp_path):
    """Names may be digits, as those of stars that a review gives."""
    lines = "\n".join(json.dumps({"text": "a", "label": x}) for x in values)
    source = write(tmp_path, "a.jsonl", lines)
    config = complete(source, objective="classify", prompt="{text}", target="{label}",
                      labels=labels, pooling="first")  # fmt: skip
    if isinstance(want, str):
        with pytest.raises(UserError, match=r"a\.jsonl:1: .*" + want):
            list(documents(config, "train"))
        return
    found = list(documents(config, "train"))
    assert [e.label for e in found] == want
    assert [e.targets for e in found] == [(labels[i],) for i in want]


def test_a_name_of_a_class_can_be_made_of_a_number(tmp_path):
    source = write(tmp_path, "a.jsonl", '{"text": "a", "label": 1}\n')
    config = complete(source, objective="classify", prompt="{text}", target="{label} stars",
                      labels=("1 stars", "2 stars"), pooling="first")  # fmt: skip
    assert documents(config, "train")[0].label == 0


@pytest.mark.parametrize("text", ["{", "}", "{a.b}", "{a[0]}", "{}", "{a!r}", "{a:3}", "{0}"])
def test_a_template_names_fields_and_nothing_else(text):
    with pytest.raises(UserError, match=r"^data\.prompt: "):
        Template(text, "data.prompt")
    assert Template("{{{a}}} {a}", "k").fill({"a": "{b}"}) == ("{{b}} {b}", ((1, 4), (6, 9)))


def test_the_target_alone_counts_and_continues_what_is_generated_from():
    config, example = complete("", length=64), Example("ab", ("xyz", "other"))
    pairs_P3, whole = encode_example(example, TOKENIZER, config)
    prompt, cut = prompt_within(example, TOKENIZER, 3)
    assert whole and not cut and prompt.tolist() == [BOS, *b"ab"]
    assert pairs_P3[:, 0].tolist() == [BOS, *b"abxyz"]
    assert pairs_P3[:, 1].tolist() == [*b"abxyz", EOS]
    assert pairs_P3[:, 2].tolist() == [0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(("token", "place"), [("first", 0), ("last", -1)])
def test_one_token_tells_the_class(token, place):
    config = complete("", objective="classify", pooling=token, length=6)
    for text, whole in (("abc", True), ("abcdefgh", False)):
        pairs_P3, got = encode_example(Example(text, ("good",), 3), TOKENIZER, config)
        assert got == whole
        assert pairs_P3[:, 0].tolist() == [BOS, *text.encode()[:4], EOS]
        assert pairs_P3[:, 2].nonzero()[0].tolist() == [place % len(pairs_P3)]
        assert pairs_P3[place, 1] == 3


def test_what_the_assistant_says_counts():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "so"},
        {"role": "assistant", "content": "no"},
    ]
    ids, counts = conversation(messages, TOKENIZER)
    said = "".join(chr(i) if i < 256 else "|" for i in ids)
    assert said == "|User: hi\nAssistant: ho|User: so\nAssistant: no|"
    assert "".join(c for c, n in zip(said, counts) if n) == " ho| no|"
    prompt, cut = prompt_within(Example("", ("no",), messages=tuple(messages)), TOKENIZER, 64)
    assert not cut and prompt.tolist() == ids[: np.flatnonzero(counts)[4]].tolist()


def test_what_the_assistant_says_unasked_is_not_learned():
    talk = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "so"}]
    ids, counts = conversation([*talk, {"role": "assistant", "content": "no"}], TOKENIZER)
    assert bytes(ids[counts][:-1].tolist()) == b" no"


CHANGES_ITS_MIND = (  # as templates that leave an earlier turn's thoughts out
    "{% for m in messages %}{{ m.role }}{{ '\n' }}{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last %} indeed{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{{ '\n' }}{% endif %}"
)


def test_an_answer_that_reads_otherwise_later_is_learned_by_itself(tmp_path):
    write_folder(
        tmp_path / "model", FAMILIES["smollm2"]() | {"chat_template.jinja": CHANGES_ITS_MIND}
    )
    tokenizer = load_tokenizer(tmp_path / "model")
    roles = ("user", "assistant", "user", "assistant")
    talk = [{"role": r, "content": c} for r, c in zip(roles, ("a", "b", "c", "d"))]
    source = write(tmp_path, "a.jsonl", json.dumps({"m": talk}))
    config = complete(source, objective="chat", prompt="{m}", target="", turns="together")
    with (
        train_stream(config, tokenizer, seed=0) as stream,
        pytest.raises(UserError, match=r"a\.jsonl:1: .*message 2 .* data\.turns='apart'"),
    ):
        next(stream)
    config.turns = "apart"
    with train_stream(config, tokenizer, seed=0) as stream:
        (batch,) = stream
    told = [tokenizer.decode(row[counts]) for row, counts in zip(batch["targets"],
                                                                 batch["weights"] > 0)]  # fmt: skip
    assert sorted("".join(told).split("\n")) == ["", "b indeed", "d indeed"]


def test_conversations_are_read_up_to_what_the_assistant_says(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [{"m": [*talk, {"role": "user", "content": "c"}]}, {"m": talk[:1]}]
    source = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)))
    found = documents(complete(source, objective="chat", prompt="{m}", target=""), "train")
    assert list(found[0].messages) == talk and found[0].targets == ("b",)
    with pytest.raises(UserError, match=r"a\.jsonl:2: 'm' has no message of the role 'assistant'"):
        found[1]
    source = write(tmp_path, "b.jsonl", json.dumps({"m": talk[1:]}))
    with pytest.raises(UserError, match=r"b\.jsonl:1: 'm': the assistant speaks first"):
        documents(complete(source, objective="chat", prompt="{m}", target=""), "train")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": "", "tool_calls": [{"id": "1"}]}, "message 2 has 'tool_calls', which would"),
        ({"content": "b", "reasoning_content": "c"}, "message 2 has 'reasoning_content'"),
        ({"content": "b", "weight": 0}, "message 2 has 'weight'"),
        ({"content": " "}, "message 2, the assistant's, is empty"),
    ],
)
def test_what_a_message_says_beside_its_content_is_not_lost_silently(message, said, tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", **message}]
    more = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    for name, messages in (("last.jsonl", talk), ("before.jsonl", talk + more)):
        source = write(tmp_path, name, json.dumps({"m": messages}))
        with pytest.raises(UserError, match=rf"{name}:1: 'm': {said}"):
            documents(complete(source, objective="chat", prompt="{m}", target=""), "train")


def test_what_a_message_does_not_say_is_left_out(tmp_path):
    talk = [
        {"role": "user", "content": "a", "name": "Ann", "tool_calls": None, "date": "today"},
        {"role": "assistant", "content": "b", "tool_calls": [], "weight": 1},
    ]
    source = write(tmp_path, "a.jsonl", json.dumps({"m": talk}))
    (example,) = documents(complete(source, objective="chat", prompt="{m}", target=""), "train")
    assert example.messages == (
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b"},
    )


def test_what_cannot_be_encoded_is_named_by_its_place_or_left_out(tmp_path):
    """Here a character that the vocabulary lacks, which is only known when it is encoded."""
    lines = [json.dumps({"q": q, "a": "ab"}) for q in ("a", "\u00e9", "b")]
    tokenizer, source = CharacterTokenizer("ab?"), write(tmp_path, "a.jsonl", "\n".join(lines))
    with (
        train_stream(complete(source, shuffle=False), tokenizer, seed=0) as stream,
        pytest.raises(UserError, match=r"a\.jsonl:2: the character '\\xe9'.*on_error"),
    ):
        list(stream)
    with train_stream(complete(source, on_error="skip"), tokenizer, seed=0) as stream:
        assert sum(batch["weights"].sum() for batch in stream) == 4  # 'ab' twice


def test_nothing_to_learn_ends_a_run(tmp_path):
    source = write(tmp_path, "a.jsonl", json.dumps({"q": "a", "a": ""}))
    config = complete(source, epochs=None, on_error="skip", unanswerable=True)
    with (
        train_stream(config, CharacterTokenizer("a?"), seed=0) as stream,
        pytest.raises(UserError, match="nothing to predict"),
    ):
        next(stream)


def test_batches_of_examples_are_the_same_on_any_number_of_processes(tmp_path):
    lines = [json.dumps({"q": "a" * (i % 5), "a": "b" * (i % 7 + 1)}) for i in range(50)]
    config = complete(write(tmp_path, "a.jsonl", "\n".join(lines)), length=16, epochs=None)
    with train_stream(config, TOKENIZER, seed=0) as alone:
        batches = [next(alone) for _ in range(3)]
        state = alone.get_state()
        after = next(alone)
    assert all(b["weights"].sum() < (b["segments"] > 0).sum() for b in batches)
    for batch in batches:
        counts = batch["weights"] > 0
        assert set(batch["targets"][counts].tolist()) == {ord("b"), EOS}
    with train_stream(config, TOKENIZER, seed=0) as again:
        again.set_state(state)
        for key, value in next(again).items():
            np.testing.assert_array_equal(value, after[key])
    halves = [train_stream(config, TOKENIZER, seed=0, process_index=i, process_count=2)
              for i in range(2)]  # fmt: skip
    joined = [next(h) for h in halves]
    for half in halves:
        half.close()
    for key, value in batches[0].items():
        np.testing.assert_array_equal(np.concatenate([h[key] for h in joined]), value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.prompt": "{q}"}, "data.prompt: objective 'next_token' has none"),
        ({"data.objective": "complete"}, "data.prompt: say which field of a record"),
        ({"data.objective": "complete", "data.prompt": "{q", "data.target": "{a}"},
         "data.prompt: '{q'"),
        ({"data.objective": "complete", "data.prompt": "{q}", "data.target": "{a}",
          "data.packing": "crop"}, "data.packing: must be 'first_fit' for examples"),
        ({"data.objective": "chat", "data.prompt": "x {m}"}, "names the field of a conversation"),
        ({"data.objective": "classify", "data.prompt": "{q}", "data.target": "{a}",
          "model.head": "classify", "model.causal": False}, "data.labels: name the classes"),
        ({"data.unanswerable": True}, "data.unanswerable: objective 'next_token' has no answers"),
        ({"data.objective": "chat", "data.prompt": "{m}", "data.unanswerable": True},
         "data.unanswerable: objective 'chat' has no answers"),
        ({"data.turns": "apart"}, "data.turns: objective 'next_token' has no conversations"),
        ({"data.objective": "chat", "data.prompt": "{m}", "data.turns": "together",
          "model.prefix_attention": True}, "data.turns: with model.prefix_attention"),
        ({"data.labels": ("a", "b")}, "data.labels: objective 'next_token' has no classes"),
        ({"model.head": "classify", "model.labels": 1}, "model.labels: a head 'classify' has two"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_said(changes, said):
    config = Config()
    config.data.sources = ("a.jsonl",)
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    with pytest.raises(UserError) as e:
        validate(config)
    assert said in str(e.value), e.value
