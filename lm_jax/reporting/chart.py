"""Curves over steps as SVG that fits any width: text keeps its size, and lines their strength.

Places are shares of the chart's width and height. Curves, which cannot be given in shares, lie in
a drawing of their own, of SIZE by SIZE units, that is stretched.
"""

import dataclasses
import html
import math
import statistics
from collections.abc import Sequence

from lm_jax.reporting.reading import Series

SIZE = 1000  # units of the drawing
POINTS = 1000  # that a curve has about, at most
_FEW = 50  # so few are drawn as dots as well
_HUGE = 1e100  # as good as infinite
_WIDE = 100.0  # times the median: beyond, a linear scale would flatten the rest


@dataclasses.dataclass(frozen=True)
class Curve:
    """
    Attributes:
      style: its class, which gives it a colour.
      pieces: parts that are not joined, none of them empty.
    """

    name: str
    style: str
    pieces: Sequence[Series]


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something to be seen at a step; `style` as for a Curve."""

    step: int
    style: str
    text: str


@dataclasses.dataclass(frozen=True)
class Scale:
    """What lies between the ends of an axis: linear, or of the logarithm."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value stands, from 0 at the low end to 1."""
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self, about: int = 5, *, whole: bool = False) -> list[float]:
        """Round numbers on it, about so many.

        Args:
          whole: integers alone.
        """
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            each = max(1, -(-(last - first + 1) // about))
            return [10.0**n for n in range(first, last + 1, each)]
        rough = (self.high - self.low) / about
        unit = 10.0 ** math.floor(math.log10(rough))
        gap = next(n * unit for n in (1, 2, 5, 10) if n * unit >= rough * 0.999)
        gap = max(1.0, gap) if whole else gap
        first, last = math.ceil(self.low / gap - 1e-9), math.floor(self.high / gap + 1e-9)
        return [n * gap for n in range(first, last + 1)]


def number(x: float) -> str:
    """A value for a reader: 0.0005 is 5e-4, and 12,000 is 12k."""
    if not math.isfinite(x):
        return {math.inf: "∞", -math.inf: "-∞"}.get(x, "not a number")
    size = abs(x)
    if size and not 1e-3 <= size < 1e15:
        mantissa, _, power = f"{x:.5e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    for unit, least, one in (("T", 1e12, 1e12), ("G", 1e9, 1e9), ("M", 1e6, 1e6), ("k", 1e4, 1e3)):
        if size >= least:
            return f"{x / one:.6g}{unit}"
    return f"{x:.6g}"


def _drawn(value: float) -> bool:
    return abs(value) < _HUGE  # and not NaN


def thin(series: Series, limit: int = POINTS) -> Series:
    """At most about `limit` points: the smallest and the largest of each stretch of them, so that
    a spike stays, with the first point, the last, and one of each stretch that is no number."""
    if len(series) <= limit:
        return series
    stretches = limit // 3
    kept = [series[0], series[-1]]
    for i in range(stretches):
        part = series[i * len(series) // stretches : (i + 1) * len(series) // stretches]
        finite = [point for point in part if _drawn(point[1])]
        if finite:
            kept += [min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])]
        kept += [point for point in part if not _drawn(point[1])][:1]
    return sorted(dict(kept).items())


def _thinner(curve: Curve) -> Curve:
    limit = max(3, POINTS // len(curve.pieces))
    return dataclasses.replace(curve, pieces=[thin(piece, limit) for piece in curve.pieces])


def scale_of(values: Sequence[float], *, from_zero: bool = False) -> Scale:
    """For these values, of which there is at least one. It is of the logarithm where the largest is
    far above most of them.

    Args:
      from_zero: begins at 0, where it is linear and none is below.
    """
    low, high = min(values), max(values)
    if low > 0 and high > _WIDE * statistics.median(values):
        return Scale(low / 1.3, high * 1.3, log=True)
    if from_zero:
        low = min(low, 0.0)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    if high + room == high or low - room == low:
        room = max(abs(low), abs(high), 1.0)  # equal, as far as numbers can tell
    return Scale(low if from_zero and low == 0.0 < high else low - room, high + room)


def draw(
    name: str,
    unit: str,
    curves: Sequence[Curve],
    steps: Scale,
    marks: Sequence[Mark] = (),
    *,
    from_zero: bool = False,
) -> tuple[str, dict]:
    """A chart as HTML, and what its script is to know of it.

    Args:
      name: its title; of each chart of a page another one.
      unit: of the values.
      steps: the horizontal scale.
      from_zero: as for `scale_of`.
    """
    curves = [_thinner(curve) for curve in curves]
    points = [(step, y) for curve in curves for piece in curve.pieces for step, y in piece]
    finite = [y for _, y in points if _drawn(y)]
    values = scale_of(finite, from_zero=from_zero) if finite else Scale(0.0, 1.0)
    marks = [*marks, *(Mark(s, "nan", number(y)) for s, y in points if not _drawn(y))]
    legend = [(curve.style, curve.name) for curve in curves]
    legend += [("nan", "no finite value")] * any(m.style == "nan" for m in marks)
    legend += [(m, m) for m in ("skipped", "rewound") if any(mark.style == m for mark in marks)]
    marks = _apart(marks, steps)
    note = f"{unit}, log scale" if values.log else unit
    figure = (
        f'<figure class="chart"><figcaption>{html.escape(name)} <small>{html.escape(note)}</small>'
        f"</figcaption>{_legend(legend)}"
        f'<div class="plot"><svg width="100%" height="100%" role="img" aria-label='
        f'"{html.escape(_said(name, curves))}">{_grid(steps, values)}'
        f'<svg class="curves" viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none">'
        f"{''.join(_path(curve, steps, values) for curve in curves)}</svg>"
        f"{''.join(_mark(mark, steps) for mark in marks)}"
        '<line class="hair" y2="100%" visibility="hidden"/></svg>'
        '<div class="tip" hidden=""></div></div></figure>'
    )
    data = {
        "curves": [
            {
                "name": curve.name,
                "points": sorted([s, number(y)] for piece in curve.pieces for s, y in piece),
            }
            for curve in curves
        ],
        "marks": [[m.step, m.text] for m in marks if m.style != "nan"],
    }
    return figure, data


def _said(name: str, curves: Sequence[Curve]) -> str:
    """The chart in words, for those who do not see it."""
    ends = [(c.name, c.pieces[0][0], c.pieces[-1][-1]) for c in curves]
    said = [
        f"{of}: {number(first[1])} at step {first[0]:,}, {number(last[1])} at step {last[0]:,}"
        for of, first, last in ends
    ]
    return f"{name}. {'; '.join(said)}"


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    if len(entries) < 2:
        return ""
    items = (f'<li class="{style}">{html.escape(name)}</li>' for style, name in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _percent(share: float) -> str:
    return f"{100 * share:.3f}".rstrip("0").rstrip(".") + "%"


def _grid(steps: Scale, values: Scale) -> str:
    parts = []
    for value in values.ticks():
        y = _percent(1 - values.share(value))
        parts.append(f'<line x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="y" x="-6" y="{y}" dy="0.32em">{number(value)}</text>')
    for step in steps.ticks(whole=True):
        x = _percent(steps.share(step))
        parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="100%" y2="100%"/>')
        parts.append(f'<text class="x" x="{x}" y="100%" dy="1.3em">{number(step)}</text>')
    parts.append('<line class="axis" x2="100%" y1="100%" y2="100%"/>')
    return f'<g class="grid">{"".join(parts)}</g>'


def _path(curve: Curve, steps: Scale, values: Scale) -> str:
    """The curve's lines, and dots where there are few points or one stands alone."""
    few = sum(map(len, curve.pieces)) <= _FEW
    lines, dots = [], []
    for run in (run for piece in curve.pieces for run in _finite_runs(piece)):
        places = [
            f"{SIZE * steps.share(step):.2f},{SIZE * (1 - values.share(y)):.2f}" for step, y in run
        ]
        if len(run) > 1:
            lines.append("M" + "L".join(places))
        if few or len(run) == 1:
            dots += [f"M{place}h0" for place in places]
    paths = (("line", lines), ("dots", dots))
    return "".join(
        f'<path class="{kind} {curve.style}" d="{"".join(d)}"/>' for kind, d in paths if d
    )


def _finite_runs(series: Series) -> list[Series]:
    """The parts of a curve between values that are no numbers."""
    runs: list[Series] = [[]]
    for step, value in series:
        if _drawn(value):
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _apart(marks: Sequence[Mark], steps: Scale) -> list[Mark]:
    """Of marks of one style that would cover each other, the first."""
    places = {(m.style, round(SIZE * steps.share(m.step))): m for m in reversed(marks)}
    return sorted(places.values(), key=lambda m: m.step)


def _mark(mark: Mark, steps: Scale) -> str:
    x, height = _percent(steps.share(mark.step)), "8%" if mark.style == "nan" else "100%"
    text = html.escape(f"step {mark.step:,}: {mark.text}")
    return (
        f'<line class="mark {mark.style}" x1="{x}" x2="{x}" y2="{height}"><title>{text}</title>'
        "</line>"
    )
