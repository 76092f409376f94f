"""Trains for a long time, and looks whether memory, open files or threads become more.

    python tests/torture/endurance.py               30 minutes
    python tests/torture/endurance.py --minutes=1

The run is of tiny steps, with all that a run does at intervals: it saves every 100 steps, validates
every 200, samples every 500 and logs each one, with two workers that read ahead.

Seen on two CPU cores, beside other work: 20,655 steps; from the second fifth of the time to the
last memory went from 346 to 356 MB, and there were 32 files and 42 threads all along.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

sys.path[:0] = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parents[1])]

import commands  # noqa: E402
from commands import environment, tiny  # noqa: E402

_FIRST = 0.2  # of the time, in which a run may still grow
_MOST = {"memory": 1.05, "files": 1.0, "threads": 1.0}  # times as much at the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = torture(pathlib.Path(folder), options.minutes)
    print(f"{'':10} {'early':>10} {'late':>10} {'times':>7}")
    for name in _MOST:
        early, late = found[name]
        print(f"{name:10} {early:10,.0f} {late:10,.0f} {late / early:7.3f}")
    grown = [name for name, most in _MOST.items() if found[name][1] > most * found[name][0]]
    print(f"{found['steps']:,} steps: " + (f"more {', '.join(grown)}" if grown else "flat"))
    print(json.dumps(found))
    sys.exit(bool(grown))


def torture(folder: pathlib.Path, minutes: float) -> dict[str, object]:
    """Medians of the second fifth of the time and of the last: memory in KiB."""
    corpus, workdir = commands.write_corpus(folder / "corpus"), folder / "run"
    flags = tiny(
        corpus,
        training__steps=100_000_000,
        checkpoint__every=100,
        training__evaluate_every=200,
        training__sample_every=500,
        training__sample_tokens=8,
        data__workers=2,
        logging__tensorboard=True,
    )
    said = folder / "said.txt"
    with open(said, "w") as output:
        flags = [*flags, f"--workdir={workdir}"]
        process = commands.start("train", *flags, env=environment(2), output=output)
    seen: list[dict[str, int]] = []
    try:
        while not (workdir / "metrics.jsonl").exists():
            assert process.poll() is None, said.read_text()[-2000:]
            time.sleep(0.1)
        trainer = _trainer(workdir)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            assert process.poll() is None, said.read_text()[-2000:]
            seen.append(_look(trainer))
            time.sleep(min(5.0, minutes))
        process.terminate()
        assert process.wait(timeout=120) == 143, said.read_text()[-2000:]
    finally:
        process.kill()
    fifth = max(1, int(len(seen) * _FIRST))
    steps = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return {
        name: [
            statistics.median(x[name] for x in part)
            for part in (seen[fifth : 2 * fifth], seen[-fifth:])
        ]
        for name in _MOST
    } | {"steps": steps, "minutes": minutes}


def _trainer(workdir: pathlib.Path) -> int:
    """The process that trains; the one that was started may be another."""
    return int((workdir / "lock").read_text())


def _look(process: int) -> dict[str, int]:
    folder = pathlib.Path(f"/proc/{process}")
    status = dict(
        line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line
    )
    return {
        "memory": int(status["VmRSS"].split()[0]),
        "threads": int(status["Threads"]),
        "files": len(list((folder / "fd").iterdir())),
    }


if __name__ == "__main__":
    main()
