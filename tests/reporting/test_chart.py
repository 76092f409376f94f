"""A chart's places, read back against its own ticks, are the values that it was given."""

import itertools
import math
import random
import re
import xml.etree.ElementTree as ET

import pytest

from lm_jax.reporting.chart import SIZE, Curve, Mark, Scale, draw, number, scale_of, thin


def value_of(text: str) -> float:
    """A number as the page writes it."""
    unit = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1)
    return float(text.rstrip("kMGT")) * unit


class Read:
    """What a figure shows, by its ticks alone: a chart is linear unless it says otherwise."""

    def __init__(self, figure: str):
        self.root = ET.fromstring(figure)
        self.log = "log scale" in self.root.find("figcaption/small").text
        self.x_ticks, self.y_ticks = self.ticks("x"), self.ticks("y")

    def ticks(self, axis: str) -> list[tuple[float, float]]:
        """(share of the width or height, value)."""
        found = [t for t in self.root.iter("text") if t.get("class") == axis]
        return [(float(t.get(axis).rstrip("%")) / 100, value_of(t.text)) for t in found]

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, step0), (x1, step1) = self.x_ticks[0], self.x_ticks[-1]
        (y0, low), (y1, high) = self.y_ticks[0], self.y_ticks[-1]
        low, high = (math.log10(low), math.log10(high)) if self.log else (low, high)
        value = low + (y - y0) / (y1 - y0) * (high - low)
        step = step0 + (x - x0) / (x1 - x0) * (step1 - step0)
        return step, 10**value if self.log else value

    def runs(self, kind: str, style: str) -> list[list[tuple[float, float]]]:
        """Of a curve's lines or dots, what is drawn in one go."""
        found = [p for p in self.root.iter("path") if p.get("class") == f"{kind} {style}"]
        runs = [run for path in found for run in re.findall("M[^M]+", path.get("d"))]
        return [
            [
                self.at(float(x) / SIZE, float(y) / SIZE)
                for x, y in re.findall(r"[ML]([-\d.]+),([-\d.]+)", run)
            ]
            for run in runs
        ]

    def marks(self, style: str) -> list[float]:
        lines = [m for m in self.root.iter("line") if m.get("class") == f"mark {style}"]
        return [self.at(float(m.get("x1").rstrip("%")) / 100, 0.5)[0] for m in lines]


def near(read: Read, found, expected) -> None:
    """The same points, in runs: to two thousandths of what the ticks span, or on a log scale to two
    hundredths of the value."""
    ends = [(ticks[0][1], ticks[-1][1]) for ticks in (read.x_ticks, read.y_ticks)]
    (first, last), (low, high) = ends
    found, expected = ([*itertools.chain(*runs)] for runs in (found, expected))
    assert len(found) == len(expected)
    for (s, y), (step, value) in zip(found, expected):
        assert s == pytest.approx(step, abs=2e-3 * (last - first))
        assert y == pytest.approx(
            value, abs=0 if read.log else 2e-3 * (high - low), rel=2e-2 * read.log
        )


@pytest.mark.parametrize("seed", range(30))
def test_curves_are_where_their_values_are(seed):
    draw_ = random.Random(seed)
    unit = 10 ** draw_.uniform(-7, 9)
    steps = sorted(draw_.sample(range(10 ** draw_.randint(2, 6)), draw_.choice([2, 20, 90])))
    values = [unit * draw_.uniform(0.2, 3) * draw_.choice([-1, 1]) ** (seed % 2) for _ in steps]
    if seed % 3 == 0:
        values[draw_.randrange(len(values))] *= 1e4
    series = list(zip(steps, values))
    gaps = draw_.sample(range(1, len(steps)), min(3, len(steps) - 2))
    for at, hole in zip(gaps, [math.nan, math.inf, -math.inf]):
        series[at] = steps[at], hole
    curve = Curve("a <name>", "train", [series])
    figure, data = draw("Loss", "nats", [curve], Scale(steps[0], steps[-1]))
    read, span = Read(figure), steps[-1] - steps[0]
    groups = itertools.groupby(series, key=lambda point: math.isfinite(point[1]))
    runs = [list(run) for finite, run in groups if finite]
    joined = [run for run in runs if len(run) > 1]
    alone = [run for run in runs if len(run) == 1]  # these would not be seen as lines
    lines, dots = read.runs("line", "train"), read.runs("dots", "train")
    assert len(lines) == len(joined)
    near(read, lines, joined)
    near(read, dots, runs if len(steps) < 50 else alone)
    assert read.marks("nan") == pytest.approx(sorted(steps[i] for i in gaps), abs=2e-3 * span)
    said = data["curves"][0]["points"]
    assert [s for s, _ in said] == steps
    for (_, text), (_, value) in zip(said, series):
        if math.isfinite(value):
            assert value_of(text) == pytest.approx(value, rel=1e-5)
    texts = {text for _, text in said} & {"not a number", "∞", "-∞"}
    assert texts == {*["not a number", "∞", "-∞"][: len(gaps)]}


