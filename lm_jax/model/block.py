"""The parts of a Transformer's block: norm, attention, feed-forward.

B batch, T query length, S key length, D width, N query heads, K key/value heads, H head width,
F feed-forward width, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm_jax.config import ModelConfig
from lm_jax.model import cache as kv
from lm_jax.model.activations import ACTIVATIONS
from lm_jax.model.attention import attention, attention_weights, step_attention
from lm_jax.model.dropout import dropout
from lm_jax.model.moe import Experts
from lm_jax.model.parameters import constant, normal
from lm_jax.model.projection import Lora, project
from lm_jax.model.quantized import take_place
from lm_jax.model.ring import ring_attention
from lm_jax.model.rope import apply_rope
from lm_jax.model.splash import splash_attention
from lm_jax.sharding.gather import gather
from lm_jax.sharding.mesh import activation_spec, names_in, reshard

# Attention that works on blocks of a row and makes its masks itself.
BLOCKWISE: dict[str, Callable[..., jax.Array]] = {
    "splash": splash_attention,
    "ring": ring_attention,
}


class Norm(nnx.Module):
    """Layer norm (Ba et al. 2016) or RMS norm (Zhang and Sennrich 2019), in float32."""

    def __init__(self, kind: str, width: int, epsilon: float, bias: bool, axis: str = "norm"):
        self.kind, self.epsilon = kind, epsilon
        self.scale = constant(1.0, (width,), axis)
        self.bias = constant(0.0, (width,), axis) if bias and kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        last = (None,) * (x.ndim - 1)
        y = y * self.scale.get_value()[last]
        if self.bias is not None:
            y = y + self.bias.get_value()[last]
        return y.astype(x.dtype)


class Attention(nnx.Module):
    # The weights of its products, and which of their axes are contracted.
    products: ClassVar = {"query": (-3,), "key": (-3,), "value": (-3,), "out": (-3, -2)}

    def __init__(self, config: ModelConfig, key: jax.Array):
        c = self.config = config
        D, N, K, H = c.width, c.heads, c.kv_heads, c.head_width
        kq, kk, kv_, ko = jax.random.split(key, 4)
        residual_std = c.init_std / (2 * c.layers) ** 0.5  # GPT-2, section 2.3
        self.query = normal(kq, (D, N, H), c.init_std, "embed", "heads", "head_width")
        self.key = normal(kk, (D, K, H), c.init_std, "embed", "kv_heads", "head_width")
        self.value = normal(kv_, (D, K, H), c.init_std, "embed", "kv_heads", "head_width")
        self.out = normal(ko, (N, H, D), residual_std, "heads", "head_width", "embed")
        bias = c.qkv_bias
        self.query_bias = constant(0.0, (N, H), "heads", "head_width") if bias else None
        self.key_bias = constant(0.0, (K, H), "kv_heads", "head_width") if bias else None
        self.value_bias = constant(0.0, (K, H), "kv_heads", "head_width") if bias else None
        self.out_bias = constant(0.0, (D,), "norm") if c.out_bias else None
        norm = functools.partial(Norm, "rmsnorm", H, c.norm_epsilon, False, "head_width")
        self.query_norm, self.key_norm = (norm(), norm()) if c.qk_norm else (None, None)
        self.query_lora = _adapter(c, "query", kq, self.query)
        self.key_lora = _adapter(c, "key", kk, self.key)
        self.value_lora = _adapter(c, "value", kv_, self.value)
        self.out_lora = _adapter(c, "out", ko, self.out, inputs=2)
        if c.quantize != "none":
            take_place(self, self.products)

    def __call__(self, x_BTD, context: "Context", layer, kind, cache, key):
        c = self.config
        mask_BTS, rope = context.of(kind)
        whole_BTD = context.whole(x_BTD, c.lora.rank > 0)
        heads = functools.partial(_heads, whole_BTD, context.length, c.float8)
        q_BTNH = heads(self.query, self.query_bias, self.query_lora, self.query_norm)
        k_BTKH = heads(self.key, self.key_bias, self.key_lora, self.key_norm)
        v_BTKH = heads(self.value, self.value_bias, self.value_lora, None)
        if rope is not None:
            q_BTNH, k_BTKH = apply_rope(q_BTNH, rope), apply_rope(k_BTKH, rope)
        q_BTNH = checkpoint_name(q_BTNH, "query")
        k_BTKH = checkpoint_name(k_BTKH, "key")
        v_BTKH = checkpoint_name(v_BTKH, "value")
        scaling = {"scale": c.attention_scale, "softcap": c.attention_softcap}
        common = {"length": context.length, **scaling}
        step = cache is not None and q_BTNH.shape[1] == 1 and key is None
        if cache is not None:
            cache, *kept = kv.update(cache, layer, k_BTKH, v_BTKH, context.positions_BT)
            k_BTKH, v_BTKH = (jnp.swapaxes(x_BKSH, 1, 2) for x_BKSH in kept)
        if step:
            y_BTNH = step_attention(q_BTNH, *kept, mask_BTS, **scaling)
        elif context.backend in BLOCKWISE:
            run = functools.partial(BLOCKWISE[context.backend], causal=c.causal, **common)
            of_kind = [functools.partial(run, window=w) for w in context.windows]
            inputs = q_BTNH, k_BTKH, v_BTKH, context.segments_BT
            y_BTNH = (
                of_kind[0](*inputs) if len(of_kind) == 1 else jax.lax.switch(kind, of_kind, *inputs)
            )
        else:
            y_BTNH = attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                mask_BTS,
                backend=context.backend,
                causal=c.causal and not c.prefix_attention,
                dropout_rate=c.dropout,
                dropout_key=key,
                **common,
            )
        weights_BNTS = None
        if context.capture:  # once more in the program, and computed once
            whole = activation_spec("batch", None, "kv_heads", "head_width")
            k_BTKH = reshard(k_BTKH, whole)
            weights_BKGTS = attention_weights(q_BTNH, k_BTKH, mask_BTS, **common)
            B, K, G, T, S = weights_BKGTS.shape
            apart = activation_spec("batch", "heads", context.length, None)
            weights_BNTS = jax.lax.reshape(weights_BKGTS, (B, K * G, T, S), out_sharding=apart)
        axes = "batch", context.residual, "embed"
        more = {"lora": self.out_lora, "float8": c.float8}
        y_BTD = project(y_BTNH, self.out, self.out_bias, *axes, **more)
        return y_BTD, cache, weights_BNTS


def _heads(x_BTD, length, float8, weight, bias, lora, norm):
    axes = "batch", length, *weight.axes[1:]
    y = project(x_BTD, weight, bias, *axes, lora=lora, float8=float8)
    return y if norm is None else norm(y)


def _adapter(c: ModelConfig, name: str, key: jax.Array, weight, inputs: int = 1) -> Lora | None:
    if not c.lora.rank or not {name, "all"} & set(c.lora.targets):
        return None
    return Lora(c.lora, jax.random.fold_in(key, 1), weight, inputs)  # not the numbers of the weight


class FeedForward(nnx.Module):
    products: ClassVar = {"up": (-2,), "gate": (-2,), "down": (-2,)}  # see `Attention`

    def __init__(self, config: ModelConfig, key: jax.Array):
        c = self.config = config
        D, F = c.width, c.mlp_width
        ku, kg, kd = jax.random.split(key, 3)
        residual_std = c.init_std / (2 * c.layers) ** 0.5
        self.up = normal(ku, (D, F), c.init_std, "embed", "mlp")
        self.gate = normal(kg, (D, F), c.init_std, "embed", "mlp") if c.gated_mlp else None
        self.down = normal(kd, (F, D), residual_std, "mlp", "embed")
        self.up_bias = constant(0.0, (F,), "mlp") if c.mlp_bias else None
        gate_bias = c.mlp_bias and c.gated_mlp
        self.gate_bias = constant(0.0, (F,), "mlp") if gate_bias else None
        self.down_bias = constant(0.0, (D,), "norm") if c.mlp_bias else None
        self.up_lora = _adapter(c, "up", ku, self.up)
        self.gate_lora = _adapter(c, "gate", kg, self.gate) if c.gated_mlp else None
        self.down_lora = _adapter(c, "down", kd, self.down)
        if c.quantize != "none":
            take_place(self, self.products)

    def __call__(self, x_BTD: jax.Array, context: "Context") -> jax.Array:
        c, activation = self.config, ACTIVATIONS[self.config.activation]
        product = functools.partial(project, float8=c.float8)
        x_BTD = context.whole(x_BTD, c.lora.rank > 0)
        axes = "batch", context.length, "mlp"
        h_BTF = product(x_BTD, self.up, self.up_bias, *axes, lora=self.up_lora)
        if self.gate is None:
            h_BTF = activation(h_BTF)
        else:
            gate_BTF = product(x_BTD, self.gate, self.gate_bias, *axes, lora=self.gate_lora)
            h_BTF = activation(gate_BTF) * h_BTF
        axes = "batch", context.residual, "embed"
        return product(h_BTF, self.down, self.down_bias, *axes, lora=self.down_lora)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Context:
    """What all blocks share in one forward pass.

    Layers are of as many kinds as there are windows; each kind has its mask and rotary tables.
    """

    positions_BT: jax.Array
    segments_BT: jax.Array | None
    masks_BTS: tuple[jax.Array | None, ...] | None  # None: the backend makes them itself
    ropes: tuple[tuple[jax.Array, jax.Array] | None, ...]
    windows: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    backend: str = dataclasses.field(metadata={"static": True})
    # The logical axis of a row's tokens where heads and feed-forward are split, and in between,
    # where more devices can share them; None: whole.
    length: str | None = dataclasses.field(metadata={"static": True})
    residual: str | None = dataclasses.field(metadata={"static": True})
    # Whether blocks say how attention weighs the tokens: with the backend 'xla' alone.
    capture: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def real_BT(self) -> jax.Array | None:
        """bool, where the residual stream is: no padding. None: there is none."""
        if self.segments_BT is None:
            return None
        return reshard(self.segments_BT > 0, activation_spec("batch", self.residual))

    def whole(self, x_BTD: jax.Array, adapted: bool) -> jax.Array:
        """The residual stream as the products take it.

        Args:
          adapted: whether adapters take it as well, whose first weight is not split.
        """
        if adapted:
            return reshard(x_BTD, activation_spec("batch", self.length, "embed"))
        between, here = (activation_spec("batch", a) for a in (self.residual, self.length))
        summed = tuple(name for name in names_in(between) if name not in names_in(here))
        return gather(x_BTD, activation_spec("batch", self.length, "embed"), summed)

    def of(self, kind) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array] | None]:
        """The mask and the tables of a kind, whose number may be traced."""

        def select(*options):
            return options[0] if len(options) == 1 else jax.lax.select_n(kind, *options)

        pick = functools.partial(jax.tree.map, select)
        mask_BTS = None if self.masks_BTS is None else pick(*self.masks_BTS)
        return mask_BTS, pick(*self.ropes)


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, key: jax.Array):
        c = self.config = config
        attention_key, mlp_key = jax.random.split(key)
        norm = functools.partial(Norm, c.norm, c.width, c.norm_epsilon, c.norm_bias)
        self.attention_norm, self.attention = norm(), Attention(c, attention_key)
        self.mlp_norm, self.mlp = norm(), (Experts if c.moe.experts else FeedForward)(c, mlp_key)
        both = c.norm_placement == "both"
        self.attention_out_norm, self.mlp_out_norm = (norm(), norm()) if both else (None, None)

    def __call__(self, x_BTD, context: Context, layer, kind, cache, key):
        """Returns the residual stream after this block, the cache with its keys and values, what
        the router did (None without experts), and the weights of attention, float32 [B, N, T, S]
        (None unless the context asks for them)."""
        rate, pre = self.config.dropout, self.config.norm_placement != "post"
        key_weights, key_attention, key_mlp = (
            (None,) * 3 if key is None else jax.random.split(key, 3)
        )
        h_BTD = self.attention_norm(x_BTD) if pre else x_BTD
        h_BTD, cache, weights = self.attention(h_BTD, context, layer, kind, cache, key_weights)
        if self.attention_out_norm is not None:
            h_BTD = self.attention_out_norm(h_BTD)
        x_BTD = x_BTD + dropout(h_BTD, rate, key_attention)
        if not pre:
            x_BTD = self.attention_norm(x_BTD)
        h_BTD, router = self.mlp_norm(x_BTD) if pre else x_BTD, None
        if self.config.moe.experts:
            h_BTD, router = self.mlp(h_BTD, context.real_BT, context.residual)
        else:
            h_BTD = self.mlp(h_BTD, context)
        if self.mlp_out_norm is not None:
            h_BTD = self.mlp_out_norm(h_BTD)
        x_BTD = x_BTD + dropout(h_BTD, rate, key_mlp)
        if not pre:
            x_BTD = self.mlp_norm(x_BTD)
        return x_BTD, cache, router, weights
