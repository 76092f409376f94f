"""The scripts of this folder, on less: what they find is none of their figures, but it is the same.
Those that need a disk of their own, or half an hour, are run by hand."""

import json
import shutil

import corruption
import kills


def test_kills_change_nothing(tmp_path):
    found = kills.torture(tmp_path, 2, 1, [4], seed=3)
    assert (found["kills"], found["outcome"]) == (2, "the same")
    # What compares the runs sees what differs.
    whole, steps = tmp_path / "whole", found["steps"]
    assert "steps are missing" in kills.difference(whole, whole, steps + 1, exact=True)
    other = shutil.copytree(whole, tmp_path / "other")
    lines = (other / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    lines[-1] = json.dumps(last | {"loss": last["loss"] + 2e-5})
    (other / "metrics.jsonl").write_text("\n".join(lines))
    for exact in (True, False):
        assert "losses differ" in kills.difference(whole, other, steps, exact=exact)


def test_damage_is_detected_or_harmless(tmp_path):
    workdir = corruption.trained(tmp_path)
    cases = list(corruption.damages(workdir, bits=2, seed=1))
    assert len(cases) > 200
    some, root = cases[::80], workdir / "checkpoints" / str(corruption.NEWER)
    for item in ("parameters", "optimizer"):  # and of each the file with most of its numbers
        files = [path for path in (root / item).rglob("*") if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size).relative_to(root)
        inside = [case for case in cases if case[1].startswith(f"{largest}, ")]
        some += {kind: (kind, *rest) for kind, *rest in inside}.values()
        some += [case for case in cases if case[:2] == ("lengthened", str(largest))]
    found = corruption.torture(workdir, some)
    assert {outcome for *_, outcome in found} == {"detected", "harmless"}, found
