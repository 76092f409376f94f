"""Trains a tokenizer on text, or shows what a tokenizer does with a text.

python -m lm_jax.tokenize --source=CORPUS --output=DIR [--kind=... --vocab_size=...]
python -m lm_jax.tokenize --tokenizer=DIR --text='Hello, world!'
"""

import os

from absl import flags

from lm_jax import cli
from lm_jax.config import Config, DataConfig, TokenizerConfig
from lm_jax.errors import UserError
from lm_jax.validation import validate

_D, _T = DataConfig(), TokenizerConfig()
_SOURCE = flags.DEFINE_multi_string("source", [], "text to learn from, as data.sources; repeatable")
_OUTPUT = flags.DEFINE_string("output", "", "the folder to make for the tokenizer")
_KIND = flags.DEFINE_enum("kind", _T.kind, ["sentencepiece", "bytes", "characters"], "which")
_VOCAB = flags.DEFINE_integer("vocab_size", _T.vocab_size, "sentencepiece: pieces to learn")
_ALGORITHM = flags.DEFINE_enum("algorithm", _T.algorithm, ["bpe", "unigram"], "sentencepiece: how")
_BYTES = flags.DEFINE_integer("train_bytes", _T.train_bytes, "sentencepiece: text to learn from")
_MASK = flags.DEFINE_bool("mask", False, "reserve a mask token, as masked language models need")
_DOCUMENT = flags.DEFINE_enum(
    "document", _D.document, ["file", "paragraph", "line"], "what one document is in a text file"
)
_TEXT_KEY = flags.DEFINE_string("text_key", _D.text_key, "the field of JSONL and Parquet records")
_ON_ERROR = flags.DEFINE_enum("on_error", _D.on_error, ["raise", "skip"], "as data.on_error")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "a tokenizer to look at: a folder or a file")
_TEXT = flags.DEFINE_string("text", None, "what to show the tokens of")

_HELD_OUT_BYTES = 1_000_000


def main(argv: list[str]) -> None:
    del argv
    if bool(_OUTPUT.value) == bool(_TOKENIZER.value):
        raise UserError(
            "give --source=... and --output=DIR to train a tokenizer, or --tokenizer=DIR and"
            " --text=... to look at one"
        )
    if _OUTPUT.value:
        _train(_OUTPUT.value)
    elif _TEXT.value is None:
        raise UserError("--tokenizer needs --text, which it is to be tried on")
    else:
        _inspect(_TOKENIZER.value, _TEXT.value)


def _train(output: str) -> None:
    if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise UserError(f"--output: '{output}' exists already: remove it, or name another folder")
    if not _SOURCE.value:
        raise UserError("--source: name at least one file, folder, glob or data set to learn from")
    tokenizer_config = TokenizerConfig(
        kind=_KIND.value,
        vocab_size=_VOCAB.value,
        algorithm=_ALGORITHM.value,
        train_bytes=_BYTES.value,
    )
    data = DataConfig(
        sources=tuple(_SOURCE.value),
        document=_DOCUMENT.value,
        text_key=_TEXT_KEY.value,
        on_error=_ON_ERROR.value,
        # Whole files may be few: hold out the end of each. Lines are too short to be cut.
        validation_split="tail" if _DOCUMENT.value == "file" else "document",
    )
    validate(Config(tokenizer=tokenizer_config, data=data))

    from lm_jax.data.sources import documents
    from lm_jax.data.tokenizer import spread, text_to_learn_from, train_tokenizer

    splits = {split: documents(data, split) for split in ("train", "validation")}
    sample = text_to_learn_from(tokenizer_config, splits.__getitem__)
    tokenizer = train_tokenizer(tokenizer_config, sample, mask=_MASK.value)
    tokenizer.save(output)

    size = tokens = 0
    for text in spread(splits["validation"], _HELD_OUT_BYTES):
        tokens += len(tokenizer.encode(text))
        size += len(text.encode())
    step = 1 + tokenizer.vocab_size // 9
    examples = [tokenizer.piece(i) for i in range(step, tokenizer.vocab_size, step)]
    print(f"{tokenizer.kind}: {tokenizer.vocab_size} ids, saved in {output}")
    print(f"bytes per token: {size / max(tokens, 1):.3f} on {size} bytes of held-out text")
    print(f"pieces: {' '.join(examples)}")


def _inspect(path: str, text: str) -> None:
    from lm_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(text).tolist()
    try:
        lengths = [str(n) for n in tokenizer.byte_lengths[ids]]
    except UserError:  # undefined for WordPiece
        lengths = ["?"] * len(ids)
    print(f"{'id':>8} {'bytes':>6}  piece")
    for i, length in zip(ids, lengths):
        print(f"{i:>8} {length:>6}  {tokenizer.piece(i)}")
    size = len(text.encode())
    print(f"{len(ids)} tokens, {size} bytes, {size / max(len(ids), 1):.2f} bytes per token")
    back = tokenizer.decode(ids)
    print("the text comes back exactly" if back == text else f"the text comes back as {back!r}")


if __name__ == "__main__":
    cli.run(main)
