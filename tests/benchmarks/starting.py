"""How long it takes to start: the package, the help of each command, and a run to its first step.

    python tests/benchmarks/starting.py

A run is that of `configs/quickstart.py` (other flags are given to `lm_jax.train`), in a new folder
each time: first with an empty compilation cache, then with what that start has left there. Times
are of processes from their start on, medians in seconds. `tracing` and `compiling` are parts of
what stands above them, and `compiling` is reading the cache where that is not empty. Prints tables
and a JSON line.

Seen on two CPU cores: 0.05 s for the package, 0.2 to 0.35 s for the help of a command; 23.9 s to
the first step, and 8.6 s with a cache, of which 2.8 s are tracing and 2.3 s imports.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]

COMMANDS = ("train", "generate", "evaluate", "tokenize", "convert", "embed", "plan", "inspect")
COMMANDS += ("serve",)
TRACING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration")
COMPILING = ("backend_compile_duration",)


def seconds_of(*command: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


class Durations:
    """What jax tells of its own work, by the ends of the names it has for it. Where one piece of
    work is a part of another one, it counts once."""

    def __init__(self):
        self._spans: dict[str, list[tuple[float, float]]] = {}

    def listen(self, name: str, seconds: float, **_: Any) -> None:
        end = time.perf_counter()
        self._spans.setdefault(name.rpartition("/")[2], []).append((end - seconds, end))

    def total(self, *names: str) -> float:
        total = last = 0.0
        for start, end in sorted(span for name in names for span in self._spans.get(name, ())):
            total += max(0.0, end - max(start, last))
            last = max(last, end)
        return total


def run_to_first_step(begun: float, flags: list[str]) -> None:
    """Trains, prints what took how long up to the end of the first step, and ends.

    Args:
      begun: when this process was started, by `time.time`.
    """
    sys.argv = ["train", *flags]
    import lm_jax.train
    from lm_jax import cli

    with cli.importing():  # as the command does
        import jax

        from lm_jax.training import keeping, loop, occasions

    spent = {"imports": time.time() - begun}
    durations = Durations()
    jax.monitoring.register_event_duration_secs_listener(durations.listen)

    def timed(owner: Any, name: str, phase: str) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent[phase] = spent.get(phase, 0.0) + time.perf_counter() - start

        setattr(owner, name, outer)

    timed(loop.workdir_lib, "obtain_tokenizer", "tokenizer")
    timed(loop._Run, "_next_batch", "data")
    timed(keeping.Keeper, "begin", "init")
    timed(occasions.Occasions, "sample", "sample")
    make = loop.jit_train_step

    def jit_train_step(*args: Any) -> Any:
        step = make(*args)

        def first(*args: Any) -> None:
            start = time.perf_counter()
            jax.block_until_ready(step(*args))
            spent["first step"] = time.perf_counter() - start
            total = time.time() - begun
            spent["other"] = total - sum(spent.values())
            spent["total"] = total
            spent["tracing"] = durations.total(*TRACING)
            spent["compiling"] = durations.total(*COMPILING)
            print(json.dumps(spent), flush=True)
            os._exit(0)

        return first

    loop.jit_train_step = jit_train_step
    cli.run(lm_jax.train.main)


def start(cache: str, flags: list[str]) -> dict[str, float]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    with tempfile.TemporaryDirectory() as folder:
        program = [sys.executable, __file__, f"--begun={time.time()}"]
        done = subprocess.run(
            [*program, *flags, f"--workdir={folder}/run"],
            cwd=ROOT,
            env=env | {"XDG_CACHE_HOME": cache},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def medians(seen: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: round(statistics.median(one.get(name, 0.0) for one in seen), 3) for name in seen[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--commands", default=",".join(COMMANDS), help="whose help is asked for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--begun", type=float, help=argparse.SUPPRESS)
    flags, rest = parser.parse_known_args()
    if not any(flag.startswith("--config=") for flag in rest):
        rest = ["--config=configs/quickstart.py", *rest]
    if flags.begun:
        run_to_first_step(flags.begun, rest)
    begun: dict[str, list[float]] = {}
    for _ in range(flags.rounds):
        begun.setdefault("import lm_jax", []).append(seconds_of("-c", "import lm_jax"))
        for name in flags.commands.split(","):
            help_of = seconds_of("-m", f"lm_jax.{name}", "--help")
            begun.setdefault(f"{name} --help", []).append(help_of)
    starts: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    for _ in range(flags.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for each in starts.values():
                each.append(start(cache, rest))

    result: dict[str, Any] = {name: round(statistics.median(s), 3) for name, s in begun.items()}
    for name, seconds in result.items():
        print(f"{name:<18} {seconds:>7.2f}")
    first, second = (medians(each) for each in starts.values())
    print(f"{'to the first step':<18} {'first':>7} {'second':>7}")
    for name in first:
        print(f"{name:<18} {first[name]:>7.2f} {second[name]:>7.2f}")
    ratios = [b["total"] / a["total"] for a, b in zip(*starts.values())]
    ratio = round(statistics.median(ratios), 3)
    print(f"the second start takes {ratio:.2f} of the first one's time")
    print(json.dumps(result | {"first": first, "second": second, "ratio": ratio}))


if __name__ == "__main__":
    main()
