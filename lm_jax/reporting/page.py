"""The page of a run: one HTML file with its curves, scores, time, events and samples.

Whatever comes from the run's files is escaped, or stands in the data alone.
"""

import html
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence

from lm_jax import paths
from lm_jax.config import Config
from lm_jax.config_keys import walk
from lm_jax.errors import UserError
from lm_jax.evaluation.metrics import METRICS
from lm_jax.page import assemble
from lm_jax.progress import clock
from lm_jax.reporting.chart import Curve, Mark, Scale, draw, number
from lm_jax.reporting.reading import Event, Run, Series
from lm_jax.training.goodput import CAUSES, Totals

_SAMPLES = 50  # that are shown, the newest; of events and of scores as many
_OWN = b'<meta name="generator" content="lm_jax.report">'
_STYLES = ("train", "validation", "third", "fourth")


def render(run: Run) -> str:
    """The page, as text that UTF-8 can hold."""
    charts, data = _charts(run)
    sections = [charts, _scores(run), _time(run.time), _events(run.events), _samples(run.samples)]
    title = html.escape(os.path.basename(paths.absolute(run.workdir)) or run.workdir)
    page = assemble(
        __package__,
        data,
        TITLE=title,
        HEAD=_facts(_head(run)),
        MAIN="\n".join(filter(None, [*sections, _config(run.workdir, run.config)])),
    )
    return page.encode("utf-8", errors="replace").decode("utf-8")


def check_replaceable(output: str) -> None:
    """Checks that a page can be written there: nothing is lost but another one.

    Raises:
      UserError: it is no file of this machine, its folder is not there, or it is another file.
    """
    if paths.remote(output):
        raise UserError(f"--output: '{output}': the page is written to this machine: name a file")
    if not os.path.isdir(os.path.dirname(output) or "."):
        raise UserError(f"--output: there is no folder '{os.path.dirname(output)}'")
    if not os.path.exists(output):
        return
    if os.path.isfile(output):
        with open(output, "rb") as f:
            if _OWN in f.read(1000):
                return
    raise UserError(f"--output: '{output}' is there already, and is no report: name another file")


def _section(title: str, *contents: str) -> str:
    return f"<section><h2>{title}</h2>\n{''.join(contents)}</section>"


def _said(text: str, style: str = "") -> str:
    return f'<p class="{style}">{html.escape(text)}</p>' if style else f"<p>{html.escape(text)}</p>"


