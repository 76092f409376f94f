"""A corpus as token ids on disk is what its text is: the same documents, rows and numbers."""

import gzip
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import assert_same, data_config, jsonl

from lm_jax.data import blocks as blocks_lib
from lm_jax.data.encoded import Tokens
from lm_jax.data.held_out import validation_batches
from lm_jax.data.loader import train_stream
from lm_jax.data.pretokenizing import pretokenize
from lm_jax.data.readers import Errors
from lm_jax.data.sources import all_documents, texts
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError

BYTES = BytesTokenizer()
WORDS = [f"{n} {'fish ' * (n % 7)}é{n}" for n in range(60)]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A folder with files of every kind, which make many blocks."""
    monkeypatch.setattr(blocks_lib, "_BYTES", 100)
    folder = tmp_path / "corpus"
    folder.mkdir()
    jsonl(folder / "a.jsonl", ["", *WORDS])
    blank = ["\n", "\n\n", "\r\n \r\n", "\n \t\n\n\n", "\n   "]
    for name in ("b.txt", "c.txt"):
        text = "\ufeff" + "".join(w + blank[i % len(blank)] for i, w in enumerate(WORDS))
        (folder / name).write_text(text, newline="")
    (folder / "d.md").write_text("")
    (folder / "e.md").write_text("one")
    (folder / "f.txt.gz").write_bytes(gzip.compress("\n\n".join(WORDS).encode()))
    pq.write_table(
        pa.table({"text": WORDS, "n": range(60)}), folder / "g.parquet", row_group_size=9
    )
    return str(folder)


@pytest.mark.parametrize("document", ["file", "paragraph", "line"])
def test_blocks_hold_all_documents_in_order(corpus, document):
    config = data_config(corpus, document=document, on_error="skip")
    errors = Errors("skip")
    found = list(blocks_lib.blocks(config, errors))
    opened = [list(block.open(errors)) for block in found]
    assert [text for block in opened for text in block] == list(all_documents(config))
    assert len({block.identity for block in found}) == len(found) > 20
    largest = max(len(text) for block in opened for text in block)
    sizes = [sum(map(len, b)) for b, o in zip(opened, found) if ".gz" not in o.identity]
    assert max(sizes) < 200 + largest


@pytest.mark.parametrize("packing", ["first_fit", "concatenate", "crop"])
def test_training_is_the_same_from_text_and_from_tokens(corpus, tmp_path, packing):
    changes = {"document": "line", "on_error": "skip", "packing": packing, "epochs": None}
    text = data_config(corpus, **changes, validation_fraction=0.1)
    tokens = str(tmp_path / "tokens")
    pretokenize(text, BYTES, tokens, workers=1)
    ids = data_config(f"tokens:{tokens}", **changes, validation_fraction=0.1)
    text.validation_sources = ids.validation_sources = ()
    with train_stream(text, BYTES, seed=3) as a, train_stream(ids, BYTES, seed=3) as b:
        for _ in range(20):
            assert_same(next(a), next(b))
            assert a.get_state() == b.get_state()
    of_text = list(validation_batches(text, BYTES, batch_size=4))
    of_ids = list(validation_batches(ids, BYTES, batch_size=4))
    for x, y in zip(of_text, of_ids, strict=True):
        assert_same(x, y)


def test_the_ends_of_documents_are_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 20)
    changes = {"validation_split": "tail", "validation_fraction": 0.1}
    text = data_config(str(tmp_path / "a.txt"), **changes)
    pretokenize(text, BYTES, str(tmp_path / "tokens"), workers=1)
    ids = data_config(f"tokens:{tmp_path}/tokens/", **changes)
    text.validation_sources = ids.validation_sources = ()
    (a,), (b,) = (list(validation_batches(c, BYTES, batch_size=8)) for c in (text, ids))
    assert_same(a, b)


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in ("ids", "ends", "lm_jax_tokens.json")}


@pytest.mark.parametrize("workers", [1, 2])
def test_one_that_was_stopped_goes_on(corpus, tmp_path, workers):
    config = data_config(corpus, document="line", on_error="skip")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    meta, added = pretokenize(config, BYTES, str(whole), workers=workers)
    assert added == meta.text_bytes == meta.tokens and meta.documents == len(all_documents(config))

    class Stopped(Exception):
        pass

    counts = []

    def stop_at(text_bytes):
        counts.append(text_bytes)
        if len(counts) in (4, 9, 20):
            raise Stopped

    while True:
        try:
            pretokenize(config, BYTES, str(parts), workers=workers, on_progress=stop_at)
            break
        except Stopped:
            with pytest.raises(UserError, match="not complete"):
                Tokens(str(parts))
            with open(parts / "ids", "ab") as f:  # written, and not yet known when a kill came
                f.write(b"more")
    assert counts == sorted(counts) and len(counts) > 25
    assert files_of(parts) == files_of(whole)
    again = []
    pretokenize(config, BYTES, str(parts), workers=1, on_progress=again.append)
    assert again == [meta.text_bytes] and files_of(parts) == files_of(whole)


def test_other_text_is_not_added_to_it(tmp_path):
    source, folder = tmp_path / "a.jsonl", str(tmp_path / "tokens")
    config = data_config(jsonl(source, WORDS))
    pretokenize(config, BYTES, folder, workers=1)
    before = files_of(tmp_path / "tokens")
    for other in (
        data_config(str(source), on_error="skip"),
        data_config(str(source), text_key="body"),
        data_config(jsonl(tmp_path / "b.jsonl", WORDS)),
    ):
        with pytest.raises(UserError, match="holds tokens of other text"):
            pretokenize(other, BYTES, folder, workers=1)
    with pytest.raises(UserError, match="another tokenizer"):
        pretokenize(config, CharacterTokenizer("".join(WORDS)), folder, workers=1)
    assert files_of(tmp_path / "tokens") == before
    more = data_config(str(source), str(tmp_path / "b.jsonl"))
    assert pretokenize(more, BYTES, folder, workers=1)[0].documents == 2 * len(WORDS)
    with pytest.raises(UserError, match="holds tokens of other text"):  # more than is asked for
        pretokenize(config, BYTES, folder, workers=1)
    jsonl(source, ["other", *WORDS])
    with pytest.raises(UserError, match="holds tokens of other text"):
        pretokenize(more, BYTES, folder, workers=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(UserError, match="holds other files"):
        pretokenize(config, BYTES, str(tmp_path / "full"), workers=1)


def test_what_cannot_be_read_keeps_its_number(tmp_path, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\nno\n{"text": 3}\n{"text": "bc"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        pretokenize(data_config(str(source)), BYTES, str(tmp_path / "tokens"), workers=1)
    config = data_config(str(source), on_error="skip")
    folder = str(tmp_path / "skipping")
    meta, _ = pretokenize(config, BYTES, folder, workers=1)
    assert meta.skipped == 2 and capsys.readouterr().err.count("skipped: ") == 2
    assert [len(x.ids) for x in Tokens(folder)] == [1, 0, 0, 2]
    source.write_text('{"text": "ab"}\n{"text": "ax"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: the character 'x'"):
        pretokenize(config, CharacterTokenizer("ab"), str(tmp_path / "characters"), workers=1)
    with pytest.raises(UserError, match="no documents"):
        config = data_config(jsonl(tmp_path / "none.jsonl", []), on_error="skip")
        pretokenize(config, BYTES, str(tmp_path / "none"), workers=1)


def test_tokens_that_do_not_fit_are_refused(tmp_path):
    folder = tmp_path / "tokens"
    text = data_config(jsonl(tmp_path / "a.jsonl", WORDS))
    pretokenize(text, BYTES, str(folder), workers=1)
    config = data_config(f"tokens:{folder}")
    with (
        pytest.raises(UserError, match=r"made with another tokenizer: set tokenizer\.kind='file'"),
        train_stream(config, CharacterTokenizer("ab"), seed=0) as stream,
    ):
        next(stream)
    with pytest.raises(UserError, match="no text to learn a tokenizer from"):
        texts(config, "train")[0]
    with pytest.raises(UserError, match="write 'tokens:"):
        all_documents(data_config(str(folder)))
    with pytest.raises(UserError, match="no text to make tokens of"):
        pretokenize(config, BYTES, str(tmp_path / "again"), workers=1)
    examples = data_config(f"tokens:{folder}", objective="complete", prompt="{a}", target="{b}")
    with pytest.raises(UserError, match="objective 'complete' is about records"):
        all_documents(examples)
    with pytest.raises(UserError, match=r"no tokens there \(lm_jax_tokens\.json is missing\)"):
        Tokens(str(tmp_path))
    meta = json.loads((folder / "lm_jax_tokens.json").read_text())
    for damaged in (meta | {"tokens": meta["tokens"] + 1}, {"tokens": 3}, 3):
        other = tmp_path / "damaged"
        shutil.copytree(folder, other)
        (other / "lm_jax_tokens.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="damaged"):
            Tokens(str(other))
        shutil.rmtree(other)


def test_large_vocabularies_keep_their_ids(tmp_path):
    characters = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    (tmp_path / "a.txt").write_text(characters)
    tokenizer = CharacterTokenizer(characters)
    pretokenize(data_config(str(tmp_path / "a.txt")), tokenizer, str(tmp_path / "t"), workers=1)
    (found,) = Tokens(str(tmp_path / "t"))
    np.testing.assert_array_equal(found.ids, np.arange(70_000))
    assert found.ids.dtype == np.int32
