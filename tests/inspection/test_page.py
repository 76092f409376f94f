"""The page in a browser shows what it was given, whatever that is."""

import dataclasses
import html.parser
import json

import numpy as np
import pytest
from tiny_models import LLAMA, build

from lm_jax.data.tokenizer_base import Tokenizer
from lm_jax.inspection.look import Look, Scores
from lm_jax.inspection.look import look as inspect_model
from lm_jax.inspection.page import render

# Texts that would do harm as HTML or as a script, would not be seen, or are no text.
PIECES = [
    b"The",
    b" </script>",
    b"<!--",
    b"\"'&amp;\\",
    "😀".encode(),
    b" \xf0\x9f",
    b"\x00\x1b",
    b"\n",
    "\u202e\u2028".encode(),
    "\u0301x".encode(),
    b"<img src=x onerror=alert(1)>",
    b"",
    b"<s>",
]
SHOWN = [
    "The",
    " </script>",
    "<!--",
    "\"'&amp;\\",
    "😀",
    "\\x20\\xF0\\x9F",
    "⟨U+0000⟩⟨U+001B⟩",
    "⏎",
    "⟨U+202E⟩⟨U+2028⟩",
    "◌\u0301x",
    "<img src=x onerror=alert(1)>",
    "⟨id:11⟩",
    "<s>",
    "⟨id:13⟩",
]
V, L, N = len(SHOWN), 2, 3
FACTS = {"model": "runs/<b>", "parameters": "1,234", "step": "7", "dtype": "float32"}


class Nasty(Tokenizer):
    kind = "nasty"

    def __init__(self):
        ends = {"bos_id": 12, "eos_id": None, "pad_id": 0}
        super().__init__(PIECES, specials={12: "<s>"}, **ends)

    def encode(self, text):
        raise NotImplementedError

    def _definition(self):
        return {}


def example(causal: bool = True, ids=None) -> Look:
    """Any numbers, each different; of a masked model, the last two tokens are not known."""
    rng = np.random.default_rng(0)
    ids = np.arange(V) if ids is None else np.array(ids)
    size = len(ids)
    scores = rng.normal(size=(L, N, size, size)) * 2
    scores[..., ~np.tri(size, dtype=bool)] -= 1e9 * causal
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    places = size + causal
    chances = np.sort(rng.dirichlet(np.ones(V), places), axis=-1)[:, ::-1]
    candidates = np.argsort(rng.random((places, V)), axis=-1)
    unknown = [0] if causal else [size - 2, size - 1]
    loss = rng.random(size).astype(np.float32) * 12
    loss[unknown] = np.nan
    rank = rng.integers(1, V, size)
    rank[unknown] = 0
    without = [0] if causal else [size - 1]
    candidates[without], chances[without] = -1, np.nan
    lens = rng.integers(0, V, (L + 1, size)), rng.random((L + 1, size))
    told = Scores(V, loss, rank, candidates[:, :4], chances[:, :4], *lens)
    return Look(ids, causal, 0, weights, told)


@pytest.fixture
def show(open_page, tmp_path):
    """Opens the page of a `Look`."""

    def show(look: Look, **options):
        file = tmp_path / "a page.html"
        file.write_text(render(look, Nasty(), FACTS), encoding="utf-8")
        return open_page(file.as_uri(), **options)

    return show


def percent(p: float) -> str:
    return "100%" if p >= 0.9995 else f"{100 * p:.1f}%"


def listed(id: int) -> str:
    return SHOWN[id].replace(" ", "␣")


def rows(page, table: str) -> list[list[str]]:
    """The texts of a table's rows, without empty ones."""
    found = page.locator(f"{table} tbody tr").all()
    return [[text for text in row.locator("td").all_text_contents() if text] for row in found]


