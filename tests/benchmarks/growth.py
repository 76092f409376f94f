"""How the cost of a train step grows: with the model's width and depth, with the length and the
number of rows, and with simulated devices of one CPU; and what compiling it takes.

    python tests/benchmarks/growth.py

One thing is changed at a time, from a small GPT in float32. Each row is a process of its own.
Simulated devices share the cores: with twice as many and the same batch, a step would take as long
as before, and what it takes beyond that is what sharing the batch out costs. Prints a table and a
JSON line; times are medians.

Seen on two CPU cores, milliseconds a step and seconds to compile:

| width | 128 | 256 | 512 | 1024 | |
|---|---|---|---|---|---|
| | 103, 5.3 | 300, 6.7 | 839, 6.9 | 3049, 6.4 | |

| layers | 2 | 4 | 8 | 16 | 32 |
|---|---|---|---|---|---|
| by a scan | 162, 7.1 | 300, 6.7 | 545, 7.0 | 1032, 6.2 | 2661, 7.2 |
| unrolled | 133, 7.0 | 239, 9.1 | 493, 10.3 | 1004, 19.0 | 2493, 47.4 |

| length | 64 | 128 | 256 | 512 | 1024 |
|---|---|---|---|---|---|
| | 153, 6.6 | 300, 6.7 | 669, 7.8 | 1147, 8.0 | 3218, 8.9 |

| rows | 4 | 8 | 16 | 32 | |
|---|---|---|---|---|---|
| | 169, 7.9 | 300, 6.7 | 535, 8.0 | 1061, 6.7 | |

| devices | 1 | 2 | 4 | 8 | |
|---|---|---|---|---|---|
| | 300, 6.7 | 326, 9.0 | 338, 8.4 | 578, 7.7 | |
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]

BASE = {"width": 256, "layers": 4, "length": 128, "rows": 8, "devices": 1}
GROWTH = {
    "width": (128, 256, 512, 1024),
    "layers": (2, 4, 8, 16, 32),
    "length": (64, 128, 256, 512, 1024),
    "rows": (4, 8, 16, 32),
    "devices": (1, 2, 4, 8),
}
TOY = {"width": 16, "layers": 1, "length": 8, "rows": 8, "devices": 1}


@dataclasses.dataclass(frozen=True)
class Point:
    width: int
    layers: int
    length: int
    rows: int
    devices: int
    scan: bool = True  # over the layers


def points(base: dict[str, int], growth: dict[str, tuple[int, ...]]) -> list[tuple[str, Point]]:
    """What is measured, and what each is to show."""
    found = [
        (name, Point(**{**base, name: size})) for name, sizes in growth.items() for size in sizes
    ]
    unrolled = [
        ("layers, unrolled", Point(**{**base, "layers": size}, scan=False))
        for size in growth["layers"]
    ]
    return found + unrolled


def measure(point: Point, steps: int) -> dict[str, float]:
    """Seconds that compiling a step takes, tracing included, and milliseconds of a step."""
    from lm_jax import runtime

    runtime.configure()

    import jax
    import numpy as np
    import train_step

    from lm_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
    from lm_jax.validation import validate

    config = validate(
        Config(
            model=ModelConfig(
                vocab_size=1024,
                width=point.width,
                layers=point.layers,
                heads=max(point.width // 64, 1),
                max_length=point.length,
                dtype="float32",
                scan_layers=point.scan,
            ),
            data=DataConfig(sources=("none",), length=point.length, batch_size=point.rows),
            optimizer=OptimizerConfig(warmup_steps=0, schedule="constant"),
            training=TrainingConfig(steps=10**6),
        )
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1024, (point.rows, point.length + 1)).astype(np.int32)
    mesh, _, update, state, batch = train_step.begin(config, tokens, point.devices)
    with jax.set_mesh(mesh):
        begun = time.perf_counter()
        compiled = update.lower(state, batch).compile()
        compile_s = time.perf_counter() - begun
        seconds = []
        for _ in range(steps + 2):
            begun = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, batch))
            seconds.append(time.perf_counter() - begun)
    return {"compile_s": compile_s, "step_ms": 1e3 * statistics.median(seconds[2:])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=9, help="to take the median of")
    parser.add_argument("--toy", action="store_true", help="a size that says nothing")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.point:
        print(json.dumps(measure(Point(**json.loads(flags.point)), flags.steps)))
        return
    if flags.toy:
        todo = points(TOY, {"layers": (1,), "devices": (1, 2)})
    else:
        todo = points(BASE, GROWTH)
    rows, known = [], {}
    print(f"{'':<17} {'size':>5} {'ms a step':>10} {'times':>6} {'compile, s':>11}")
    for name, point in todo:
        size = getattr(point, name.split(",")[0])
        if point not in known:
            flag = f"--xla_force_host_platform_device_count={point.devices}"
            env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
            env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
            own = ["--point", json.dumps(dataclasses.asdict(point)), f"--steps={flags.steps}"]
            done = subprocess.run(
                [sys.executable, __file__, *own], env=env, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(done.stderr)
            known[point] = json.loads(done.stdout.splitlines()[-1])
        found = known[point]
        first = next((row for row in rows if row["what"] == name), None)
        times = found["step_ms"] / first["step_ms"] if first else 1.0
        rows.append({"what": name, "size": size, "times": round(times, 2), **found})
        print(
            f"{name:<17} {size:>5} {found['step_ms']:>10.1f} {times:>6.2f}"
            f" {found['compile_s']:>11.2f}",
            flush=True,
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
