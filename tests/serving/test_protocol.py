"""What a request may say, and what is said of one that may not be carried out."""

import json
import random

import pytest

from lm_jax.generation.sampling import Sampling
from lm_jax.serving.protocol import ApiError, parse

HI = [{"role": "user", "content": "hi"}]


def read(chat: bool = False, **fields):
    fields = ({"messages": HI} if chat else {"prompt": "hi"}) | fields
    return parse(json.dumps(fields).encode(), chat=chat, model="tiny", max_tokens=100)


def test_what_is_left_out():
    request = read()
    assert request.prompts == ("hi",) and request.max_tokens == 16
    assert request.sampling == Sampling(top_k=0)
    assert not request.stream and request.stop == ()
    assert read(True).max_tokens == 100 and read(True).messages == tuple(HI)
    assert len({read().seeds for _ in range(5)}) == 5  # another one each time
    assert len(set(read(prompt=["a", "a", "a"]).seeds)) == 3
    assert read(prompt=["a", "a"], seed=7).seeds == (7, 7)


def test_what_is_given():
    request = read(
        temperature=0.5,
        top_p=1,
        top_k=3,
        min_p=0.25,
        repetition_penalty=1.5,
        stop="x",
        seed=2**32 - 1,
    )
    assert request.sampling == Sampling(0.5, 3, 1.0, 0.25, 1.5)
    assert request.stop == ("x",) and request.seeds == (2**32 - 1,)
    assert read(stop=["a", "b"]).stop == ("a", "b") and read(stop=[]).stop == ()
    assert read(True, max_completion_tokens=3, max_tokens=5).max_tokens == 3
    assert read(stream=True, stream_options={"include_usage": True}).include_usage
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts, "name": "me", "tool_calls": None}
    wanted = ({"role": "user", "content": "a\nb", "name": "me"},)
    assert read(True, messages=[message]).messages == wanted
    developer = {"role": "developer", "content": "Be brief."}
    assert read(True, messages=[developer, *HI]).messages == (developer, *HI)
    assert read(prompt=[1, 0, 2**31 - 1]).prompts == ((1, 0, 2**31 - 1),)
    several = read(prompt=[[1, 2], [3]])
    assert several.prompts == ((1, 2), (3,)) and len(several.seeds) == 2


