"""The files that published tokenizers come in: vocabularies, merges, and the tokens beside them."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_jax.errors import UserError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
SENTENCEPIECE = "tokenizer.model"
EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}
# Where a class looks for its vocabulary; any other class has a tokenizer.model.
OWN_FILES: dict[str, tuple[str, ...]] = {
    "GPT2Tokenizer": ("vocab.json", "merges.txt"),
    "RobertaTokenizer": ("vocab.json", "merges.txt"),
    "Qwen2Tokenizer": ("vocab.json", "merges.txt"),
    "BertTokenizer": ("vocab.txt",),
    "DistilBertTokenizer": ("vocab.txt",),
    "LlamaTokenizer": (SENTENCEPIECE,),
    "GemmaTokenizer": (SENTENCEPIECE,),
    "PreTrainedTokenizerFast": (SENTENCEPIECE,),
}
# Types of pieces in a SentencePiece model.
_NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
_UNIGRAM = 1  # the type of a model


@dataclasses.dataclass
class Vocabulary:
    """What a tokenizer has learned.

    Attributes:
      tokens: the id of each token of the model.
      merges: byte-pair merges, first ones first.
      names: the special tokens that the file itself names.
      proto: the SentencePiece model, where it is one.
    """

    tokens: dict[str, int]
    merges: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    names: dict[str, Any] = dataclasses.field(default_factory=dict)
    proto: Any = None

    @classmethod
    def of(cls, definition: dict[str, Any]) -> "Vocabulary":
        """That of a tokenizer.json which a class reads."""
        tokens, merges = (definition["model"].get(key) for key in ("vocab", "merges"))
        if not isinstance(tokens, dict):
            raise UserError("not a tokenizer that the 'tokenizers' library can read: no vocabulary")
        merges = [m.split(" ") if isinstance(m, str) else m for m in merges or []]
        return cls(tokens, [tuple(merge) for merge in merges])


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(_text(path))
        json.dumps(content, ensure_ascii=False).encode()  # halves of surrogate pairs are no text
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


@contextlib.contextmanager
def of_the_library(what: str) -> Iterator[None]:
    """While entered, whatever the `tokenizers` library raises is a UserError that begins with
    `what`: it raises Exception itself, and what is no Exception where it comes to a defect of its
    own."""
    try:
        yield
    except UserError:
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        reason = (str(e).strip().splitlines() or [repr(e)])[0]
        raise UserError(f"{what}: {reason[:500]}") from e


def read_definition(path: Path) -> dict[str, Any]:
    """A tokenizer.json."""
    try:
        definition = json.loads(_text(path))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not JSON, so not a Hugging Face tokenizer") from None
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise UserError(f"{path}: not a tokenizer that the 'tokenizers' library can read: no model")
    return definition


def content(token: Any) -> str | None:
    """The spelling of a special token, which a config gives as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def token(value: Any) -> Any:
    """The same as an AddedToken, special unless it is one already."""
    from tokenizers import AddedToken

    if isinstance(value, AddedToken):
        return value
    flags = value if isinstance(value, dict) else {"content": value}
    return _added({"special": True} | flags)


def _added(flags: dict[str, Any]) -> Any:
    from tokenizers import AddedToken

    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{key: value for key, value in flags.items() if key in known})