def test_every_token_stands_there_as_text(show):
    look = example()
    page = show(look)
    assert page.title() == page.inner_text("h1") == "runs/<b>"
    facts = page.inner_text("#facts").split()
    assert facts == ["parameters", "1,234", "step", "7", "dtype", "float32"]
    assert page.locator("#tokens button").all_text_contents() == [*SHOWN, "next"]
    mean = np.nanmean(look.scores.loss_T)
    assert f"Mean loss {mean:.3f} nats over {V - 1} tokens" in page.inner_text("#summary")
    assert page.locator("img").count() == 0
    cells = page.locator("#lens tbody tr").all()
    assert [row.locator("th").inner_text() for row in cells] == ["2", "1", "embedding"]
    for row, ids in zip(cells, look.scores.lens_LT[::-1], strict=True):
        assert row.locator("td").all_text_contents() == [listed(i) for i in ids]
    cell = cells[0].locator("td").nth(3)
    assert f"after layer 2, token 4: {listed(look.scores.lens_LT[2, 3])}" in cell.get_attribute(
        "title"
    )


def test_a_click_shows_what_was_expected_and_what_is_looked_at(show):
    look, token = example(), 4
    page = show(look)
    scores = look.scores
    page.locator("#tokens button").nth(token).click()
    assert page.inner_text("#chosen") == f"Token {token + 1} of {V}: 😀"
    facts = page.inner_text("#chosen-facts")
    assert f"{scores.loss_T[token]:.3f} nats" in facts
    assert f"{scores.rank_T[token]} of {V}" in facts
    assert rows(page, "#candidates") == [
        [str(i + 1), listed(id), percent(p)]
        for i, (id, p) in enumerate(
            zip(scores.candidates_MK[token], scores.probabilities_MK[token])
        )
    ]
    page.locator("#tokens button").nth(V).click()
    assert page.inner_text("#chosen") == "What would come next"
    assert rows(page, "#candidates")[0][1] == listed(scores.candidates_MK[V][0])
    page.locator("#tokens button").first.click()
    assert "nothing stands before it" in page.inner_text("#chosen-facts")
    assert not page.locator("#candidates").is_visible()


@pytest.mark.parametrize("causal", [True, False])
def test_layer_and_head_can_be_chosen(show, causal):
    look, token = example(causal), 6
    page = show(look)
    page.locator("#tokens button").nth(token).click()
    for layer, head in ((0, None), (1, None), (1, 2), (0, 1)):
        page.select_option("#layer", label=str(layer + 1))
        page.select_option("#head", label="mean" if head is None else str(head + 1))
        want = look.weights_LNTS[layer]
        want = (want.mean(0) if head is None else want[head])[token]
        shown = rows(page, "#most")
        assert 5 < len(shown) <= 8
        got = {int(place) - 1: float(share.rstrip("%")) / 100 for place, _, share in shown}
        assert all(abs(want[place] - share) < 0.005 for place, share in got.items())
        left_out = [want[place] for place in range(V) if place not in got]
        assert max(left_out) <= min(got.values()) + 0.01
        what = "mean of its heads" if head is None else f"head {head + 1}"
        assert page.inner_text("#looking").startswith(f"Layer {layer + 1}, {what}: ")
    where = {"x": 8 * 24 + 12, "y": 10 * 24 + 12}  # a cell has 24 pixels
    page.hover("#map", position=where)
    want = percent(look.weights_LNTS[0, 1, 10, 8])
    said = page.inner_text("#under")
    assert said.startswith(f"{listed(10)} (11) looks at {listed(8)} (9): ")
    assert abs(float(said.split()[-1].rstrip("%")) - float(want.rstrip("%"))) < 0.5
    page.click("#map", position=where)
    assert page.inner_text("#chosen").startswith(f"Token 11 of {V}")


def test_the_map_is_darkest_where_the_weight_is(show):
    look = example()
    page = show(look)
    page.select_option("#head", label="1")
    alpha = page.evaluate(
        """() => {
          const canvas = document.getElementById("map"), size = canvas.width / TOKENS;
          const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const at = (i) => Math.floor((i + 0.5) * size);
          return [...Array(TOKENS - 1).keys()].map((t) => [...Array(TOKENS).keys()].map(
            (s) => pixels.data[4 * (at(t) * canvas.width + at(s)) + 3] / 255));
        }""".replace("TOKENS", str(V))
    )
    np.testing.assert_allclose(alpha, look.weights_LNTS[0, 0, :-1], atol=0.01)


