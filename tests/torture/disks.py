"""Takes the disk away from a run, in several ways, and looks whether it lives and loses nothing.

    sudo python tests/torture/disks.py        (mounting small disks is root's)

full        a disk that another program fills up, and that has room again later
small       a disk on which two checkpoints never have room
read-only   a disk that takes nothing any more for a while
removed     the workdir is deleted under the run
no rights   the folder of checkpoints belongs to somebody else for a while
clock       the clock goes back by a day in the middle of the run
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np

sys.path[:0] = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parents[1])]

import commands  # noqa: E402
from commands import environment, losses, stored_arrays, tiny, train  # noqa: E402

STEPS = 400
_CLOCK = """
import sys, time
real, began = time.time, time.time()
def back():
    now = real()
    return now - 86_400 if now > began + 6 else now
time.time = back
time.time_ns = lambda: int(back() * 1e9)
sys.argv = sys.argv[1:]
import runpy
runpy.run_module("lm_jax.train", run_name="__main__", alter_sys=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=FAULTS, help="default: all of them")
    options = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        corpus = commands.write_corpus(folder / "corpus")
        whole = folder / "whole"
        train(*_flags(corpus), f"--workdir={whole}", env=environment())
        for name in [options.fault] if options.fault else FAULTS:
            began = time.monotonic()
            (folder / name).mkdir()
            outcome = FAULTS[name](folder / name, corpus, whole)
            wrong += not outcome.startswith("the same")
            print(f"{name:10} {outcome}", flush=True)
            seconds = round(time.monotonic() - began, 1)
            print(json.dumps({"fault": name, "outcome": outcome, "seconds": seconds}), flush=True)
    sys.exit(bool(wrong))


def _flags(corpus: pathlib.Path) -> list[str]:
    return tiny(
        corpus,
        training__steps=STEPS,
        training__sample_every=50,
        training__sample_tokens=4,
        checkpoint__every=20,
        checkpoint__keep=3,
        logging__tensorboard=True,
    )


@contextlib.contextmanager
def disk(folder: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
    """A small disk of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def _lived(
    workdir: pathlib.Path,
    corpus: pathlib.Path,
    whole: pathlib.Path,
    begin: Callable[[], None],
    end: Callable[[], None],
    *,
    told: str,
) -> str:
    """A run through a fault that begins once something is saved and ends a while later."""
    said = workdir.parent.with_suffix(".said")
    with open(said, "w") as output:
        flags = [*_flags(corpus), f"--workdir={workdir}"]
        process = commands.start("train", *flags, env=environment(), output=output)
    try:
        _until(process, lambda: _saved(workdir) >= 60)
        before = _saved(workdir)
        begin()
        _until(process, lambda: told in said.read_text())
        now = _saved(workdir)
        end()
        code = process.wait(timeout=300)
    finally:
        process.kill()
    if code:
        return f"ended with {code}: {said.read_text()[-2000:]}"
    if before > now != -1:
        return f"lost the checkpoint of step {before}"
    return "the same result, and told" if _same(whole, workdir) else "another result"


def _until(process: subprocess.Popen, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not done():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.args
        time.sleep(0.01)


def _saved(workdir: pathlib.Path) -> int:
    folder = workdir / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=-1)


def _same(whole: pathlib.Path, workdir: pathlib.Path, *, logged: bool = False) -> bool:
    expected, found = stored_arrays(whole, STEPS), stored_arrays(workdir, STEPS)
    same = all(np.array_equal(x, found[name]) for name, x in expected.items())
    return same and (not logged or losses(whole) == losses(workdir))


def _full(folder, corpus, whole) -> str:
    with disk(folder, "8m") as root:

        def fill() -> None:
            with contextlib.suppress(OSError), open(root / "filler", "wb", buffering=0) as f:
                while True:
                    f.write(bytes(1 << 12))

        return _lived(root / "run", corpus, whole, fill, (root / "filler").unlink,
                      told="could not be saved")  # fmt: skip


def _small(folder, corpus, whole) -> str:
    """Ends with an error, and what was saved before is there."""
    with disk(folder, "600k") as root:
        workdir = root / "run"
        code, _, err = commands.run("train", *_flags(corpus), f"--workdir={workdir}",
                                    env=environment())  # fmt: skip
        if code != 1 or "could not be saved" not in err or "Traceback" in err:
            return f"ended with {code}: {err[-2000:]}"
        newest = _saved(workdir)
        shutil.copytree(workdir, folder.parent / "moved")
    train(*_flags(corpus), f"--workdir={folder.parent / 'moved'}", env=environment())
    same = _same(whole, folder.parent / "moved")
    return f"the same result, after an error, from step {newest}" if same else "another result"


def _read_only(folder, corpus, whole) -> str:
    with disk(folder, "32m") as root:

        def begin() -> None:
            checkpoints = root / "run" / "checkpoints"
            subprocess.run(["mount", "--bind", checkpoints, checkpoints], check=True)
            subprocess.run(["mount", "-o", "remount,ro,bind", checkpoints], check=True)

        def end() -> None:
            subprocess.run(["umount", "-l", root / "run" / "checkpoints"], check=True)

        return _lived(root / "run", corpus, whole, begin, end, told="could not be saved")


def _removed(folder, corpus, whole) -> str:
    workdir = folder / "run"

    def remove() -> None:
        aside = folder / "aside"
        os.rename(workdir, aside)  # all at once
        shutil.rmtree(aside)

    return _lived(workdir, corpus, whole, remove, lambda: None, told="had vanished")


def _no_rights(folder, corpus, whole) -> str:
    workdir = folder / "run"

    def attribute(sign: str) -> Callable[[], None]:
        # What root may not write to either.
        return lambda: (
            subprocess.run(["chattr", f"{sign}i", workdir / "checkpoints"], check=True) and None
        )

    return _lived(workdir, corpus, whole, attribute("+"), attribute("-"),
                  told="could not be saved")  # fmt: skip


def _clock(folder, corpus, whole) -> str:
    command = [sys.executable, "-c", _CLOCK, "lm_jax.train", *_flags(corpus)]
    done = subprocess.run([*command, f"--workdir={folder / 'run'}"], env=environment(),
                          cwd=commands.ROOT, capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        return f"ended with {done.returncode}: {done.stderr[-2000:]}"
    return "the same result" if _same(whole, folder / "run", logged=True) else "another result"


FAULTS = {
    "full": _full,
    "small": _small,
    "read-only": _read_only,
    "removed": _removed,
    "no rights": _no_rights,
    "clock": _clock,
}


if __name__ == "__main__":
    main()
