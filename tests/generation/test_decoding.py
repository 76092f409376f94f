import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_generation import GPT2, LetterTokenizer, build, on_mesh

from lm_jax.config import MeshConfig
from lm_jax.errors import UserError
from lm_jax.generation.decoding import Generator, Rows, prefill, step
from lm_jax.generation.sampling import Sampling
from lm_jax.model.transformer import Transformer
from lm_jax.sharding.mesh import make_mesh

GREEDY = Sampling(temperature=0.0)
MIXED = ["", "aa", "babbcadaea", "cb" * 33]  # the last one is longer than the smallest bucket


@pytest.fixture(params=["gpt2", "llama"])
def model(request) -> Transformer:
    return request.getfixturevalue(request.param)


@jax.jit
def next_scores(model: Transformer, tokens_BT: jax.Array, n: jax.Array) -> jax.Array:
    """The scores after the first `n` tokens, by a full pass without a cache."""
    return model.logits(model(tokens_BT)[0])[0, n - 1]


def greedy_by_full_passes(model, tokenizer, prompt: str, count: int, penalty=1.0) -> list[int]:
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    for _ in range(count):
        tokens_BT = np.zeros((1, model.config.max_length), np.int32)
        tokens_BT[0, : len(ids)] = ids
        scores_V = np.array(next_scores(model, tokens_BT, len(ids)))[: tokenizer.vocab_size]
        seen = sorted(set(ids))
        lowered = np.where(scores_V > 0, scores_V / penalty, scores_V * penalty)
        scores_V[seen] = lowered[seen]
        ids.append(int(scores_V.argmax()))
    return ids[-count:]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_decoding_is_that_of_full_passes(model, tokenizer, penalty):
    tokenizer.eos_id = None
    sampling = dataclasses.replace(GREEDY, repetition_penalty=penalty)
    results = Generator(model, tokenizer).generate(MIXED, max_tokens=12, sampling=sampling)
    for prompt, result in zip(MIXED, results):
        wanted = greedy_by_full_passes(model, tokenizer, prompt, 12, penalty)
        assert list(result.tokens) == wanted
        assert result.prompt == prompt
        assert result.text == tokenizer.decode(wanted)
        assert result.finish_reason == "length"


def test_a_mesh_changes_nothing(gpt2, tokenizer):
    """Nor does it take as many prompts as it has shards."""
    for sampling in (GREEDY, Sampling(repetition_penalty=1.2, top_p=0.9)):
        arguments = {"max_tokens": 12, "sampling": sampling, "batch_size": 2}
        alone = Generator(gpt2, tokenizer).generate(MIXED[:3], **arguments)
        mesh = make_mesh(MeshConfig(2, 2, 2))
        with jax.set_mesh(mesh):
            generator = Generator(on_mesh(gpt2, mesh), tokenizer)
            assert generator.generate(MIXED[:3], **arguments) == alone


def test_what_padding_leaves_in_the_cache_is_never_seen(model):
    """Neither its tokens nor, whatever they are, the contents of the slots they went to."""
    lengths_B = np.array([1, 5, 20], np.int32)
    real_BT = np.arange(32)[None] < lengths_B[:, None]
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, 100, (3, 32)).astype(np.int32)

    def run(padding_id: int, poison: float) -> np.ndarray:
        rows = Rows(*np.zeros((3, 3), np.int32), np.uint32(0), GREEDY.knobs())
        rows, state = prefill(
            model,
            np.where(real_BT, tokens_BT, padding_id).astype(np.int32),
            rows._replace(position_B=lengths_B),
            None,
            slots=64,
            vocab_size=100,
        )
        unwritten_BS = np.arange(64)[None] >= lengths_B[:, None]
        poisoned = jax.tree.map(
            lambda x: jnp.where(unwritten_BS[None, :, None, :, None], poison, x), state.cache
        )
        state = state._replace(cache=poisoned if poison else state.cache)
        drawn = [rows.token_B]
        with jax.transfer_guard("disallow"):  # a step needs nothing from the host
            for _ in range(35):
                rows, state = step(model, rows, state, vocab_size=100)
                drawn.append(rows.token_B)
        return np.stack(drawn)

    expected = run(padding_id=0, poison=0.0)
    np.testing.assert_array_equal(run(padding_id=77, poison=0.0), expected)
    np.testing.assert_array_equal(run(padding_id=0, poison=1e3), expected)


