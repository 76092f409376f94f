"""A mixture of experts in place of a feed-forward (Shazeer et al. 2017; Jiang et al. 2024).

B batch, T length, D width, F an expert's width, E experts, K experts a token, L layers; of one
device: N tokens, G experts, M = N min(K, G) rows.

No token is dropped. What tokens ask of a device's experts is sorted by expert into one buffer of M
rows and multiplied by the experts in one grouped product (`jax.lax.ragged_dot`; on TPUs a kernel
that skips the rows that are not used, on CPUs each row times each expert). The devices along
`mesh.expert` share the experts out, and the batch: each gathers the group's tokens, works for those
that its experts are to have, and the results are summed and scattered back to whose tokens they
are. Those along `mesh.tensor` have a part of each expert's width, and are part of that exchange
where the residual stream is split over them too.

Memory: since all tokens may want the same expert, M is the least that holds every case, however
tokens travel; an all-to-all of the chosen tokens alone would move K / G of the bytes here, into a
buffer of the same size. Mixtral 8x7B, one row of 4096 tokens a device, expert = 8: N = M = 32,768;
256 MiB of sorted tokens in bfloat16 and 896 MiB for each of gate, up and their product.
"""

import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lm_jax.config import ModelConfig
from lm_jax.model.activations import ACTIVATIONS
from lm_jax.model.parameters import normal, use
from lm_jax.model.quantized import QuantizedWeight, take_place
from lm_jax.sharding.mesh import activation_spec, names_in, parameter_spec, reshard


class RouterSums(NamedTuple):
    """Sums over real tokens, float32, of one layer, or of all with a leading axis [L]."""

    load_E: jax.Array  # tokens that chose an expert
    probability_E: jax.Array  # the router's probabilities
    z: jax.Array  # log(sum(exp(logits)))^2

    @classmethod
    def zero(cls, config: ModelConfig) -> "RouterSums | None":
        """Those of all layers of a batch of nothing; None where there are no experts."""
        if not config.moe.experts:
            return None
        per_expert = jnp.zeros((config.layers, config.moe.experts), jnp.float32)
        return cls(per_expert, per_expert, jnp.zeros((config.layers,), jnp.float32))

    def balance_loss(self, load_LE: jax.Array, tokens: jax.Array) -> jax.Array:
        """How unevenly the experts are used: K where all have the same load, and E at most.

        E sum_e f_e p_e of a layer (Fedus et al. 2021, equations 4 to 6), the mean over the layers.
        As in Transformers' `load_balancing_loss_func`, f counts all K choices of a token; there the
        layers are put together first, so that one may make up for another. The fractions are of the
        whole batch (Qiu et al. 2025): of these sums, which may be a part of it, the
        probabilities count, and what a gradient flows through.

        Args:
          load_LE: of the whole batch.
          tokens: real tokens of the whole batch.
        """
        layers, experts = self.load_E.shape
        return jnp.sum(load_LE * self.probability_E) * experts / layers / tokens**2

    def z_loss(self, tokens: jax.Array) -> jax.Array:
        """ST-MoE's (Zoph et al. 2022, equation 5), the mean over the layers."""
        return jnp.mean(self.z) / tokens


