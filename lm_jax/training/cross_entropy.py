"""Cross-entropy over the vocabulary, in float32, in chunks of positions, and with its gradient.

The gradient is computed beside the loss, chunk by chunk, while the logits are there: the loss is
one number, so that all its gradient needs from the outside is a factor. No logits are kept or
computed again for the backward pass.

B batch, T length, D width, V vocabulary; U parts of the batch and W parts of a row that devices
hold, P positions of a device, I chunks of C positions each, X = W x C.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from lm_jax.model.head import ClassHead, Head
from lm_jax.sharding.gather import gradient_spec
from lm_jax.sharding.mesh import activation_spec, dividing, platform, reshard, shards
from lm_jax.training.sums import LossSums

# Logits that one device holds at a time where the chunk is left to be chosen: 2^27 float32 numbers,
# 512 MiB, and as much again for their gradient. Each chunk adds to the whole gradient of the head:
# with a quarter of this, that was a twentieth of the step of a model of 8B on TPUs. On CPUs, what
# fits in the caches is faster.
LOGITS_A_DEVICE = 2**27
_LOGITS_OF_A_CPU = 2**22
_SPARSE_CHUNKS = 8  # at least, where those without a target that counts are left out


def chunk_of(positions: int, vocab: int, *, sparse: bool = False) -> int:
    """How many positions of a device go in a chunk: of equal ones, where that costs no more than
    twice as many.

    Args:
      vocab: of one device.
    """
    limit = _LOGITS_OF_A_CPU if platform() == "cpu" else LOGITS_A_DEVICE
    least = max(-(-positions * vocab // limit), _SPARSE_CHUNKS if sparse else 1)
    least = min(least, positions)
    dividing = (n for n in range(least, min(2 * least, positions) + 1) if positions % n == 0)
    return -(-positions // next(dividing, least))


@dataclasses.dataclass(frozen=True)
class _How:
    z_loss: float
    label_smoothing: float
    sparse: bool


def cross_entropy(
    x_BTD: jax.Array,
    head: Head | ClassHead,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int | None = None,
    sparse: bool = False,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
) -> LossSums:
    """Weighted sums of the loss, and of what there is to say of it. The loss alone has a gradient,
    by `x_BTD` and by what of the head is learned; to ask for one of another sum is an error.

    Args:
      x_BTD: what the head takes, see `Transformer.head_input`.
      weights_BT: float32; 0 leaves a position out.
      chunk: positions of a device whose logits exist at a time; None: see `chunk_of`.
      sparse: many positions have a weight of 0. They are gathered at the end, and chunks of them
        alone are not computed.
      z_loss: weight of log(Z)^2 (PaLM, section 5).
      label_smoothing: share of a target that goes to all ids alike (Szegedy et al. 2016).
    """
    B, T = targets_BT.shape
    length = dividing("length", T)
    U, W = shards("batch"), shards(length)
    P = B // U * (T // W)
    chunk = min(chunk or chunk_of(P, head.vocab, sparse=sparse), P)
    padding = -P % chunk

    def apart(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [U, W, P and padding, ...]"""
        rest = (None,) * (x.ndim - 2)
        x = reshard(x, activation_spec("batch", length, *rest))
        split, spec = (U, B // U, W, T // W), activation_spec("batch", None, length, None, *rest)
        x = jnp.moveaxis(jax.lax.reshape(x, (*split, *x.shape[2:]), out_sharding=spec), 2, 1)
        spec = activation_spec("batch", length, None, *rest)
        x = jax.lax.reshape(x, (U, W, P, *x.shape[4:]), out_sharding=spec)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padding), *((0, 0),) * len(rest)))

    how = _How(z_loss, label_smoothing, sparse)
    inputs = apart(x_BTD), apart(targets_BT), apart(weights_BT)
    if sparse:
        order_UWP = jnp.argsort(inputs[2] == 0, axis=2, stable=True)
        inputs = tuple(_taken(x, order_UWP) for x in inputs)
    return _total(how, chunk, inputs[0], head.learned, head, *inputs[1:])


