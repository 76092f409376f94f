"""What an evaluation writes: it goes on after a kill at any time, and mixes with nothing else."""

import json

import pytest

from lm_jax.errors import UserError
from lm_jax.evaluation.output import Output, write_whole

SETTINGS = {"model": "runs/a", "step": 3, "beams": 1, "labels": ("a", "b")}
RECORDS = [
    {"index": i, "text": text}
    for i, text in enumerate(["a", "two\u2028lines\u0085of it\r", "\u00e9\n", "\ud7ff" * 9])
]


def write(path, records, settings=SETTINGS) -> list[dict]:
    """Goes on with `records`, of which some may be there; what was there."""
    with Output(str(path), settings) as output:
        for record in records[len(output.records) :]:
            output.write(record)
        output.finish({"score": 1.0})
        return output.records


def test_it_goes_on_wherever_it_was_cut_off(tmp_path):
    path = tmp_path / "out.jsonl"
    assert write(path, RECORDS) == []
    whole = path.read_bytes()
    assert json.loads((tmp_path / "out.report.json").read_text())["result"] == {"score": 1.0}
    for size in range(len(whole)):  # in the middle of a line, and of a character
        path.write_bytes(whole[:size])
        there = write(path, RECORDS)
        assert there == RECORDS[: whole[:size].count(b"\n")]
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"step": 4}, "step: 3 -> 4"),
        ({"beams": 4, "length_penalty": 1.0}, "beams: 1 -> 4\n  length_penalty: None -> 1.0"),
        ({"labels": ("b", "a")}, "labels: "),
    ],
)
def test_what_was_begun_otherwise_is_not_gone_on_with(changes, said, tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, RECORDS)
    before = path.read_bytes()
    with pytest.raises(UserError, match="was begun otherwise") as error:
        write(path, RECORDS, SETTINGS | changes)
    assert said in str(error.value) and path.read_bytes() == before
    write(path, RECORDS, SETTINGS | {"model": "moved/a"})  # a model may be moved


def test_files_of_others_are_left_as_they_are(tmp_path):
    for name, text in (("out.jsonl", '{"index": 0}\n'), ("out.report.json", "{}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match="not written by an evaluation"):
            write(tmp_path / "out.jsonl", RECORDS)
        assert (tmp_path / name).read_text() == text
        (tmp_path / name).unlink()
    write(tmp_path / "out.jsonl", RECORDS)
    for text in ("[1]\n", "no\n"):
        (tmp_path / "out.jsonl").write_text(text)
        with pytest.raises(UserError, match="line 1: no record"):
            write(tmp_path / "out.jsonl", RECORDS)
    with pytest.raises(UserError, match="no folder"):
        write(tmp_path / "nowhere" / "out.jsonl", RECORDS)


def test_one_process_writes_at_a_time(tmp_path):
    path = str(tmp_path / "out.jsonl")
    with Output(path, SETTINGS), pytest.raises(UserError, match="another process is writing"):
        Output(path, SETTINGS)
    Output(path, SETTINGS).__exit__()


def test_written_at_once_it_is_the_same(tmp_path):
    write(tmp_path / "a.jsonl", RECORDS)
    write_whole(str(tmp_path / "b.jsonl"), RECORDS, SETTINGS, {"score": 1.0})
    for end in (".jsonl", ".report.json"):
        assert (tmp_path / f"a{end}").read_bytes() == (tmp_path / f"b{end}").read_bytes()
