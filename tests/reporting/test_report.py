"""The page of a run says what its files say, whatever they hold."""

import dataclasses
import html.parser
import json
import math

import commands
import pytest

from lm_jax.config import Config, DataConfig, TaskConfig, TrainingConfig
from lm_jax.config_json import to_json
from lm_jax.errors import UserError
from lm_jax.reporting.page import check_replaceable, render
from lm_jax.reporting.reading import read

NASTY = "</script><img src=x onerror=alert(1)>&amp;\"'<!-- /* DATA */ \u202e"
CONFIG = Config(
    data=DataConfig(sources=(NASTY, "b", "c", "d")),
    task=TaskConfig(name="translate"),
    training=TrainingConfig(steps=40, seed=7),
)


class Texts(html.parser.HTMLParser):
    """A page as those see it who read it: the texts of cells, of facts and so on, by their tag."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.found: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag != "meta":
            self._open.append(tag)
            self.found.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

        if tag in ("td", "th"):
            self.found["tr"][-1] += "|"

    def handle_data(self, data):
        for tag in {*self._open}:
            self.found[tag][-1] += data


def line(kind: str, step: int, **values) -> str:
    return json.dumps({"kind": kind, "step": step, **values}) + "\n"


def metrics() -> str:
    """A run that skipped step 12, and went back from 20 to 15."""
    lines = []
    for first, last, more in ((1, 20, 0.0), (16, 30, 1.0)):
        for step in range(first, last + 1):
            lines.append(
                line(
                    "train",
                    step,
                    loss=8 - step / 10 - more,
                    gradient_norm=1.5 if step != 11 else math.inf,
                    learning_rate=1e-5 * step,
                    tokens_per_second=1000.0 + step,
                )
            )
            if step == 12:
                lines.append(line("skipped", 12, loss=math.nan, gradient_norm=7.5))
            if step % 10 == 0:
                lines.append(line("validation", step, loss=8.5 - step / 10, bits_per_byte=1.25))
                lines.append(line("task", step, bleu=10.0 + (last == step == 20), chrf=step / 3))
        if last == 20:
            lines.append(line("rewound", 20, to=15))
    return "".join(lines)


SAMPLES = f"=== step 0 ===\none\n\n=== step 30 ===\n{NASTY}\n=== more\n"
TIME = [
    {"life": "a", "began": 0, "from": 0, "step": 10, "time": 90,
     "seconds": {"start": 10, "step": 60, "data": 20}},
    {"life": "b", "began": 190, "from": 5, "step": 30, "time": 300, "seconds": {"step": 110}},
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """The folder of a run with all that a report shows; its name is not kind either."""
    folder = tmp_path / "a <b>run&amp;"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(CONFIG))
    (folder / "metrics.jsonl").write_text(metrics())
    (folder / "samples.txt").write_text(SAMPLES)
    (folder / "time.jsonl").write_text("".join(json.dumps(x) + "\n" for x in TIME))
    return folder


def test_the_page_says_what_the_files_say(run):
    texts = Texts(render(read(str(run)))).found
    assert texts["title"][0] == texts["h1"][0] == "a <b>run&amp;"
    facts = dict(zip(texts["dt"], texts["dd"]))
    expected = {
        "step": "30 of 40",
        "training loss": "4",
        "validation loss": "5.5 the best",
        "bits per byte": "1.25",
        "bleu": "10 best 10 at step 10",  # that of step 20 was undone
        "goodput": "70.0% of 3:20",
        "text": f"{NASTY}, b, c and 1 more",
        "seed": "7",
    }
    assert {name: facts[name] for name in expected} == expected
    assert [c.split()[0] for c in texts["figcaption"]] == [
        *("Loss", "Learning", "Gradient", "Throughput", "Scores")
    ]
    rows = [row.split("|")[:3] for row in texts["tr"]]
    assert ["30", "10.00", "10.00"] in rows and ["10", "10.00", "3.33"] in rows
    assert ["step", "2:20", "70.0%"] in rows and ["lost", "0:40", "20.0%"] in rows
    events = [row for row in texts["tr"] if "rewound" in row or "skipped" in row]
    assert events == [
        "20|rewound to step 15|",
        "12|update skipped, loss not a number, gradient norm 7.5|",
    ]
    assert texts["pre"] == [f"\n{NASTY}\n=== more", "\none\n"]  # of which HTML drops the first end
    assert texts["summary"][:2] == ["step 30", "step 0"]
    assert any("1:40" in text and "no process" in text for text in texts["p"])


def test_curves_hold_what_is_in_the_model_and_show_what_was_undone(run):
    page = render(read(str(run)))
    data = json.loads(Texts(page).found["script"][0])
    loss, _, norm, _, scores = data["charts"]
    curves = {c["name"]: dict(c["points"]) for c in loss["curves"]}
    assert curves["training"] == {s: f"{8 - s / 10 - (s > 15):.6g}" for s in range(1, 31)}
    assert curves["undone by a rewind"] == {s: f"{8 - s / 10:.6g}" for s in range(16, 21)}
    assert curves["validation"] == {10: "7.5", 20: "6.5", 30: "5.5"}
    assert [m[0] for m in loss["marks"]] == [12, 20]
    assert norm["curves"][0]["points"][10] == [11, "∞"] and page.count('class="mark nan"') == 1
    assert [c["name"] for c in scores["curves"]] == ["bleu", "chrf"]


def test_nothing_in_the_files_is_read_as_html(run):
    """The same tags as with harmless texts."""
    nasty = Texts(render(read(str(run)))).tags
    (run / "samples.txt").write_text(SAMPLES.replace(NASTY, "x"))
    harmless = dataclasses.replace(CONFIG, data=DataConfig(sources=("a", "b", "c", "d")))
    (run / "config.json").write_text(to_json(harmless))
    folder = run.rename(run.parent / "run")
    assert nasty == Texts(render(read(str(folder)))).tags
    values = {NASTY: 1.0, "loss": 2.0}
    lines = [line("task", 1, **values), line("task", 2, **values), line("skipped", 3, **values)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    page = render(read(str(folder)))
    assert Texts(page).tags.count("script") == 2 and "img" not in Texts(page).tags
    assert NASTY in Texts(page).found["figcaption"][0] or NASTY in "".join(Texts(page).found["th"])


DAMAGED = [
    b"{",
    b'{"kind": "tra',
    b"\xff\x00\xfe",
    b"[" * 100_000,
    b"3",
    b'"train"',
    b"[]",
    b"{}",
    b'{"kind": 3, "step": 1}',
    b'{"kind": "train"}',
    b'{"kind": "train", "step": "1"}',
    b'{"kind": "train", "step": 1.5}',
    b'{"kind": "train", "step": -1}',
    b'{"kind": "train", "step": true}',
    b'{"kind": "train", "step": 1' + b"0" * 400 + b"}",
    b'{"kind": "rewound", "step": null}',
]


def test_damaged_lines_are_counted_and_the_others_shown(run):
    whole = read(str(run))
    for damage in DAMAGED:
        (run / "metrics.jsonl").write_bytes(damage + b"\n\n" + metrics().encode() + damage)
        found = read(str(run))
        assert found == dataclasses.replace(whole, unread=2), damage
    assert "2 lines cannot be read" in render(found)
    for name in ("metrics.jsonl", "samples.txt", "time.jsonl"):
        (run / name).write_bytes(b"\xff\xfe\x00\n" * 3)
    assert "3 lines cannot be read" in render(read(str(run)))


@pytest.mark.parametrize(
    "odd",
    [
        line("train", 1, loss="4", gradient_norm=None, learning_rate=[1], tokens_per_second=True),
        line("train", 0, loss=10**400, gradient_norm=-(10**400), tokens_per_second=math.nan),
        line("train", 2**52, loss=1e308) + line("train", 1, loss=-1e308),
        line("validation", 5, loss=math.nan) + line("task", 5, bleu=math.nan),
        line("rewound", 5) + line("rewound", 5, to="3") + line("rewound", 5, to=7),
        line("train", 5, loss=2.0) + line("rewound", 5, to=0),
        line("skipped", 5, loss=None) + line("unheard_of", 5, loss=1.0),
        line("task", 5) + line("task", 6, chrf=1.0) + line("task", 7, bleu=1.0),
    ],
)
def test_odd_values_make_a_page(run, odd):
    (run / "metrics.jsonl").write_text(odd)
    found = read(str(run))
    assert found.unread == 0
    assert Texts(render(found)).found["h1"]


def test_a_run_that_has_not_begun_says_so(tmp_path):
    (tmp_path / "config.json").write_text(to_json(Config()))
    page = render(read(str(tmp_path)))
    texts = Texts(page).found
    assert any("Nothing is measured yet" in text for text in texts["p"])
    assert dict(zip(texts["dt"], texts["dd"]))["step"] == "0 of 1,000"
    assert "svg" not in texts and "Samples" not in texts["h2"]


def test_only_the_newest_of_many_are_shown(run):
    steps = range(1000)
    (run / "metrics.jsonl").write_text(
        "".join(line("task", s, bleu=1.0) + line("skipped", s) for s in steps)
    )
    (run / "samples.txt").write_text("".join(f"=== step {s} ===\n{s}\n" for s in steps))
    texts = Texts(render(read(str(run)))).found
    assert texts["pre"] == [f"\n{s}" for s in steps[:-51:-1]]
    assert texts["p"].count("950 earlier ones are in metrics.jsonl.") == 2
    assert "950 earlier ones are in samples.txt." in texts["p"]
    assert len(texts["tr"]) < 150


def test_a_run_in_a_bucket_is_read_from_there(run):
    import fsspec

    bucket = fsspec.filesystem("memory")
    for file in run.iterdir():
        bucket.pipe_file(f"/reported/run/{file.name}", file.read_bytes())
    there = read("memory://reported/run")
    bucket.rm("/reported", recursive=True)
    assert dataclasses.replace(there, workdir=str(run)) == read(str(run))


def test_the_command_writes_the_page_over_an_older_one(run):
    written = run / "report.html"
    written.write_text(render(read(str(run))).replace("Curves", "Older"), encoding="utf-8")
    code, out, err = commands.run("report", f"--workdir={run}")
    assert (code, err) == (0, "") and out.startswith(f"wrote {written}")
    assert written.read_text(encoding="utf-8") == render(read(str(run)))
    code, out, err = commands.run("report", "--workdir=gs://a/b")
    assert (code, out) == (1, "") and "give --output=FILE.html" in err


def test_the_page_replaces_no_other_file(tmp_path):
    (tmp_path / "mine.html").write_text("<p>mine")
    check_replaceable(str(tmp_path / "new.html"))
    for path, message in (
        (tmp_path / "mine.html", "is no report: name another"),
        (tmp_path, "is no report: name another"),
        (tmp_path / "no" / "a.html", "there is no folder"),
        ("gs://a/b.html", "is written to this machine"),
    ):
        with pytest.raises(UserError, match=message):
            check_replaceable(str(path))


def test_in_a_browser(run, open_page):
    file = run / "report.html"
    file.write_text(render(read(str(run))), encoding="utf-8")
    page = open_page(file.as_uri(), color_scheme="dark", viewport={"width": 1200, "height": 800})
    for width in (1200, 400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        plot = page.locator(".plot").first
        box = plot.bounding_box()
        plot.hover(position={"x": box["width"] * 20 / 30, "y": 40})
        said = plot.locator(".tip").inner_text().split("\n")
        assert said[:4] == ["step 20", "training 5", "validation 6.5", "undone by a rewind 6"]
        assert "step 20: rewound to step 15" in said
        curve = page.locator(".curves path.line.train").first.bounding_box()
        assert curve["width"] == pytest.approx(box["width"] * 29 / 30, abs=3)  # from step 1
        page.locator("h1").hover()
        assert plot.locator(".tip").is_hidden()


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no run in"):
        read(str(tmp_path / "nowhere"))
