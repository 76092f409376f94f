"""A launch script's starts end where they make no progress; a person's are not counted."""

import json

import pytest

from lm_jax.errors import WRONG, Interrupted, UserError
from lm_jax.training import starts


@pytest.fixture
def launched(monkeypatch):
    """Says that a launch script makes the next starts; '': nobody."""
    return lambda by: monkeypatch.setenv(starts.VARIABLE, by)


def start(workdir, newest: int | None, error: Exception | None = None, ended: str = "done") -> None:
    with starts.counted(str(workdir), newest) as this:
        this.ended = ended
        if error:
            raise error


def test_starts_without_progress_end_and_the_message_says_how_they_went(tmp_path, launched):
    launched("slurm job 7")
    for newest in (None, None, 4, 4):  # preempted before a save, which is no sign of anything
        start(tmp_path, newest, ended="SIGTERM")
    with pytest.raises(Interrupted):
        start(tmp_path, 4, Interrupted("process 1 is gone\nand more"))
    with pytest.raises(UserError) as refused:
        start(tmp_path, 4)
    assert refused.value.status == WRONG
    told = str(refused.value)
    for said in ("3 starts in a row", "slurm job 7", "step 4", "SIGTERM", "process 1 is gone"):
        assert said in told
    assert "and more" not in told
    since = json.loads((tmp_path / starts.FILE).read_text().splitlines()[2])["time"]
    assert f"since {since}" in told
    # It was a person who gave the command again.
    for _ in range(3):
        start(tmp_path, 4)
    with pytest.raises(UserError, match="no progress"):
        start(tmp_path, 4)


def test_progress_is_a_newer_checkpoint_and_another_launch_counts_anew(tmp_path, launched):
    launched("slurm job 7")
    for newest in (None, None, None, 2, 2, 2, 4, 4, 4):
        start(tmp_path, newest)
    launched("slurm job 8")
    for _ in range(3):
        start(tmp_path, 4)
    with pytest.raises(UserError, match="no progress"):
        start(tmp_path, 4)


def test_a_run_without_a_checkpoint_is_no_progress_either_however_it_was_killed(tmp_path, launched):
    launched("gke mine")
    for _ in range(3):
        start(tmp_path, None)
    lines = [json.loads(line) for line in (tmp_path / starts.FILE).read_text().splitlines()]
    killed = "".join(json.dumps({**line, "ended": None}) + "\n" for line in lines)
    (tmp_path / starts.FILE).write_text(killed.replace(', "ended": null', ""))
    with pytest.raises(UserError, match=r"found no checkpoint in[\s\S]*unknown: killed"):
        start(tmp_path, None)


def test_a_persons_own_commands_are_not_counted(tmp_path, launched):
    launched("")
    for _ in range(5):
        start(tmp_path, 4)
    assert not list(tmp_path.iterdir())


def test_the_file_does_not_grow_without_end(tmp_path, launched):
    launched("slurm job 7")
    for newest in range(300):
        start(tmp_path, newest)
    assert len((tmp_path / starts.FILE).read_text().splitlines()) <= 100
