"""Trains a tokenizer on text, makes token ids of a corpus once and for all, or shows what a
tokenizer does with a text.

python -m lm_jax.tokenize --source=CORPUS --output=DIR [--kind=... --vocab_size=...]
python -m lm_jax.tokenize --source=CORPUS --tokenizer=DIR --output=TOKENS
python -m lm_jax.tokenize --tokenizer=DIR --text='Hello, world!'
"""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from lm_jax import cli
from lm_jax.config import Config, DataConfig, TokenizerConfig
from lm_jax.errors import UserError
from lm_jax.progress import progress
from lm_jax.validation import validate

_D, _T = DataConfig(), TokenizerConfig()
_SOURCE = flags.DEFINE_multi_string(
    "source", [], "text to learn from, or to make tokens of, as data.sources; repeatable"
)
_OUTPUT = flags.DEFINE_string(
    "output",
    "",
    "the folder to make for the tokenizer; with --tokenizer, for tokens: the same command goes on"
    " with what is there",
)
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
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "", "a tokenizer to look at, or to make tokens with: a folder or a file"
)
_TEXT = flags.DEFINE_string("text", None, "what to show the tokens of")
_WORKERS = flags.DEFINE_integer(
    "workers", None, "processes that make tokens; default: one for each core", 1
)

_TO_LEARN = ("kind", "vocab_size", "algorithm", "train_bytes", "mask")
_HELD_OUT_BYTES = 1_000_000


def main(argv: list[str]) -> None:
    del argv
    if not (_OUTPUT.value or _TOKENIZER.value) or (_OUTPUT.value and _TEXT.value is not None):
        raise UserError(
            "give --source=... and --output=DIR to train a tokenizer, --tokenizer=DIR beside these"
            " to make tokens of a corpus, or --tokenizer=DIR and --text=... to look at one"
        )
    if _OUTPUT.value and not _SOURCE.value:
        raise UserError("--source: name at least one file, folder, glob or data set to read")
    if _OUTPUT.value:
        with _flags_named():
            (_make_tokens if _TOKENIZER.value else _train)(_OUTPUT.value)
    elif _TEXT.value is None:
        raise UserError("--tokenizer needs --text, which it is to be tried on, or --output")
    else:
        _inspect(_TOKENIZER.value, _TEXT.value)


@contextlib.contextmanager
def _flags_named() -> Iterator[None]:
    """Calls the fields of `DataConfig` that are flags here by the flags, in messages."""
    try:
        yield
    except UserError as e:
        raise UserError(
            re.sub(r"\bdata\.(document|text_key|on_error)\b", r"--\1", str(e))
        ) from None


def _corpus(**more: Any) -> DataConfig:
    return DataConfig(
        sources=tuple(_SOURCE.value),
        document=_DOCUMENT.value,
        text_key=_TEXT_KEY.value,
        on_error=_ON_ERROR.value,
        **more,
    )


def _train(output: str) -> None:
    if os.path.exists(output) and (not os.path.isdir(output) or os.listdir(output)):
        raise UserError(f"--output: '{output}' exists already: remove it, or name another folder")
    if _WORKERS.value is not None:
        raise UserError("--workers: it takes --tokenizer to make tokens; one is learned here")
    tokenizer_config = TokenizerConfig(
        kind=_KIND.value,
        vocab_size=_VOCAB.value,
        algorithm=_ALGORITHM.value,
        train_bytes=_BYTES.value,
    )
    # Whole files may be few: hold out the end of each. Lines are too short to be cut.
    data = _corpus(validation_split="tail" if _DOCUMENT.value == "file" else "document")
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


def _make_tokens(output: str) -> None:
    if given := [name for name in _TO_LEARN if flags.FLAGS[name].present]:
        raise UserError(f"--{given[0]}: nothing is learned where --tokenizer names a tokenizer")

    from lm_jax.data.pretokenizing import pretokenize
    from lm_jax.data.tokenizer import load_tokenizer

    tokenizer, begun = load_tokenizer(_TOKENIZER.value), time.monotonic()
    with progress("bytes of text") as count:
        meta, added = pretokenize(
            _corpus(), tokenizer, output, workers=_WORKERS.value, on_progress=count
        )
    seconds = time.monotonic() - begun
    print(
        f"{meta.documents:,} documents, {meta.tokens:,} tokens of"
        f" {meta.text_bytes / max(meta.tokens, 1):.3f} bytes, saved in {output}"
    )
    if meta.skipped:
        print(f"{meta.skipped:,} records skipped")
    print(f"{added / 1e6:,.1f} MB of text in {seconds:.1f} s")
    print(
        f"train on them with --config.data.sources=tokens:{output} --config.tokenizer.kind=file"
        f" --config.tokenizer.path={output}/tokenizer"
    )


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
