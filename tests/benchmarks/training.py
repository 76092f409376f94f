"""The train step against PyTorch's, eager and compiled: the same model, batch, clipping and AdamW,
side by side in one run.

    python tests/benchmarks/training.py --shape=gpt --rounds=5
    python tests/benchmarks/training.py --shape=gpt2_124m --device=cuda
    python tests/benchmarks/training.py --shape=llama_1b --device=cuda --float8

Needs torch. Each contender is a process of its own that compiles and warms up first; then they take
turns, `--steps` steps each, so that a machine whose speed drifts is the same for all. (On GPUs one
comes after the other, because each needs the memory.) Prints a table of medians and a JSON line.

Seen on two CPU cores, float32, in milliseconds a step:

| shape | lm_jax | PyTorch, eager | PyTorch, compiled |
|---|---|---|---|
| nanogpt_cpu | 66.8 | 65.0 | 64.4 |
| gpt, --rounds=3 | 1635 | 1783 | 1696 |
| gpt2_124m_short, --rounds=2 | 8457 | 8319 | 7484 |
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import contenders
import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]

from lm_jax.config import (  # noqa: E402
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

_PLAIN = {"qkv_bias": False, "out_bias": False, "mlp_bias": False, "norm_bias": False}
_LLAMA = {
    "norm": "rmsnorm",
    "position": "rope",
    "activation": "silu",
    "gated_mlp": True,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    rows: int
    length: int
    model: dict[str, Any]


SHAPES = {
    # For CPUs, in float32.
    "gpt": Shape(8, 256, {"layers": 6, "width": 384, "heads": 6, "vocab_size": 8192}),
    "gpt2_124m_short": Shape(4, 256, {"vocab_size": 50304}),
    "nanogpt_cpu": Shape(
        12, 64, {"layers": 4, "width": 128, "heads": 4, "vocab_size": 65, **_PLAIN}
    ),
    # For GPUs, in bfloat16.
    "gpt2_124m": Shape(32, 1024, {"vocab_size": 50304}),
    "gpt2_1.5b": Shape(
        8, 1024, {"layers": 48, "width": 1600, "heads": 25, "vocab_size": 50304, "remat": "dots"}
    ),
    "llama_1b": Shape(
        4,
        2048,
        {
            "layers": 16,
            "width": 2048,
            "heads": 32,
            "kv_heads": 8,
            "mlp_width": 8192,
            "vocab_size": 128256,
            "remat": "dots",
            **_LLAMA,
        },
    ),
    "toy": Shape(
        2, 16, {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "vocab_size": 64, **_LLAMA}
    ),
}
CONTENDERS = ("lm_jax", "eager", "compiled")
# A shape as it is, for other benchmarks.
ON_CPU = argparse.Namespace(length=None, rows=None, device="cpu", scan=False, float8=False)


def config_of(shape: Shape, flags: argparse.Namespace) -> Config:
    from lm_jax.validation import validate

    length = flags.length or shape.length
    here = {
        "max_length": length,
        "dtype": "float32" if flags.device == "cpu" else "bfloat16",
        "scan_layers": flags.scan,
        "float8": flags.float8,
    }
    return validate(
        Config(
            model=ModelConfig(**(here | shape.model)),
            data=DataConfig(sources=("none",), length=length, batch_size=flags.rows or shape.rows),
            optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=0, schedule="constant"),
            training=TrainingConfig(steps=10**6),
        )
    )


def ours(config: Config, tokens: np.ndarray):
    """A function of a number of steps -> the seconds of each, and the last loss."""
    from lm_jax import runtime

    runtime.configure()

    import jax
    import train_step

    from lm_jax.model import parameters as params_lib

    mesh, step, update, state, batch = train_step.begin(config, tokens)

    def run(steps: int) -> tuple[list[float], float]:
        nonlocal state
        seconds = []
        with jax.set_mesh(mesh):
            for _ in range(steps):
                begun = time.perf_counter()
                state, metrics = update(state, batch)
                loss = float(metrics["loss"])
                jax.block_until_ready(state)
                seconds.append(time.perf_counter() - begun)
        return seconds, loss

    def facts() -> dict[str, Any]:
        memory = jax.devices()[0].memory_stats() or {}
        return {
            "parameters": sum(x.size for x in params_lib.split(step.skeleton).values()),
            "peak_memory": memory.get("peak_bytes_in_use"),
            "device": jax.devices()[0].device_kind,
        }

    return run, facts


def theirs(config: Config, tokens: np.ndarray, *, compiled: bool, device: str):
    import torch
    from torch_model import Training

    training = Training(config.model, compiled=compiled, device=device)
    inputs, targets = training.batch(tokens)

    def run(steps: int) -> tuple[list[float], float]:
        seconds = []
        for _ in range(steps):
            begun = time.perf_counter()
            loss = training.step(inputs, targets)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        return seconds, loss

    def facts() -> dict[str, Any]:
        cuda = device == "cuda"
        return {
            "parameters": sum(p.numel() for p in training.model.parameters()),
            "peak_memory": torch.cuda.max_memory_allocated() if cuda else None,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
        }

    return run, facts


def work(name: str, flags: argparse.Namespace) -> None:
    """A contender: reads how many steps to take and answers with their times, until the end."""
    shape = SHAPES[flags.shape]
    config = config_of(shape, flags)
    rng = np.random.default_rng(0)
    size = config.data.batch_size, config.data.length + 1
    tokens = rng.integers(1, config.model.vocab_size, size).astype(np.int32)
    begun = time.perf_counter()
    if name == "lm_jax":
        run, facts = ours(config, tokens)
    else:
        run, facts = theirs(config, tokens, compiled=name == "compiled", device=flags.device)
    _, loss = run(1)
    first = {"loss": loss, "first_step": time.perf_counter() - begun}
    run(2)

    def take(steps: int) -> dict[str, Any]:
        seconds, _ = run(steps)
        told = facts() | {"seconds": seconds}
        # On CPUs, all that the process took.
        told["peak_memory"] = (
            told["peak_memory"] or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        return told

    contenders.compete(first, take)


def compare(flags: argparse.Namespace) -> dict[str, dict[str, Any]]:
    names = flags.contenders.split(",")
    found: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in names}

    def take(name: str, process: subprocess.Popen) -> None:
        told = contenders.turn(process, flags.steps)
        found[name]["seconds"] += told.pop("seconds")
        found[name] |= told

    groups = [names] if flags.device == "cpu" else [[name] for name in names]
    for group in groups:
        processes = {name: contenders.begin(name, flags.device) for name in group}
        for name, process in processes.items():  # one at a time: each compiles on all cores
            found[name] |= contenders.told(process)
        for _ in range(flags.rounds):
            for name, process in processes.items():
                take(name, process)
        for process in processes.values():
            contenders.end(process)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rows", type=int, help="of a batch; default: the shape's")
    parser.add_argument("--length", type=int, help="tokens a row; default: the shape's")
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--scan", action="store_true", help="run the layers by a scan")
    parser.add_argument("--float8", action="store_true", help="lm_jax's products: model.float8")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.contender:
        work(flags.contender, flags)
        return

    from lm_jax.model.flops import peak_flops, training_flops_per_token

    found, shape = compare(flags), SHAPES[flags.shape]
    config = config_of(shape, flags)
    tokens = config.data.batch_size * config.data.length
    flops = training_flops_per_token(config.model, config.data.length) * tokens
    result: dict[str, Any] = {
        "shape": flags.shape,
        "batch": [config.data.batch_size, config.data.length],
        "cores": os.cpu_count(),
    }
    print(f"{'':<10} {'ms a step':>10} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>6} {'GiB':>6} first")
    for name, told in found.items():
        told["milliseconds"] = round(1000 * statistics.median(told.pop("seconds")), 2)
        rate = 1000 / told["milliseconds"]
        told |= {"tokens_per_second": round(tokens * rate), "flops_per_second": flops * rate}
        peak = peak_flops(told["device"])
        told["mfu"] = None if math.isnan(peak) else flops * rate / peak
        mfu = "-" if told["mfu"] is None else f"{told['mfu']:.1%}"
        print(
            f"{name:<10} {told['milliseconds']:>10,.1f} {tokens * rate:>10,.0f}"
            f" {flops * rate / 1e12:>8.3f} {mfu:>6} {told['peak_memory'] / 2**30:>6.2f}"
            f" {told['first_step']:.1f} s"
        )
        result[name] = told
    for other in ("eager", "compiled"):
        if {"lm_jax", other} <= found.keys():
            ratio = found[other]["milliseconds"] / found["lm_jax"]["milliseconds"]
            result[f"times_{other}"] = round(ratio, 3)
            print(f"{ratio:.2f} times as fast as PyTorch, {other}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
