"""What the server answers, as clients see it."""

import json
import re
import socket
import threading
import urllib.request

import commands
import openai
import pytest
from tiny_serving import (
    TEMPLATE,
    USER,
    call,
    chat,
    complete,
    held,
    model_of,
    raw,
    serving,
    slowed,
    streamed,
    until,
)

from lm_jax.data.chat import ChatTemplate
from lm_jax.data.tokenizer_base import BytesTokenizer
from lm_jax.generation.decoding import Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.serving import service
from lm_jax.serving.service import Limits


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as made:
        made.service.warm_up()
        yield made


@pytest.fixture(autouse=True)
def nothing_is_said_to_the_log(capfd):
    """A traceback is a defect, whatever a client did."""
    yield
    assert "Traceback" not in capfd.readouterr().err


def alone(model, prompt: str, **arguments):
    sampling = {"sampling": Sampling(top_k=0), "max_tokens": 100} | arguments
    return Generator(model, BytesTokenizer()).generate([prompt], **sampling)[0]


def test_a_completion_is_that_of_the_generator(server, model):
    wanted = alone(model, "hi", seed=5, max_tokens=130)
    status, got = complete(server, seed=5, max_tokens=130)
    assert status == 200 and got["object"] == "text_completion" and got["model"] == "tiny"
    choice = got["choices"][0]
    assert choice["text"] == wanted.text
    assert choice["finish_reason"] == {"eos": "stop"}.get(
        wanted.finish_reason, wanted.finish_reason
    )
    tokens = len(wanted.tokens)
    assert got["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": tokens,
        "total_tokens": 3 + tokens,
    }
    several = complete(server, prompt=["hi", "hi"], seed=5, max_tokens=130)[1]
    assert [c["text"] for c in several["choices"]] == [wanted.text] * 2
    assert [c["index"] for c in several["choices"]] == [0, 1]
    assert several["usage"]["prompt_tokens"] == 6


def test_a_chat_is_the_completion_of_what_the_template_makes(server):
    rendered = ChatTemplate(TEMPLATE, {}).render([USER], True)
    assert rendered == "user: hi\nassistant: "
    arguments = {"seed": 1, "max_tokens": 20}
    got = chat(server, **arguments)[1]
    assert got["object"] == "chat.completion"
    message = got["choices"][0]["message"]
    assert message["role"] == "assistant"
    # A prompt begins with bos, and what a template makes with what it says.
    ids = len(BytesTokenizer().encode(rendered))
    assert got["usage"]["prompt_tokens"] == ids
    parts = [{"type": "text", "text": "hi"}]
    same = chat(server, messages=[{"role": "user", "content": parts}], **arguments)[1]
    assert same["choices"][0]["message"] == message


def test_a_prompt_may_be_token_ids(server):
    ids = BytesTokenizer().encode_prompt("hi").tolist()
    wanted = complete(server, seed=1, max_tokens=9)[1]
    for prompt in (ids, [ids], ["hi"]):
        got = complete(server, prompt=prompt, seed=1, max_tokens=9)[1]
        assert got["choices"] == wanted["choices"] and got["usage"] == wanted["usage"]
    assert len(complete(server, prompt=[ids, ids[:2]], max_tokens=1)[1]["choices"]) == 2
    # The tokenizer has 258 of them, and the model 300.
    status, error = complete(server, prompt=[ids, [257, 258]])
    assert status == 400 and "prompt[1]: 258 is no token of this model" in error["message"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}", "system:Be brief.;"),
        (
            "{% for m in messages %}{% if m.role == 'developer' %}>{% endif %}{{ m.content }}"
            "{% endfor %}",
            ">Be brief.",
        ),
    ],
    ids=["as system", "by its own name"],
)
def test_developers_are_heard(model, template, said):
    message = {"role": "developer", "content": "Be brief."}
    ids = BytesTokenizer().encode(said).tolist()
    with serving(model, template=template) as server:
        arguments = {"seed": 1, "max_tokens": 9}
        got = chat(server, messages=[message], **arguments)[1]
        wanted = complete(server, prompt=ids, **arguments)[1]
        assert got["choices"][0]["message"]["content"] == wanted["choices"][0]["text"]
        assert got["usage"] == wanted["usage"]


