"""How far work has come is told, on a terminal or not."""

import pytest

from lm_jax import progress as progress_lib
from lm_jax.progress import clock, progress


@pytest.fixture
def time(monkeypatch):
    """A clock that is set by hand."""
    now = [100.0]
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then_where_there_is_no_terminal(time, capsys):
    with progress("examples", 1000, start=200) as count:
        for done, at in ((210, 101.0), (300, 140.0), (301, 141.0), (400, 180.0), (1000, 999.0)):
            time[0] = at
            count(done)
    said = capsys.readouterr().err.splitlines()
    # 100 took 40 seconds, 200 80: those that were there before took none.
    assert said == ["examples: 300/1,000 | 4:40 left", "examples: 400/1,000 | 4:00 left"]


def test_without_a_total_the_time_that_it_has_taken(time, capsys):
    with progress("batches") as count:
        time[0] += 75
        count(7)
    assert capsys.readouterr().err == "batches: 7 | 1:15\n"
    with progress("batches", active=False) as count:
        time[0] += 75
        count(7)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("examples", 10, start=2) as count:
        count(10)
    assert "2/10" in capsys.readouterr().err


def test_clock():
    assert [clock(s) for s in (5, 65, 3665)] == ["0:05", "1:05", "1:01:05"]
