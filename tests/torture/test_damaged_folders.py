"""What fuzzing found in the folders of models and of runs: each is a message, and comes at once."""

import json
import random

import pytest

from lm_jax.config import Config, DataConfig
from lm_jax.config_json import from_json
from lm_jax.data.tokenizer import load_tokenizer
from lm_jax.errors import UserError
from lm_jax.interop.config_map import family_of, read_config
from lm_jax.interop.family import shortest_pattern
from lm_jax.training import workdir
from lm_jax.training.metrics import _drop_after
from lm_jax.validation import validate

VOCABULARY = {"a": 0, "b": 1, "[UNK]": 2, "</s>": 3, "<s>": 4}
WORDS = {"type": "WordPiece", "vocab": VOCABULARY, "unk_token": "[UNK]",
         "continuing_subword_prefix": "##", "max_input_chars_per_word": 9}  # fmt: skip
BERT = {"type": "BertProcessing", "sep": ["</s>", 3], "cls": ["<s>", 4]}


def folder_of(path, model=WORDS, config=None, **definition):
    (path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": model} | definition)
    )
    (path / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return path


@pytest.mark.parametrize(
    ("model", "config", "definition", "said"),
    [
        (WORDS | {"vocab": VOCABULARY | {"x": 2**26}}, {}, {}, "no vocabulary is as large"),
        (WORDS, {"eos_token": {"content": ["a"]}}, {}, "eos_token is neither text nor a token"),
        (WORDS, {"chat_template": "\ud800"}, {}, "not a JSON object"),
        (WORDS, {}, {"post_processor": BERT | {"sep": ["</s>", 99]}}, "id 99 is not in the vocab"),
        (WORDS, {"tokenizer_class": "LlamaTokenizer"}, {"added_tokens": 3}, "tokenizer.json"),
        (WORDS | {"vocab": []}, {}, {}, "can read"),
    ],
    ids=range(6),
)
def test_a_tokenizer_of_which_something_is_wrong(model, config, definition, said, tmp_path):
    with pytest.raises(UserError, match=said):
        load_tokenizer(folder_of(tmp_path, model, config, **definition))
    (tmp_path / "config.json").write_text('{"model_type": ["gpt2"]}')
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_fails_at_a_text(tmp_path):
    vocabulary = {k: i for i, k in enumerate(("a", "b", "<s>"))}  # without the unknown token
    tokenizer = load_tokenizer(folder_of(tmp_path, WORDS | {"vocab": vocabulary}))
    assert tokenizer.encode("a").tolist() == [0]
    for ask in (tokenizer.encode, tokenizer.locate, lambda text: tokenizer.encode_batch([text])):
        with pytest.raises(UserError, match="cannot encode the text"):
            ask("z")


def test_a_post_processor_is_what_the_library_takes_it_for(tmp_path):
    """It tells by the fields what has no type."""
    untold = {key: value for key, value in BERT.items() if key != "type"}
    tokenizer = load_tokenizer(folder_of(tmp_path, post_processor=untold))
    assert tokenizer.frame(tokenizer.encode("a")).tolist() == [4, 0, 3]


def test_the_shortest_pattern_of_many_layers():
    rng = random.Random(0)
    for _ in range(300):
        windows = [rng.choice((0, 8)) for _ in range(rng.randrange(1, 12))] * rng.choice((1, 2, 3))
        windows = windows[: len(windows) - rng.randrange(len(windows))]
        wanted = next(
            p
            for p in range(1, len(windows) + 1)
            if all(w == windows[i % p] for i, w in enumerate(windows))
        )
        assert shortest_pattern(windows) == (tuple(windows[:wanted]) if any(windows) else ())
    assert len(shortest_pattern([8] * 299_999 + [0])) == 300_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"data": {"length": ' + b"9" * 5000 + b"}}", "thousands of digits"),
        (b'{"data": {"length": 1, "length": 2}}', "stands there twice"),
        (b'{"' + b"x" * 90_000 + b'": 1}', "no config key"),
        (b'{"data": {"sources": "' + b"x" * 90_000 + b'"}}', "must be tuple"),
    ],
    ids=range(6),
)
def test_a_config_of_a_run_that_is_none(content, said, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json.*{said}") as e:
        workdir.read_config(str(tmp_path))
    assert len(str(e.value)) < 1000


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architectures": ["BertFor" + "9" * 9000]}, r"'BertFor9+.*9' is not supported"),
        ({"hidden_act": "gelu" + "9" * 9000}, "activation.*gelu9+"),
    ],
)
def test_what_a_config_has_too_long_is_not_all_quoted(changed, said):
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 8,
              "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
              "intermediate_size": 8, "max_position_embeddings": 8, "type_vocab_size": 2,
              "layer_norm_eps": 1e-12}  # fmt: skip
    config |= changed
    with pytest.raises(UserError, match=said) as e:
        read_config(family_of(config, "config.json"), config, "config.json")
    assert len(str(e.value)) < 2000


@pytest.mark.parametrize("rows", [2**31 - 1, 2**31, 2**63 - 1, 2**63])
def test_a_batch_of_any_size_is_refused_or_shared_out_at_once(rows):
    config = Config(data=DataConfig(sources=("x",), batch_size=rows))
    if rows >= 2**31:
        with pytest.raises(UserError, match=r"data\.batch_size"):
            validate(config)
    else:
        assert validate(config).data.lanes == 1  # it is a prime


def test_lanes_are_the_largest_part_of_a_batch_that_there_may_be():
    for rows in range(1, 200, 7):
        lanes = validate(Config(data=DataConfig(sources=("x",), batch_size=rows))).data.lanes
        most = max(16, rows // 4)
        assert lanes == max(n for n in range(1, most + 1) if rows % n == 0)


def test_lines_of_metrics_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "step": 1}\n'
    path.write_bytes(b'\xff\n[1]\n{"step": []}\n' + good + b"[" * 50_000 + b'\n{"kind": "tra')
    assert _drop_after(str(path), 9) == {("train", 1)} and path.read_bytes() == good


def test_a_number_that_is_none_in_a_config_is_no_crash():
    with pytest.raises(UserError, match="must be"):
        from_json('{"data": {"length": NaN}}')
