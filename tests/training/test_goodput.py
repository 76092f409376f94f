"""The books of a run's time, kept by a clock that the tests move."""

import json
import random
import types

import pytest

from lm_jax.training import goodput
from lm_jax.training.goodput import CAUSES, FILE, Ledger, Totals, read


class Clock:
    """Both clocks of a machine; `adjusted` is what the one on the wall was moved by."""

    def __init__(self):
        self.now, self.adjusted = 1e9, 0.0

    def perf_counter(self) -> float:
        return self.now - 7e8

    def time(self) -> float:
        return self.now + self.adjusted


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(
        goodput, "time", types.SimpleNamespace(perf_counter=clock.perf_counter, time=clock.time)
    )
    return clock


def begin(folder, clock: Clock, start: int, importing: float = 2.0, **options) -> Ledger:
    """A life that goes on from step `start`; 2 s of imports, 1 s of set-up, 3 s of restoring."""
    began = clock.time()
    clock.now += importing
    ledger = Ledger(str(folder), active=True, began=began, **options)
    clock.now += 1
    with ledger.spent("restore"):
        clock.now += 3
    ledger.resumed(start)
    return ledger


def steps(ledger: Ledger, clock: Clock, first: int, last: int, every: int = 1) -> None:
    """Steps of a second, each after a quarter of one for data; recorded when `every` divides."""
    for step in range(first, last + 1):
        with ledger.spent("data"):
            clock.now += 0.25
        clock.now += 1
        if step % every == 0:
            ledger.record(step)


def seconds(totals: Totals) -> dict[str, float]:
    return {cause: s for cause, s in totals.seconds.items() if s}


def test_time_within_time_is_counted_once(tmp_path, clock):
    ledger = begin(tmp_path, clock, 0)
    with ledger.spent("evaluate"):
        clock.now += 5
        with ledger.spent("compile"):
            clock.now += 7
        with pytest.raises(ZeroDivisionError), ledger.spent("save"):
            clock.now += 11
            raise ZeroDivisionError
        clock.now += 13
    clock.now += 17
    ledger.end(1)
    expected = {"start": 3, "restore": 3, "compile": 7, "save": 11, "evaluate": 18, "step": 17}
    totals = read(str(tmp_path))
    assert seconds(totals) == pytest.approx(expected)
    assert (totals.lives, totals.step, totals.down) == (1, 1, 0)
    assert totals.goodput == pytest.approx(17 / 59)
    assert ledger.summary() == (
        "goodput 28.8% of 0:59 in one life: evaluate 0:18, step 0:17, save 0:11, compile 0:07,"
        " start 0:03, restore 0:03"
    )


@pytest.mark.parametrize("every", [1, 4])
def test_steps_that_are_done_again_are_lost_and_no_others(tmp_path, clock, every):
    """Killed after the last record, at step 20, of which 16 is saved."""
    steps(begin(tmp_path, clock, 0), clock, 1, 20, every)
    before = read(str(tmp_path))
    assert seconds(before) == pytest.approx({"start": 3, "restore": 3, "step": 20, "data": 5})
    clock.now += 100
    second = begin(tmp_path, clock, 16)
    expected = {"start": 6, "restore": 6, "step": 16, "data": 4, "lost": 5}
    totals = read(str(tmp_path))
    assert seconds(totals) == pytest.approx(expected)
    assert totals.down == pytest.approx(100)
    assert second.summary().endswith("; down between them 1:40")
    steps(second, clock, 17, 24, every)
    assert seconds(read(str(tmp_path))) == pytest.approx(expected | {"step": 24, "data": 6})
    begin(tmp_path, clock, 8)  # of an older checkpoint: steps of both lives
    expected = {"start": 9, "restore": 9, "step": 8, "data": 2, "lost": 5 + 16 * 1.25}
    assert seconds(read(str(tmp_path))) == pytest.approx(expected)
    begin(tmp_path, clock, 0)
    expected = {"start": 12, "restore": 12, "lost": 5 + 24 * 1.25}
    assert seconds(read(str(tmp_path))) == pytest.approx(expected)


def test_a_resume_between_two_records_shares_out_their_time(tmp_path, clock):
    steps(begin(tmp_path, clock, 0), clock, 1, 20, every=10)
    begin(tmp_path, clock, 13)
    lost = {"step": 13, "data": 13 / 4, "lost": 7 * 1.25}
    assert seconds(read(str(tmp_path))) == pytest.approx({"start": 6, "restore": 6} | lost)


def test_going_back_within_a_life_loses_steps_and_not_the_restore(tmp_path, clock):
    ledger = begin(tmp_path, clock, 0)
    steps(ledger, clock, 1, 10)
    steps(ledger, clock, 11, 12, every=100)  # not recorded before the rewind
    with ledger.spent("restore"):
        clock.now += 4
    ledger.resumed(6)
    steps(ledger, clock, 7, 9)
    expected = {"start": 3, "restore": 7, "step": 9, "data": 9 / 4, "lost": 6 * 1.25}
    assert seconds(read(str(tmp_path))) == pytest.approx(expected)


def test_what_follows_a_clean_end_is_down_and_nothing_is_lost(tmp_path, clock):
    first = begin(tmp_path, clock, 0)
    steps(first, clock, 1, 5)
    with first.spent("save"):
        clock.now += 2
    first.end(5)
    clock.now += 1000
    steps(begin(tmp_path, clock, 5), clock, 6, 8)
    totals = read(str(tmp_path))
    assert "lost" not in seconds(totals) and totals.down == pytest.approx(1000)
    assert totals.seconds["step"] == pytest.approx(8) and totals.seconds["save"] == 2


