"""Small folders of each published family, with the files that the hub has, and varied texts."""

import functools
import io
import json
import random
from pathlib import Path
from pydoc_data import topics

import sentencepiece
import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_MANY = " 日本語 中文字 한국어 العربية עברית हिन्दी é ü ñ 😀 👩\u200d👧 ½ 12,345 3.14 Don't WE'LL "
LINES = "".join([*topics.topics.values()][:40]).splitlines(keepends=True)[:2500] + [_MANY] * 9
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace("{1,3}", "")
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
_PIECES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_SPACE = "\u2581"


def write(folder: Path, contents: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if isinstance(content, tokenizers.Tokenizer):
            content = content.to_str()
        elif not isinstance(content, str | bytes):
            content = json.dumps(content)
        content = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(content)


def _byte_level(split, specials=(), normalizer=None) -> tokenizers.Tokenizer:
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer, hf.decoder = split, decoders.ByteLevel()
    if normalizer:
        hf.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator(LINES, trainer)
    return hf


def _own_files(hf: tokenizers.Tokenizer) -> dict[str, object]:
    model = json.loads(hf.to_str())["model"]
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    tokens = dict(sorted(hf.get_vocab().items(), key=lambda item: item[1]))
    return {"vocab.json": tokens, "merges.txt": "#version: 0.2\n" + merges}


def _config(model_type: str, **tokenizer_config) -> dict[str, object]:
    return {"config.json": {"model_type": model_type}, "tokenizer_config.json": tokenizer_config}


def _gpt2(own: bool) -> dict[str, object]:
    hf = _byte_level(_BYTE_LEVEL)
    hf.add_special_tokens(["<|endoftext|>"])
    hf.post_processor = processors.ByteLevel(trim_offsets=False)
    files = _own_files(hf) if own else {"tokenizer.json": hf}
    return files | _config("gpt2", model_max_length=1024)


def _roberta(own: bool) -> dict[str, object]:
    hf = _byte_level(_BYTE_LEVEL, ["<s>", "<pad>", "</s>", "<unk>"])
    hf.add_special_tokens([AddedToken("<mask>", lstrip=True, normalized=False)])
    hf.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    files = _own_files(hf) if own else {"tokenizer.json": hf}
    return files | _config("roberta", model_max_length=512)


def _smollm2(own: bool) -> dict[str, object]:
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    digits = pre_tokenizers.Digits(individual_digits=True)
    hf = _byte_level(pre_tokenizers.Sequence([digits, _BYTE_LEVEL]), names)
    return _own_files(hf) | ({} if own else {"tokenizer.json": hf}) | _config(
        "llama",
        tokenizer_class="GPT2Tokenizer",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )  # fmt: skip


def _qwen(own: bool, model_type: str) -> dict[str, object]:
    split = pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated")
    hf = _byte_level(pre_tokenizers.Sequence([split, _PIECES]), normalizer=normalizers.NFC())
    own_files = _own_files(hf)
    hf.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    hf.add_tokens([AddedToken("<tool_call>", normalized=False)])
    hf.post_processor = processors.ByteLevel(trim_offsets=False)
    added = json.loads(hf.to_str())["added_tokens"]
    return own_files | ({} if own else {"tokenizer.json": hf}) | _config(
        model_type,
        tokenizer_class="Qwen2Tokenizer",
        added_tokens_decoder={t["id"]: {k: t[k] for k in t if k != "id"} for t in added},
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        add_bos_token=False,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        chat_template="{{ messages[0]['content'] }}",
    )  # fmt: skip


def _llama3() -> dict[str, object]:
    split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")
    hf = _byte_level(pre_tokenizers.Sequence([split, _PIECES]))
    definition = json.loads(hf.to_str())
    definition["model"]["ignore_merges"] = True
    hf = tokenizers.Tokenizer.from_str(json.dumps(definition))
    hf.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", hf.token_to_id("<|begin_of_text|>"))],
    )
    hf.post_processor = processors.Sequence([processors.ByteLevel(), template])
    return {"tokenizer.json": hf} | _config(
        "llama",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )


