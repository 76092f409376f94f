"""Tokenizers: trained on a corpus, or loaded from wherever they lie.

tokenizer = train_tokenizer(config.tokenizer, documents)
tokenizer.save(folder)
tokenizer = load_tokenizer(folder)
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lm_jax import json_text, paths
from lm_jax.config import TokenizerConfig
from lm_jax.data import tokenizer_families as families
from lm_jax.data import tokenizer_published as published
from lm_jax.data import tokenizer_sentencepiece as sentencepiece
from lm_jax.data.tokenizer_base import (
    META,
    BytesTokenizer,
    CharacterTokenizer,
    Stream,
    Tokenizer,
    utf8,
)
from lm_jax.errors import UserError, shown

__all__ = [
    "Stream",
    "Tokenizer",
    "load_tokenizer",
    "spread",
    "text_to_learn_from",
    "train_tokenizer",
]

_LEAST_SHARE = 65_536  # bytes that `spread` takes of a document, at least


def train_tokenizer(
    config: TokenizerConfig,
    documents: Iterable[str],
    *,
    mask: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """Makes the tokenizer that `config` asks for.

    Args:
      documents: what it is to learn from. 'characters' reads all of it; 'sentencepiece' at most the
        first `config.train_bytes` of UTF-8, so give it a sample spread over the corpus (`spread`);
        'bytes' and 'file' read none.
      mask: the vocabulary is to have a mask token, as masked language models need: ours reserve
        one id for it, one from a file must have it.
      on_progress: called with the bytes of text read so far, after each document.

    Raises:
      UserError: no text, a vocabulary that does not fit it, or no tokenizer at `config.path` or
        none with a mask token.
    """
    if config.kind == "bytes":
        return BytesTokenizer(mask)
    if config.kind == "file":
        if not config.path:
            raise UserError("tokenizer.path: kind 'file' needs the path of a tokenizer")
        tokenizer = load_tokenizer(config.path)
        if mask and tokenizer.mask_id is None:
            raise UserError(
                f"{config.path}: this tokenizer has no mask token, which a masked language model"
                " needs: name one that has (BERT's, RoBERTa's), or train one"
            )
        return tokenizer
    if config.kind == "characters":
        characters: set[str] = set()
        read = 0
        for document in documents:
            read += len(utf8(document))
            characters.update(document)
            if on_progress:
                on_progress(read)
        return CharacterTokenizer(characters, mask)
    return sentencepiece.train_sentencepiece(config, documents, on_progress, mask)


def text_to_learn_from(
    config: TokenizerConfig, open_split: Callable[[str], Sequence[str]]
) -> Iterable[str]:
    """What `train_tokenizer` is to read of a corpus, whose 'train' or 'validation' is opened.

    'characters' must know each one there is, so it reads the validation documents as well; all
    others read about `config.train_bytes` from all over the training documents.
    """
    if config.kind == "characters":
        return itertools.chain(open_split("train"), open_split("validation"))
    return spread(open_split("train"), config.train_bytes)


def spread(documents: Sequence[str], total_bytes: int) -> Iterator[str]:
    """About `total_bytes` of text from all over `documents`, the same each time.

    Visits them by steps of the golden ratio, so that each stretch of the corpus is seen early, and
    takes at most a fair share of each, so that one long document cannot crowd out the rest.
    """
    n = len(documents)
    share = max(total_bytes // max(n, 1), _LEAST_SHARE)
    taken = 0
    for i in golden_order(n):
        document = documents[i][:share]  # a character is at least one byte
        if len(data := document.encode("utf-8", errors="surrogatepass")) > share:
            document = data[:share].decode("utf-8", errors="ignore")
        yield document
        taken += min(len(data), share)
        if taken >= total_bytes:
            return


def golden_order(n: int) -> Iterator[int]:
    """0 to n - 1, each once, by steps of about 0.618 n."""
    step = next((s for s in range(round(n * 0.618), n) if math.gcd(s, n) == 1), 1)
    return ((k * step) % n for k in range(n))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: a folder that `Tokenizer.save` wrote; a published model's folder, which is read as
        Transformers reads it (`tokenizer_families`); a SentencePiece `.model` or a `tokenizer.json`
        by itself, read as it stands; or a folder that holds one `.model` and says no more.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    path = Path(paths.local_copy(str(path)))
    try:
        if path.is_dir():
            return _load_folder(path)
        if path.suffix == ".json":
            return published.read_tokenizer_json(path)
        if path.suffix == ".model":
            return _read_model(path)
    except FileNotFoundError as e:
        raise UserError(f"{e.filename}: there is no such tokenizer file") from None
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read: {e.strerror}") from None
    if not path.exists():
        raise UserError(f"{path}: there is no such tokenizer file or folder")
    raise UserError(
        f"{path}: not a tokenizer: expected a SentencePiece .model, a tokenizer.json, or a folder"
        " that holds one"
    )


def _load_folder(folder: Path) -> Tokenizer:
    if (folder / META).exists():
        return _load_saved(folder)
    if families.is_published(folder):
        return families.read_folder(folder)
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return _read_model(models[0])
    found = f"more than one: {', '.join(m.name for m in models)}" if models else "neither"
    raise UserError(
        f"{folder}: expected a {published.FILE} or one SentencePiece .model in it, found {found}"
    )


def _load_saved(folder: Path) -> Tokenizer:
    where = folder / META
    try:
        meta = json_text.loads(where.read_bytes())
        kind, fingerprint = meta["kind"], meta["fingerprint"]
        if kind == "bytes":
            tokenizer = BytesTokenizer(mask=meta.get("mask") is True)
        elif kind == "characters":
            tokenizer = CharacterTokenizer(meta["characters"], meta.get("mask") is True)
        elif kind == "sentencepiece":
            tokenizer = _read_model(folder / sentencepiece.FILE)
        elif kind == "huggingface":
            ids = (meta["bos_id"], meta["eos_id"], meta["pad_id"], meta.get("mask_id"))
            tokenizer = families.read_saved(folder, ids)
        else:
            raise UserError(f"{where}: no kind of tokenizer is called {shown(kind)}")
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where}: damaged: not what saving a tokenizer writes") from None
    if tokenizer.fingerprint != fingerprint:
        raise UserError(
            f"{folder}: the tokenizer is not the one that was saved here: its files were changed or"
            " damaged since (their fingerprint differs)"
        )
    return tokenizer


def _read_model(path: Path) -> Tokenizer:
    try:
        return sentencepiece.SentencePieceTokenizer(path.read_bytes())
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
