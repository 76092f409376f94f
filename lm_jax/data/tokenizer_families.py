"""A published model's folder, its tokenizer read as Transformers 5 reads it.

Transformers takes from a folder the vocabulary, and builds the rest of the pipeline by a class that
`tokenizer_config.json` or `config.json` names; where that is none of the classes below, it uses
`tokenizer.json` as it stands. The class decides even where `tokenizer.json` says otherwise: the
digits of SmolLM2 and the leading space of Llama 2 are split by GPT2Tokenizer and LlamaTokenizer,
not as their `tokenizer.json` alone would. Whoever wants that names the file, not the folder.

What a class needs, besides names and flags in `tokenizer_config.json`:

  GPT2Tokenizer, RobertaTokenizer   vocab.json and merges.txt: byte-level BPE
  Qwen2Tokenizer                    the same, with NFC and a split of its own
  BertTokenizer                     vocab.txt: WordPiece
  LlamaTokenizer, GemmaTokenizer    tokenizer.model: SentencePiece BPE
  no class of these                 tokenizer.model: any SentencePiece model, read as it says itself

or a `tokenizer.json`, which wins. Source: transformers 5.24, tokenization_utils_tokenizers.py and
models/*/tokenization_*.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_jax.data import tokenizer_files as files
from lm_jax.data.tokenizer_published import (
    FILE,
    GENERATION,
    HuggingFaceTokenizer,
    find_ids,
    parse,
)
from lm_jax.errors import UserError

CONFIG = "tokenizer_config.json"
_BACKEND = "PreTrainedTokenizerFast"  # no class: tokenizer.json as it stands

# The class of each config.json's model_type; of others, the one that tokenizer_config.json names.
_CLASS_OF = {
    **dict.fromkeys(("gpt2", "opt", "phi", "starcoder2"), "GPT2Tokenizer"),
    **dict.fromkeys(("roberta", "roberta-prelayernorm"), "RobertaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("bert", "distilbert", "electra"), "BertTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("mistral", "mixtral", "ministral", "phi3", "olmo2"), _BACKEND),
}
_OVERRULES = {"qwen2", "phi3"}  # model types whose class counts, whatever the tokenizer says

_ENDOFTEXT = "<|endoftext|>"
_NAMES: dict[str, dict[str, str]] = {  # unless the files say otherwise
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), _ENDOFTEXT),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), _ENDOFTEXT),
    "RobertaTokenizer": {
        **dict.fromkeys(("bos_token", "cls_token"), "<s>"),
        **dict.fromkeys(("eos_token", "sep_token"), "</s>"),
        **{"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"},
    },
    "BertTokenizer": {
        f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")
    },
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {
        f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")
    },
}
_NAMES["DistilBertTokenizer"] = _NAMES["BertTokenizer"]
_NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_published(folder: Path) -> bool:
    """Whether a folder says by its files that its tokenizer is a published model's."""
    beside = (FILE, CONFIG, "config.json", "vocab.json", "vocab.txt")
    return any((folder / name).exists() for name in beside)


def read_folder(folder: Path) -> HuggingFaceTokenizer:
    """Reads the tokenizer of a published model's folder.

    Raises:
      UserError: the files do not say which tokenizer it is; one is missing or is not what its name
        says. The message names the file, and the line in `merges.txt` and `vocab.txt`.
    """
    config = files.read_object(folder / CONFIG)
    model = files.read_object(folder / "config.json")
    definition = files.read_definition(folder / FILE) if (folder / FILE).exists() else None
    name = _class_name(config, model, definition)
    if "added_tokens_decoder" not in config:  # Transformers reads older files only then
        config |= files.read_object(folder / "special_tokens_map.json")
    config = _NAMES.get(name, {}) | config
    where = folder / FILE
    if definition is not None and not _fits(name, definition):
        name = _BACKEND
    if definition is None:
        vocabulary = _own_files(folder, name, config)
        config = vocabulary.names | config
        where = folder / files.OWN_FILES[name][0]
    for key in _NAMED:
        if not isinstance(files.content(config.get(key)), str | None):
            raise UserError(f"{folder / CONFIG}: {key} is neither text nor a token")
    what = f"the 'tokenizers' library cannot make a {name} of this and of {CONFIG}"
    try:
        with files.of_the_library(what):  # TypeError for a wrong flag, among others
            if definition is not None and name == _BACKEND:
                tokenizer = parse(json.dumps(definition))
            else:
                if definition is not None:
                    vocabulary = files.Vocabulary.of(definition)
                elif name == _BACKEND:
                    config |= files.added_to_sentencepiece(config, vocabulary)
                tokenizer = _BUILD[name](config, vocabulary)
            config["tokenizer_class"] = name
            _add_tokens(tokenizer, config, folder, definition)
            _frame(tokenizer, name, config, definition)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    return find_ids(where, tokenizer.to_str(), config, _companions(folder, config))