def test_a_sampled_result_does_not_depend_on_the_other_prompts(gpt2, tokenizer):
    generator = Generator(gpt2, tokenizer)

    def tokens(prompts, **arguments):
        return [c.tokens for c in generator.generate(prompts, max_tokens=12, **arguments)]

    together = tokens(MIXED)
    assert tokens(MIXED[:3], batch_size=1) == together[:3]
    assert tokens(MIXED[:3], batch_size=2) == together[:3]
    assert tokens([*MIXED[:2], "cada", "b" * 30])[:2] == together[:2]
    assert tokens(MIXED, seed=1) != together
    assert len(set(tokens(["aa"] * 4))) == 4  # rows draw for themselves


def test_lengths_within_a_bucket_compile_once(tokenizer, monkeypatch):
    model = build(dataclasses.replace(GPT2, width=16, heads=2))  # compiled by no other test
    traces, begin = [], Transformer.begin

    def counted(self, tokens_BT, **arguments):
        traces.append(tokens_BT.shape)
        return begin(self, tokens_BT, **arguments)

    monkeypatch.setattr(Transformer, "begin", counted)

    def generate(prompts, max_tokens=8, **sampling):
        arguments = {"max_tokens": max_tokens, "sampling": Sampling(**sampling), "batch_size": 2}
        Generator(model, tokenizer).generate(prompts, seed=max_tokens, **arguments)
        return traces

    assert generate(["aa", ""]) == [(2, 32), (2, 1)]
    generate(["ab" * 20, "bb"], max_tokens=11, temperature=0.3)
    assert len(generate(["aa", "ab" * 9, "bb"], max_tokens=3)) == 2  # the last batch is not full
    assert len(generate(["aa", ""], max_tokens=40)) > 2  # another bucket is seen by this test


def first_new(tokens: tuple[int, ...], least: int) -> int:
    """The first place from `least` on whose token was not there before."""
    return next(i for i in range(least, len(tokens)) if tokens[i] not in tokens[:i])


def test_eos_ends_a_row_and_no_other(gpt2, tokenizer):
    tokenizer.eos_id = None
    free = Generator(gpt2, tokenizer).generate(MIXED, max_tokens=20)
    place = first_new(free[0].tokens, 3)
    tokenizer.eos_id = free[0].tokens[place]
    ended = Generator(gpt2, tokenizer).generate(MIXED, max_tokens=20)
    assert ended[0].finish_reason == "eos"
    assert ended[0].tokens == free[0].tokens[: place + 1]
    assert ended[0].text == tokenizer.decode(free[0].tokens[:place])
    for one, other in zip(ended[1:], free[1:]):
        assert one == other or tokenizer.eos_id in other.tokens


