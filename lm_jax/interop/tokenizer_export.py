"""A tokenizer as a Hugging Face folder, from which Transformers makes one that encodes alike."""

import json
from pathlib import Path
from typing import Any

from lm_jax.data.chat import FILE as TEMPLATE
from lm_jax.data.chat import chat_template_for, chat_template_of
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer, Tokenizer
from lm_jax.data.tokenizer_families import CONFIG, read_folder
from lm_jax.data.tokenizer_files import (
    SPACE,
    USER_DEFINED,
    merges_of,
    parse_sentencepiece,
    read_object,
)
from lm_jax.data.tokenizer_published import FILE, HuggingFaceTokenizer
from lm_jax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from lm_jax.data.tokenizer_spelling import BYTE_CHARACTERS
from lm_jax.errors import UserError

_BACKEND = "PreTrainedTokenizerFast"  # Transformers reads tokenizer.json as it stands
_BPE = 2  # the type of a SentencePiece model
_NORMAL, _UNUSED, _BYTE = 1, 5, 6  # types of its pieces


def write_huggingface_tokenizer(
    tokenizer: Tokenizer,
    folder: str | Path,
    model_max_length: int | None = None,
    *,
    whole_texts: bool = False,
    pad_id: int | None = None,
    objective: str = "",
) -> list[str]:
    """Writes what `AutoTokenizer.from_pretrained(folder)` needs to encode exactly alike.

    What goes around a text (`add_special_tokens=True`) is the post-processor's, of a published
    tokenizer; of ours it is bos before it, and eos after it too where there is a mask token, as the
    documents have it that a masked model learns from. Transformers reads special tokens out of text
    unless `split_special_tokens=True`; lm_jax never does.

    Args:
      folder: the model's; its config.json, if it is to have one, must be there already, because
        Transformers may choose by it how a tokenizer is read.
      model_max_length: the longest sequence of the model, in tokens; None: as published, if it was.
      whole_texts: of a tokenizer of ours, eos goes after each text, as classifiers have it.
      pad_id: the special token to fill rows with; None: the tokenizer's.
      objective: what its model was trained for, as data.objective: where it was conversations, the
        folder has their template, which Transformers applies alike.

    Returns:
      The names of the files.

    Raises:
      UserError: `tokenizers` has no pipeline that encodes exactly alike, or Transformers would read
        it otherwise for the model's type; or the folder cannot be written.
    """
    folder = Path(folder)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        definition, files = tokenizer.definition, dict(tokenizer.companions)
    else:
        definition, files = _definition(tokenizer, whole_texts), {}
    config = json.loads(files.get(CONFIG, b"{}")) or _names(tokenizer)
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    if pad_id is not None:
        config["pad_token"] = tokenizer.specials[pad_id]
    template = chat_template_for(tokenizer, objective)
    if template is not None and chat_template_of(tokenizer) is None:
        files[TEMPLATE] = template.text.encode()
    files[FILE] = definition.encode()
    files[CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be written: {e.strerror}") from None
    again = read_folder(folder)
    same = _pipeline(again.definition) == _pipeline(definition)
    if not same or again.vocab_size != tokenizer.vocab_size:
        model_type = read_object(folder / "config.json").get("model_type")
        raise UserError(
            f"{folder}: Transformers reads the tokenizer of any '{model_type}' model in a way of"
            f" its own, and this {tokenizer.kind} tokenizer would encode otherwise there: export"
            " the model as another family (model.family), or without the tokenizer"
        )
    return sorted(files)


def _pipeline(definition: str) -> dict[str, Any]:
    """All of a tokenizer.json that has a part in encoding what holds no special token."""
    from tokenizers import Tokenizer as Pipeline

    tokenizer = Pipeline.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    spec = json.loads(tokenizer.to_str())
    if not tokenizer.num_special_tokens_to_add(True):
        spec["post_processor"] = None  # what is left of it moves offsets, which nobody here reads
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["special"]]
    return spec