def _class_name(config: dict[str, Any], model: dict[str, Any], definition: Any) -> str:
    stated = config.get("tokenizer_class") or model.get("tokenizer_class")
    stated = stated.removesuffix("Fast") if isinstance(stated, str) else None
    model_type = model.get("model_type")
    model_type = model_type if isinstance(model_type, str) else None
    registered = _CLASS_OF.get(model_type)
    byte_level = definition is not None and '"ByteLevel"' in json.dumps(definition)
    if stated == "LlamaTokenizer" and byte_level and model_type not in _OVERRULES:
        return _BACKEND  # Llama 3 that says it were Llama 2
    if registered == _BACKEND:
        return _BACKEND
    if model_type in _OVERRULES:
        return registered
    name = stated or registered
    return name if name in _NAMES else _BACKEND


def _fits(name: str, definition: dict[str, Any]) -> bool:
    """Whether the class can take its vocabulary from this tokenizer.json."""
    kind = "WordPiece" if "Bert" in name else "BPE"
    return definition["model"].get("type", kind) == kind


def _own_files(folder: Path, name: str, config: dict[str, Any]) -> files.Vocabulary:
    if name == _BACKEND and not (folder / files.SENTENCEPIECE).exists():
        found = [n for n in ("vocab.json", "vocab.txt") if (folder / n).exists()]
        if not found:
            raise UserError(
                f"{folder}: expected a {FILE}, or the files of a tokenizer that {CONFIG} or"
                " config.json names by tokenizer_class or model_type, found neither"
            )
        raise UserError(
            f"{folder}: {found[0]} alone does not say how text is split: expected a {FILE}, or a"
            f" tokenizer_class in {CONFIG} or a model_type in config.json, one of"
            f" {', '.join(_NAMES)}"
        )
    return files.READERS[files.OWN_FILES[name][0]](folder, name, config)


def _gpt2(config: dict[str, Any], vocabulary: files.Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(
            vocabulary.tokens,
            vocabulary.merges,
            continuing_subword_prefix="",
            end_of_word_suffix="",
            fuse_unk=False,
        )
    )
    prefix = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _qwen2(config: dict[str, Any], vocabulary: files.Vocabulary) -> Any:
    from tokenizers import Regex, normalizers, pre_tokenizers

    tokenizer = _gpt2(config, vocabulary)
    tokenizer.normalizer = normalizers.NFC()
    prefix = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    return tokenizer


