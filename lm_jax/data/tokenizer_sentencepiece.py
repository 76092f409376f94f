"""SentencePiece: training our own, lossless vocabularies, and using published ones.

Kudo and Richardson 2018, https://arxiv.org/abs/1808.06226.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from lm_jax.config import TokenizerConfig
from lm_jax.data.tokenizer_base import MASK, Tokenizer, utf8
from lm_jax.errors import UserError

FILE = "tokenizer.model"
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
# Left out of what the trainer sees: U+2581 would count as a space, and a sentence with U+2585, its
# mark for unknown text, would be skipped whole.
_RESERVED = re.compile("[\u2581\u2585]")
_SENTENCE = 4000  # characters; the BPE trainer counts positions within a word in 16 bits
_THREADS = 4  # fixed: unigram adds up its counts by thread, so the result depends on it


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, ours or a published one.

    Attributes:
      model: the serialized model.
      unk_id: the piece for text that has none.

    Raises:
      UserError: `model` is no SentencePiece model.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self._sp = sp = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and sp.LoadFromSerializedProto(model) and sp.vocab_size()
            pieces = [_bytes(sp, i) for i in range(sp.vocab_size())] if loaded else []
        except (RuntimeError, ValueError):  # a piece that is no text, or a byte that is none
            loaded = False
        if not loaded:
            raise UserError("not a SentencePiece model")
        n, self.unk_id = sp.vocab_size(), sp.unk_id()
        specials = {i: sp.id_to_piece(i) for i in range(n) if sp.is_control(i) or sp.is_unknown(i)}
        bos, eos, pad = (i if i >= 0 else None for i in (sp.bos_id(), sp.eos_id(), sp.pad_id()))
        super().__init__(
            [b"" if i in specials else pieces[i] for i in range(n)],
            bos_id=bos,
            eos_id=eos,
            # Ours have no padding piece, but one for unknown text, which byte fallback never needs.
            pad_id=pad if pad is not None else self.unk_id,
            mask_id=next((i for i, name in specials.items() if name in (MASK, "[MASK]")), None),
            specials=specials,
            prefix_bytes=int("".join(sp.encode("a", out_type=str)).startswith(SPACE)),
        )
        # A literal U+2581 would come back as a space. Where the model leaves text as it is (ours
        # do), its bytes stand for it instead.
        probe = "  a  b  "
        ids = [sp.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        exact = b"".join(self._bytes_of(i) for i in sp.encode(probe)) == probe.encode()
        self._space_ids = ids if exact and all(sp.is_byte(i) for i in ids) else None

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        if self._space_ids is None or SPACE not in text:
            return np.asarray(self._sp.encode(text), np.int32)
        first, *rest = text.split(SPACE)
        ids = self._sp.encode(first)
        for part in rest:
            ids += self._space_ids
            ids += self._sp.encode(part)
        return np.asarray(ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        apart = {i for i, text in enumerate(texts) if SPACE in text}
        together = iter(
            self._sp.encode([t for i, t in enumerate(texts) if i not in apart], num_threads=1)
        )
        return [
            self.encode(text) if i in apart else np.fromiter(next(together), np.int32)
            for i, text in enumerate(texts)
        ]

    def _definition(self) -> dict[str, bytes]:
        return {FILE: self.model}

    def __reduce__(self):
        return SentencePieceTokenizer, (self.model,)


def train_sentencepiece(
    config: TokenizerConfig,
    documents: Iterable[str],
    on_progress: Callable[[int], None] | None = None,
    mask: bool = False,
) -> SentencePieceTokenizer:
    """Learns `config.vocab_size` pieces from the first `config.train_bytes` of the documents.

    The pieces include those for unknown text, bos, eos and, where `mask` asks for it, the mask.

    Any text comes back exactly as it was: nothing is normalized, and what has no piece is spelled
    in bytes. Digits stand alone; runs of spaces may be pieces, as indentation wants.

    Raises:
      UserError: there is no text, or `config.vocab_size` does not fit it.
    """
    import sentencepiece

    failures: list[BaseException] = []  # the trainer would turn them into its own RuntimeError

    def sentences() -> Iterator[str]:
        try:
            yield from _sentences(documents, config.train_bytes, on_progress)
        except BaseException as e:
            failures.append(e)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type=config.algorithm,
            vocab_size=config.vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * _SENTENCE,  # bytes; a longer one would be dropped
            control_symbols=MASK if mask else "",
            num_threads=_THREADS,
            num_sub_iterations=1,  # unigram: a third less CPU time than 2, no worse pieces
            minloglevel=2,  # errors only, and those are raised
        )
    except RuntimeError as e:
        if failures:
            raise failures[0] from None
        raise _explained(e, config.vocab_size, 4 if mask else 3) from None
    return SentencePieceTokenizer(model.getvalue())


def _explained(error: RuntimeError, vocab_size: int, specials: int) -> Exception:
    message = str(error)
    if match := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return UserError(
            f"tokenizer.vocab_size = {vocab_size} is more than the training text supports: set it"
            f" to at most {match[1]}, or train on more text"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"tokenizer.vocab_size = {vocab_size} is too small: the 256 bytes, {specials} special"
            f" tokens and the characters of the training text alone need {match[1]}; set it to more"
            " than that"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return UserError("no text to train a tokenizer on: the documents are empty")
    return error


def _sentences(
    documents: Iterable[str], limit: int, on_progress: Callable[[int], None] | None
) -> Iterator[str]:
    """Cuts up to `limit` bytes of the documents into sentences, at line ends where it can."""
    used = 0
    for document in documents:
        data = utf8(document)
        if len(data) > limit - used:
            document = data[: limit - used].decode("utf-8", errors="ignore")  # whole characters
        used += min(len(data), limit - used)
        text = _RESERVED.sub("", document)
        start = 0
        while start < len(text):
            end = start + _SENTENCE
            if end < len(text):
                end = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) or end
                end = end if end > start else start + _SENTENCE
            yield text[start:end]
            start = end
        if on_progress:
            on_progress(used)
        if used >= limit:
            return


def _bytes(sp, id: int) -> bytes:
    piece = sp.id_to_piece(id)
    return bytes([int(piece[1:-1], 16)]) if sp.is_byte(id) else piece.replace(SPACE, " ").encode()
