"""Kills a run at random moments, again and again, and looks whether it ends as one that nothing
disturbed.

    python tests/torture/kills.py                       one process, 100 kills
    python tests/torture/kills.py --processes=2 --kills=20
    python tests/torture/kills.py --devices=8,4,8 --kills=9

The run packs, shuffles, accumulates and drops out, and saves every other step, so that many kills
fall into a save. With one number of devices parameters and optimizer are to be the same bit for
bit; with several, which the lives of the run have in turn, the losses are to be the same to 1e-5.

Seen on two CPU cores: 100 kills in 671 s; beside other work 20 of one of two
processes in 437 s, and 12 with devices in turn in 124 s. The same came out each time.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import sys
import tempfile
import time

import numpy as np

sys.path[:0] = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parents[1])]

import commands  # noqa: E402
from commands import environment, losses, start, stored_arrays, tiny  # noqa: E402
from test_several_hosts import Processes  # noqa: E402

_MORE = 40  # steps, where a run has ended before all kills were done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", default="4", help="of each process; in turn, with commas")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    devices = [int(n) for n in options.devices.split(",")]
    os.environ["LM_JAX_JOIN_SECONDS"] = "60"  # for one that is killed before it has met the others
    with tempfile.TemporaryDirectory() as folder:
        found = torture(
            pathlib.Path(folder), options.kills, options.processes, devices, options.seed
        )
    print(
        f"{found['kills']} kills ({found['in_saves']} in a save, {found['before_a_step']} before"
        f" anything was saved in that life), {found['steps']} steps, {found['seconds']:.0f} s:"
        f" {found['outcome']}"
    )
    print(json.dumps(found))
    sys.exit(found["outcome"] != "the same")


def torture(
    folder: pathlib.Path, kills: int, processes: int, devices: list[int], seed: int
) -> dict[str, object]:
    """Runs, kills and compares, in a folder that is empty.

    Args:
      devices: of each process, in the lives of the run one after the other.
    """
    began, drawn = time.monotonic(), random.Random(seed)
    corpus = commands.write_corpus(folder / "corpus")
    killed, whole = folder / "killed", folder / "whole"
    steps, done, in_saves, before_a_step = _MORE, 0, 0, 0

    def life(workdir: pathlib.Path, devices: int) -> Processes | Alone:
        overrides = {"training__steps": steps, "checkpoint__every": 2, "mesh__fsdp": 2}
        flags = [*tiny(corpus, **overrides), f"--workdir={workdir}"]
        return Alone(flags, devices) if processes == 1 else Processes(flags, processes, devices)

    while done < kills:
        left = unfinished(killed)  # of the life before: the next save removes it
        with life(killed, devices[done % len(devices)]) as running:
            saved = newest(killed)
            _wait(drawn, killed, saved, running)
            victim = drawn.choice(running)
            if victim.poll() is None:
                victim.kill()
                victim.wait()
                done += 1
                in_saves += bool(unfinished(killed) - left)
                before_a_step += newest(killed) == saved
            for other in running:
                other.communicate(timeout=120)
            codes = {p.returncode for p in running}
        assert codes <= {-9, 0, 75}, codes
        if codes == {0}:
            steps += _MORE
    for workdir in (killed, whole):
        with life(workdir, devices[0]) as running:
            for process in running:
                out, err = process.communicate(timeout=600)
                assert process.returncode == 0, out + err
    return {
        "kills": done,
        "processes": processes,
        "devices": devices,
        "in_saves": in_saves,
        "before_a_step": before_a_step,
        "steps": steps,
        "seconds": time.monotonic() - began,
        "outcome": difference(whole, killed, steps, exact=len(set(devices)) == 1) or "the same",
    }


class Alone(Processes):
    """A run of one process."""

    def __init__(self, flags: list[str], devices: int):
        self.all = [start("train", *flags, env=environment(devices))]


def unfinished(workdir: pathlib.Path) -> set[tuple[str, int]]:
    """What saves that are not finished have made."""
    found = set()
    for path in (workdir / "checkpoints").glob("*tmp*"):
        with contextlib.suppress(OSError):
            found.add((path.name, path.stat().st_ino))
    return found


def newest(workdir: pathlib.Path) -> int:
    folder = workdir / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=-1)


def _wait(drawn: random.Random, workdir: pathlib.Path, saved: int, running: list) -> None:
    """Until a moment of a life: some time after its start, mostly when it has saved something."""
    if drawn.random() < 0.2:
        time.sleep(drawn.uniform(0, 3))
        return
    wanted, deadline = saved + drawn.choice((1, 1, 2, 4)), time.monotonic() + 120
    while newest(workdir) < wanted and time.monotonic() < deadline:
        if any(process.poll() is not None for process in running):
            return
        time.sleep(0.002)
    time.sleep(drawn.uniform(0, 0.2))


def difference(whole: pathlib.Path, killed: pathlib.Path, steps: int, *, exact: bool) -> str:
    """In what the runs differ, or ''."""
    expected, found = losses(whole), losses(killed)
    if sorted(found) != list(range(1, steps + 1)):
        return "steps are missing in metrics.jsonl"
    worst = max(abs(expected[i] - found[i]) for i in found)
    if worst > (0 if exact else 1e-5):
        return f"losses differ by up to {worst}"
    if not exact:
        return ""
    arrays, others = stored_arrays(whole, steps), stored_arrays(killed, steps)
    if arrays.keys() != others.keys():
        return "the checkpoints hold other arrays"
    wrong = [name for name, x in arrays.items() if not np.array_equal(x, others[name])]
    return f"arrays differ: {wrong[:5]}" if wrong else ""


if __name__ == "__main__":
    main()
