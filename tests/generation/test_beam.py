"""Beam search: the texts that Transformers finds, alone and together, on one device and on many."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tiny_generation import LetterTokenizer, on_mesh

from lm_jax.config import MeshConfig
from lm_jax.errors import UserError
from lm_jax.generation import beam
from lm_jax.generation.batching import by_length
from lm_jax.generation.decoding import Generator
from lm_jax.generation.sampling import Sampling
from lm_jax.interop.export import save_pretrained
from lm_jax.model.cache import init_cache
from lm_jax.model.parameters import split
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import make_mesh

GREEDY = Sampling(temperature=0.0)
NEW = 12  # tokens a prompt
# (how many ids end a text, what is searched for).
SETTINGS = [
    (1, {"beams": 4}),
    (1, {"beams": 4, "length_penalty": 2.0, "early_stopping": True}),
    (1, {"beams": 4, "length_penalty": -1.0}),
    (1, {"beams": 4, "length_penalty": 3.0}),
    (3, {"beams": 3, "length_penalty": 0.0, "early_stopping": True}),
    (3, {"beams": 3, "length_penalty": 2.5}),
]


class Letters(LetterTokenizer):
    """As many ids as the models have, and some that end a text."""

    stop_ids: frozenset[int] = frozenset()

    def __init__(self):
        super().__init__(vocab_size=128, eos_id=None, bos_before_text=True)


def prompts(count: int, longest: int = 40) -> list[str]:
    rng = np.random.default_rng(0)
    return [Letters().decode(rng.integers(0, 97, n)) for n in rng.integers(0, longest, count)]


# Ids that are common in what these models write, but not so common that all ends at once.
ENDS = {"gpt2": (70, 117, 25), "llama": (42, 18, 125)}


def with_ends(model: Transformer, name: str, count: int) -> Generator:
    tokenizer = Letters()
    tokenizer.stop_ids = frozenset(ENDS[name][:count])
    return Generator(model, tokenizer)


@pytest.fixture
def ending(gpt2) -> Generator:
    return with_ends(gpt2, "gpt2", 1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_texts_are_those_of_transformers(name, request, tmp_path):
    model = request.getfixturevalue(name)
    save_pretrained(str(tmp_path), model.config, split(model))
    torch.set_num_threads(1)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)

    def theirs(prompts, stop_ids: frozenset[int], beams: int, **settings) -> list[list[int]]:
        """All prompts at once, padded on the left; each up to its eos."""
        T = max(map(len, prompts))
        ids, mask = (
            torch.tensor(np.stack([np.pad(x, (T - len(x), 0)) for x in rows]), dtype=torch.long)
            for rows in (prompts, map(np.ones_like, prompts))
        )
        found = hf.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            num_beams=beams,
            do_sample=False,
            eos_token_id=list(stop_ids),
            pad_token_id=0,
            **settings,
        )[:, T:].tolist()
        ends = [next((n for n, i in enumerate(row, 1) if i in stop_ids), NEW) for row in found]
        return [row[:n] for row, n in zip(found, ends)]

    texts, seen = prompts(8), []
    for count, settings in SETTINGS:
        generator = with_ends(model, name, count)
        tokenizer = generator.tokenizer
        got = generator.beam_search(texts, max_tokens=NEW, batch_size=8, **settings)
        ids = [tokenizer.encode_prompt(text) for text in texts]
        wanted = theirs(ids, tokenizer.stop_ids, **settings)
        for prompt, c, want in zip(texts, got, wanted, strict=True):
            assert list(c.tokens) == want, settings
            ended = want[-1] in tokenizer.stop_ids
            assert c.text == tokenizer.decode(want[:-1] if ended else want)
            assert c.prompt == prompt and c.finish_reason == ("eos" if ended else "length")
        seen.append([c.tokens for c in got])
    # All of it is seen here: texts that end, some of them early, and ones that go on to the limit.
    lengths = collections.Counter(len(tokens) for found in seen for tokens in found)
    assert lengths[NEW] > 2 and len(lengths) > 5
    assert all(seen[0] != other for other in seen[1:4]) and seen[4] != seen[5]


def test_one_beam_is_greedy(ending):
    texts, arguments = prompts(8), {"max_tokens": NEW, "batch_size": 8}
    wanted = ending.generate(texts, sampling=GREEDY, **arguments)
    assert {c.finish_reason for c in wanted} == {"eos", "length"}
    assert ending.beam_search(texts, beams=1, **arguments) == wanted


def test_a_text_does_not_depend_on_the_prompts_beside_it(ending):
    """Nor on where a prompt's tokens end among the blocks of slots that move together."""
    texts = [*prompts(5), "aa" * 31, "aa" * 62, ""]
    together = ending.beam_search(texts, max_tokens=30, batch_size=8)
    assert [c.prompt for c in together] == texts
    assert len({len(c.tokens) for c in together}) > 3
    alone = [ending.beam_search([text], max_tokens=30)[0] for text in texts]
    assert alone == together
    assert len(together[-2].tokens) == 1  # the model takes 64, bos included


def test_a_mesh_changes_nothing(ending):
    """Nor does it take as many prompts as it has shards."""
    texts, arguments = prompts(8), {"max_tokens": NEW, "batch_size": 8}
    alone = ending.beam_search(texts, **arguments)[:3]
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        generator = Generator(on_mesh(ending.model, mesh), ending.tokenizer)
        assert generator.beam_search(texts[:3], **arguments) == alone


def test_a_step_moves_the_slots_that_differ_and_no_others(gpt2):
    """Slots of the prompts' own are left alone, and so are those that are not written yet."""
    W, shortest, filled, S = 2, 40, 70, 128
    cache = init_cache(gpt2.config, 2 * W, S)
    rng = np.random.default_rng(0)
    cache = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), cache)
    parent_BW, span = np.array([[1, 0], [1, 1]]), np.array([shortest, filled])
    moved = jax.jit(beam._of_parents)(cache, parent_BW, span)
    for before, after in zip(map(np.asarray, cache), map(np.asarray, moved)):
        from_parents = before[:, [1, 0, 3, 3]]
        np.testing.assert_array_equal(after[..., 40:70, :], from_parents[..., 40:70, :])
        for there in (slice(0, 32), slice(96, 128)):
            np.testing.assert_array_equal(after[..., there, :], before[..., there, :])


def test_as_many_as_are_done_is_told(ending):
    greedily = functools.partial(ending.generate, sampling=GREEDY)
    for run in (greedily, ending.beam_search):
        told: list[int] = []
        run(prompts(9), max_tokens=NEW, batch_size=8, on_done=told.append)
        assert told == list(range(1, 10))


def test_prompts_of_like_length_are_read_together():
    lengths = [3, 50, 4, 49, 1]
    assert list(by_length(lengths, 2)) == [[1, 3], [2, 0], [4]]
    assert list(by_length([5, 5, 5], 2)) == [[0, 1], [2]]  # in their order


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beams": 0}, "beams: must be at least 1, not 0"),
        ({"length_penalty": 11.0}, "length_penalty: must be from -10 to 10, not 11"),
        ({"length_penalty": float("nan")}, "length_penalty.*nan"),
        ({"max_tokens": 0}, "max_tokens.*0"),
        ({"batch_size": 0}, "batch_size.*0"),
    ],
)
def test_bad_arguments(gpt2, tokenizer, arguments, message):
    generator = Generator(gpt2, tokenizer)
    assert generator.beam_search([], max_tokens=1) == []
    with pytest.raises(UserError, match=message):
        generator.beam_search(["aa"], **{"max_tokens": 1, **arguments})
