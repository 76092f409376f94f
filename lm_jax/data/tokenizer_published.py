"""Published tokenizers: a Hugging Face `tokenizer.json`, read by the `tokenizers` library."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from lm_jax import json_text
from lm_jax.data import tokenizer_files as files
from lm_jax.data.tokenizer_base import META, Stream, Tokenizer, utf8
from lm_jax.data.tokenizer_spelling import spelling_of
from lm_jax.errors import UserError

FILE = "tokenizer.json"
GENERATION = "generation_config.json"

# Names to go by where no tokenizer_config.json or special_tokens_map.json says which they are.
_BOS = ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>", "[CLS]", "<|endoftext|>")
_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[SEP]")
_MASK = ("[MASK]", "<mask>")
_MOST_IDS = 1 << 24
_CANNOT_ENCODE = "the 'tokenizers' library cannot encode the text with this tokenizer"
_PAD = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. Its special tokens are never read out of text: '<|endoftext|>' in a
    document is spelled like any other word, so that no document can end itself.

    Attributes:
      companions: files that were beside it and have no part in encoding (`tokenizer_config.json`,
        `generation_config.json`, chat templates), by name. They are saved with it, so that an
        export has them again.

    Raises:
      UserError: `definition` is no tokenizer, an id is outside its vocabulary, or its
        post-processor puts several tokens in front of a text.
    """

    kind = "huggingface"

    def __init__(
        self,
        definition: str,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int = 0,
        mask_id: int | None = None,
        companions: Mapping[str, bytes] = MappingProxyType({}),
    ):
        self.companions = dict(companions)
        self._json = definition
        self._hf = tokenizer = _whole(definition)
        tokenizer.encode_special_tokens = True  # as text; the name reads otherwise
        # As the library has read it: it takes definitions that leave out what they are.
        processor = tokenizer.post_processor
        processor = None if processor is None else json.loads(processor.__getstate__())
        try:
            self._around = front, _ = _around(processor)
            self._around_pair = _around_pair(processor)
        except (KeyError, TypeError, IndexError) as e:
            raise UserError(f"its post-processor is not one of a text and of two: {e!r}") from None
        if len(front) > 1:
            raise UserError(
                f"its post-processor puts {len(front)} tokens in front of a text, and lm_jax puts"
                " one or none"
            )
        bos_id = front[0] if front else bos_id
        names = {i: token for token, i in tokenizer.get_vocab(with_added_tokens=True).items()}
        if not names:
            raise UserError("a tokenizer with an empty vocabulary")
        added = tokenizer.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        special |= {i for i in (bos_id, eos_id, mask_id) if i is not None}
        size = max(names) + 1
        if size > _MOST_IDS:
            raise UserError(f"it has ids up to {size - 1}, and no vocabulary is as large")
        ids = [("bos", bos_id), ("eos", eos_id), ("pad", pad_id), ("mask", mask_id)]
        framing = {i for ids in (*self._around, *self._around_pair) for i in ids}
        for name, i in [*ids, *(("post-processor's", i) for i in sorted(framing))]:
            if i is not None and i not in names:
                raise UserError(f"the {name} id {i} is not in the vocabulary of {size} ids")
        self._names = names
        self._by_marks: dict[tuple[tuple[str, int], ...], tuple[Any, dict[int, int]]] = {}
        spell, prefix_bytes = spelling_of(tokenizer.decoder)
        pieces = None
        if spell:
            pieces = [b""] * size  # an id without a name stands for nothing
            for i in names.keys() - special:
                pieces[i] = spell(names[i], i in added)
        super().__init__(
            pieces,
            vocab_size=size,
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=pad_id,
            mask_id=mask_id,
            bos_before_text=bool(front),
            specials={i: names[i] for i in sorted(special)},
            prefix_bytes=prefix_bytes,
        )

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(_encoded(self._hf, text).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        with files.of_the_library(_CANNOT_ENCODE):
            found = self._hf.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in found]

    def encode_with_specials(self, text: str) -> np.ndarray:
        return np.asarray(_encoded(self._marked, text).ids, np.int32)

    def encode_with_marks(self, text: str, marks: Mapping[str, int]) -> np.ndarray:
        tokenizer, of_mark = self._with_marks(tuple(sorted(marks.items())))
        ids = _encoded(tokenizer, text).ids
        return np.array([of_mark.get(i, i) for i in ids], np.int32)

    @functools.cached_property
    def _marked(self) -> Any:
        """One of its own: what it reads as special is a setting, and threads may share this."""
        return _whole(self._json)

    def _with_marks(self, marks: tuple[tuple[str, int], ...]) -> tuple[Any, dict[int, int]]:
        """One that spells its special tokens as text, and has tokens of the same rules for `marks`;
        and which ids those stand for."""
        if marks not in self._by_marks:
            import tokenizers

            tokenizer = _whole(self._json)
            tokenizer.encode_special_tokens = True
            added = tokenizer.get_added_tokens_decoder()
            for mark, i in marks:
                rules = (
                    {k: getattr(added[i], k) for k in ("lstrip", "rstrip")} if i in added else {}
                )
                tokenizer.add_tokens([tokenizers.AddedToken(mark, normalized=False, **rules)])
            ids = {tokenizer.token_to_id(mark): i for mark, i in marks}
            self._by_marks[marks] = tokenizer, ids
        return self._by_marks[marks]

    def decode(self, ids: Iterable[int]) -> str:
        if self._pieces is not None:
            return super().decode(ids)
        # No table (WordPiece): the library joins the tokens, and drops what it does not know.
        kept = [i for i in map(int, ids) if i in self._names and i not in self.specials]
        with files.of_the_library("the 'tokenizers' library cannot decode with this tokenizer"):
            return self._hf.decode(kept, skip_special_tokens=True)

    def stream(self) -> Stream:
        return super().stream() if self._pieces is not None else _GrowingStream(self)

    def piece(self, id: int) -> str:
        return super().piece(id) if self._pieces is not None else self._names.get(id, "")

    def spelling(self, id: int) -> bytes:
        return super().spelling(id) if self._pieces is not None else self.piece(id).encode()

    @functools.cached_property
    def starts_word(self) -> np.ndarray:
        model = self._hf.model
        if type(model).__name__ != "WordPiece":
            return super().starts_word
        inside = model.continuing_subword_prefix
        starts = [not self._names.get(i, inside).startswith(inside) for i in range(self.vocab_size)]
        starts = np.array(starts, bool)
        starts[list(self.specials)] = True
        return starts

    def frame(self, ids: np.ndarray) -> np.ndarray:
        front, back = self._around
        return np.array([*front, *ids, *back], np.int32)

    def frame_pair(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, int]:
        front, between, back = self._around_pair
        if not between:  # nothing would tell where the second begins
            return super().frame_pair(first, second)
        ids = np.array([*front, *first, *between, *second, *back], np.int32)
        return ids, len(front) + len(first) + len(between)

    def locate(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        found = _encoded(self._hf, text)
        return np.asarray(found.ids, np.int32), np.asarray(found.offsets, np.int32).reshape(-1, 2)

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """Its eos, and what generation_config.json has for eos: an id or several."""
        try:
            stated = json_text.loads(self.companions.get(GENERATION, b"{}")).get("eos_token_id")
        except (json_text.JsonError, AttributeError):
            raise UserError(f"{GENERATION}: not a JSON object") from None
        several = stated if isinstance(stated, list) else [] if stated is None else [stated]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in several):
            raise UserError(f"{GENERATION}: eos_token_id must be ids, not {stated!r}")
        return super().stop_ids | frozenset(several)

    @property
    def definition(self) -> str:
        """The content of `tokenizer.json`."""
        return self._json

    def save(self, folder: str | Path) -> None:
        super().save(folder)
        for name, content in self.companions.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)

    def _definition(self) -> dict[str, bytes]:
        ids = {"bos_id": self.bos_id, "eos_id": self.eos_id, "pad_id": self.pad_id}
        if self.mask_id is not None:
            ids["mask_id"] = self.mask_id
        return {FILE: self._json.encode(), META: json.dumps(ids).encode()}

    def __reduce__(self):
        ids = (self.bos_id, self.eos_id, self.pad_id, self.mask_id)
        return HuggingFaceTokenizer, (self._json, *ids, self.companions)


