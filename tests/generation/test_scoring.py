"""Log-likelihoods: those of Transformers, of any batch, mesh and length."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from tiny_models import LLAMA, build, on_devices, quick_jit

from lm_jax.config import MeshConfig
from lm_jax.data.tokenizer_base import BytesTokenizer, CharacterTokenizer
from lm_jax.errors import UserError
from lm_jax.generation.scoring import Scorer
from lm_jax.interop import pretrained
from lm_jax.model import parameters as params_lib
from lm_jax.model.transformer import Transformer, skeleton_of
from lm_jax.sharding.mesh import make_mesh

BOS, EOS, MASK, LIMIT = 256, 257, 258, 32
SHAPE = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
torch.set_num_threads(1)


def pair_of(make, config, folder) -> types.SimpleNamespace:
    """A random model of Transformers, and its folder."""
    torch.manual_seed(0)
    theirs = make(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.3 * torch.randn_like(p) + (p.ndim == 1))
    theirs.tie_weights()
    theirs.save_pretrained(folder)
    return types.SimpleNamespace(theirs=theirs, folder=str(folder), ours=load(str(folder)))


def load(folder: str, mesh: jax.sharding.Mesh | None = None) -> Transformer:
    config = pretrained.read_model_config(folder)
    config.dtype = "float32"
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    parameters = pretrained.load_parameters(folder, config, mesh)
    return params_lib.bind(skeleton_of(config), parameters)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    config = hf.LlamaConfig(**SHAPE, max_position_embeddings=LIMIT, num_key_value_heads=2)
    return pair_of(hf.LlamaForCausalLM, config, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    config = hf.BertConfig(**SHAPE, max_position_embeddings=LIMIT)
    return pair_of(hf.BertForMaskedLM, config, tmp_path_factory.mktemp("bert"))


def their_log_p(theirs, ids) -> np.ndarray:
    """[T, V] for one text alone."""
    with torch.no_grad():
        return theirs(torch.tensor([list(map(int, ids))])).logits[0].log_softmax(-1).numpy()


PAIRS = [
    ("a dog", " barks"),
    ("a dog ", "barks"),  # the space at the end of a context is the continuation's
    ("", "x"),
    ("  ", "x"),
    ("y", " " * 3 + "z" * 20),
    ("long " * 12, "end"),  # of the context, only the end fits
    ("q", "w" * LIMIT),
]


def test_continuations_are_scored_as_by_transformers(llama):
    scorer = Scorer(llama.ours, BytesTokenizer(), batch_size=3)
    done = []
    for got, (context, continuation) in zip(scorer.loglikelihood(PAIRS, done.append), PAIRS):
        ids = [BOS, *(context + continuation).encode()]
        scored = len(continuation) + len(context) - len(context.rstrip())
        kept = ids[-(LIMIT + 1) :]
        log_p = their_log_p(llama.theirs, kept[:-1])[-scored:]
        want = log_p[np.arange(scored), kept[-scored:]].sum()
        assert got.log_p == pytest.approx(want, rel=1e-5)
        assert got.tokens == scored and got.cut == len(ids) - len(kept)
    assert done == [3, 6, 7]


class Ids(BytesTokenizer):
    """Text of numbers, so that any id can be said."""

    def encode(self, text: str) -> np.ndarray:
        return np.array([int(word) for word in text.split()], np.int32)


def test_greedy_of_the_most_probable_and_of_another_token(llama):
    scorer, context, ids = Scorer(llama.ours, Ids()), "7 9", [BOS, 7, 9]
    for _ in range(3):
        ids.append(int(their_log_p(llama.theirs, ids)[-1].argmax()))
    right = " ".join(map(str, ids[3:]))
    wrong = " ".join(map(str, [*ids[3:5], (ids[5] + 1) % 256]))
    got = scorer.loglikelihood([(context, " " + right), (context, " " + wrong)])
    assert [g.greedy for g in got] == [True, False]


def test_the_context_of_a_prefix_model_is_read_both_ways():
    shape = {"vocab_size": 260, "max_length": LIMIT, "prefix_attention": True}
    model = build(dataclasses.replace(LLAMA, **shape))
    scorer = Scorer(model, Ids())
    ids = np.array([[BOS, 7, 9, 5, 3, 8, 2, 6]], np.int32)

    @quick_jit
    def log_p(model, ids, prefix):
        x, _ = model(ids, prefix_BT=prefix)
        return jax.nn.log_softmax(model.logits(x))[0]

    (pair,), (text,) = (
        scorer.loglikelihood([("7 9 5 3", " 8 2 6")]),
        scorer.loglikelihood_rolling(["7 9 5 3 8 2 6"]),
    )
    for got, prefix, first in ((pair, 5, 5), (text, 1, 1)):
        found = log_p(model, ids[:, :-1], np.arange(7)[None] < prefix)
        want = sum(float(found[k - 1, ids[0, k]]) for k in range(first, 8))
        assert got.log_p == pytest.approx(want, rel=1e-5) and got.tokens == 8 - first


@pytest.mark.parametrize("length", [1, LIMIT - 1, LIMIT, LIMIT + 1, 3 * LIMIT + 5])
def test_whole_texts_are_scored_in_windows(llama, length):
    text = "".join(chr(97 + i * i % 26) for i in range(length))
    scorer, done = Scorer(llama.ours, BytesTokenizer(), batch_size=1), []
    (got,) = scorer.loglikelihood_rolling([text], done.append)
    assert done[-1] == 1 and done[:-1] == [0] * (len(done) - 1)  # texts, and not windows
    ids, want = [BOS, *text.encode()], 0.0
    for k in range(1, len(ids)):
        # The window that scores token k ends at a multiple of the limit, or with the text.
        end = min(-(-k // LIMIT) * LIMIT, length)
        start = max(end - LIMIT, 0)
        want += their_log_p(llama.theirs, ids[start:k])[-1][ids[k]]
    assert got.log_p == pytest.approx(want, rel=1e-5)
    assert got.tokens == length


def test_rows_score_alike_in_any_batch_and_compile_few_shapes(llama):
    scorer = Scorer(llama.ours, BytesTokenizer(), batch_size=4)
    texts = ["x" * n for n in range(1, 40)]
    want = scorer.loglikelihood_rolling(texts)
    backwards = scorer.loglikelihood_rolling(texts[::-1])[::-1]
    np.testing.assert_allclose(*([r.log_p for r in rows] for rows in (want, backwards)), rtol=1e-5)
    from lm_jax.generation import scoring

    before = scoring._log_p._cache_size()
    scorer.loglikelihood([("x" * n, "y" * m) for n in range(20) for m in (1, 9)])
    assert scoring._log_p._cache_size() == before


def test_a_tokenizer_without_a_first_token_scores_from_the_second(llama):
    scorer = Scorer(llama.ours, CharacterTokenizer("abc"))
    (got,) = scorer.loglikelihood_rolling(["cab"])
    log_p = their_log_p(llama.theirs, [2, 0])
    assert got.tokens == 2 and got.log_p == pytest.approx(log_p[0, 0] + log_p[1, 1], rel=1e-5)
    with pytest.raises(UserError, match="pair 1: the context is empty, and this tokenizer"):
        scorer.loglikelihood([("", "a")])


def test_masked_tokens_are_scored_one_at_a_time_as_by_transformers(bert):
    scorer = Scorer(bert.ours, BytesTokenizer(mask=True), batch_size=4)
    rows = [scorer.encode(text) for text in ("a dog", "", "q" * 20)]
    assert [len(places) for _, places in rows] == [5, 0, 20]
    rows.append((rows[0][0], [3, 1]))
    done = []
    got = scorer.pseudo_loglikelihood(rows, done.append)
    for (ids, places), found in zip(rows, got):
        assert (ids[0], ids[-1]) == (BOS, EOS)
        for place, log_p in zip(places, found, strict=True):
            masked = ids.copy()
            masked[place] = MASK
            want = their_log_p(bert.theirs, masked)[place, ids[place]]
            assert log_p == pytest.approx(want, abs=1e-4)
    assert done == sorted(done) and done[0] < done[-1] == 4


def test_a_mesh_gives_what_one_device_does(llama, bert, monkeypatch):
    from lm_jax.generation import scoring

    def scores(causal, masked):
        causal = Scorer(causal, BytesTokenizer(), batch_size=3)
        masked = Scorer(masked, BytesTokenizer(True), batch_size=4)
        rows = [masked.encode("words")]
        return causal.loglikelihood(PAIRS[:3]), masked.pseudo_loglikelihood(rows)[0]

    want = scores(llama.ours, bert.ours)
    monkeypatch.setattr(scoring, "_LOGITS_A_DEVICE", 8 * 2 * 260)  # several chunks
    mesh = on_devices((2, 1, 2, 2))
    with jax.set_mesh(mesh):
        got = scores(load(llama.folder, mesh), load(bert.folder, mesh))
    for ours, theirs in zip(got[0], want[0]):
        assert ours.log_p == pytest.approx(theirs.log_p, rel=1e-5)
        assert ours[1:] == theirs[1:]
    np.testing.assert_allclose(got[1], want[1], atol=1e-4)


def test_what_cannot_be_scored_is_told(llama, bert):
    causal, masked = Scorer(llama.ours, BytesTokenizer()), Scorer(bert.ours, BytesTokenizer(True))
    for call, said in (
        (lambda: causal.loglikelihood([("a", "b"), ("a", "")]), "pair 2: the continuation ''"),
        (lambda: causal.loglikelihood([("a", "b" * 33)]), "has 33 tokens, and the model takes 32"),
        (lambda: causal.loglikelihood([("a", "\ud800")]), "pair 1: the character"),
        (lambda: causal.loglikelihood_rolling(["a", ""]), "text 2 of 2 has no token"),
        (lambda: causal.pseudo_loglikelihood([]), "model.causal = True"),
        (lambda: masked.loglikelihood([]), "model.causal = False"),
        (lambda: masked.loglikelihood_rolling([]), "model.causal = False"),
        (lambda: masked.pseudo_loglikelihood([masked.encode("x" * 31)]), "has 33 tokens"),
        (lambda: Scorer(bert.ours, BytesTokenizer()), "no mask token"),
        (lambda: Scorer(llama.ours, BytesTokenizer(), batch_size=0), "batch_size"),
        (lambda: Scorer(llama.ours, CharacterTokenizer(map(chr, range(500)))), "needs 500 ids"),
    ):
        with pytest.raises(UserError, match=said):
            call()