def test_one_outlier_does_not_flatten_the_rest():
    series = [(i, 2.0 + 0.01 * i) for i in range(20)] + [(20, 5e5)]
    read = Read(draw("Loss", "nats", [Curve("a", "train", [series])], Scale(0, 20))[0])
    assert read.log
    assert [y for _, y in read.y_ticks] == [10.0**n for n in range(1, 6)]


def test_marks_stand_at_their_steps_and_thousands_stay_few():
    marks = [Mark(5, "skipped", "why <b>"), Mark(40, "rewound", "to 3")]
    curve = Curve("a", "train", [[(0, 1.0), (50, 2.0)]])
    figure, data = draw("Loss", "nats", [curve], Scale(0, 50), marks)
    read = Read(figure)
    assert read.marks("skipped") == pytest.approx([5]) and read.marks("rewound") == pytest.approx(
        [40]
    )
    assert data["marks"] == [[5, "why <b>"], [40, "to 3"]]
    assert [li.text for li in read.root.iter("li")] == ["a", "skipped", "rewound"]
    many = [Mark(i, "skipped", "") for i in range(20_000)]
    figure, data = draw("Loss", "nats", [curve], Scale(0, 20_000), many)
    assert len(data["marks"]) == len(Read(figure).marks("skipped")) <= SIZE + 1


@pytest.mark.parametrize("seed", range(5))
def test_thinning_keeps_every_spike_and_invents_nothing(seed):
    draw_ = random.Random(seed)
    series = [(3 * i, draw_.gauss(0, 1)) for i in range(draw_.randint(1001, 9000))]
    spikes = draw_.sample(range(len(series)), 20)
    for n, i in enumerate(spikes):
        series[i] = series[i][0], (-1) ** n * (100.0 + n)
    series[spikes[7]] = series[spikes[7]][0], math.nan
    series[10:900] = [(s, math.nan) for s, _ in series[10:900]]
    thinned = thin(series)
    assert len(thinned) <= 1003 and set(map(str, thinned)) <= set(map(str, series))
    assert thinned == sorted(thinned) and len({s for s, _ in thinned}) == len(thinned)
    assert [str(thinned[0]), str(thinned[-1])] == [str(series[0]), str(series[-1])]
    reach = 3 * (-(-len(series) // 333))  # steps of a stretch: what is left out is not beyond it
    for step, y in draw_.sample(series[900:], 100):
        near_by = [v for s, v in thinned if abs(s - step) <= reach and not math.isnan(v)]
        assert math.isnan(y) or min(near_by) <= y <= max(near_by)
    spiked = {value for _, value in series if abs(value) >= 100}
    assert spiked <= {value for _, value in thinned}
    assert any(math.isnan(y) for s, y in thinned)
    assert thin(series[:1000]) == series[:1000]


@pytest.mark.parametrize("seed", range(30))
def test_ticks_are_round_few_and_within(seed):
    draw_ = random.Random(seed)
    low = draw_.uniform(-1, 1) * 10 ** draw_.uniform(-6, 6)
    scale = Scale(low, low + abs(low) * 10 ** draw_.uniform(-2, 3))
    ticks = scale.ticks()
    gaps = {number(b - a) for a, b in itertools.pairwise(ticks)}
    assert 2 <= len(ticks) <= 6 and len(gaps) == 1
    assert float(f"{ticks[1] - ticks[0]:.0e}"[0]) in (1, 2, 5)
    assert scale.low <= ticks[0] + 1e-9 * abs(low) and ticks[-1] <= scale.high + 1e-9 * abs(low)
    assert len({number(t) for t in ticks}) == len(ticks)
    assert Scale(0, draw_.choice([1, 2, 3])).ticks(whole=True) in ([0, 1], [0, 1, 2], [0, 1, 2, 3])


@pytest.mark.parametrize(
    "values",
    [[3.0], [0.0, 0.0], [1e20, 1e20], [1.0, 1.0 + 2e-16], [-5.0], [1e-300, 1e90], [-1e99, 1e99]],
)
@pytest.mark.parametrize("from_zero", [True, False])
def test_any_values_have_a_scale(values, from_zero):
    scale = scale_of(values, from_zero=from_zero)
    assert all(0 <= scale.share(value) <= 1 for value in values)
    assert scale.ticks() and all(map(math.isfinite, scale.ticks()))


@pytest.mark.parametrize(
    "x, text",
    [
        (0.0, "0"),
        (2.5, "2.5"),
        (0.1 + 0.2, "0.3"),
        (0.0005, "5e-4"),
        (-0.00025, "-2.5e-4"),
        (9999.0, "9999"),
        (12_345.0, "12.345k"),
        (1_000_000.0, "1M"),
        (2.5e13, "25T"),
        (1e16, "1e16"),
        (math.nan, "not a number"),
        (math.inf, "∞"),
        (-math.inf, "-∞"),
    ],
)
def test_numbers_are_short(x, text):
    assert number(x) == text
