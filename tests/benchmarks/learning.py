"""What each part of a recipe is worth: validation losses of the variant `cpu_muon` of
configs/shakespeare_char.py with half of the steps, with one thing changed at a time, beside
nanoGPT's recipe with all of them.

    python tests/benchmarks/learning.py --text=input.txt

    python tests/benchmarks/learning.py --text=input.txt --table=dtypes --steps=500

The second is the same recipe with products of other numbers, which a CPU computes as others: losses
alone are to be compared.

The parameters, the batches and the seed are the same for all, but for what a row says. Prints a
table and a JSON line: the loss over the whole validation split after the last step, and the first
step at which it was seen to be 1.88 or less, which is what nanoGPT publishes for its 2000 steps.

Seen on CPUs, in float32:

| changed | steps | loss | 1.88 at step |
|---|---|---|---|
| nanoGPT's recipe, all steps | 2000 | 1.9123 | - |
| nanoGPT's recipe | 1000 | 2.1215 | - |
| and weights of 1 / sqrt(width) at the start | 1000 | 1.9537 | - |
| this recipe | 1000 | 1.6606 | 500 |
| AdamW for Muon | 1000 | 1.7833 | 650 |
| learned positions for RoPE | 1000 | 1.7102 | 600 |
| no QK-norm | 1000 | 1.6696 | 500 |
| weights of 0.02 at the start | 1000 | 1.6594 | 500 |
| WSD for cosine | 1000 | 1.7035 | 650 |
| squared ReLU for GELU | 1000 | 1.6697 | 500 |
| RMS norm for layer norm | 1000 | 1.6617 | 450 |
| half of the steps again | 500 | 1.7945 | 400 |

With --table=dtypes --steps=200, the losses at steps 50, 100, 150 and 200:

| products of | 50 | 100 | 150 | 200 |
|---|---|---|---|---|
| float32 | 2.6099 | 2.2664 | 2.1112 | 2.0071 |
| bfloat16 | 2.6101 | 2.2660 | 2.1102 | 2.0069 |
| bfloat16, in blocks 8-bit floats | 2.6129 | 2.2678 | 2.1144 | 2.0066 |
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent.parent
RECIPE = "configs/shakespeare_char.py"
PUBLISHED = 1.88  # nanoGPT's README.md
WHOLE = 2000  # steps of its CPU recipe

# What is changed -> the variant of the recipe, and settings.
RUNS: dict[str, tuple[str, dict[str, object]]] = {
    "nanoGPT's recipe, all steps": ("cpu", {"model.init_std": 0.02, "training.steps": WHOLE}),
    "nanoGPT's recipe": ("cpu", {"model.init_std": 0.02}),
    "and weights of 1 / sqrt(width) at the start": ("cpu", {}),
    "this recipe": ("cpu_muon", {}),
    "AdamW for Muon (Jordan et al. 2024)": ("cpu_muon", {"optimizer.name": "adamw"}),
    "learned positions for RoPE (Su et al. 2021)": ("cpu_muon", {"model.position": "learned"}),
    "no QK-norm (Henry et al. 2020)": ("cpu_muon", {"model.qk_norm": False}),
    "weights of 0.02 at the start": ("cpu_muon", {"model.init_std": 0.02}),
    "WSD for cosine (Hu et al. 2024)": ("cpu_muon", {"optimizer.schedule": "wsd"}),
    "squared ReLU for GELU (So et al. 2021)": (
        "cpu_muon",
        {"model.activation": "relu_squared"},
    ),
    "RMS norm for layer norm (Zhang and Sennrich 2019)": ("cpu_muon", {"model.norm": "rmsnorm"}),
    "half of the steps again": ("cpu_muon", {"training.steps": WHOLE // 4}),
}
# What products are of, as above.
DTYPES: dict[str, tuple[str, dict[str, object]]] = {
    "float32": ("cpu_muon", {}),
    "bfloat16": ("cpu_muon", {"model.dtype": "bfloat16"}),
    "bfloat16, in blocks 8-bit floats": (
        "cpu_muon",
        {"model.dtype": "bfloat16", "model.float8": True},
    ),
}
TABLES = {"recipe": RUNS, "dtypes": DTYPES}


def run(variant: str, settings: dict[str, object], workdir: str) -> list[tuple[int, float]]:
    """The validation losses of a run, by step."""
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = ["-m", "lm_jax.train", f"--config={RECIPE}:{variant}", f"--workdir={workdir}"]
    done = subprocess.run(
        [sys.executable, *command, *flags], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    with open(pathlib.Path(workdir) / "metrics.jsonl") as f:
        lines = [json.loads(line) for line in f]
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "validation"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", required=True, help="tinyshakespeare, a file")
    parser.add_argument("--table", default="recipe", choices=TABLES, help="what is changed")
    parser.add_argument("--steps", type=int, default=WHOLE // 2, help="of runs that name none")
    parser.add_argument("--every", type=int, default=50, help="steps between two validations")
    parser.add_argument("--only", type=int, nargs="*", help="rows of the table, from 0 on")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE, for each run")
    flags = parser.parse_args()
    common = dict(setting.split("=", 1) for setting in flags.set)
    table = TABLES[flags.table]
    names = list(table)
    rows = []
    print(f"{'changed':<51} {'steps':>5} {'loss':>7}  {PUBLISHED} at step", flush=True)
    for index in range(len(names)) if flags.only is None else flags.only:
        variant, changed = table[names[index]]
        settings = {
            "data.sources": os.path.abspath(flags.text),
            "training.steps": flags.steps,
            "training.evaluate_every": flags.every,
            "training.sample_tokens": 0,
            "checkpoint.every": 0,
            **changed,
            **common,
        }
        with tempfile.TemporaryDirectory() as workdir:
            losses = run(variant, settings, workdir)
        steps, loss = losses[-1]
        reached = next((step for step, loss in losses if loss <= PUBLISHED), None)
        print(f"{names[index]:<51} {steps:>5} {loss:>7.4f}  {reached or '-'}", flush=True)
        rows.append({"changed": names[index], "steps": steps, "loss": loss, "reached": reached})
        rows[-1]["losses"] = losses
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