class Experts(nnx.Module):
    products: ClassVar = {"up": (-2,), "gate": (-2,), "down": (-2,)}  # see `block.Attention`

    def __init__(self, config: ModelConfig, key: jax.Array):
        c = self.config = config
        D, F, E = c.width, c.mlp_width, c.moe.experts
        kr, ku, kg, kd = jax.random.split(key, 4)
        residual_std = c.init_std / (2 * c.layers) ** 0.5
        into, out = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
        self.router = normal(kr, (D, E), c.init_std, "embed", "features")
        self.up = normal(ku, (E, D, F), c.init_std, *into)
        self.gate = normal(kg, (E, D, F), c.init_std, *into) if c.gated_mlp else None
        self.down = normal(kd, (E, F, D), residual_std, *out)
        if c.quantize != "none":
            take_place(self, self.products)

    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array | None, length: str | None
    ) -> tuple[jax.Array, RouterSums]:
        """
        Args:
          real_BT: bool; padding goes to no expert, comes out as zeros and is not counted. None: all
            tokens are real.
          length: logical axis of T, here and in the result.
        """
        chosen_BTK, gates_BTK, sums = self._route(x_BTD, real_BT, length)
        return self._apply(x_BTD, chosen_BTK, gates_BTK, length), sums

    def _route(self, x_BTD, real_BT, length):
        """The numbers of each token's experts (E: none), their weights, and the sums; float32."""
        moe, E = self.config.moe, self.config.moe.experts
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE",
            x_BTD.astype(jnp.float32),
            use(self.router, "float32"),
            precision=jax.lax.Precision.HIGHEST,  # TPUs and GPUs would round the factors
            out_sharding=activation_spec("batch", length, "features"),
        )
        probabilities_BTE = jax.nn.softmax(logits_BTE)
        _, chosen_BTK = jax.lax.top_k(probabilities_BTE, moe.experts_per_token)
        if real_BT is not None:
            chosen_BTK = jnp.where(real_BT[:, :, None], chosen_BTK, E)
        # Masked sums and no gather, whose gradient would be a scatter.
        is_chosen_BTKE = chosen_BTK[:, :, :, None] == jnp.arange(E)[None, None, None]
        gates_BTK = jnp.sum(jnp.where(is_chosen_BTKE, probabilities_BTE[:, :, None], 0.0), -1)
        if moe.normalize_weights:
            tiny = jnp.finfo(jnp.float32).tiny  # padding has none
            gates_BTK /= jnp.maximum(jnp.sum(gates_BTK, -1, keepdims=True), tiny)

        def total(values, axes):
            return jnp.sum(values, axes, where=None if real_BT is None else
                           jnp.expand_dims(real_BT, range(2, values.ndim)))  # fmt: skip

        sums = RouterSums(
            load_E=jnp.sum(is_chosen_BTKE, (0, 1, 2), dtype=jnp.float32),
            probability_E=total(probabilities_BTE, (0, 1)),
            z=total(jnp.square(jax.nn.logsumexp(logits_BTE, -1)), (0, 1)),
        )
        return chosen_BTK, gates_BTK, sums

    def _apply(self, x_BTD, chosen_BTK, gates_BTK, length):
        weights = [w for w in (self.up, self.gate, self.down) if w is not None]
        values = [
            w.dequantized(x_BTD.dtype)
            if isinstance(w, QuantizedWeight)
            else w.get_value().astype(x_BTD.dtype)
            for w in weights
        ]
        apply = functools.partial(_on_one_device, self.config)
        if jax.sharding.get_abstract_mesh().empty:
            return apply(x_BTD, chosen_BTK, gates_BTK, *values)
        tokens = activation_spec("batch", length, None)
        specs = [_split_as_rows(parameter_spec(*w.axes), tokens) for w in weights]
        apply = jax.shard_map(
            functools.partial(apply, specs=(tokens, *specs)),
            in_specs=(tokens, tokens, tokens, *specs),
            out_specs=tokens,
        )
        return apply(x_BTD, chosen_BTK, gates_BTK, *map(reshard, values, specs))


def _split_as_rows(spec: P, tokens: P) -> P:
    """A weight's sharding, but for mesh axes along which neither tokens nor experts are split: what
    such devices do is the same, and takes whole weights (rows too short for `mesh.sequence`)."""
    used = {*names_in(tokens[0]), *names_in(tokens[1]), "expert", "tensor"}
    return P(*(tuple(a for a in names_in(entry) if a in used) or None for entry in spec))


def _on_one_device(
    config: ModelConfig,
    x_BTD: jax.Array,
    chosen_BTK: jax.Array,
    gates_BTK: jax.Array,
    *weights: jax.Array,
    specs: tuple[P, ...] = (),
) -> jax.Array:
    """What one device does with its part of everything: all of it, without a mesh.

    Args:
      specs: how the tokens and each of the weights are split; (): there is no mesh.
    """
    B, T, D = x_BTD.shape
    flat = [x.reshape(B * T, x.shape[2]) for x in (x_BTD, chosen_BTK, gates_BTK)]
    if not specs:
        return _grouped(config, *flat, weights, 0).reshape(B, T, D)
    mesh, tokens = jax.sharding.get_abstract_mesh(), specs[0]
    shared = tuple(a for a in ("expert", "tensor") if mesh.shape[a] > 1)
    split = names_in(tokens[0]) + names_in(tokens[1])
    exchange = tuple(a for a in shared if a in split)
    different = dict.fromkeys(split + shared)  # along these devices do different things

    def own(x: jax.Array, spec: P) -> jax.Array:
        """`x` as each device's own, so that its gradient is summed over all that have the same."""
        there = {name for entry in spec for name in names_in(entry)}
        return jax.lax.pcast(x, tuple(a for a in different if a not in there), to="varying")

    def whole(weight: jax.Array, spec: P) -> jax.Array:
        """Gathered in here, a weight has a gradient that is scattered as it is summed."""
        shape, weight = list(weight.shape), own(weight, spec)
        for axis, entry in enumerate(spec):
            if over := tuple(a for a in names_in(entry) if a not in shared):
                shape[axis] *= jax.lax.axis_size(over)
                # By an axis of its own: see `lm_jax.sharding.gather`.
                weight = jax.lax.all_gather(weight, over, axis=axis).reshape(shape)
        return weight

    flat = [own(x, tokens) for x in flat]
    if exchange:
        flat = [jax.lax.all_gather(x, exchange).reshape(-1, x.shape[1]) for x in flat]
    weights = tuple(map(whole, weights, specs[1:]))
    first = jax.lax.axis_index("expert") * weights[0].shape[0] if "expert" in shared else 0
    y_ND = _grouped(config, *flat, weights, first)
    if over := tuple(a for a in shared if a not in exchange):
        y_ND = jax.lax.psum(y_ND, over)
    if exchange:
        y_ND = jax.lax.psum_scatter(y_ND.reshape(-1, B * T, D), exchange)
    return y_ND.reshape(B, T, D)


