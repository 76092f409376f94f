"""What of a train step are its products with weights, each by itself, in XLA and in PyTorch: below
their sum no step can come that computes them by these libraries.

    python tests/benchmarks/products.py --shape=gpt

Needs torch. For CPUs, in float32. Shapes are those of `training.py`; each weight has three
products, forward, by the activations' gradient and by its own, over all tokens of the batch (a run
takes the head's in chunks). The libraries take turns. Prints a table of medians and a JSON line.

Seen on two CPU cores, in milliseconds:

| shape | products in XLA | in PyTorch |
|---|---|---|
| nanogpt_cpu | 48 | 28 |
| gpt | 1544 | 1328 |
| gpt2_124m_short | 5506 | 5208 |
"""

import argparse
import json
import statistics
import time
from collections import Counter
from typing import Any

import contenders
import numpy as np
import training

LIBRARIES = ("xla", "torch")
Product = tuple[str, int, int, int]  # how it is written, and M, K, N


def products(shape: str) -> Counter[Product]:
    """Those of a step, [M, K] x [K, N], and how often."""
    config = training.config_of(training.SHAPES[shape], training.ON_CPU)
    c, tokens = config.model, config.data.batch_size * config.data.length
    inner, mlp = c.heads * c.head_width, 2 if c.gated_mlp else 1
    weights = Counter({(c.width, c.vocab_size): 1})
    for weight, count in (
        ((c.width, inner), 1),
        ((c.width, c.kv_heads * c.head_width), 2),
        ((inner, c.width), 1),
        ((c.width, c.mlp_width), mlp),
        ((c.mlp_width, c.width), 1),
    ):
        weights[weight] += count * c.layers
    found: Counter[Product] = Counter()
    for (inputs, outputs), count in weights.items():
        found["x w", tokens, inputs, outputs] += count
        found["dy w'", tokens, outputs, inputs] += count
        found["x' dy", inputs, tokens, outputs] += count
    return found


def measured(library: str, shape: str):
    """A function that takes each product `times` times, and gives the median seconds of each."""
    rng, calls = np.random.default_rng(0), []
    for how, m, k, n in products(shape):
        a = rng.standard_normal((k, m) if how == "x' dy" else (m, k), np.float32)
        b = rng.standard_normal((n, k) if how == "dy w'" else (k, n), np.float32)
        if library == "torch":
            import torch

            a, b = torch.from_numpy(a), torch.from_numpy(b)
            a, b = a.T if how == "x' dy" else a, b.T if how == "dy w'" else b
            calls.append(lambda a=a, b=b: torch.mm(a, b))
        else:
            import jax
            import jax.numpy as jnp

            form = {"x w": "mk,kn->mn", "dy w'": "mk,nk->mn", "x' dy": "km,kn->mn"}[how]
            compiled = jax.jit(lambda a, b, form=form: jnp.einsum(form, a, b))
            a, b = jnp.asarray(a), jnp.asarray(b)
            calls.append(lambda a=a, b=b, f=compiled: f(a, b).block_until_ready())

    def take(times: int) -> dict[str, Any]:
        seconds = []
        for call in calls:
            call()
            each = []
            for _ in range(times):
                begun = time.perf_counter()
                call()
                each.append(time.perf_counter() - begun)
            seconds.append(statistics.median(each))
        return {"seconds": seconds}

    return take


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", required=True, choices=training.SHAPES)
    parser.add_argument("--times", type=int, default=10, help="each product in a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each library")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.contender:
        contenders.compete({}, measured(flags.contender, flags.shape))
        return
    processes = {name: contenders.begin(name, "cpu") for name in LIBRARIES}
    for process in processes.values():
        contenders.told(process)
    turns: dict[str, list[list[float]]] = {name: [] for name in LIBRARIES}
    for _ in range(flags.rounds):
        for name, process in processes.items():
            turns[name].append(contenders.turn(process, flags.times)["seconds"])
    for process in processes.values():
        contenders.end(process)

    medians = {name: np.median(each, axis=0) for name, each in turns.items()}
    found = products(flags.shape)
    print(f"{'product':<7} {'M':>6} {'K':>6} {'N':>6} {'times':>5}  GFLOP/s of xla, torch")
    flops = 0.0
    for i, ((how, m, k, n), count) in enumerate(found.items()):
        flops += 2 * m * k * n * count
        rates = [2 * m * k * n / medians[name][i] / 1e9 for name in LIBRARIES]
        print(f"{how:<7} {m:>6} {k:>6} {n:>6} {count:>5}  {rates[0]:>8.0f} {rates[1]:>12.0f}")
    counts = np.array(list(found.values()))
    result: dict[str, Any] = {"shape": flags.shape, "gflop": round(flops / 1e9, 6)}
    for name in LIBRARIES:
        result[name] = round(1000 * float(counts @ medians[name]), 2)
        print(f"all of a step by {name}: {result[name]:,.1f} ms")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
