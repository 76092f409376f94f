"""What large models would need and do on TPU slices: the README's table, compiled anew.

    python tests/benchmarks/plans.py [--only=TEXT] [--output=FILE.jsonl]

Needs the `plan` extra, and no TPU. Each row is one run of `lm_jax.plan`, half a minute to a few
minutes on two CPU cores and up to some GB of memory. With --only, the rows whose model or topology
holds TEXT. --output keeps each row's JSON; rows that are already there are not run again.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys

GIB = 2**30
LLAMA = "configs/llama.py:llama3_"
KEEP = "model.remat=attention"

# model, recipe, topology, slices, flags: the mesh and the batch, without '--config.'.
ROWS = [
    ("GPT-2 124M", "configs/gpt2.py:124m", "v5e:2x2", 1, ""),
    ("GPT-2 124M", "configs/gpt2.py:124m", "v6e:2x2", 1, ""),
    (
        "Llama 3 8B",
        LLAMA + "8b",
        "v5p:4x4x4",
        1,
        "mesh.data=4 mesh.fsdp=16 data.batch_size=64 " + KEEP,
    ),
    (
        "Llama 3 8B",
        LLAMA + "8b",
        "v5e:16x16",
        1,
        "mesh.data=8 mesh.fsdp=32 data.batch_size=256 " + KEEP,
    ),
    (
        "Llama 3 8B",
        LLAMA + "8b",
        "v6e:16x16",
        1,
        "mesh.data=8 mesh.fsdp=32 data.batch_size=512 " + KEEP,
    ),
    (
        "Llama 3 8B",
        LLAMA + "8b",
        "v5e:16x16",
        2,
        "mesh.data=16 mesh.fsdp=32 data.batch_size=512 " + KEEP,
    ),
    (
        "Llama 3 70B",
        LLAMA + "70b",
        "v6e:16x16",
        1,
        "mesh.fsdp=64 mesh.tensor=4 data.batch_size=256",
    ),
    (
        "Llama 3 70B",
        LLAMA + "70b",
        "v5p:8x8x16",
        1,
        "mesh.data=4 mesh.fsdp=32 mesh.tensor=8 data.batch_size=512 " + KEEP,
    ),
    (
        "Llama 3 405B",
        LLAMA + "405b",
        "v5p:16x16x16",
        1,
        "mesh.data=4 mesh.fsdp=128 mesh.tensor=8 data.batch_size=1024",
    ),
    (
        "GPT-3 175B",
        "configs/gpt3.py:175b",
        "v5p:16x16x16",
        1,
        "mesh.data=2 mesh.fsdp=64 mesh.tensor=32 training.accumulation=2",
    ),
    (
        "Mixtral 8x7B",
        "configs/mixtral.py:8x7b",
        "v5p:8x8x8",
        1,
        "mesh.data=1 mesh.fsdp=64 mesh.expert=8 data.batch_size=512",
    ),
]
HEAD = ("model", "slice", "mesh and batch", "GiB a chip", "collectives beside computation",
        "step, s", "MFU", "without kernels", "compiled in")  # fmt: skip


def command(recipe: str, topology: str, slices: int, flags: str) -> list[str]:
    out = ["-m", "lm_jax.plan", f"--config={recipe}", f"--topology={topology}"]
    out += [f"--slices={slices}"] * (slices > 1)
    return out + [f"--config.{flag}" for flag in flags.split()]


def cells(row: tuple, got: dict) -> tuple[str, ...]:
    model, _, topology, slices, _ = row
    axes = ", ".join(f"{k} {n}" for k, n in got["mesh"].items() if n > 1)
    parts = f" in {got['accumulation']}" if got["accumulation"] > 1 else ""
    batch = f"{axes}; {got['batch_size']} x {got['length']}{parts}"
    where = f"{slices} x {topology}" if slices > 1 else topology
    seconds = f"{got['compile_seconds']:.0f} s"
    if not got["fits"]:
        return model, where, batch, "does not fit", "", "", "", "", seconds
    total, estimate = got["memory_bytes"]["total"] / GIB, got["estimate"]
    beside = sum(c["asynchronous"] for c in got["collectives"])
    count = sum(c["a_step"] for c in got["collectives"])
    low, high = estimate["mfu"]
    return (
        model,
        where,
        batch,
        f"{total:.1f} of {got['hbm_bytes'] / GIB:.1f}",
        f"{beside} of {count}",
        f"{estimate['fast']:.2f} to {estimate['slow']:.2f}",
        f"{low:.0%} to {high:.0%}",
        _without_kernels(estimate),
        seconds,
    )


def _without_kernels(estimate: dict) -> str:
    """MFU by the compiler's cycles alone; it says nothing where kernels do most of the work."""
    if estimate["kernels"] > estimate["computing"] / 2:
        return "-"
    return f"{estimate['model_flops'] / (estimate['computing'] * estimate['peak']):.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose model or topology holds this text")
    parser.add_argument("--output", type=pathlib.Path, help="a line of JSON for each row")
    args = parser.parse_args()
    root = pathlib.Path(__file__).parents[2]
    done = {}
    if args.output and args.output.exists():
        done = {r["command"]: r for r in map(json.loads, args.output.read_text().splitlines())}
    print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|", flush=True)
    for row in ROWS:
        if args.only not in row[0] and args.only not in row[2]:
            continue
        line = command(*row[1:])
        said = "python " + shlex.join(line)
        if said not in done:
            run = subprocess.run(
                [sys.executable, *line, "--json"], cwd=root, capture_output=True, text=True
            )
            if not run.stdout:
                sys.exit(f"{said}\n{run.stderr}")
            done[said] = json.loads(run.stdout) | {"command": said}
            if args.output:
                with args.output.open("a") as f:
                    f.write(json.dumps(done[said]) + "\n")
        print("| " + " | ".join(cells(row, done[said])) + " |", flush=True)


if __name__ == "__main__":
    main()