def special_tokens(config: dict[str, Any], named: Sequence[str]) -> list[Any]:
    """The special tokens of a tokenizer_config.json, `named` ones first: text or objects."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    others = [key for key in config if key.endswith("_token") and key not in named]
    found = [config[key] for key in (*named, *others) if isinstance(content(config.get(key)), str)]
    return [*found, *(extra.values() if isinstance(extra, dict) else extra)]


def added_tokens(config: dict[str, Any], folder: Path, definition: Any) -> dict[int, Any]:
    """The tokens added to a vocabulary, by id: tokenizer_config.json says it all, or, of older
    tokenizers, added_tokens.json and tokenizer.json do.

    Raises:
      UserError: they are not what they should be.
    """
    where = folder / "tokenizer_config.json"
    try:
        if "added_tokens_decoder" in config:
            stated = config["added_tokens_decoder"].items()
            return {int(i): _added(flags) for i, flags in stated}
        where = folder / "added_tokens.json"
        special = {content(t) for t in special_tokens(config, ())}
        found = {}
        for name, i in read_object(where).items():
            plain = name not in special
            found[int(i)] = _added({"content": name, "normalized": plain, "special": not plain})
        where = folder / "tokenizer.json"
        for flags in (definition or {}).get("added_tokens", []):
            found[flags["id"]] = _added(flags)
        return found
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{where}: its added tokens are not ids with a token each") from None


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        line = path.read_bytes().count(b"\n", 0, e.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8") from None


def _lines(folder: Path, name: str, tokenizer: str) -> list[str]:
    path = folder / name
    if not path.exists():
        raise UserError(f"{path}: there is no such file, and {tokenizer} needs it")
    lines = _text(path).split("\n")  # not splitlines: a token may hold another line separator
    return lines[:-1] if not lines[-1] else lines


def _read_byte_level(folder: Path, tokenizer: str, config: dict[str, Any]) -> Vocabulary:
    path, merges_path = folder / "vocab.json", folder / "merges.txt"
    if not path.exists():
        raise UserError(f"{path}: there is no such file, and {tokenizer} needs it")
    tokens = read_object(path)
    if not tokens or not all(type(i) is int and i >= 0 for i in tokens.values()):
        raise UserError(f"{path}: expected the id of each token, a whole number")
    if len(set(tokens.values())) < len(tokens):
        raise UserError(f"{path}: two tokens have the same id")
    merges = []
    for number, line in enumerate(_lines(folder, merges_path.name, tokenizer), 1):
        if line.startswith("#version"):
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2 or not all(pair):
            raise UserError(f"{merges_path}:{number}: expected two tokens and a space between them")
        for part in (*pair, "".join(pair)):
            if part not in tokens:
                raise UserError(f"{merges_path}:{number}: the token '{part}' is not in vocab.json")
        merges.append(pair)
    return Vocabulary(tokens, merges)


def _read_word_piece(folder: Path, tokenizer: str, config: dict[str, Any]) -> Vocabulary:
    path = folder / "vocab.txt"
    lines = _lines(folder, path.name, tokenizer)
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise UserError(f"{path}:{number}: a zero byte, so this is not a vocabulary")
    tokens = {line.rstrip(): i for i, line in enumerate(lines)}  # of two alike, the later counts
    unknown = content(config["unk_token"])
    if not isinstance(unknown, str) or unknown not in tokens:
        raise UserError(f"{path}: '{unknown}', the token for unknown text, is not in it")
    return Vocabulary(tokens)


def _read_sentencepiece(folder: Path, tokenizer: str, config: dict[str, Any]) -> Vocabulary:
    path = folder / SENTENCEPIECE
    if not path.exists():
        raise UserError(f"{path}: there is no such file, and {tokenizer} needs it")
    proto = parse_sentencepiece(path.read_bytes())
    if not proto.pieces:
        raise UserError(f"{path}: not a SentencePiece model")
    of_no_class = tokenizer == "PreTrainedTokenizerFast"
    if proto.trainer_spec.model_type == _UNIGRAM and not of_no_class:
        raise UserError(
            f"{path}: a unigram model, and {tokenizer} needs one of byte-pair merges: correct"
            " tokenizer_class, or name the file itself to have SentencePiece read it"
        )
    tokens = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    names: dict[str, Any] = {}
    if not any(config.get(f"{k}_special_tokens") is not None for k in ("extra", "additional")):
        names["extra_special_tokens"] = [
            {
                "__type": "AddedToken",  # as tokenizer_config.json marks it
                "content": p.piece,
                "normalized": False,
                "special": p.type == CONTROL,
            }
            for p in proto.pieces
            if p.type == CONTROL or (p.type == USER_DEFINED and not of_no_class)
        ]
    if of_no_class:
        spec = proto.trainer_spec
        for key in ("bos", "eos", "unk"):
            if getattr(spec, f"{key}_id") >= 0:
                names[f"{key}_token"] = getattr(spec, f"{key}_piece")
    return Vocabulary(tokens, [] if of_no_class else merges_of(tokens), names, proto)


def parse_sentencepiece(model: bytes) -> Any:
    """The parts of a SentencePiece model; it has no pieces where it is none."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        proto.Clear()
    return proto