def _taken(x: jax.Array, order_UWP: jax.Array) -> jax.Array:
    index = order_UWP.reshape(*order_UWP.shape, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, index, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(how: _How, chunk: int, x_UWPD, learned, head, targets_UWP, weights_UWP) -> LossSums:
    def add(sums: LossSums, part) -> tuple[LossSums, None]:
        more = _sums(how, part[0], head.with_learned(learned), *part[1:])
        return jax.tree.map(jnp.add, sums, more), None

    chunks = _chunks(chunk, x_UWPD, targets_UWP, weights_UWP)
    return _loop(how, add, LossSums.zero(), chunks, lambda: None)[0]


def _total_forward(how: _How, chunk: int, *primals):
    x_UWPD, learned, head, targets_UWP, weights_UWP = jax.tree.map(lambda p: p.value, primals)
    chunks = _chunks(chunk, x_UWPD, targets_UWP, weights_UWP)
    shape = jax.typeof(chunks[0]).shape[1:]

    def loss(x_UXD, learned, targets_UX, weights_UX):
        sums = _sums(how, x_UXD, head.with_learned(learned), targets_UX, weights_UX)
        return sums.loss, sums

    def add(total, part):
        gradient = jax.grad(loss, (0, 1), has_aux=True)
        (d_x_UXD, d_learned), sums = gradient(part[0], learned, *part[1:])
        return jax.tree.map(jnp.add, total, (sums, d_learned)), d_x_UXD

    spec = activation_spec("batch", dividing("length", shape[1]), None)
    nothing = lambda: jnp.zeros(shape, x_UWPD.dtype, out_sharding=spec)  # noqa: E731
    zeros = LossSums.zero(), jax.tree.map(_no_gradient, learned)
    (sums, d_learned), d_x_IUXD = _loop(how, add, zeros, chunks, nothing)
    d_x_UWPD = _whole(d_x_IUXD, x_UWPD.shape)
    return sums, (d_x_UWPD, d_learned)


def _total_backward(how: _How, chunk: int, saved, d_sums: LossSums):
    for name, d_sum in d_sums._asdict().items():
        # The weight depends on nothing that has one.
        if name not in ("loss", "weight") and not isinstance(d_sum, SymbolicZero | None):
            raise ValueError(f"of a batch's sums 'loss' has a gradient, and '{name}' has none")
    d_loss = jnp.asarray(0.0) if isinstance(d_sums.loss, SymbolicZero) else d_sums.loss

    def scaled(gradient: jax.Array) -> jax.Array:
        factor, summed = d_loss, jax.typeof(gradient).sharding.spec.unreduced
        if summed:  # each device scales its part of the sum
            factor = reshard(d_loss, PartitionSpec(reduced=summed))
        return (factor * gradient.astype(jnp.float32)).astype(gradient.dtype)

    d_x_UWPD, d_learned = jax.tree.map(scaled, saved)
    return d_x_UWPD, d_learned, None, None, None


_total.defvjp(_total_forward, _total_backward, symbolic_zeros=True)


def _no_gradient(x: jax.Array) -> jax.Array:
    """Zeros of the type that the gradient of `x` has."""
    return jnp.zeros(x.shape, x.dtype, out_sharding=gradient_spec(x))


def _loop(how: _How, add, zeros: Any, chunks: tuple[jax.Array, ...], nothing) -> tuple[Any, Any]:
    """`add` over all chunks, or over those with something that counts; the others give
    `nothing()`."""
    if chunks[0].shape[0] == 1:
        total, out = add(zeros, jax.tree.map(lambda x: x[0], chunks))
        return total, jax.tree.map(lambda x: x[None], out)
    if how.sparse:

        def step(total, part):
            some = jnp.any(part[2] > 0)
            return jax.lax.cond(some, add, lambda total, _: (total, nothing()), total, part)

        return jax.lax.scan(step, zeros, chunks)
    return jax.lax.scan(add, zeros, chunks)


def _chunks(chunk: int, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """[U, W, P, ...] -> [I, U, X, ...]"""

    def first(x: jax.Array) -> jax.Array:
        (U, W, P), rest = x.shape[:3], x.shape[3:]
        whole, none = P // chunk, (None,) * len(rest)
        length = "length" if W > 1 else None
        spec = activation_spec("batch", length, None, None, *none)
        x = jax.lax.reshape(x, (U, W, whole, chunk, *rest), out_sharding=spec)
        spec = activation_spec(None, "batch", length, *none)
        shape = (whole, U, W * chunk, *rest)
        return jax.lax.reshape(jnp.moveaxis(x, 2, 0), shape, out_sharding=spec)

    return tuple(map(first, inputs))


def _whole(x_IUXD: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The reverse of `_chunks`."""
    (U, W, _, D), (whole, _, X, _) = shape, x_IUXD.shape
    length = "length" if W > 1 else None
    spec = activation_spec(None, "batch", length, None, None)
    x = jax.lax.reshape(x_IUXD, (whole, U, W, X // W, D), out_sharding=spec)
    spec = activation_spec("batch", length, None, None)
    return jax.lax.reshape(jnp.moveaxis(x, 0, 2), shape, out_sharding=spec)


def _sums(how: _How, x_UXD, head, targets_UX, weights_UX) -> LossSums:
    logits_UXV = head.logits(x_UXD)
    log_z_UX = jax.nn.logsumexp(logits_UXV, axis=-1)
    # A masked sum and no gather: it stays local where the vocabulary is sharded.
    is_target_UXV = jnp.arange(logits_UXV.shape[-1])[None, None, :] == targets_UX[:, :, None]
    target_UX = jnp.sum(jnp.where(is_target_UXV, logits_UXV, 0.0), axis=-1)
    nll_UX, squares_UX = log_z_UX - target_UX, jnp.square(log_z_UX)
    loss_UX = nll_UX
    if how.label_smoothing:
        uniform_UX = log_z_UX - jnp.mean(logits_UXV, axis=-1)
        loss_UX = nll_UX + how.label_smoothing * (uniform_UX - nll_UX)
    if how.z_loss:
        loss_UX = loss_UX + how.z_loss * squares_UX
    return LossSums(
        loss=jnp.sum(loss_UX * weights_UX),
        nll=jnp.sum(nll_UX * weights_UX),
        z=jnp.sum(squares_UX * weights_UX),
        weight=jnp.sum(weights_UX),
        right=jnp.sum((jnp.argmax(logits_UXV, axis=-1) == targets_UX) * weights_UX),
    )
