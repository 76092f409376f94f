"""The update rules once more, in float64 numpy, from their papers.

Each takes the parameters, a list of gradients (one dict a step), the config and the learning rate
of each step (Muon: two lists), and returns the parameters after all steps.
"""

import numpy as np

DECAYED = {"embedding", "position_embedding", "head"} | {
    *("query", "key", "value", "out", "up", "gate", "down")
}


def decay_of(config, name: str) -> float:
    return config.weight_decay if name.rpartition(".")[2] in DECAYED else 0.0


def clipped(gradients, limit: float):
    """All gradients scaled so that their joint norm is `limit` at most."""
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    return {k: g * min(1.0, limit / norm) if limit else g for k, g in gradients.items()}


def adamw(p, gradients, config, rates):
    """Loshchilov and Hutter 2019, algorithm 2, decay times the learning rate."""
    p, m, v = dict(p), dict.fromkeys(p, 0.0), dict.fromkeys(p, 0.0)
    for t, (g, rate) in enumerate(zip(gradients, rates), start=1):
        g = clipped(g, config.clip_norm)
        for k in p:
            m[k] = config.b1 * m[k] + (1 - config.b1) * g[k]
            v[k] = config.b2 * v[k] + (1 - config.b2) * g[k] ** 2
            step = m[k] / (1 - config.b1**t)
            step = step / (np.sqrt(v[k] / (1 - config.b2**t)) + config.epsilon)
            p[k] = p[k] - rate * (step + decay_of(config, k) * p[k])
    return p


def lion(p, gradients, config, rates):
    """Chen et al. 2023, algorithm 2."""
    p, m = dict(p), dict.fromkeys(p, 0.0)
    for g, rate in zip(gradients, rates):
        g = clipped(g, config.clip_norm)
        for k in p:
            step = np.sign(config.b1 * m[k] + (1 - config.b1) * g[k])
            p[k] = p[k] - rate * (step + decay_of(config, k) * p[k])
            m[k] = config.b2 * m[k] + (1 - config.b2) * g[k]
    return p


def adafactor(p, gradients, config, rates):
    """Shazeer and Stern 2018, algorithms 4 and 5, without momentum, with an absolute rate.

    The second moment is factored over the two longest axes where both have 32 places or more. Each
    layer of a stacked weight stands alone.
    """
    layers = {k: range(p[k].shape[0]) if k.startswith("blocks.") else (...,) for k in p}
    p, v = {k: x.copy() for k, x in p.items()}, {}
    for t, (g, rate) in enumerate(zip(gradients, rates), start=1):
        g, keep = clipped(g, config.clip_norm), 1 - t**-0.8
        for k, i in [(name, layer) for name in p for layer in layers[name]]:
            square = g[k][i] ** 2 + 1e-30
            *_, a, b = np.argsort(square.shape) if square.ndim > 1 else (0, 0)
            if square.ndim > 1 and square.shape[a] >= 32:
                rows, columns = v.get((k, i), (0.0, 0.0))
                rows = keep * rows + (1 - keep) * square.mean(b, keepdims=True)
                columns = keep * columns + (1 - keep) * square.mean(a, keepdims=True)
                v[k, i], second = (rows, columns), rows * columns / rows.mean(a, keepdims=True)
            else:
                second = v[k, i] = keep * v.get((k, i), 0.0) + (1 - keep) * square
            step = g[k][i] / np.sqrt(second)
            step = step / max(1.0, np.sqrt((step**2).mean()))
            p[k][i] = p[k][i] - rate * (step + decay_of(config, k) * p[k][i])
    return p


# How a layer's weight is a matrix [from, to]: how many of its axes are on the 'from' side.
FROM_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "up": 1, "gate": 1, "down": 1}


def muon(p, gradients, config, rates, muon_rates):
    """Jordan et al. 2024 for the matrices of the blocks, AdamW for the rest.

    Nesterov's momentum with the bias corrections of Dozat 2016, as optax has it.
    """
    beta = config.muon_momentum
    gradients = [clipped(g, config.clip_norm) for g in gradients]
    matrices = [k for k in p if k.rpartition(".")[2] in FROM_AXES]
    rest = [k for k in p if k not in matrices]
    unclipped = type(config)(**{**vars(config), "clip_norm": 0.0})
    out = adamw({k: p[k] for k in rest}, gradients, unclipped, rates)
    for k in matrices:
        weight, momentum = p[k], 0.0
        for t, (g, rate) in enumerate(zip(gradients, muon_rates), start=1):
            momentum = beta * momentum + (1 - beta) * g[k]
            ahead = beta * momentum / (1 - beta ** (t + 1)) + (1 - beta) * g[k] / (1 - beta**t)
            inner = FROM_AXES[k.rpartition(".")[2]]
            step = np.stack([orthogonal(layer, inner) for layer in ahead])
            weight = weight - rate * (step + decay_of(config, k) * weight)
        out[k] = weight
    return out


def orthogonal(layer, inner: int):
    """Five Newton-Schulz steps towards the nearest orthogonal matrix, scaled by the shape."""
    m = int(np.prod(layer.shape[:inner]))
    x = layer.reshape(m, -1)
    n = x.shape[1]
    x = x / np.linalg.norm(x)
    for _ in range(5):
        if m > n:
            x = x.T
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        if m > n:
            x = x.T
    return (max(1.0, n / m) ** 0.5 * x).reshape(layer.shape)