READERS: dict[str, Callable[[Path, str, dict[str, Any]], Vocabulary]] = {
    "vocab.json": _read_byte_level,
    "vocab.txt": _read_word_piece,
    SENTENCEPIECE: _read_sentencepiece,
}


def merges_of(pieces: Iterable[str]) -> list[tuple[str, str]]:
    """The merges of pieces in their order of learning: SentencePiece joins any two pieces that make
    up a third, the earliest third first."""
    pieces = dict.fromkeys(pieces)
    return [
        (piece[:n], piece[n:])
        for piece in pieces
        for n in range(1, len(piece))
        if piece[:n] in pieces and piece[n:] in pieces
    ]


def sentencepiece_decoders() -> list[Any]:
    from tokenizers import decoders

    return [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]


def added_to_sentencepiece(config: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokens added to a SentencePiece model of no class, as fields of tokenizer_config.json:
    they are looked for before spaces are put in front of what lies between them."""
    stated = config.get("added_tokens_decoder")
    if not stated or not vocabulary.proto.normalizer_spec.add_dummy_prefix:
        return {}
    return {
        "added_tokens_decoder": {i: flags | {"normalized": False} for i, flags in stated.items()}
    }


def from_sentencepiece(config: dict[str, Any], vocabulary: Vocabulary) -> Any:
    """A SentencePiece model of no class, read as Transformers reads it: by what it says itself of
    spaces and symbols. All but rare texts are encoded as the `sentencepiece` library does it.

    After special tokens too there is a space in front, unless `legacy` is false in `config`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto, tokens = vocabulary.proto, dict(vocabulary.tokens)
    names = {i: name for name, i in tokens.items()}
    for i, flags in config.get("added_tokens_decoder", {}).items():
        name = content(flags)
        if int(i) in names and name not in tokens:  # a placeholder that was given a name
            tokens[name] = tokens.pop(names[int(i)])
            names[int(i)] = name
    whole = [names[i] for i, p in enumerate(proto.pieces) if p.type == USER_DEFINED]
    unknown, fallback = proto.trainer_spec.unk_piece, proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        scores = [(p.piece, p.score) for p in proto.pieces]
        unk_id = proto.trainer_spec.unk_id
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=unk_id, byte_fallback=fallback))
    else:
        normal = [i for i, p in enumerate(proto.pieces) if p.type == _NORMAL]
        learned = sorted(normal, key=lambda i: (-proto.pieces[i].score, i))
        tokenizer = Tokenizer(
            models.BPE(
                tokens,
                merges_of(names[i] for i in learned),
                unk_token=unknown,
                fuse_unk=True,
                byte_fallback=fallback,
                ignore_merges=bool(whole),
            )
        )

    spec = proto.normalizer_spec
    charsmap, prefix = spec.precompiled_charsmap, spec.add_dummy_prefix
    legacy = config.get("legacy", True)
    steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if prefix and legacy:  # Metaspace puts none in front of another
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
    tokenizer.normalizer = normalizers.Sequence(steps)
    splits = []
    if prefix:
        scheme = "always" if legacy else "first"
        splits.append(pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False))
    if whole:
        longest_first = sorted(whole, key=len, reverse=True)
        pattern = Regex("|".join(re.escape(piece) for piece in longest_first))
        splits.append(pre_tokenizers.Split(pattern, "isolated"))
    if splits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    replaced, bytes_joined, fused = sentencepiece_decoders()
    spelling = [replaced, *([bytes_joined] if fallback else [])]
    if fallback or prefix:
        spelling.append(fused)
    if prefix:
        spelling.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(spelling)
    return tokenizer