def _bert(config: dict[str, Any], vocabulary: files.Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = files.content(config["unk_token"])
    tokenizer = Tokenizer(models.WordPiece(vocabulary.tokens, unk_token=str(unknown)))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def _llama(config: dict[str, Any], vocabulary: files.Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    tokenizer = Tokenizer(
        models.BPE(vocabulary.tokens, vocabulary.merges, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*files.sentencepiece_decoders(), *strip])
    return tokenizer


def _gemma(config: dict[str, Any], vocabulary: files.Vocabulary) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE(
            vocabulary.tokens,
            vocabulary.merges,
            unk_token=str(files.content(config["unk_token"])),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", files.SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(files.sentencepiece_decoders())
    return tokenizer


_BUILD: dict[str, Callable[[dict[str, Any], files.Vocabulary], Any]] = {
    "GPT2Tokenizer": _gpt2,
    "RobertaTokenizer": _gpt2,
    "Qwen2Tokenizer": _qwen2,
    "BertTokenizer": _bert,
    "DistilBertTokenizer": _bert,
    "LlamaTokenizer": _llama,
    "GemmaTokenizer": _gemma,
    _BACKEND: files.from_sentencepiece,
}


def _add_tokens(tokenizer: Any, config: dict[str, Any], folder: Path, definition: Any) -> None:
    """Adds the tokens that stand outside of the model's vocabulary, in Transformers' order."""
    stated = files.added_tokens(config, folder, definition)  # by id
    there = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
    by_name = {token.content: token for token in stated.values()}
    new = [token for _, token in sorted(stated.items()) if repr(token) not in there]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {token.content for token in new}
    specials = {str(t): t for t in map(files.token, files.special_tokens(config, _NAMED))}
    for name, token in specials.items():
        if name not in known:
            new.append(by_name.get(name, token))
            known.add(name)
    named = {files.content(config[key]) for key in _NAMED if config.get(key)}
    for token in new:
        token.special = token.special or token.content in named
    tokenizer.add_tokens(new)


def _frame(tokenizer: Any, name: str, config: dict[str, Any], definition: Any) -> None:
    """Sets the post-processor: what goes before and after a text."""
    from tokenizers import processors

    def named(key: str) -> tuple[str, int]:
        token = files.content(config[key])
        return token, tokenizer.token_to_id(token)

    if name in ("BertTokenizer", "DistilBertTokenizer"):
        cls, sep = named("cls_token"), named("sep_token")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{cls[0]}:0 $A:0 {sep[0]}:0",
            pair=f"{cls[0]}:0 $A:0 {sep[0]}:0 $B:1 {sep[0]}:1",
            special_tokens=[cls, sep],
        )
    elif name == "RobertaTokenizer":
        tokenizer.post_processor = processors.RobertaProcessing(
            named("sep_token"),
            named("cls_token"),
            config.get("trim_offsets", True),
            bool(config.get("add_prefix_space")),
        )
    elif definition is not None and definition.get("post_processor"):
        spec = json.dumps(definition | {"added_tokens": [], "model": files.EMPTY_MODEL})
        tokenizer.post_processor = parse(spec).post_processor
    else:
        # Transformers follows these two where there is no tokenizer.json, and only there.
        follow = definition is None
        bos = follow and config.get("add_bos_token") and config.get("bos_token")
        eos = follow and config.get("add_eos_token") and config.get("eos_token")
        front, back = (named("bos_token") if bos else None), (named("eos_token") if eos else None)

        def template(sequence: str, part: int) -> str:
            before = f"{front[0]}:{part} " if front else ""
            return f"{before}${sequence}:{part}" + (f" {back[0]}:{part}" if back else "")

        tokenizer.post_processor = processors.TemplateProcessing(
            single=template("A", 0),
            pair=f"{template('A', 0)} {template('B', 1)}",
            special_tokens=[token for token in (front, back) if token],
        )


def _companions(folder: Path, config: dict[str, Any]) -> dict[str, bytes]:
    """What belongs to the tokenizer and has no part in encoding: names, limits, chat templates, and
    which ids end what is generated."""
    found = {CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
    generation = files.read_object(folder / GENERATION)
    if not generation:  # then Transformers takes them from the model's
        model = files.read_object(folder / "config.json")
        generation = {k: model[k] for k in ("eos_token_id",) if model.get(k) is not None}
    if generation:
        found[GENERATION] = (json.dumps(generation, indent=2) + "\n").encode()
    return found | read_chat_templates(folder)


def read_saved(folder: Path, ids: tuple[int | None, ...]) -> HuggingFaceTokenizer:
    """Reads what saving such a tokenizer wrote."""
    path = folder / FILE
    names = [name for name in (CONFIG, GENERATION) if files.read_object(folder / name)]
    companions = {name: (folder / name).read_bytes() for name in names}
    try:
        definition = path.read_text(encoding="utf-8")
        json.loads(definition)
        return HuggingFaceTokenizer(definition, *ids, companions | read_chat_templates(folder))
    except ValueError:
        raise UserError(f"{path}: not JSON, so not a Hugging Face tokenizer") from None
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def read_chat_templates(folder: Path) -> dict[str, bytes]:
    """Chat templates that have files of their own, by their path in the folder."""
    paths = [folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(paths) if p.exists()}