def test_what_asks_for_nothing_is_taken():
    nothing = {
        "n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "echo": False,
        "logprobs": None, "logit_bias": {}, "suffix": "", "user": "me", "metadata": {"a": "b"},
    }  # fmt: skip
    assert read(**nothing).prompts == ("hi",)
    nothing = {"logprobs": False, "tools": [], "tool_choice": "none", "store": False}
    assert read(True, **nothing, response_format={"type": "text"}).chat


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("prompt", None, "prompt: is missing"),
        ("prompt", [], "prompt: must be a string, a list of strings"),
        ("prompt", [1, "a"], "prompt: must be a string, a list of strings, a list of token ids"),
        ("prompt", [1, True], "prompt: must be a string"),
        ("prompt", [1, 2.0], "prompt: must be a string"),
        ("prompt", [1, -1], "prompt: must be a string"),
        ("prompt", [2**31], "prompt: must be a string"),
        ("prompt", [[]], "prompt: must be a string"),
        ("prompt", [[1], 2], "prompt: must be a string"),
        ("prompt", [[1], "a"], "prompt: must be a string"),
        ("prompt", {"a": 1}, "prompt: must be a string"),
        ("max_tokens", 0, "max_tokens: must be an integer from 1 to 100, not 0"),
        ("max_tokens", 101, "max_tokens: must be an integer from 1 to 100"),
        ("max_tokens", 2.0, "max_tokens: must be an integer"),
        ("max_tokens", True, "max_tokens: must be an integer"),
        ("max_tokens", "9", "max_tokens: must be an integer"),
        ("max_completion_tokens", 5, "max_completion_tokens: there is no such field"),
        ("temperature", -1, "temperature: must be at least 0"),
        ("temperature", "hot", "temperature: must be a number"),
        ("temperature", 10**400, "temperature: must be a number"),
        ("top_p", 0, "top_p: must be above 0"),
        ("top_p", [1], "top_p: must be a number"),
        ("top_k", -1, "top_k: must be an integer from 0"),
        ("min_p", 1.5, "min_p: must be from 0"),
        ("repetition_penalty", 0, "repetition_penalty: must be from 0.01"),
        ("seed", -1, "seed: must be an integer from 0 to 4294967295"),
        ("seed", 2**32, "seed: must be an integer"),
        ("stop", "", "stop: up to 4 strings that are not empty"),
        ("stop", ["a"] * 5, "stop: up to 4"),
        ("stop", [1], "stop: must be a string or a list of strings"),
        ("stream", "yes", "stream: must be true or false"),
        ("stream_options", [], "stream_options: must be an object"),
        ("stream_options", {"usage": True}, "stream_options.usage: is not supported"),
        ("n", 2, "n: is not supported"),
        ("n", True, "n: is not supported"),
        ("best_of", 3, "best_of: is not supported"),
        ("presence_penalty", 0.5, "presence_penalty: is not supported"),
        ("frequency_penalty", -1, "frequency_penalty: is not supported"),
        ("logprobs", 3, "logprobs: is not supported"),
        ("logprobs", 0, "logprobs: is not supported"),
        ("logit_bias", {"5": 1}, "logit_bias: is not supported"),
        ("suffix", "x", "suffix: is not supported"),
        ("echo", True, "echo: is not supported"),
        ("messages", HI, "messages: is for /v1/chat/completions"),
        ("beams", 4, "beams: there is no such field"),
    ],
)
def test_a_field_that_is_wrong_is_named(field, value, said):
    with pytest.raises(ApiError, match=rf"^{said}") as e:
        read(**{field: value})
    assert e.value.status == 400 and e.value.body()["error"]["type"] == "invalid_request_error"
    assert e.value.param.split(".")[0] == field


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("messages", [], "messages: must be a list of at least one"),
        ("messages", "hi", "messages: must be a list"),
        ("messages", ["hi"], r"messages\[0\]: must be an object"),
        ("messages", [*HI, {"content": "x"}], r"messages\[1\].role: must be one of system, dev"),
        ("messages", [{"role": "tool", "content": "x"}], r"messages\[0\].role"),
        ("messages", [{"role": "user"}], r"messages\[0\].content: must be a string"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], r".*content: must be"),
        ("messages", [HI[0] | {"tool_calls": [1]}], r"messages\[0\].tool_calls: is not supported"),
        ("messages", [HI[0] | {"name": 5}], r"messages\[0\].name: must be a string"),
        ("prompt", "hi", "prompt: is for /v1/completions"),
        ("logprobs", True, "logprobs: is not supported"),
        ("tools", [{"type": "function"}], "tools: is not supported"),
        ("tool_choice", "required", "tool_choice: is not supported"),
        ("response_format", {"type": "json_object"}, "response_format: is not supported"),
    ],
)
def test_a_field_of_a_chat_that_is_wrong_is_named(field, value, said):
    with pytest.raises(ApiError, match=rf"^{said}") as e:
        read(True, **{field: value})
    assert e.value.status == 400 and e.value.param.startswith(field)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "1e999 is too large"),
        (b'{"prompt": "a", "seed": -Infinity}', "-Infinity is no JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' stands there twice"),
        (b'{"prompt": "a", "metadata": {"a": 1, "a": 1}}', "the key 'a' stands there twice"),
        (b"[" * 100_000, "not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_body_that_is_no_object(body, said):
    with pytest.raises(ApiError, match=said) as e:
        parse(body, chat=False, model="tiny", max_tokens=100)
    assert e.value.status == 400


def test_another_model():
    assert read(model="tiny").prompts
    with pytest.raises(ApiError, match="no model 'gpt-4' here; this server has 'tiny'") as e:
        read(model="gpt-4")
    assert (e.value.status, e.value.param, e.value.code) == (404, "model", "model_not_found")


def test_no_depth_is_too_much():
    """Where it can still be read, it can be told that it is wrong."""
    for depth in range(850, 1010):
        with pytest.raises(ApiError) as e:
            parse(
                b'{"prompt": %s}' % (b"[" * depth + b"]" * depth),
                chat=False,
                model="",
                max_tokens=1,
            )
        assert e.value.status == 400


def test_what_is_quoted_of_a_request_is_bounded():
    for fields in ({"model": "m" * 9000}, {"x" * 9000: 1}, {"stop": ["s" * 9000] * 5}):
        with pytest.raises(ApiError) as e:
            read(**fields)
        assert len(json.dumps(e.value.body())) < 2500


def test_damaged_bodies_are_read_or_refused():
    """Bytes are lost, added and changed."""
    rng, read_ones = random.Random(2), 0
    bodies = [
        {"prompt": ["hi", "\ud83d\ude00"], "max_tokens": 3, "stop": ["a"], "seed": 1, "top_p": 0.5},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "n": 1},
        {"prompt": [[1, 2], [3]], "stream": True, "stream_options": {"include_usage": True}},
    ]
    pieces = [b'"', b"\\", b"{", b"[", b"]", b"}", b",", b":", b"e99", b"-", b"9" * 30, b"null",
              b"\xff", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"1", b".", b"\x00", b" "]  # fmt: skip
    for i in range(4000):
        data = bytearray(json.dumps(bodies[i % 3]).encode())
        for _ in range(rng.randrange(1, 3)):
            place = rng.randrange(len(data))
            data[place : place + rng.randrange(3)] = rng.choice([b"", *pieces])
        try:
            read_ones += bool(parse(bytes(data), chat=i % 3 == 1, model="m", max_tokens=9))
        except ApiError as e:
            assert e.status == 400
            json.dumps(e.body())
    assert 100 < read_ones < 3000


def any_value(rng: random.Random, depth: int = 0):
    simple = [None, True, False, 0, 1, -1, 0.5, 2**33, 1e300, "", "hi", "\ud800", "tiny", "text"]
    if depth > 2 or rng.random() < 0.6:
        return rng.choice(simple)
    if rng.random() < 0.5:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    keys = ["role", "content", "type", "text", "include_usage", "name"]
    return {rng.choice(keys): any_value(rng, depth + 1) for _ in range(rng.randrange(3))}


def test_whatever_it_says_it_is_read_or_refused():
    rng, read_ones = random.Random(0), 0
    names = [
        *("prompt", "messages", "model", "max_tokens", "temperature", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "seed", "stop", "stream", "stream_options", "n", "logprobs"),
        *("echo", "tools", "user", "response_format", "logit_bias", "x"),
    ]
    for i in range(4000):
        chat = i % 2 == 0
        fields = {"messages": HI} if chat else {"prompt": "hi"}
        fields |= {rng.choice(names): any_value(rng) for _ in range(rng.randrange(4))}
        try:
            request = read(chat, **fields)
        except ApiError as e:
            assert e.status in (400, 404)
            json.dumps(e.body())
        else:
            read_ones += 1
            assert request.max_tokens >= 1 and (request.prompts or request.messages)
    assert 500 < read_ones < 3500
