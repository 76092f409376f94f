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

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lm_jax.config import OWN_HEADS, ModelConfig
from lm_jax.errors import UserError
from lm_jax.model import cache as kv
from lm_jax.model.activations import ACTIVATIONS
from lm_jax.model.attention import attention_mask, layer_kinds, prefix_of, resolve_backend
from lm_jax.model.block import BLOCKWISE, Block, Context, Norm
from lm_jax.model.dropout import dropout
from lm_jax.model.head import ClassHead, Head, KeptHead
from lm_jax.model.kept import KeptWeight
from lm_jax.model.moe import RouterSums
from lm_jax.model.parameters import constant, normal, use
from lm_jax.model.projection import project
from lm_jax.model.quantized import parts, take_place
from lm_jax.model.remat import REMAT_POLICIES
from lm_jax.model.rope import rope_tables
from lm_jax.sharding.mesh import (
    activation_spec,
    axis_size,
    dividing,
    names_in,
    parameter_spec,
    reshard,
)

# Columns of the embedding that a device looks up, at least: half of a TPU's 128 lanes.
_NARROWEST = 64


class Transformer(nnx.Module):
    """Token ids in, hidden states or logits out.

    Args:
      config: validated, with `vocab_size` set; not to be changed afterwards.
      key: draws the initial parameters.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        c = self.config = dataclasses.replace(config)
        token_key, position_key, block_key, head_key = jax.random.split(key, 4)
        type_key, dense_key, pool_key = jax.random.split(jax.random.fold_in(key, 1), 3)
        self.embedding = normal(token_key, (c.vocab_size, c.width), c.init_std, "vocab", "embed")
        self.position_embedding = (
            normal(position_key, (c.max_length, c.width), c.init_std, "position", "embed")
            if c.position == "learned"
            else None
        )
        self.type_embedding = (
            normal(type_key, (c.token_types, c.width), c.init_std, "position", "embed")
            if c.token_types
            else None
        )
        self.blocks = jax.vmap(functools.partial(Block, c))(jax.random.split(block_key, c.layers))
        # The post-norm family's embedding norm; the others end with it.
        self.norm = Norm(c.norm, c.width, c.norm_epsilon, c.norm_bias)
        self.pooler = self._dense(pool_key) if c.pooler else None
        self.pooler_bias = constant(0.0, (c.width,), "norm") if c.pooler else None
        masked = c.head == "masked_lm"
        self.head_dense = self._dense(dense_key) if masked else None
        self.head_dense_bias = constant(0.0, (c.width,), "norm") if masked else None
        self.head_norm = Norm(c.norm, c.width, c.norm_epsilon, c.norm_bias) if masked else None
        self.head_bias, self.head = self._head(head_key)
        if c.quantize != "none":
            of_words = self.head is not None and c.head not in OWN_HEADS.values()
            take_place(self, {"embedding": (-1,)} | ({"head": (-2,)} if of_words else {}))

    def _head(self, key: jax.Array) -> tuple[nnx.Param | None, nnx.Param | None]:
        """Bias and weight of what is not the embedding's."""
        c = self.config
        if c.head in ("classify", "span"):
            scores = c.labels if c.head == "classify" else 2
            # Without a bias where Transformers' classifiers have none.
            bias = None if c.causal else constant(0.0, (scores,), "norm")
            return bias, normal(key, (c.width, scores), c.init_std, "embed", "features")
        bias = constant(0.0, (c.vocab_size,), "vocab") if c.head == "masked_lm" else None
        if c.tied_head or c.head == "none":
            return bias, None
        return bias, normal(key, (c.width, c.vocab_size), c.init_std, "embed", "vocab")

    def _dense(self, key: jax.Array) -> nnx.Param:
        D = self.config.width
        return normal(key, (D, D), self.config.init_std, "embed", "features")

    def __call__(
        self, tokens_BT: jax.Array, **inputs: jax.Array | kv.Cache | None
    ) -> tuple[jax.Array, kv.Cache | None]:
        """The hidden states that `logits` turns into scores, and the cache: see `forward`."""
        x_BTD, cache, _ = self.forward(tokens_BT, **inputs)
        return x_BTD, cache

    def forward(
        self, tokens_BT: jax.Array, **inputs: jax.Array | kv.Cache | None
    ) -> tuple[jax.Array, kv.Cache | None, RouterSums | None]:
        """The hidden states that `logits` turns into scores.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32, each token's place in its document; None: 0, 1, 2 ...
          segments_BT: int32 document ids, 0 for padding; tokens see their own document only. None:
            one document.
          types_BT: int32, which of `model.token_types` each token is of; None: all of the first.
          prefix_BT: bool, the tokens that begin each document and see one another, with
            `model.prefix_attention`; None: no document has a prefix, and all of it is causal.
          cache: with it, a token's keys and values go to the slot of its position, and it sees the
            slots up to its own. Excludes `segments_BT`. A prompt with a prefix comes whole, its
            tokens in the first slots.
          dropout_key: turns dropout on.

        Returns:
          [B, T, D] of the compute dtype, the cache with these tokens in it (None without one), and
          what the routers of experts did, [L, ...] (None without experts).
        """
        return self._forward(tokens_BT, **inputs)[:3]

    def capture(
        self, tokens_BT: jax.Array, **inputs: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What comes about on the way, for those who want to look into the model.

        Attention is the plain one, whatever `model.attention` asks for.

        Args:
          tokens_BT, inputs: as of `forward`, without a cache and dropout.

        Returns:
          The hidden states of `forward`; the residual stream [L + 1, B, T, D] of the compute dtype,
          before each block and after the last, which `finish` turns into hidden states; and the
          weights of attention, float32 [L, B, N, T, S].
        """
        x_BTD, _, _, (streams_LBTD, weights_LBNTS) = self._forward(
            tokens_BT, capture=True, **inputs
        )
        return x_BTD, streams_LBTD, weights_LBNTS

    def _forward(
        self,
        tokens_BT: jax.Array,
        *,
        cache: kv.Cache | None = None,
        dropout_key: jax.Array | None = None,
        capture: bool = False,
        **inputs: jax.Array | None,
    ):
        """As `forward`, and the last two results of `capture`, or None, behind."""
        c = self.config
        slots = None if cache is None else cache.length
        x_BTD, context = self.begin(tokens_BT, slots=slots, capture=capture, **inputs)
        keys = None
        if dropout_key is not None and c.dropout:
            embed_key, layers_key = jax.random.split(dropout_key)
            x_BTD = dropout(x_BTD, c.dropout, embed_key)
            keys = jax.random.split(layers_key, c.layers)
        x_BTD, cache, router, captured = self._run_blocks(x_BTD, context, cache, keys)
        if captured is not None:
            streams_LBTD, weights_LBNTS = captured
            captured = jnp.concatenate([streams_LBTD, x_BTD[None]]), weights_LBNTS
        return self.finish(x_BTD), cache, router, captured

    def begin(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        prefix_BT: jax.Array | None = None,
        slots: int | None = None,
        capture: bool = False,
    ) -> tuple[jax.Array, Context]:
        """What comes before the first block: the embeddings, [B, T, D] of the compute dtype, and
        what all blocks share.

        Args:
          slots: of the cache; None: there is none.
          capture: whether blocks are to say how attention weighs the tokens.
          The others: see `forward`.
        """
        c = self.config
        T = tokens_BT.shape[1]
        if slots is not None and (segments_BT is not None or not c.causal):
            raise ValueError("a cache needs a causal model and one document a row")
        if prefix_BT is not None and not c.prefix_attention:
            raise ValueError("prefix_BT: this model has no prefix attention")
        cached_prompt = c.prefix_attention and slots is not None and T > 1
        if cached_prompt and (prefix_BT is None or positions_BT is not None):
            raise ValueError("a cached prompt needs its prefix_BT, and no other positions")
        length = None if slots is not None else dividing("length", T)
        residual = None if slots is not None else dividing("residual", T) or length
        order_BT = jnp.arange(T)[None]
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(order_BT, tokens_BT.shape)
        key_prefix = None
        if prefix_BT is not None:
            whole = activation_spec("batch", None)
            segments = None if segments_BT is None else reshard(segments_BT, whole)
            key_prefix = prefix_of(reshard(prefix_BT, whole).astype(bool), segments)
            if slots is not None:
                key_prefix = jnp.pad(key_prefix, ((0, 0), (0, slots - T)))
        mask = functools.partial(
            attention_mask,
            causal=c.causal,
            query_index=order_BT if slots is None else positions_BT,
            key_length=T if slots is None else slots,
            query_segments=segments_BT,
            key_segments=None
            if segments_BT is None
            else reshard(segments_BT, activation_spec("batch", None)),
            key_prefix=key_prefix,
        )
        windows, _ = layer_kinds(c)
        # A cached step has a query of one token or a few: nothing for a fused kernel to gain.
        plain = capture or slots is not None
        backend = "xla" if plain else resolve_backend(c, T)
        context = Context(
            positions_BT=positions_BT,
            segments_BT=segments_BT,
            masks_BTS=None if backend in BLOCKWISE else tuple(mask(window=w) for w in windows),
            ropes=tuple(
                rope_tables(c, positions_BT, w > 0) if c.position == "rope" else None
                for w in windows
            ),
            windows=windows,
            backend=backend,
            length=length,
            residual=residual,
            capture=capture,
        )
        # Rows of the tables are looked up, and their gradients added up, in float32.
        here, between = (activation_spec("batch", axis, "embed") for axis in (length, residual))

        def look_up(table: nnx.Param, ids_BT: jax.Array) -> jax.Array:
            found = use(table, "float32").at[ids_BT].get(out_sharding=here)
            return reshard(found.astype(c.dtype), between)

        x_BTD = reshard(self._embed(tokens_BT, length).astype(c.dtype), between)
        if c.embedding_scale:
            x_BTD = x_BTD * jnp.asarray(c.width**0.5, x_BTD.dtype)
        if self.position_embedding is not None:
            x_BTD = x_BTD + look_up(self.position_embedding, positions_BT)
        if self.type_embedding is not None:
            types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
            x_BTD = x_BTD + look_up(self.type_embedding, types_BT)
        elif types_BT is not None:
            raise ValueError("types_BT: this model has no token types")
        if c.norm_placement == "post":
            x_BTD = self.norm(x_BTD)
        return x_BTD, context

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The hidden states that the residual stream becomes after the last block."""
        return x_BTD if self.config.norm_placement == "post" else self.norm(x_BTD)

    def _embed(self, tokens_BT: jax.Array, length: str | None) -> jax.Array:
        """float32 [B, T, D], split along D as the table is."""
        table, scale = parts(self.embedding)
        found_BTD, rows = self._look_up(table.get_value(), tokens_BT, length)
        if scale is None:
            return found_BTD
        scale_V = reshard(scale.get_value(), activation_spec(None))
        scale_BT = scale_V.at[reshard(tokens_BT, rows)].get(out_sharding=rows)
        return found_BTD * scale_BT[:, :, None]

    def _look_up(
        self, table_VD: jax.Array, tokens_BT: jax.Array, length: str | None
    ) -> tuple[jax.Array, P | None]:
        """Rows of a table, split along D as it is, and how their B and T are.

        Each device looks up its part of the width for the rows of all devices that share the width
        out. To move what was found is less than to gather the table; but of parts so narrow that
        they would fill a small part of a TPU's vectors only, some are gathered.
        """
        held = parameter_spec("vocab", "embed")
        if held is None:
            return table_VD[tokens_BT], None
        width = names_in(held[1])
        while width and table_VD.shape[1] // axis_size(*width) < _NARROWEST:
            width = width[:-1]
        table_VD = reshard(table_VD, P(held[0], width or None))
        rows = P(*(
            tuple(name for name in names_in(part) if name not in width) or None
            for part in activation_spec("batch", length)
        ))  # fmt: skip
        found = P(*rows, width or None)
        return table_VD.at[reshard(tokens_BT, rows)].get(out_sharding=found), rows

    @property
    def outer(self) -> "Transformer":
        """What has what is before and behind the blocks: itself."""
        return self

    def run_blocks(
        self, x_BTD: jax.Array, context: Context, cache: kv.Cache
    ) -> tuple[jax.Array, kv.Cache]:
        """The residual stream [B, T, D] behind the last block, and the cache with these tokens.

        Args:
          x_BTD, context: of `begin`.
        """
        return self._run_blocks(x_BTD, context, cache, None)[:2]

    def _run_blocks(self, x_BTD, context, cache, keys):
        c = self.config

        def run(carry, inputs):
            x_BTD, cache = carry
            block, layer, kind, key = inputs
            x_BTD = checkpoint_name(x_BTD, "input")
            y_BTD, cache, router, weights = block(x_BTD, context, layer, kind, cache, key)
            return (y_BTD, cache), (router, (x_BTD, weights) if context.capture else None)

        if c.remat != "none":
            run = jax.checkpoint(run, policy=REMAT_POLICIES[c.remat], prevent_cse=not c.scan_layers)
        _, kinds_L = layer_kinds(c)
        layers = jnp.arange(c.layers), jnp.asarray(kinds_L, jnp.int32)
        carry, inputs = (x_BTD, cache), (self.blocks, *layers, keys)
        if c.scan_layers:
            carry, outputs = jax.lax.scan(run, carry, inputs)
        else:
            each = []
            for i in range(c.layers):
                carry, outputs = run(carry, jax.tree.map(operator.itemgetter(i), inputs))
                each.append(outputs)
            outputs = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
        return *carry, *outputs

    def pool(self, x_BTD: jax.Array) -> jax.Array:
        """[B, D]: what a classifier sees of a row, its first token's state by a dense layer and
        tanh. Needs `model.pooler`."""
        axes = "batch", None, "embed"
        return jnp.tanh(project(x_BTD[:, :1], self.pooler, self.pooler_bias, *axes))[:, 0]

    def head_input(self, x_BTD: jax.Array) -> jax.Array:
        """What the head takes for the hidden states `x_BTD`: [B, T, D]."""
        classify = self.config.head == "classify" and self.pooler is not None
        if self.head_dense is None and not classify:
            return x_BTD
        axes = "batch", dividing("length", x_BTD.shape[1]), "embed"
        x_BTD = reshard(x_BTD, activation_spec(*axes))
        if classify:
            return jnp.tanh(project(x_BTD, self.pooler, self.pooler_bias, *axes))
        h_BTD = project(x_BTD, self.head_dense, self.head_dense_bias, *axes)
        return self.head_norm(ACTIVATIONS[self.config.activation](h_BTD))

    def output_head(self, length: str | None = "length") -> Head | KeptHead | ClassHead:
        """
        Args:
          length: logical axis of the positions that it is for.

        Raises:
          UserError: the model ends with its hidden states.
        """
        if self.config.head == "none":
            raise UserError(
                "model.head = 'none': this model gives vectors (lm_jax.embed) and no scores"
            )
        if self.config.head in ("classify", "span"):
            return ClassHead(self.head, self.head_bias)
        c = self.config
        bias = None if self.head_bias is None else use(self.head_bias, "float32")
        if isinstance(self.head, KeptWeight):
            return KeptHead(self.head, bias, c.logits_softcap)
        weight, scale = parts(self.embedding if self.head is None else self.head)
        scale_V = None if scale is None else use(scale, "float32")
        weight_DV = weight.get_value().T if self.head is None else weight.get_value()
        return Head.of(
            weight_DV, bias, scale_V, dtype=c.dtype, softcap=c.logits_softcap, length=length
        )

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 scores [B, T, V], or what `ClassHead` gives, for the hidden states `x_BTD`."""
        return self.output_head().logits(self.head_input(x_BTD))


def skeleton_of(config: ModelConfig) -> Transformer:
    """With abstract arrays for parameters, on the mesh that is set. New, but for its config."""
    return jax.tree.map(lambda x: x, _skeleton_of(config, jax.sharding.get_abstract_mesh()))


@functools.lru_cache(maxsize=32)
def _skeleton_of(config, _mesh) -> Transformer:
    return jax.eval_shape(lambda: Transformer(config, jax.random.key(0)))
