"""What TensorBoard reads of a run, and what becomes of it where the disk takes no more."""

import struct

import pytest

from lm_jax.training import events
from lm_jax.training.events import Events


def written(folder):
    """(step, name, value) of all events in the order of the files, and (step, 'void', None)."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir(), key=lambda p: int(p.suffix[1:])):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.HasField("session_log"):
                found.append((event.step, "void", None))
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return found


def test_numbers_by_step_and_what_a_restart_takes_back(tmp_path):
    for start, values in ((0, (1.5, 2.5)), (1, (4.0,))):
        log = Events(str(tmp_path), start)
        for i, value in enumerate(values, start + 1):
            log.add({"train/loss": value}, i)
        log.close()
    assert written(tmp_path) == [
        *((1, "void", None), (1, "train/loss", 1.5), (2, "train/loss", 2.5)),
        *((2, "void", None), (2, "train/loss", 4.0)),
    ]


def test_a_disk_that_takes_no_more_is_told_once_and_tried_again(tmp_path, monkeypatch, capsys):
    log = Events(str(tmp_path), 0)
    log.add({"a": 1.0}, 1)
    log._file.flush()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(log._file, "write_event", full)
    for step in (2, 3):
        log.add({"a": 2.0}, step)
    monkeypatch.setattr(events, "_AGAIN_AFTER", 0.0)
    log._next_try = 0.0
    log.add({"a": 4.0}, 4)
    log.close()
    assert capsys.readouterr().err.count("is not written now") == 1
    assert written(tmp_path) == [
        *((1, "void", None), (1, "a", 1.0), (4, "void", None), (4, "a", 4.0)),
    ]


@pytest.mark.parametrize("start", [0, 7])
def test_a_folder_that_cannot_be_made_ends_no_run(tmp_path, start, capsys):
    (tmp_path / "file").touch()
    log = Events(str(tmp_path / "file"), start)
    log.add({"a": 1.0}, start + 1)
    log.close()
    assert "is not written now" in capsys.readouterr().err