def _facts(facts: Iterable[tuple[str, str, str]]) -> str:
    """(name, what it is, what else is to be said of it)."""
    pairs = (
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}"
        + (f" <small>{html.escape(more)}</small>" if more else "")
        + "</dd></div>"
        for name, value, more in facts
    )
    return f"<dl>{''.join(pairs)}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], strong: int | None = None) -> str:
    """
    Args:
      head: names of the columns, those of numbers with a '#' before them.
      rows: cells as HTML.
      strong: the row that stands out.
    """
    classes = [' class="number"' if name.startswith("#") else "" for name in head]
    names = "".join(
        f"<th{c}>{html.escape(n.removeprefix('#'))}</th>" for n, c in zip(head, classes)
    )
    body = "".join(
        ('<tr class="right">' if i == strong else "<tr>")
        + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, classes, strict=True))
        + "</tr>"
        for i, row in enumerate(rows)
    )
    return (
        f'<div class="wide"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _head(run: Run) -> Iterator[tuple[str, str, str]]:
    steps = run.config.training.steps
    yield "step", f"{run.step:,}", f"of {steps:,}"
    if loss := run.of("train", "loss"):
        yield "training loss", _digits(loss[-1][1]), ""
    if loss := run.of("validation", "loss"):
        yield "validation loss", _digits(loss[-1][1]), _best(loss, less=True)
    if bits := run.of("validation", "bits_per_byte"):
        yield "bits per byte", _digits(bits[-1][1]), ""
    for name, series in _task(run)[:1]:
        yield name, _digits(series[-1][1]), _best(series, less=_less(name))
    if rates := [y for _, y in run.of("train", "tokens_per_second") if math.isfinite(y)]:
        yield "tokens a second", number(float(f"{statistics.median(rates):.3g}")), "median"
    if used := [y for _, y in run.of("train", "mfu") if math.isfinite(y)]:
        yield "MFU", f"{statistics.median(used):.1%}", "median"
    if run.time.whole:
        yield "goodput", f"{run.time.goodput:.1%}", f"of {clock(run.time.whole)}"


def _best(series: Series, *, less: bool) -> str:
    finite = [point for point in series if math.isfinite(point[1])]
    if len(finite) < 2:
        return ""
    step, value = (min if less else max)(finite, key=lambda point: point[1])
    return "the best" if step == series[-1][0] else f"best {_digits(value)} at step {step:,}"


def _digits(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else number(value)


def _charts(run: Run) -> tuple[str, dict]:
    """The section, and the data of its script."""
    steps = [s for series in run.measured.values() for s, _ in series]
    steps += [s for series in run.undone for s, _ in series] + [e.step for e in run.events]
    broken = ""
    if run.unread:
        lines = "1 line" if run.unread == 1 else f"{run.unread:,} lines"
        broken = _said(f"Of metrics.jsonl, {lines} cannot be read. Is it being written?", "warning")
    if not steps:
        every = run.config.logging.every
        text = f"Nothing is measured yet: a line is written every {every} steps (logging.every)."
        return _section("Curves", _said(text), broken), {"charts": [], "steps": [0, 1]}
    first, last = min(steps), max(steps)
    scale = Scale(0.0 if first < 0.1 * last else first, max(last, first + 1))

    def one(kind: str, name: str, style: str = "train") -> list[Curve]:
        series = run.of(kind, name)
        return [Curve("training" if kind == "train" else kind, style, [series])] if series else []

    loss = [*one("train", "loss"), *one("validation", "loss", "validation")]
    loss += [Curve("undone by a rewind", "undone", run.undone)] * bool(run.undone)
    marks = [Mark(e.step, e.kind, _what(e)) for e in run.events]
    wanted = [("Loss", "nats", loss, {"marks": marks})]
    wanted += [
        (title, unit, one("train", name), {"from_zero": zero})
        for title, unit, name, zero in (
            ("Learning rate", "", "learning_rate", True),
            ("Gradient norm", "before clipping", "gradient_norm", False),
            ("Throughput", "tokens a second", "tokens_per_second", True),
        )
    ]
    task = [(name, series) for name, series in _task(run) if len(series) > 1]
    curves = [Curve(name, style, [series]) for (name, series), style in zip(task, _STYLES)]
    wanted.append(("Scores", "of the task, on validation examples", curves, {}))
    drawn = [
        draw(title, unit, curves, scale, **options)
        for title, unit, curves, options in wanted
        if curves or title == "Loss"
    ]
    figures = f'<div class="charts">{"".join(figure for figure, _ in drawn)}</div>'
    data = {"charts": [of for _, of in drawn], "steps": [scale.low, scale.high]}
    return _section("Curves", figures, broken), data


def _task(run: Run) -> list[tuple[str, Series]]:
    """Of the run's task, the metrics in their order, the first being the one that decides."""
    return [(name, series) for (kind, name), series in run.measured.items() if kind == "task"]


def _less(name: str) -> bool:
    return name in METRICS and METRICS[name].less


def _scores(run: Run) -> str:
    task = _task(run)
    if not task:
        return ""
    names, columns = [name for name, _ in task], [dict(series) for _, series in task]
    steps = sorted(set().union(*columns), reverse=True)
    decides = {s: v for s, v in columns[0].items() if math.isfinite(v)}
    best = (min if _less(names[0]) else max)(decides, key=decides.get, default=None)
    shown = steps[:_SAMPLES]
    rows = [[f"{s:,}", *(f"{c[s]:.2f}" if s in c else "" for c in columns)] for s in shown]
    said = [_said(f"Best {names[0]}: {decides[best]:.2f} at step {best:,}.")] if decides else []
    left = _left_out(len(steps) - len(shown), "metrics.jsonl")
    table = _table(
        ["#step", *(f"#{name}" for name in names)],
        rows,
        shown.index(best) if best in shown else None,
    )
    return _section(f"Scores of the task: {html.escape(run.config.task.name)}", *said, table, left)


def _left_out(count: int, where: str) -> str:
    return _said(f"{count:,} earlier ones are in {where}.") if count > 0 else ""


def _time(time: Totals) -> str:
    if not time.whole:
        return _section("Time", _said("The run has no time.jsonl: where its time went is unknown."))
    parts = [(c, s) for c, s in sorted(time.seconds.items(), key=lambda i: -i[1]) if s]
    bar = "".join(
        f'<span class="{cause}" style="flex: {s / time.whole:.6f}" title="{cause}'
        f' {s / time.whole:.1%}"></span>'
        for cause, s in parts
    )
    rows = [
        [
            f'<span class="swatch {cause}"></span>{cause}',
            clock(s),
            f"{s / time.whole:.1%}",
            html.escape(CAUSES[cause]),
        ]
        for cause, s in parts
    ]
    lives = "one life" if time.lives == 1 else f"{time.lives:,} lives of the run"
    said = (
        f"{clock(time.whole)} in {lives}, of which {time.goodput:.1%} went into steps that are in"
    )
    said += " the model (goodput)."
    if time.lives > 1:
        said += f" Between them, no process is known to have run for {clock(time.down)}."
    table = _table(["cause", "#time", "#share", ""], rows)
    return _section("Time", _said(said), f'<div class="share">{bar}</div>', table)


def _what(event: Event) -> str:
    said = "update skipped" if event.kind == "skipped" else "rewound"
    said += f" to step {event.to:,}" if event.to is not None else ""
    values = (f"{name.replace('_', ' ')} {number(x)}" for name, x in event.values.items())
    return ", ".join([said, *values])


def _events(events: Sequence[Event]) -> str:
    if not events:
        return ""
    newest = events[::-1][:_SAMPLES]
    rows = [[f"{event.step:,}", html.escape(_what(event))] for event in newest]
    left = _left_out(len(events) - len(newest), "metrics.jsonl")
    return _section("Events", _table(["#step", "what"], rows), left)


def _samples(samples: Sequence[tuple[int, str]]) -> str:
    if not samples:
        return ""
    newest = samples[::-1][:_SAMPLES]
    shown = "".join(
        f"<details{' open' * (i == 0)}><summary>step {step:,}</summary>"
        f'<pre class="text">\n{html.escape(text)}</pre></details>'  # HTML drops the first line end
        for i, (step, text) in enumerate(newest)
    )
    return _section("Samples", shown, _left_out(len(samples) - len(newest), "samples.txt"))


def _config(workdir: str, config: Config) -> str:
    model, data, optimizer = config.model, config.data, config.optimizer
    text = ", ".join(data.sources[:3])
    text += f" and {len(data.sources) - 3} more" if len(data.sources) > 3 else ""
    facts = [
        ("folder", workdir),
        ("model", f"{model.layers} layers of width {model.width}, {model.heads} heads"),
        ("starts from", config.init_from),
        ("adapters", f"of rank {model.lora.rank}" if model.lora.rank else ""),
        ("text", text),
        ("objective", data.objective.replace("_", " ")),
        ("batch", f"{data.batch_size} x {data.length} tokens"),
        ("optimizer", f"{optimizer.name}, {optimizer.learning_rate:g} at most"),
        ("schedule", f"{optimizer.schedule}, {optimizer.warmup_steps:,} steps of warm-up"),
        ("seed", str(config.training.seed)),
    ]
    usual = {key: value for key, value, _ in walk(Config())}
    rows = [
        [html.escape(key), _code(value), _code(usual[key])]
        for key, value, _ in walk(config)
        if value != usual[key]
    ]
    table = _table(["field", "value", "default"], rows)
    summary = f"<summary>{len(rows)} fields that are not as by default</summary>"
    all_of_it = f"<details>{summary}{table}</details>"
    return _section("Configuration", _facts((n, v, "") for n, v in facts if v), all_of_it)


def _code(value: object) -> str:
    return f'<span class="text">{html.escape(repr(value))}</span>'
