"""What lies in the folders of published models and of runs: weights, configs, tokenizers, chat
templates."""

import json
import pathlib

import numpy as np
import safetensors
from fuzzing import Target
from safetensors_files import DATA, GOOD, raw_bytes
from sentencepiece import sentencepiece_model_pb2

from lm_jax.config import Config, DataConfig
from lm_jax.config_json import to_json
from lm_jax.data.chat import ChatTemplate
from lm_jax.data.tokenizer import Tokenizer, load_tokenizer
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.interop.config_map import family_of, read_config, read_json
from lm_jax.interop.safetensors import open_weights
from lm_jax.interop.sentence import read_pooling
from lm_jax.training import workdir
from lm_jax.training.metrics import _drop_after
from lm_jax.validation import validate

TEXTS = ("", "a", "ab ba", " é日\n", "<s> [MASK] </s>", "\u2581x")


def weights(data: bytes, folder: pathlib.Path) -> bool:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    found = open_weights(path)
    read = {name: found.read(name) for name in found.names()}
    expected = dict(safetensors.deserialize(data))
    assert set(expected) == set(read)
    for name, array in read.items():
        assert list(array.shape) == expected[name]["shape"]
        assert array.tobytes() == expected[name]["data"]
    return True


def index(data: bytes, folder: pathlib.Path) -> bool:
    """Nothing outside of the folder is opened."""
    inner = folder / "model"
    inner.mkdir()
    good = raw_bytes(GOOD, DATA)
    for path in (folder, inner):
        (path / "a.safetensors").write_bytes(good)
    (inner / "model.safetensors.index.json").write_bytes(data)
    found = open_weights(inner)
    assert {str(pathlib.Path(file.path).parent) for file in found._files} == {str(inner)}
    return set(found.names()) == set(GOOD)


def model_config(data: bytes, folder: pathlib.Path) -> bool:
    path = folder / "config.json"
    path.write_bytes(data)
    found = read_json(str(path))
    model = read_config(family_of(found, str(path)), found, str(path))
    assert model.width > 0 and model.layers > 0 and model.heads > 0
    return True


def pooling(data: bytes, folder: pathlib.Path) -> bool:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (folder / "modules.json").write_bytes(data)
    return bool(read_pooling(str(folder)))


def run_config(data: bytes, folder: pathlib.Path) -> bool:
    """A workdir's config.json; what is read is written as it was read."""
    (folder / "config.json").write_bytes(data)
    config = workdir.read_config(str(folder))
    (folder / "config.json").write_text(to_json(config))
    assert repr(workdir.read_config(str(folder))) == repr(config)
    validate(config)
    return True


def metrics(data: bytes, folder: pathlib.Path) -> bool:
    """What a run that goes on keeps of metrics.jsonl: whole lines of steps before it."""
    path = folder / "metrics.jsonl"
    path.write_bytes(data)
    kept = _drop_after(str(path), 20)
    left = path.read_bytes().decode().split("\n")[:-1]
    assert left == [line for line in left if line.encode() in data]
    records = [json.loads(line) for line in left]
    if not any(record.get("to") is not None for record in records):  # where a run went back
        assert {(record["kind"], record["step"]) for record in records} == kept
    return bool(kept)


def use(tokenizer: Tokenizer) -> bool:
    """What a tokenizer can be asked is answered, or refused."""
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
        assert [tokenizer.encode_batch([text])[0].tolist()] == [ids.tolist()]
        tokenizer.encode_with_specials(text)
        tokenizer.encode_prompt(text)
        tokenizer.frame(ids)
        tokenizer.frame_pair(ids, ids)
        said, stream = tokenizer.decode(ids), tokenizer.stream()
        streamed = "".join([*map(stream.push, ids.tolist()), stream.flush()])
        assert streamed == said or tokenizer._pieces is None, (streamed, said)
    _ = tokenizer.stop_ids, tokenizer.least_vocabulary, tokenizer.fingerprint
    return True