def test_a_stop_string_across_tokens_cuts_the_text_and_is_never_shown(gpt2, tokenizer):
    free = Generator(gpt2, tokenizer).generate(["aa"], max_tokens=20)[0]
    stop = free.text[9:14]  # from the middle of a token to the middle of another
    parts = []
    cut = Generator(gpt2, tokenizer).generate(
        ["aa"], max_tokens=20, stop=["zzz", stop], on_text=lambda row, text: parts.append(text)
    )[0]
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.find(stop)] == "".join(parts)
    assert len(parts) > 1 and all(parts)
    assert cut.tokens == free.tokens[: (free.text.find(stop) + len(stop) + 1) // 2]


def test_text_held_back_for_a_stop_string_comes_out_at_the_end(gpt2, tokenizer):
    free = Generator(gpt2, tokenizer).generate(["aa"], max_tokens=5)[0]
    held = Generator(gpt2, tokenizer).generate(["aa"], max_tokens=5, stop=[free.text[-3:] + "!"])
    assert held == [free]


def test_streamed_text_is_the_text_even_of_cut_characters(gpt2):
    tokenizer = LetterTokenizer(pieces=[bytes([b]) for b in "\u20ac\u00e9\U0001f600".encode()] * 9)
    parts: dict[int, str] = dict.fromkeys(range(4), "")

    def collect(row: int, text: str) -> None:
        assert text
        parts[row] += text

    results = Generator(gpt2, tokenizer).generate([""] * 4, max_tokens=30, on_text=collect)
    assert [parts[i] for i in range(4)] == [r.text for r in results]
    assert all(r.text == tokenizer.decode(t for t in r.tokens if t != 99) for r in results)
    assert any("\ufffd" in r.text for r in results)


def test_generation_ends_at_the_longest_sequence_of_the_model(model, tokenizer):
    tokenizer.eos_id = None
    generator = Generator(model, tokenizer)
    results = generator.generate(["aa" * 60, "aa"], max_tokens=1000, sampling=GREEDY)
    assert [len(r.tokens) for r in results] == [3, 62]  # with bos: 61 + 3, 2 + 62
    assert [r.finish_reason for r in results] == ["length", "length"]
    for prompt, result in zip(["aa" * 60, "aa"], results):
        wanted = greedy_by_full_passes(model, tokenizer, prompt, len(result.tokens))
        assert list(result.tokens) == wanted
    assert len(generator.generate(["aa" * 62], max_tokens=9)[0].tokens) == 1
    with pytest.raises(UserError, match=r"prompt 2 of 2 has 64 tokens.* 64 .*63 or fewer"):
        generator.generate(["aa", "aa" * 63], max_tokens=1)


def test_the_token_before_a_prompt(gpt2):
    def tokens(prompt: str, bos: int | None, eos: int | None, before: bool | None = None):
        tokenizer = LetterTokenizer(bos_id=bos, eos_id=eos, bos_before_text=before)
        generator = Generator(gpt2, tokenizer)
        return generator.generate([prompt], max_tokens=5, sampling=GREEDY)[0].tokens

    assert tokens("ca", 98, 99) != tokens("ca", 97, 99)
    assert tokens("ca", 98, 99, False) == tokens("ca", 97, 99, False) == tokens("ca", None, 99)
    assert tokens("", 98, 99, False) == tokens("", 98, 99) != tokens("", 97, 99, False)
    assert tokens("", None, 98) == tokens("", 98, None)  # eos, where there is no bos
    assert tokens("ab", None, None) == tokens("", 26, None)  # nothing: 'ab' is id 26
    with pytest.raises(UserError, match="the prompt is empty"):
        tokens("", None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens.*0"),
        ({"batch_size": 0}, "batch_size.*0"),
        ({"seed": -1}, "seed.*-1"),
        ({"stop": ["a", ""]}, "empty stop string"),
        ({"sampling": Sampling(top_p=2.0)}, "top_p.*2.0"),
    ],
)
def test_bad_arguments(gpt2, tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        Generator(gpt2, tokenizer).generate(["aa"], **{"max_tokens": 1, **arguments})


def test_models_that_cannot_generate(gpt2, tokenizer):
    with pytest.raises(UserError, match="do not belong together"):
        Generator(gpt2, LetterTokenizer(vocab_size=129))
    with pytest.raises(UserError, match=r"model\.causal"):
        Generator(build(dataclasses.replace(GPT2, causal=False)), tokenizer)
    assert Generator(gpt2, tokenizer).generate([], max_tokens=1) == []
