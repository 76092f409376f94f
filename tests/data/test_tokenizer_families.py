"""A published model's folder encodes as Transformers encodes it."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
from published_folders import FAMILIES, sentencepiece_model, varied_texts, write
from transformers import AutoTokenizer

from lm_jax.data.tokenizer import load_tokenizer
from lm_jax.errors import UserError

TEXTS = varied_texts()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("family") / "model"
            write(made[name], FAMILIES[name]())
            (made[name] / "model.safetensors").write_bytes(b"weights, not read")
        return made[name]

    return get


def different(wanted: list[list[int]], tokenizer, texts: list[str]) -> list[str]:
    assert len(wanted) == len(texts)
    return [t for t, ids in zip(texts, wanted) if tokenizer.encode(t).tolist() != ids]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_encodes_as_transformers_does(folder_of, name):
    theirs = AutoTokenizer.from_pretrained(folder_of(name))
    ours = load_tokenizer(folder_of(name))
    assert ours.vocab_size == len(theirs)
    specials = [t.content for t in theirs.added_tokens_decoder.values() if t.special]
    plain = [text for text in TEXTS if not any(s in text for s in specials)]
    assert len(plain) > 9900
    wanted = theirs(plain, add_special_tokens=False).input_ids
    assert different(wanted, ours, plain) == []
    # Special tokens inside of a text are spelled like any other word.
    spelled = [f"a {s}b{s} {TEXTS[i]}" for s in specials for i in range(20, 40)]
    wanted = theirs(spelled, add_special_tokens=False, split_special_tokens=True).input_ids
    assert different(wanted, ours, spelled) == []
    reserved = {i for i in (ours.bos_id, ours.eos_id, ours.mask_id) if i is not None}
    assert not reserved & {int(i) for text in spelled for i in ours.encode(text)}


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens_are_those_of_transformers(folder_of, name):
    theirs = AutoTokenizer.from_pretrained(folder_of(name))
    ours = load_tokenizer(folder_of(name))
    bert = "bert" in name
    bos = theirs.cls_token_id if bert else theirs.bos_token_id
    eos = theirs.sep_token_id if bert else theirs.eos_token_id
    assert (ours.bos_id, ours.eos_id, ours.mask_id) == (bos, eos, theirs.mask_token_id)
    if theirs.pad_token_id is not None:
        assert ours.pad_id == theirs.pad_token_id
    for text in ("a", " b c"):
        whole = theirs(text).input_ids
        inside = theirs(text, add_special_tokens=False).input_ids
        prompt = ours.encode_prompt(text).tolist()
        assert prompt == whole[: len(prompt)]
        front = len(prompt) - len(inside)
        assert ours.bos_before_text == (front == 1) and front in (0, 1)
        assert prompt[front:] == inside
    begin = ours.eos_id if ours.bos_id is None else ours.bos_id
    assert ours.encode_prompt("").tolist() == [begin]


def test_which_families_put_bos_before_a_text(folder_of):
    before = {name for name in FAMILIES if load_tokenizer(folder_of(name)).bos_before_text}
    assert before == {
        name
        for name in FAMILIES
        if name.split()[0] in ("llama2", "llama3", "mistral", "gemma2", "gemma3") or "bert" in name
    } - {"llama2 legacy"} | {"gpt2 with bos"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_family_is_the_same(folder_of, name, tmp_path):
    tokenizer = load_tokenizer(folder_of(name))
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.bos_before_text == tokenizer.bos_before_text
    assert again.companions == tokenizer.companions
    assert again.specials == tokenizer.specials
    for text in TEXTS[30:200]:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": "<a>,the,of t,\u2581\u2581"},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
    ids=["as llama", "no prefix", "symbols", "normalized"],
)
@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_model_of_no_class(fields, legacy, tmp_path):
    """Transformers reads it as it says itself: all but a few texts come out as of `sentencepiece`,
    which has its own ways with combining characters and with spaces that are symbols."""
    model = sentencepiece_model(**fields)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for text in TEXTS[:3000] if not any(s in text for s in theirs.all_special_tokens)]
    wanted = theirs(texts, add_special_tokens=False).input_ids
    assert different(wanted, ours, texts) == []
    if legacy:
        own = sentencepiece.SentencePieceProcessor(model_proto=model)
        odd = different(own.encode(texts), ours, texts)
        assert len(odd) <= (15 if "user_defined_symbols" in fields or len(fields) > 1 else 0), odd
    for text, ids in zip(texts[10:200], wanted[10:200]):
        assert ours.decode(ours.encode(text)) == theirs.decode(ids)


def test_a_file_alone_is_read_as_it_stands(folder_of, tmp_path):
    folder = folder_of("smollm2")  # whose class does not split digits, while tokenizer.json does
    names = [load_tokenizer(p) for p in (folder, folder / "tokenizer.json")]
    assert [len(t.encode("x  1")) for t in names] == [4, 3]
    folder = folder_of("mistral own")
    alone = load_tokenizer(folder / "tokenizer.model")
    assert alone.kind == "sentencepiece" and alone.prefix_bytes == 1
    assert load_tokenizer(folder).kind == "huggingface"
    shutil.copy(folder / "tokenizer.model", tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == alone.fingerprint


def test_tokenizer_json_wins(folder_of, tmp_path):
    shutil.copytree(folder_of("bert"), tmp_path / "both")
    (tmp_path / "both" / "vocab.txt").write_text("nothing\n")
    assert load_tokenizer(tmp_path / "both").encode("the").tolist() == [
        *load_tokenizer(folder_of("bert")).encode("the")
    ]


def test_chat_templates_are_kept(folder_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of("llama3"), folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ 2 }}")
    load_tokenizer(folder).save(tmp_path / "saved")
    kept = load_tokenizer(tmp_path / "saved").companions
    assert kept["chat_template.jinja"] == b"{{ 1 }}"
    assert kept["additional_chat_templates/tools.jinja"] == b"{{ 2 }}"
    qwen = json.loads(load_tokenizer(folder_of("qwen2")).companions["tokenizer_config.json"])
    assert qwen["chat_template"] == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("gpt2 own", "merges.txt", None, r"merges\.txt: there is no such file.*GPT2Tokenizer"),
        ("gpt2 own", "merges.txt", "#version: 0.2\nt h\nt\n", r"merges\.txt:3: expected two"),
        ("gpt2 own", "merges.txt", "t h\n\nh e\n", r"merges\.txt:2: expected two"),
        ("gpt2 own", "merges.txt", "t h\nth 日\n", r"merges\.txt:2: the token '日'"),
        ("gpt2 own", "merges.txt", b"t h\n\xff e\n", r"merges\.txt:2: not UTF-8"),
        ("qwen2 own", "vocab.json", None, r"vocab\.json: there is no such file.*Qwen2Tokenizer"),
        ("qwen2 own", "vocab.json", "{", r"vocab\.json: not a JSON object"),
        ("qwen2 own", "vocab.json", '{"a": "b"}', r"vocab\.json: expected the id"),
        ("qwen2 own", "vocab.json", '{"a": 1, "b": 1}', r"vocab\.json: two tokens"),
        ("bert own", "vocab.txt", None, r"vocab\.txt: there is no such file.*BertTokenizer"),
        ("bert own", "vocab.txt", "the\n", r"vocab\.txt: '\[UNK\]'"),
        ("bert own", "vocab.txt", b"[UNK]\n\xe9\n", r"vocab\.txt:2: not UTF-8"),
        ("bert own", "vocab.txt", b"[UNK]\n[CLS]\0\n", r"vocab\.txt:2: a zero byte"),
        ("gemma2 own", "tokenizer.model", None, r"tokenizer\.model: there is no such file"),
        ("gemma2 own", "tokenizer.model", b"\0\1\2", r"tokenizer\.model: not a SentencePiece"),
        ("gemma2 own", "tokenizer.model", b"", r"tokenizer\.model: not a SentencePiece"),
        ("qwen2", "tokenizer.json", "{", r"tokenizer\.json: not JSON"),
        ("qwen2", "tokenizer.json", "[]", r"tokenizer\.json: .*no model"),
        ("llama3", "tokenizer.json", '{"model": {}}', r"tokenizer\.json: .*can read"),
        ("qwen2", "tokenizer.json", '{"model": {"vocab": 3}}', r"tokenizer\.json: .*can read"),
        ("bert", "config.json", "[]", r"config\.json: not a JSON object"),
        ("qwen2", "tokenizer_config.json", '{"added_tokens_decoder": 3}', "added tokens"),
        ("smollm2", "tokenizer_config.json", '{"eos_token": 7}', r"eos_token"),
    ],
)  # fmt: skip
def test_broken_files_are_named(folder_of, tmp_path, name, file, content, message):
    folder = tmp_path / "model"
    shutil.copytree(folder_of(name), folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


def test_files_that_do_not_say_whose_they_are(folder_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of("gpt2 own"), folder)
    (folder / "config.json").write_text('{"model_type": "gpt5"}')
    with pytest.raises(UserError, match=r"vocab\.json alone does not say.*model_type"):
        load_tokenizer(folder)
    for file in ("vocab.json", "merges.txt"):
        (folder / file).unlink()
    with pytest.raises(UserError, match="found neither"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    assert load_tokenizer(folder).kind == "huggingface"


def test_a_post_processor_with_two_tokens_in_front(folder_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of("llama3"), folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    single = definition["post_processor"]["processors"][1]["single"]
    single.insert(0, single[0])
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="puts 2 tokens in front"):
        load_tokenizer(folder)
