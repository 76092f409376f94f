"""What the tests of the data room share: a tokenizer of numbers, small corpora, and comparisons."""

import itertools
import json
import multiprocessing
import sys
from collections import Counter

import numpy as np

from lm_jax.config import DataConfig
from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.errors import UserError


class NumbersTokenizer:
    """Texts are numbers, and so are their tokens: every token of a corpus can be told apart.

    In a worker process it refuses to encode where JAX has started a backend.
    """

    vocab_size = 1 << 20
    begin_id = Tokenizer.begin_id

    def __init__(self, bos_id=None, eos_id=None, pad_id=0):
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id

    def encode(self, text):
        if multiprocessing.parent_process() is not None and "jax" in sys.modules:
            from jax._src import xla_bridge

            if xla_bridge.backends_are_initialized():
                raise UserError("a worker started a JAX backend")
        return np.array([int(word) for word in text.split()], np.int32)


def numbered_documents(lengths, first=1000, step=1000):
    """Document i holds `lengths[i]` consecutive numbers from first + i step on."""
    return [
        " ".join(str(first + i * step + k) for k in range(length))
        for i, length in enumerate(lengths)
    ]


def jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: t}) + "\n" for t in texts))
    return str(path)


def data_config(*sources, **changes):
    """A small config of which no document is held out for validation."""
    defaults = {"length": 8, "batch_size": 8, "lanes": 4, "packing_bins": 4, "epochs": 1}
    return DataConfig(
        **(defaults | {"sources": sources, "validation_sources": sources[:1]} | changes)
    )


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def joined(batches):
    """Batches of several processes as the global batch."""
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def targets(batches):
    """How often each (input, target) pair counts, over `batches`."""
    found = Counter()
    for batch in batches:
        real = batch["weights"] == 1
        pairs = zip(batch["inputs"][real].tolist(), batch["targets"][real].tolist(), strict=True)
        found.update(pairs)
    return found


def expected_targets(texts, bos=None, eos=None):
    """The pairs of `targets` if each token of each text after its first is a target once."""
    found = Counter()
    for text in texts:
        ids = [int(word) for word in text.split()]
        if not ids:
            continue
        ids = ([bos] if bos is not None else []) + ids + ([eos] if eos is not None else [])
        found.update(itertools.pairwise(ids))
    return found
