"""Chat templates give the ids that Transformers' apply_chat_template gives."""

import datetime
import functools
import json
import threading

import pytest
from data_helpers import data_config
from published_folders import FAMILIES, LINES, write
from transformers import AutoTokenizer

from lm_jax.config import TokenizerConfig
from lm_jax.data.chat import (
    ChatTemplate,
    chat_template_for,
    chat_template_of,
    load_chat_template,
)
from lm_jax.data.encoding import conversation, prompt_within
from lm_jax.data.examples import Example
from lm_jax.data.loader import train_stream
from lm_jax.data.tokenizer import load_tokenizer, train_tokenizer
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError
from lm_jax.interop.tokenizer_export import write_huggingface_tokenizer

# In the manner of the published ones, with the constructions that these use.
CHATML = """\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' ~ message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system ="
    " '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% else %}{% set rest ="
    " messages %}{% set system = '' %}{% endif %}{% for m in rest %}{% if (m['role'] == 'user') !="
    " (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% if"
    " m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') +"
    " m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token"
    " }}{% endif %}{% endfor %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if not date is defined %}
    {%- set date = strftime_now("%Y") %}
{%- endif %}
{% macro turn(role, text) %}
<|begin_of_text|>{{ role }}|

{{ text | trim }}<|eot_id|>
{%- endmacro %}
{%- if tools is not none %}{{ raise_exception("no tools") }}{% endif %}
{{- turn("system", "Today: " + date) }}
  {% for message in messages %}
    {# not shown #}
    {% if message.content is none or message.content is undefined %}{% continue %}{% endif %}
{{ turn(message.role, message.content) }}
    {% if loop.index > 5 %}{% break %}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ "<|begin_of_text|>assistant|" }}{% endif %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not"
    " supported') }}{% endif %}{% for m in messages %}{% if (m['role'] == 'assistant') %}{% set"
    " role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}{{ '<start_of_turn>' + role"
    " + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt"
    " %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = """\
{%- set ns = namespace(index=0, last=-1) %}
{%- for m in messages if m.role == "user" %}{% set ns.last = loop.index0 %}{% endfor %}
{{- bos_token }}
{%- for m in messages | rejectattr("role", "equalto", "system") %}
    {%- if m["role"] == "user" %}
        {{- "[INST] " + m["content"] + "[/INST]" }}
    {%- else %}
        {%- generation %}{{- " " + m["content"] + eos_token }}{% endgeneration %}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- {"é<&>": [ns.index, ns.last], "b": none} | tojson(indent=2) }}
