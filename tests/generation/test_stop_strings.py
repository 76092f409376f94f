import itertools
import random

from lm_jax.generation.text import StopFilter, TextStream


def cut(text: str, stops: list[str]) -> str:
    """Reads character by character: what comes before the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


def test_any_pieces_give_the_text_before_the_first_stop():
    rng = random.Random(0)
    stopped = 0
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 10)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        places = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 4)))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]
        wanted = cut(text, stops)
        stop_filter, shown = StopFilter(stops), ""
        for piece in pieces:
            shown += stop_filter.push(piece)
            assert wanted.startswith(shown), (text, stops, pieces)
        assert stop_filter.stopped == (wanted != text)
        assert shown + stop_filter.flush() == wanted, (text, stops, pieces)
        stopped += stop_filter.stopped
    assert 500 < stopped < 2500


def test_text_that_cannot_be_the_beginning_of_a_stop_is_not_held_back():
    stop_filter = StopFilter(["\n\n", "END"])
    assert stop_filter.push("hello\n") == "hello"
    assert stop_filter.push("EN") == "\n"
    assert stop_filter.push("TRY") == "ENTRY"


class Utf8:
    """Holds all bytes back until the end."""

    def __init__(self):
        self.held = b""

    def push(self, token: int) -> str:
        self.held += bytes([token])
        return ""

    def flush(self) -> str:
        return self.held.decode(errors="replace")


def test_a_stop_in_what_the_decoder_held_back():
    stream = TextStream(Utf8(), [], ["b"])
    assert [stream.push(ord(c)) for c in "abc"] == ["", "", ""]
    assert stream.finish() == "a"
    assert stream.stopped and stream.text == "a"