def _bert(own: bool, model_type: str, **flags) -> dict[str, object]:
    hf = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    lower = flags.get("do_lower_case", True)
    hf.normalizer = normalizers.BertNormalizer(lowercase=lower)
    hf.pre_tokenizer, hf.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    names = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=1000, special_tokens=names, show_progress=False)
    hf.train_from_iterator(LINES, trainer)
    hf.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 3), ("[SEP]", 4)],
    )
    hf.enable_truncation(128)  # as sentence-transformers does
    hf.enable_padding(length=128)
    tokens = sorted(hf.get_vocab().items(), key=lambda item: item[1])
    files = {"vocab.txt": "".join(f"{token}\n" for token, _ in tokens)}
    return files | ({} if own else {"tokenizer.json": hf}) | _config(model_type, **flags)


@functools.cache
def sentencepiece_model(**fields) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=model,
        vocab_size=1000,
        model_type="bpe",
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **{
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
        }
        | fields,
    )
    return model.getvalue()


def _from_sentencepiece(model: bytes, bos: str) -> tokenizers.Tokenizer:
    """The tokenizer.json that is published beside such a model."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokens = {sp.id_to_piece(i): i for i in range(sp.vocab_size())}
    merges = [
        (piece[:n], piece[n:])
        for piece in tokens
        for n in range(1, len(piece))
        if piece[:n] in tokens and piece[n:] in tokens
    ]
    bpe = models.BPE(tokens, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    hf = tokenizers.Tokenizer(bpe)
    for i in range(20):
        if sp.is_control(i) or sp.is_unknown(i):
            hf.add_special_tokens([AddedToken(sp.id_to_piece(i), normalized=False)])
    hf.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokens[bos])]
    )
    return hf


def _llama2(own: bool, model_type: str, **flags) -> dict[str, object]:
    model = sentencepiece_model()
    hf = _from_sentencepiece(model, "<s>")
    hf.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    hf.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )

    def added(name: str) -> dict[str, object]:
        return {"__type": "AddedToken", "content": name, "normalized": False}

    flags = {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"} | flags
    names = {"bos_token": added("<s>"), "eos_token": added("</s>"), "unk_token": added("<unk>")}
    files = {"tokenizer.model": model} | ({} if own else {"tokenizer.json": hf})
    return files | _config(model_type, pad_token=None, **names, **flags)


def _gemma(own: bool, model_type: str, **flags) -> dict[str, object]:
    symbols = ["<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n"]
    ends = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
    model = sentencepiece_model(
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=",".join([*symbols, _SPACE * 2, _SPACE * 3, "<b>"]),
        **ends,
    )
    hf = _from_sentencepiece(model, "<bos>")
    hf.add_tokens([AddedToken(s, normalized=False) for s in (*symbols, "<b>")])
    hf.normalizer = normalizers.Replace(" ", _SPACE)
    hf.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    hf.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    files = {"tokenizer.model": model} | ({} if own else {"tokenizer.json": hf})
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    flags = {"add_bos_token": True, "tokenizer_class": "GemmaTokenizer"} | flags
    return files | _config(model_type, **names, **flags)


_TURNS = {"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}
FAMILIES = {
    "gpt2": lambda: _gpt2(False),
    "gpt2 own": lambda: _gpt2(True),
    "gpt2 with bos": lambda: (
        _gpt2(True) | _config("gpt2", add_bos_token=True, add_eos_token=True, add_prefix_space=True)
    ),
    "roberta": lambda: _roberta(False),
    "roberta own": lambda: _roberta(True),
    "smollm2": lambda: _smollm2(False),
    "smollm2 own": lambda: _smollm2(True),
    "qwen2": lambda: _qwen(False, "qwen2"),
    "qwen2 own": lambda: _qwen(True, "qwen2"),
    "qwen3": lambda: _qwen(False, "qwen3"),
    "qwen3 own": lambda: _qwen(True, "qwen3"),
    "llama3": _llama3,
    "bert": lambda: _bert(False, "bert", do_lower_case=True, tokenizer_class="BertTokenizer"),
    "bert own": lambda: _bert(True, "bert", do_lower_case=True),
    "bert cased": lambda: _bert(True, "bert", do_lower_case=False, tokenize_chinese_chars=False),
    "distilbert": lambda: _bert(
        True, "distilbert", strip_accents=False, tokenizer_class="DistilBertTokenizer"
    ),
    "llama2": lambda: _llama2(False, "llama"),
    "llama2 own": lambda: _llama2(True, "llama", legacy=False),
    "llama2 legacy": lambda: _llama2(True, "llama", legacy=True, add_bos_token=False),
    "mistral": lambda: _llama2(False, "mistral", legacy=True),
    "mistral own": lambda: _llama2(True, "mistral", legacy=True),
    "gemma2": lambda: _gemma(False, "gemma2", **_TURNS),
    "gemma2 own": lambda: _gemma(True, "gemma2", **_TURNS),
    "gemma3 own": lambda: _gemma(True, "gemma3_text"),
}
FAMILIES = {name: functools.cache(make) for name, make in FAMILIES.items()}


def varied_texts(count: int = 10_000) -> list[str]:
    """Texts that tokenizers have stumbled over, and any code points at all."""
    rng = random.Random(5)

    def any_character() -> str:
        ranges = [(0, 0x110000), (0, 0x3000), (0, 0x250), (0, 0x80), (0x4E00, 0x9FFF)]
        code = rng.randrange(*rng.choice([*ranges, (0x1F300, 0x1FA00)]))
        return chr(code) if not 0xD800 <= code < 0xE000 else "x"

    texts = ["", " ", "   ", "\n", "\0", *_LONG]
    while len(texts) < count:
        length = rng.randrange(1, rng.choice([2, 3, 4, 6, 9, 14, 31]))
        parts = [
            any_character() if rng.random() < 0.2 else rng.choice(_ATOMS) for _ in range(length)
        ]
        if rng.random() < 0.2:
            parts = [" " * rng.randrange(4), *parts, " " * rng.randrange(4)]
        texts.append("".join(parts))
    return texts


_LONG = ["x" * 10_000, "日" * 10_500, "ab1" * 4000, " " * 10_000, "a\u0301" * 5001, "😀" * 10_001]
_ATOMS = [
    *("<s", "<|endof", "text|>", "|endoftext|>", "[MAS", "K]", "<start_of", "_turn>", "<un", "nk>"),
    *("<0x0A>", "</", "<b>", "<table>", "<tool_call>", "<unused0>", "##ing", "Ġ", "Ċ", "\u2581"),
    *(
        "😀",
        "👩\u200d👩\u200d👧",
        "🏴\U000e0067\U000e007f",
        "❤\ufe0f",
        "日本語",
        "中文字符",
        "한국어",
    ),
    *("العربية", "עברית", "हिन्दी", "ไทย", "é", "e\u0301", "\u0301\u0308", "ﬁ", "Å", "Ⅷ", "½", "İ"),
    *("\0", "\x01", "\x1b[0m", "\x7f", "\x85", "\ufeff", "\u200b", "\u202e", "\xa0", "\u3000"),
    *("\u2028", "\ufffd", "\ue000", "\U0010fffd", "\n", "\r\n", "\r", "\n\n\n", "\t", "\t\t", " "),
    *("  ", "    ", "        ", "0", "7", "123", "3.14", "1,234,567", "١٢٣", "²", "$x^2$", "C++"),
    *(
        "def f(x):\n    return x+1",
        "https://example.com/a?b=c&d=%20#e",
        "foo@bar.org",
        "print('x')",
    ),
    *(
        "it's",
        "don't",
        "WE'LL",
        "I'VE",
        "the",
        " the",
        "The",
        " is",
        "ing",
        "__init__",
        "--",
        "...",
    ),
    *("!?", "(", ")", "[", "]", "{", "}", "<", ">", "|", "\\", "/", "'", '"', "`", "#", "_", "-"),
    *("a", "Z", " a", "word", "Word", "WORD", "hello world", "ß", "ς", " antidisestablishment"),
]