@pytest.mark.parametrize("seed", range(20))
def test_causes_add_up_to_the_time_of_all_lives(tmp_path, clock, seed):
    """Whatever is done, and killed, and whichever way the wall's clock is moved meanwhile."""
    draw = random.Random(seed)
    lived, saved = 0.0, 0
    for _ in range(draw.randint(1, 5)):
        began, at = clock.now, saved
        ledger = begin(tmp_path, clock, at, importing=0)  # only the wall's clock has seen it
        recorded = clock.now
        for _ in range(draw.randint(0, 30)):
            cause = draw.choice([*sorted(CAUSES.keys() - {"lost"}), None])
            if cause is None:
                clock.now += draw.random()
                at += 1
            else:
                with ledger.spent(cause):
                    clock.now += draw.random()
            if draw.random() < 0.4:
                ledger.record(at)
                recorded = clock.now
            if draw.random() < 0.2:
                saved = draw.randint(0, at)
            if draw.random() < 0.1:
                clock.adjusted += draw.uniform(-1e4, 1e4)
            if draw.random() < 0.1:
                at = draw.randint(0, at)
                ledger.resumed(at)
                recorded = clock.now
                saved = min(saved, at)
        lived += recorded - began
        clock.now += draw.random() * 100
    totals = read(str(tmp_path))
    assert totals.whole == pytest.approx(lived, abs=1e-3)
    assert min(totals.seconds.values()) >= 0 and totals.down >= 0


def test_a_clock_that_goes_back_makes_no_time_negative(tmp_path, clock):
    first = begin(tmp_path, clock, 0)
    clock.adjusted = -5000
    steps(first, clock, 1, 3)
    clock.adjusted = -9000
    began = clock.time() + 8000  # it was moved while the process started
    second = Ledger(str(tmp_path), active=True, began=began)
    second.resumed(2)
    clock.adjusted = -20_000
    steps(second, clock, 3, 4)
    begin(tmp_path, clock, 4)
    totals = read(str(tmp_path))
    assert min(totals.seconds.values()) >= 0 and totals.down >= 0
    assert totals.seconds["step"] == pytest.approx(4)
    assert totals.seconds["start"] == pytest.approx(6)  # the second's was not to be seen


DAMAGE = [
    b"",
    b"\n\n",
    b"no JSON\n",
    b"\xff\xfe\x00\n",
    b"[" * 100_000 + b"\n",
    b"[1]\n",
    b"null\n",
    b"{}\n",
    b'"life"\n',
    b"1" * 5000 + b"\n",
]
SOUND = {"life": "x", "began": 1, "from": 0, "step": 9, "time": 5, "seconds": {"step": 4}}
WRONG = {
    "life": [3, None, {}],
    "began": ["1", float("nan"), -1, None],
    "from": [1.5, "0", -1, 10**400, True],
    "step": [1.5, None, -1, 10**400, float("inf")],
    "time": ["5", float("inf"), [], 1e300],
    "seconds": [[], 4, {"step": -1}, {"step": "4"}, {"lost": 4}, {"sleep": 4}, {"step": 1e300}],
}
for key, values in WRONG.items():
    DAMAGE += [json.dumps(SOUND | {key: value}).encode() + b"\n" for value in values]
    DAMAGE.append(json.dumps({k: v for k, v in SOUND.items() if k != key}).encode() + b"\n")


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_passed_over(tmp_path, clock, damage):
    file = tmp_path / FILE
    file.write_bytes(damage)
    assert read(str(tmp_path)).lives == 0
    steps(begin(tmp_path, clock, 0), clock, 1, 3)
    expected = read(str(tmp_path))
    assert seconds(expected) == pytest.approx({"start": 3, "restore": 3, "step": 3, "data": 0.75})
    file.write_bytes(damage + file.read_bytes() + damage)
    assert read(str(tmp_path)) == expected


def test_the_line_that_a_kill_cut_off_costs_no_other(tmp_path, clock):
    steps(begin(tmp_path, clock, 0), clock, 1, 3)
    file = tmp_path / FILE
    whole = file.read_bytes()
    for size in range(0, len(whole), 11):
        file.write_bytes(whole[:size])
        kept = read(str(tmp_path))
        begin(tmp_path, clock, kept.step).end(kept.step)
        after = read(str(tmp_path))
        assert after.lives == kept.lives + 1
        assert after.seconds["step"] == pytest.approx(kept.seconds["step"])


def test_others_than_the_first_process_write_nothing(tmp_path):
    ledger = Ledger(str(tmp_path), active=False, began=0.0)
    ledger.resumed(0)
    with ledger.spent("data"):
        ledger.record(1)
    ledger.end(1)
    assert ledger.summary() == "" and list(tmp_path.iterdir()) == []


def test_a_bucket_has_the_same_books(clock):
    import fsspec

    where = "memory://books/run"
    first = begin(where, clock, 0)
    steps(first, clock, 1, 3)
    first.end(3)
    second = begin(where, clock, 2)
    second.end(2)
    assert seconds(read(where)) == pytest.approx(
        {"start": 6, "restore": 6, "step": 2, "data": 0.5, "lost": 1.25}
    )
    assert second.summary().startswith("goodput 12.7% of 0:16 in 2 lives: ")
    fsspec.filesystem("memory").rm("/books", recursive=True)


def test_mistakes_of_the_caller_raise(tmp_path):
    ledger = Ledger(str(tmp_path), active=True, began=0.0)
    with pytest.raises(KeyError, match="sleep"):
        ledger.spent("sleep")
    with pytest.raises(KeyError, match="lost"):
        ledger.spent("lost")
    with pytest.raises(ValueError, match="which step"):
        ledger.record(1)
    assert read(str(tmp_path)).text() == "goodput nothing of 0:00 in one life"
