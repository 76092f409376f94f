"""The scripts of this folder, on less: what they find is none of their figures, but it is the same.
Those that need a disk of their own, or half an hour, are run by hand."""

import itertools

import corruption
import kills
import pytest


@pytest.mark.parametrize(
    ("processes", "devices"), [(1, [4]), (1, [8, 4, 8]), (2, [2])], ids=["one", "devices", "two"]
)
def test_kills_change_nothing(tmp_path, processes, devices):
    found = kills.torture(tmp_path, 2, processes, devices, seed=3)
    assert (found["kills"], found["outcome"]) == (2, "the same")


def test_what_differs_is_seen(tmp_path):
    """By what compares the runs."""
    corpus = kills.commands.write_corpus(tmp_path / "corpus")
    for name, seed in (("a", 0), ("b", 1)):
        flags = kills.tiny(corpus, training__steps=2, training__seed=seed)
        kills.commands.train(*flags, f"--workdir={tmp_path / name}", env=kills.environment())
    for exact in (True, False):
        said = kills.difference(tmp_path / "a", tmp_path / "b", 2, exact=exact)
        assert "losses differ" in said
    assert "steps are missing" in kills.difference(tmp_path / "a", tmp_path / "a", 3, exact=True)
    assert kills.difference(tmp_path / "a", tmp_path / "a", 2, exact=True) == ""


def test_damage_is_detected_or_harmless(tmp_path):
    workdir = corruption.trained(tmp_path)
    cases = list(corruption.damages(workdir, bits=2, seed=1))
    assert len(cases) > 200
    found = corruption.torture(workdir, itertools.islice(cases, 0, None, 25))
    assert {outcome for *_, outcome in found} == {"detected", "harmless"}, found