class _GrowingStream(Stream):
    """For decoders that see whole words: decodes everything again, and yields what grew.

    The last token is held back until another one follows: a decoder may spell it differently at
    the end, as BPE with a suffix does.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = ""

    def push(self, id: int) -> str:
        before = self._tokenizer.decode(self._ids)
        self._ids.append(int(id))
        after = self._tokenizer.decode(self._ids)
        final = before if after.startswith(before) else self._shown
        return self._show(final)

    def flush(self) -> str:
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :] if text.startswith(self._shown) else ""
        self._shown += new
        return new


def read_tokenizer_json(path: Path) -> HuggingFaceTokenizer:
    """Reads a `tokenizer.json` as it stands; the files beside it say which tokens are special.

    Raises:
      UserError: a file is not what its name says.
    """
    definition = json.dumps(files.read_definition(path), ensure_ascii=False)
    config = files.read_object(path.with_name("tokenizer_config.json"))
    if "added_tokens_decoder" not in config:  # Transformers reads older files only then
        config |= files.read_object(path.with_name("special_tokens_map.json"))
    return find_ids(path, definition, config)


def find_ids(
    path: Path,
    definition: str,
    config: dict[str, Any],
    companions: Mapping[str, bytes] = MappingProxyType({}),
) -> HuggingFaceTokenizer:
    """Finds the ids of bos, eos, padding and mask: those that `config` names, else the first
    well-known name in the vocabulary. A token that `config` sets to null is none.

    Args:
      path: the file that messages name.

    Raises:
      UserError: `definition` is no tokenizer, or a token that `config` names is not in it.
    """
    try:
        known_ids = parse(definition).get_vocab(with_added_tokens=True)

        def find(keys: tuple[str, ...], known: tuple[str, ...]) -> int | None:
            if stated := [config[key] for key in keys if key in config]:
                tokens = map(files.content, stated)
                token = next((token for token in tokens if token is not None), None)
                if not isinstance(token, str | None):
                    raise UserError(f"its {keys[0]} is neither text nor a token")
                if token is not None and token not in known_ids:
                    raise UserError(
                        f"'{token}', its {keys[0]} by the files beside it, is not in the vocabulary"
                    )
                return known_ids.get(token)
            return next((known_ids[name] for name in known if name in known_ids), None)

        bos = find(("bos_token", "cls_token"), _BOS)
        eos = find(("eos_token", "sep_token"), _EOS)
        pad = find(("pad_token",), _PAD)
        pad = next((i for i in (pad, eos, bos) if i is not None), 0)
        mask = find(("mask_token",), _MASK)
        return HuggingFaceTokenizer(definition, bos, eos, pad, mask, companions)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None


def parse(definition: str) -> Any:
    """A tokenizer of the `tokenizers` library."""
    import tokenizers

    with files.of_the_library("not a tokenizer that the 'tokenizers' library can read"):
        return tokenizers.Tokenizer.from_str(definition)


def _encoded(tokenizer: Any, text: str) -> Any:
    utf8(text)
    with files.of_the_library(_CANNOT_ENCODE):
        return tokenizer.encode(text, add_special_tokens=False)


def _whole(definition: str) -> Any:
    """One that neither cuts nor fills what it encodes."""
    tokenizer = parse(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _around(processor: dict[str, Any] | None) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts in front of a text, and those behind it."""
    front: list[int] = []
    back: list[int] = []
    if processor is None or processor["type"] == "ByteLevel":
        return front, back
    if processor["type"] == "Sequence":
        for step in processor["processors"]:  # each goes around what those before have made
            before, behind = _around(step)
            front, back = before + front, back + behind
        return front, back
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        return [processor["cls"][1]], [processor["sep"][1]]
    part = front  # TemplateProcessing
    for item in processor["single"]:
        if "Sequence" in item:
            part = back
        else:
            part += processor["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return front, back


def _around_pair(processor: dict[str, Any] | None) -> tuple[list[int], list[int], list[int]]:
    """The ids that a post-processor puts in front of two texts, between them, and behind."""
    parts: tuple[list[int], list[int], list[int]] = [], [], []
    if processor is None or processor["type"] == "ByteLevel":
        return parts
    if processor["type"] == "Sequence":
        for step in processor["processors"]:
            front, between, back = _around_pair(step)
            parts = front + parts[0], parts[1] + between, parts[2] + back
        return parts
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        sep = processor["sep"][1]
        twice = processor["type"] == "RobertaProcessing"
        return [processor["cls"][1]], [sep] * (1 + twice), [sep]
    place = 0  # TemplateProcessing
    for item in processor["pair"]:
        if "Sequence" in item:
            place += 1
        else:
            parts[place].extend(processor["special_tokens"][item["SpecialToken"]["id"]]["ids"])
    return parts