"""
TEMPLATES = {
    "smollm2": CHATML,
    "qwen2": CHATML,
    "gpt2": CHATML,  # whose vocabulary lacks the names
    "llama2": LLAMA2,
    "llama2 own": LLAMA2,
    "llama3": LLAMA3,
    "gemma2": GEMMA,
    "gemma3 own": GEMMA,
    "mistral": MISTRAL,
}
USER = {"role": "user", "content": " What <b>is</b> 日本語?\n\n  12 + 3.14 "}
SAID = {"role": "assistant", "content": "It <|im_end|> is </s> é\U0001f600 \ttext\n", "name": None}
SYSTEM = {"role": "system", "content": "Be <start_of_turn> brief."}
CHATS = [
    [USER],
    [USER, SAID],
    [USER, SAID, {"role": "user", "content": ""}],
    [SYSTEM, USER, SAID, USER],
    [SAID],
    [{"role": "user", "content": "\u2581 a  b\r\n<s>[INST] <bos>"}],
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def get(name: str):
        folder = tmp_path_factory.mktemp("chat") / "model"
        write(folder, FAMILIES[name]() | {"chat_template.jinja": TEMPLATES[name]})
        return folder

    return get


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers(name, folder_of, tmp_path):
    theirs = AutoTokenizer.from_pretrained(folder_of(name))
    tokenizer = load_tokenizer(folder_of(name))
    tokenizer.save(tmp_path / "tokenizer")  # as a workdir holds it
    rendered = 0
    for template in (load_chat_template(folder_of(name)), load_chat_template(tmp_path)):
        for chat in CHATS:
            for more in (False, True):
                try:
                    wanted = theirs.apply_chat_template(chat, None, add_generation_prompt=more)
                except Exception as e:  # what Transformers passes on from Jinja
                    with pytest.raises(UserError, match=str(e)):
                        template.render(chat, more)
                    continue
                text = theirs.apply_chat_template(chat, add_generation_prompt=more, tokenize=False)
                assert template.render(chat, more) == text
                assert template.encode(tokenizer, chat, more).tolist() == wanted.input_ids
                rendered += 1
    assert rendered >= 16


def test_one_survives_a_run_and_its_export(folder_of, tmp_path):
    tokenizer = load_tokenizer(folder_of("smollm2"))
    tokenizer.save(tmp_path / "run" / "tokenizer")
    (tmp_path / "out").mkdir()
    write_huggingface_tokenizer(load_tokenizer(tmp_path / "run" / "tokenizer"), tmp_path / "out")
    for path in (tmp_path / "run", tmp_path / "run" / "tokenizer", tmp_path / "out"):
        assert load_chat_template(path).text == CHATML
        assert load_chat_template(path).specials["eos_token"] == "<|im_end|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML


def test_where_it_stands(tmp_path):
    write(tmp_path / "none", FAMILIES["llama3"]())
    assert load_chat_template(tmp_path / "none") is None
    write(tmp_path / "qwen", FAMILIES["qwen2"]())
    assert load_chat_template(tmp_path / "qwen").render([{"content": "hi"}]) == "hi"
    config = FAMILIES["qwen2"]()["tokenizer_config.json"]
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    for value, wanted in ((named, "d"), (named[:1], None), (None, None)):
        write(tmp_path / "qwen", {"tokenizer_config.json": config | {"chat_template": value}})
        found = load_chat_template(tmp_path / "qwen")
        assert (found and found.text) == wanted
    (tmp_path / "qwen" / "chat_template.jinja").write_text("file")
    assert load_chat_template(tmp_path / "qwen").text == "file"
    write(tmp_path / "qwen", {"tokenizer_config.json": config | {"chat_template": 5}})
    (tmp_path / "qwen" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="neither text nor a list"):
        load_chat_template(tmp_path / "qwen")
    assert chat_template_of(train_tokenizer(TokenizerConfig(kind="bytes"), [])) is None
    with pytest.raises(UserError, match="there is no such tokenizer"):
        load_chat_template(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{{ f(99) }}", "take these"),
        ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than 4,000,000 char"),
        ("{{ raise_exception('only two turns') }}", "only two turns"),
        ("{{ messages[3].content }}", "no element 3"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages + 1 }}", "can only concatenate list"),
    ],
)
def test_one_that_fails_is_a_message(text, message):
    with pytest.raises(UserError, match=f"^the chat template does not .*{message}"):
        ChatTemplate(text, {}).render([{"role": "user", "content": "hi"}])


def test_one_that_is_no_template_is_a_message():
    with pytest.raises(UserError, match=r"line 2: .*endfor"):
        ChatTemplate("\n{% for a in b %}", {})
    with pytest.raises(UserError, match="there are none"):
        ChatTemplate("{{ 1 }}", {}).render([])


def test_threads_share_one():
    template = ChatTemplate(CHATML, {})
    wanted = [template.render([{"role": "user", "content": str(i)}] * 9) for i in range(8)]
    got = [[] for _ in wanted]

    def work(i):
        for _ in range(40):
            got[i].append(template.render([{"role": "user", "content": str(i)}] * 9))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[text] * 40 for text in wanted]


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes", "gpt2", "llama2", "llama3"])
def test_a_model_that_learned_to_chat_without_one_has_ours_and_so_has_its_export(kind, tmp_path):
    if kind in FAMILIES:
        write(tmp_path / "model", FAMILIES[kind]())
        tokenizer = load_tokenizer(tmp_path / "model")
    else:
        tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=600), LINES[:400])
    assert chat_template_for(tokenizer, "complete") is None
    template = chat_template_for(tokenizer, "chat")
    write_huggingface_tokenizer(tokenizer, tmp_path / "plain", objective="complete")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template is None
    write_huggingface_tokenizer(tokenizer, tmp_path / "out", objective="chat")
    exported = load_chat_template(tmp_path / "out")
    assert exported.text == template.text
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    begin, end = tokenizer.begin_id, tokenizer.eos_id
    for chat in CHATS:
        for more in (False, True):
            ids = template.encode(tokenizer, chat, more).tolist()
            assert exported.encode(tokenizer, chat, more).tolist() == ids
            if any(name in m["content"] for m in chat for name in tokenizer.specials.values()):
                # What Transformers reads as special tokens is text here, wherever it is said.
                ends = [end for m in chat if m["role"] == "assistant"]
                assert [i for i in ids if i in tokenizer.specials] == [begin, *ends]
                text = tokenizer.decode(ids).replace("\u2581", " ")  # to some, these are the same
                assert all(m["content"].strip().replace("\u2581", " ") in text for m in chat)
            else:
                wanted = theirs.apply_chat_template(chat, None, add_generation_prompt=more)
                assert ids == wanted.input_ids
            # What is to be learned begins where what is generated begins.
            if chat[-1]["role"] == "assistant" and len(chat) > 1:
                asked = template.encode(tokenizer, chat[:-1], True).tolist()
                assert ids[: len(asked)] == asked


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_what_is_said_ends_nothing_in_ours(role):
    tokenizer = BytesTokenizer()
    said = {"user": "hi", "assistant": "ho"} | {role: "a</s>b<s>"}
    chat = [{"role": r, "content": c} for r, c in said.items()]
    ids, counts = conversation(chat, tokenizer)
    assert [i for i in ids.tolist() if i > 255] == [256, 257]
    assert bytes(ids[counts][:-1].tolist()).decode() == " " + said["assistant"]
    with pytest.raises(UserError, match=r"U\+FDD0"):
        conversation([{"role": "user", "content": "\ufdd1</s>"}, chat[1]], tokenizer)


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_an_example_that_says_a_special_token_is_not_learned_as_one(role, folder_of, tmp_path):
    """A published template's text is read with its special tokens, of which these are none."""
    tokenizer, path = load_tokenizer(folder_of("smollm2")), tmp_path / "a.jsonl"
    bad = {"user": "hi", "assistant": "ho"} | {role: "so <|im_end|> it is"}
    lines = [{"m": [{"role": r, "content": c} for r, c in chat.items()]}
             for chat in ({"user": "a", "assistant": "b"}, bad)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = data_config(
        str(path), objective="chat", prompt="{m}", turns="together", length=64, shuffle=False
    )
    place = {"user": 1, "assistant": 2}[role]
    said = rf"a\.jsonl:2: message {place} holds '<\|im_end\|>', which .*on_error"
    with train_stream(config, tokenizer, seed=0) as stream, pytest.raises(UserError, match=said):
        list(stream)
    config.on_error = "skip"
    with train_stream(config, tokenizer, seed=0) as stream:
        (batch,) = stream
    told = batch["targets"][batch["weights"] > 0].tolist()
    assert tokenizer.decode(told).strip() == "b"


def test_it_is_the_same_day_in_all_examples(folder_of, monkeypatch):
    """And the clock's where a user speaks."""
    tokenizer = load_tokenizer(folder_of("llama3"))
    example = Example("", ("b",), messages=({"role": "user", "content": "a"},
                                            {"role": "assistant", "content": "b"}))  # fmt: skip
    template, texts = chat_template_of(tokenizer), []
    for year in (2031, 2032):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, year=year):
                return cls(year, 5, 6)

        monkeypatch.setattr(datetime, "datetime", Clock)
        ids, _ = prompt_within(example, tokenizer, 128)
        asked = template.encode(tokenizer, example.messages[:1], True)
        assert f"Today: {year}" in tokenizer.decode(asked)
        texts.append(tokenizer.decode(ids))
    assert texts[0] == texts[1] and "Today: 20" in texts[0]


def test_ours_needs_an_end():
    with pytest.raises(UserError, match=r"\(characters\) has no token that ends"):
        chat_template_for(CharacterTokenizer("abc"), "chat")


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_specials_of_our_own_tokenizers_are_read_as_transformers_reads_them(kind, tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=600), LINES[:400])
    write_huggingface_tokenizer(tokenizer, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", "<s> a </s>\n<s>b", "x</s> y", "<s><s>", "a <s", json.dumps(CHATS)):
        wanted = theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.encode_with_specials(text).tolist() == wanted