def _names(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer that has none."""
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "mask": tokenizer.mask_id}
    if tokenizer.pad_id in tokenizer.specials:  # else it is a token of text
        ids["pad"] = tokenizer.pad_id
    if tokenizer.mask_id is not None:
        ids |= {"cls": tokenizer.bos_id, "sep": tokenizer.eos_id}
    if isinstance(tokenizer, SentencePieceTokenizer):
        ids["unk"] = tokenizer.unk_id
    names = {f"{key}_token": tokenizer.specials[i] for key, i in ids.items() if i is not None}
    return {"tokenizer_class": _BACKEND, **names, "clean_up_tokenization_spaces": False}


def _definition(tokenizer: Tokenizer, whole_texts: bool) -> str:
    """tokenizer.json of a tokenizer of ours, or of a SentencePiece model like ours."""
    from tokenizers import AddedToken, processors

    if isinstance(tokenizer, SentencePieceTokenizer):
        pipeline = _sentencepiece(tokenizer)
    elif isinstance(tokenizer, BytesTokenizer):
        pipeline = _bytes()
    elif isinstance(tokenizer, CharacterTokenizer):
        pipeline = _characters(tokenizer)
    else:
        raise UserError(f"a tokenizer of kind '{tokenizer.kind}' has no Hugging Face form")
    names = [name for _, name in sorted(tokenizer.specials.items())]
    pipeline.add_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    ends = [tokenizer.bos_id] if tokenizer.bos_before_text else []
    if ends and tokenizer.mask_id is not None:
        ends.append(tokenizer.eos_id)
    if whole_texts and tokenizer.eos_id is not None:  # which begins a text where there is no bos
        ends = [tokenizer.begin_id, tokenizer.eos_id]
    front, back = ([f"{tokenizer.specials[i]}:0" for i in part] for part in (ends[:1], ends[1:]))
    first = [*front, "$A:0", *back]
    # Of two texts, each has its own bos, as Llama's, or all of one row, as BERT's.
    second = [*([] if back else front), "$B:0", *back]
    pipeline.post_processor = processors.TemplateProcessing(
        single=" ".join(first),
        pair=" ".join([*first, *(part.replace(":0", ":1") for part in second)]),
        special_tokens=[(tokenizer.specials[i], i) for i in dict.fromkeys(ends)],
    )
    return pipeline.to_str()


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Any:
    """Byte-pair merges over text whose spaces are spaces, so that a U+2581 stays what it is.

    SentencePiece joins any two neighbours that make up a piece, the piece learned first before all
    others, and `tokenizers` the pair that comes first in its list: each piece's pairs stand there
    together, in the order of the pieces.
    """
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import decoders, models, normalizers

    proto = parse_sentencepiece(tokenizer.model)
    _check_expressible(proto)
    learned = [(i, p) for i, p in enumerate(proto.pieces) if p.type == _NORMAL]
    tokens = {p.piece: i for i, p in enumerate(proto.pieces) if p.type != _NORMAL}
    tokens |= {p.piece.replace(SPACE, " "): i for i, p in learned}
    learned.sort(key=lambda item: -item[1].score)
    merges = merges_of(p.piece.replace(SPACE, " ") for _, p in learned)
    pipeline = Pipeline(models.BPE(tokens, merges, fuse_unk=True, byte_fallback=True))
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        pipeline.normalizer = normalizers.Sequence(
            [normalizers.Replace(SPACE, " "), normalizers.Prepend(" ")]
        )
        steps.append(decoders.Strip(" ", 1, 0))
    pipeline.decoder = decoders.Sequence(steps)
    return pipeline


def _check_expressible(proto: Any) -> None:
    if proto.trainer_spec.model_type != _BPE:
        raise UserError(
            "a SentencePiece unigram tokenizer has no exact Hugging Face form: of two ways to cut a"
            " text that are equally likely it takes what its 32-bit sums favour, and Transformers"
            " what its 64-bit sums do. For a model that is to be exported, train a tokenizer with"
            " tokenizer.algorithm = 'bpe'"
        )
    normalizer = proto.normalizer_spec
    types = [p.type for p in proto.pieces]
    other = {
        "it normalizes text": normalizer.precompiled_charsmap,
        "it removes spaces": normalizer.remove_extra_whitespaces,
        "it leaves spaces as they are": not normalizer.escape_whitespaces,
        "it puts spaces at the end of words": proto.trainer_spec.treat_whitespace_as_suffix,
        "it lacks pieces for bytes": types.count(_BYTE) != 256,
        "it has symbols that are not learned": {USER_DEFINED, _UNUSED} & set(types),
    }
    for reason, is_so in other.items():
        if is_so:
            raise UserError(
                f"this SentencePiece model has no exact Hugging Face form: {reason}. If it came"
                " with a tokenizer.json, make that or its folder the tokenizer"
            )


def _bytes() -> Any:
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import decoders, models, pre_tokenizers

    pipeline = Pipeline(models.BPE(BYTE_CHARACTERS, []))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _characters(tokenizer: CharacterTokenizer) -> Any:
    """A character is a word, and one that the vocabulary lacks is an error there as well."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Pipeline

    vocabulary = {c: i for i, c in enumerate(tokenizer.characters)}
    pipeline = Pipeline(models.WordLevel(vocabulary, unk_token="none: unknown text is an error"))
    pipeline.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    pipeline.decoder = decoders.Fuse()
    return pipeline