@pytest.mark.parametrize("scheme, dark", [("light", False), ("dark", True)])
def test_it_follows_the_readers_scheme(show, scheme, dark):
    page = show(example(), color_scheme=scheme)
    ground, text = (
        page.evaluate(f"getComputedStyle(document.body).{key}")
        for key in ("backgroundColor", "color")
    )
    brightness = [sum(map(int, c[4:-1].split(","))) for c in (ground, text)]
    assert (brightness[0] < brightness[1]) == dark
    assert abs(brightness[0] - brightness[1]) > 400


def test_a_masked_model_says_what_it_hides(show):
    page = show(example(causal=False))
    buttons = page.locator("#tokens button")
    assert buttons.all_text_contents() == SHOWN
    assert "when it alone is hidden" in page.inner_text("#tokens-note")
    assert page.inner_text("#chosen").startswith(f"Token {V - 1} of {V}")
    assert "the prompt hides it" in page.inner_text("#chosen-facts")
    buttons.nth(V - 1).click()
    assert "a special token" in page.inner_text("#chosen-facts")


def test_without_a_head_it_says_so(show):
    page = show(dataclasses.replace(example(causal=False), scores=None))
    assert "no head that scores tokens" in page.inner_text("#tokens-note")
    assert not page.locator("#lens-section").is_visible()
    page.locator("#tokens button").nth(2).click()
    assert page.inner_text("#looking").startswith("Layer 1, mean of its heads: <!--")


def test_a_prompt_that_is_read_both_ways(show):
    model = build(dataclasses.replace(LLAMA, prefix_attention=True))
    ids, prompt = np.array([12, 0, 4, 4, 7, 2], np.int32), 4
    look = inspect_model(model, Nasty(), ids, prompt=prompt)
    page = show(look)
    assert f"whose {prompt} tokens are read both ways" in page.inner_text("#tokens-note")
    said = page.inner_text("#summary")
    assert f"Mean loss {look.scores.loss_T[prompt:].mean():.3f} nats over 2 tokens" in said
    for token, seen in ((0, prompt), (prompt - 1, prompt), (prompt, prompt + 1)):
        page.locator("#tokens button").nth(token).click()
        most = {int(place) - 1: float(share.rstrip("%")) for place, _, share in rows(page, "#most")}
        want = 100 * look.weights_LNTS[0].mean(0)[token]
        assert sorted(most) == list(range(seen)) and not want[seen:].any()
        assert all(abs(want[place] - share) < 0.5 for place, share in most.items())
        facts = page.inner_text("#chosen-facts")
        if token < prompt:
            assert "the prompt is read both ways" in facts
            assert not page.locator("#candidates").is_visible()
        else:
            assert f"{look.scores.loss_T[token]:.3f} nats" in facts


@pytest.mark.parametrize("causal", [True, False])
def test_one_token_is_enough(show, causal):
    page = show(
        example(causal, [1])
        if causal
        else dataclasses.replace(example(True, [1]), causal=False, scores=None)
    )
    assert rows(page, "#most") == [["1", "␣</script>", "100%"]]


def test_the_data_cannot_leave_its_element():
    class Elements(html.parser.HTMLParser):
        started, texts = [], []

        def handle_starttag(self, tag, attrs):
            self.started.append(tag)

        def handle_data(self, text):
            self.texts.append(text)

    parser = Elements()
    page = render(example(), Nasty(), FACTS)
    parser.feed(page)
    assert parser.started.count("script") == 2 and "img" not in parser.started
    (data,) = [text for text in parser.texts if text.startswith('{"facts"')]
    assert list(json.loads(data)["names"].values()) == SHOWN
    assert page.replace("\n", "").isprintable()