def tokenizer_folder(data: bytes, folder: pathlib.Path) -> bool:
    """Files by name: texts as they are, all else as JSON."""
    try:
        files = json.loads(data)
    except (ValueError, RecursionError):
        return False
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "vocab.json",
                 "merges.txt", "vocab.txt", "special_tokens_map.json", "generation_config.json",
                 "chat_template.jinja", "lm_jax_tokenizer.json"):  # fmt: skip
        if isinstance(files, dict) and name in files:
            content = files[name]
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    tokenizer = load_tokenizer(folder)
    use(tokenizer)
    tokenizer.save(folder / "again")
    assert load_tokenizer(folder / "again").fingerprint == tokenizer.fingerprint
    return True


def tokenizer_file(name: str):
    def check(data: bytes, folder: pathlib.Path) -> bool:
        (folder / name).write_bytes(data)
        return use(load_tokenizer(folder if name.startswith("lm_jax") else folder / name))

    return check


def template(data: bytes, folder: pathlib.Path) -> bool:
    text = data.decode("utf-8", errors="replace")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    found = ChatTemplate(text, {"bos_token": "<s>"})
    for more in (True, False):
        assert isinstance(found.render(messages, more), str)
    return True


def _tokenizer(kind: dict, **fields) -> dict:
    found = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [
        {"id": 4, "content": "</s>", "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}]}  # fmt: skip
    found |= {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None}
    return found | fields | {"model": kind}


_VOCAB = {"a": 0, "b": 1, "ab": 2, "<unk>": 3, "</s>": 4, "<s>": 5, "\u2581": 6}
_BPE = _tokenizer(
    {"type": "BPE", "vocab": _VOCAB, "merges": [["a", "b"]], "unk_token": "<unk>"},
    decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
             "use_regex": True},
    pre_tokenizer={"type": "Whitespace"},
    post_processor={"type": "TemplateProcessing", "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [5], "tokens": ["<s>"]}}},
)  # fmt: skip
_WORDS = _tokenizer(
    {"type": "WordPiece", "vocab": _VOCAB | {"##b": 7}, "unk_token": "<unk>",
     "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
    normalizer={"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                "strip_accents": None, "lowercase": True},
    decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    post_processor={"type": "BertProcessing", "sep": ["</s>", 4], "cls": ["<s>", 5]},
)  # fmt: skip
_UNIGRAM = _tokenizer(
    {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["\u2581b", -2.0]],
     "byte_fallback": False},
    added_tokens=[],
    pre_tokenizer={"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always",
                   "split": True},
    decoder={"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u2581"},
             "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
             {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
)  # fmt: skip
_FOLDERS = (
    {"tokenizer.json": _BPE, "tokenizer_config.json": {"eos_token": "</s>", "chat_template": "x"},
     "generation_config.json": {"eos_token_id": [4]}},
    {"tokenizer.json": _WORDS, "config.json": {"model_type": "x"},
     "tokenizer_config.json": {"cls_token": "<s>", "sep_token": {"content": "</s>"}}},
    {"tokenizer.json": _UNIGRAM, "special_tokens_map.json": {"unk_token": "<unk>"}},
    {"vocab.json": _VOCAB, "merges.txt": "#version: 0.2\na b\n", "config.json": {
        "model_type": "gpt2"}, "tokenizer_config.json": {"added_tokens_decoder": {"8": {
            "content": "<|endoftext|>", "special": True}}}},
    {"vocab.txt": "[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\na\n##b\n", "config.json": {
        "model_type": "bert"}, "tokenizer_config.json": {"do_lower_case": False}},
    {"tokenizer.json": _BPE | {"pre_tokenizer": None}, "tokenizer_config.json": {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>"}},
)  # fmt: skip


def _meta(tokenizer: Tokenizer) -> bytes:
    files = tokenizer._definition()
    meta = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    return json.dumps(meta | json.loads(files.get("lm_jax_tokenizer.json", b"{}"))).encode()


def _pieces(model_type: int) -> bytes:
    """A SentencePiece model of a few pieces: 1 is unigram, 2 is byte-pair merges."""
    proto = sentencepiece_model_pb2.ModelProto()
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    for n, piece in enumerate(("<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581a", "\n")):
        proto.pieces.add(piece=piece, score=-n, type=kinds.get(piece, 1))
    proto.trainer_spec.model_type = model_type
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto.SerializeToString()


def _dump(value: object) -> bytes:
    return json.dumps(value).encode()


_HF = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64,
       "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-5,
       "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 16,
       "hidden_act": "silu", "rope_theta": 1e4, "tie_word_embeddings": True,
       "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8}}  # fmt: skip
_GEMMA = _HF | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "head_dim": 8,
                "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 8,
                "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
                "rope_scaling": None, "rope_local_base_freq": 1e4}  # fmt: skip
_BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"],
         "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 16, "type_vocab_size": 2,
         "id2label": {"0": "a", "1": "b"}, "hidden_act": "gelu"}  # fmt: skip
_LOGGED = [{"kind": "train", "step": s, "loss": 1.0} for s in (10, 20, 30)]
_WORDS_OF_JINJA = (
    *(b"{{ ", b" }}", b"{% ", b" %}", b"{% for m in messages %}", b"{% endfor %}", b"m.content"),
    *(b"{% if x %}", b"{% endif %}", b" ~ ", b" * 9", b"**9", b"'a' * 999999999", b"|center(9**9)"),
    *(b"{% set ns = namespace(x='a') %}", b"{% set ns.x = ns.x ~ ns.x %}", b"|join", b"messages"),
    *(b"|replace('', 'x' * 9999)", b"range(99999)", b"loop.index0", b"|tojson", b".format(1)"),
    *(
        b"{% macro f(x) %}",
        b"{% endmacro %}",
        b"{{ f(f) }}",
        b"'%99999999999d' % 1",
        b"lipsum(999)",
    ),
)
_TEMPLATES = (
    b"{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}\n{% endfor %}",
    b"{% set ns = namespace(x='a') %}{% for m in messages %}{% set ns.x = ns.x ~ m['content'] %}"
    b"{% if loop.first %}{% generation %}{{ ns.x.upper()[1:] }}{% endgeneration %}{% endif %}"
    b"{% endfor %}{{ ns.x|length * 2 }}{{ messages|tojson(indent=2) }}",
    b"{% macro f(x) %}{{ x }}{% endmacro %}{{ f('a') }}{{ strftime_now('%d %b') }}"
    b"{% if not messages %}{{ raise_exception('none') }}{% endif %}{{ 'x' * 3 }}",
)

MODELS = {
    "safetensors": Target(weights, (raw_bytes(GOOD, DATA),), (b'"F32"', b'"shape"', b"[0,24]")),
    "safetensors_index": Target(
        index,
        (_dump({"metadata": {}, "weight_map": dict.fromkeys(GOOD, "a.safetensors")}),),
        (b"../", b"/", b"a.safetensors", b"\\u0000"),
        True,
    ),
    "model_config": Target(model_config, tuple(map(_dump, (_HF, _GEMMA, _BERT))), (), True),
    "pooling": Target(
        pooling,
        (
            _dump(
                [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
            ),
        ),
        (b"..", b"/"),
        True,
    ),
    "run_config": Target(
        run_config, (to_json(Config(data=DataConfig(("x",)))).encode(),), (b'"none"', b"null"), True
    ),
    "metrics": Target(metrics, (b"".join(_dump(r) + b"\n" for r in _LOGGED),), (b'"step"', b"20")),
    "tokenizer_folder": Target(tokenizer_folder, tuple(map(_dump, _FOLDERS)), (), True),
    "tokenizer_json": Target(
        tokenizer_file("tokenizer.json"), tuple(map(_dump, (_BPE, _WORDS, _UNIGRAM))), (), True
    ),
    "tokenizer_saved": Target(
        tokenizer_file("lm_jax_tokenizer.json"),
        tuple(map(_meta, (BytesTokenizer(), BytesTokenizer(True), CharacterTokenizer("ab\n")))),
        (),
        True,
    ),
    "sentencepiece": Target(tokenizer_file("a.model"), (_pieces(1), _pieces(2))),
    "chat_template": Target(template, _TEMPLATES, _WORDS_OF_JINJA),
}