def test_streaming_gives_the_same_in_pieces(server):
    body = {"prompt": ["hi", "ho"], "seed": 3, "max_tokens": 40}
    whole = complete(server, **body)[1]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = streamed(server, "/v1/completions", body | options)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert len({c["id"] for c in chunks}) == 1 and all(c["usage"] is None for c in chunks)
    for choice in whole["choices"]:
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        assert len(own) > 5
    body = {"messages": [USER], "seed": 3, "max_tokens": 40}
    said = chat(server, **body)[1]["choices"][0]["message"]["content"]
    chunks = streamed(server, "/v1/chat/completions", body | {"stream": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant" and deltas[-1] == {}
    assert "".join(d.get("content", "") for d in deltas) == said
    assert all("usage" not in c and c["object"] == "chat.completion.chunk" for c in chunks)


def test_openais_client_works(server):
    with openai.OpenAI(base_url=server.address + "/v1", api_key="none", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny") == client.models.list().data[0]
        with pytest.raises(openai.NotFoundError, match="no model 'a/b c'"):
            client.models.retrieve("a/b c")
        arguments = {"model": "tiny", "max_tokens": 12, "seed": 4}
        whole = client.completions.create(prompt="hi", **arguments)
        parts = client.completions.create(prompt="hi", stream=True, **arguments)
        assert "".join(p.choices[0].text for p in parts) == whole.choices[0].text
        whole = client.chat.completions.create(messages=[USER], **arguments)
        parts = client.chat.completions.create(
            messages=[USER], stream=True, stream_options={"include_usage": True}, **arguments
        )
        *parts, last = parts
        said = "".join(p.choices[0].delta.content or "" for p in parts)
        assert said == whole.choices[0].message.content
        assert last.usage == whole.usage and last.usage.completion_tokens == 12
        extra = {"top_k": 1, "repetition_penalty": 1.3}
        assert client.completions.create(prompt="hi", extra_body=extra, **arguments).choices
        assert client.completions.create(prompt=[[256, 104]], **arguments).choices
        with pytest.raises(openai.BadRequestError, match="n: is not supported"):
            client.chat.completions.create(messages=[USER], n=2, **arguments)
        with pytest.raises(openai.BadRequestError, match="logprobs: is not supported"):
            client.completions.create(prompt="hi", logprobs=1, **arguments)
        with pytest.raises(openai.NotFoundError, match="no model 'other'"):
            client.completions.create(prompt="hi", model="other")


def test_what_the_readme_asks_is_answered(server, capfd):
    readme = (commands.ROOT / "README.md").read_text(encoding="utf-8")
    body = json.loads(re.search(r"-d '(\{.*?\})'", readme)[1])
    assert len(streamed(server, "/v1/completions", body)) > 1
    code = re.search(r"^```py\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)[1]
    shown = "http://127.0.0.1:8000"
    assert shown in code
    exec(code.replace(shown, server.address), {})
    assert len(capfd.readouterr().out) > 10


def test_many_clients_at_once(server):
    wanted = {i: complete(server, seed=i, max_tokens=20)[1]["choices"] for i in range(10)}
    got = {}

    def work(i: int) -> None:
        got[i] = complete(server, seed=i, max_tokens=20)[1]["choices"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == wanted


def test_health_models_and_page(server):
    status, health = call(server, "/health")
    assert status == 200 and health["status"] == "ok" and health["chat"]
    listed = call(server, "/v1/models")[1]["data"]
    assert [m["id"] for m in listed] == ["tiny"]
    assert call(server, "/v1/models/%74iny") == (200, listed[0])
    status, error = call(server, "/v1/models/other")
    assert status == 404 and error["code"] == "model_not_found"
    head = raw(server, b"HEAD /health HTTP/1.0\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and head.endswith(b"\r\n\r\n")
    with urllib.request.urlopen(server.address + "/") as response:
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        assert b"<!doctype html>" in response.read()


@pytest.mark.parametrize(
    ("status", "path", "method", "body", "said"),
    [
        (404, "/v2", "GET", None, "there is nothing at '/v2'"),
        (404, "/v1/embeddings", "POST", {}, "there is nothing at"),
        (405, "/v1/completions", "GET", None, "takes POST, not GET"),
        (405, "/health", "POST", {}, "takes GET or HEAD, not POST"),
        (405, "/", "DELETE", None, "takes GET or HEAD, not DELETE"),
        (405, "/v1/models/tiny", "POST", {}, "takes GET or HEAD, not POST"),
        (404, "/v1/models/", "POST", {}, "there is nothing at"),
        (400, "/v1/completions", "POST", b"{", "not JSON"),
        (400, "/v1/completions", "POST", {"prompt": "a", "logprobs": 2}, "logprobs"),
        (400, "/v1/completions", "POST", {"prompt": "\ud800"}, "surrogate"),
        (400, "/v1/completions", "POST", {"prompt": "a" * 101}, "102 tokens, and may have 100"),
        (400, "/v1/completions", "POST", {"prompt": ["a", "a" * 900]}, "prompt[1]: it has 901"),
        (400, "/v1/completions", "POST", {"prompt": ["a"] * 23}, "at most 22 at a time"),
        (400, "/v1/chat/completions", "POST", {"messages": []}, "at least one message"),
        (
            400,
            "/v1/chat/completions",
            "POST",
            {"messages": [{"role": "system", "content": ""}]},
            "no system here",
        ),
        (413, "/v1/completions", "POST", {"prompt": "a" * 6000}, "larger than 5000 bytes"),
        (413, "/v1/completions", "POST", b" " * 3_000_000, "larger than 5000 bytes"),
    ],
)
def test_what_is_wrong_has_a_status_and_a_message(server, status, path, method, body, said):
    got, error = call(server, path, body, method)
    assert got == status and said in error["message"]
    assert complete(server, max_tokens=1)[0] == 200


@pytest.mark.parametrize("length", [101, 900])  # more than is allowed, and than the model has room
def test_what_is_too_long_has_a_code_of_its_own(server, length):
    """By which a client knows that it may shorten its text and try again."""
    asked = {"role": "user", "content": "a" * length}
    for status, error in (complete(server, prompt="a" * length), chat(server, messages=[asked])):
        assert (status, error["code"]) == (400, "context_length_exceeded"), error
    assert complete(server, prompt=["a"] * 23)[1]["code"] is None


def test_a_model_without_a_template_says_where_to_go(model):
    with serving(model, template=None) as server:
        status, error = chat(server)
        assert status == 400 and "/v1/completions" in error["message"]
        assert not call(server, "/health")[1]["chat"]


def test_time_is_up_though_the_model_is_busy(model, monkeypatch):
    monkeypatch.setattr(service, "_GRACE", 0.1)
    with serving(model, limits=Limits(request_timeout=0.2)) as server:
        goes_on = held(server)
        for stream in (False, True):
            status, error = complete(server, stream=stream)
            assert status == 504 and error["code"] == "timeout"
        goes_on.set()


def test_stopping_lets_what_runs_end_and_refuses_the_rest(model):
    with serving(model, slots=1) as server:
        server.service.warm_up()
        slowed(server, 0.02)
        got = {}

        def work(name: str, **fields) -> None:
            got[name] = complete(server, temperature=0, **fields)

        runs = threading.Thread(target=work, args=("runs",), kwargs={"max_tokens": 60})
        runs.start()
        until(lambda: server.service.scheduler.counts() == (1, 0))
        waits = threading.Thread(target=work, args=("waits",), kwargs={"max_tokens": 5})
        waits.start()
        until(lambda: server.service.scheduler.counts() == (1, 1))
        stops = threading.Thread(target=server.stop, args=(30,))
        stops.start()
        until(lambda: server.stopping)
        assert complete(server)[0] == 503 and call(server, "/health")[0] == 503
        keeps = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert b"Connection: close" in raw(server, keeps)
        for thread in (runs, waits, stops):
            thread.join(60)
        assert got["runs"][0] == 200
        assert len(got["runs"][1]["choices"][0]["text"]) > 5
        assert got["waits"] == (503, got["waits"][1])
        with pytest.raises(OSError):
            socket.create_connection(server.server_address[:2], timeout=2)
