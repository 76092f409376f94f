"""The Transformer: one module for every family, shaped by `ModelConfig` alone.

B batch, T query length, S key length, D width, N query heads, K key/value heads, H head width,
F feed-forward width, V vocabulary, L layers.

GPT-2: layer norm, learned positions, GELU, biases, tied head. Llama: RMS norm, RoPE, SwiGLU,
grouped queries, no biases. The blocks' parameters are stacked, [L, ...], whether they are run by a
scan or one by one, so that a checkpoint does not depend on it.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lm_jax.config import ModelConfig
from lm_jax.model import cache as kv
from lm_jax.model.attention import attention, attention_mask, resolve_backend
from lm_jax.model.dropout import dropout
from lm_jax.model.parameters import constant, normal, project, use
from lm_jax.model.rope import apply_rope, rope_tables
from lm_jax.sharding.mesh import activation_spec

# What the forward pass keeps for the backward pass, by name. 'none' keeps all and computes nothing
# again; 'dots' keeps the outputs of products without a batch axis (the projections);
# 'full' keeps each block's input alone.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all_dots": jax.checkpoint_policies.dots_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
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

    def __call__(self, x_BTD, context: "Context", layer, cache, key):
        c = self.config
        q_BTNH = self._project(x_BTD, self.query, self.query_bias, self.query_norm)
        k_BTKH = self._project(x_BTD, self.key, self.key_bias, self.key_norm)
        v_BTKH = self._project(x_BTD, self.value, self.value_bias, None)
        if context.rope is not None:
            q_BTNH, k_BTKH = apply_rope(q_BTNH, context.rope), apply_rope(k_BTKH, context.rope)
        if cache is not None:
            cache, k_BTKH, v_BTKH = kv.update(cache, layer, k_BTKH, v_BTKH, context.positions_BT)
        y_BTNH = attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            context.mask_BTS,
            backend=context.backend,
            dropout_rate=c.dropout,
            dropout_key=key,
        )
        return project(y_BTNH, self.out, self.out_bias, "batch", "length", "embed"), cache

    def _project(self, x_BTD, weight, bias, norm):
        y = project(x_BTD, weight, bias, "batch", "length", *weight.axes[1:])
        return y if norm is None else norm(y)


class FeedForward(nnx.Module):
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

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        h_BTF = project(x_BTD, self.up, self.up_bias, "batch", "length", "mlp")
        if self.gate is None:
            h_BTF = activation(h_BTF)
        else:
            gate_BTF = project(x_BTD, self.gate, self.gate_bias, "batch", "length", "mlp")
            h_BTF = activation(gate_BTF) * h_BTF
        return project(h_BTF, self.down, self.down_bias, "batch", "length", "embed")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Context:
    """What all blocks share in one forward pass."""

    positions_BT: jax.Array
    mask_BTS: jax.Array | None
    rope: tuple[jax.Array, jax.Array] | None
    backend: str = dataclasses.field(metadata={"static": True})


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, key: jax.Array):
        c = self.config = config
        attention_key, mlp_key = jax.random.split(key)
        norm = functools.partial(Norm, c.norm, c.width, c.norm_epsilon, c.norm_bias)
        self.attention_norm, self.attention = norm(), Attention(c, attention_key)
        self.mlp_norm, self.mlp = norm(), FeedForward(c, mlp_key)

    def __call__(self, x_BTD, context: Context, layer, cache, key):
        """Returns the residual stream after this block, and the cache with its keys and values."""
        rate, pre = self.config.dropout, self.config.norm_placement == "pre"
        key_weights, key_attention, key_mlp = (
            (None,) * 3 if key is None else jax.random.split(key, 3)
        )
        h_BTD = self.attention_norm(x_BTD) if pre else x_BTD
        h_BTD, cache = self.attention(h_BTD, context, layer, cache, key_weights)
        x_BTD = x_BTD + dropout(h_BTD, rate, key_attention)
        if not pre:
            x_BTD = self.attention_norm(x_BTD)
        h_BTD = self.mlp(self.mlp_norm(x_BTD) if pre else x_BTD)
        x_BTD = x_BTD + dropout(h_BTD, rate, key_mlp)
        if not pre:
            x_BTD = self.mlp_norm(x_BTD)
        return x_BTD, cache


class Transformer(nnx.Module):
    """Token ids in, hidden states or logits out.

    Args:
      config: validated, with `vocab_size` set; not to be changed afterwards.
      key: draws the initial parameters.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        c = self.config = dataclasses.replace(config)
        token_key, position_key, block_key, head_key = jax.random.split(key, 4)
        self.embedding = normal(token_key, (c.vocab_size, c.width), c.init_std, "vocab", "embed")
        self.position_embedding = (
            normal(position_key, (c.max_length, c.width), c.init_std, "position", "embed")
            if c.position == "learned"
            else None
        )
        self.blocks = jax.vmap(functools.partial(Block, c))(jax.random.split(block_key, c.layers))
        # The name of the post-norm family's embedding norm; the pre-norm families end with it.
        self.norm = Norm(c.norm, c.width, c.norm_epsilon, c.norm_bias)
        self.head = (
            None
            if c.tied_head
            else normal(head_key, (c.width, c.vocab_size), c.init_std, "embed", "vocab")
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: kv.Cache | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, kv.Cache | None]:
        """The hidden states that `logits` turns into scores.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32, each token's place in its document; None: 0, 1, 2 ...
          segments_BT: int32 document ids; tokens see their own document only. None: one document.
          cache: with it, a token's keys and values go to the slot of its position, and it sees the
            slots up to its own. Excludes `segments_BT`.
          dropout_key: turns dropout on.

        Returns:
          [B, T, D] of the compute dtype, and the cache with these tokens in it (None without one).
        """
        c = self.config
        T = tokens_BT.shape[1]
        if cache is not None and (segments_BT is not None or not c.causal):
            raise ValueError("a cache needs a causal model and one document a row")
        order_BT = jnp.arange(T)[None]
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(order_BT, tokens_BT.shape)
        context = Context(
            positions_BT=positions_BT,
            mask_BTS=attention_mask(
                causal=c.causal,
                query_index=order_BT if cache is None else positions_BT,
                key_length=T if cache is None else cache.length,
                query_segments=segments_BT,
                key_segments=segments_BT,
            ),
            rope=rope_tables(c, positions_BT) if c.position == "rope" else None,
            # A cached step has a query of one token or a few: nothing for a fused kernel to gain.
            backend="xla" if cache is not None else resolve_backend(c, T),
        )
        activation = activation_spec("batch", "length", "embed")
        x_BTD = use(self.embedding, c.dtype).at[tokens_BT].get(out_sharding=activation)
        if self.position_embedding is not None:
            places = use(self.position_embedding, c.dtype)
            x_BTD = x_BTD + places.at[positions_BT].get(out_sharding=activation)
        if c.norm_placement == "post":
            x_BTD = self.norm(x_BTD)
        keys = None
        if dropout_key is not None and c.dropout:
            embed_key, layers_key = jax.random.split(dropout_key)
            x_BTD = dropout(x_BTD, c.dropout, embed_key)
            keys = jax.random.split(layers_key, c.layers)
        x_BTD, cache = self._run_blocks(x_BTD, context, cache, keys)
        if c.norm_placement == "pre":
            x_BTD = self.norm(x_BTD)
        return x_BTD, cache

    def _run_blocks(self, x_BTD, context, cache, keys):
        c = self.config

        def run(carry, inputs):
            x_BTD, cache = carry
            block, layer, key = inputs
            return block(x_BTD, context, layer, cache, key), None

        if c.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
        carry, inputs = (x_BTD, cache), (self.blocks, jnp.arange(c.layers), keys)
        if c.scan_layers:
            carry, _ = jax.lax.scan(run, carry, inputs)
        else:
            for i in range(c.layers):
                carry, _ = run(carry, jax.tree.map(operator.itemgetter(i), inputs))
        return carry

    def head_weight(self) -> jax.Array:
        """[D, V], float32: a sum over chunks of positions keeps its gradient's precision."""
        return use(self.embedding, "float32").T if self.head is None else use(self.head, "float32")

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 scores [B, T, V]."""
        return logits_of(x_BTD, self.head_weight())


def logits_of(x_BTD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """float32 [B, T, V], from one product of two matrices in the dtype of `x_BTD`."""
    (B, T, D), V = x_BTD.shape, head_DV.shape[1]
    x_MD = jax.lax.reshape(x_BTD, (B * T, D), out_sharding=activation_spec("batch", "embed"))
    logits_MV = jnp.einsum(
        "MD,DV->MV", x_MD, head_DV.astype(x_BTD.dtype), preferred_element_type=jnp.float32
    )
    spec = activation_spec("batch", "length", "vocab")
    return jax.lax.reshape(logits_MV, (B, T, V), out_sharding=spec)
