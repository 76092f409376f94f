"""Saving and restoring a run's state against `dd` on the same disk, and what a save costs training.

    python tests/benchmarks/saving.py --folder=/disk/to/measure

For Linux. The state is that of GPT-2 124M with AdamW, 1.5 GB, unless `--layers`, `--width` and
`--vocab_size` say otherwise. Prints a table of medians and a JSON line: the rates of a save to its
end on the disk and of a restore with nothing of it in the page cache, `dd`'s for the same bytes
(fdatasync; a file out of the cache), and how much longer steps beside a save take than as many
without.

Before each of them, `dd`'s included, a file of that size is written and removed, so that all find
as much memory that is free and was used before: where a virtual machine has to ask its host for
memory, that takes up to four times as long as what is measured. `dd` copies with one thread, and
several may write faster.

After the last round, and not timed: the most memory that a save and a restore need beyond what was
held before, as a multiple of the state; a restore's own state counts.

Seen on two CPU cores, with --steps=1, in three runs: 1035, 930 and 915 MB/s saved where `dd` wrote
822, 1341 and 958; 799, 725 and 803 MB/s restored where it read 1678, 1172 and 1090; 0.3 s until a
step may follow, most of which the sums take, and 2.5 to 3.4 s more for a step of 5 to 6 s. Of
memory, a save took no more than steps did before it, and a restore 1.29 to 1.37 times the state.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import resident  # noqa: E402
import train_step  # noqa: E402

from lm_jax import runtime  # noqa: E402
from lm_jax.config import (  # noqa: E402
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    TrainingConfig,
)
from lm_jax.training.checkpoint import Checkpoints  # noqa: E402
from lm_jax.validation import validate  # noqa: E402


def timed(action: Callable[[], object]) -> float:
    """Seconds."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def dd(*arguments: str) -> float:
    """Seconds."""
    command = ["dd", "bs=4M", "status=none", *arguments]
    return timed(lambda: subprocess.run(command, check=True))


def write(file: pathlib.Path, size: int) -> float:
    """Seconds until zeros are on the disk."""
    return dd("if=/dev/zero", f"of={file}", f"count={size >> 22}", "conv=fdatasync")


def recycle(folder: pathlib.Path, size: int) -> None:
    """Leaves the pages of a file that is removed again to whoever writes next. A virtual machine
    may have to ask its host for others, and then waits for each: all that is written is to have
    them alike."""
    file = folder / "recycled"
    write(file, size)
    file.unlink()


def forget(folder: pathlib.Path) -> None:
    """Takes files out of the page cache."""
    for file in folder.rglob("*") if folder.is_dir() else [folder]:
        if file.is_file():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="where to write: made, and removed after")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=50304)
    parser.add_argument("--steps", type=int, default=4, help="beside a save")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    resident.check(parser)
    folder = pathlib.Path(flags.folder)
    if folder.exists():
        parser.error(f"--folder: '{folder}' is there already: name one to be made")
    folder.mkdir(parents=True)
    runtime.configure()
    config = validate(
        Config(
            model=ModelConfig(
                layers=flags.layers,
                width=flags.width,
                heads=flags.width // 64,
                vocab_size=flags.vocab_size,
                max_length=256,
            ),
            data=DataConfig(sources=("none",), length=256, batch_size=2),
            training=TrainingConfig(steps=10**6),
        )
    )
    mesh, step, update, state, batch = train_step.begin(config, np.ones((2, 257), np.int32))
    seen: dict[str, list[float]] = {
        name: [] for name in ("save", "restore", "dd write", "dd read", "stall", "step", "extra")
    }
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(step.init)
        size = sum(x.nbytes for x in jax.tree.leaves(state))

        def steps(count: int) -> None:
            nonlocal state
            for _ in range(count):
                state, _ = update(state, batch)
            jax.block_until_ready(state)

        steps(2)
        for i in range(flags.rounds):
            run, file = folder / f"run{i}", folder / "dd"
            recycle(folder, size)
            seen["dd write"].append(write(file, size))
            forget(file)
            seen["dd read"].append(dd(f"if={file}", "of=/dev/null"))
            file.unlink()
            alone = timed(lambda: steps(flags.steps))
            with Checkpoints(str(run), CheckpointConfig()) as checkpoints:

                def save(step: int, checkpoints: Checkpoints = checkpoints) -> None:
                    checkpoints.save(step, state, {})
                    checkpoints.wait()
                    os.sync()

                def restore(checkpoints: Checkpoints = checkpoints) -> None:
                    got, _ = checkpoints.restore(2, abstract, mesh)
                    jax.block_until_ready(got)

                recycle(folder, size)
                seen["save"].append(timed(lambda: save(1)))
                begun = time.perf_counter()
                seen["stall"].append(timed(lambda: checkpoints.save(2, state, {})))
                steps(flags.steps)
                checkpoints.wait()
                seen["extra"].append(time.perf_counter() - begun - alone)
                seen["step"].append(alone / flags.steps)
                forget(run)
                recycle(folder, size)
                seen["restore"].append(timed(restore))
                if i == flags.rounds - 1:  # not timed: memory that is kept for later is given up
                    needs = [resident.measure(lambda: save(3))[1], resident.measure(restore)[1]]
            shutil.rmtree(run)
    shutil.rmtree(folder)

    medians = {name: statistics.median(each) for name, each in seen.items()}
    print(f"state: {size / 2**20:,.0f} MiB")
    for name in ("dd write", "save", "dd read", "restore"):
        print(f"{name:<9} {medians[name]:>7.2f} s {size / medians[name] / 1e6:>8.0f} MB/s")
    for name, what in (
        ("step", "a step"),
        ("stall", "until a step may follow"),
        ("extra", f"a save beside {flags.steps} steps, more than the steps alone"),
    ):
        print(f"{medians[name]:>7.2f} s  {what}")
    result = {
        "bytes": size,
        **{name: round(x, 3) for name, x in medians.items()},
        "save_share": round(medians["dd write"] / medians["save"], 3),
        "restore_share": round(medians["dd read"] / medians["restore"], 3),
        "memory": [round(need / size, 2) for need in needs],
    }
    print(f"memory of a save and of a restore: {result['memory']} times the state")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
