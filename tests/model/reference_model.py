"""The Transformer once more, in float64 numpy with loops, written from the papers.

One row at a time; one head at a time; rotations as complex numbers; no code of lm_jax.
"""

import dataclasses
import math

import numpy as np


def forward(
    c, p: dict[str, np.ndarray], tokens, segments=None, positions=None, types=None, prefix=None
) -> np.ndarray:
    """Logits [T, V] of one row, float64."""
    p = {name: np.asarray(x, np.float64) for name, x in p.items()}
    T = len(tokens)
    segments = np.ones(T, int) if segments is None else segments
    positions = np.arange(T) if positions is None else positions
    x = p["embedding"][tokens] * (math.sqrt(c.width) if c.embedding_scale else 1)
    if c.position == "learned":
        x = x + p["position_embedding"][positions]
    if c.token_types:
        x = x + p["type_embedding"][np.zeros(T, int) if types is None else types]
    if c.norm_placement == "post":
        x = norm(c, p, "norm", x)
    for layer in range(c.layers):
        b = {k.removeprefix("blocks."): v[layer] for k, v in p.items() if k.startswith("blocks.")}
        b = adapted(c, b)
        window = c.windows[layer % len(c.windows)] if c.windows else 0
        where = segments, positions, window, prefix if prefix is not None else np.zeros(T, bool)
        if c.norm_placement == "pre":
            x = x + attend(c, b, norm(c, b, "attention_norm", x), *where)
            x = x + feed_forward(c, b, norm(c, b, "mlp_norm", x))
        elif c.norm_placement == "both":
            y = attend(c, b, norm(c, b, "attention_norm", x), *where)
            x = x + norm(c, b, "attention_out_norm", y)
            x = x + norm(c, b, "mlp_out_norm", feed_forward(c, b, norm(c, b, "mlp_norm", x)))
        else:
            x = norm(c, b, "attention_norm", x + attend(c, b, x, *where))
            x = norm(c, b, "mlp_norm", x + feed_forward(c, b, x))
    if c.norm_placement != "post":
        x = norm(c, p, "norm", x)
    if c.head == "masked_lm":
        x = norm(c, p, "head_norm", activation(c, x @ p["head_dense"] + p["head_dense_bias"]))
    x = x @ (p["embedding"].T if c.tied_head else p["head"]) + p.get("head_bias", 0.0)
    return c.logits_softcap * np.tanh(x / c.logits_softcap) if c.logits_softcap else x


def adapted(c, b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A layer's weights with those of its adapters added: W + alpha / rank A B."""
    out = dict(b)
    for name in [n.removesuffix("_lora.a") for n in b if n.endswith("_lora.a")]:
        low, high = b[f"{name}_lora.a"], b[f"{name}_lora.b"]
        out[name] = b[name] + c.lora.alpha / c.lora.rank * np.tensordot(low, high, 1)
    return out


def norm(c, p, name, x):
    if c.norm == "layernorm":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + c.norm_epsilon)
    else:
        x = rms(c, x)
    return x * p[f"{name}.scale"] + p.get(f"{name}.bias", 0.0)


def rms(c, x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon)


def attend(c, b, x, segments, positions, window, prefix):
    T, group = len(x), c.heads // c.kv_heads
    out = np.zeros((T, c.width))
    for n in range(c.heads):
        q = x @ b["attention.query"][:, n] + b.get("attention.query_bias", np.zeros((99, 1)))[n]
        k = x @ b["attention.key"][:, n // group]
        v = x @ b["attention.value"][:, n // group]
        if c.qkv_bias:
            k = k + b["attention.key_bias"][n // group]
            v = v + b["attention.value_bias"][n // group]
        if c.qk_norm:
            q = rms(c, q) * b["attention.query_norm.scale"]
            k = rms(c, k) * b["attention.key_norm.scale"]
        if c.position == "rope":
            q, k = rotate(c, q, positions, window), rotate(c, k, positions, window)
        for t in range(T):
            seen = [s for s in range(T) if s <= t or not c.causal or prefix[s]]
            seen = [s for s in seen if segments[s] == segments[t]]
            seen = [s for s in seen if not window or t - s < window]
            scores = k[seen] @ q[t] * (c.attention_scale or 1 / math.sqrt(c.head_width))
            if c.attention_softcap:
                scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
            weights = np.exp(scores - scores.max())
            out[t] += (weights / weights.sum()) @ v[seen] @ b["attention.out"][n]
    return out + b.get("attention.out_bias", 0.0)


def feed_forward(c, b, x):
    if c.moe.experts:
        return mixture(c, b, x)
    up = x @ b["mlp.up"] + b.get("mlp.up_bias", 0.0)
    if c.gated_mlp:
        h = activation(c, x @ b["mlp.gate"] + b.get("mlp.gate_bias", 0.0)) * up
    else:
        h = activation(c, up)
    return h @ b["mlp.down"] + b.get("mlp.down_bias", 0.0)


def mixture(c, b, x):
    """Mixtral, section 2.1, token by token."""
    out, experts = np.zeros_like(x), [k for k in ("mlp.up", "mlp.gate", "mlp.down") if k in b]
    for t, token in enumerate(x):
        scores = np.exp(token @ b["mlp.router"])
        scores /= scores.sum()
        chosen = np.argsort(-scores)[: c.moe.experts_per_token]
        share = scores[chosen] / (scores[chosen].sum() if c.moe.normalize_weights else 1)
        for weight, e in zip(share, chosen):
            dense = dataclasses.replace(c, moe=dataclasses.replace(c.moe, experts=0))
            out[t] += weight * feed_forward(dense, {k: b[k][e] for k in experts}, token)
    return out


def activation(c, x):
    match c.activation:
        case "gelu":
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        case "gelu_tanh":
            return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case "silu":
            return x / (1 + np.exp(-x))
        case "relu":
            return np.where(x > 0, x, 0.0)
        case "relu_squared":
            return np.where(x > 0, x**2, 0.0)


def rotate(c, x, positions, window):
    """Features i and i + H/2 are one complex number, turned by the position times a frequency."""
    half = c.head_width // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(
        1j * np.outer(positions, frequencies(c, window))
    )
    return np.concatenate([turned.real, turned.imag], -1)


def frequencies(c, window=0) -> np.ndarray:
    """Radians a position: RoFormer, section 3.2.2; linear: Chen et al. 2023; llama3: Meta's."""
    s, out = c.rope_scaling, []
    for i in range(c.head_width // 2):
        if window and c.window_rope_theta:
            out.append(c.window_rope_theta ** (-2 * i / c.head_width))
            continue
        f = 1.0 / c.rope_theta ** (2 * i / c.head_width)
        if s.kind == "linear":
            f /= s.factor
        elif s.kind == "llama3":
            wavelength = 2 * math.pi / f
            if wavelength > s.original_length / s.low_frequency_factor:
                f /= s.factor
            elif wavelength > s.original_length / s.high_frequency_factor:
                smooth = s.original_length / wavelength - s.low_frequency_factor
                smooth /= s.high_frequency_factor - s.low_frequency_factor
                f = (1 - smooth) * f / s.factor + smooth * f
        out.append(f)
    return np.array(out)
