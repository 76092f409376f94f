"""Validation reads each target of the split once, on any number of processes."""

import pytest
from data_helpers import (
    NumbersTokenizer,
    assert_same,
    data_config,
    expected_targets,
    joined,
    jsonl,
    numbered_documents,
    targets,
)

from lm_jax.data.held_out import validation_batches
from lm_jax.errors import UserError

LENGTHS = [3, 60, 1, 8, 9, 2, 17, 5, 0, 12, 7, 33]
PACKINGS = ["first_fit", "concatenate", "crop"]
TOKENIZER = NumbersTokenizer(bos_id=1, eos_id=2)


def all_targets(packing, texts):
    if packing != "crop":
        return expected_targets(texts, 1, 2)
    flat = "1 " + " 2 1 ".join(text for text in texts if text)
    return expected_targets([flat])


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_target_once(tmp_path, packing, processes):
    texts = numbered_documents(LENGTHS)
    config = data_config(jsonl(tmp_path / "a.jsonl", texts), packing=packing)
    parts = [
        list(
            validation_batches(
                config, TOKENIZER, batch_size=8, process_index=i, process_count=processes
            )
        )
        for i in range(processes)
    ]
    batches = [joined(together) for together in zip(*parts, strict=True)]
    assert {array.shape for batch in batches for array in batch.values()} == {(8, 8)}
    assert targets(batches) == all_targets(packing, texts)
    for a, b in zip(batches, validation_batches(config, TOKENIZER, batch_size=8), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_sample_is_spread_over_the_split(tmp_path, packing):
    texts = numbered_documents([36 + i % 5 for i in range(16)])
    config = data_config(jsonl(tmp_path / "a.jsonl", texts), packing=packing)
    whole = all_targets(packing, texts)

    def sample(count):
        return list(validation_batches(config, TOKENIZER, batch_size=8, max_batches=count))

    few = sample(4)
    assert len(few) == 4
    seen = targets(few)
    assert seen.total() == len(seen) and seen.keys() <= whole.keys()
    places = [target for _, target in seen if target >= 1000]
    assert len({place // 1000 for place in places}) >= 12
    assert len({place % 1000 // 10 for place in places} & {0, 1, 2, 3}) >= 3
    for a, b in zip(few, sample(4), strict=True):
        assert_same(a, b)
    assert targets(sample(1000)) == whole


def test_errors(tmp_path):
    config = data_config(jsonl(tmp_path / "a.jsonl", ["5", "6"]))
    with pytest.raises(UserError, match="3 processes cannot share 8 rows"):
        validation_batches(config, TOKENIZER, batch_size=8, process_count=3)
    for packing in PACKINGS:
        config.packing = packing
        config.validation_sources = (jsonl(tmp_path / "b.jsonl", ["5"]),)
        with pytest.raises(UserError, match="no document of two tokens"):
            list(validation_batches(config, NumbersTokenizer(), batch_size=8))
