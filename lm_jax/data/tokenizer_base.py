"""What every tokenizer is: a table from ids to the bytes of text they stand for, and an `encode`.

Decoding, streaming and byte counts all follow from that table, so they cannot disagree. The two
tokenizers that need no library, bytes and characters, are here as well.
"""

import abc
import codecs
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lm_jax.errors import UserError

META = "lm_jax_tokenizer.json"  # in a saved folder: the kind, the fingerprint and what is small
MASK = "<mask>"  # how our own vocabularies call the mask token
_UNKNOWN_ID = "\ufffd".encode()


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
      kind: 'sentencepiece', 'bytes', 'characters' or 'huggingface'.
      vocab_size: the number of ids; each id is in [0, vocab_size).
      bos_id, eos_id: the ids that begin and end a document, or None. `encode` never yields them,
        whatever the text says.
      pad_id: an id to fill rows with. It may be that of a real token: weights mask padding, ids
        do not.
      mask_id: the id that stands in for a hidden token (BERT), or None. Like bos and eos it is
        never read out of text.
      bos_before_text: whether a text to be continued begins with bos. Ours do, if they have one; a
        published one does if its post-processor says so: Llama and Gemma, not GPT-2 and Qwen.
      specials: the name of each id that stands for no text.
      prefix_bytes: 1 where `encode` puts a space before the text, which `decode` takes off again
        (Llama 2), so that the byte counts of a text's ids add up to its own plus 1; else 0.
    """

    kind: str

    def __init__(
        self,
        pieces: list[bytes] | None,
        *,
        bos_id: int | None,
        eos_id: int | None,
        pad_id: int,
        specials: Mapping[int, str],
        mask_id: int | None = None,
        vocab_size: int | None = None,
        prefix_bytes: int = 0,
        bos_before_text: bool | None = None,
    ):
        self._pieces = pieces  # None: what an id stands for depends on its neighbours
        self.vocab_size = len(pieces) if pieces is not None else vocab_size
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.mask_id = mask_id
        self.bos_before_text = bos_id is not None if bos_before_text is None else bos_before_text
        self.specials = dict(specials)
        self.prefix_bytes = prefix_bytes

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, int32[n], without bos or eos.

        Raises:
          UserError: the text cannot be encoded: a lone surrogate, which has no UTF-8 form, or a
            character that a vocabulary of characters lacks. The message names its position.
        """

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in less time where the library behind it takes several at once.

        Raises:
          UserError: as `encode`.
        """
        return [self.encode(text) for text in texts]

    @property
    def begin_id(self) -> int | None:
        """What a document begins with: bos, or eos in place of a missing one, as for GPT-2."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode_prompt(self, text: str) -> np.ndarray:
        """The ids of a text to be continued, int32[n].

        A document that is learned from always begins with `begin_id`, so that a model knows how one
        begins. A prompt begins with it where the tokenizer's own rule says so (`bos_before_text`),
        as Transformers has it, whoever trained the model; and where it is empty, as there must be
        something to continue.
        """
        ids = self.encode(text)
        if self.begin_id is None or (len(ids) and not self.bos_before_text):
            return ids
        return np.concatenate([np.array([self.begin_id], np.int32), ids])

    def encode_with_specials(self, text: str) -> np.ndarray:
        """The ids of a text that a chat template made, int32[n]: the names of special tokens are
        read as these tokens, wherever they stand. For text of any other origin, use `encode`."""
        return self.encode_with_marks(text, {name: i for i, name in self.specials.items()})

    def encode_with_marks(self, text: str, marks: Mapping[str, int]) -> np.ndarray:
        """As `encode_with_specials`, but the names are `marks`, with these ids: int32[n]."""
        ids = [np.zeros(0, np.int32)]
        for i, part in enumerate(_any_of(marks).split(text)):
            if part:
                ids.append(np.array([marks[part]], np.int32) if i % 2 else self.encode(part))
        return np.concatenate(ids)

    def special_in(self, text: str) -> str | None:
        """The first name of a special token in a text; None where there is none."""
        found = _any_of(self.specials.values()).search(text)
        return found and found[0]

    def frame(self, ids: np.ndarray) -> np.ndarray:
        """`ids` of a text by itself with what goes around it, int32[n].

        Of a published tokenizer it is what its post-processor says; of ours bos, and eos behind
        where there is a mask token: the documents of a masked model are whole.
        """
        front = [self.bos_id] if self.bos_before_text else []
        back = [self.eos_id] if front and self.mask_id is not None else []
        return np.array([*front, *ids, *back], np.int32)

    def frame_pair(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, int]:
        """The ids of two texts that belong together with what goes around them, int32[n], and the
        place in it of the first id of `second`.

        Of a published tokenizer it is what its post-processor says; of ours eos behind each.
        """
        front = [] if self.begin_id is None else [self.begin_id]
        back = [] if self.eos_id is None else [self.eos_id]
        ids = np.array([*front, *first, *back, *second, *back], np.int32)
        return ids, len(front) + len(first) + len(back)

    def locate(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """`encode`, and from which character to which each id stands for: int32[n], int32[n, 2].

        Raises:
          UserError: as `encode`; or that cannot be told.
        """
        ids = self.encode(text)
        data = utf8(text)
        ends_n = np.cumsum(self.byte_lengths[ids]) - self.prefix_bytes
        if len(ids) and ends_n[-1] != len(data):
            raise UserError(
                f"this tokenizer ({self.kind}) rewrites the text, so that no answer can be found"
                f" again in it: {text[:40]!r} ..."
            )
        # The character that each byte belongs to; one past the end for the end.
        character = np.cumsum([(b & 0xC0) != 0x80 for b in data]) - 1
        starts_n = np.concatenate([[0], ends_n[:-1]]).clip(0)
        first_n = character[np.minimum(starts_n, len(data) - 1)] if len(ids) else starts_n[:0]
        last_n = character[np.clip(ends_n - 1, 0, None)] + 1 if len(ids) else first_n
        return ids, np.stack([first_n, np.maximum(first_n, last_n)], axis=1).astype(np.int32)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end what is generated."""
        return frozenset() if self.eos_id is None else frozenset([self.eos_id])

    @property
    def least_vocabulary(self) -> int:
        """How many ids a model must have for all that is encoded and all that is named here."""
        named = [i for i in (self.bos_id, self.eos_id, self.pad_id, self.mask_id) if i is not None]
        ordinary = self.vocab_size - 1
        while ordinary in self.specials:
            ordinary -= 1
        return max(ordinary, *named) + 1

    @abc.abstractmethod
    def _definition(self) -> dict[str, bytes]:
        """What defines this tokenizer beyond its kind: file names and contents.

        The content of META, if there is one, is a JSON object that is saved inside that file.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Specials stand for none; invalid UTF-8 reads as U+FFFD, and so does an
        id outside the vocabulary, which a model whose embedding is padded may yield."""
        data = b"".join(self._bytes_of(int(i)) for i in ids)
        if self.prefix_bytes and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def stream(self) -> "Stream":
        """A decoder that takes one id at a time."""
        return Stream(self)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for: int32[vocab_size], 0 for specials.

        Over `encode(text)` they add up to `len(text.encode()) + prefix_bytes` (an empty text has
        no prefix) wherever decoding gives the text back.

        Raises:
          UserError: an id's text depends on its neighbours, as WordPiece's spaces do.
        """
        if self._pieces is None:
            raise UserError(
                f"bits per byte is undefined for this tokenizer ({self.kind}): its tokens do not"
                " say which bytes of text they stand for"
            )
        return np.array([len(piece) for piece in self._pieces], np.int32)

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        """Which ids begin a word, for masking whole words: bool[vocab_size].

        A word begins at whitespace, the only sign of it that an id of its own can bear: so it is
        ' the' and its continuations, punctuation that follows without a space included, and where
        bytes or characters are the ids, a space and all up to the next. A run of text without
        spaces, as in Chinese, is one word. Specials stand alone: each begins a word, and as the
        token after one may bear no sign, a word never reaches across a special. WordPiece says it
        otherwise: all but '##...' begin a word, punctuation and each Chinese character included.

        Raises:
          UserError: the vocabulary marks where words end, not where they begin.
        """
        if self._pieces is None:
            raise UserError(
                f"whole words cannot be told for this tokenizer ({self.kind}): its tokens do not"
                " say where a word begins"
            )
        starts = [p.decode("utf-8", errors="replace")[:1].isspace() for p in self._pieces]
        starts = np.array(starts, bool)
        starts[list(self.specials)] = True
        return starts

    @functools.cached_property
    def fingerprint(self) -> str:
        """A SHA-256, in hex, of all that defines this tokenizer: equal means the same ids."""
        digest = hashlib.sha256(self.kind.encode())
        for name, content in sorted(self._definition().items()):
            digest.update(f"\0{name}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer(folder)` needs, and makes the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = self._definition()
        meta = {"kind": self.kind, "fingerprint": self.fingerprint}
        meta |= json.loads(files.pop(META, b"{}"))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")

    def piece(self, id: int) -> str:
        """A readable form of one id: a special's name, its text in quotes, or its bytes."""
        if id in self.specials:
            return self.specials[id]
        data = self._bytes_of(id)
        try:
            return repr(data.decode("utf-8"))
        except UnicodeDecodeError:
            return repr(data)

    def spelling(self, id: int) -> bytes:
        """The UTF-8 bytes, whole characters or not, that an id adds to a text; where that depends
        on its neighbours, its name. Specials add none."""
        return self._bytes_of(id)

    def _bytes_of(self, id: int) -> bytes:
        return self._pieces[id] if 0 <= id < self.vocab_size else _UNKNOWN_ID


class Stream:
    """Decodes one id at a time, and yields text as soon as no later id can change it.

    The texts of every `push` and of `flush`, joined, are `decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip = tokenizer.prefix_bytes > 0

    def push(self, id: int) -> str:
        data = self._tokenizer._bytes_of(int(id))
        if self._strip and data:
            self._strip = False
            data = data[1:] if data.startswith(b" ") else data
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class BytesTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then bos and eos, then the mask token where it is asked for."""

    kind = "bytes"

    def __init__(self, mask: bool = False):
        specials = {256: "<s>", 257: "</s>"} | ({258: MASK} if mask else {})
        super().__init__(
            [bytes([b]) for b in range(256)] + [b""] * len(specials),
            bos_id=256,
            eos_id=257,
            pad_id=257,
            mask_id=258 if mask else None,
            specials=specials,
        )

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def _definition(self) -> dict[str, bytes]:
        return {} if self.mask_id is None else {META: b'{"mask": true}'}


class CharacterTokenizer(Tokenizer):
    """The characters of a corpus in code point order and nothing else, as nanoGPT's
    shakespeare_char: no bos, no eos. The mask token, where it is asked for, comes last.

    Attributes:
      characters: in the order of their ids.
    """

    kind = "characters"

    def __init__(self, characters: Iterable[str], mask: bool = False):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise UserError("no characters to make a vocabulary of: the training text is empty")
        self._codes = code_points(self.characters)
        n = len(self.characters)
        super().__init__(
            [c.encode() for c in self.characters] + [b""] * mask,
            bos_id=None,
            eos_id=None,
            pad_id=0,
            mask_id=n if mask else None,
            specials={n: MASK} if mask else {},
        )

    def encode(self, text: str) -> np.ndarray:
        codes = code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        unknown = np.flatnonzero(self._codes[ids] != codes)
        if unknown.size:
            raise UserError(
                f"{describe(text, int(unknown[0]))} is not among the {len(self._codes)} characters"
                " of the vocabulary: remove it, or use a tokenizer.kind that knows all text"
                " (sentencepiece, bytes)"
            )
        return ids.astype(np.int32)

    def _definition(self) -> dict[str, bytes]:
        mask = {} if self.mask_id is None else {"mask": True}
        return {META: json.dumps({"characters": self.characters} | mask).encode()}


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")


def utf8(text: str) -> bytes:
    """The UTF-8 form of `text`.

    Raises:
      UserError: it holds a lone surrogate, which has none. Replacing it would hide damaged data,
        and the text would not come back as it was.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(
            f"{describe(text, e.start)} is half of a surrogate pair and has no UTF-8 form: the"
            " text was damaged before it came here (cut in the middle of a \\uXXXX\\uXXXX escape,"
            " or read with a wrong encoding)"
        ) from None


def code_points(text: str) -> np.ndarray:
    """uint32[len(text)]"""
    utf8(text)  # UTF-32 has no lone surrogates either; this names the place
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def describe(text: str, position: int) -> str:
    """Names a character of `text` and where it stands: position from 0, line and column from 1."""
    character = text[position]
    line = text.count("\n", 0, position) + 1
    column = position - (text.rfind("\n", 0, position) + 1) + 1
    return (
        f"the character {character!a} (U+{ord(character):04X}) at position {position}"
        f" (line {line}, column {column})"
    )