def _grouped(config, x_ND, chosen_NK, gates_NK, weights, first):
    """The weighted sum of what experts `first` and on make of the tokens that chose them."""
    order = sorted_by_expert(chosen_NK, first, weights[0].shape[0])
    used_M1 = order.used_M[:, None]
    activation = ACTIVATIONS[config.activation]

    def product(rows, weight):
        # Rows that belong to no group may hold anything: kernels do not visit them.
        return jnp.where(used_M1, jax.lax.ragged_dot(rows, weight, order.sizes_G), 0)

    rows_MD = dispatch(x_ND, order)
    up, *gate, down = weights
    h_MF = product(rows_MD, up)
    h_MF = activation(product(rows_MD, gate[0])) * h_MF if gate else activation(h_MF)
    # Weighted here and not at the end, where the rows are as wide as the model.
    h_MF = (h_MF * pick(gates_NK, order)[:, None]).astype(x_ND.dtype)
    return combine(product(h_MF, down), order)


class Order(NamedTuple):
    """Which row of the buffer belongs to which choice; int32."""

    sizes_G: jax.Array  # rows of each expert, which come first
    token_M: jax.Array  # whose row it is
    choice_M: jax.Array  # and by which of the N K choices
    used_M: jax.Array  # bool
    row_NK: jax.Array  # where a choice's row is
    here_NK: jax.Array  # bool: it is an expert of this device


def sorted_by_expert(chosen_NK: jax.Array, first: jax.Array | int, experts: int) -> Order:
    """
    Args:
      chosen_NK: numbers of experts, different ones in a row but for those that there are not.
      first, experts: those of this device begin at `first`.
    """
    N, K = chosen_NK.shape
    M = N * min(K, experts)  # a token chooses an expert once
    local_NK = chosen_NK - first
    here_NK = (local_NK >= 0) & (local_NK < experts)
    key_A = jnp.where(here_NK, local_NK, experts).reshape(-1)
    sorted_A = jnp.argsort(key_A)
    sizes_G = jnp.sum(key_A[:, None] == jnp.arange(experts)[None], 0, dtype=jnp.int32)
    choice_M = sorted_A[:M]
    return Order(
        sizes_G=sizes_G,
        token_M=choice_M // K,
        choice_M=choice_M,
        used_M=jnp.arange(M) < jnp.sum(sizes_G),
        row_NK=jnp.minimum(jnp.argsort(sorted_A).reshape(N, K), M - 1),
        here_NK=here_NK,
    )


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return x.at[rows].get(mode="promise_in_bounds")


# Each of these is a gather, and so is its gradient: scatters are slow on TPUs.


@jax.custom_vjp
def dispatch(x_ND: jax.Array, order: Order) -> jax.Array:
    """[M, D]: the token of each row."""
    return _take(x_ND, order.token_M)


@jax.custom_vjp
def combine(rows_MD: jax.Array, order: Order) -> jax.Array:
    """[N, D]: for each token the sum of its rows, added up in float32."""
    total = jnp.zeros((), jnp.float32)
    for k in range(order.row_NK.shape[1]):  # one after the other: [N, K, D] is never held
        rows_ND = _take(rows_MD, order.row_NK[:, k])
        total = total + jnp.where(order.here_NK[:, k, None], rows_ND, 0).astype(jnp.float32)
    return total.astype(rows_MD.dtype)


@jax.custom_vjp
def pick(values_NK: jax.Array, order: Order) -> jax.Array:
    """[M]: what belongs to each row of something that each choice has."""
    return _take(values_NK.reshape(-1), order.choice_M)


def _used(d_MD: jax.Array, order: Order) -> jax.Array:
    return jnp.where(order.used_M[:, None], d_MD, 0)


dispatch.defvjp(
    lambda x, order: (dispatch(x, order), order), lambda order, d: (combine(d, order), None)
)
combine.defvjp(
    lambda rows, order: (combine(rows, order), order),
    lambda order, d: (_used(dispatch(d, order), order), None),
)
pick.defvjp(
    lambda values, order: (pick(values, order), order),
    lambda order, d: (jnp.where(order.here_NK, _take(d, order.row_NK), 0), None),
)
